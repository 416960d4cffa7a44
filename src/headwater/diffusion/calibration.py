"""Whether a posterior sampler is right about its own uncertainty, over many measurements: simulation-based calibration
(Talts et al. 2018, arXiv 1804.06788), coverage by random points (TARP: Lemos et al. 2023, arXiv 2302.03026) and
chi-squared. Each comes with what a right sampler would show.

Truths are drawn from the prior, a measurement from each, and posterior draws from each measurement.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

_KOLMOGOROV_MEAN = math.sqrt(math.pi / 2) * math.log(2)  # of the limit of sqrt(M) times the largest difference


@dataclass(frozen=True)
class Coverage:
    """level: `[L]`, from 0 to 1. coverage: `[L]`, the share of truths within each level's region. deviation: `[L]`, of
    a right sampler's coverage around the level. largest, largest_expected: the largest difference, and its mean for a
    right sampler.
    """

    level: Tensor
    coverage: Tensor
    deviation: Tensor
    largest: float
    largest_expected: float


def coverage(truth: Tensor, draws: Tensor, reference: Tensor, generator: torch.Generator, levels: int = 50) -> Coverage:
    """Expected coverage of balls around random points. truth: `[M, *shape]`. draws: `[M, S, *shape]`, S posterior draws
    of each measurement. reference: `[M, *shape]`, points drawn without looking at the truth, but with an eye to the
    measurement (such as a draw of any posterior, or of the exact one): around points that do not depend on it even a
    sampler that ignores all measurements is covered rightly.

    The ball that reaches as far as the truth holds a share of the draws that is uniform, if these are right; where
    draws are as far as the truth it is drawn (`generator`).
    """
    count, size = _sizes(truth, draws)
    if reference.shape != truth.shape:
        raise ValueError(f"reference has shape {tuple(reference.shape)}: must have the truths' {tuple(truth.shape)}")
    centre = reference.flatten(1).double()
    to_truth = (truth.flatten(1).double() - centre).norm(dim=1)
    to_draws = (draws.flatten(2).double() - centre[:, None]).norm(dim=2)
    rank = _rank(to_truth[:, None], to_draws[..., None], generator)[:, 0]
    # spread over its own step: uniform then exactly, and not only on a grid of S + 1 numbers
    share = (rank + torch.rand(count, generator=generator, dtype=torch.float64)) / (size + 1)
    level = torch.linspace(0, 1, levels + 1, dtype=torch.float64)
    covered = (share[:, None] < level).double().mean(0)
    ordered, position = share.sort().values, torch.arange(count, dtype=torch.float64)
    largest = torch.maximum((position + 1) / count - ordered, ordered - position / count).max()
    expected = _KOLMOGOROV_MEAN / (math.sqrt(count) + 0.12 + 0.11 / math.sqrt(count))  # Stephens 1970
    return Coverage(level, covered, (level * (1 - level) / count).sqrt(), float(largest), expected)


@dataclass(frozen=True)
class Calibration:
    """Of F functions of the objects. rank: `[M, F]`, draws below the truth, from 0 to S, uniform for a right sampler.
    chi_squared: `[F]`, of the ranks over equal bins, with `freedom` degrees of freedom. p_value: `[F]`.
    """

    rank: Tensor
    chi_squared: Tensor
    freedom: int
    p_value: Tensor


def calibration(truth: Tensor, draws: Tensor, generator: torch.Generator, bins: int = 10) -> Calibration:
    """Ranks of M truths `[M, F]` among S posterior draws each, `[M, S, F]`, given by F functions of them (such as their
    coordinates); `generator` breaks ties. The bins must divide S + 1, or equal ones cannot be had."""
    count, size = _sizes(truth, draws)
    if bins < 2 or (size + 1) % bins:
        raise ValueError(f"bins = {bins}: must be at least 2 and divide {size + 1}, the draws and 1")
    rank = _rank(truth.double(), draws.double(), generator)
    bin_of = rank * bins // (size + 1)
    held = torch.stack([(bin_of == each).sum(0) for each in range(bins)]).double()
    expected = count / bins
    chi_squared = ((held - expected).square() / expected).sum(0)
    freedom = bins - 1
    half = torch.full_like(chi_squared, freedom / 2)
    return Calibration(rank, chi_squared, freedom, torch.special.gammaincc(half, chi_squared / 2))


def chi_squared_per_degree(
    draws: Tensor, operator: Callable[[Tensor], Tensor], measurement: Tensor, deviation: float
) -> Tensor:
    """Of draws `[N, *shape]`, the mean squared residual of the measurement over its noise: float64 `[N]`.

    measurement: `[C]`, or `[N, C]` with one for each draw. With truths from the prior, a measurement of each and
    posterior draws of these, its mean is 1 for a right sampler; for one measurement it may be below, and the exact
    posterior's own must be compared with.
    """
    if not deviation > 0:
        raise ValueError(f"deviation = {deviation}: must be above 0")
    away = operator(draws).flatten(1).double() - measurement.double().view(-1, measurement.shape[-1])
    return (away / deviation).square().mean(1)


def _rank(truth: Tensor, draws: Tensor, generator: torch.Generator) -> Tensor:
    """How many of `[M, S, F]` are below `[M, F]`, and of those that are equal a random number: `[M, F]`."""
    below = (draws < truth[:, None]).sum(1)
    equal = (draws == truth[:, None]).sum(1)
    part = torch.rand(equal.shape, generator=generator, dtype=torch.float64).to(equal.device) * (equal + 1)
    return below + part.long().clamp(max=equal)


def _sizes(truth: Tensor, draws: Tensor) -> tuple[int, int]:
    if draws.ndim != truth.ndim + 1 or draws.shape[:1] + draws.shape[2:] != truth.shape or not draws.numel():
        raise ValueError(f"draws have shape {tuple(draws.shape)}: must be [M, S, ...] for truths {tuple(truth.shape)}")
    return draws.shape[0], draws.shape[1]
