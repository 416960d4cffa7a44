"""The recipe `box`: points of [0, 1]^d in proportion to a reward density, the continuous form of the hypergrid or a
function of the user's own.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import ClassVar, cast

import numpy as np
import torch
from torch import Tensor

from headwater.conditions import NoCondition
from headwater.environments.base import Objects
from headwater.environments.box import RingReward, cell_integrals
from headwater.policies import NO_EXPLORATION, BoxPolicy, Network, Policy
from headwater.policies.box import BoxBackward
from headwater.policies.densities import Kind
from headwater.recipes.base import Problem, Recipe, listed
from headwater.report import Section
from headwater.reward import FunctionReward, Reward
from headwater.runs import Run, Samples
from headwater.training import ExplorationSettings, Training

_OBJECTIVES = ("tb", "vargrad", "db", "subtb")
_CELLS = 20
_DRAWS = 20_000
_MOST_AXES = 12


@dataclass(frozen=True)
class BoxRecipe(Recipe):
    """Rings in the corners of a box, or a function of your own (--function module:name) that takes a list of points."""

    summary: ClassVar[str] = "points of a continuous box, rewarded by rings in its corners or by your Python function"
    least_distance: ClassVar[float] = 0.05

    dimensions: int = 2
    """Coordinates of a point, d; each lies between 0 and 1."""
    function: str | None = None
    """Your reward density as module:function, a list of points (tuples) in, a list of numbers of at least 0 out."""
    timeout: float | None = None
    """Seconds that one call of the function may take; the point that takes longer counts as failed."""
    floor: float = 1e-6
    """Rewards of the function below it count as this."""
    quadrature: int = 5
    """Points along an axis of each of 20 cells at which the reward is integrated in one or two dimensions, for exact
    log Z and the report's map: the function is called for all of them; 0 to do without."""
    r0: float = 0.1
    """Reward everywhere."""
    r1: float = 0.5
    """Reward of the plateaus in the corners."""
    r2: float = 2.0
    """Reward of the modes on them."""
    steps: int = 4
    """Steps of a trajectory."""
    density: Kind = "gaussian"
    """What a step is drawn from: mixtures of Betas, or of normals cut off at the edge of the box."""
    components: int = 8
    """Components of each mixture."""
    backward: BoxBackward = "fixed"
    """Backward steps: fixed blurs, wider toward the source, or blurs that learn to shift and stretch."""
    network: Network = field(default_factory=lambda: Network(width=128, layers=3))
    """The network over points, an mlp."""
    training: Training = field(
        default_factory=lambda: Training(
            iterations=5000, batch_size=256, learning_rate=2e-3, log_z_learning_rate=0.02, schedule="cosine"
        )
    )
    """How long and how fast to learn."""
    exploration: ExplorationSettings = field(default_factory=lambda: ExplorationSettings(epsilon=0.0))
    """How the search departs from the policy: epsilon is the probability of a step to a uniform point."""

    def __post_init__(self) -> None:
        if self.objective.name not in _OBJECTIVES:
            raise ValueError(f"objective.name = {self.objective.name!r}: over a box, one of {', '.join(_OBJECTIVES)}")
        if not 0 <= self.quadrature <= 50:
            raise ValueError(f"quadrature = {self.quadrature}: must lie between 0 and 50")
        self.policy()
        RingReward(self.r0, self.r1, self.r2)

    def policy(self) -> BoxPolicy:
        return BoxPolicy(self.dimensions, self.steps, self.density, self.components, self.backward, self.network)

    def reward(self) -> Reward:
        if self.function is not None:
            return FunctionReward(self.function, self.timeout, self.floor)
        return RingReward(self.r0, self.r1, self.r2)

    def problem(self) -> Problem:
        return Problem(self.policy(), self.reward(), NoCondition())

    @cached_property
    def integrals(self) -> Tensor | None:
        """The reward's integral over each cell in one or two dimensions; None where it is not asked for, or fails."""
        if self.dimensions > 2 or not self.quadrature:
            return None
        found = cell_integrals(self.reward(), self.dimensions, _CELLS, self.quadrature)
        return None if found.isnan().any() else found

    def exact_log_z(self) -> float | None:
        if self.function is None:
            return RingReward(self.r0, self.r1, self.r2).log_z(self.dimensions)
        return None if self.integrals is None else float(self.integrals.sum().log())

    def text(self, objects: Objects) -> list[str]:
        return [" ".join(f"{x:.6f}" for x in cast("tuple[float, ...]", point)) for point in listed(objects)]

    def distance(self, a: str, b: str) -> float:
        """Euclidean."""
        return math.dist([float(x) for x in a.split()], [float(x) for x in b.split()])

    def measures(self, samples: Samples) -> dict[str, float]:
        """Of the rings: the corners of the box, 2^d, in whose mode a sample lies."""
        if self.function is not None:
            return {}
        high = samples.log_reward >= math.log(self.r0 + self.r1 + self.r2) - 1e-4
        points = [samples.objects[index].split() for index in np.flatnonzero(high)]
        corners = {tuple(float(x) > 0.5 for x in point) for point in points}
        return {"modes": len(corners), "modes_total": 2**self.dimensions}

    def sections(self, run: Run, policy: Policy) -> list[Section]:
        """The learned density beside the true one, by quadrature of both; in more dimensions, how points lie along each
        axis.
        """
        from headwater.report.figures import heat_maps, line_figure

        assert isinstance(policy, BoxPolicy)
        if self.dimensions > 2 or self.integrals is None:
            return [self._marginals(policy)]
        learned, true = policy.cell_probabilities(_CELLS), self.integrals / self.integrals.sum()
        distance = float((learned - true).abs().sum() / 2)
        words = f"Total variation over {_CELLS}{' × ' + str(_CELLS) if self.dimensions == 2 else ''} cells, by "
        words += f"quadrature of the sampler and of the reward: {distance:.4f}."
        if self.dimensions == 2:
            figure = heat_maps(learned.numpy(), true.numpy(), title="Probability of each cell of the box")
        else:
            middles = (np.arange(_CELLS) + 0.5) / _CELLS
            curves = {"learned": (middles, learned.numpy()), "true": (middles, true.numpy())}
            figure = line_figure(curves, x_label="x", title="Probability of each cell of the box", size=(5.2, 3.3))
        wide = ' class="wide"' if self.dimensions == 2 else ""
        html = f"<p>{words}</p><figure{wide}>{figure}</figure>"
        return [Section("Learned and true distribution", html)]

    def _marginals(self, policy: BoxPolicy) -> Section:
        """Histograms of the coordinates of draws; of the rings, whose axes have one known marginal, beside that."""
        from headwater.report.figures import line_figure

        generator = torch.Generator().manual_seed(self.seed + 3)
        drawn = policy.sample(torch.empty(_DRAWS, 0), NO_EXPLORATION, generator)
        points = torch.as_tensor(policy.objects(drawn)).double()
        middles = (np.arange(_CELLS) + 0.5) / _CELLS
        figures = []
        for axis in range(min(self.dimensions, _MOST_AXES)):
            share = torch.histc(points[:, axis], _CELLS, 0, 1) / len(points)
            curves = {"learned": (middles, share.numpy())}
            if self.function is None:
                curves["true"] = (middles, self._ring_marginal(middles))
            figures.append(line_figure(curves, x_label=f"coordinate {axis + 1}", title=f"Coordinate {axis + 1}"))
        html = "".join(f"<figure>{figure}</figure>" for figure in figures)
        words = f"Shares of {_DRAWS:,} draws in {_CELLS} cells along each axis."
        return Section("Learned distribution, axis by axis", f'<p>{words}</p><div class="figures">{html}</div>')

    def _ring_marginal(self, x: Sequence[float] | np.ndarray) -> np.ndarray:
        away, others = np.abs(np.asarray(x) - 0.5), self.dimensions - 1
        plateau, mode = self.r1 * 0.5**others * (away > 0.25), self.r2 * 0.2**others * ((away > 0.3) & (away < 0.4))
        return (self.r0 + plateau + mode) / math.exp(self.exact_log_z() or 0.0) / _CELLS
