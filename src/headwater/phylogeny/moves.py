"""Local moves on trees: a branch made longer or shorter, a nearest-neighbour interchange, a subtree pruned and
regrafted.

A move is proposed with its Hastings ratio, so that chains of accepted moves leave any R(x) / Z invariant (Lakner et al.
2008, "Efficiency of Markov chain Monte Carlo tree proposals").
"""

from __future__ import annotations

import math

import numpy as np
import torch
from torch import Tensor

from headwater.native import kept_njit
from headwater.phylogeny.walks import rooted_table

UNIFORMS = 6
"""Uniform numbers that one move takes."""

_STRETCH, _STRETCH_INTERCHANGED = 1.6, 0.8  # of the range in log length


def propose(tables: Tensor, above: Tensor | None, uniform: Tensor) -> tuple[Tensor, Tensor | None, Tensor]:
    """One move from each tree (`walks.tables_of`): the trees it leads to, and float64 `[T]`, the logarithm of the
    density of the way back over that of the way there.

    above: lengths float32 `[T, 2n-1]`; None for trees without, whose branches are not stretched. uniform: float64
    `[T, UNIFORMS]` in [0, 1).
    """
    count, n = len(tables), tables.shape[1] // 2 + 1
    has_lengths = above is not None
    old = above if above is not None else torch.zeros(count, 2 * n - 1)
    after, lengths = np.empty(tables.shape, np.int32), np.zeros((count, 2 * n - 1), np.float32)
    ratio = np.zeros(count)
    _propose(tables.int().numpy(), old.numpy(), uniform.numpy(), has_lengths, after, lengths, ratio)
    return torch.from_numpy(after), torch.from_numpy(lengths) if has_lengths else None, torch.from_numpy(ratio)


@kept_njit()
def _propose(tables, above, uniform, has_lengths, after, lengths, ratio):  # type: ignore[no-untyped-def]
    n = tables.shape[1] // 2 + 1
    first, second = np.empty(n - 1, np.int32), np.empty(n - 1, np.int32)
    length, parent = np.empty(2 * n - 1), np.empty(2 * n - 1, np.int32)
    candidates = np.empty(2 * n - 1, np.int32)
    for t in range(tables.shape[0]):
        top = tables[t, 1]  # below the root, beside leaf 0
        kind = uniform[t, 0]
        if has_lengths and kind < 0.5:
            after[t], lengths[t] = tables[t], above[t]
            edge = int(uniform[t, 1] * (2 * n - 3))  # above leaf 0, or the nodes but the root and the one below it
            node = 0
            for v in range(2 * n - 1):
                if v != n and v != top:
                    if edge == 0:
                        node = v
                    edge -= 1
            factor = math.exp(2 * _STRETCH * (uniform[t, 2] - 0.5))
            lengths[t, node] = max(np.float32(above[t, node] * factor), np.float32(1e-30))
            ratio[t] = math.log(factor)
            continue
        for b in range(1, n):
            first[b - 1], second[b - 1] = tables[t, 2 * (b - 1)], tables[t, 2 * (b - 1) + 1]
            parent[first[b - 1]] = parent[second[b - 1]] = n - 1 + b
        for v in range(2 * n - 1):
            length[v] = above[t, v]
        parent[n] = parent[0] = -1
        length[top] = 0.0
        # the edge between leaf 0 and the rest is kept above leaf 0
        count = 0
        if kind < 0.85:  # interchange across an inner edge
            for v in range(n + 1, 2 * n - 1):
                if v != top:
                    candidates[count] = v
                    count += 1
            if count == 0:
                after[t], lengths[t] = tables[t], above[t]
                ratio[t] = -math.inf
                continue
            node = candidates[min(int(uniform[t, 1] * count), count - 1)]
            up = parent[node] - n
            low = node - n
            aside = second[up] if first[up] == node else first[up]
            if uniform[t, 2] < 0.5:
                child = first[low]
                first[low] = aside
            else:
                child = second[low]
                second[low] = aside
            if first[up] == node:
                second[up] = child
            else:
                first[up] = child
            factor = math.exp(2 * _STRETCH_INTERCHANGED * (uniform[t, 3] - 0.5))
            if has_lengths:
                length[node] *= factor
                ratio[t] = math.log(factor)
        else:  # prune the subtree of a node and graft it onto any edge of what is left
            for v in range(1, 2 * n - 1):
                if v != n and v != top:
                    candidates[count] = v
                    count += 1
            node = candidates[min(int(uniform[t, 1] * count), count - 1)]
            joint = parent[node]
            aside = second[joint - n] if first[joint - n] == node else first[joint - n]
            above_joint = parent[joint]  # the root, where joint is the top node
            if first[above_joint - n] == joint:
                first[above_joint - n] = aside
            else:
                second[above_joint - n] = aside
            # joint == top: what is left hangs beside leaf 0, by one edge that is kept above leaf 0
            healed = length[aside] + (length[0] if joint == top else length[joint])
            if joint == top:
                length[0], length[aside] = healed, 0.0
            else:
                length[aside] = healed
            parent[aside] = above_joint
            new_top = aside if joint == top else top
            count = 0
            for v in range(2 * n - 1):
                if v == n or v == new_top or v == joint:  # noqa: SIM109 (numba's tuples are of one type)
                    continue
                inside = v  # not under the pruned node
                while inside >= 0 and inside != node:
                    inside = parent[inside]
                if inside < 0:
                    candidates[count] = v
                    count += 1
            edge = candidates[min(int(uniform[t, 2] * count), count - 1)]
            share = uniform[t, 3]
            whole = length[edge]
            if edge == 0:
                first[joint - n], second[joint - n] = node, new_top
                if first[0] == new_top:
                    first[0] = joint
                else:
                    second[0] = joint
                length[0], length[new_top], length[joint] = whole * share, whole * (1 - share), 0.0
            else:
                upper = parent[edge]
                if first[upper - n] == edge:
                    first[upper - n] = joint
                else:
                    second[upper - n] = joint
                first[joint - n], second[joint - n] = node, edge
                length[edge], length[joint] = whole * share, whole * (1 - share)
            if has_lengths:
                factor = math.exp(2 * _STRETCH_INTERCHANGED * (uniform[t, 4] - 0.5))
                length[node] *= factor
                ratio[t] = math.log(factor) + math.log(max(whole, 1e-30)) - math.log(max(healed, 1e-30))
        rooted_table(first, second, length, n, first[0], second[0], after[t], lengths[t])
