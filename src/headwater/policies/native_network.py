"""A multilayer perceptron over tokens, run for a few states at a time inside a native rollout.

A step of a small batch is all overhead when PyTorch runs it: here the layers follow one another in one call, a hidden
unit that ReLU has set to zero, about every second one, costs nothing in the layer above, and of states that are the
same only the first is run. What the layers gave can be kept, so that learning starts from it.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from headwater.native import kept_njit
from headwater.policies.layers import Linear, is_on_cpu
from headwater.policies.networks import MLP
from headwater.policies.registers import LANES, SUMS, adding, positive

_BLOCK = 32
_add_to_most, _add_to_four = adding(SUMS), adding(4)
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
    float32 but the offsets.
    """

    offsets: np.ndarray
    table: np.ndarray
    bias: np.ndarray
    hidden: np.ndarray
    hidden_bias: np.ndarray
    heads: np.ndarray
    heads_bias: np.ndarray
    condition: np.ndarray

    @property
    def units(self) -> int:
        """Of all hidden layers together."""
        return (len(self.hidden) + 1) * len(self.bias)

    def room(self, rows: int) -> Tensor:
        """For what the hidden layers give in so many rows, `[layers, rows, width]`."""
        return torch.empty(len(self.hidden) + 1, rows, len(self.bias))  # aligned to cache lines, as numpy's is not


def native_network(torso: object, heads: Linear, condition: Tensor | None) -> NativeNetwork | None:
    """Views of the weights of `torso` and `heads`; None where they are no MLP over tokens on the CPU, or a large one.

    condition: what each trajectory's condition adds to the first layer, `[T, width]`.
    """
    if not isinstance(torso, MLP) or not torso.is_tokens or torso.bias.shape[0] > _LARGEST:
        return None
    added = torso.bias.new_empty(0, len(torso.bias)) if condition is None else condition
    tensors = [torso.table, torso.bias, torso.hidden, torso.hidden_bias, heads.weight.t(), heads.bias, added]
    if not is_on_cpu(*tensors):
        return None
    return NativeNetwork(torso.offsets.numpy(), *[tensor.detach().contiguous().numpy() for tensor in tensors])


@kept_njit()
def fingerprint(network, states, lengths):  # type: ignore[no-untyped-def]
    """64 bits of all that the hidden layers' results depend on for the packed steps of trajectories."""
    _, table, bias, hidden, hidden_bias, _, _, condition = network
    value = _hash(lengths.view(np.int32), _hash(states.ravel(), np.uint64(0)))
    for weights in (table.ravel(), bias, hidden.ravel(), hidden_bias.ravel(), condition.ravel()):
        value = _hash(weights.view(np.int32), value)
    return np.int64(value)


@kept_njit()
def _hash(numbers, value):  # type: ignore[no-untyped-def]
    """NH of UMAC (Black et al. 1999), keys from a counter: sums of products, which a processor does side by side."""
    factor, low = np.uint64(0x9E3779B97F4A7C15), np.uint64(0xFFFFFFFF)
    pairs = numbers[: numbers.size - numbers.size % 2].view(np.uint64)
    total = np.uint64(numbers[-1]) if numbers.size % 2 else np.uint64(0)
    for i in range(pairs.size):
        x = pairs[i] + np.uint64(i + 1) * factor
        total += (x & low) * (x >> np.uint64(32))
    return ((value ^ (value >> np.uint64(29))) * factor + total) * factor


@kept_njit()
def hidden_of_rows(network, states, ids, live, first, layers, rows):  # type: ignore[no-untyped-def]
    """Run the hidden layers on the first `live` states' tokens, into the rows of `layers` from `first` on; `ids` are
    the trajectories'. Writes the row of each state into `rows`; returns the first row that is left free.
    """
    offsets, table, bias, hidden, hidden_bias, _, _, condition = network
    width, free = bias.size, first
    for i in range(live):
        rows[i] = free
        if condition.shape[0] == 0:
            rows[i] = _row_of_same(states, i, rows)
        if rows[i] < free:
            continue
        x = layers[0, free]
        for k in range(width):
            x[k] = bias[k]
        if condition.shape[0]:
            for k in range(width):
                x[k] += condition[ids[i], k]
        for place in range(offsets.size):
            row = states[i, place] + offsets[place]
            for k in range(width):
                x[k] += table[row, k]
        free += 1
    count = free - first
    blocks = (width + _BLOCK - 1) // _BLOCK
    active, passed = np.empty((count, width + LANES), np.int32), np.empty((count, blocks + 1), np.int64)
    for layer in range(hidden.shape[0]):
        weight, below, above = hidden[layer].ravel(), layers[layer, first:free], layers[layer + 1, first:free]
        for i in range(count):
            _positive(below[i], active[i], passed[i])
            for k in range(width):
                above[i, k] = hidden_bias[layer, k]
        for column in range(0, width, SUMS * LANES):
            for block in range(blocks):  # weights that all rows use before they leave the cache
                for i in range(count):
                    start, stop = passed[i, block], passed[i, block + 1]
                    if column + SUMS * LANES <= width:
                        _add_to_most(weight, width, column, active[i], start, stop, below[i], above[i], column)
                    else:
                        _add_rows(weight, column, active[i], start, stop, below[i], above[i])
    for row in range(first, free):
        for k in range(width):
            layers[hidden.shape[0], row, k] = _relu(layers[hidden.shape[0], row, k])
    return free


@kept_njit()
def _relu(x):  # type: ignore[no-untyped-def]
    """What is not a number stays so, for the loss to show it."""
    return np.float32(0) if x <= 0 else x


@kept_njit()
def _row_of_same(states, i, rows):  # type: ignore[no-untyped-def]
    """The row of the first state before the i-th that is the same, or the i-th's own."""
    for j in range(i):
        same = True
        for place in range(states.shape[1]):
            if states[i, place] != states[j, place]:
                same = False
                break
        if same:
            return rows[j]
    return rows[i]


@kept_njit(fastmath=True)
def outputs_of_rows(network, layers, rows, live, first, out):  # type: ignore[no-untyped-def]
    """Outputs `first .. first + out.shape[1]` for the first `live` of `rows` into `out`."""
    heads, heads_bias = network.heads, network.heads_bias
    for i in range(live):
        x = layers[-1, rows[i]]
        for k in range(out.shape[1]):
            total = heads_bias[first + k]
            for unit in range(x.size):
                total += x[unit] * heads[first + k, unit]
            out[i, k] = total


@kept_njit()
def _add_rows(weight, column, chosen, start, stop, x, y):  # type: ignore[no-untyped-def]
    """What `_add_to_most` does, for the columns from `column` on."""
    while column + 4 * LANES <= y.size:
        _add_to_four(weight, y.size, column, chosen, start, stop, x, y, column)
        column += 4 * LANES
    for i in range(start, stop):
        for k in range(column, y.size):
            y[k] += x[chosen[i]] * weight[chosen[i] * y.size + k]


@kept_njit()
def _positive(x, active, passed):  # type: ignore[no-untyped-def]
    """ReLU in place; the places of the positive entries go to the front of `active`, and into `passed` how many there
    are before each block.
    """
    count, whole = 0, x.size - x.size % LANES
    for k in range(0, whole, LANES):
        if k % _BLOCK == 0:
            passed[k // _BLOCK] = count
        count += positive(x, k, active, count)
    for k in range(whole, x.size):
        if k % _BLOCK == 0:
            passed[k // _BLOCK] = count
        active[count] = k
        x[k] = _relu(x[k])
        count += x[k] != 0
    passed[passed.size - 1] = count
