"""The score of every pair of trees in many forests, in one native call forwards and one backwards.

out . relu(tree_i + tree_j + features_ij W): nothing of the network's width is kept for a pair, which in PyTorch's
operations takes longer than all else that a forest needs. Those are the reference that tests compare with.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from headwater.native import kept_njit
from headwater.phylogeny.pairs import PAIR_FEATURES
from headwater.policies.registers import (
    LANES,
    add,
    broadcast,
    load,
    maximum,
    multiply,
    multiply_add,
    store,
    where_positive,
)


def pair_scores(
    trees: Tensor, features: Tensor, of_pair: Tensor, out: Tensor, blocks: Sequence[tuple[int, int]]
) -> Tensor:
    """trees: `[rows, width]`, those of all forests end to end, in blocks (M, k) of M forests of k trees; rows after
    these are not looked at. features: `[pairs, PAIR_FEATURES]`, of pairs i < j row by row, forest by forest. of_pair:
    `[PAIR_FEATURES, width]`. out: `[width]`. Returns logits `[pairs]`.
    """
    tensors = trees, features, of_pair, out
    if all(x.device.type == "cpu" and x.dtype == torch.float32 for x in tensors) and len(out) % LANES == 0:
        return _PairScores.apply(*tensors, np.array(blocks))  # type: ignore[no-untyped-call]
    return plain_pair_scores(*tensors, blocks)


def plain_pair_scores(
    trees: Tensor, features: Tensor, of_pair: Tensor, out: Tensor, blocks: Sequence[tuple[int, int]]
) -> Tensor:
    """The same in PyTorch's operations."""
    sizes = [count * size for count, size in blocks]
    parts = torch.split(trees[: sum(sizes)], sizes)
    known = torch.split(features, [count * size * (size - 1) // 2 for count, size in blocks])
    logits = []
    for part, of_pairs, (count, size) in zip(parts, known, blocks, strict=True):
        i, j = torch.triu_indices(size, size, 1)
        forests = part.view(count, size, -1)
        pairs = (forests[:, i] + forests[:, j]).flatten(0, 1)
        logits.append((pairs + of_pairs @ of_pair).relu() @ out)
    return torch.cat(logits)


class _PairScores(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, trees: Tensor, features: Tensor, of_pair: Tensor, out: Tensor, blocks: np.ndarray) -> Tensor:
        tensors = [tensor.detach().contiguous() for tensor in (trees, features, of_pair, out)]
        ctx.save_for_backward(*tensors)
        ctx.blocks = blocks
        logits = trees.new_empty(len(features))
        _forward(*(tensor.numpy() for tensor in tensors), blocks, logits.numpy())
        return logits

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        tensors = ctx.saved_tensors
        by_logits = gradients[0].detach().contiguous()
        found = [torch.zeros_like(tensor) for tensor in (tensors[0], tensors[2], tensors[3])]
        flat = [tensor.view(-1).numpy() for tensor in (*tensors, by_logits, *found)]
        _backward(*flat, ctx.blocks, len(tensors[3]))
        return found[0], None, *found[1:], None


@kept_njit(fastmath=True)
def _forward(trees, features, of_pair, out, blocks, logits):  # type: ignore[no-untyped-def]
    row, pair = 0, 0
    for block in range(len(blocks)):
        size = blocks[block, 1]
        for _ in range(blocks[block, 0]):
            for i in range(row, row + size):
                for j in range(i + 1, row + size):
                    total = np.float32(0)
                    for k in range(len(out)):
                        hidden = trees[i, k] + trees[j, k]
                        for f in range(PAIR_FEATURES):
                            hidden += features[pair, f] * of_pair[f, k]
                        total += max(hidden, np.float32(0)) * out[k]
                    logits[pair] = total
                    pair += 1
            row += size


@kept_njit()
def _backward(trees, features, of_pair, out, by_logits, by_trees, by_of_pair, by_out, blocks, width):  # type: ignore[no-untyped-def]
    """All arrays are flat. What a pair hides is computed again, LANES numbers at a time."""
    zero = broadcast(np.float32(0))
    row, pair = 0, 0
    for block in range(len(blocks)):
        size = blocks[block, 1]
        for _ in range(blocks[block, 0]):
            for i in range(row, row + size):
                for k in range(0, width, LANES):
                    of_i, by_i = load(trees, i * width + k), zero
                    weight, by_weight = load(out, k), load(by_out, k)
                    for j in range(i + 1, row + size):
                        start = (pair + j - i - 1) * PAIR_FEATURES
                        hidden = add(of_i, load(trees, j * width + k))
                        for f in range(PAIR_FEATURES):
                            known_f = broadcast(features[np.uint64(start + f)])
                            hidden = multiply_add(known_f, load(of_pair, f * width + k), hidden)
                        gradient = broadcast(by_logits[np.uint64(pair + j - i - 1)])
                        by_weight = multiply_add(gradient, maximum(hidden, zero), by_weight)
                        gradient = where_positive(hidden, multiply(gradient, weight))
                        by_i = add(by_i, gradient)
                        store(by_trees, j * width + k, add(load(by_trees, j * width + k), gradient))
                        for f in range(PAIR_FEATURES):
                            known_f, place = broadcast(features[np.uint64(start + f)]), f * width + k
                            store(by_of_pair, place, multiply_add(known_f, gradient, load(by_of_pair, place)))
                    store(by_trees, i * width + k, add(load(by_trees, i * width + k), by_i))
                    store(by_out, k, by_weight)
                pair += row + size - i - 1
            row += size
