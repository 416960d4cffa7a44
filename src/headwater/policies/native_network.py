"""A multilayer perceptron over tokens, run for one state at a time inside a native rollout.

A step of a small batch is all overhead when PyTorch runs it: here the layers follow one another in one call, and a
hidden unit that ReLU has set to zero, about every second one, costs nothing in the layer above.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
import torch
from numba import njit
from torch import Tensor

from headwater.policies.layers import Linear
from headwater.policies.networks import MLP

_LARGEST = 512
"""Units of a layer: the weights of wider ones do not stay in a processor's cache, where a product of matrices reads
them once for all rows.
"""


class NativeNetwork(NamedTuple):
    """Weights, inputs before outputs but in the heads, and what each trajectory's condition adds to the first layer.

    offsets int32 `[length]`, table `[inputs, width]`, bias `[width]`, hidden `[layers - 1, width, width]`, hidden_bias
    `[layers - 1, width]`, heads `[outputs, width]`, heads_bias `[outputs]`, condition `[T, width]` or `[0, width]`; all
    float32 but the offsets. room: `[2, width]`, for two layers of one state.
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
    # What PyTorch allocates is aligned to whole cache lines, which makes the loops below half as long again as fast.
    room = torch.empty(2, len(torso.bias))
    arrays = [tensor.detach().contiguous().numpy() for tensor in [*tensors, added, room]]
    return NativeNetwork(torso.offsets.numpy(), *arrays)


@njit(nogil=True, fastmath=True)
def logits_of_row(network, tokens, trajectory, first, out):  # type: ignore[no-untyped-def]
    """Outputs `first .. first + out.size` for one state's tokens into `out`."""
    offsets, table, bias, hidden, hidden_bias, heads, heads_bias, condition, room = network
    width = bias.size
    x, y, active = room[0], room[1], np.empty(width + 1, np.int64)
    for k in range(width):
        x[k] = bias[k]
    if condition.shape[0]:
        for k in range(width):
            x[k] += condition[trajectory, k]
    for place in range(tokens.size):
        row = tokens[place] + offsets[place]
        for k in range(width):
            x[k] += table[row, k]
    for layer in range(hidden.shape[0]):
        for k in range(width):
            y[k] = hidden_bias[layer, k]
        count = _positive(x, active)
        done = count - count % 4
        for i in range(0, done, 4):  # four at a time: y is read and written once for them all
            a, b, c, d = active[i], active[i + 1], active[i + 2], active[i + 3]
            xa, xb, xc, xd = x[a], x[b], x[c], x[d]
            for k in range(width):
                y[k] += (
                    xa * hidden[layer, a, k]
                    + xb * hidden[layer, b, k]
                    + xc * hidden[layer, c, k]
                    + xd * hidden[layer, d, k]
                )
        for i in range(done, count):
            a = active[i]
            xa = x[a]
            for k in range(width):
                y[k] += xa * hidden[layer, a, k]
        x, y = y, x
    for k in range(out.size):
        total = heads_bias[first + k]
        for unit in range(width):
            total += max(x[unit], np.float32(0)) * heads[first + k, unit]
        out[k] = total


@njit(nogil=True)
def _positive(x, active):  # type: ignore[no-untyped-def]
    """Write the places of the positive entries to the front of `active`; returns how many there are."""
    count = 0
    for k in range(x.size):
        active[count] = k
        count += x[k] > 0
    return count
