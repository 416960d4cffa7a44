"""The replay at a million trajectories: what adding and drawing cost, one after the other, and how much room it takes.

    python benchmarks/replay.py                  writes benchmarks/results/replay.json and replay.md

Every figure is of one call that adds 1,000 trajectories or draws 1,000, with adds and draws alternating, so that
nothing kept since the last draw helps. Milliseconds are wall-clock, and of the processor in brackets: on a machine that
others use too, the first contain their turns. Kernels are compiled before. "churn" evicts 700 of the oldest and
replaces 300 known objects an add.
"""

from __future__ import annotations

import json
import os
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from multiprocessing import get_context
from pathlib import Path
from typing import TypeVar

import numpy as np
import torch
import tyro
from torch import Generator, Tensor

from headwater.replay import (
    Diverse,
    Mixture,
    PerCondition,
    Recent,
    Replay,
    RewardRank,
    RewardSoftmax,
    Rule,
    Stratified,
    Uniform,
)
from headwater.runs import provenance
from headwater.trajectories import Trajectories

Result = TypeVar("Result")
Row = dict[str, str | float]

RULES: dict[str, Rule] = {
    "recent": Recent(),
    "uniform": Uniform(),
    "softmax": RewardSoftmax(),
    "rank": RewardRank(),
    "stratified": Stratified(),
    "mixture": Mixture(0.3, RewardSoftmax()),
    "flat softmax": RewardSoftmax(100.0),
    "diverse": Diverse(RewardSoftmax(100.0), 4),
    "per condition": PerCondition(RewardSoftmax(), 10),
}


@dataclass(frozen=True)
class Scale:
    """How much to measure."""

    entries: int = 1_000_000
    """Trajectories in the replay."""
    batch: int = 1_000
    """Trajectories added or drawn by a call."""
    rounds: int = 300
    """Adds and draws of each rule."""
    seed: int = 0
    """Of the trajectories and the draws."""
    out: Path = Path(__file__).parent / "results"
    """Folder of the results."""


def trajectories(identity: Tensor, mean_length: int, width: int, generator: Generator) -> Trajectories:
    """Trajectories of the hypergrid's kind: int32 `[S, width]` states and int64 actions; 10 conditions, log-rewards
    that span hundreds of nats.
    """
    count = len(identity)
    lengths = torch.randint(1, 2 * mean_length, (count,), generator=generator)
    total = int(lengths.sum())
    return Trajectories(
        steps={
            "state": torch.randint(0, 20, (total, width), dtype=torch.int32, generator=generator),
            "action": torch.randint(0, width + 1, (total,), generator=generator),
        },
        lengths=lengths,
        condition=torch.randint(0, 10, (count, 1), generator=generator).float(),
        log_reward=100 * torch.randn(count, generator=generator),
        log_behaviour=-lengths.float(),
        version=torch.zeros(count, dtype=torch.int64),
        identity=identity,
    )


def content_bytes(state: dict[str, Tensor]) -> int:
    return sum(tensor.nbytes for tensor in state.values())


