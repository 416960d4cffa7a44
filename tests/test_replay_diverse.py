"""Draws that are good and different."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import Generator, Tensor

from headwater.replay import (
    Diverse,
    Entries,
    Pairwise,
    Recent,
    Replay,
    ReplaySettings,
    Stratified,
    Uniform,
    final_states,
    hamming,
)
from headwater.trajectories import Trajectories
from replay_helpers import REWARDS, batch_of, entries_of


def clustered() -> Replay:
    """500 entries in 5 clusters, the one of high reward far larger than the others; the states are points on a line."""
    replay, generator = Replay(500, Uniform()), Generator().manual_seed(0)
    cluster = torch.arange(500).remainder(100).clamp(max=4)
    state = 100 * cluster[:, None] + torch.randint(0, 5, (500, 1), generator=generator)
    replay.add(
        Trajectories(
            steps={"state": torch.cat([state, state * 0], 1).repeat_interleave(2, 0)},
            lengths=torch.full((500,), 2),
            condition=torch.empty(500, 0),
            log_reward=torch.where(cluster == 4, 3.0, 1.5) + 0.1 * torch.randn(500, generator=generator),
            log_behaviour=torch.zeros(500),
            version=torch.zeros(500, dtype=torch.int64),
            identity=torch.arange(500),
        )
    )
    return replay


def apart(one: object, other: object) -> float:
    return float(abs(one[0] - other[0]))  # type: ignore[index]


def mean_distance(batch: Trajectories) -> float:
    points = final_states(batch)[:, 0].double()
    return float((points[:, None] - points).abs().mean())


def test_diverse_draws_lie_farther_apart_than_the_rule_alone_draws_and_stay_good() -> None:
    replay = clustered()
    plain = replay.sample(16, Generator().manual_seed(1))
    draws = {}
    for candidates in (4, 16):
        replay.rule = Diverse(Uniform(), candidates, Pairwise(apart))
        draws[candidates] = replay.sample(16, Generator().manual_seed(1))
        assert torch.equal(draws[candidates].identity, replay.sample(16, Generator().manual_seed(1)).identity)
        assert len(set(draws[candidates].identity.tolist())) == 16
    assert mean_distance(draws[4]) > 2 * mean_distance(plain)
    assert mean_distance(draws[16]) > 2 * mean_distance(plain)
    replay.rule = Diverse(Stratified(1.0, 0.5), 4, Pairwise(apart))
    assert replay.sample(16, Generator().manual_seed(1)).log_reward.min() > 2.5


def test_the_choice_is_the_farthest_point_first_the_best_and_of_equals_the_first_drawn() -> None:
    points = torch.tensor([0.0, 10.0, 4.0, 10.0, 0.0, 5.0])
    seen: list[tuple[float, int]] = []

    def distance(one: object, others: object) -> Tensor:
        assert isinstance(one, Tensor)
        assert isinstance(others, Tensor)
        seen.append((float(one), len(others)))
        return (others - one).abs()

    entries = Entries(
        torch.tensor([0.0, 0.0, 3.0, 0.0, 0.0, 3.0]), *(torch.zeros(6, dtype=torch.int64) for _ in range(2)), 0,
        lambda chosen: batch_of(chosen.tolist(), log_reward=[[0.0, 0.0, 3.0, 0.0, 0.0, 3.0][i] for i in chosen]),
    )  # fmt: skip
    rule = Diverse(Recent(), 2, distance, lambda batch: points[batch.identity])
    # Candidates, in the order in which they come: 0 .. 5. Entries 2 and 5 are best; 1 and 3 farthest from 2, equally.
    assert rule.draw(3, entries, Generator()).tolist() == [2, 1, 0]
    assert seen == [(4.0, 6), (10.0, 6)]
    # Only 6 are distinct: the rest repeats them in turn.
    assert rule.draw(8, entries, Generator()).tolist()[6:] == rule.draw(8, entries, Generator()).tolist()[:2]
    assert sorted(rule.draw(6, entries, Generator()).tolist()) == [0, 1, 2, 3, 4, 5]


def test_a_diverse_draw_of_many_costs_distances_in_proportion() -> None:
    replay, calls = clustered(), []
    replay.rule = Diverse(Uniform(), 2, lambda one, others: calls.append(len(others)) or hamming(one, others))
    assert len(replay.sample(600, Generator().manual_seed(0))) == 600
    assert sum(calls) <= 2 * 256 * 600


@pytest.mark.parametrize("value", [float("nan"), -1.0])
def test_a_distance_that_is_none_is_refused(value: float) -> None:
    replay = clustered()
    replay.rule = Diverse(Uniform(), 2, lambda one, others: torch.full((len(others),), value))
    with pytest.raises(ValueError, match=rf"distance is {value}, must be at least 0"):
        replay.sample(4, Generator())
    replay.rule = Diverse(Uniform(), 2, lambda one, others: torch.zeros(1))
    with pytest.raises(ValueError, match=r"distance returned shape \(1,\)"):
        replay.sample(4, Generator())
    with pytest.raises(TypeError, match="columns only"):
        Diverse(Uniform(), 2).draw(2, entries_of(REWARDS), Generator())


def test_a_distance_of_the_users_own_is_found_by_name_and_sees_objects(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "my_distance.py").write_text("def first(one, other):\n    return abs(len(one) - len(other))\n")
    monkeypatch.chdir(tmp_path)
    settings = ReplaySettings(rule="uniform", candidates=5, distance="my_distance:first")
    replay = settings.build(lambda batch: ["x" * int(one % 50) for one in batch.identity])
    replay.add(batch_of(list(range(200))))
    drawn = replay.sample(2, Generator().manual_seed(0)).identity % 50
    assert int((drawn[0] - drawn[1]).abs()) >= 20
    with pytest.raises(ValueError, match=r"distance 'my_distance:second': module my_distance has no function second"):
        ReplaySettings(candidates=5, distance="my_distance:second").build()
