"""The rules by which a replay chooses what to hand out: small objects with one method, so that a domain adds its own.

Sources: rank weights, Tripp et al. 2020; a set share of high rewards, Shen et al. 2023; a mixture with the most recent
batch, Bartoldson et al. 2025 (TBA).
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Generator, Tensor

from headwater.replay.entries import Entries


class Rule(Protocol):
    """How a replay chooses what to hand out."""

    def draw(self, count: int, entries: Entries, generator: Generator) -> Tensor:
        """`[count]` int64 indices into `entries`, repeats allowed; there is at least one entry.

        Every random number comes from `generator`, a CPU one.
        """
        ...


@dataclass(frozen=True)
class Recent:
    """The `count` most recent entries, oldest first; where there are fewer, they repeat from the newest on."""

    def draw(self, count: int, entries: Entries, generator: Generator) -> Tensor:
        return len(entries) - 1 - torch.arange(count).flip(0) % len(entries)


@dataclass(frozen=True)
class Uniform:
    """Every entry with equal probability."""

    def draw(self, count: int, entries: Entries, generator: Generator) -> Tensor:
        return torch.randint(len(entries), (count,), generator=generator)


@dataclass(frozen=True)
class RewardSoftmax:
    """An entry with probability proportional to exp(log-reward / temperature)."""

    temperature: float = 1.0

    def __post_init__(self) -> None:
        require(0 < self.temperature < float("inf"), "temperature", self.temperature, "above 0")

    def draw(self, count: int, entries: Entries, generator: Generator) -> Tensor:
        best = float(entries.ranked_log_reward(torch.tensor([0])))
        # Strata end where the weight has fallen by steps of e^_STEP; what is left below has no part to speak of.
        depth = math.log(len(entries)) + _NEGLIGIBLE
        ends = best - self.temperature * _STEP * torch.arange(1, int(depth / _STEP) + 2, dtype=torch.float64)
        edges = entries.n_above(_rounded_down(ends.clamp(max=math.nextafter(best, -math.inf))))

        def weight(positions: Tensor) -> Tensor:
            return ((entries.ranked_log_reward(positions).double() - best) / self.temperature).exp()

        return _falling(weight, edges, count, entries, generator)


@dataclass(frozen=True)
class RewardRank:
    """An entry with probability proportional to 1 / (k n + rank); its rank is the number of entries of higher reward.

    A small k draws the best almost alone, a large one is uniform (Tripp et al. 2020).
    """

    k: float = 1e-3

    def __post_init__(self) -> None:
        require(0 < self.k < float("inf"), "k", self.k, "above 0")

    def draw(self, count: int, entries: Entries, generator: Generator) -> Tensor:
        n = len(entries)
        steps = torch.arange(1, int((math.log1p(self.k) - math.log(self.k)) / _STEP) + 1, dtype=torch.float64)
        edges = (self.k * n * (steps * _STEP).expm1()).clamp(max=n - 1).ceil().long()

        def weight(positions: Tensor) -> Tensor:
            return 1 / (1 + entries.n_above(entries.ranked_log_reward(positions)).double() / (self.k * n))

        return _falling(weight, edges, count, entries, generator)


@dataclass(frozen=True)
class Stratified:
    """A `share` of the draw from the entries at or above the `quantile` of reward, the rest from those below.

    Where ties leave nothing below, the top is what lies strictly above; where all rewards are equal, the draw is
    uniform. Within a stratum no entry comes twice before all have come. The number drawn from the top is `share *
    count`, rounded up or down at random so that it is exact on average (Shen et al. 2023).
    """

    share: float = 0.5
    quantile: float = 0.9

    def __post_init__(self) -> None:
        require(0 <= self.share <= 1, "share", self.share, "from 0 to 1")
        require(0 < self.quantile < 1, "quantile", self.quantile, "above 0 and below 1")

    def draw(self, count: int, entries: Entries, generator: Generator) -> Tensor:
        n = len(entries)
        threshold = entries.ranked_log_reward(torch.tensor([n - 1 - int(self.quantile * n)]))
        top = int(_n_at_least(entries, threshold))
        if top == n:
            top = int(entries.n_above(threshold))
        wanted = int(self.share * count + torch.rand((), generator=generator, dtype=torch.float64))
        from_top = min(wanted, count) if top else 0
        drawn = [
            first + _different(end - first, number, generator)
            for first, end, number in ((0, top, from_top), (top, n, count - from_top))
            if number
        ]
        return entries.ranked(torch.cat(drawn))


@dataclass(frozen=True)
class Mixture:
    """Each draw with probability `recent_probability` uniformly from the most recent batch, else by `rule`.

    Source: Bartoldson et al. 2025 (TBA).
    """

    recent_probability: float
    rule: Rule

    def __post_init__(self) -> None:
        require(0 <= self.recent_probability <= 1, "recent_probability", self.recent_probability, "from 0 to 1")

    def draw(self, count: int, entries: Entries, generator: Generator) -> Tensor:
        drawn = torch.empty(count, dtype=torch.int64)
        is_recent = torch.rand(count, generator=generator) < self.recent_probability
        if not entries.recent:  # inside one condition, the most recent batch may have nothing
            is_recent.zero_()
        number = int(is_recent.sum())
        if number:
            drawn[is_recent] = len(entries) - 1 - torch.randint(entries.recent, (number,), generator=generator)
        if number < count:
            drawn[~is_recent] = self.rule.draw(count - number, entries, generator)
        return drawn


@dataclass(frozen=True)
class PerCondition:
    """First conditions, uniformly and as different as possible, then `per_condition` entries of each by `rule`,
    different ones where there are so many.

    With probability `recent_probability` a group is recent: its condition is one of those in the most recent batch, and
    its members are the newest of that condition (Bartoldson et al. 2025, TBA).

    So every group of the log-partition variance objective has several members. `draw` raises ValueError where `count`
    is no multiple of `per_condition`. It sorts all entries by condition: alone among these rules it costs time in
    proportion to the whole replay.
    """

    rule: Rule
    per_condition: int
    recent_probability: float = 0.0

    def __post_init__(self) -> None:
        require(self.per_condition >= 1, "per_condition", self.per_condition, "at least 1")
        require(0 <= self.recent_probability <= 1, "recent_probability", self.recent_probability, "from 0 to 1")

    def draw(self, count: int, entries: Entries, generator: Generator) -> Tensor:
        if count % self.per_condition:
            raise ValueError(f"cannot draw {count} entries, {self.per_condition} of each condition: not a multiple")
        (order, ends), wanted = entries.by_condition, count // self.per_condition
        # conditions whose newest entry came with the most recent batch
        recent, n_recent = (order[ends - 1] >= len(entries) - entries.recent).nonzero()[:, 0], 0
        if self.recent_probability and len(recent):
            n_recent = int((torch.rand(wanted, generator=generator) < self.recent_probability).sum())
        drawn = [self._members(order, ends, group) for group in _spread(recent, n_recent, generator)]
        drawn = [members[Recent().draw(self.per_condition, entries.select(members), generator)] for members in drawn]
        inside: dict[int, tuple[Tensor, Entries]] = {}
        for group in _spread(torch.arange(len(ends)), wanted - n_recent, generator):
            if group not in inside:
                members = self._members(order, ends, group)
                inside[group] = members, entries.select(members)
            members, selected = inside[group]
            drawn.append(members[self._different(selected, generator)])
        return torch.cat(drawn)

    @staticmethod
    def _members(order: Tensor, ends: Tensor, group: int) -> Tensor:
        """The entries of a condition, oldest first."""
        return order[int(ends[group - 1]) if group else 0 : int(ends[group])]

    def _different(self, entries: Entries, generator: Generator) -> Tensor:
        """`per_condition` entries by the rule; what it draws again is replaced by one that was not drawn, uniformly."""
        drawn = self.rule.draw(self.per_condition, entries, generator)
        if self.per_condition == 1 or isinstance(self.rule, Stratified):  # which keeps its share above all
            return drawn
        again = torch.ones_like(drawn, dtype=torch.bool)
        again[_first_places(drawn)] = False
        number = min(int(again.sum()), len(entries) - int((~again).sum()))
        if number:
            left = torch.ones(len(entries), dtype=torch.bool)
            left[drawn] = False
            others = left.nonzero()[:, 0]
            places = again.nonzero()[:, 0][:number]
            drawn[places] = others[torch.randperm(len(others), generator=generator)[:number]]
        return drawn


def _spread(groups: Tensor, number: int, generator: Generator) -> list[int]:
    """`number` of the groups in random order, each once before any comes again."""
    rounds = -(-number // len(groups)) if number else 0
    drawn = [groups[torch.randperm(len(groups), generator=generator)] for _ in range(rounds)]
    return torch.cat(drawn)[:number].tolist() if drawn else []


def _different(n: int, number: int, generator: Generator) -> Tensor:
    """`number` of n, none twice before all have come; from far more than are wanted, simply at random."""
    if n > 100 * number:
        return torch.randint(n, (number,), generator=generator)
    rounds = -(-number // n)
    return torch.cat([torch.randperm(n, generator=generator) for _ in range(rounds)])[:number]


def _first_places(values: Tensor) -> Tensor:
    """Where each value is for the first time."""
    found, which = torch.unique(values, return_inverse=True)
    places = torch.full((len(found),), len(values))
    return places.scatter_reduce(0, which, torch.arange(len(values)), "amin")


_STEP = 0.25  # the width of a stratum in log-weight: 12 draws in 100 are refused
_NEGLIGIBLE = 40.0  # a log-weight so far below the whole is below the resolution of a uniform number


def _falling(
    weight: Callable[[Tensor], Tensor], edges: Tensor, count: int, entries: Entries, generator: Generator
) -> Tensor:
    """`[count]` indices with probability proportional to a weight that never rises as the log-reward falls.

    weight: `[K]` positions by falling log-reward -> `[K]` float64. edges: positions at which to begin a new stratum.
    No sum over entries is kept or taken, which would depend on the order of its terms: a stratum is proposed by its
    size times its first weight, an entry in it uniformly, and accepted with probability weight / first weight.
    """
    n = len(entries)
    edges = torch.unique(torch.cat([edges.new_tensor([0]), edges[(edges > 0) & (edges < n)], edges.new_tensor([n])]))
    first, size = edges[:-1], edges.diff()
    bound = weight(first)
    cumulative = (size * bound).cumsum(0)
    drawn = torch.empty(0, dtype=torch.int64)
    while len(drawn) < count:
        proposals = 8 + (count - len(drawn)) * 5 // 4
        where, inside, accept = torch.rand(3, proposals, generator=generator, dtype=torch.float64)
        stratum = torch.searchsorted(cumulative, where * cumulative[-1], right=True).clamp_(max=len(size) - 1)
        position = first[stratum] + torch.minimum((inside * size[stratum]).long(), size[stratum] - 1)
        drawn = torch.cat([drawn, position[accept * bound[stratum] < weight(position)]])
    return entries.ranked(drawn[:count])


def _n_at_least(entries: Entries, log_reward: Tensor) -> Tensor:
    return entries.n_above(log_reward.nextafter(log_reward.new_tensor(-torch.inf)))


def _rounded_down(values: Tensor) -> Tensor:
    """The largest float32 numbers that are not above these float64 ones."""
    rounded = values.float()
    below = rounded.nextafter(rounded.new_tensor(-torch.inf))
    return torch.where(rounded.double() > values, below, rounded)


def require(legal: bool, field: str, value: object, allowed: str) -> None:
    if not legal:
        raise ValueError(f"{field} is {value!r}, must be {allowed}")
