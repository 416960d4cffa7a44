"""What is known of every pair of trees in a forest before a network has looked at it: how far apart they are, and what
neighbour joining (Saitou & Nei 1987) would make of it.

Two trees are `changes / comparable` apart: the sites at which their Fitch sets are disjoint, of those at which both say
something. That is what merging them would cost in parsimony, and, corrected for unseen changes (Jukes & Cantor 1969),
an estimate of the path between their roots.
"""

from __future__ import annotations

import math
from functools import cache
from typing import NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from headwater.native import kept_njit
from headwater.policies.registers import (
    LANES,
    add,
    broadcast,
    exponent,
    load,
    multiply,
    multiply_add,
    power_of_two,
    power_to_unit,
    reciprocal,
    store,
)

PAIR_FEATURES = 9
FURTHEST = 0.7
"""The largest share of changed sites that is corrected for unseen changes: at 3/4 the correction is infinite."""


@cache
def pair_index(size: int) -> Tensor:
    """Columns i < j of the pairs of a forest of `size` trees, in the order of all arrays here: int64 `[2, pairs]`."""
    return torch.triu_indices(size, size, 1)


def pair_number(i: Tensor, j: Tensor, size: int) -> Tensor:
    """The place of pair i < j, row by row in the upper triangle."""
    return i * (2 * size - i - 1) // 2 + j - i - 1


_LOG_2 = np.float32(math.log(2))
_LOG_SQUARES = tuple(np.float32(2 / k) for k in (9, 7, 5, 3, 1))
_TO_SIXTEENTH, _TO_QUARTER = np.float32(-1 / (16 * math.log(2))), np.float32(-1 / (4 * math.log(2)))


class Apart(NamedTuple):
    """What tells nodes apart: float32 `[T, nodes, nodes]` each, of pairs of nodes.

    changes: sites at which the two share no state. comparable: sites at which both say something, at least 1.
    distance: corrected for unseen changes.
    """

    changes: Tensor
    comparable: Tensor
    distance: Tensor

    def note(
        self, node: int, others: Tensor, changes: NDArray[np.int32], comparable: NDArray[np.int32], alike: float
    ) -> None:
        """Write down what was found of `node` and `others`, int64 `[T, K]`: changes, comparable int32 `[T, K]`, the
        latter without those that are `alike` in all.
        """
        tables = (table.numpy() for table in self)
        _note(*tables, node, others.contiguous().numpy(), changes, comparable, np.float32(alike))


