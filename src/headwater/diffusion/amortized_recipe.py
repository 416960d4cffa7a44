"""The recipe `amortized`: one sampler q(x | y) of the posteriors under all measurements y at once, learned from objects
that a diffusion prior draws and measurements simulated of them.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from functools import cached_property, lru_cache
from typing import ClassVar

import torch
from torch import Tensor, nn

from headwater.diffusion.calibration import coverage
from headwater.diffusion.likelihood_settings import Measured
from headwater.diffusion.likelihoods import MeasurementLikelihood
from headwater.diffusion.policy import DiffusionPolicy
from headwater.diffusion.posterior_recipe import PosteriorRecipe
from headwater.diffusion.simulated import FromPairs, Pairs
from headwater.evaluation import log_ratios
from headwater.objectives import Objective
from headwater.recipes.base import Problem
from headwater.runs import Run
from headwater.sampler import Sampler
from headwater.training import Training

_MEASUREMENTS, _EACH = 100, 50
"""Measurements, and draws of each, that calibration is measured on."""
_WIDTH = 64


@dataclass(frozen=True)
class AmortizedRecipe(PosteriorRecipe):
    """Learn to draw from the posteriors under all measurements at once.

    --prior runs/digits --operator inpaint --operator.rows 0:4. Nothing needs to be measured: objects are drawn from the
    prior, and measurements of them simulated. Samples are of --measurement, or else of a simulated one; from Python of
    any: Sampler.load(run).sample(1000, condition=y.flatten().tolist()).
    """

    summary: ClassVar[str] = "draw from a diffusion prior times a likelihood, for all measurements at once"

    simulations: int = 10_000
    """Pairs of an object and its measurement that are learned from."""
    objective: Objective = field(default_factory=lambda: Objective("vargrad", penalty="huber", delta=3.0))
    """What to balance: vargrad within groups of one measurement; tb learns log Z as a function of it."""
    training: Training = field(
        default_factory=lambda: Training(
            iterations=2000, batch_size=64, group_size=4, learning_rate=1e-3, clip_gradient=1.0, log_every=20,
            evaluate_every=500, checkpoint_every=500,
        )
    )  # fmt: skip
    """How long and how fast to learn. In each group one chain is walked back from the object that was measured."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.simulations < 1:
            raise ValueError(f"simulations = {self.simulations}: must be at least 1")
        if self.training.group_size < 2:
            raise ValueError(
                f"training.group_size = {self.training.group_size}: chains of one measurement are compared, at least 2"
            )
        if self.annealing.at(0.0) != 1 or self.likelihood.beta != 1 or self.likelihood.function is not None:
            raise ValueError(
                "annealing, likelihood.beta and likelihood.function: not for all measurements at once, simulated "
                "by the prior and the noise alone"
            )

    @cached_property
    def measured(self) -> Measured:
        """The likelihood of measurements that come with the conditions."""
        return self.likelihood.measured(self.forward, self.given.units)

    @property
    def measured_likelihood(self) -> MeasurementLikelihood:
        found = super().measured_likelihood
        assert found is not None
        return found

    @cached_property
    def pairs(self) -> Pairs:
        """What is learned from: the same at every start."""
        return self._simulated(self.simulations, self.seed)

    def _simulated(self, count: int, seed: int) -> Pairs:
        return _simulated(self, count, seed)

    @cached_property
    def _asked(self) -> tuple[Tensor, Tensor | None]:
        """The measurement that samples are of, as a condition row `[1, C]`; and its object in the prior's own numbers,
        if it was simulated."""
        if self.measurement is not None:
            assert self.y is not None
            return (self.y - self.measured.shift).flatten(1), None
        pair = self._simulated(1, self.seed + 1)
        return pair.measurement, pair.objects

    @property
    def shown_measurement(self) -> Tensor:
        return self._asked[0].view(1, *self.forward.measured) + self.measured.shift

    @cached_property
    def true_object(self) -> Tensor | None:
        made = self._asked[1]
        return super().true_object if made is None else self.in_units(made)[0]

    def default_condition(self) -> Tensor:
        return self._asked[0]

    def problem(self) -> Problem:
        pairs = self.pairs
        log_z = None
        if self.objective.name == "tb":
            log_z = nn.Sequential(nn.Linear(pairs.size, _WIDTH), nn.SiLU(), nn.Linear(_WIDTH, 1))
        policy = self.policy(self._denoiser(pairs.size, pairs.measurement), log_z)
        return Problem(policy, self.target, pairs, FromPairs.of(pairs))

    def evaluation(self, run: Run, sampler: Sampler) -> dict[str, object]:
        """Of the measurement that samples are of; and over simulated measurements that were not learned from, how well
        balls around random draws of the posterior cover the object, and what the weights say of log Z."""
        figures = super().evaluation(run, sampler)
        policy, generator = sampler.problem.policy, torch.Generator().manual_seed(self.seed + 3)
        assert isinstance(policy, DiffusionPolicy)
        fresh = self._simulated(_MEASUREMENTS, self.seed + 2)
        rows = fresh.measurement.repeat_interleave(_EACH + 1, 0)
        paths = policy.sample(rows, generator=generator)
        objects = policy.objects(paths)
        assert isinstance(objects, Tensor)
        weight = self.target(objects, rows.to(objects.device)).double() - log_ratios(policy, paths)
        weight = weight.view(_MEASUREMENTS, _EACH + 1)
        drawn = objects.cpu().view(_MEASUREMENTS, _EACH + 1, *objects.shape[1:])
        covered = coverage(fresh.objects, drawn[:, 1:], drawn[:, 0], generator)
        estimate = weight.logsumexp(1) - math.log(_EACH + 1)
        return figures | {
            "measurements": _MEASUREMENTS,
            "coverage_largest": covered.largest,
            "coverage_largest_expected": covered.largest_expected,
            "mean_gap": float((estimate - weight.mean(1)).mean()),
            "mean_effective_sample_size": float((1 / weight.softmax(1).square().sum(1) / (_EACH + 1)).mean()),
        }


@lru_cache(maxsize=8)
def _simulated(recipe: AmortizedRecipe, count: int, seed: int) -> Pairs:
    """Kept for recipes of the same settings: a run is loaded anew to be sampled, evaluated and reported."""
    generator = torch.Generator().manual_seed(seed)
    return Pairs.simulated(recipe.given, recipe.measured_likelihood, count, generator)
