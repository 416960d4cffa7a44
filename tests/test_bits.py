"""Bit sequences: the three published rewards by hand, distances, modes, the test set, and the number of actions."""

from __future__ import annotations

import math
from typing import Literal

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from headwater.environments import BitReward, bit_sequences
from headwater.environments.bits import MODE_BLOCKS, flipped_modes, hidden_modes, mode_distances, modes_found

NO_CONDITION = torch.zeros(3, 0)
MODES = torch.tensor([[0, 0, 0, 0, 0, 0, 0, 0], [1, 1, 1, 1, 0, 0, 0, 0]], dtype=torch.uint8)
OBJECTS = torch.tensor(
    [
        [1, 1, 1, 1, 0, 0, 0, 0],  # a mode
        [0, 0, 0, 0, 0, 0, 1, 0],  # one bit from the first mode
        [1, 1, 1, 1, 1, 1, 1, 1],  # four from the second, eight from the first
    ],
    dtype=torch.uint8,
)


@pytest.mark.parametrize(
    ("form", "expected"),
    [
        ("gfnx", [0.0, -3 * 1 / 8, -3 * 4 / 8]),  # exp(-3 d / n)
        ("gflownet-rl", [0.0, -2 * 1, -2 * 4]),  # exp(-2 d)
        ("torchgfn", [0.0, -1 / 1, -4 / 1]),  # exp(-d / 1)
    ],
)
def test_each_published_reward_by_hand(form: Literal["gfnx", "gflownet-rl", "torchgfn"], expected: list[float]) -> None:
    log_reward = BitReward(MODES, form)(OBJECTS, NO_CONDITION)
    assert log_reward.tolist() == pytest.approx(expected)
    assert log_reward.dtype == torch.float32


def test_strength_is_the_beta_of_two_rewards_and_the_temperature_of_the_third() -> None:
    assert BitReward(MODES, "gfnx", 4.0)(OBJECTS, NO_CONDITION).tolist() == pytest.approx([0, -0.5, -2])
    assert BitReward(MODES, "gflownet-rl", 4.0)(OBJECTS, NO_CONDITION).tolist() == pytest.approx([0, -4, -16])
    assert BitReward(MODES, "torchgfn", 4.0)(OBJECTS, NO_CONDITION).tolist() == pytest.approx([0, -0.25, -1])


def test_a_reward_that_is_not_one_of_the_three_is_refused() -> None:
    with pytest.raises(ValueError, match="form = 'paper': must be one of gfnx, gflownet-rl, torchgfn"):
        BitReward(MODES, "paper")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match=r"strength = 0\.0: must be positive"):
        BitReward(MODES, strength=0.0)
    with pytest.raises(ValueError, match="strength = nan: must be positive"):
        BitReward(MODES, strength=math.nan)


@given(bits=st.integers(1, 40), n_objects=st.integers(0, 6), n_modes=st.integers(1, 6), seed=st.integers(0, 1000))
def test_distances_are_those_counted_bit_by_bit(bits: int, n_objects: int, n_modes: int, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    objects = torch.randint(2, (n_objects, bits), generator=generator, dtype=torch.uint8)
    modes = torch.randint(2, (n_modes, bits), generator=generator, dtype=torch.uint8)
    counted = [[sum(a != b for a, b in zip(x, m, strict=True)) for m in modes.tolist()] for x in objects.tolist()]
    assert mode_distances(objects, modes).tolist() == counted


def test_a_mode_is_a_row_of_the_published_blocks() -> None:
    modes = hidden_modes()
    assert modes.shape == (60, 120)
    assert modes.dtype == torch.uint8
    blocks = {"".join(map(str, block)) for block in modes.view(-1, 8).tolist()}
    assert blocks == set(MODE_BLOCKS)
    assert len({tuple(mode) for mode in modes.tolist()}) == 60


def test_modes_follow_from_their_seed() -> None:
    assert torch.equal(hidden_modes(seed=3), hidden_modes(seed=3))
    assert not torch.equal(hidden_modes(seed=3), hidden_modes(seed=4))


def test_modes_need_whole_blocks() -> None:
    with pytest.raises(ValueError, match="bits = 20: must be a multiple of 8"):
        hidden_modes(bits=20)


def test_the_test_set_flips_every_number_of_bits_of_every_mode() -> None:
    modes = hidden_modes()
    strings = flipped_modes(modes)
    assert strings.shape == (7200, 120)
    flips = (strings.view(60, 120, 120) != modes[:, None]).sum(2)
    assert torch.equal(flips, torch.arange(120).expand(60, 120))


def test_the_flipped_bits_differ_from_mode_to_mode_and_are_spread_over_all_places() -> None:
    modes = torch.zeros(2, 40, dtype=torch.uint8)
    first, second = flipped_modes(modes).view(2, 40, 40).bool()
    assert not torch.equal(first, second)
    assert first[1:].any(0).all()
    assert torch.equal(flipped_modes(modes, seed=1), flipped_modes(modes, seed=1))


def test_a_mode_is_found_within_thirty_bits_and_not_beyond() -> None:
    modes = torch.zeros(2, 120, dtype=torch.uint8)
    modes[1] = 1
    near, far = torch.zeros(2, 120, dtype=torch.uint8)
    near[:30], far[:31] = 1, 1
    assert modes_found(near[None], modes) == 1
    assert modes_found(far[None], modes) == 0
    assert modes_found(far[None], modes, within=31) == 1
    assert modes_found(torch.stack([near, 1 - near, near]), modes) == 2


def test_the_published_size_has_the_published_number_of_actions() -> None:
    appended, slotted = bit_sequences(120, 8), bit_sequences(120, 8, "slots")
    assert appended.n_actions == 257  # 256 words and exit
    assert slotted.n_actions == 3841  # 15 places x 256 words and exit
    assert appended.max_steps == slotted.max_steps == 16


@pytest.mark.parametrize("construction", ["append", "slots"])
def test_the_highest_bit_of_a_word_comes_first(construction: Literal["append", "slots"]) -> None:
    environment = bit_sequences(6, 3, construction)
    states = torch.tensor([[4, 3]], dtype=torch.int32)
    objects = environment.objects(states)
    assert isinstance(objects, torch.Tensor)
    assert objects.tolist() == [[1, 0, 0, 0, 1, 1]]
    assert torch.equal(environment.states(objects), states)


@pytest.mark.parametrize("construction", ["append", "slots"])
def test_every_mode_can_be_built(construction: Literal["append", "slots"]) -> None:
    environment, modes = bit_sequences(120, 8, construction), hidden_modes()
    states = environment.states(modes)
    assert torch.equal(torch.as_tensor(environment.objects(states)), modes)
    assert environment.forward_mask(states)[:, -1].all()
