"""Search in worker processes: they draw what they say they draw, and whatever befalls one of them, the run goes on or
says why not.
"""

from __future__ import annotations

import logging
import math
import os
import select
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import Tensor

from headwater.conditions import NoCondition
from headwater.environments.base import Objects
from headwater.environments.hypergrid import Hypergrid, HypergridReward
from headwater.evaluation import ExactDistribution
from headwater.objectives import Objective
from headwater.policies import EnvironmentPolicy, Network
from headwater.replay import ReplaySettings
from headwater.reward import CachedReward, FunctionReward, Reward, RewardError
from headwater.runs import Run
from headwater.search import SearchError, SearchSettings
from headwater.search.asynchronous import AsynchronousSearch
from headwater.search.processes import Processes
from headwater.training import ExplorationSettings, NonFiniteLoss, Trainer, Training
from helpers import seeded

GRID = HypergridReward(6, r0=0.05)
LOOP = Training(iterations=30, batch_size=8, replayed=8, log_every=10, checkpoint_every=1000, learning_rate=1e-2)
TWO = SearchSettings(searchers=2)


@pytest.fixture(autouse=True)
def _one_thread() -> None:
    torch.set_num_threads(1)


def trainer(
    reward: Reward = GRID,
    search: SearchSettings = TWO,
    training: Training = LOOP,
    run: Run | None = None,
    epsilon: float = 0.1,
    seed: int = 0,
) -> Trainer:
    torch.manual_seed(seed)
    policy = EnvironmentPolicy(Hypergrid(2, 6), Network(width=32), "learned")
    exploration, replay = ExplorationSettings(epsilon), ReplaySettings(100_000, "uniform")
    return Trainer(
        policy, reward, NoCondition(), Objective(), training, exploration, replay, seed, run, search=search
    )  # fmt: skip


def workers(of: Trainer) -> list[int]:
    """The process ids of a trainer's workers."""
    return [worker.pid for worker in runtime(of)._workers.values()]


def runtime(of: Trainer) -> Processes:
    assert isinstance(of.search, AsynchronousSearch)
    assert isinstance(of.search._runtime, Processes)
    return of.search._runtime


