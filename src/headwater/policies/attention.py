"""Softmax attention over short sequences on a CPU, in one native call forwards and one backwards.

softmax(Q K^T / sqrt(d)) V of Vaswani et al., Attention Is All You Need (2017). For a dozen tokens and heads of eight
numbers, PyTorch spends its time on calls, copies and softmax over rows that fill no vector register. Here sixteen
queries of a head lie side by side, so that nothing has to be added up along a register, and what stands in unused
places is never read. Elsewhere, and as the reference that tests compare with, it is plain.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from functools import cache
from typing import Any

import numpy as np
import torch
from numba import njit
from torch import Tensor

from headwater.native import kept_njit
from headwater.policies.layers import softmax
from headwater.policies.registers import (
    LANES,
    add,
    broadcast,
    load,
    maximum,
    multiply,
    multiply_add,
    power_of_two,
    reciprocal,
    store,
    subtract,
    turn,
)

_LONGEST, _WIDEST = 64, 32
"""Beyond as many tokens, or numbers a head, a library's products of matrices are as fast."""


def attention(packed: Tensor, heads: int) -> Tensor:
    """packed: queries, keys and values, one third each, heads one after another within a third,
    `[N, length, 3 * width]` -> `[N, length, width]`."""
    count, length, thirds = packed.shape
    if _fits(packed, heads, length):
        out = _Attention.apply(packed.reshape(-1, thirds), heads, ((count, length),))  # type: ignore[no-untyped-call]
        return out.view(count, length, -1)
    return plain_attention(packed, heads)


def attention_in_blocks(packed: Tensor, heads: int, blocks: Sequence[tuple[int, int]]) -> Tensor:
    """The same for sequences of several lengths, end to end: `[rows, 3 * width]` -> `[rows, width]`.

    blocks: (N, length), N sequences each; what is in rows after the last one comes out as zeros.
    """
    width = packed.shape[1] // 3
    if _fits(packed, heads, max(length for _, length in blocks)):
        return _Attention.apply(packed, heads, tuple(blocks))  # type: ignore[no-untyped-call]
    start, mixed = 0, []
    for count, length in blocks:
        part = packed[start : start + count * length].view(count, length, -1)
        mixed.append(plain_attention(part, heads).flatten(0, 1))
        start += count * length
    return torch.cat([*mixed, packed.new_zeros(len(packed) - start, width)])


