"""Contenders as live processes that take turns, and the ratios between them, taken turn by turn."""

from __future__ import annotations

import json
import os
import subprocess
import tempfile
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from types import TracebackType
from typing import Any

from contenders.language import LanguageTask
from contenders.protocol import Task

OURS = "headwater"
_HERE = Path(__file__).resolve().parent
_ONE_THREAD_XLA = "--xla_cpu_multi_thread_eigen=false intra_op_parallelism_threads=1"


@dataclass(frozen=True)
class Runtime:
    """How to start one contender: its Python, its worker script, and the peer's checkout if it is one."""

    python: Path
    worker: str
    checkout: Path | None = None


class Worker:
    """A contender's process, bound to the first `threads` cores. Leaving the `with` block ends it."""

    def __init__(self, runtime: Runtime, task: Task | LanguageTask, threads: int, folder: Path) -> None:
        names = ("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS", "NUMBA_NUM_THREADS")
        environment = os.environ | dict.fromkeys(names, str(threads))
        if runtime.checkout is not None:
            environment.pop("PYTHONPATH", None)
            environment["PEER_CHECKOUT"] = str(runtime.checkout)
            if threads == 1:
                environment["XLA_FLAGS"] = _ONE_THREAD_XLA
        cores = sorted(os.sched_getaffinity(0))[:threads] if hasattr(os, "sched_getaffinity") else []
        if hasattr(os, "sched_getaffinity") and len(cores) < threads:
            raise ValueError(f"threads = {threads}: this process may use only {len(cores)} cores")
        self._log = tempfile.TemporaryFile("w+")  # noqa: SIM115 (closed with the worker)
        request = json.dumps({"cores": cores, "task": json.loads(task.to_json())})
        self._process = subprocess.Popen(
            [str(runtime.python), str(_HERE / "contenders" / runtime.worker), request],
            stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=self._log, text=True, env=environment, cwd=folder,
        )  # fmt: skip
        self.about = self.read()

    def ask(self, **request: object) -> dict[str, Any]:
        """Send one request and wait for its answer. Raises RuntimeError with the last words of a process that died."""
        assert self._process.stdin is not None
        with suppress(BrokenPipeError):  # that it has died, and of what, is for `read` to say
            self._process.stdin.write(json.dumps(request) + "\n")
            self._process.stdin.flush()
        return self.read()

    def milliseconds(self, iterations: int) -> tuple[float, float]:
        """CPU and wall milliseconds per iteration of `iterations` iterations."""
        took = self.ask(do="run", iterations=iterations)
        return took["cpu"] / iterations * 1e3, took["wall"] / iterations * 1e3

    def read(self) -> dict[str, Any]:
        """The next line that it says. Raises RuntimeError as `ask` does."""
        assert self._process.stdout is not None
        line = self._process.stdout.readline()
        if line:
            answer: dict[str, Any] = json.loads(line)
            return answer
        self._process.wait()
        self._log.seek(0)
        raise RuntimeError(f"{self._process.args[1]} died:\n{self._log.read()[-3000:]}")  # type: ignore[index]

    def __enter__(self) -> Worker:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._process.kill()
        self._process.communicate()
        self._log.close()


@dataclass
class Timings:
    """What the turns of one contender took, in milliseconds per iteration, turn by turn."""

    iterations: int
    cpu: list[float]
    wall: list[float]


def take_turns(workers: Mapping[str, Worker], rounds: int, seconds: float) -> dict[str, Timings]:
    """`rounds` rounds in which every contender runs for about `seconds` (its number of iterations is set once)."""
    timings = {}
    for name, worker in workers.items():
        worker.milliseconds(10)  # what the first iterations compile is no part of the work
        _, wall = worker.milliseconds(10)
        timings[name] = Timings(max(1, round(seconds * 1e3 / wall)), [], [])
    for _ in range(rounds):
        for name, worker in workers.items():
            cpu, wall = worker.milliseconds(timings[name].iterations)
            timings[name].cpu.append(cpu)
            timings[name].wall.append(wall)
    return timings


def spread(values: Sequence[float]) -> dict[str, float]:
    """Median, lowest and highest."""
    return {"median": median(values), "low": min(values), "high": max(values)}


def ratios(timings: Mapping[str, Timings]) -> dict[str, dict[str, dict[str, float]]]:
    """How many times faster ours is than each other contender, by CPU and by wall time, turn by turn."""
    ours = timings[OURS]
    return {
        name: {
            "cpu": spread([theirs / mine for theirs, mine in zip(other.cpu, ours.cpu, strict=True)]),
            "wall": spread([theirs / mine for theirs, mine in zip(other.wall, ours.wall, strict=True)]),
        }
        for name, other in timings.items()
        if name != OURS
    }