def resident_bytes() -> int:
    """Resident memory of this process, from the system's own count of its pages."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith("VmRSS"))


class Watch:
    """Milliseconds of each call, by wall clock and of the processor."""

    def __init__(self) -> None:
        self.wall: list[float] = []
        self.processor: list[float] = []

    def __call__(self, function: Callable[[], Result]) -> Result:
        wall, processor = time.perf_counter(), time.thread_time()
        result = function()
        self.wall.append((time.perf_counter() - wall) * 1e3)
        self.processor.append((time.thread_time() - processor) * 1e3)
        return result

    def row(self, name: str) -> Row:
        figures: Row = {"what": name, "calls": len(self.wall)}
        for clock, values in (("wall", self.wall), ("processor", self.processor)):
            p50, p99 = np.quantile(values, [0.5, 0.99])
            figures |= {f"{clock}_p50": p50, f"{clock}_p99": p99, f"{clock}_max": max(values)}
        return figures


def filled(scale: Scale, mean_length: int, width: int, generator: Generator) -> tuple[Replay, list[Row]]:
    replay, watch = Replay(scale.entries, Uniform()), Watch()
    for first in range(0, scale.entries, scale.batch):
        batch = trajectories(torch.arange(first, first + scale.batch), mean_length, width, generator)
        watch(lambda batch=batch: replay.add(batch))  # type: ignore[misc]
    return replay, [watch.row("add, filling up")]


def warm_up() -> None:
    """Every kernel is compiled before it is timed."""
    generator = Generator().manual_seed(0)
    replay = Replay(100, Mixture(0.5, RewardRank()))
    for first in range(0, 400, 50):
        replay.add(trajectories(torch.arange(first, first + 60), 20, 4, generator))
        replay.sample(10, generator)


def times(scale: Scale) -> list[Row]:
    warm_up()
    generator = Generator().manual_seed(scale.seed)
    replay, rows = filled(scale, 20, 4, generator)
    newest, known = scale.entries, scale.batch * 3 // 10
    adds = Watch()
    for name, rule in RULES.items():
        replay.rule, draws = rule, Watch()
        draws_of_rule = scale.rounds if name not in ("diverse", "per condition") else max(scale.rounds // 30, 3)
        replay.sample(scale.batch, generator)
        for _ in range(draws_of_rule):
            again = torch.randint(newest - scale.entries // 2, newest, (known,), generator=generator)
            fresh = torch.arange(newest, newest + scale.batch - known)
            newest += len(fresh)
            batch = trajectories(torch.cat([again, fresh]), 20, 4, generator)
            adds(lambda batch=batch: replay.add(batch))  # type: ignore[misc]
            draws(lambda: replay.sample(scale.batch, generator))
        rows.append(draws.row(f"draw, {name}"))
    rows.insert(1, adds.row("add, churn"))
    replay.rule = RewardSoftmax()
    duplicates, draws = Watch(), Watch()
    for _ in range(scale.rounds):
        again = torch.randint(newest - scale.entries // 2, newest, (scale.batch,), generator=generator)
        batch = trajectories(again, 20, 4, generator)
        duplicates(lambda batch=batch: replay.add(batch))  # type: ignore[misc]
        draws(lambda: replay.sample(scale.batch, generator))
    rows.insert(2, duplicates.row("add, known objects only"))
    return rows


def room(scale: Scale, name: str, entries: int, mean_length: int, width: int) -> Row:
    """Bytes an entry, and seconds to make, write and read a checkpoint."""
    warm_up()
    generator = Generator().manual_seed(scale.seed)
    before = resident_bytes()
    replay, _ = filled(Scale(entries, scale.batch), mean_length, width, generator)
    resident = resident_bytes() - before
    began = time.perf_counter()
    state = replay.state()
    made = time.perf_counter() - began
    content = content_bytes(state)
    del state
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "replay.safetensors"
        began = time.perf_counter()
        replay.save(path)
        saved = time.perf_counter() - began
        disk = path.stat().st_size
        again = Replay(entries, Uniform())
        began = time.perf_counter()
        again.load(path)
        loaded = time.perf_counter() - began
    return {
        "what": name,
        "entries": entries,
        "content": content / entries,
        "disk": disk / entries,
        "resident": resident / entries,
        "counted": replay._store.nbytes / entries,
        "state_seconds": made,
        "save_seconds": saved,
        "load_seconds": loaded,
    }


def alone(function: Callable[..., Row], *inputs: object) -> Row:
    """Called in a process of its own, whose memory nothing else has shaped."""
    with get_context("spawn").Pool(1) as pool:
        return pool.apply(function, inputs)


def page(figures: dict[str, list[Row]], where: dict[str, object]) -> str:
    lines = ["# The replay at a million trajectories", "", "`" + " ".join(map(str, where["command"])) + "`", ""]  # type: ignore[call-overload]
    lines += [f"- {name}: {where[name]}" for name in ("versions", "hardware", "scale", "load")]
    lines += ["", "Milliseconds a call, wall-clock (processor):", ""]
    lines += ["| | calls | p50 | p99 | max |", "|---|---|---|---|---|"]
    for row in figures["times"]:
        cells = [f"{row[f'wall_{name}']:.2f} ({row[f'processor_{name}']:.2f})" for name in ("p50", "p99", "max")]
        lines.append(f"| {row['what']} | {row['calls']} | " + " | ".join(cells) + " |")
    lines += ["", "Bytes a trajectory, and seconds for the whole:", ""]
    names = ["entries", "content", "disk", "resident", "counted", "state_seconds", "save_seconds", "load_seconds"]
    lines += ["| | " + " | ".join(name.replace("_", " ") for name in names) + " |", "|---" * (len(names) + 1) + "|"]
    lines += [
        f"| {row['what']} | " + " | ".join(f"{row[name]:.4g}" for name in names) + " |" for row in figures["room"]
    ]
    lines += [
        "",
        "content: the packed tensors themselves; resident: growth of the process; counted: memory that the replay says "
        "it has touched; save and load: to and from a file, with the state made on the way.",
        "",
    ]
    return "\n".join(lines)


def main(scale: Scale) -> None:
    torch.set_num_threads(1)
    long = max(scale.entries // 50, scale.batch)
    figures = {
        "room": [
            alone(room, scale, "20 steps of 16 + 8 bytes", scale.entries, 20, 4),
            alone(room, scale, "1,000 steps of 16 + 8 bytes", long, 1000, 4),
        ],
        "times": times(scale),
    }
    where = provenance(["python", "benchmarks/replay.py", *sys.argv[1:]], scale.seed)
    where["scale"] = {name: value for name, value in asdict(scale).items() if name != "out"}
    where["load"] = f"{os.getloadavg()[1]:.1f} running on average over the last 5 minutes"
    scale.out.mkdir(parents=True, exist_ok=True)
    (scale.out / "replay.json").write_text(json.dumps(where | figures, indent=2) + "\n")
    (scale.out / "replay.md").write_text(page(figures, where))
    print(page(figures, where))


if __name__ == "__main__":
    main(tyro.cli(Scale))
