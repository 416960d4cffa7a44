"""The replay buffer against a plain list, its rules against the distributions that they promise."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import save_file
from torch import Generator, Tensor

from headwater.replay import (
    Entries,
    Mixture,
    PerCondition,
    Recent,
    Replay,
    ReplaySettings,
    RewardRank,
    RewardSoftmax,
    Rule,
    Stratified,
    Uniform,
)
from headwater.trajectories import Trajectories


def batch_of(
    identity: list[int],
    condition: list[float] | None = None,
    log_reward: list[float] | None = None,
    lengths: list[int] | None = None,
    serial: int = 0,
) -> Trajectories:
    """Trajectories whose every other content follows from a serial number, so that a mix-up shows."""
    count = len(identity)
    length = torch.tensor(lengths or [1] * count)
    step = torch.arange(int(length.sum())) + 1000 * serial
    return Trajectories(
        steps={"states": step[:, None].int() * torch.tensor([1, -1], dtype=torch.int32), "actions": step},
        lengths=length,
        condition=torch.tensor(condition or [0.0] * count)[:, None],
        log_reward=torch.tensor(log_reward or [0.0] * count),
        log_behaviour=torch.arange(count) - 100.0 * serial,
        version=torch.full((count,), serial),
        identity=torch.tensor(identity),
    )


def assert_same(left: dict[str, Tensor], right: dict[str, Tensor]) -> None:
    assert left.keys() == right.keys()
    for name in left:
        assert left[name].dtype == right[name].dtype
        assert torch.equal(left[name], right[name]), name


members = st.lists(
    st.tuples(st.integers(-3, 9), st.sampled_from([0.0, 1.0]), st.integers(1, 5)),
    min_size=0,
    max_size=7,
)


@settings(max_examples=150, deadline=None)
@given(capacity=st.integers(1, 12), batches=st.lists(members, min_size=1, max_size=25), reload=st.integers(0, 24))
def test_a_replay_holds_what_a_plain_list_would(
    capacity: int, batches: list[list[tuple[int, float, int]]], reload: int
) -> None:
    replay = Replay(capacity, Recent())
    model: list[Trajectories] = []
    recent = 0
    for serial, rows in enumerate(batches):
        if serial == reload:
            restored = Replay(capacity, Recent())
            restored.load_state(replay.state())
            replay = restored
        if rows:
            identity, condition, lengths = (list(column) for column in zip(*rows, strict=True))
            batch = batch_of(identity, condition, lengths=lengths, serial=serial)
            for one in batch.split([1] * len(batch)):
                model = [
                    entry for entry in model if (entry.identity, entry.condition) != (one.identity, one.condition)
                ] + [one]
            model = model[-capacity:]
            recent = sum(int(entry.version) == serial for entry in model)
            replay.add(batch)
        else:
            replay.add(batch_of([0]).select(torch.tensor([False])))
        assert len(replay) == len(model)
        if model:
            expected = Trajectories.concatenate(model).tensors()
            assert_same(replay.sample(len(model), Generator()).tensors(), expected)
            assert_same(replay.state(), expected | {"recent": torch.tensor(recent)})


def test_a_long_run_with_many_duplicates_keeps_the_contents_and_a_bounded_memory() -> None:
    generator = Generator().manual_seed(1)
    replay = Replay(500, Uniform())
    newest: dict[int, int] = {}
    for serial in range(300):
        identity = torch.randint(0, 700, (60,), generator=generator).tolist()
        lengths = torch.randint(1, 9, (60,), generator=generator).tolist()
        replay.add(batch_of(identity, lengths=lengths, serial=serial))
        for one in identity:
            newest.pop(one, None)
            newest[one] = serial
    drawn = replay.state()
    expected = list(newest.items())[-500:]
    assert list(zip(drawn["identity"].tolist(), drawn["version"].tolist(), strict=True)) == expected
    first_step = drawn["steps.actions"][drawn["lengths"].cumsum(0) - drawn["lengths"]]
    assert torch.equal(first_step // 1000, drawn["version"])


def test_equal_objects_under_different_conditions_are_two_entries_and_both_zeros_one_condition() -> None:
    replay = Replay(10, Uniform())
    replay.add(batch_of([5, 5, 5], condition=[1.0, 2.0, 1.0]))
    assert len(replay) == 2
    replay.add(batch_of([6, 6], condition=[0.0, -0.0]))
    assert len(replay) == 3


@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
def test_a_trajectory_without_a_finite_reward_is_refused_and_nothing_changes(value: float) -> None:
    replay = Replay(10, Uniform())
    replay.add(batch_of([1]))
    before = replay.state()
    with pytest.raises(ValueError, match=r"log_reward of trajectory 1 is (nan|inf|-inf)"):
        replay.add(batch_of([2, 3], log_reward=[0.0, value]))
    assert_same(replay.state(), before)


def test_trajectories_of_another_kind_are_refused_by_name() -> None:
    replay = Replay(10, Uniform())
    replay.add(batch_of([1]))
    other = batch_of([2])
    with pytest.raises(ValueError, match=r"steps\.tokens"):
        replay.add(replace(other, steps={"tokens": other.steps["actions"]}))
    with pytest.raises(ValueError, match=r"steps\.states has rows of \(1,\)"):
        replay.add(replace(other, steps=other.steps | {"states": other.steps["states"][:, :1]}))
    with pytest.raises(ValueError, match=r"condition has rows of \(3,\)"):
        replay.add(replace(other, condition=torch.zeros(1, 3)))
    with pytest.raises(ValueError, match=r"identity is torch\.int32"):
        replay.add(replace(other, identity=other.identity.int()))
    assert len(replay) == 1


def test_what_is_handed_out_does_not_change_when_the_replay_does() -> None:
    replay = Replay(2, Recent())
    replay.add(batch_of([1, 2], log_reward=[1.0, 2.0]))
    drawn, state = replay.sample(2, Generator()), replay.state()
    replay.add(batch_of([3, 4], log_reward=[3.0, 4.0], serial=3))
    assert drawn.log_reward.tolist() == [1.0, 2.0]
    assert drawn.steps["actions"].tolist() == [0, 1]
    assert state["log_reward"].tolist() == [1.0, 2.0]


def test_drawing_from_an_empty_replay_or_nothing_is_an_error() -> None:
    replay = Replay(10, Uniform())
    with pytest.raises(ValueError, match="empty replay"):
        replay.sample(3, Generator())
    replay.add(batch_of([1]))
    with pytest.raises(ValueError, match="count is 0"):
        replay.sample(0, Generator())


# Rules


def entries_of(log_reward: list[float], condition: list[int] | None = None, recent: int = 0) -> Entries:
    count = len(log_reward)
    return Entries(
        torch.tensor(log_reward), torch.tensor(condition or [0] * count), torch.zeros(count, dtype=torch.int64), recent
    )


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


REWARDS = [0.5, -1.0, 2.0, 2.0, -3.0, 0.0, 1.0, 1.5, -0.5, 0.2]


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
    assert chi_square(rule, entries, weight) < 4
    with pytest.raises(ValueError, match="cannot draw 6 entries, 4 of each condition"):
        rule.draw(6, entries, Generator())


def test_per_condition_keeps_the_recent_batch_of_each_condition() -> None:
    entries = entries_of([0.0] * 6, [1, 1, 1, 2, 2, 1], recent=2)
    drawn = PerCondition(Mixture(1.0, Uniform()), 50).draw(100, entries, Generator().manual_seed(0))
    assert set(drawn.tolist()) == {4, 5}


RULES = [
    Recent(),
    Uniform(),
    RewardSoftmax(0.7),
    RewardRank(0.1),
    Stratified(),
    Mixture(0.3, RewardRank()),
    PerCondition(Mixture(0.3, Stratified()), 4),
]


def filled(rule: Rule, capacity: int = 80) -> Replay:
    replay, generator = Replay(capacity, rule), Generator().manual_seed(5)
    for serial in range(6):
        rows = torch.randint(0, 60, (40,), generator=generator)
        replay.add(
            batch_of(
                rows.tolist(),
                (rows % 3).float().tolist(),
                torch.randn(40, generator=generator).tolist(),
                torch.randint(1, 6, (40,), generator=generator).tolist(),
                serial,
            )
        )
    return replay


@pytest.mark.parametrize("rule", RULES, ids=lambda rule: type(rule).__name__)
def test_a_restored_replay_continues_exactly(rule: Rule, tmp_path: Path) -> None:
    replay, restored = filled(rule, capacity=45), Replay(45, rule)
    replay.save(tmp_path / "replay.safetensors")
    restored.load(tmp_path / "replay.safetensors")
    assert [path.name for path in tmp_path.iterdir()] == ["replay.safetensors"]
    for serial in range(10, 14):
        draws = [each.sample(32, Generator().manual_seed(serial)).tensors() for each in (replay, restored)]
        assert_same(*draws)
        for each in (replay, restored):
            each.add(batch_of(list(range(serial, serial + 9)), lengths=[2] * 9, serial=serial))
    assert_same(replay.state(), restored.state())


@pytest.mark.parametrize("rule", RULES[1:], ids=lambda rule: type(rule).__name__)
def test_the_seed_alone_decides_the_draw(rule: Rule) -> None:
    replay = filled(rule)
    first, again, other = (replay.sample(64, Generator().manual_seed(seed)).identity for seed in (1, 1, 2))
    assert torch.equal(first, again)
    assert not torch.equal(first, other)


def test_an_empty_replay_can_be_saved_and_a_smaller_one_keeps_the_newest(tmp_path: Path) -> None:
    Replay(3, Uniform()).save(tmp_path / "empty")
    replay = filled(Uniform())
    replay.load(tmp_path / "empty")
    assert len(replay) == 0
    big, small = filled(Uniform()), Replay(10, Uniform())
    small.load_state(big.state())
    assert torch.equal(small.state()["identity"], big.state()["identity"][-10:])


def test_a_corrupt_or_foreign_file_is_named_and_changes_nothing(tmp_path: Path) -> None:
    replay = filled(Uniform())
    before = replay.state()
    replay.save(tmp_path / "whole")
    (tmp_path / "cut").write_bytes((tmp_path / "whole").read_bytes()[:-100])
    (tmp_path / "text").write_text("not a replay at all")
    (tmp_path / "nothing").write_bytes(b"")
    save_file({"weight": torch.zeros(2)}, tmp_path / "foreign")
    broken = {name: tensor.contiguous() for name, tensor in before.items() if name != "version"}
    save_file(broken, tmp_path / "incomplete", {"format": "headwater.replay.1"})
    for name in ("cut", "text", "nothing", "foreign", "incomplete"):
        with pytest.raises(ValueError, match=rf"{name}: not a saved replay"):
            replay.load(tmp_path / name)
    with pytest.raises(FileNotFoundError):
        replay.load(tmp_path / "absent")
    assert_same(replay.state(), before)


def test_settings_build_the_rule_that_they_name() -> None:
    assert ReplaySettings(rule="softmax", temperature=2.0).build().rule == RewardSoftmax(2.0)
    assert ReplaySettings(rule="rank", rank_weight=0.1).build().rule == RewardRank(0.1)
    assert ReplaySettings(rule="recent").build().rule == Recent()
    built = ReplaySettings(capacity=9, rule="uniform", recent_probability=0.5, per_condition=4).build()
    assert built.rule == PerCondition(Mixture(0.5, Uniform()), 4)
    assert built.capacity == 9


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
    ],
)
def test_an_illegal_setting_is_named(field: str, value: object) -> None:
    with pytest.raises(ValueError, match=rf"{field} is .*, must be"):
        ReplaySettings(**{field: value})  # type: ignore[arg-type]
