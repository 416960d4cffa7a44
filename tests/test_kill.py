"""A run that is killed with SIGKILL, at any moment, and resumed ends as one that was never stopped: same weights, same
rows, same table of objects.

HEADWATER_SOAK=200 kills that many times more, at random.
"""

from __future__ import annotations

import json
import os
import random
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import closing
from pathlib import Path

import pytest

from headwater.objects import ObjectTable
from headwater.runs import Run

SETTINGS = [
    "hypergrid", "--quiet", "--dimensions", "2", "--side", "4", "--network.width", "16", "--samples", "20",
    "--training.iterations", "24", "--training.batch-size", "4", "--training.replayed", "4",
    "--exploration.average", "0.9", "--training.log-every", "2", "--training.evaluate-every", "10",
    "--training.checkpoint-every", "5",
]  # fmt: skip
TIMES = ("seconds", "trajectories_per_second")


class Driver:
    """`kill_driver.py` with what it answers. settings: of the runs. kills: attempts that ended by SIGKILL so far."""

    def __init__(self, settings: Sequence[str] = SETTINGS) -> None:
        script = Path(__file__).parent / "kill_driver.py"
        self.settings, self.kills = settings, 0
        self.process = subprocess.Popen(
            [sys.executable, str(script)], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
        )
        self.send(["train", *self.settings])

    def send(self, message: object) -> None:
        assert self.process.stdin is not None
        print(json.dumps(message), file=self.process.stdin, flush=True)

    def attempt(
        self, folder: Path, at: str | None = None, time: int = 1, after: float | None = None
    ) -> dict[str, object]:
        """Train or resume in a process of its own, until it is killed or done."""
        is_run = (folder / "settings.toml").exists()
        arguments = ["resume", str(folder), "--quiet"] if is_run else ["train", *self.settings, "--out", str(folder)]
        self.send({"arguments": arguments, "folder": f"{folder}/", "at": at, "time": time, "after": after})
        assert self.process.stdout is not None
        for line in self.process.stdout:
            if line.startswith("ANSWER "):
                answer: dict[str, object] = json.loads(line.removeprefix("ANSWER "))
                assert answer["status"] in (0, signal.SIGKILL), answer
                self.kills += answer["status"] == signal.SIGKILL
                return answer
        raise AssertionError("the driver ended")


@pytest.fixture(scope="module")
def driver() -> Iterator[Driver]:
    driver = Driver()
    yield driver
    driver.process.communicate(timeout=60)
    print(f"\nkilled {driver.kills} times")


@pytest.fixture(scope="module")
def whole(driver: Driver, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, object]]:
    """A run that was never stopped, and what the driver saw of it."""
    folder = tmp_path_factory.mktemp("whole") / "run"
    answer = driver.attempt(folder)
    assert answer["status"] == 0
    return folder, answer


def content(folder: Path) -> dict[str, object]:
    """All that two runs of the same settings must have in common."""
    run = Run.open(folder)
    checkpoints = sorted((folder / "checkpoints").iterdir())
    state = json.loads((checkpoints[-1] / "state.json").read_text())
    with closing(ObjectTable(run.objects_path)) as table:
        objects = sorted(table.best())
    return {
        "checkpoints": [path.name for path in checkpoints],
        "tensors": {path.name: path.read_bytes() for path in checkpoints[-1].glob("*.safetensors")},
        "state": {name: value for name, value in state.items() if name not in TIMES},
        "metrics": [{name: row[name] for name in row if name not in TIMES} for row in run.metrics()],
        "lines": len((folder / "metrics.jsonl").read_text().splitlines()),
        "objects": objects,
        "samples": (folder / "samples.csv").read_text(),
        "evaluation": run.evaluation(),
        "settings": (folder / "settings.toml").read_text(),
        "left over": [str(path) for path in folder.rglob("*partial*")],
        "files": {path.name for path in folder.iterdir()},
    }


def assert_same_end(folder: Path, whole: Path) -> None:
    ours, theirs = content(folder), content(whole)
    assert [name for name in theirs if ours[name] != theirs[name]] == []


def test_the_whole_run_is_what_the_kills_are_compared_with(whole: tuple[Path, dict[str, object]]) -> None:
    found = content(whole[0])
    assert found["checkpoints"] == ["iteration-000000020", "iteration-000000024"]
    assert set(found["tensors"]) == {  # type: ignore[call-overload]
        f"{part}.safetensors" for part in ("policy", "average", "optimizer", "random", "replay")
    }
    assert [row["iteration"] for row in found["metrics"]] == list(range(2, 25, 2))  # type: ignore[attr-defined]
    assert found["left over"] == []
    assert len(found["objects"]) > 10  # type: ignore[arg-type]


def test_killed_before_any_change_of_any_file(
    driver: Driver, whole: tuple[Path, dict[str, object]], tmp_path: Path
) -> None:
    moments: list[str] = whole[1]["moments"]  # type: ignore[assignment]
    different = [moment for moment in dict.fromkeys(moments) if not moment.startswith("remove")]
    assert {"open checkpoints/.*/state.json", "rename checkpoints/.*", "rename .settings.toml.partial"} <= {*different}
    chosen, folder, killed = random.Random(0), tmp_path / "run", set()
    for moment in different:
        answer = driver.attempt(folder, moment, time=chosen.choice([1, 2]) if moments.count(moment) > 2 else 1)
        if answer["status"] == signal.SIGKILL:
            killed.add(moment)
            if "metrics" in moment:  # what a disk may keep of a line that was being written
                with (folder / "metrics.jsonl").open("a") as file:
                    file.write('{"iteration": 3, "lo')
        else:  # the moment did not come again: the run is over
            assert_same_end(folder, whole[0])
            shutil.rmtree(folder)
    while driver.attempt(folder)["status"]:
        pass
    assert_same_end(folder, whole[0])
    assert len(killed) >= len(different) - 3


@pytest.mark.parametrize("seed", range(1 + int(os.environ.get("HEADWATER_SOAK", "0")) // 8))
def test_killed_at_random_times(
    driver: Driver, whole: tuple[Path, dict[str, object]], tmp_path: Path, seed: int
) -> None:
    chosen, folder = random.Random(seed), tmp_path / "run"
    longest = float(whole[1]["seconds"])  # type: ignore[arg-type]
    for _ in range(8):
        if driver.attempt(folder, after=longest * chosen.random() ** 2)["status"] == 0:
            break
    driver.attempt(folder)
    assert_same_end(folder, whole[0])


def test_the_command_killed_and_resumed_by_hand(whole: tuple[Path, dict[str, object]], tmp_path: Path) -> None:
    command, folder = [sys.executable, "-m", "headwater.cli"], tmp_path / "run"
    process = subprocess.Popen([*command, "train", *SETTINGS, "--out", str(folder)], stdout=subprocess.DEVNULL)
    while not (folder / "checkpoints" / "iteration-000000010").exists():
        assert process.poll() is None
        time.sleep(0.002)
    process.kill()
    assert process.wait() == -signal.SIGKILL
    assert not (folder / "report.html").exists()
    done = subprocess.run([*command, "resume", str(folder)], capture_output=True, text=True, timeout=500)
    assert done.returncode == 0, done.stderr
    assert_same_end(folder, whole[0])
