"""The rules of a replay against the distributions that they promise, and the settings that name them."""

from __future__ import annotations

import pytest
import torch
from torch import Generator, Tensor

from headwater.replay import (
    Diverse,
    Entries,
    Mixture,
    PerCondition,
    Recent,
    ReplaySettings,
    RewardRank,
    RewardSoftmax,
    Rule,
    Stratified,
    Uniform,
)
from replay_helpers import REWARDS, entries_of


def chi_square(rule: Rule, entries: Entries, probability: Tensor, count: int = 40_000, seed: int = 7) -> float:
    """By how many standard deviations the chi-square statistic of the draws exceeds its mean; infinite if an entry of
    probability 0 is drawn."""
    drawn = rule.draw(count, entries, Generator().manual_seed(seed))
    assert drawn.shape == (count,)
    assert drawn.dtype == torch.int64
    observed = torch.bincount(drawn, minlength=len(entries)).double()
    possible = probability > 0
    if observed[~possible].any():
        return float("inf")
    expected = count * probability.double() / probability.double().sum()
    statistic = ((observed - expected)[possible] ** 2 / expected[possible]).sum()
    freedom = max(int(possible.sum()) - 1, 1)
    return float((statistic - freedom) / (2 * freedom) ** 0.5)


def excess(rule: Rule, entries: Entries, probability: Tensor, count: int = 20_000) -> float:
    """As `chi_square`, with the entries that are expected less than 10 times counted as one."""
    drawn = torch.bincount(rule.draw(count, entries, Generator().manual_seed(3)), minlength=len(entries)).double()
    expected = count * probability / probability.sum()
    rare = expected < 10
    drawn = torch.cat([drawn[~rare], drawn[rare].sum()[None]])
    expected = torch.cat([expected[~rare], expected[rare].sum()[None]])
    if expected[-1] < 1e-6:
        assert drawn[-1] == 0
    statistic = ((drawn - expected) ** 2 / expected.clamp(min=10)).sum()
    return float((statistic - len(drawn)) / (2 * len(drawn)) ** 0.5)


def test_the_uniform_rule_draws_uniformly() -> None:
    assert chi_square(Uniform(), entries_of(REWARDS), torch.ones(10)) < 4


@pytest.mark.parametrize("temperature", [0.5, 1.0, 3.0])
def test_the_softmax_rule_draws_by_reward_at_its_temperature(temperature: float) -> None:
    rule, entries = RewardSoftmax(temperature), entries_of(REWARDS)
    assert chi_square(rule, entries, torch.tensor(REWARDS).div(temperature).exp()) < 4
    assert chi_square(rule, entries, torch.tensor(REWARDS).div(1.3 * temperature).exp()) > 10
    shifted = entries_of([value + 5000 for value in REWARDS])
    assert torch.equal(*(rule.draw(50, each, Generator().manual_seed(0)) for each in (entries, shifted)))


@pytest.mark.parametrize("k", [0.01, 1.0])
def test_the_rank_rule_weighs_by_the_number_of_better_entries(k: float) -> None:
    rank = torch.tensor([sum(other > one for other in REWARDS) for one in REWARDS])
    assert chi_square(RewardRank(k), entries_of(REWARDS), 1 / (k * 10 + rank)) < 4
    assert chi_square(RewardRank(k), entries_of(REWARDS), 1 / (1.5 * k * 10 + rank)) > 10


@pytest.mark.parametrize("spread", [0.0, 0.3, 3.0, 300.0, 1e30])
@pytest.mark.parametrize("ties", [False, True])
def test_draws_by_reward_and_rank_are_exact_at_every_scale(spread: float, ties: bool) -> None:
    rewards = spread * torch.randn(200, generator=Generator().manual_seed(4))
    if ties:
        rewards = rewards[torch.randint(0, 12, (200,), generator=Generator().manual_seed(5))]
    entries = entries_of(rewards.tolist())
    rank = (rewards[None, :] > rewards[:, None]).sum(1).double()
    for temperature in (1e-30, 0.2, 1.0, 50.0, 1e30):
        weight = ((rewards.double() - rewards.max().double()) / temperature).exp()
        assert excess(RewardSoftmax(temperature), entries, weight) < 5
    for k in (5e-324, 1e-6, 1e-2, 1.0, 1e300):
        assert excess(RewardRank(k), entries, 1 / (1 + rank / (k * 200))) < 5


