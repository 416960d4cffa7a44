"""Searchers in virtual time: their weights are as old as they are said to be, and a resumed run goes on bit for bit."""

from __future__ import annotations

import pytest
import torch

from headwater.conditions import NoCondition
from headwater.environments.hypergrid import Hypergrid, HypergridReward
from headwater.objectives import Objective
from headwater.policies import EnvironmentPolicy, Network
from headwater.replay import ReplaySettings
from headwater.search import SearchSettings
from headwater.training import ExplorationSettings, Trainer, Training
from headwater.trajectories import Trajectories


def new_trainer(
    searchers: int = 3, lag: int = 4, iterations: int = 20, search: SearchSettings | None = None
) -> Trainer:
    torch.manual_seed(1)
    policy = EnvironmentPolicy(Hypergrid(2, 5), Network(width=16), "learned")
    training = Training(iterations=iterations, batch_size=4, replayed=8, learning_rate=1e-2)
    search = search or SearchSettings(runtime="virtual", searchers=searchers, lag=lag)
    return Trainer(policy, HypergridReward(5, 0.1), NoCondition(), Objective("tb"), training,
                   ExplorationSettings(0.0), replay=ReplaySettings(500, "uniform"), seed=3, search=search)  # fmt: skip


def test_what_is_drawn_is_drawn_with_the_weights_of_so_many_updates_ago() -> None:
    trainer = new_trainer(lag=4)
    weights = []
    seen: list[tuple[int, dict[str, torch.Tensor]]] = []
    searcher = trainer.search.searcher
    draw = searcher.collect

    def watched(*asked):  # type: ignore[no-untyped-def]
        drawn = draw(*asked)
        assert (drawn.trajectories.version == searcher.policy.version).all()
        seen.append((searcher.policy.version, {k: v.clone() for k, v in searcher.policy.state_dict().items()}))
        return drawn

    searcher.collect = watched  # type: ignore[method-assign]
    for _ in range(9):
        weights.append({k: v.clone() for k, v in trainer.policy.state_dict().items()})
        trainer.update()
    assert [version for version, _ in seen] == [max(u - 4, 0) for u in range(9) for _ in range(3)]
    for version, found in seen:
        assert all(torch.equal(found[name], value) for name, value in weights[version].items())
    assert trainer.policy.version == 9
    assert trainer.search.drawn == 9 * 3 * 4


def test_without_lag_one_virtual_searcher_is_inline_search() -> None:
    virtual, inline = new_trainer(1, 0), new_trainer(1, 0)
    from headwater.search import InlineSearch

    inline.search = InlineSearch(inline.search.searcher, inline.replay, inline.generator)
    for trainer in (virtual, inline):
        for _ in range(6):
            trainer.update()
    for name, value in inline.policy.state_dict().items():
        assert torch.equal(virtual.policy.state_dict()[name], value)


@pytest.mark.parametrize("stop", [2, 7])
def test_a_run_that_is_resumed_goes_on_bit_for_bit(stop: int) -> None:
    whole = new_trainer()
    for _ in range(12):
        whole.update()
    first = new_trainer()
    for _ in range(stop):
        first.update()
    checkpoint = first.checkpoint()
    del first
    second = new_trainer()
    second.restore(checkpoint)
    while second.iteration < 12:
        second.update()
    for name, value in whole.policy.state_dict().items():
        assert torch.equal(second.policy.state_dict()[name], value)
    assert whole.replay is not None
    assert second.replay is not None
    mine, theirs = whole.replay.state(), second.replay.state()
    assert all(torch.equal(mine[name], theirs[name]) for name in mine)


@pytest.mark.parametrize("before", [SearchSettings(), SearchSettings(runtime="virtual", searchers=2)])
def test_a_run_that_kept_no_old_weights_until_now_begins_with_those_of_now(before: SearchSettings) -> None:
    first = new_trainer(search=before)
    for _ in range(6):
        first.update()
    second = new_trainer(lag=4)
    second.restore(first.checkpoint())
    drawn: list[Trajectories] = []
    collect = second.search.searcher.collect

    def watched(*asked):  # type: ignore[no-untyped-def]
        drawn.append((got := collect(*asked)).trajectories)
        if len(drawn) <= 3:  # of the first update, by three searchers
            fits = got.trajectories.sum(first.policy.log_probs(got.trajectories).forward)
            torch.testing.assert_close(fits.detach(), got.trajectories.log_behaviour)
        return got

    second.search.searcher.collect = watched  # type: ignore[method-assign]
    for _ in range(7):
        second.update()
    assert [int(batch.version[0]) for batch in drawn[::3]] == [6, 6, 6, 6, 6, 7, 8]


def test_the_staleness_that_a_resumed_run_logs_is_that_of_one_that_never_stopped() -> None:
    whole, first, second = (new_trainer() for _ in range(3))
    for trainer, updates in ((whole, 8), (first, 3)):
        for _ in range(updates):
            trainer.update()
    second.restore(first.checkpoint())
    for _ in range(5):
        second.update()
    names = ("search/staleness_mean", "search/staleness_max")
    expected, found = whole.search.metrics(), second.search.metrics()
    assert [found[name] for name in names] == [expected[name] for name in names]


def test_its_metrics_are_those_of_other_searchers() -> None:
    trainer = new_trainer(lag=4)
    for _ in range(8):
        trainer.update()
    figures = trainer.search.metrics()
    assert figures["search/staleness_max"] == 4
    assert figures["search/staleness_mean"] == (0 + 1 + 2 + 3 + 4 * 4) / 8
    assert figures["search/trajectories_per_second"] == pytest.approx(12 * figures["search/updates_per_second"])
    assert figures["search/learner_idle"] + figures["search/worker_idle"] == pytest.approx(1)
    assert "search/staleness_mean" not in trainer.search.metrics()  # nothing has happened since
