"""Where the trees of many forests lie in one tensor: in blocks of M forests of k trees, end to end, without padding."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from headwater.policies.layers import rounded


@dataclass(frozen=True)
class Blocks:
    """The forests of T trajectories, one block (M, k) a step: M is T, or 1 where all are at the same forest.

    Rows of trees are followed by spare ones, up to a number that products of matrices like.
    """

    count: int
    sizes: tuple[tuple[int, int], ...]

    @property
    def trees(self) -> list[int]:
        """How many trees a block has."""
        return [forests * size for forests, size in self.sizes]

    @property
    def pairs(self) -> list[int]:
        """How many pairs of trees a block has."""
        return [forests * size * (size - 1) // 2 for forests, size in self.sizes]

    def forest(self, block: int) -> Tensor:
        """Which of a block's forests each trajectory is at: int64 `[T]`."""
        return torch.arange(self.count) % self.sizes[block][0]

    def rows(self, places: Tensor) -> Tensor:
        """Rows of the trees in columns `places` `[blocks, T]` of the forests: int64 `[blocks, T]`."""
        starts, start = [], 0
        for t, (size, trees) in enumerate(zip((size for _, size in self.sizes), self.trees, strict=True)):
            starts.append(start + self.forest(t) * size)
            start += trees
        return torch.stack(starts) + places

    def pack(self, values: Tensor) -> Tensor:
        """`[blocks, T, n]` -> `[rows]`: of each forest the first k columns; zeros in spare rows."""
        parts = [values[t, :forests, :size].flatten() for t, (forests, size) in enumerate(self.sizes)]
        total = sum(self.trees)
        return torch.cat([*parts, values.new_zeros(rounded(total) - total)])

    def of_trees(self, values: Tensor) -> list[Tensor]:
        """`[rows]` -> `[M, k]` a block."""
        return [
            part.view(size)
            for part, size in zip(torch.split(values[: sum(self.trees)], self.trees), self.sizes, strict=True)
        ]

    def of_pairs(self, values: Tensor) -> list[Tensor]:
        """`[all pairs]` -> `[M, pairs]` a block."""
        parts = torch.split(values, self.pairs)
        return [part.view(forests, -1) for part, (forests, _) in zip(parts, self.sizes, strict=True)]