class Counted(Entries):
    """Entries that count the positions that they are asked about."""

    asked = 0

    def ranked_log_reward(self, positions: Tensor) -> Tensor:
        self.asked += len(positions)
        return super().ranked_log_reward(positions)


@pytest.mark.parametrize("rule", [RewardSoftmax(1e-30), RewardSoftmax(1.0), RewardRank(1e-3), RewardRank(1.0)])
@pytest.mark.parametrize("n_best", [1, 900, 1003])
def test_few_proposals_are_refused_whatever_the_ties(rule: Rule, n_best: int) -> None:
    """Also where many equal ones end inside a stratum, whose first weight is then far above the others'."""
    rewards = torch.cat([torch.full((n_best,), 7.0), torch.linspace(-5, 5, 100_000 - n_best)])
    zeros = torch.zeros(len(rewards), dtype=torch.int64)
    entries = Counted(rewards, zeros, zeros, 0)
    rule.draw(2000, entries, Generator().manual_seed(0))
    assert entries.asked < 3500


def test_the_stratified_rule_gives_the_top_its_share() -> None:
    rewards = torch.arange(20.0).flip(0)
    expected = torch.where(rewards >= 15, 0.7 / 5, 0.3 / 15)
    assert chi_square(Stratified(0.7, 0.75), entries_of(rewards.tolist()), expected) < 4
    drawn = Stratified(0.7, 0.75).draw(10, entries_of(rewards.tolist()), Generator().manual_seed(0))
    assert int((rewards[drawn] >= 15).sum()) == 7


def test_the_stratified_share_is_right_on_average_in_draws_of_one() -> None:
    entries, generator = entries_of([0.0] * 9 + [1.0]), Generator().manual_seed(3)
    top = sum(int(Stratified(0.25, 0.9).draw(1, entries, generator)) == 9 for _ in range(4000))
    assert abs(top - 1000) < 4 * (4000 * 0.25 * 0.75) ** 0.5


@pytest.mark.parametrize(
    ("rewards", "expected"),
    [
        ([1.0] * 6, [1.0] * 6),
        ([0.0, 0.0, 0.0, 0.0, 0.0, 1.0], [0.1, 0.1, 0.1, 0.1, 0.1, 0.5]),
        ([0.0, 1.0, 1.0, 1.0, 1.0, 1.0], [0.5, 0.1, 0.1, 0.1, 0.1, 0.1]),
        ([3.0], [1.0]),
    ],
)
def test_the_stratified_rule_copes_with_ties(rewards: list[float], expected: list[float]) -> None:
    for quantile in (0.2, 0.5, 0.8):
        assert chi_square(Stratified(0.5, quantile), entries_of(rewards), torch.tensor(expected)) < 4


def test_the_recent_rule_hands_out_the_newest_in_order_and_repeats_when_short() -> None:
    entries = entries_of([0.0] * 5)
    assert Recent().draw(3, entries, Generator()).tolist() == [2, 3, 4]
    assert Recent().draw(7, entries, Generator()).tolist() == [3, 4, 0, 1, 2, 3, 4]


def test_a_mixture_draws_from_the_recent_batch_with_its_probability() -> None:
    expected = torch.full((10,), 0.4 / 10)
    expected[-3:] += 0.6 / 3
    assert chi_square(Mixture(0.6, Uniform()), entries_of(REWARDS, recent=3), expected) < 4
    assert chi_square(Mixture(0.5, Uniform()), entries_of(REWARDS, recent=3), expected) > 10
    assert chi_square(Mixture(0.6, Uniform()), entries_of(REWARDS, recent=0), torch.ones(10)) < 4
    assert chi_square(Mixture(1.0, Uniform()), entries_of(REWARDS, recent=1), (torch.arange(10) == 9).double()) < 4


