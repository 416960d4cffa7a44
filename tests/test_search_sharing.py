"""What searchers in worker processes share: the weights of whatever draws, and the table of scored objects."""

from __future__ import annotations

import os
import signal
from collections.abc import Callable
from contextlib import closing
from pathlib import Path

import pytest
import torch
from torch import Tensor

from headwater.conditions import NoCondition
from headwater.environments.base import Objects
from headwater.environments.hypergrid import Hypergrid, HypergridReward
from headwater.objectives import Objective
from headwater.objects import ObjectTable, ObjectTableError, Row
from headwater.policies import EnvironmentPolicy, Network
from headwater.replay import ReplaySettings
from headwater.reward import CachedReward, Reward
from headwater.search import LocalSearch, SearchSettings, TeacherSettings, ThompsonSettings
from headwater.search.asynchronous import AsynchronousSearch, Delivery
from headwater.search.ledger import Lease
from headwater.search.processes import Processes
from headwater.training import ExplorationSettings, Trainer, Training
from helpers import same, seeded

GRID = HypergridReward(6, r0=0.05)
KINDS = {
    "local search": ExplorationSettings(local_search=LocalSearch(3)),
    "thompson": ExplorationSettings(thompson=ThompsonSettings(4)),
    "teacher": ExplorationSettings(teacher=TeacherSettings(0.5)),
    "teacher, average, local search": ExplorationSettings(
        average=0.9, teacher=TeacherSettings(0.5, alpha=0.5), local_search=LocalSearch(1)
    ),
}


@pytest.fixture(autouse=True)
def _one_thread() -> None:
    torch.set_num_threads(1)


def trainer(reward: Reward = GRID, exploration: ExplorationSettings | None = None, iterations: int = 30) -> Trainer:
    torch.manual_seed(0)
    policy = EnvironmentPolicy(Hypergrid(2, 6), Network(width=32), "learned")
    training = Training(iterations=iterations, batch_size=8, replayed=8, learning_rate=1e-2)
    exploration = exploration or ExplorationSettings(epsilon=0.5, epsilon_end=0.5)
    replay, search = ReplaySettings(100_000, "uniform"), SearchSettings(searchers=2)
    return Trainer(policy, reward, NoCondition(), Objective(), training, exploration, replay, search=search)


@pytest.mark.parametrize("exploration", KINDS.values(), ids=KINDS.keys())
def test_workers_draw_what_the_learner_would_have_drawn_with_the_weights_of_that_version(
    exploration: ExplorationSettings, monkeypatch: pytest.MonkeyPatch
) -> None:
    leases: dict[int, Lease] = {}
    deliveries: list[Delivery] = []
    send, apply = Processes.lease, AsynchronousSearch._apply

    def noted_lease(self: Processes, searcher: int, lease: Lease) -> None:
        leases[lease.number] = lease
        send(self, searcher, lease)

    def noted_delivery(self: AsynchronousSearch, delivery: Delivery) -> None:
        deliveries.append(delivery)
        apply(self, delivery)

    monkeypatch.setattr(Processes, "lease", noted_lease)
    monkeypatch.setattr(AsynchronousSearch, "_apply", noted_delivery)
    made = trainer(exploration=exploration)
    searcher = made.search.searcher
    weights: dict[int, dict[str, Tensor]] = {}
    for _ in range(30):
        known = {name: tensor.clone() for name, tensor in searcher.drawing.state_dict().items()}
        weights[made.policy.version] = known
        made.update()
    made.search.close()
    newest = {delivery.version for delivery in deliveries if delivery.version in weights}
    assert len(newest) > 4
    assert {delivery.searcher for delivery in deliveries} == {0, 1}
    for delivery in deliveries:
        assert (delivery.drawn.drawn, len(delivery.drawn.trajectories)) == (8, 8)
        if delivery.version in weights:
            searcher.drawing.load_state_dict(weights[delivery.version])
            searcher.policy.version = delivery.version
            lease = leases[delivery.lease]
            again = searcher.collect(lease.count, lease.exploration, seeded(lease.seed))
            assert same(again.trajectories, delivery.drawn.trajectories)


# The table of objects that were scored.


class Paid:
    """A reward that writes down each object that it is asked for, whichever process asks."""

    def __init__(self, folder: Path) -> None:
        self.path = folder / "paid"
        self.path.touch()

    def __call__(self, objects: Objects, condition: Tensor) -> Tensor:
        with self.path.open("a", buffering=1) as file:
            file.write("".join(f"{text}\n" for text in text_of(objects)))
        return GRID(objects, condition)

    @property
    def objects(self) -> list[str]:
        return self.path.read_text().split("\n")[:-1]