def describe(apart: Apart, roots: Tensor, out: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """Features of all pairs i < j, float32 `[T, pairs, PAIR_FEATURES]`, row by row (into `out` where it is given), and
    guesses at lengths, float32 `[T, k, k]`: at (i, j) the length of the edge above tree i if it merges with tree j; of
    the last two trees, of the edge between them.

    roots: int64 `[T, k]`, the forest's trees.
    """
    count, size = roots.shape
    features = torch.empty(count, size * (size - 1) // 2, PAIR_FEATURES) if out is None else out
    guesses = torch.zeros(count, size, size)
    n = (apart.changes.shape[1] + 1) // 2
    _describe(*(table.numpy() for table in apart), roots.numpy(), n, features.numpy(), guesses.numpy())
    return features, guesses


@kept_njit()
def _note(all_changes, all_comparable, all_distance, node, others, changes, comparable, alike):  # type: ignore[no-untyped-def]
    for t in range(others.shape[0]):
        for k in range(others.shape[1]):
            other, changed, known = others[t, k], np.float32(changes[t, k]), np.float32(comparable[t, k]) + alike
            known = max(known, np.float32(1))
            distance = -0.75 * math.log(1.0 - min(changed / known, FURTHEST) * (4.0 / 3.0))
            all_changes[t, node, other] = all_changes[t, other, node] = changed
            all_comparable[t, node, other] = all_comparable[t, other, node] = known
            all_distance[t, node, other] = all_distance[t, other, node] = distance


@kept_njit()
def _describe(all_changes, all_comparable, all_distance, roots, n, features, guesses):  # type: ignore[no-untyped-def]
    size = roots.shape[1]
    pairs = size * (size - 1) // 2
    room = -(-pairs // LANES) * LANES
    changed, worse, columns = np.zeros(room, np.float32), np.zeros(room, np.float32), np.empty((7, LANES), np.float32)
    flat = columns.reshape(-1)
    away, mean_away = np.empty(room), np.empty(size)
    half, others = 1.0 if size == 2 else 0.5, max(size - 2, 1)
    for t in range(roots.shape[0]):
        sites, mean, fewest, pair = 0.0, 0.0, np.float32(math.inf), 0
        mean_away[:] = 0.0
        for i in range(size):
            changes, comparable, distance = (
                all_changes[t, roots[t, i]],
                all_comparable[t, roots[t, i]],
                all_distance[t, roots[t, i]],
            )
            for j in range(i + 1, size):
                other = roots[t, j]
                changed[pair], away[pair] = changes[other], distance[other]
                fewest = min(fewest, changed[pair])
                sites += comparable[other]
                mean_away[i] += away[pair]
                mean_away[j] += away[pair]
                pair += 1
        for i in range(size):
            mean += mean_away[i]
            mean_away[i] /= others
        sites, mean = sites / pairs, max(mean / (2 * pairs), 1e-6)
        least, floor, pair = math.inf, 0.3 / sites, 0
        for i in range(size):
            for j in range(i + 1, size):
                least = min(least, away[pair] - mean_away[i] - mean_away[j])
                pair += 1
        pair = 0
        for i in range(size):
            for j in range(i + 1, size):
                worse[pair] = (away[pair] - mean_away[i] - mean_away[j] - least) * sites
                changed[pair] -= fewest
                features[t, pair, 0] = away[pair] / mean
                features[t, pair, 8] = size / n
                tilt = mean_away[i] - mean_away[j] if size > 2 else 0.0
                guesses[t, i, j] = max(half * (away[pair] + tilt), floor)
                guesses[t, j, i] = max(half * (away[pair] - tilt), floor)
                pair += 1
        for start in range(0, pairs, LANES):
            x, y = load(worse, start), load(changed, start)
            sixteenth, quarter = (
                power_of_two(multiply(x, broadcast(_TO_SIXTEENTH))),
                power_of_two(multiply(y, broadcast(_TO_QUARTER))),
            )
            store(flat, 0, _log_above(x))
            store(flat, 3 * LANES, sixteenth)
            store(flat, 2 * LANES, _fourth_power(sixteenth))
            store(flat, LANES, _fourth_power(_fourth_power(sixteenth)))
            store(flat, 4 * LANES, _log_above(y))
            store(flat, 5 * LANES, _fourth_power(quarter))
            store(flat, 6 * LANES, quarter)
            for pair in range(start, min(start + LANES, pairs)):
                for column in range(7):
                    features[t, pair, 1 + column] = columns[column, pair - start]


@kept_njit()
def _fourth_power(x):  # type: ignore[no-untyped-def]
    square = multiply(x, x)
    return multiply(square, square)


@kept_njit()
def _log_above(x):  # type: ignore[no-untyped-def]
    """log(1 + x) for x >= 0. With m from 1 to 2 in 1 + x = m 2^e, log m = log sqrt 2 + 2 artanh((m - r) / (m + r)),
    r = sqrt 2."""
    y, root = add(x, broadcast(np.float32(1))), np.float32(math.sqrt(2))
    unit = multiply(y, power_to_unit(y))
    ratio = multiply(add(unit, broadcast(-root)), reciprocal(add(unit, broadcast(root))))
    square = multiply(ratio, ratio)
    series = broadcast(_LOG_SQUARES[0])
    for k in range(1, 5):
        series = multiply_add(series, square, broadcast(_LOG_SQUARES[k]))
    whole = add(exponent(y), broadcast(np.float32(0.5)))
    return multiply_add(whole, broadcast(_LOG_2), multiply(series, ratio))
