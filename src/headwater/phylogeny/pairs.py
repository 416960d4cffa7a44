"""What is known of every pair of trees in a forest before a network has looked at it: how far apart they are, and what
neighbour joining (Saitou & Nei 1987) would make of it.

Two trees are `changes / comparable` apart: the sites at which their Fitch sets are disjoint, of those at which both say
something. That is what merging them would cost in parsimony, and, corrected for unseen changes (Jukes & Cantor 1969),
an estimate of the path between their roots.
"""

from __future__ import annotations

import math

import numpy as np
import torch
from torch import Tensor

from headwater.native import kept_njit

PAIR_FEATURES = 9
FURTHEST = 0.7
"""The largest share of changed sites that is corrected for unseen changes: at 3/4 the correction is infinite."""


def pair_index(size: int) -> tuple[Tensor, Tensor]:
    """Columns i < j of the pairs of a forest of `size` trees, in the order of all arrays here: int64 `[pairs]` each."""
    i, j = torch.triu_indices(size, size, 1)
    return i, j


def describe(changes: Tensor, comparable: Tensor, roots: Tensor) -> tuple[Tensor, Tensor]:
    """Features of all pairs, float32 `[T, pairs, PAIR_FEATURES]`, and guesses at lengths, float32 `[T, k, k]`: at
    (i, j) of the edge above tree i if it merges with tree j; of the last two trees, of the edge between them.

    changes, comparable: float32 `[T, nodes, nodes]`, of pairs of nodes. roots: int64 `[T, k]`, the forest's trees.
    """
    count, size = roots.shape
    features = np.empty((count, size * (size - 1) // 2, PAIR_FEATURES), np.float32)
    guesses = np.zeros((count, size, size), np.float32)
    if len(features):
        _describe(changes.numpy(), comparable.numpy(), roots.numpy(), (changes.shape[1] + 1) // 2, features, guesses)
    return torch.from_numpy(features), torch.from_numpy(guesses)


@kept_njit()
def _describe(changes, comparable, roots, n, features, guesses):  # type: ignore[no-untyped-def]
    size = roots.shape[1]
    away, total = np.zeros((size, size)), np.empty(size)
    for t in range(roots.shape[0]):
        sites, pairs, mean, fewest = 0.0, size * (size - 1) // 2, 0.0, math.inf
        for i in range(size):
            for j in range(i + 1, size):
                changed = changes[t, roots[t, i], roots[t, j]]
                known = max(comparable[t, roots[t, i], roots[t, j]], 1.0)
                share = min(changed / known, FURTHEST)
                away[i, j] = away[j, i] = -0.75 * math.log(1.0 - share * (4.0 / 3.0))
                sites += known
                mean += away[i, j]
                fewest = min(fewest, changed)
        sites, mean = sites / pairs, max(mean / pairs, 1e-6)
        others = max(size - 2, 1)
        for i in range(size):
            total[i] = 0.0
            for j in range(size):
                if j != i:
                    total[i] += away[i, j]
        least = math.inf
        for i in range(size):
            for j in range(i + 1, size):
                least = min(least, away[i, j] - (total[i] + total[j]) / others)
        pair, floor = 0, 0.3 / sites
        for i in range(size):
            for j in range(i + 1, size):
                changed = changes[t, roots[t, i], roots[t, j]] - fewest
                worse = (away[i, j] - (total[i] + total[j]) / others - least) * sites
                out = features[t, pair]
                out[0] = away[i, j] / mean
                out[1] = math.log1p(worse)
                out[2] = math.exp(-worse)
                out[3] = math.exp(-worse / 4)
                out[4] = math.exp(-worse / 16)
                out[5] = math.log1p(changed)
                out[6] = math.exp(-changed)
                out[7] = math.exp(-changed / 4)
                out[8] = size / n
                pair += 1
                tilt = (total[i] - total[j]) / others if size > 2 else 0.0
                half = 1.0 if size == 2 else 0.5
                guesses[t, i, j] = max(half * (away[i, j] + tilt), floor)
                guesses[t, j, i] = max(half * (away[i, j] - tilt), floor)
