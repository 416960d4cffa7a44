"""Targets that the literature compares samplers on, each with exact draws and its exact log Z: nine of twenty-five
Gaussians, mixtures on a lattice under a linear measurement, Neal's funnel and many double wells.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import cached_property
from typing import Protocol

import torch
from torch import Tensor

from headwater.diffusion.mixtures import GaussianMixture
from headwater.environments.base import Objects
from headwater.reward import Reward

_NINE = {
    (-10, -5): 4, (-5, -10): 10, (-5, 0): 4, (10, -5): 5, (0, 0): 10, (0, 5): 5, (5, -5): 4, (5, 0): 15, (5, 10): 4,
}  # fmt: skip
_HALF_LOG_TWO_PI = 0.5 * math.log(2 * math.pi)


def twenty_five() -> GaussianMixture:
    """25 equal Gaussians of variance 0.3 at {-10, -5, 0, 5, 10}^2."""
    axis = torch.arange(-10.0, 11.0, 5.0)
    return GaussianMixture.of(torch.ones(25), torch.cartesian_prod(axis, axis), 0.3)


def nine_of_twenty_five() -> GaussianMixture:
    """The same with unequal weights of nine and none of the others, the posterior of relative trajectory balance's
    first experiment (Venkatraman et al. 2024, arXiv 2405.20971, appendix C.1). Its likelihood is
    `DensityRatio(nine, twenty_five)`, with log Z = 0.
    """
    mean = twenty_five().mean
    weight = torch.tensor([_NINE.get((round(x), round(y)), 0) for x, y in mean.tolist()]).double()
    return GaussianMixture.of(weight, mean, 0.3)


@dataclass(frozen=True)
class DensityRatio:
    """The reward r(x) = target(x) / prior(x), of which prior times r is the target, with log Z = 0."""

    target: GaussianMixture
    prior: GaussianMixture

    def __call__(self, objects: Objects, condition: Tensor) -> Tensor:
        points = torch.as_tensor(objects)
        return (self.target.log_prob(points) - self.prior.log_prob(points)).float()


def lattice(dimensions: int, generator: torch.Generator, spacing: float = 8.0) -> GaussianMixture:
    """25 Gaussians of variance 1 at spacing (i, j, i, j, ...), i and j from -2 to 2, with weights that are chi-squared
    numbers (Cardoso et al. 2023, arXiv 2308.07983, section 4)."""
    if dimensions < 2 or dimensions % 2:
        raise ValueError(f"dimensions = {dimensions}: must be even and above 0")
    axis = torch.arange(-2.0, 3.0) * spacing
    mean = torch.cartesian_prod(axis, axis).repeat(1, dimensions // 2)
    return GaussianMixture.of(torch.randn(25, generator=generator).square(), mean, 1.0)


def random_measurement(dimensions: int, measured: int, generator: torch.Generator) -> tuple[Tensor, float]:
    """A matrix `[measured, dimensions]` with random singular vectors and uniform singular values, and the deviation of
    the noise, uniform below the largest of them: the measurements of Cardoso et al. 2023."""
    if not 0 < measured <= dimensions:
        raise ValueError(f"measured = {measured}: must be from 1 to {dimensions}, the dimensions")
    left, _, right = torch.linalg.svd(torch.randn(measured, dimensions, generator=generator), full_matrices=False)
    values = torch.rand(measured, generator=generator)
    return left * values @ right, float(values.max() * torch.rand((), generator=generator))


class Energy(Protocol):
    """An unnormalised density of which log Z is known, and exact draws are to be had: a Reward too."""

    @property
    def dimensions(self) -> int: ...
    @property
    def log_z(self) -> float:
        """Logarithm of its integral."""

    def __call__(self, objects: Objects, condition: Tensor) -> Tensor:
        """Its logarithm at points `[N, d]`: float32 `[N]`."""

    def sample(self, count: int, generator: torch.Generator) -> Tensor:
        """Exact draws: float32 `[count, d]`."""


@dataclass(frozen=True)
class Funnel:
    """x_0 normal, of deviation `first`, and the others normal of variance exp(x_0) (Neal 2003, Slice sampling, section
    8, with 3; the samplers of arXiv 2402.05098 are compared with 1, in 10 dimensions).
    """

    dimensions: int = 10
    first: float = 1.0

    def __post_init__(self) -> None:
        if self.dimensions < 2:
            raise ValueError(f"dimensions = {self.dimensions}: must be at least 2")
        if not 0 < self.first < math.inf:
            raise ValueError(f"first = {self.first}: must be above 0")

    @property
    def log_z(self) -> float:
        return 0.0

    def __call__(self, objects: Objects, condition: Tensor) -> Tensor:
        x = torch.as_tensor(objects).double()
        first, others = x[:, 0], x[:, 1:]
        neck = -0.5 * (first / self.first).square() - math.log(self.first)
        rest = -0.5 * (others.square().sum(1) * (-first).exp() + others.shape[1] * first)
        return (neck + rest - self.dimensions * _HALF_LOG_TWO_PI).float()

    def sample(self, count: int, generator: torch.Generator) -> Tensor:
        normal = torch.randn(count, self.dimensions, generator=generator, dtype=torch.float64)
        first = self.first * normal[:, :1]
        return torch.cat((first, normal[:, 1:] * (first / 2).exp()), 1).float()


@dataclass(frozen=True)
class ManyWell:
    """`pairs` independent pairs of a double well, log density -x^4 + 6 x^2 + x / 2, and a standard normal without its
    constant (Noe et al. 2019; 16 pairs: Midgley et al. 2023, arXiv 2208.01893): 2^pairs modes of unequal weight.
    """

    pairs: int = 16

    def __post_init__(self) -> None:
        if self.pairs < 1:
            raise ValueError(f"pairs = {self.pairs}: must be at least 1")

    @property
    def dimensions(self) -> int:
        return 2 * self.pairs

    @property
    def log_z(self) -> float:
        axis, _ = self._cumulative
        step = float(axis[1] - axis[0])
        return self.pairs * (float(_well(axis).logsumexp(0)) + math.log(step) + _HALF_LOG_TWO_PI)

    @property
    def right(self) -> float:
        """Probability of the right one of a pair's two wells."""
        axis, cumulative = self._cumulative
        return 1 - float(cumulative[axis < 0][-1])

    def __call__(self, objects: Objects, condition: Tensor) -> Tensor:
        x = torch.as_tensor(objects).double()
        return (_well(x[:, 0::2]).sum(1) - 0.5 * x[:, 1::2].square().sum(1)).float()

    def sample(self, count: int, generator: torch.Generator) -> Tensor:
        """By the inverse of the cumulative distribution on a grid of width 1e-4, uniform within its cells."""
        axis, cumulative = self._cumulative
        uniform, within = torch.rand(2, count, self.pairs, generator=generator, dtype=torch.float64)
        cell = torch.searchsorted(cumulative, uniform.contiguous()).clamp(max=len(axis) - 1)
        wells = axis[cell] + (within - 0.5) * (axis[1] - axis[0])
        normal = torch.randn(count, self.pairs, generator=generator, dtype=torch.float64)
        return torch.stack((wells, normal), 2).flatten(1).float()

    @cached_property
    def _cumulative(self) -> tuple[Tensor, Tensor]:
        """Midpoints of cells, and the probability of all up to each; beyond 5 in size there are e^-450 of it."""
        axis = torch.linspace(-5, 5, 100_001, dtype=torch.float64)[:-1] + 5e-5
        return axis, _well(axis).softmax(0).cumsum(0)


@dataclass(frozen=True)
class OverNormal:
    """The reward that makes the target of a prior N(0, variance): its density over that. With a `BrownianProcess` of
    that variance and no drift as the prior, which ends there exactly, a sampler needs the energy alone, and log Z is
    the energy's own (path integral samplers: Zhang & Chen 2022, arXiv 2111.15141).
    """

    energy: Reward
    variance: float

    def __post_init__(self) -> None:
        if not self.variance > 0:
            raise ValueError(f"variance = {self.variance}: must be above 0")

    def __call__(self, objects: Objects, condition: Tensor) -> Tensor:
        x = torch.as_tensor(objects).double()
        constant = x.shape[1] * (_HALF_LOG_TWO_PI + 0.5 * math.log(self.variance))
        reference = -0.5 * x.square().sum(1) / self.variance - constant
        return (self.energy(objects, condition).double() - reference).float()


def _well(x: Tensor) -> Tensor:
    return -x.pow(4) + 6 * x.square() + 0.5 * x