def text_of(objects: Objects) -> list[str]:
    return [" ".join(map(str, row)) for row in torch.as_tensor(objects).tolist()]


def kept(folder: Path, reward: Reward | None = None, resumed_at: int = 10**9) -> tuple[CachedReward, Paid]:
    """A reward that keeps a table in `folder`, and what it pays for."""
    paid = Paid(folder)
    cached = CachedReward(reward or paid)
    cached.keep_in(ObjectTable(folder / "objects.sqlite"), text_of, resumed_at)
    return cached, paid


def rows(folder: Path) -> list[Row]:
    with closing(ObjectTable(folder / "objects.sqlite")) as table:
        return table.best()


def score_all(made: Trainer, folder: Path) -> None:
    for _ in range(1000):
        made.update()
        if len(rows(folder)) == 36:  # all objects that there are
            return
    raise AssertionError("objects are missing in the table")


def kill_both(made: Trainer) -> None:
    assert isinstance(made.search, AsynchronousSearch)
    assert isinstance(made.search._runtime, Processes)
    for worker in made.search._runtime._workers.values():
        os.kill(worker.pid, signal.SIGKILL)


def test_workers_write_down_who_asked_and_when_and_calls_are_counted_over_all_of_them(tmp_path: Path) -> None:
    local_search = ExplorationSettings(epsilon=1.0, local_search=LocalSearch(1))
    cached, paid = kept(tmp_path)
    made = trainer(cached, local_search)
    made.run(progress_bar=False)
    origins = {origin for _, _, _, origin in rows(tmp_path)}
    assert {origin.split(",")[0] for origin in origins} == {"worker 0", "worker 1"}
    assert {origin.split(", ")[1] for origin in origins if "," in origin} == {"local search"}
    versions = {iteration for _, _, iteration, _ in rows(tmp_path)}
    assert min(versions) == 0
    assert 0 < max(versions) <= 30
    calls = made._reward_calls()
    assert calls["reward_calls"] + calls["reward_calls_saved"] == made.search.drawn >= 30 * 8
    under_way = len(paid.objects) - calls["reward_calls"]  # what was paid for after the last delivery
    assert 0 <= under_way <= 2 * 8
    assert {text for text, _, _, _ in rows(tmp_path)} <= set(paid.objects)
    assert cached.evaluated == 0  # the learner itself asked for nothing


def test_what_one_worker_has_scored_no_other_pays_for_again(tmp_path: Path) -> None:
    cached, paid = kept(tmp_path)
    made = trainer(cached, iterations=10_000)
    score_all(made, tmp_path)
    first = paid.objects
    kill_both(made)
    for _ in range(20):
        made.update()
    assert isinstance(made.search, AsynchronousSearch)
    assert made.search.restarts == 2
    made.search.close()
    assert paid.objects == first


def test_what_a_former_life_paid_for_is_counted_once_however_many_workers_meet_it(tmp_path: Path) -> None:
    cached, _ = kept(tmp_path)
    first = trainer(cached, iterations=10_000)
    score_all(first, tmp_path)
    first.search.close()
    cached, paid = kept(tmp_path, resumed_at=0)
    before = len(paid.objects)
    second = trainer(cached)
    for _ in range(30):
        second.update()
    second.search.close()
    assert len(paid.objects) == before
    calls = second._reward_calls()
    assert (calls["reward_calls"], calls["reward_calls_saved"]) == (36, second.search.drawn)


def delivered_rows(folder: Path) -> Callable[[AsynchronousSearch, Delivery], None]:
    apply = AsynchronousSearch._apply

    def check(self: AsynchronousSearch, delivery: Delivery) -> None:
        there = {text for text, _, _, _ in rows(folder)}
        objects = self.searcher.policy.objects(delivery.drawn.trajectories)
        assert set(text_of(objects)) <= there
        apply(self, delivery)

    return check


def test_what_is_delivered_is_in_the_table_already(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("headwater.objects._AT_LEAST_EVERY", 1000.0)  # nothing is committed for being old
    monkeypatch.setattr(AsynchronousSearch, "_apply", delivered_rows(tmp_path))
    cached, _ = kept(tmp_path)
    made = trainer(cached)
    for _ in range(20):
        made.update()
    made.search.close()


def test_a_table_that_a_worker_cannot_write_ends_the_run_as_inline(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    cached, _ = kept(tmp_path)

    def full(self: ObjectTable) -> None:
        if self._pending:
            raise ObjectTableError(f"{self.path}: database or disk is full")

    monkeypatch.setattr(ObjectTable, "flush", full)
    with pytest.raises(ObjectTableError, match=r"objects\.sqlite: database or disk is full"):
        trainer(cached).run(progress_bar=False)
