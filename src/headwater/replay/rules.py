"""The rules by which a replay chooses what to hand out: small objects with one method, so that a domain adds its own.

Sources: rank weights, Tripp et al. 2020; a set share of high rewards, Shen et al. 2023; a mixture with the most recent
batch, Bartoldson et al. 2025 (TBA).
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from typing import Protocol

import torch
from torch import Generator, Tensor


@dataclass(frozen=True)
class Entries:
    """What a rule sees of the n entries of a replay, oldest first.

    log_reward:    `[n]` float32.
    condition_key: `[n]` int64, equal for entries of equal condition.
    version:       `[n]` int64, the version of the policy that drew each entry.
    recent:        how many entries, at the end, came with the most recent batch.
    """

    log_reward: Tensor
    condition_key: Tensor
    version: Tensor
    recent: int

    def __len__(self) -> int:
        return self.log_reward.shape[0]

    @cached_property
    def group(self) -> Tensor:
        """`[n]` int64, equal for entries of equal condition, numbered from 0."""
        return torch.unique(self.condition_key, return_inverse=True)[1]

    @cached_property
    def by_group(self) -> Tensor:
        """`[n]` int64, the entries one group after the other, each oldest first."""
        return self.group.argsort(stable=True)

    @cached_property
    def best_first(self) -> Tensor:
        """`[n]` int64, the entries by falling log-reward; equal ones oldest first."""
        return self.log_reward.argsort(descending=True, stable=True)

    def select(self, chosen: Tensor) -> Entries:
        """The entries at `chosen`, `[K]` indices in rising order."""
        recent = int((chosen >= len(self) - self.recent).sum())
        return Entries(self.log_reward[chosen], self.condition_key[chosen], self.version[chosen], recent)


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
        logits = entries.log_reward.double() / self.temperature
        return _weighted((logits - logits.max()).exp_(), count, generator)


@dataclass(frozen=True)
class RewardRank:
    """An entry with probability proportional to 1 / (k n + rank); its rank is the number of entries of higher reward.

    A small k draws the best almost alone, a large one is uniform (Tripp et al. 2020).
    """

    k: float = 1e-3

    def __post_init__(self) -> None:
        require(0 < self.k < float("inf"), "k", self.k, "above 0")

    def draw(self, count: int, entries: Entries, generator: Generator) -> Tensor:
        values = entries.log_reward[entries.best_first]
        rank = torch.arange(len(entries))
        rank[1:][values[1:] == values[:-1]] = 0
        rank = rank.cummax(0)[0]
        weights = 1 / (self.k * len(entries) + rank.double())
        return entries.best_first[_weighted(weights, count, generator)]


@dataclass(frozen=True)
class Stratified:
    """A `share` of the draw from the entries at or above the `quantile` of reward, the rest from those below.

    Where ties leave nothing below, the top is what lies strictly above; where all rewards are equal, the draw is
    uniform. The number drawn from the top is `share * count`, rounded up or down at random so that it is exact on
    average (Shen et al. 2023).
    """

    share: float = 0.5
    quantile: float = 0.9

    def __post_init__(self) -> None:
        require(0 <= self.share <= 1, "share", self.share, "from 0 to 1")
        require(0 < self.quantile < 1, "quantile", self.quantile, "above 0 and below 1")

    def draw(self, count: int, entries: Entries, generator: Generator) -> Tensor:
        threshold = entries.log_reward.kthvalue(int(self.quantile * len(entries)) + 1)[0]
        is_top = entries.log_reward >= threshold
        if is_top.all():
            is_top = entries.log_reward > threshold
        top, rest = is_top.nonzero()[:, 0], (~is_top).nonzero()[:, 0]
        wanted = int(self.share * count + torch.rand((), generator=generator, dtype=torch.float64))
        from_top = min(wanted, count) if len(top) else 0
        drawn = [
            stratum[torch.randint(len(stratum), (number,), generator=generator)]
            for stratum, number in ((top, from_top), (rest, count - from_top))
            if number
        ]
        return torch.cat(drawn)


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
    """First conditions, uniformly and as different as possible, then `per_condition` entries of each by `rule`.

    So every group of the log-partition variance objective has several members. `draw` raises ValueError where `count`
    is no multiple of `per_condition`.
    """

    rule: Rule
    per_condition: int

    def __post_init__(self) -> None:
        require(self.per_condition >= 1, "per_condition", self.per_condition, "at least 1")

    def draw(self, count: int, entries: Entries, generator: Generator) -> Tensor:
        if count % self.per_condition:
            raise ValueError(f"cannot draw {count} entries, {self.per_condition} of each condition: not a multiple")
        sizes = torch.bincount(entries.group)
        ends = sizes.cumsum(0)
        wanted = count // self.per_condition
        rounds = [torch.randperm(len(sizes), generator=generator) for _ in range(-(-wanted // len(sizes)))]
        drawn = []
        for group in torch.cat(rounds)[:wanted]:
            members = entries.by_group[ends[group] - sizes[group] : ends[group]]
            drawn.append(members[self.rule.draw(self.per_condition, entries.select(members), generator)])
        return torch.cat(drawn)


def _weighted(weights: Tensor, count: int, generator: Generator) -> Tensor:
    """`[count]` indices with probability proportional to `weights`, `[n]` float64: one random number a draw."""
    cumulative = weights.cumsum(0)
    wanted = torch.rand(count, generator=generator, dtype=torch.float64) * cumulative[-1]
    return torch.searchsorted(cumulative, wanted, right=True).clamp_(max=len(weights) - 1)


def require(legal: bool, field: str, value: object, allowed: str) -> None:
    if not legal:
        raise ValueError(f"{field} is {value!r}, must be {allowed}")