def is_running(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[0] != "Z"
    except (FileNotFoundError, ProcessLookupError):
        return False


def eventually(true: Callable[[], bool], seconds: float = 20.0) -> bool:
    until = time.monotonic() + seconds
    while not true():
        if time.monotonic() > until:
            return False
        time.sleep(0.02)
    return True


class Once:
    """A reward that does something the first time that any process calls it, before it answers."""

    def __init__(self, folder: Path, action: Callable[[], object], reward: Reward = GRID) -> None:
        self.marker, self.action, self.reward = folder / "done", action, reward

    def __call__(self, objects: Objects, condition: Tensor) -> Tensor:
        try:
            self.marker.touch(exist_ok=False)
        except FileExistsError:
            return self.reward(objects, condition)
        self.action()
        return self.reward(objects, condition)


def test_a_batch_was_drawn_by_the_weights_whose_version_it_bears() -> None:
    made = trainer(epsilon=0.0)
    weights = {0: {name: tensor.clone() for name, tensor in made.policy.state_dict().items()}}
    for _ in range(30):
        made.update()
        weights[made.policy.version] = {name: tensor.clone() for name, tensor in made.policy.state_dict().items()}
    figures = made.search.metrics()
    made.search.close()
    assert made.replay is not None
    kept = made.replay.sample(400, seeded(0))
    versions = set(kept.version.tolist())
    assert len(versions) > 4
    assert max(versions) <= made.policy.version == 30
    for version in versions:
        made.policy.load_state_dict(weights[version])
        mine = kept.select(kept.version == version)
        log_prob = mine.sum(made.policy.log_probs(mine).forward)
        torch.testing.assert_close(log_prob.detach(), mine.log_behaviour, atol=1e-4, rtol=1e-4)
    assert figures["search/staleness_max"] <= 20
    assert made.search.drawn >= 30 * 8
    assert made.search.failed == 0


def test_one_worker_that_may_not_be_stale_gives_the_same_run_every_time() -> None:
    ends = []
    for _ in range(2):
        made = trainer(search=SearchSettings(searchers=1, staleness=0))
        made.run(progress_bar=False)
        ends.append(made.policy.state_dict())
        assert made.search.drawn in (30 * 8, 31 * 8)  # one more was under way when the run ended
    assert all(ends[0][name].equal(ends[1][name]) for name in ends[0])


def test_an_asynchronous_run_learns_the_exact_distribution() -> None:
    training = Training(iterations=500, batch_size=16, replayed=16, learning_rate=1e-2)
    made = trainer(training=training)
    exact = ExactDistribution(Hypergrid(2, 6), GRID)
    assert exact.compare(made.policy)["total_variation"] > 0.3
    made.run(progress_bar=False)
    assert exact.compare(made.policy)["total_variation"] < 0.03


def test_a_moving_average_is_what_searches() -> None:
    torch.manual_seed(0)
    policy = EnvironmentPolicy(Hypergrid(2, 6), Network(width=32))
    exploration = ExplorationSettings(0.0, average=0.99)
    search = SearchSettings(searchers=1, staleness=0)
    made = Trainer(policy, GRID, NoCondition(), Objective(), LOOP, exploration, seed=0, search=search)
    for _ in range(20):
        made.update()
    batch = made.search.collect(8, made.exploration.at(1.0))
    made.search.close()
    drawn_by = {name: batch.sum(who.log_probs(batch).forward) for name, who in
                (("average", made.sampler), ("learner", made.policy))}  # fmt: skip
    torch.testing.assert_close(drawn_by["average"], batch.log_behaviour, atol=1e-5, rtol=1e-5)
    assert not torch.allclose(drawn_by["learner"], batch.log_behaviour, atol=1e-3)


def test_a_worker_killed_while_it_draws_is_replaced(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    made = trainer(Once(tmp_path, lambda: os.kill(os.getpid(), signal.SIGKILL)))
    with caplog.at_level(logging.WARNING):
        made.run(progress_bar=False)
    assert made.iteration == 30
    assert made.search.metrics()["search/restarts"] == 1
    assert "was killed by SIGKILL" in caplog.text
    assert "while it was drawing or scoring a batch; another takes its place" in caplog.text


def test_a_worker_killed_while_it_delivers_leaves_nothing_half(caplog: pytest.LogCaptureFixture) -> None:
    made = trainer(search=SearchSettings(searchers=1), training=replace(LOOP, batch_size=20_000))
    made.search._wanted = 20_000, made.exploration.at(0)  # type: ignore[attr-defined]
    made.search._start()  # type: ignore[attr-defined]
    (worker,) = runtime(made)._workers.values()
    assert select.select([worker.connection], [], [], 60)[0]
    os.kill(worker.pid, signal.SIGSTOP)  # it has begun, and what it delivers is larger than what a socket holds
    assert runtime(made).wait(0) == []
    assert runtime(made).is_receiving()
    os.kill(worker.pid, signal.SIGKILL)
    with caplog.at_level(logging.WARNING):
        batch = made.search.collect(20_000, made.exploration.at(0))
    made.search.close()
    assert "while it was delivering a batch" in caplog.text
    assert len(batch) == 20_000
    batch.validate()
    assert made.search.drawn % 20_000 == 0


def test_a_reward_that_hangs_costs_its_worker_alone(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    def unhurried(objects: Objects, condition: Tensor) -> Tensor:
        time.sleep(0.1)
        return GRID(objects, condition)

    made = trainer(Once(tmp_path, lambda: time.sleep(1000), unhurried), SearchSettings(searchers=2, timeout=1.0))
    with caplog.at_level(logging.WARNING):
        made.run(progress_bar=False)
    assert made.iteration == 30
    assert made.search.metrics()["search/restarts"] == 1
    assert "was ended, for it hung: no batch within 1 s (search.timeout)" in caplog.text


def test_a_reward_that_always_hangs_stops_the_run_and_says_why() -> None:
    def hang(objects: Objects, condition: Tensor) -> Tensor:
        time.sleep(1000)
        raise AssertionError

    made = trainer(hang, SearchSettings(searchers=1, timeout=0.2))
    with pytest.raises(SearchError, match=r"hung: no batch within 0.2 s.*3 have ended in a row"):
        made.run(progress_bar=False)


def test_a_worker_that_always_dies_stops_the_run_and_says_how() -> None:
    def leave(objects: Objects, condition: Tensor) -> Tensor:
        os._exit(7)

    made = trainer(leave)
    with pytest.raises(
        SearchError, match=r"ended with status 7 while it was drawing or scoring.*6 have ended in a row"
    ):
        made.run(progress_bar=False)


def negative(objects: list[object]) -> list[float]:
    return [-1.0 if one == (2, 2) else 1.0 for one in objects]


def too_few(objects: list[object]) -> list[float]:
    return [1.0] * (len(objects) - 1)


@pytest.mark.parametrize("function", [negative, too_few])
def test_a_reward_that_makes_no_sense_says_the_same_as_inline(function: Callable[[list[object]], list[float]]) -> None:
    said = []
    for search in (SearchSettings(), TWO):
        with pytest.raises(RewardError) as caught:
            trainer(FunctionReward(function), search).run(progress_bar=False)
        said.append(str(caught.value))
    assert said[0] == said[1]


def test_a_reward_that_raises_ends_the_run_with_what_it_raised() -> None:
    def broken(objects: Objects, condition: Tensor) -> Tensor:
        raise KeyError("no such protein")

    made = trainer(broken)
    with pytest.raises(SearchError, match=r"(?s)KeyError: 'no such protein'.*in broken") as caught:
        made.run(progress_bar=False)
    assert "test_search_processes.py" in str(caught.value)

    def mute(objects: Objects, condition: Tensor) -> Tensor:
        return torch.zeros(3)

    with pytest.raises(ValueError, match=r"log_reward has shape \(3,\)"):
        trainer(mute).run(progress_bar=False)


def test_objects_that_fail_are_counted_and_infinite_rewards_refused() -> None:
    def picky(objects: Objects, condition: Tensor) -> Tensor:
        failing = torch.as_tensor(objects)[:, 0] == 2
        return GRID(objects, condition).masked_fill(failing, math.nan)

    made = trainer(picky)
    made.run(progress_bar=False)
    assert 0 < made.search.failed < made.search.drawn
    with pytest.raises(NonFiniteLoss):
        trainer(lambda objects, condition: torch.full((len(objects),), math.inf)).run(progress_bar=False)


def who_scores(objects: list[object]) -> list[float]:
    with open("who", "a") as file:
        file.write(f"{os.getpid()} {os.getppid()}\n")
    return [1.0] * len(objects)


def test_each_worker_runs_a_reward_with_a_timeout_in_a_process_of_its_own(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    reward = FunctionReward(who_scores, timeout=30)
    made = trainer(CachedReward(reward, 1), training=replace(LOOP, iterations=10_000))
    made.update()
    pids = workers(made)
    scored: set[tuple[int, ...]] = set()

    def both_have_scored() -> bool:
        made.update()
        scored.update(tuple(map(int, line.split())) for line in Path("who").read_text().splitlines())
        return {parent for _, parent in scored} == set(pids)

    assert eventually(both_have_scored, 60)
    calls = made._reward_calls()["reward_calls"]
    assert len({pid for pid, _ in scored}) == 2
    assert 0 < calls <= made.search.drawn
    made.search.close()
    assert eventually(lambda: not any(is_running(pid) for pid, _ in scored))
    assert reward([(1, 1)], torch.empty(1, 0)).tolist() == [0.0]  # the learner's own still answers
    reward.close()


def test_no_process_is_left_when_a_run_has_ended_or_failed() -> None:
    made = trainer()
    made.update()
    pids = workers(made)
    assert len(pids) == 2
    assert all(map(is_running, pids))
    made.run(progress_bar=False)
    assert not any(map(is_running, pids))
    forgotten = trainer()
    forgotten.update()
    pids = workers(forgotten)
    del forgotten
    assert eventually(lambda: not any(map(is_running, pids)))


def test_workers_end_when_the_learner_is_killed(tmp_path: Path) -> None:
    script = (
        "import sys, time\n"
        "from test_search_processes import *\n"
        "made = trainer(search=SearchSettings(searchers=2))\n"
        "made.update()\n"
        "busy = trainer(lambda objects, condition: time.sleep(1000))\n"
        "busy.search._wanted = 8, busy.exploration.at(0)\n"
        "busy.search._start()\n"
        "print(*workers(made), *workers(busy), flush=True)\n"
        "time.sleep(1000)\n"
    )
    path = os.pathsep.join([str(Path(__file__).parent), *sys.path])
    environment = {**os.environ, "PYTHONPATH": path}
    learner = subprocess.Popen(
        [sys.executable, "-c", script], cwd=tmp_path, stdout=subprocess.PIPE, text=True, env=environment
    )
    assert learner.stdout is not None
    pids = [int(pid) for pid in learner.stdout.readline().split()]
    assert len(pids) == 4
    assert all(map(is_running, pids))
    learner.kill()
    learner.wait()
    learner.stdout.close()
    ended = eventually(lambda: not any(map(is_running, pids)), 5)
    for pid in filter(is_running, pids):
        os.kill(pid, signal.SIGKILL)
    assert ended


def test_a_stopped_run_goes_on_where_it_was_with_nothing_lost(tmp_path: Path) -> None:
    run = Run.create(tmp_path / "run", "test", {}, ["test"], seed=0)
    first = trainer(run=run)
    while first.iteration < 20 or not first.search.ledger.waiting:  # type: ignore[attr-defined]
        first.update()
        first.search._listen(0)  # type: ignore[attr-defined]
    first.save()
    checkpoint = run.latest_checkpoint()
    first.search.close()
    assert checkpoint is not None
    waiting = len(checkpoint.tensors["search"]["sizes"])
    assert waiting > 0
    second = trainer(run=run, seed=99)
    second.restore(checkpoint)
    assert second.search.drawn == int(str(checkpoint.state["drawn"])) >= 8 * (20 + waiting)
    assert second.replay is not None
    assert second.replay.state()["identity"].equal(checkpoint.tensors["replay"]["identity"])
    handed = second.search.collect(8, second.exploration.at(0.5))
    assert handed.identity.equal(checkpoint.tensors["search"]["identity"][:8])
    second.run(progress_bar=False)
    assert second.iteration == 30
    assert second.policy.version == 30
    inline = trainer(search=SearchSettings())
    inline.restore(checkpoint)  # the same checkpoint serves a run that searches inline
    inline.update()


def test_settings_that_cannot_work_are_named() -> None:
    for settings, said in (
        ({"searchers": -1}, "searchers = -1"),
        ({"searchers": 4, "staleness": 2}, "staleness = 2: 4 searchers"),
        ({"runtime": "ray"}, "searchers = 0: runtime = 'ray'"),
        ({"runtime": "inline", "searchers": 2}, "searchers = 2: inline search has none"),
        ({"searchers": 2, "lag": 3}, "lag = 3: only for runtime = 'virtual'"),
        ({"searchers": 1, "address": "auto"}, "only for runtime = 'ray'"),
        ({"runtime": "ray", "searchers": 1, "resources": ("tpu",)}, "'tpu' must be name=amount"),
        ({"timeout": 0.0}, "timeout = 0"),
    ):
        with pytest.raises(ValueError, match=said):
            SearchSettings(**settings)  # type: ignore[arg-type]
