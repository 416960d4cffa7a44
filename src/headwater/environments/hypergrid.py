"""The hypergrid (Bengio et al. 2021, arXiv 2106.04399): walk up the axes of a D-dimensional grid of side H, stop
anywhere.

Rewards: the original family, and the deceptive one of the adaptive teacher (Kim et al. 2025, arXiv 2410.01432, as in
its code).
"""

from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np
import torch
from numba import njit
from torch import Tensor

from headwater.environments.base import Environment, Native, Objects, Tokens
from headwater.environments.rows import integer_rows


class Hypergrid(Environment):
    """States are coordinates `[N, dimensions]`, all zero at first; action d adds one to coordinate d; every state may
    exit. Objects are the coordinates, an integer tensor `[T, dimensions]`."""

    def __init__(self, dimensions: int = 4, side: int = 20) -> None:
        if dimensions < 1:
            raise ValueError(f"dimensions = {dimensions}: must be at least 1")
        if side < 2:
            raise ValueError(f"side = {side}: must be at least 2")
        self.dimensions, self.side = dimensions, side
        self.width = dimensions
        self.n_actions = dimensions + 1
        self.n_backward_actions = dimensions
        self.max_steps = dimensions * (side - 1) + 1
        self.feature_type = Tokens(length=dimensions, vocabulary=side)
        constants = np.array([side], dtype=np.int64)
        self.native = Native(_forward_mask, _step, _backward_mask, _backward_step, constants, Hypergrid)

    def initial(self, count: int) -> Tensor:
        return torch.zeros(count, self.dimensions, dtype=torch.int32)

    def forward_mask(self, states: Tensor) -> Tensor:
        may_exit = torch.ones(states.shape[0], 1, dtype=torch.bool, device=states.device)
        return torch.cat([states < self.side - 1, may_exit], dim=1)

    def backward_mask(self, states: Tensor) -> Tensor:
        return states > 0

    def step(self, states: Tensor, actions: Tensor) -> Tensor:
        return states.scatter_add(1, actions[:, None], torch.ones_like(states))

    def backward_step(self, states: Tensor, backward_actions: Tensor) -> Tensor:
        return states.scatter_add(1, backward_actions[:, None], -torch.ones_like(states))

    def backward_action(self, states: Tensor, actions: Tensor) -> Tensor:
        return actions.clamp(max=self.dimensions - 1)

    def forward_action(self, states: Tensor, backward_actions: Tensor) -> Tensor:
        return backward_actions

    def objects(self, states: Tensor) -> Objects:
        return states

    def states(self, objects: Objects) -> Tensor:
        return integer_rows(objects, self.dimensions, self.side)

    def log_path_count(self, states: Tensor) -> Tensor:
        steps = states.to(torch.float64)
        return torch.lgamma(steps.sum(1) + 1) - torch.lgamma(steps + 1).sum(1)


@dataclass(frozen=True)
class HypergridReward:
    """R(x) = r0 + r1 * [every axis in the outer ring] + r2 * [every axis in the thin band], with a = |x / (H - 1) -
    1/2|.

    original:  outer ring a > 0.25, thin band 0.3 < a < 0.4 (Bengio et al. 2021).
    deceptive: r0 + r1 - r1 * [every a > 0.1] + r2 * [every 0.3 < a < 0.4]: the centre lures, the modes lie beyond a
    moat. Each coordinate is inside, in the outer ring or in the band, decided in integers so that no cell depends on
    rounding; the innermost coordinate decides.
    """

    side: int
    r0: float = 1e-3
    r1: float = 0.5
    r2: float = 2.0
    family: str = "original"
    _level: Tensor = field(init=False, repr=False, compare=False)
    _log_reward: Tensor = field(init=False, repr=False, compare=False)

    def __post_init__(self) -> None:
        if self.family not in ("original", "deceptive"):
            raise ValueError(f"family = {self.family!r}: must be 'original' or 'deceptive'")
        if min(self.r0, self.r1, self.r2) < 0 or self.r0 == 0:
            raise ValueError(
                f"r0 = {self.r0}, r1 = {self.r1}, r2 = {self.r2}: r0 must be positive, the others not negative"
            )

        index = torch.arange(self.side)
        twice_a = (2 * index - (self.side - 1)).abs()  # a * 2 (H - 1), an integer
        unit = 2 * (self.side - 1)
        outer = 100 * twice_a > (25 if self.family == "original" else 10) * unit
        band = (10 * twice_a > 3 * unit) & (10 * twice_a < 4 * unit)  # the band lies in the outer ring
        object.__setattr__(self, "_level", outer.to(torch.int64) + band)
        inside, ring = (0.0, self.r1) if self.family == "original" else (self.r1, 0.0)
        levels = torch.tensor([inside, ring, ring + self.r2]) + self.r0
        object.__setattr__(self, "_log_reward", levels.log())

    def __call__(self, objects: Objects, condition: Tensor) -> Tensor:
        """Log-reward of grid cells `[T, dimensions]`: float32 `[T]`."""
        cells = torch.as_tensor(objects)
        return self._log_reward.to(cells.device)[self._level.to(cells.device)[cells].amin(1)]


@njit(nogil=True)
def _forward_mask(state, constants, out):  # type: ignore[no-untyped-def]
    for d in range(state.size):
        out[d] = state[d] < constants[0] - 1
    out[state.size] = True


@njit(nogil=True)
def _step(state, action, constants):  # type: ignore[no-untyped-def]
    state[action] += 1


@njit(nogil=True)
def _backward_mask(state, constants, out):  # type: ignore[no-untyped-def]
    for d in range(state.size):
        out[d] = state[d] > 0


@njit(nogil=True)
def _backward_step(state, backward_action, constants):  # type: ignore[no-untyped-def]
    state[backward_action] -= 1
    return backward_action
