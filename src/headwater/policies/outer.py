"""The transpose of a tall matrix times another, which is the gradient of a layer's weights.

A library turns the first of them around in memory before it multiplies, which takes as long as the product. Here a tile
of the result, four rows of sixty-four numbers, stays in registers while a stretch of rows that fits the processor's
cache goes by.
"""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from headwater.native import kept_njit
from headwater.policies.registers import LANES, broadcast, load, multiply_add, store

_DOWN, _ACROSS = 4, 4 * LANES  # a tile
_STRETCH, _WIDEST = 128, 256


def fits(x: Tensor, y: Tensor) -> bool:
    """Whether `outer` takes float32 matrices `[rows, m]` and `[rows, n]` on a CPU."""
    return x.shape[1] % _DOWN == 0 and x.shape[1] <= _WIDEST and y.shape[1] % _ACROSS == 0


def outer(x: Tensor, y: Tensor) -> Tensor:
    """The transpose of x `[rows, m]` times y `[rows, n]`: `[m, n]`."""
    out = torch.zeros(x.shape[1], y.shape[1])
    flat = (tensor.detach().contiguous().view(-1).numpy() for tensor in (x, y, out))
    _outer(*flat, x.shape[1], y.shape[1])
    return out


@kept_njit()
def _outer(x, y, out, m, n):  # type: ignore[no-untyped-def]
    rows, one = len(x) // m, np.uint64(1)
    for start in range(0, rows, _STRETCH):
        for column in range(0, n, _ACROSS):
            for i in range(0, m, _DOWN):
                place = i * n + column
                a, b = _row(out, place), _row(out, place + n)
                c, d = _row(out, place + 2 * n), _row(out, place + 3 * n)
                for row in range(start, min(start + _STRETCH, rows)):
                    number, numbers = np.uint64(row * m + i), _row(y, row * n + column)
                    a = _weigh(x[number], numbers, a)
                    b = _weigh(x[number + one], numbers, b)
                    c = _weigh(x[number + one + one], numbers, c)
                    d = _weigh(x[number + one + one + one], numbers, d)
                for k, total in enumerate((a, b, c, d)):
                    for part in range(4):
                        store(out, place + k * n + part * LANES, total[part])


@kept_njit()
def _row(numbers, start):  # type: ignore[no-untyped-def]
    """Of a tile, or of what it is made from."""
    first, second = load(numbers, start), load(numbers, start + LANES)
    return first, second, load(numbers, start + 2 * LANES), load(numbers, start + 3 * LANES)


@kept_njit()
def _weigh(number, numbers, total):  # type: ignore[no-untyped-def]
    weight = broadcast(number)
    first, second = multiply_add(weight, numbers[0], total[0]), multiply_add(weight, numbers[1], total[1])
    return first, second, multiply_add(weight, numbers[2], total[2]), multiply_add(weight, numbers[3], total[3])