def plain_attention(packed: Tensor, heads: int) -> Tensor:
    """The same in PyTorch's operations."""
    count, length, width = packed.shape[0], packed.shape[1], packed.shape[2] // 3
    query, key, value = packed.view(count, length, 3, heads, width // heads).permute(2, 0, 3, 1, 4)
    weights = softmax(query @ key.transpose(-1, -2) * (width // heads) ** -0.5)
    return (weights @ value).transpose(1, 2).reshape(count, length, width)


def _fits(packed: Tensor, heads: int, longest: int) -> bool:
    width = packed.shape[-1] // 3
    head_width = width // heads
    fits = longest <= _LONGEST and head_width <= _WIDEST and head_width % 4 == 0 and width % LANES == 0
    return fits and packed.device.type == "cpu" and packed.dtype == torch.float32


class _Attention(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, packed: Tensor, heads: int, blocks: tuple[tuple[int, int], ...]) -> Tensor:
        packed = packed.detach().contiguous()
        ctx.save_for_backward(packed)
        ctx.heads, ctx.blocks = heads, blocks
        width = packed.shape[1] // 3
        out = packed.new_empty(len(packed), width)
        forward, _ = _compiled(width // heads)
        start = 0
        for count, length in blocks:
            part = slice(start, start + count * length)
            forward(_numbers(packed[part]), _numbers(out[part]), count, length, heads, _room(length, width, 2, 1))
            start = part.stop
        out[start:] = 0.0
        return out

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None, None]:
        (packed,) = ctx.saved_tensors
        width = packed.shape[1] // 3
        by_out, by_packed = gradients[0].detach().contiguous(), torch.empty_like(packed)
        _, backward = _compiled(width // ctx.heads)
        start = 0
        for count, length in ctx.blocks:
            part = slice(start, start + count * length)
            arrays = [_numbers(tensor[part]) for tensor in (packed, by_out, by_packed)]
            backward(*arrays, count, length, ctx.heads, _room(length, width, 5, 2))
            start = part.stop
        by_packed[start:] = 0.0
        return by_packed, None, None


def _numbers(tensor: Tensor) -> np.ndarray:
    return tensor.view(-1).numpy()


def _room(length: int, width: int, by_number: int, by_key: int) -> np.ndarray:
    """What a kernel works in. PyTorch aligns what it allocates to whole cache lines, numpy does not."""
    places = -(-length // LANES) * LANES
    return torch.zeros((by_number * width + by_key * LANES) * places + 2 * LANES * LANES).numpy()


@cache
def _compiled(width: int) -> tuple[Any, Any]:
    """The two kernels for heads of `width` numbers: loops of a known length are what a compiler unrolls."""
    scale = np.float32(width**-0.5)
    to_exponent = np.float32(math.log2(math.e) * width**-0.5)

    @njit(nogil=True)
    def take(rows, start, stride, count, columns, out):  # type: ignore[no-untyped-def]
        """The first `columns` numbers of up to LANES rows, turned so that the rows lie side by side."""
        for column in range(0, columns, LANES):
            turn(rows, start + column, stride, min(count, LANES) - 1, out, column * LANES)

    @njit(nogil=True)
    def put(turned, rows, start, stride, count, columns, room):  # type: ignore[no-untyped-def]
        """The reverse of `take`."""
        for column in range(0, columns, LANES):
            turn(turned, column * LANES, LANES, LANES - 1, room, 0)
            for i in range(min(count, LANES)):
                store(rows, start + i * stride + column, load(room, i * LANES))

    @njit(nogil=True)
    def compare(turned, rows, start, stride, count, out):  # type: ignore[no-untyped-def]
        """Products of what stands in the lanes with each of the rows, and the highest of them."""
        highest = broadcast(np.float32(-np.inf))
        for j in range(count):
            product = multiply(load(turned, 0), broadcast(rows[np.uint64(start + j * stride)]))
            for number in range(1, width):
                x = broadcast(rows[np.uint64(start + j * stride + number)])
                product = multiply_add(load(turned, number * LANES), x, product)
            store(out, j * LANES, product)
            highest = maximum(highest, product)
        return highest

    @njit(nogil=True)
    def attend(query, packed, start, stride, length, weights):  # type: ignore[no-untyped-def]
        """Exponentials of the scaled products with each key less the highest; returns one over their sums."""
        highest = compare(query, packed, start, stride, length, weights)
        total, factor = broadcast(np.float32(0)), broadcast(to_exponent)
        for j in range(length):
            weight = power_of_two(multiply(subtract(load(weights, j * LANES), highest), factor))
            store(weights, j * LANES, weight)
            total = add(total, weight)
        return reciprocal(total)

    @njit(nogil=True)
    def weigh(weights, rows, start, stride, count, factor, more, out):  # type: ignore[no-untyped-def]
        """The rows by their weights, added up, times the factor, into `out` or, if more, to what is there."""
        for number in range(0, width, 4):
            a = b = c = d = broadcast(np.float32(0))
            for j in range(count):
                weight, place = load(weights, j * LANES), start + j * stride + number
                a = multiply_add(weight, broadcast(rows[np.uint64(place)]), a)
                b = multiply_add(weight, broadcast(rows[np.uint64(place + 1)]), b)
                c = multiply_add(weight, broadcast(rows[np.uint64(place + 2)]), c)
                d = multiply_add(weight, broadcast(rows[np.uint64(place + 3)]), d)
            for k, total in enumerate((a, b, c, d)):
                place = (number + k) * LANES
                before = load(out, place) if more else broadcast(np.float32(0))
                store(out, place, multiply_add(total, factor, before))

    @njit(nogil=True)
    def forward(packed, out, count, length, heads, room):  # type: ignore[no-untyped-def]
        whole = heads * width
        stride = 3 * whole
        tile, query, room = _split(room, LANES * LANES, whole * LANES)
        result, weights, _ = _split(room, whole * LANES, length * LANES)
        for n in range(count):
            start = n * length * stride
            for first in range(0, length, LANES):
                take(packed, start + first * stride, stride, length - first, whole, query)
                for column in range(0, whole, width):
                    head = query[column * LANES :]
                    share = attend(head, packed, start + whole + column, stride, length, weights)
                    values, head = start + 2 * whole + column, result[column * LANES :]
                    weigh(weights, packed, values, stride, length, share, False, head)
                put(result, out, (n * length + first) * whole, whole, length - first, whole, tile)

    @njit(nogil=True)
    def backward(packed, by_out, by_packed, count, length, heads, room):  # type: ignore[no-untyped-def]
        whole = heads * width
        stride = 3 * whole
        places = (length + LANES - 1) // LANES * LANES
        tile, other_tile, room = _split(room, LANES * LANES, LANES * LANES)
        query, by_result, room = _split(room, whole * LANES, whole * LANES)
        weights, by_product, room = _split(room, places * LANES, places * LANES)
        by_key, by_value, by_query = _split(room, whole * places, whole * places)
        zero, one, factor = broadcast(np.float32(0)), broadcast(np.float32(1)), broadcast(scale)
        for n in range(count):
            start, out_start = n * length * stride, n * length * whole
            for first in range(0, length, LANES):
                in_block = min(LANES, length - first)
                row, out_row = start + first * stride, out_start + first * whole
                take(packed, row, stride, in_block, whole, query)
                take(by_out, out_row, whole, in_block, whole, by_result)
                for column in range(0, whole, width):
                    keys, values = start + whole + column, start + 2 * whole + column
                    share = attend(query[column * LANES :], packed, keys, stride, length, weights)
                    compare(by_result[column * LANES :], packed, values, stride, length, by_product)
                    mean = zero
                    for j in range(length):
                        weight = multiply(load(weights, j * LANES), share)
                        store(weights, j * LANES, weight)
                        mean = multiply_add(weight, load(by_product, j * LANES), mean)
                    for j in range(length):
                        gradient = subtract(load(by_product, j * LANES), mean)
                        store(by_product, j * LANES, multiply(load(weights, j * LANES), gradient))
                    weigh(by_product, packed, keys, stride, length, factor, False, by_query[column * LANES :])
                    for some in range(0, length, LANES):  # keys side by side instead of queries
                        turn(weights, some * LANES, LANES, LANES - 1, tile, 0)
                        turn(by_product, some * LANES, LANES, LANES - 1, other_tile, 0)
                        place, more = some * whole + column * LANES, first > 0
                        weigh(tile, by_out, out_row + column, whole, in_block, one, more, by_value[place:])
                        weigh(other_tile, packed, row + column, stride, in_block, factor, more, by_key[place:])
                put(by_query, by_packed, row, stride, in_block, whole, tile)
            for some in range(0, length, LANES):
                row = start + some * stride + whole
                put(by_key[some * whole :], by_packed, row, stride, length - some, whole, tile)
                put(by_value[some * whole :], by_packed, row + whole, stride, length - some, whole, tile)

    return forward, backward


@kept_njit()
def _split(room, first, second):  # type: ignore[no-untyped-def]
    """Two parts of it and the rest."""
    return room[:first], room[first : first + second], room[first + second :]
