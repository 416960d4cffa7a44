"""Exact log Z and exact draws of a distribution over discrete variables that meet in pairs, by variable elimination.

Variables are summed out one after another; each leaves a table over the variables that it met (Dechter 1999, "Bucket
elimination"). On a lattice that runs row by row it is the transfer matrix of statistical physics, one site at a time,
and the work grows with the lattice's width alone. Walking the same tables backward draws from the distribution.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from itertools import combinations

import torch
from torch import Tensor

LARGEST_TABLE = 2**22
"""Entries of the largest table that is built: lattices of two states go up to a torus of width 10."""
LARGEST_MEMORY = 2**26
"""Entries of all tables together that are kept for drawing."""


class TooWide(ValueError):
    """The variables hang together too closely for their sum to be done exactly."""


class Elimination:
    """The distribution p(x) = exp(sum_i fields[i, x_i] + sum_{i<j} pairs[i, j][x_i, x_j]) / Z over n variables.

    fields: float64 `[n, q]`. pairs: tables `[q, q]` of the pairs (i, j), i < j, that interact at all. log_z: its exact
    log-partition function. Raises TooWide if some table would have more than `LARGEST_TABLE` entries.
    """

    def __init__(self, fields: Tensor, pairs: Mapping[tuple[int, int], Tensor]) -> None:
        self.n, self.q = fields.shape
        self.scopes, self.order = _cheapest_order(self.n, list(pairs))
        largest = max(len(scope) for scope in self.scopes)
        if self.q**largest > LARGEST_TABLE:
            raise TooWide(f"tables of {self.q} ** {largest} entries: at most {LARGEST_TABLE} are built")
        entries = sum(self.q ** len(scope) for scope in self.scopes)
        self._tables: list[Tensor] | None = [] if entries <= LARGEST_MEMORY else None
        factors: list[tuple[tuple[int, ...], Tensor]] = [((i,), fields[i].double()) for i in range(self.n)]
        factors += [(pair, table.double()) for pair, table in pairs.items()]
        log_z = torch.zeros((), dtype=torch.float64)
        for variable, scope in zip(self.order, self.scopes, strict=True):
            met = [factor for factor in factors if variable in factor[0]]
            factors = [factor for factor in factors if variable not in factor[0]]
            table = torch.zeros((), dtype=torch.float64)
            for members, values in met:
                table = table + values.reshape([self.q if other in members else 1 for other in scope])
            if self._tables is not None:
                self._tables.append(table)
            rest = tuple(other for other in scope if other != variable)
            message = table.logsumexp(scope.index(variable))
            if rest:
                factors.append((rest, message))
            else:
                log_z = log_z + message
        self.log_z = float(log_z)

    @property
    def can_draw(self) -> bool:
        """Whether the tables are small enough together to be kept."""
        return self._tables is not None

    def sample(self, count: int, generator: torch.Generator) -> Tensor:
        """`count` exact, independent draws: int32 `[count, n]`. Raises TooWide where `can_draw` is false."""
        if self._tables is None:
            raise TooWide(f"the tables have more than {LARGEST_MEMORY} entries together: none were kept for drawing")
        drawn = torch.zeros(count, self.n, dtype=torch.int64)
        for variable, scope, table in reversed(list(zip(self.order, self.scopes, self._tables, strict=True))):
            row = torch.zeros(count, dtype=torch.int64)
            for other in scope:
                if other != variable:
                    row = row * self.q + drawn[:, other]
            conditional = table.movedim(scope.index(variable), -1).reshape(-1, self.q)[row].softmax(1).cumsum(1)
            uniform = torch.rand(count, 1, generator=generator, dtype=torch.float64)
            drawn[:, variable] = (uniform >= conditional).sum(1).clamp(max=self.q - 1)
        return drawn.to(torch.int32)


def _cheapest_order(n: int, pairs: Sequence[tuple[int, int]]) -> tuple[list[tuple[int, ...]], list[int]]:
    """The scope of the table of each variable, and the order in which they go: as numbered (best on a lattice), or the
    one that meets the fewest others first (best on a graph without order), whichever has the smaller tables.
    """
    tried = [_scopes(n, pairs, greedy) for greedy in (False, True)]
    return min(tried, key=lambda found: max(len(scope) for scope in found[0]))


def _scopes(n: int, pairs: Sequence[tuple[int, int]], greedy: bool) -> tuple[list[tuple[int, ...]], list[int]]:
    neighbours: dict[int, set[int]] = {i: set() for i in range(n)}
    for i, j in pairs:
        neighbours[i].add(j)
        neighbours[j].add(i)
    scopes, order = [], []
    while neighbours:
        variable = min(neighbours, key=lambda i: len(neighbours[i])) if greedy else min(neighbours)
        met = neighbours.pop(variable)
        for i, j in combinations(met, 2):
            neighbours[i].add(j)
            neighbours[j].add(i)
        for i in met:
            neighbours[i].discard(variable)
        scopes.append(tuple(sorted({variable, *met})))
        order.append(variable)
    return scopes, order
