"""Neighbour joining (Saitou & Nei 1987) on distances of aligned sequences, for many matrices of distances at once."""

from __future__ import annotations

import math

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from headwater.native import kept_njit
from headwater.phylogeny.pairs import FURTHEST

_UNKNOWN = 15  # any of A, C, G, T


def distances(masks: NDArray[np.uint8], counts: NDArray[np.float64]) -> NDArray[np.float64]:
    """Distances of leaves, corrected for unseen changes (Jukes & Cantor 1969): float64 `[B, n, n]`.

    Of the sites at which both leaves say something, a share has no state in common; without any, they are as far
    apart as is corrected for. masks: uint8 `[n, P]`, sets of
    states. counts: `[B, P]`, how often each pattern occurs in each of B data sets.
    """
    n = len(masks)
    changed, known = np.empty((2, len(counts), n, n))
    for i in range(n):
        changed[:, i] = counts @ ((masks[i] & masks) == 0).T
        known[:, i] = counts @ ((masks[i] != _UNKNOWN) & (masks != _UNKNOWN)).T
    share = np.where(known > 0, np.minimum(changed / np.maximum(known, 1), FURTHEST), FURTHEST)
    away: NDArray[np.float64] = -0.75 * np.log1p(-share * (4 / 3))
    away[:, range(n), range(n)] = 0.0
    return away


def neighbour_joining(away: NDArray[np.float64], shortest: float = 1e-6) -> tuple[Tensor, Tensor]:
    """The tree of each matrix of distances `[T, n, n]`: merges int32 and lengths float32 `[T, n-1, 2]`; lengths below
    `shortest` are set to it.
    """
    count, n, _ = away.shape
    merges, lengths = np.empty((count, n - 1, 2), np.int32), np.zeros((count, n - 1, 2), np.float32)
    _neighbour_joining(np.array(away, np.float64), merges, lengths)
    lengths = np.maximum(lengths, np.float32(shortest))
    lengths[:, -1, 1] = 0.0
    return torch.from_numpy(merges), torch.from_numpy(lengths)


@kept_njit()
def _neighbour_joining(distances, merges, lengths):  # type: ignore[no-untyped-def]
    n = distances.shape[1]
    node, total = np.empty(n, np.int64), np.empty(n)
    for t in range(distances.shape[0]):
        away = distances[t]
        for i in range(n):
            node[i] = i
        for k in range(n - 1):
            size = n - k
            for i in range(size):
                total[i] = 0.0
                for j in range(size):
                    total[i] += away[i, j]
            first, second, best = 0, 1, math.inf
            for i in range(size):
                for j in range(i + 1, size):
                    q = (size - 2) * away[i, j] - total[i] - total[j]
                    if q < best:
                        first, second, best = i, j, q
            merges[t, k, 0], merges[t, k, 1] = node[first], node[second]
            between = away[first, second]
            if size == 2:
                lengths[t, k, 0] = between
                break
            tilt = (total[first] - total[second]) / (size - 2)
            lengths[t, k, 0], lengths[t, k, 1] = (between + tilt) / 2, (between - tilt) / 2
            for i in range(size):
                away[first, i] = away[i, first] = (away[first, i] + away[second, i] - between) / 2
            away[first, first] = 0.0
            node[first] = n + k
            for i in range(second, size - 1):
                node[i] = node[i + 1]
            for i in range(second, size - 1):
                for j in range(size):
                    away[i, j] = away[i + 1, j]
            for i in range(second, size - 1):
                for j in range(size):
                    away[j, i] = away[j, i + 1]
