"""The settings of a likelihood, and the likelihood that they name: what is known of an object, in the data's units."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal, cast, get_args

from torch import Tensor

from headwater.diffusion.likelihoods import (
    FunctionLikelihood,
    GaussianLikelihood,
    Likelihood,
    LogFunction,
    MeasurementLikelihood,
    PoissonLikelihood,
    Product,
    Tempered,
)
from headwater.diffusion.operators import Operator
from headwater.diffusion.priors import Units
from headwater.reward_worker import load_function

Noise = Literal["gaussian", "poisson"]


@dataclass(frozen=True)
class LikelihoodSettings:
    """What is known of an object, besides the prior."""

    name: Noise = "gaussian"
    """Of a measurement. gaussian: noise of one deviation. poisson: counts."""
    noise: float = 0.1
    """gaussian: the deviation of a measured value, in the units of the data."""
    gain: float = 1.0
    """poisson: expected counts of an operator's value 1."""
    background: float = 0.0
    """poisson: expected counts of an operator's value 0."""
    function: str | None = None
    """log r, a function of yours as module:function: a tensor [N, ...] of objects in the units of the data in, a tensor
    [N] out. Instead of a measurement, or besides it."""
    beta: float = 1.0
    """The power of all this: below 1 it counts less than it says, above 1 more."""

    def __post_init__(self) -> None:
        if self.name not in get_args(Noise):
            raise ValueError(f"likelihood.name = {self.name!r}: must be one of {', '.join(get_args(Noise))}")
        for name in ("noise", "gain", "beta"):
            if not 0 < getattr(self, name) < math.inf:
                raise ValueError(f"likelihood.{name} = {getattr(self, name)}: must be above 0 and finite")
        if not 0 <= self.background < math.inf:
            raise ValueError(f"likelihood.background = {self.background}: must be at least 0 and finite")

    def measured(self, operator: Operator, y: Tensor | None) -> MeasurementLikelihood:
        """Of a measurement y `[1, *operator.measured]`, or of those that come with the conditions. Raises ValueError
        where y makes no sense."""
        if self.name == "gaussian":
            return GaussianLikelihood(operator, self.noise, y)
        return PoissonLikelihood(operator, self.gain, self.background, y)

    def likelihood(self, measured: MeasurementLikelihood | None, units: Units) -> Likelihood:
        """Of a prior's own objects. Raises ValueError where nothing is known of them, RewardError where the function
        cannot be loaded."""
        parts: list[Likelihood] = [measured] if measured is not None else []
        if self.function is not None:
            parts.append(FunctionLikelihood(cast("LogFunction", load_function(self.function, "likelihood.function"))))
        if not parts:
            raise ValueError(
                "nothing is known of the objects: give a measurement, or likelihood.function as module:function, or "
                "learn for all measurements at once with --amortized"
            )
        whole = parts[0] if len(parts) == 1 else Product(parts)
        if self.beta != 1:
            whole = Tempered(whole, self.beta)
        return whole if units == Units() else InUnits(whole, units)


class InUnits(Likelihood):
    """A likelihood of objects in the units of the data, asked about objects in a prior's own numbers."""

    def __init__(self, likelihood: Likelihood, units: Units) -> None:
        self.likelihood, self.units = likelihood, units
        self.condition_size = likelihood.condition_size

    def compute(self, x: Tensor, condition: Tensor) -> Tensor:
        return self.likelihood.log_prob(self.units.of_data(x), condition)
