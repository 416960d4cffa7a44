"""The settings of a likelihood, and the likelihood that they name: what is known of an object, in the data's units."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal, NamedTuple, cast, get_args

import torch
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

    def measured(self, operator: Operator, units: Units, y: Tensor | None = None) -> Measured:
        """Of a measurement y `[1, *operator.measured]` in the units of the data, or of those that come with the
        conditions. Raises ValueError where y makes no sense."""
        shift = torch.zeros(operator.measured)
        if self.name == "gaussian" and operator.is_linear:  # what the offset comes to is known: the rest stays linear
            shift = operator(torch.full((1, *operator.shape), units.offset))[0]
            units = Units(0.0, units.factor)
        own = operator if units == Units() else OfUnits(operator, units)
        known = None if y is None else y - shift
        if self.name == "gaussian":
            return Measured(GaussianLikelihood(own, self.noise, known), shift)
        return Measured(PoissonLikelihood(own, self.gain, self.background, known), shift)

    def likelihood(self, measured: Measured | None, units: Units) -> Likelihood:
        """Of a prior's own objects. Raises ValueError where nothing is known of them, RewardError where the function
        cannot be loaded."""
        parts: list[Likelihood] = [measured.likelihood] if measured is not None else []
        if self.function is not None:
            function = cast("LogFunction", load_function(self.function, "likelihood.function"))
            parts.append(FunctionLikelihood(function if units == Units() else lambda x: function(units.of_data(x))))
        if not parts:
            raise ValueError(
                "nothing is known of the objects: give a measurement, or likelihood.function as module:function"
            )
        whole = parts[0] if len(parts) == 1 else Product(parts)
        return whole if self.beta == 1 else Tempered(whole, self.beta)


class Measured(NamedTuple):
    """likelihood: of a prior's own objects, and of y - shift. shift: `[*operator.measured]`."""

    likelihood: MeasurementLikelihood
    shift: Tensor


class OfUnits(Operator):
    """What an operator in the units of the data says of a prior's own objects."""

    def __init__(self, operator: Operator, units: Units) -> None:
        super().__init__(operator.shape, operator.measured)
        self.operator, self.units = operator, units
        self.is_linear = operator.is_linear and not units.offset

    def compute(self, x: Tensor) -> Tensor:
        return self.operator(self.units.of_data(x))
