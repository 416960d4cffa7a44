"""Conditions: what trajectories are asked for. A source of condition rows, drawn in groups that share one condition."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor


class Conditions(Protocol):
    """Draws condition rows. `size` is C, their number of columns."""

    @property
    def size(self) -> int: ...

    def draw(self, count: int, group_size: int, generator: torch.Generator) -> Tensor:
        """`[count, C]` rows; each run of `group_size` rows shares one condition."""


@dataclass(frozen=True)
class NoCondition:
    """Nothing is asked for: C = 0."""

    @property
    def size(self) -> int:
        return 0

    def draw(self, count: int, group_size: int, generator: torch.Generator) -> Tensor:
        return torch.empty(count, 0)


@dataclass(frozen=True)
class InverseTemperature:
    """One column beta, uniform between `low` and `high`: one sampler for R(x)^beta at every beta. Goes with
    `TemperedReward`.
    """

    low: float
    high: float

    def __post_init__(self) -> None:
        if not 0 <= self.low <= self.high:
            raise ValueError(f"low = {self.low}, high = {self.high}: must be 0 <= low <= high")

    @property
    def size(self) -> int:
        return 1

    def draw(self, count: int, group_size: int, generator: torch.Generator) -> Tensor:
        uniform = torch.rand(-(-count // group_size), 1, generator=generator)
        return (self.low + (self.high - self.low) * uniform).repeat_interleave(group_size, 0)[:count]


@dataclass(frozen=True)
class ConditionTable:
    """Rows of a given table `[K, C]`, each equally often."""

    table: Tensor

    def __post_init__(self) -> None:
        if self.table.ndim != 2 or not len(self.table):
            raise ValueError(f"table has shape {tuple(self.table.shape)}: must be [K, C] with at least one row")

    @property
    def size(self) -> int:
        return self.table.shape[1]

    def draw(self, count: int, group_size: int, generator: torch.Generator) -> Tensor:
        rows = torch.randint(len(self.table), (-(-count // group_size),), generator=generator)
        return self.table[rows].repeat_interleave(group_size, 0)[:count]
