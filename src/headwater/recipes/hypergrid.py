"""The recipe `hypergrid`: the standard test of whether a sampler finds every mode, with its exact distribution
beside it.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import ClassVar, Literal

import numpy as np
import torch

from headwater.environments.base import Objects
from headwater.environments.hypergrid import Hypergrid, HypergridReward
from headwater.policies import Policy
from headwater.policies.environment_policy import Backward
from headwater.recipes.base import EnvironmentRecipe
from headwater.report import Section
from headwater.reward import Reward
from headwater.runs import Run, Samples
from headwater.training import Training


@dataclass(frozen=True)
class HypergridRecipe(EnvironmentRecipe):
    """A D-dimensional grid with a few far-apart modes."""

    summary: ClassVar[str] = "walk a D-dimensional grid to its far-apart modes (exact distribution known)"
    caches_reward: ClassVar[bool] = False

    dimensions: int = 4
    """Number of axes, D."""
    side: int = 8
    """Cells along an axis, H."""
    family: Literal["original", "deceptive"] = "original"
    """The reward: original (Bengio et al. 2021) or deceptive (Kim et al. 2025)."""
    r0: float = 1e-3
    """Reward everywhere."""
    r1: float = 0.5
    """Reward of the plateau."""
    r2: float = 2.0
    """Reward of the modes."""
    backward: Backward = "learned"
    """The backward policy."""
    training: Training = field(default_factory=lambda: Training(iterations=3000, batch_size=64, learning_rate=3e-3))
    """How long and how fast to learn."""

    def environment(self) -> Hypergrid:
        return Hypergrid(self.dimensions, self.side)

    def base_reward(self) -> Reward:
        return HypergridReward(self.side, self.r0, self.r1, self.r2, self.family)

    def objects(self, lines: Sequence[str]) -> Objects:
        return torch.tensor([[int(value) for value in line.split()] for line in lines])

    def __post_init__(self) -> None:
        super().__post_init__()
        self.environment()
        self.base_reward()

    def measures(self, samples: Samples) -> dict[str, float]:
        """The corners of the grid, 2^D, in whose band of highest reward a sample lies."""
        high = samples.log_reward >= math.log(self.r0 + self.r1 + self.r2) - 1e-4
        if self.family == "deceptive":
            high = samples.log_reward >= math.log(self.r0 + self.r2) - 1e-4
        cells = [samples.objects[index].split() for index in np.flatnonzero(high)]
        corners = {tuple(2 * int(x) > self.side - 1 for x in cell) for cell in cells}
        return {"modes": len(corners), "modes_total": 2**self.dimensions}

    def sections(self, run: Run, policy: Policy) -> list[Section]:
        """Learned against true distribution over the first two axes, the others summed out."""
        from headwater.report.figures import heat_maps

        exact = self.exact_distribution()
        if exact is None or self.dimensions < 2:
            return []
        learned = exact.log_probs(policy).exp().numpy()
        cells = exact.states.numpy()
        maps = [np.zeros((self.side, self.side)) for _ in range(2)]
        for grid, probability in zip(maps, (learned, exact.probabilities.numpy()), strict=True):
            np.add.at(grid, (cells[:, 0], cells[:, 1]), probability)
        title = "Probability over the first two axes" + (", the others summed out" if self.dimensions > 2 else "")
        figure = heat_maps(maps[0], maps[1], title=title)
        return [Section("Learned and true distribution", f'<figure class="wide">{figure}</figure>')]
