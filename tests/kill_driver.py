"""Trains a run in one process after another, most of them killed with SIGKILL at a chosen moment; run by test_kill.py.

Everything is imported and compiled once; each attempt is a fork of that. Reads attempts as lines of JSON and answers
each with a line: {"moments": ["open metrics.jsonl", ...], "status": wait status, "seconds": ...}.
An attempt: {"arguments": of headwater, "folder": run folder, "at": moment or null, "time": which time it comes,
"after": seconds or null}.
"""

from __future__ import annotations

import json
import os
import re
import signal
import sys
import tempfile
import time
from collections import Counter
from pathlib import Path

import torch

import headwater.runs
from headwater import cli

WRITES = {"os.rename", "os.remove", "os.mkdir", "os.rmdir", "shutil.rmtree", "shutil.copyfile", "sqlite3.connect"}


class Killer:
    """Writes down every moment at which a file of the run is about to change, and ends the process at one of them."""

    def __init__(self, folder: str, at: str | None, time: int, log: int) -> None:
        self.folder, self.at, self.time, self.log = folder, at, time, log
        self.seen: Counter[str] = Counter()
        sys.addaudithook(self.hook)
        save_file = headwater.runs.save_file

        def watched(tensors: dict[str, torch.Tensor], path: str) -> None:  # safetensors opens files unheard
            self.moment("save", path)
            save_file(tensors, path)

        headwater.runs.save_file = watched

    def hook(self, event: str, arguments: tuple[object, ...]) -> None:
        if event == "open" and int(arguments[2] or 0) & (os.O_WRONLY | os.O_RDWR | os.O_CREAT):  # type: ignore[call-overload]
            self.moment("open", arguments[0])
        elif event in WRITES:
            self.moment(event.partition(".")[2], arguments[0])

    def moment(self, event: str, path: object) -> None:
        path = os.fspath(path) if isinstance(path, str | os.PathLike) else ""
        if not path.startswith(self.folder):
            return
        name = re.sub(r"figures/.*", "figures/", re.sub(r"partial-\w+|\d{3,}[.\d]*", "*", path[len(self.folder) :]))
        label = f"{event} {name}"
        os.write(self.log, f"{label}\n".encode())
        self.seen[label] += 1
        if label == self.at and self.seen[label] == self.time:
            os.kill(os.getpid(), signal.SIGKILL)


def attempt(order: dict[str, object]) -> dict[str, object]:
    with tempfile.TemporaryFile() as log:
        began = time.perf_counter()
        child = os.fork()
        if child == 0:
            null = os.open(os.devnull, os.O_WRONLY)
            os.dup2(null, 1)
            Killer(str(order["folder"]), order["at"], int(order["time"]), log.fileno())  # type: ignore
            try:
                cli.main(order["arguments"])  # type: ignore[arg-type]
            except SystemExit as ended:
                os._exit(int(ended.code or 0))
            os._exit(70)
        if order["after"] is not None:
            time.sleep(float(order["after"]))  # type: ignore[arg-type]
            os.kill(child, signal.SIGKILL)
        _, status = os.waitpid(child, 0)
        log.seek(0)
        moments = log.read().decode().splitlines()
        return {"moments": moments, "status": status, "seconds": time.perf_counter() - began}


def main() -> None:
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as folder:  # compiles the kernels and loads what draws
        try:
            cli.main([*json.loads(sys.stdin.readline()), "--out", str(Path(folder) / "run")])
        except SystemExit as ended:
            if ended.code:
                raise
    print(flush=True)
    for line in sys.stdin:
        print("ANSWER", json.dumps(attempt(json.loads(line))), flush=True)


if __name__ == "__main__":
    main()
