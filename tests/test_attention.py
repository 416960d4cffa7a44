"""Native attention against the plain operations: values, gradients, and numbers at the edge of what float32 holds."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from numba import njit
from torch import Tensor

from headwater.policies.attention import attention, attention_in_blocks, plain_attention
from headwater.policies.registers import LANES, load, power_of_two, store, turn
from helpers import seeded


def values_and_gradient(function: object, packed: Tensor, heads: int) -> tuple[Tensor, Tensor]:
    leaf = packed.clone().requires_grad_()
    value = function(leaf, heads)  # type: ignore[operator]
    value.backward(torch.randn(value.shape, generator=seeded(1)).to(value.dtype))
    assert leaf.grad is not None
    return value.detach(), leaf.grad


def is_native(packed: Tensor, heads: int) -> bool:
    view = attention(packed.clone().requires_grad_(), heads).grad_fn
    assert view is not None
    return "Attention" in type(view.next_functions[0][0]).__name__


@pytest.mark.parametrize("length", [1, 2, 15, 16, 17, 40, 64])
@pytest.mark.parametrize("head_width", [4, 8, 16, 32])
@pytest.mark.parametrize("count", [0, 1, 50])
def test_values_and_gradients_are_those_of_plain_attention(length: int, head_width: int, count: int) -> None:
    heads = 4
    packed = 2 * torch.randn(count, length, 3 * heads * head_width, generator=seeded(0))
    assert is_native(packed, heads)
    ours, plain = (values_and_gradient(function, packed, heads) for function in (attention, plain_attention))
    exact = values_and_gradient(plain_attention, packed.double(), heads)
    for a, b, reference in zip(ours, plain, exact, strict=True):
        assert a.shape == reference.shape
        error, plain_error = ((x - reference).abs().flatten().sum() for x in (a, b))
        assert error <= 2 * plain_error + 1e-7 * reference.abs().sum()
        torch.testing.assert_close(a.double(), reference, rtol=1e-4, atol=1e-4)


def test_a_slice_of_a_larger_tensor_and_an_expanded_gradient_are_read_as_they_are() -> None:
    wide = torch.randn(6, 10, 96, generator=seeded(2))
    packed = wide[:, ::2, :48].requires_grad_()
    (ours,) = torch.autograd.grad(attention(packed, 2).sum(), packed)
    (reference,) = torch.autograd.grad(plain_attention(packed.contiguous(), 2).sum(), packed)
    torch.testing.assert_close(ours, reference)


@pytest.mark.parametrize("heads", [2, 3])
def test_blocks_of_several_lengths_are_attended_to_each_by_itself(heads: int) -> None:
    blocks, width = [(3, 20), (0, 7), (5, 2)], 32 if heads == 2 else 33
    packed = torch.randn(3 * 20 + 5 * 2 + 6, 3 * width, generator=seeded(5), requires_grad=True)
    together = attention_in_blocks(packed, heads, blocks)
    first, second = packed[:60].view(3, 20, -1), packed[60:70].view(5, 2, -1)
    parts = [plain_attention(part, heads).flatten(0, 1) for part in (first, second)]
    expected = torch.cat([*parts, torch.zeros(6, width)])  # rows after the last block
    torch.testing.assert_close(together, expected)
    seen = torch.randn(expected.shape, generator=seeded(6))
    ours, theirs = (torch.autograd.grad(out, packed, seen)[0] for out in (together, expected))
    torch.testing.assert_close(ours, theirs)
    with torch.no_grad():
        torch.testing.assert_close(attention_in_blocks(packed, heads, blocks), together)


@pytest.mark.parametrize("size", [30.0, 1e4, 1e18])
def test_large_logits_do_not_overflow(size: float) -> None:
    packed = torch.randn(3, 15, 96, generator=seeded(3))
    packed[:, :, :32] *= size
    exact = values_and_gradient(plain_attention, packed.double(), 4)
    for ours, reference in zip(values_and_gradient(attention, packed, 4), exact, strict=True):
        assert ours.isfinite().all()
        torch.testing.assert_close(ours.double(), reference, rtol=1e-3, atol=1e-3 * float(reference.abs().max()))


def test_a_key_that_is_far_behind_has_no_weight_at_all() -> None:
    packed = torch.zeros(1, 2, 48)
    packed[0, :, 0] = 1.0
    packed[0, 0, 16] = -1e4
    packed[0, :, 32] = torch.tensor([1e30, 1.0])
    assert attention(packed, 1)[0, :, 0].tolist() == [1.0, 1.0]


@pytest.mark.parametrize("third", [0, 1, 2])
def test_nan_in_one_state_is_seen_there_and_nowhere_else(third: int) -> None:
    packed = torch.randn(3, 15, 48, generator=seeded(4))
    packed[1, 4, 16 * third] = torch.nan
    ours, reference = (values_and_gradient(function, packed, 2) for function in (attention, plain_attention))
    for a, b in zip(ours, reference, strict=True):
        assert torch.equal(a.isnan(), b.isnan())
        assert a[1].isnan().any()


def test_other_widths_lengths_and_types_take_the_plain_way() -> None:
    for shape, heads, kind in [((2, 5, 36), 3, torch.float32), ((2, 65, 48), 2, torch.float32),
                               ((2, 5, 48), 2, torch.float64), ((2, 5, 192), 1, torch.float32)]:  # fmt: skip
        packed = torch.randn(shape, generator=seeded(5)).to(kind)
        assert not is_native(packed, heads)
        torch.testing.assert_close(attention(packed, heads), plain_attention(packed, heads))


def test_powers_of_two_are_exact_to_two_in_ten_million_and_then_zero() -> None:
    @njit
    def powers(x, out):  # type: ignore[no-untyped-def]
        for i in range(0, x.size, LANES):
            store(out, i, power_of_two(load(x, i)))

    x = np.concatenate([np.linspace(-126, 0, 1 << 20), -np.logspace(-30, 0, 1 << 12)]).astype(np.float32)
    out = np.empty_like(x)
    powers(x, out)
    assert np.abs(out / np.exp2(x.astype(np.float64)) - 1).max() < 2e-7
    x = np.array([0, -1, -126, -126.4, -127, -1e4, -3e38, -np.inf] * 2, np.float32)
    out = np.empty_like(x)
    powers(x, out)
    assert out[:3].tolist() == [1, 0.5, 2.0**-126]
    assert out[4:8].tolist() == [0, 0, 0, 0]


def test_turning_transposes_and_reads_no_row_after_the_last() -> None:
    @njit
    def turned(rows, out):  # type: ignore[no-untyped-def]
        turn(rows, 3, 20, 4, out, 0)

    rows, out = np.arange(3 + 4 * 20 + LANES, dtype=np.float32), np.zeros(LANES * LANES, np.float32)
    turned(rows, out)
    expected = np.stack([rows[3 + 20 * min(i, 4) :][:LANES] for i in range(LANES)]).T
    assert np.array_equal(out.reshape(LANES, LANES), expected)
