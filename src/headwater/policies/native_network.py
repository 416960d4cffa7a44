"""A multilayer perceptron over tokens, run for a few states at a time inside a native rollout.

A step of a small batch is all overhead when PyTorch runs it: here the layers follow one another in one call, and a
hidden unit that ReLU has set to zero, about every second one, costs nothing in the layer above.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from headwater.native import kept_njit
from headwater.policies.layers import Linear
from headwater.policies.networks import MLP
from headwater.policies.registers import LANES, broadcast, load, multiply_add, store

_AT_ONCE = 8 * LANES
_BLOCK = 32
MOST_ROWS = 48
"""States that are run at once: for more, a product of matrices is faster."""
_LARGEST = 512
"""Units of a layer: the weights of wider ones do not stay in a processor's cache, where a product of matrices reads
them once for all rows.
"""


class NativeNetwork(NamedTuple):
    """The weights, inputs before outputs but in the heads, and what a trajectory's condition adds to the first layer.

    offsets int32 `[length]`, table `[inputs, width]`, bias `[width]`, hidden `[layers - 1, width, width]`, hidden_bias
    `[layers - 1, width]`, heads `[outputs, width]`, heads_bias `[outputs]`, condition `[T, width]` or `[0, width]`; all
    float32 but the offsets. room: `[2, MOST_ROWS, width]`, for two layers.
    """

    offsets: np.ndarray
    table: np.ndarray
    bias: np.ndarray
    hidden: np.ndarray
    hidden_bias: np.ndarray
    heads: np.ndarray
    heads_bias: np.ndarray
    condition: np.ndarray
    room: np.ndarray


def native_network(torso: object, heads: Linear, condition: Tensor | None) -> NativeNetwork | None:
    """Views of the weights of `torso` and `heads`; None where they are no MLP over tokens on the CPU, or a large one.

    condition: what each trajectory's condition adds to the first layer, `[T, width]`.
    """
    if not isinstance(torso, MLP) or not torso.is_tokens or torso.bias.shape[0] > _LARGEST:
        return None
    tensors = [torso.table, torso.bias, torso.hidden, torso.hidden_bias, heads.weight.t(), heads.bias]
    added = torso.bias.new_empty(0, len(torso.bias)) if condition is None else condition
    if any(tensor.device.type != "cpu" or str(tensor.dtype) != "torch.float32" for tensor in [*tensors, added]):
        return None
    # What PyTorch allocates is aligned to whole cache lines, and the loops below are slower on arrays that are not.
    room = torch.empty(2, MOST_ROWS, len(torso.bias))
    arrays = [tensor.detach().contiguous().numpy() for tensor in [*tensors, added, room]]
    return NativeNetwork(torso.offsets.numpy(), *arrays)


@kept_njit(fastmath=True)
def logits_of_rows(network, states, ids, live, first, out):  # type: ignore[no-untyped-def]
    """Outputs `first .. first + out.shape[1]` for the first `live` states' tokens into `out`; `ids` are the
    trajectories'.
    """
    offsets, table, bias, hidden, hidden_bias, heads, heads_bias, condition, room = network
    width = bias.size
    x, y = room[0], room[1]
    active, passed = np.empty((live, width + 1), np.int64), np.empty((live, 2), np.int64)
    for i in range(live):
        for k in range(width):
            x[i, k] = bias[k]
        if condition.shape[0]:
            for k in range(width):
                x[i, k] += condition[ids[i], k]
        for place in range(offsets.size):
            row = states[i, place] + offsets[place]
            for k in range(width):
                x[i, k] += table[row, k]
    for layer in range(hidden.shape[0]):
        weight = hidden[layer].ravel()
        for i in range(live):
            passed[i, 0], passed[i, 1] = 0, _positive(x[i], active[i])
            for k in range(width):
                y[i, k] = hidden_bias[layer, k]
        for end in range(_BLOCK, width + _BLOCK, _BLOCK):  # weights that all rows use before they leave the cache
            for i in range(live):
                start = stop = passed[i, 0]
                while stop < passed[i, 1] and active[i, stop] < end:
                    stop += 1
                passed[i, 0] = stop
                _add_rows(weight, x[i], active[i, start:stop], y[i])
        x, y = y, x
    for i in range(live):
        for k in range(out.shape[1]):
            total = heads_bias[first + k]
            for unit in range(width):
                total += max(x[i, unit], np.float32(0)) * heads[first + k, unit]
            out[i, k] = total


@kept_njit()
def _add_rows(weight, x, chosen, y):  # type: ignore[no-untyped-def]
    """Add the chosen rows of `weight` (flat), each times its entry of `x`, to y: 128 sums stay in registers while the
    rows go by.
    """
    width = y.size
    whole = width - width % _AT_ONCE
    for k in range(0, whole, _AT_ONCE):
        y0, y1, y2, y3 = load(y, k), load(y, k + 16), load(y, k + 32), load(y, k + 48)
        y4, y5, y6, y7 = load(y, k + 64), load(y, k + 80), load(y, k + 96), load(y, k + 112)
        for i in range(chosen.size):
            value, row = broadcast(x[chosen[i]]), chosen[i] * width + k
            y0 = multiply_add(load(weight, row), value, y0)
            y1 = multiply_add(load(weight, row + 16), value, y1)
            y2 = multiply_add(load(weight, row + 32), value, y2)
            y3 = multiply_add(load(weight, row + 48), value, y3)
            y4 = multiply_add(load(weight, row + 64), value, y4)
            y5 = multiply_add(load(weight, row + 80), value, y5)
            y6 = multiply_add(load(weight, row + 96), value, y6)
            y7 = multiply_add(load(weight, row + 112), value, y7)
        store(y, k, y0)
        store(y, k + 16, y1)
        store(y, k + 32, y2)
        store(y, k + 48, y3)
        store(y, k + 64, y4)
        store(y, k + 80, y5)
        store(y, k + 96, y6)
        store(y, k + 112, y7)
    if whole < width:
        for i in range(chosen.size):
            value, row = x[chosen[i]], chosen[i] * width
            for k in range(whole, width):
                y[k] += value * weight[row + k]


@kept_njit()
def _positive(x, active):  # type: ignore[no-untyped-def]
    """Write the places of the positive entries to the front of `active`; returns how many there are."""
    count = 0
    for k in range(x.size):
        active[count] = k
        count += x[k] > 0
    return count
