"""Searchers on a Ray cluster: they search, and whatever befalls an actor or its machine, the run goes on."""

from __future__ import annotations

import math
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path

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
from headwater.runs import Run
from headwater.search import SearchSettings
from headwater.search.asynchronous import AsynchronousSearch, Delivery
from headwater.training import ExplorationSettings, Trainer, Training
from helpers import seeded

ray = pytest.importorskip("ray", reason="the extra ray is not installed")
from ray.cluster_utils import Cluster  # noqa: E402

from headwater.search import rays  # noqa: E402

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
                   ExplorationSettings(0.0), ReplaySettings(5000, "uniform"), 0, search=search)  # fmt: skip


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
    trainer = new_trainer(resources=("accelerator=1",))
    applied = deliveries(trainer)
    weights = {0: {name: tensor.clone() for name, tensor in trainer.policy.state_dict().items()}}
    publish = trainer.search.publish

    def watched() -> None:
        weights[trainer.policy.version] = {k: tensor.clone() for k, tensor in trainer.policy.state_dict().items()}
        publish()
        deadline = time.monotonic() + 120  # on a busy machine one may be there long before the other
        while len({searcher for searcher, _ in applied}) < 2 and time.monotonic() < deadline:
            trainer.search._listen(0.5)  # type: ignore[attr-defined]

    trainer.search.publish = watched  # type: ignore[method-assign]
    trainer.run(progress_bar=False)
    assert not ray.is_initialized()
    assert trainer.replay is not None
    kept = trainer.replay.sample(400, seeded(0))
    versions = kept.version.unique().tolist()
    assert len(versions) > 5  # of 36 objects, each as it was last drawn
    asked = EnvironmentPolicy(Hypergrid(2, 6), Network(width=64), "learned")
    for version in versions:  # each was drawn by the weights whose version it bears
        asked.load_state_dict(weights[version])
        mine = kept.select(kept.version == version)
        torch.testing.assert_close(
            mine.sum(asked.log_probs(mine).forward).detach(), mine.log_behaviour, atol=1e-4, rtol=1e-4
        )
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


def test_what_cannot_be_sent_to_an_actor_is_told_in_a_line_and_no_cluster_is_left() -> None:
    lock = threading.Lock()

    def locked(objects: Objects, condition: torch.Tensor) -> torch.Tensor:
        with lock:
            return HypergridReward(6, 0.1)(objects, condition)

    trainer = new_trainer(locked, searchers=1)
    with pytest.raises(ValueError, match=r"can be sent to an actor, but cannot pickle '_thread.lock' object$"):
        trainer.run(progress_bar=False)
    assert not ray.is_initialized()


@pytest.mark.parametrize(("searchers", "cpus", "cores"), [(5, 0.5, 3), (4, 1.0, 4), (1, 0.2, 1), (3, 2.0, 6)])
def test_a_local_cluster_has_room_for_every_searcher(searchers: int, cpus: float, cores: int) -> None:
    settings = SearchSettings(runtime="ray", searchers=searchers, cpus=cpus, resources=("accelerator=2",))
    assert rays._room(settings) == {"num_cpus": cores, "resources": {"accelerator": 2.0 * searchers}}


def test_a_local_cluster_is_not_asked_for_gpus_that_are_not_there() -> None:
    if torch.cuda.is_available():
        pytest.skip("needs a machine without a GPU")
    with pytest.raises(ValueError, match=r"search.gpus = 1: this machine has 0 for 2 searchers"):
        new_trainer(gpus=1.0).run(progress_bar=False)
    assert not ray.is_initialized()


def test_a_polite_kill_leaves_a_checkpoint_and_a_reward_with_a_time_limit_searches_in_actors(tmp_path: Path) -> None:
    (tmp_path / "mine.py").write_text("def score(words):\n    return [2.0 ** word.count('A') for word in words]\n")
    command = [
        sys.executable, "-m", "headwater.cli", "train", "sequences", "--out", "run", "--quiet", "--function",
        "mine:score", "--timeout", "20", "--length", "5", "--search.runtime", "ray", "--search.searchers", "1",
        "--training.iterations", "100000", "--training.log-every", "5", "--network.width", "16",
    ]  # fmt: skip
    process = subprocess.Popen(command, cwd=tmp_path, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    metrics, until = tmp_path / "run" / "metrics.jsonl", time.monotonic() + 300
    try:
        while not (metrics.exists() and metrics.read_text().count("\n") >= 2):
            assert process.poll() is None, process.communicate()[1]
            assert time.monotonic() < until
            time.sleep(0.05)
        process.send_signal(signal.SIGTERM)
        _, said = process.communicate(timeout=120)
    finally:
        process.kill()
    assert process.returncode == 130, said
    assert "headwater resume run" in said
    run = Run.open(tmp_path / "run")
    checkpoint = run.latest_checkpoint()
    assert checkpoint is not None
    assert checkpoint.iteration >= 10
    kept = run.objects(None).to_pydict()  # what the actor has scored is in the learner's table
    assert "worker 0" in kept["origin"]
    assert len(kept["object"]) > 50
    assert max(kept["iteration"]) > 0
    expected = [word.count("A") * math.log(2) for word in kept["object"]]
    assert kept["log_reward"] == pytest.approx(expected, abs=1e-5)
