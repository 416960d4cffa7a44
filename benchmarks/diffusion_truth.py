"""What a posterior without a closed form is: on a grid in a few dimensions, and by importance sampling from Gaussians
at all of its modes in more, each with its own error.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from headwater.diffusion.estimators import resample, resampling_estimates

LogDensity = Callable[[Tensor], Tensor]
"""Of points `[N, d]`, without its constant, differentiable: float64 `[N]`."""


@dataclass(frozen=True)
class Truth:
    """draws: as good as exact, all weighing alike, `[M, d]`. log_z, log_z_error: of the density's integral.
    effective_sample_size, pareto_k: of the weights behind them, NaN for a grid."""

    draws: Tensor
    log_z: float
    log_z_error: float
    effective_sample_size: float
    pareto_k: float


def by_grid(
    log_density: LogDensity, low: float, high: float, size: int, dimensions: int, count: int, seed: int
) -> Truth:
    """On `size`^d cells of a cube, d at most 3: draws are uniform within a cell drawn by the density at its middle. The
    error of log Z is how much it changes on a grid of half as many cells a side."""
    generator = torch.Generator().manual_seed(seed)

    def on(size: int) -> tuple[Tensor, Tensor, float]:
        axis = (torch.arange(size, dtype=torch.float64) + 0.5) / size * (high - low) + low
        points = torch.cartesian_prod(*[axis] * dimensions)
        values = torch.cat([log_density(part.float()).detach() for part in points.split(100_000)])
        return points, values, float(values.logsumexp(0)) + dimensions * math.log((high - low) / size)

    points, values, log_z = on(size)
    chosen = torch.multinomial(values.softmax(0), count, replacement=True, generator=generator)
    within = torch.rand(count, dimensions, generator=generator, dtype=torch.float64) - 0.5
    drawn = points[chosen] + within * (high - low) / size
    return Truth(drawn.float(), log_z, abs(log_z - on(size // 2)[2]), math.nan, math.nan)


def by_modes(log_density: LogDensity, starts: Tensor, number: int, count: int, seed: int, wider: float = 1.1) -> Truth:
    """Importance sampling of `number` draws from a mixture of Gaussians, one at each mode that is found uphill from
    `starts` `[S, d]`, with the curvature there, `wider` times the deviation, and its Laplace approximation as weight;
    `count` draws are resampled of them."""
    generator = torch.Generator().manual_seed(seed)
    modes, height, scale = modes_from(log_density, starts)
    half = torch.linalg.cholesky(scale) * wider
    log_determinant = half.diagonal(dim1=1, dim2=2).log().sum(1)
    share = (height + log_determinant).softmax(0)
    chosen = torch.multinomial(share, number, replacement=True, generator=generator)
    noise = torch.randn(number, starts.shape[1], generator=generator, dtype=torch.float64)
    x = modes[chosen] + (half[chosen] @ noise[..., None])[..., 0]
    of_each = []
    for log_share, mode, root, log_det in zip(share.log(), modes, half, log_determinant, strict=True):
        away = torch.linalg.solve_triangular(root, (x - mode).T, upper=False).T
        constant = 0.5 * starts.shape[1] * math.log(2 * math.pi)
        of_each.append(log_share - 0.5 * away.square().sum(1) - log_det - constant)
    proposed = torch.stack(of_each).logsumexp(0)
    values = torch.cat([log_density(part.float()).detach() for part in x.split(20_000)])
    found = resampling_estimates(values - proposed)
    kept = x[resample(values - proposed, count, generator)]
    return Truth(kept.float(), found.log_z, found.log_z_error, found.effective_sample_size, found.pareto_k)


def modes_from(log_density: LogDensity, starts: Tensor, steps: int = 100) -> tuple[Tensor, Tensor, Tensor]:
    """The different modes uphill from `starts`: where they are `[M, d]`, their height `[M]` and the inverse of the
    curvature there `[M, d, d]`. By Newton's method on a curvature that is made positive, halving steps that do not
    climb; those 30 nats below the best are left out."""
    x = starts.double()
    value, slope, curvature = _around(log_density, x)
    for _ in range(steps):
        spectrum, basis = torch.linalg.eigh(curvature)
        along = (slope[:, None] @ basis)[:, 0] / spectrum.abs().clamp(min=1e-3)
        step = (along[:, None] @ basis.mT)[:, 0]
        size = torch.ones(len(x), 1, dtype=torch.float64)
        for _ in range(12):
            better = log_density((x + size * step).float()).detach() >= value
            size = torch.where(better[:, None], size, size / 2)
        better = log_density((x + size * step).float()).detach() >= value
        x = torch.where(better[:, None], x + size * step, x)
        value, slope, curvature = _around(log_density, x)
        if float((size * step)[better].abs().amax() if bool(better.any()) else 0) < 1e-4:
            break
    spectrum, basis = torch.linalg.eigh(curvature)
    good = (spectrum[:, 0] > 0) & (value > value.max() - 30)
    x, value, spectrum, basis = x[good], value[good], spectrum[good], basis[good]
    order, kept = value.argsort(descending=True).tolist(), []
    for one in order:
        # of two in one basin the higher stays: the distance is in deviations there
        near = [((x[one] - x[other]) @ basis[other] * spectrum[other].sqrt()).norm() < 1 for other in kept]
        if not any(near):
            kept.append(one)
    basis = basis[kept]
    return x[kept], value[kept], basis / spectrum[kept][:, None] @ basis.mT


def _around(log_density: LogDensity, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Value `[N]`, gradient `[N, d]` and minus the second derivatives `[N, d, d]`, one row of them at a time."""
    here = x.float().requires_grad_()
    value = log_density(here)
    (slope,) = torch.autograd.grad(value.sum(), here, create_graph=True)
    rows = [torch.autograd.grad(slope[:, one].sum(), here, retain_graph=True)[0] for one in range(x.shape[1])]
    curvature = -torch.stack(rows, 1).double()
    return value.detach(), slope.detach().double(), (curvature + curvature.mT) / 2
