"""Asynchronous search from the command line: Ctrl-C, resume, a full disk; and no process is left behind."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from headwater.runs import Run

REWARD = """
import time

def score(words):
    time.sleep(0.002 * len(words))
    return [2.0 ** word.count("A") for word in words]
"""
FLAGS = [
    "--function", "mine:score", "--length", "5", "--search.searchers", "2", "--training.replayed", "8",
    "--training.log-every", "5", "--network.width", "16", "--samples", "20", "--quiet",
]  # fmt: skip


def started(folder: Path, iterations: int, *flags: str) -> subprocess.Popen[str]:
    """A run that has logged something, and has its workers."""
    (folder / "mine.py").write_text(REWARD)
    command = [sys.executable, "-m", "headwater.cli", "train", "sequences", "--out", "run", *FLAGS, *flags]
    command += ["--training.iterations", str(iterations)]
    process = subprocess.Popen(command, cwd=folder, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    metrics = folder / "run" / "metrics.jsonl"
    while not (metrics.exists() and metrics.read_text().count("\n") >= 3):
        assert process.poll() is None, process.communicate()[1]
        time.sleep(0.02)
    return process


def children(pid: int) -> list[int]:
    return [int(child) for child in Path(f"/proc/{pid}/task/{pid}/children").read_text().split()]


def is_there(pid: int) -> bool:
    return Path(f"/proc/{pid}").exists()


def test_control_c_leaves_a_checkpoint_and_no_process_and_resume_ends_the_run(tmp_path: Path) -> None:
    process = started(tmp_path, 200)
    workers = children(process.pid)
    assert len(workers) == 2
    os.kill(process.pid, signal.SIGINT)
    _, said = process.communicate(timeout=120)
    assert process.returncode == 130
    assert "headwater resume run" in said
    assert not any(map(is_there, workers))
    checkpoint = Run.open(tmp_path / "run").latest_checkpoint()
    assert checkpoint is not None
    assert 15 <= checkpoint.iteration < 200
    assert "search" in checkpoint.tensors
    command = [sys.executable, "-m", "headwater.cli", "resume", "run", "--quiet"]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    rows = Run.open(tmp_path / "run").metrics()
    assert [row["iteration"] for row in rows] == list(range(5, 201, 5))
    assert all(row["search/staleness_max"] <= 20 for row in rows)
    assert rows[-1]["trajectories"] >= 200 * 32
    page = (tmp_path / "run" / "report.html").read_text()
    assert "<h2>Search and learning</h2>" in page
    for figure in ("search_throughput", "learner_throughput", "search_idle", "staleness", "total_variation_by_time"):
        assert (tmp_path / "run" / "figures" / f"{figure}.svg").stat().st_size > 1000


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="needs a device that is always full")
def test_a_full_disk_ends_the_run_with_its_reason_and_no_process_is_left(tmp_path: Path) -> None:
    process = started(tmp_path, 100_000, "--training.checkpoint-every", "10")
    workers = children(process.pid)
    (tmp_path / "full").symlink_to("/dev/full")
    (tmp_path / "full").rename(tmp_path / "run" / "metrics.jsonl")
    _, said = process.communicate(timeout=120)
    assert process.returncode == 1
    assert "No space left on device" in said
    assert "Traceback" not in said
    assert not any(map(is_there, workers))
    checkpoint = Run.open(tmp_path / "run").latest_checkpoint()
    assert checkpoint is not None
    assert checkpoint.iteration >= 10
