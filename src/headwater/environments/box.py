"""Rewards over the box [0, 1]^d: the hypergrid's rings made continuous (Lahlou et al. 2023, arXiv 2301.12594), and the
integral of any reward over one or two dimensions by quadrature.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from headwater.environments.base import Objects
from headwater.reward import Reward


@dataclass(frozen=True)
class RingReward:
    """R(x) = R0 + R1 prod_i 1[a_i > 0.25] + R2 prod_i 1[0.3 < a_i < 0.4], a_i = |x_i - 0.5|: 2^d plateaus in the
    corners, each with a mode in it.
    """

    r0: float = 0.1
    r1: float = 0.5
    r2: float = 2.0

    def __post_init__(self) -> None:
        if not 0 < self.r0 < math.inf:
            raise ValueError(f"r0 = {self.r0}: must be positive, so that every point has a reward")
        for name in ("r1", "r2"):
            if not 0 <= getattr(self, name) < math.inf:
                raise ValueError(f"{name} = {getattr(self, name)}: must not be negative")

    def __call__(self, objects: Objects, condition: Tensor) -> Tensor:
        """Of points `[T, d]`: float32 `[T]`."""
        away = (torch.as_tensor(objects) - 0.5).abs()
        plateau = (away > 0.25).all(1)
        mode = ((away > 0.3) & (away < 0.4)).all(1)
        return (self.r0 + self.r1 * plateau + self.r2 * mode).log().float()

    def log_z(self, dimensions: int) -> float:
        """Logarithm of the integral of R over the box."""
        return math.log(self.r0 + self.r1 * 0.5**dimensions + self.r2 * 0.2**dimensions)


def cell_integrals(reward: Reward, dimensions: int, cells: int, nodes: int = 5) -> Tensor:
    """The integral of R over each of `cells` ** d cells, d at most 2, by the midpoint rule with `nodes` ** d points a
    cell: float64 `[cells]` or `[cells, cells]`, NaN where the reward failed.
    """
    if dimensions > 2:
        raise ValueError(f"dimensions = {dimensions}: quadrature is done over at most 2")
    axis = (torch.arange(cells * nodes) + 0.5) / (cells * nodes)
    points = torch.cartesian_prod(*[axis] * dimensions).view(-1, dimensions)
    values = reward(points, torch.empty(len(points), 0)).double().exp() / len(points)
    return values.view((cells, nodes) * dimensions).sum(tuple(range(1, 2 * dimensions, 2)))
