"""The replay buffer against a plain list: what it holds, what it costs, and that it goes on where it was saved."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import save_file
from torch import Generator

from headwater.replay import (
    Entries,
    Recent,
    Replay,
    Rule,
    Uniform,
    store,
)
from headwater.replay.pages import Pages
from headwater.trajectories import Trajectories
from replay_helpers import EVERY_RULE, RULES, assert_same, batch_of, filled

members = st.lists(
    st.tuples(st.integers(-3, 9), st.sampled_from([0.0, 1.0]), st.integers(1, 5)),
    min_size=0,
    max_size=7,
)


@settings(max_examples=150, deadline=None)
@given(
    capacity=st.integers(1, 12), each=st.integers(0, 5), batches=st.lists(members, min_size=1, max_size=25),
    reload=st.integers(0, 24),
)  # fmt: skip
def test_a_replay_holds_what_a_plain_list_would(
    capacity: int, each: int, batches: list[list[tuple[int, float, int]]], reload: int
) -> None:
    replay = Replay(capacity, Recent(), each)
    model: list[Trajectories] = []
    recent = 0
    for serial, rows in enumerate(batches):
        if serial == reload:
            restored = Replay(capacity, Recent(), each)
            restored.load_state(replay.state())
            replay = restored
        if rows:
            identity, condition, lengths = (list(column) for column in zip(*rows, strict=True))
            batch = batch_of(identity, condition, lengths=lengths, serial=serial)
            for one in batch.split([1] * len(batch)):
                model = [
                    entry for entry in model if (entry.identity, entry.condition) != (one.identity, one.condition)
                ] + [one]
            if each:
                alike = [[later.condition for later in model[place:]] for place in range(len(model))]
                model = [one for one, after in zip(model, alike, strict=True) if after.count(one.condition) <= each]
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
    assert replay._store.n_slots == 500
    content = sum(tensor.nbytes for tensor in drawn.values())
    assert replay._store.nbytes < 2 * content


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


def assert_continues_alike(left: Replay, right: Replay, seed: int) -> None:
    """The same draws by every rule."""
    for rule in EVERY_RULE:
        left.rule = right.rule = rule
        draws = [each.sample(24, Generator().manual_seed(seed)).tensors() for each in (left, right)]
        assert_same(*draws)


rewarded = st.lists(
    st.tuples(st.integers(0, 30), st.sampled_from([-300.0, -0.0, 0.0, 1.0, 1.5, 200.0]), st.integers(1, 30)),
    min_size=1,
    max_size=12,
)


@settings(max_examples=60, deadline=None)
@given(capacity=st.integers(1, 25), batches=st.lists(rewarded, min_size=1, max_size=15), seed=st.integers(0, 99))
def test_draws_depend_on_the_entries_alone_not_on_how_they_came(
    capacity: int, batches: list[list[tuple[int, float, int]]], seed: int
) -> None:
    replay = Replay(capacity, Recent())
    for serial, rows in enumerate(batches):
        identity, log_reward, lengths = (list(column) for column in zip(*rows, strict=True))
        condition = [float(one % 3) for one in identity]
        replay.add(batch_of(identity, condition, log_reward, lengths, serial))
        if serial % 4 == 0:
            restored = Replay(capacity, Recent())
            restored.load_state(replay.state())
            assert_continues_alike(replay, restored, seed)


@settings(max_examples=60, deadline=None)
@given(batches=st.lists(rewarded, min_size=1, max_size=6), seed=st.integers(0, 99))
def test_the_orders_that_a_replay_maintains_are_those_that_sorting_gives(
    batches: list[list[tuple[int, float, int]]], seed: int
) -> None:
    replay = Replay(20, Recent())
    for serial, rows in enumerate(batches):
        identity, log_reward, lengths = (list(column) for column in zip(*rows, strict=True))
        replay.add(batch_of(identity, None, log_reward, lengths, serial))
    kept = replay._store.entries
    plain = Entries(kept.log_reward, kept.condition_key, kept.version, kept.recent, kept.trajectories)
    everywhere = torch.arange(len(kept))
    assert torch.equal(kept.ranked(everywhere), plain.ranked(everywhere))
    assert torch.equal(kept.ranked_log_reward(everywhere), plain.ranked_log_reward(everywhere))
    asked = torch.tensor([-torch.inf, -300.1, -300.0, -1e-45, -0.0, 0.0, 1e-45, 1.25, 200.0, 1e30, torch.inf])
    assert torch.equal(kept.n_above(asked), plain.n_above(asked))
    by_formula = (plain.log_reward[None, :] > asked[:, None]).sum(1)
    assert torch.equal(kept.n_above(asked), by_formula)
    for rule in EVERY_RULE:
        assert torch.equal(*(rule.draw(24, each, Generator().manual_seed(seed)) for each in (kept, plain)))


def test_counting_ages_anew_changes_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    plain, renumbered = filled(Uniform()), Replay(80, Uniform())
    monkeypatch.setattr(store, "_AGES", 125)
    renumbered.load_state(plain.state())
    for serial in range(10, 30):
        for each in (plain, renumbered):
            each.add(batch_of(list(range(serial, serial + 9)), lengths=[2] * 9, serial=serial))
        assert renumbered._store.next_age <= 125
        assert_continues_alike(plain, renumbered, serial)
    assert_same(plain.state(), renumbered.state())


def test_keys_that_are_alike_in_their_upper_half_are_told_apart(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(store, "entry_key", lambda batch: (batch.identity + 7 * (batch.identity % 2 << 32)).numpy())
    replay = Replay(12, Recent())
    newest: dict[int, int] = {}
    for serial in range(40):
        identity = [(serial * step) % 19 for step in (1, 3, 5)]
        replay.add(batch_of(identity, serial=serial))
        for one in identity:
            newest.pop(one, None)
            newest[one] = serial
    state = replay.state()
    assert list(zip(state["identity"].tolist(), state["version"].tolist(), strict=True)) == list(newest.items())[-12:]


def test_steps_survive_many_arrivals_and_departures_of_any_length() -> None:
    """Through several slabs of pages, with tensors of several kinds."""
    generator, kept, lengths = np.random.default_rng(2), {}, np.array([1, 2, 3, 7, 40, 300])
    kinds = {"a": torch.zeros(0, 3, dtype=torch.int32), "b": torch.zeros(0, dtype=torch.bool), "c": torch.zeros(0, 0)}
    pages = Pages(kinds, 4.0)
    for round_ in range(60):
        chosen = generator.choice(lengths, 80)
        total = int(chosen.sum())
        steps = {
            "a": torch.arange(3 * total, dtype=torch.int32).view(-1, 3) * (round_ + 1),
            "b": torch.arange(total) % (round_ + 2) == 0,
            "c": torch.zeros(total, 0),
        }
        first = pages.write(steps, chosen)
        ends = chosen.cumsum()
        for address, start, end in zip(first.tolist(), ends - chosen, ends, strict=True):
            kept[address] = (end - start, {name: tensor[start:end] for name, tensor in steps.items()})
        leaving = generator.choice(list(kept), len(kept) // 20, replace=False).astype(np.int32)
        pages.free(leaving, np.array([kept.pop(int(address))[0] for address in leaving]))
    assert pages._n_slabs > 1
    order = generator.permutation(list(kept)).astype(np.int32)
    read = pages.read(order, np.array([kept[int(address)][0] for address in order]))
    assert_same(read, {name: torch.cat([kept[int(address)][1][name] for address in order]) for name in kinds})


def test_a_capacity_that_memory_has_no_room_for_is_named() -> None:
    with pytest.raises(ValueError, match="capacity is 1000000000000000, must be"):
        Replay(10**15, Uniform())


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
