"""How far samples are from a distribution: Wasserstein distances, maximum mean discrepancy, shares of modes and so on.

None of them is 0 for a perfect sampler, so each stands beside its floor: what as many exact draws show.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from headwater.native import kept_njit

Measure = Callable[[Tensor, Tensor], float]
"""From two sets of points `[N, *shape]`."""

Draw = Callable[[int], Tensor]
"""So many exact draws, new ones at each call: `[N, *shape]`."""

MOST_ASSIGNED = 4000
"""Points in each set that the exact Wasserstein distance takes: the time grows with their third power."""


class Beside(NamedTuple):
    """value: the mean over several sets of exact draws. floor: the mean between two sets of exact draws, and
    floor_deviation how much it varies from pair to pair."""

    value: float
    floor: float
    floor_deviation: float


def beside_floor(measure: Measure, points: Tensor, exact: Draw, repeats: int = 5) -> Beside:
    """A measure of `points` `[N, *shape]` against `repeats` sets of N exact draws, and of as many pairs of such."""
    if repeats < 2:
        raise ValueError(f"repeats = {repeats}: must be at least 2")
    values = [measure(points, exact(len(points))) for _ in range(repeats)]
    floors = torch.tensor([measure(exact(len(points)), exact(len(points))) for _ in range(repeats)])
    return Beside(sum(values) / repeats, float(floors.mean()), float(floors.std()))


def sliced_wasserstein(points: Tensor, others: Tensor, directions: Tensor, largest: bool = False) -> float:
    """The 2-Wasserstein distance of sets of N points `[N, *shape]`, each seen along the unit vectors `directions`
    `[P, d]`: the root of the mean of their squares, or the largest (max-sliced).

    Bonneel et al. 2015 (J. Math. Imaging Vis. 51, 22-45); Deshpande et al. 2019, arXiv 1904.05877.
    """
    first, second = _pair(points, others)
    along = directions.double().mT
    if along.shape[0] != first.shape[1]:
        raise ValueError(f"directions have {along.shape[0]} numbers each, the points {first.shape[1]}")
    # a part of the directions at a time: all of them at once would be N x P numbers, twice
    parts = [
        ((first @ part).sort(0).values - (second @ part).sort(0).values).square().mean(0)
        for part in torch.split(along, 64, 1)
    ]
    squares = torch.cat(parts)
    return math.sqrt(float(squares.max() if largest else squares.mean()))


def random_directions(count: int, dimensions: int, generator: torch.Generator) -> Tensor:
    """Unit vectors, evenly spread: float64 `[count, dimensions]`."""
    drawn = torch.randn(count, dimensions, generator=generator, dtype=torch.float64)
    return drawn / drawn.norm(dim=1, keepdim=True)


def wasserstein(points: Tensor, others: Tensor) -> float:
    """The exact 2-Wasserstein distance of two sets of N points `[N, *shape]`, by the best assignment."""
    first, second = _pair(points, others)
    if len(first) > MOST_ASSIGNED:
        raise ValueError(f"{len(first)} points: the best assignment is found of at most {MOST_ASSIGNED}")
    cost = torch.cdist(first, second, compute_mode="donot_use_mm_for_euclid_dist").square().cpu().numpy()
    chosen = _assign(cost)
    return math.sqrt(float(cost[np.arange(len(cost)), chosen].mean()))


def mean_discrepancy(points: Tensor, others: Tensor, scales: tuple[float, ...] = (0.25, 0.5, 1.0, 2.0, 4.0)) -> float:
    """Squared maximum mean discrepancy, without bias (it may be below 0), of sets `[N, *shape]` and `[M, *shape]`: with
    the mean of Gaussian kernels of widths `scales` times the median distance among `others`.

    Gretton et al. 2012 (JMLR 13, 723-773), lemma 6.
    """
    first, second = points.flatten(1).double(), others.flatten(1).double()
    if min(len(first), len(second)) < 2 or first.shape[1] != second.shape[1]:
        raise ValueError(f"points {tuple(points.shape)} and {tuple(others.shape)}: two of each or more, of one shape")
    within = torch.cdist(second, second)
    apart = ~torch.eye(len(second), dtype=torch.bool, device=within.device)
    median = float(within[apart].median())
    widths = [2 * (scale * median) ** 2 for scale in scales]

    def kernel(distance: Tensor) -> Tensor:
        return torch.stack([(-distance.square() / width).exp() for width in widths]).mean(0)

    def among(distance: Tensor) -> float:
        count = len(distance)
        return float((kernel(distance).sum() - count) / (count * (count - 1)))

    between = float(kernel(torch.cdist(first, second)).mean())
    return among(torch.cdist(first, first)) + among(within) - 2 * between


def class_shares(share: Tensor, label: Tensor, classes: int) -> Tensor:
    """The shares of classes `[classes]`, from those of modes `[K]` of which mode k is of class label[k].

    Of samples, the share of a mode is best taken as its mean responsibility, which estimates a posterior's weight
    without bias, and with less spread than counting nearest modes: `prior.responsibilities(points).mean(0)`.
    """
    return share.new_zeros(classes).index_add(0, label.to(share.device), share)


def effective_number(share: Tensor) -> float:
    """Of how many modes or classes alike a distribution `[K]` is: the exponential of its entropy."""
    return math.exp(-float(torch.xlogy(share, share).sum()))


def total_variation(share: Tensor, expected: Tensor) -> float:
    """Half the sum of the differences of two distributions `[K]`."""
    if share.shape != expected.shape:
        raise ValueError(f"shares {tuple(share.shape)} and {tuple(expected.shape)}: must be of as many")
    return float((share.double() - expected.double()).abs().sum() / 2)


MODE = 0.01
"""The weight that makes a mode one to be found: draws in the thousands have some of it."""


def modes_found(share: Tensor, expected: Tensor, least: float = 0.2) -> int:
    """How many of the modes that should have weight `MODE` or more hold at least `least` of theirs: both `[K]`."""
    return int(((expected >= MODE) & (share >= least * expected)).sum())


def _pair(points: Tensor, others: Tensor) -> tuple[Tensor, Tensor]:
    if points.shape != others.shape or not len(points):
        raise ValueError(f"points {tuple(points.shape)} and {tuple(others.shape)}: must be as many, of one shape")
    return points.flatten(1).double(), others.flatten(1).double()


@kept_njit()
def _assign(cost: NDArray[np.float64]) -> NDArray[np.int64]:
    """The column of each row that makes the sum of costs `[N, N]` least: shortest augmenting paths with potentials
    (Kuhn 1955; Jonker & Volgenant 1987), in O(N^3)."""
    n = cost.shape[0]
    row_price, column_price = np.zeros(n), np.zeros(n)
    row_of, column_of = np.full(n, -1), np.full(n, -1)
    for start in range(n):
        distance, came_from = np.full(n, np.inf), np.full(n, -1)
        done = np.zeros(n, np.bool_)
        row, column, reached = start, -1, 0.0
        while row >= 0:  # grow the tree of shortest paths until it meets a free column
            nearest, least = -1, np.inf
            for j in range(n):
                if not done[j]:
                    through = reached + cost[row, j] - row_price[row] - column_price[j]
                    if through < distance[j]:
                        distance[j], came_from[j] = through, row
                    if distance[j] < least:
                        least, nearest = distance[j], j
            column, reached = nearest, least
            done[column] = True
            row = row_of[column]
        row_price[start] += reached
        for j in range(n):
            if done[j]:
                column_price[j] -= reached - distance[j]
                if row_of[j] >= 0:
                    row_price[row_of[j]] += reached - distance[j]
        while True:  # turn the path around
            row = came_from[column]
            row_of[column] = row
            column, column_of[row] = column_of[row], column
            if row == start:
                break
    return column_of
