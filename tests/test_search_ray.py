"""Searchers on a Ray cluster: they search, and whatever befalls an actor or its machine, the run goes on."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch

from headwater.conditions import NoCondition
from headwater.environments.base import Objects
from headwater.environments.hypergrid import Hypergrid, HypergridReward
from headwater.evaluation import ExactDistribution
from headwater.objectives import Objective
from headwater.policies import EnvironmentPolicy, Network
from headwater.replay import ReplaySettings
from headwater.reward import RewardError
from headwater.search import SearchSettings
from headwater.search.asynchronous import AsynchronousSearch, Delivery
from headwater.training import Trainer, Training

ray = pytest.importorskip("ray", reason="the extra ray is not installed")
from ray.cluster_utils import Cluster  # noqa: E402

STORE = 80 * 2**20


@pytest.fixture
def cluster() -> Iterator[Cluster]:
    """A head without room for searchers, and two nodes with room for one each and one to spare."""
    made = Cluster(initialize_head=True, head_node_args={"num_cpus": 0, "object_store_memory": STORE})
    ray.init(address=made.address, log_to_driver=False)
    try:
        yield made
    finally:
        ray.shutdown()
        made.shutdown()


def new_trainer(reward: object = None, searchers: int = 2, iterations: int = 100, **more: object) -> Trainer:
    torch.manual_seed(0)
    policy = EnvironmentPolicy(Hypergrid(2, 6), Network(width=64), "learned")
    training = Training(iterations=iterations, batch_size=16, replayed=16, learning_rate=1e-2)
    search = SearchSettings(runtime="ray", searchers=searchers, timeout=240.0, **more)  # type: ignore[arg-type]
    return Trainer(policy, reward or HypergridReward(6, 0.1), NoCondition(), Objective("tb"), training,  # type: ignore[arg-type]
                   replay=ReplaySettings(5000, "uniform"), seed=0, search=search)  # fmt: skip


def deliveries(trainer: Trainer) -> list[tuple[int, int]]:
    """Every (searcher, sequence) that is applied from now on."""
    search = trainer.search
    assert isinstance(search, AsynchronousSearch)
    applied: list[tuple[int, int]] = []
    remember = search._apply

    def watched(delivery: Delivery) -> None:
        before = search.drawn
        remember(delivery)
        if search.drawn > before:
            applied.append((delivery.searcher, delivery.sequence))

    search._apply = watched  # type: ignore[method-assign]
    return applied


def test_a_local_cluster_is_started_searched_with_and_left() -> None:
    assert not ray.is_initialized()
    trainer = new_trainer()
    applied = deliveries(trainer)
    trainer.run(progress_bar=False)
    assert not ray.is_initialized()
    exact = ExactDistribution(Hypergrid(2, 6), HypergridReward(6, 0.1))
    assert exact.compare(trainer.policy)["total_variation"] < 0.2
    assert len(set(applied)) == len(applied) >= 100
    assert len({searcher for searcher, _ in applied}) == 2
    assert trainer.search.drawn == 16 * len(applied)


def test_a_killed_actor_and_a_lost_machine_are_replaced_and_nothing_is_applied_twice(cluster: Cluster) -> None:
    first = cluster.add_node(num_cpus=1, object_store_memory=STORE)
    cluster.add_node(num_cpus=2, object_store_memory=STORE)
    cluster.wait_for_nodes()
    trainer = new_trainer(iterations=60)
    applied = deliveries(trainer)
    search = trainer.search
    assert isinstance(search, AsynchronousSearch)
    try:
        for _ in range(15):
            trainer.update()
        killed = next(iter(search._runtime._actors.values()))  # type: ignore[union-attr]
        ray.kill(killed, no_restart=True)
        for _ in range(15):
            trainer.update()
        assert search.restarts >= 1
        cluster.remove_node(first, allow_graceful=False)
        for _ in range(30):
            trainer.update()
    finally:
        search.close()
    assert ray.is_initialized()  # it is not ours to shut down
    assert len(set(applied)) == len(applied) >= 60
    assert trainer.iteration == 60


def test_what_a_reward_raises_in_an_actor_ends_the_run_with_its_own_words(cluster: Cluster) -> None:
    cluster.add_node(num_cpus=1, object_store_memory=STORE)
    cluster.wait_for_nodes()

    def broken(objects: Objects, condition: torch.Tensor) -> torch.Tensor:
        raise RewardError("the oracle is gone")

    trainer = new_trainer(broken, searchers=1)
    with pytest.raises(RewardError, match="the oracle is gone"):
        trainer.run(progress_bar=False)