def test_per_condition_draws_full_groups_of_different_conditions_and_within_each_by_the_rule() -> None:
    condition = [7, 7, 7, 7, 7, 7, -2, -2, 4, 4]
    entries = entries_of(REWARDS, condition)
    rule = PerCondition(RewardSoftmax(1.0), 4)
    for seed in range(20):
        drawn = rule.draw(12, entries, Generator().manual_seed(seed)).view(3, 4)
        groups = torch.tensor(condition)[drawn]
        assert (groups == groups[:, :1]).all()
        assert set(groups[:, 0].tolist()) == {7, -2, 4}
    weight = torch.tensor(REWARDS).exp()
    for one in (7, -2, 4):
        inside = torch.tensor(condition) == one
        weight[inside] /= weight[inside].sum()
    assert chi_square(PerCondition(RewardSoftmax(1.0), 1), entries, weight) < 4
    with pytest.raises(ValueError, match="cannot draw 6 entries, 4 of each condition"):
        rule.draw(6, entries, Generator())


def test_the_members_of_a_group_differ_where_there_are_enough() -> None:
    entries = entries_of([5.0, *[0.0] * 7], [1] * 6 + [2] * 2)
    drawn = PerCondition(RewardSoftmax(0.1), 4).draw(8, entries, Generator().manual_seed(0)).view(2, 4)
    for group in drawn.tolist():
        large = group[0] < 6
        assert len(set(group)) == (4 if large else 2)
        assert not large or 0 in group  # which the rule draws


def test_a_recent_group_is_the_newest_of_a_condition_in_the_recent_batch() -> None:
    entries = entries_of([0.0] * 8, [1, 1, 1, 2, 2, 1, 3, 2], recent=2)
    rule = PerCondition(Uniform(), 2, 1.0)
    groups = {tuple(rule.draw(2, entries, Generator().manual_seed(seed)).tolist()) for seed in range(20)}
    assert groups == {(4, 7), (6, 6)}
    half = PerCondition(Uniform(), 1, 0.5)
    drawn = torch.cat([half.draw(1, entries, Generator().manual_seed(seed)) for seed in range(4000)])
    assert abs(float((drawn == 6).float().mean()) - (0.5 / 2 + 0.5 / 3)) < 0.03  # the only one of its condition
    none = entries_of([0.0] * 4, [1, 1, 2, 2], recent=0)
    assert len(rule.draw(4, none, Generator().manual_seed(0))) == 4


def test_settings_build_the_rule_that_they_name() -> None:
    assert ReplaySettings(rule="softmax", temperature=2.0).build().rule == RewardSoftmax(2.0)
    assert ReplaySettings(rule="rank", rank_weight=0.1).build().rule == RewardRank(0.1)
    assert ReplaySettings(rule="recent").build().rule == Recent()
    built = ReplaySettings(capacity=9, rule="uniform", recent_probability=0.5, per_condition=4).build()
    assert built.rule == PerCondition(Uniform(), 4, 0.5)
    assert built.capacity == 9
    assert ReplaySettings(rule="uniform", candidates=3).build().rule == Diverse(Uniform(), 3)


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("capacity", 0),
        ("rule", "best"),
        ("temperature", 0.0),
        ("rank_weight", -1.0),
        ("share", 1.1),
        ("quantile", 1.0),
        ("recent_probability", -0.1),
        ("per_condition", -1),
        ("candidates", 0),
        ("distance", "euclid"),
    ],
)
def test_an_illegal_setting_is_named(field: str, value: object) -> None:
    with pytest.raises(ValueError, match=rf"{field} is .*, must be"):
        ReplaySettings(**{field: value})  # type: ignore[arg-type]


def test_there_must_be_room_for_a_group_of_each_condition() -> None:
    with pytest.raises(ValueError, match=r"per_condition_capacity is 3, must be 0, .* at least per_condition = 4"):
        ReplaySettings(per_condition=4, per_condition_capacity=3)
    for room in (0, 4):
        ReplaySettings(per_condition=4, per_condition_capacity=room)
