"""Several learners: the update is that of one process, and a run of several can be resumed."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from torch import distributed

from headwater.conditions import NoCondition
from headwater.environments.hypergrid import Hypergrid, HypergridReward
from headwater.learners import Learners
from headwater.objectives import Objective
from headwater.policies import EnvironmentPolicy, Network
from headwater.runs import Run
from headwater.search import LocalSearch, TeacherSettings, ThompsonSettings
from headwater.training import ExplorationSettings, Trainer, Training

SETTINGS = [
    "--training.iterations", "20", "--training.batch-size", "24", "--training.log-every", "5", "--samples", "20",
    "--training.checkpoint-every", "10",
]  # fmt: skip


def start(arguments: list[str], rank: int | None = None, size: int = 1, port: int = 0) -> subprocess.Popen[str]:
    """The command line, as `torchrun` starts it."""
    together = {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(size)}
    together |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    environment = os.environ | ({} if rank is None else together)
    command = [sys.executable, "-m", "headwater.cli", *arguments]
    return subprocess.Popen(command, env=environment, text=True, stdout=subprocess.PIPE, stderr=subprocess.STDOUT)


def finish(processes: list[subprocess.Popen[str]]) -> str:
    told = [process.communicate(timeout=240)[0] for process in processes]
    assert [process.returncode for process in processes] == [0] * len(processes), "\n".join(told)
    return told[0]


def free_port() -> int:
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        return int(found.getsockname()[1])


def run_of(size: int, folder: Path, *more: str) -> Run:
    arguments = ["train", "bits", *SETTINGS, *more, "--out", str(folder), "--quiet"]
    if size == 1:
        finish([start(arguments)])
    else:
        port = free_port()
        finish([start(arguments, rank, size, port) for rank in range(size)])
    return Run.open(folder)


def weights(run: Run) -> dict[str, torch.Tensor]:
    checkpoint = run.latest_checkpoint()
    assert checkpoint is not None
    return checkpoint.tensors["policy"]


def test_two_learners_learn_what_one_does(tmp_path: Path) -> None:
    more = ["--objective.name", "vargrad"]  # whose groups lie across the learners
    alone, together = run_of(1, tmp_path / "one", *more), run_of(2, tmp_path / "two", *more)
    first = {name: tensor.float() for name, tensor in weights(alone).items()}
    for name, tensor in weights(together).items():
        torch.testing.assert_close(tensor.float(), first[name], atol=2e-3, rtol=2e-3)
    norms = [[row["gradient_norm"] for row in run.metrics()] for run in (alone, together)]
    assert norms[1] == pytest.approx(norms[0], rel=2e-3)
    assert (tmp_path / "two" / "report.html").is_file()


def test_a_run_of_several_learners_is_resumed_by_one(tmp_path: Path) -> None:
    run = run_of(2, tmp_path / "run")
    for path in sorted((run.folder / "checkpoints").iterdir())[1:]:
        subprocess.run(["rm", "-r", str(path)], check=True)
    finish([start(["resume", str(run.folder), "--quiet"])])
    assert Run.open(run.folder).metrics()[-1]["iteration"] == 20


LEFT = """
from pathlib import Path
from headwater.learners import Learners
with Learners.joined():
    import torch.distributed.nn
print(sorted(path.read_text() for path in Path("/proc/self/task").glob("*/comm") if "gloo" in path.read_text()))
"""


@pytest.mark.skipif(not Path("/proc/self/task").is_dir(), reason="counts threads as Linux names them")
def test_no_thread_of_the_group_is_left_when_the_work_is_done() -> None:
    """One that lives at the interpreter's end aborts the process now and then."""
    port = free_port()
    together = {"WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    processes = [
        subprocess.Popen([sys.executable, "-c", LEFT], env=os.environ | together | {"RANK": str(rank)}, text=True,
                         stdout=subprocess.PIPE, stderr=subprocess.STDOUT)
        for rank in range(2)
    ]  # fmt: skip
    assert finish(processes).splitlines()[-1] == "[]"


@pytest.fixture
def learners() -> Iterator[Learners]:
    """A process group of this process alone."""
    distributed.init_process_group("gloo", store=distributed.HashStore(), rank=0, world_size=1)
    yield Learners()
    distributed.destroy_process_group()


def explored(exploration: ExplorationSettings, learners: Learners | None) -> Trainer:
    policy = EnvironmentPolicy(Hypergrid(2, 4), Network(width=16))
    training = Training(iterations=2, batch_size=4)
    return Trainer(policy, HypergridReward(4), NoCondition(), Objective("tb"), training, exploration, learners=learners)


@pytest.mark.parametrize(
    ("name", "exploration"),
    [("Thompson", ExplorationSettings(thompson=ThompsonSettings(2))),
     ("Teacher", ExplorationSettings(teacher=TeacherSettings(0.5)))],
)  # fmt: skip
def test_several_learners_refuse_an_explorer_that_learns(
    learners: Learners, name: str, exploration: ExplorationSettings
) -> None:
    with pytest.raises(ValueError, match=f"several learners: {name} learns weights of its own"):
        explored(exploration, learners)
    explored(exploration, None)
    explored(ExplorationSettings(local_search=LocalSearch(1)), learners).run(progress_bar=False)
