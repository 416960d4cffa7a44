"""Mixtures of Gaussians, priors of which everything is known: density, draws, the denoiser at every level of noise, and
the posterior under a linear measurement with Gaussian noise, which is a mixture again (e.g. Cardoso et al. 2023, arXiv
2308.07983, appendix B).

A chain of finitely many steps does not draw from the mixture that its denoiser knows, only nearly: `chains.py` has the
chain's own log Z.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, fields, replace
from functools import partial
from typing import NamedTuple

import torch
from torch import Tensor

from headwater.diffusion.denoisers import Denoiser
from headwater.diffusion.process import BrownianProcess, GaussianProcess, Process

_MOST_NUMBERS = 1 << 21  # of rows times components times dimensions, held at once
_NOTHING = 1e-100  # in the place of a variance of 0, where the distance that it divides is 0 too


class Moments(NamedTuple):
    """Of the data given a noised state: mean and variance of each coordinate, float64 `[N, d]` both."""

    mean: Tensor
    variance: Tensor


@dataclass(frozen=True, eq=False)
class GaussianMixture:
    """K Gaussians in d dimensions, all in double precision, unless `to` has made it single.

    log_weight: `[K]`, normalised. mean: `[K, d]`. variance: above 0, `[K, d]`, or `[1, d]` where all share one, along
    the columns of the orthonormal `basis`, `[K, d, d]` or `[1, d, d]`; None for the coordinate axes. Noise of one
    variance in all directions only adds to `variance`.

    Points are `[N, *shape]` with d numbers each.
    """

    log_weight: Tensor
    mean: Tensor
    variance: Tensor
    basis: Tensor | None = None

    def __post_init__(self) -> None:
        count, dimensions = self.mean.shape
        expected = {"log_weight": ((count,),), "variance": ((count, dimensions), (1, dimensions))}
        if self.basis is not None:
            expected["basis"] = ((count, dimensions, dimensions), (1, dimensions, dimensions))
        for name, shapes in expected.items():
            shape = tuple(getattr(self, name).shape)
            if shape not in shapes:
                raise ValueError(f"{name} has shape {shape}: must be {' or '.join(map(str, shapes))}")
        for name in ("mean", "variance"):
            if not bool(getattr(self, name).isfinite().all()):
                raise ValueError(f"{name}: not finite")
        if not float(self.variance.min()) > 0:
            raise ValueError(f"variance = {float(self.variance.min()):g}: must be above 0")

    @staticmethod
    def of(weight: Tensor, mean: Tensor, variance: float | Tensor) -> GaussianMixture:
        """weight: `[K]`, not negative, of any sum. mean: `[K, d]`. variance: one for all; or `[K]`, one for each
        component; or `[K, d]`, one for each coordinate of it."""
        if bool((weight < 0).any()) or not float(weight.sum()) > 0:
            raise ValueError("weight: must not be negative, and some must be above 0")
        width = torch.as_tensor(variance).double()
        if width.ndim < 2:
            width = width.view(-1, 1).expand(-1, mean.shape[1])
        log_weight = weight.double().log()
        return GaussianMixture(log_weight - log_weight.logsumexp(0), mean.double(), width)

    def __len__(self) -> int:
        return len(self.mean)

    @property
    def dimensions(self) -> int:
        """d."""
        return self.mean.shape[1]

    @property
    def weight(self) -> Tensor:
        """`[K]`, with sum 1."""
        return self.log_weight.exp()

    def to(self, where: torch.device | str | torch.dtype) -> GaussianMixture:
        """The same mixture on another device, or in another precision: in single precision a denoiser of many
        components is about three times as fast."""
        columns = (getattr(self, field.name) for field in fields(self))
        return GaussianMixture(*(None if column is None else column.to(where) for column in columns))  # type: ignore[arg-type]

    def noised(self, alpha: float, sigma: float) -> GaussianMixture:
        """The law of alpha x + sigma noise: of a chain's ends, with those of its last grid point."""
        return replace(self, mean=alpha * self.mean, variance=alpha**2 * self.variance + sigma**2)

    def sample(self, count: int, generator: torch.Generator) -> Tensor:
        """Exact draws: float32 `[count, d]`."""
        chosen = torch.multinomial(self.weight, count, replacement=True, generator=generator)
        width = self.variance.expand_as(self.mean)[chosen].sqrt()
        away = width * torch.randn(width.shape, generator=generator, dtype=torch.float64, device=width.device)
        if self.basis is not None and len(self.basis) == 1:
            away = away @ self.basis[0].mT
        elif self.basis is not None:
            away = _in_parts(partial(_turned_each, away, self.basis, chosen), count, self.dimensions**2)
        return (self.mean[chosen] + away).float()

    def log_prob(self, points: Tensor) -> Tensor:
        """Log-density: float64 `[N]`."""
        return self.log_joint(points).logsumexp(1)

    def responsibilities(self, points: Tensor) -> Tensor:
        """The probability of each component given a point: float64 `[N, K]`. Of a posterior's points, those of the
        prior's components average to the posterior's own weights: no measurement says more of a component than the
        point does."""
        return self.log_joint(points).softmax(1)

    def log_joint(self, points: Tensor, alpha: Tensor | None = None, sigma: Tensor | None = None) -> Tensor:
        """Log of weight times density of each component, at points alpha x + sigma noise: float64 `[N, K]`. alpha,
        sigma: `[N]`, 1 and 0 if not given."""
        points, alpha, sigma = self._noised(points, alpha, sigma)
        if self._shares:
            return self._shared(points, alpha, sigma)[0]
        size = self.mean.numel()
        return _in_parts(lambda rows: self._each(points[rows], alpha[rows], sigma[rows])[0], len(points), size)

    def denoised(self, points: Tensor, alpha: Tensor, sigma: Tensor) -> Tensor:
        """The mean of x given alpha x + sigma noise: float64 `[N, d]`. alpha, sigma: `[N]`."""
        points, alpha, sigma = self._noised(points, alpha, sigma)
        if self._shares:
            return self._shared(points, alpha, sigma)[1]

        def part(rows: slice) -> Tensor:
            log_joint, means, _ = self._each(points[rows], alpha[rows], sigma[rows])
            return torch.einsum("nk,nkd->nd", log_joint.softmax(1), means)

        return _in_parts(part, len(points), self.mean.numel())

    def moments(self, points: Tensor, alpha: Tensor, sigma: Tensor) -> Moments:
        """Mean and variance of each coordinate of x given alpha x + sigma noise. alpha, sigma: `[N]`."""
        points, alpha, sigma = self._noised(points, alpha, sigma)
        if self._shares:
            log_joint, mean = self._shared(points, alpha, sigma)
            return Moments(mean, self._shared_variance(log_joint.softmax(1), alpha, sigma))

        def part(rows: slice) -> Tensor:
            log_joint, means, variances = self._each(points[rows], alpha[rows], sigma[rows])
            share = log_joint.softmax(1)
            mean = torch.einsum("nk,nkd->nd", share, means)
            within = torch.einsum("nk,nkd->nd", share, variances.expand_as(means))
            between = torch.einsum("nk,nkd->nd", share, (means - mean[:, None]).square())
            return torch.stack((mean, within + between), 1)

        both = _in_parts(part, len(points), self.mean.numel())
        return Moments(both[:, 0], both[:, 1])

    def measured(self, matrix: Tensor, deviation: float) -> GaussianMixture:
        """The law of y = matrix x + deviation noise, matrix `[C, d]`: a mixture in C dimensions."""
        matrix = self._fitting(matrix, deviation)
        root = self.variance.sqrt()[:, None, :]
        half = matrix * root if self.basis is None else matrix @ self.basis * root  # `[K or 1, C, d]`
        spread, basis = torch.linalg.eigh(half @ half.mT)
        return GaussianMixture(self.log_weight, self.mean @ matrix.mT, spread.clamp(min=0) + deviation**2, basis)

    def log_evidence(self, matrix: Tensor, measurement: Tensor, deviation: float) -> Tensor:
        """log Z(y), the log-density of M measurements `[M, C]`: float64 `[M]`."""
        return self.measured(matrix, deviation).log_prob(measurement)

    def posterior(self, matrix: Tensor, measurement: Tensor, deviation: float) -> GaussianMixture:
        """The law of x given matrix x + deviation noise = measurement, `[C]`: a mixture with full covariances."""
        matrix = self._fitting(matrix, deviation)
        if measurement.shape != matrix.shape[:1] or not bool(measurement.isfinite().all()):
            raise ValueError(f"measurement has shape {tuple(measurement.shape)}: must be {len(matrix)} finite numbers")
        y, seen = measurement.double(), matrix.mT @ matrix / deviation**2
        if self.basis is None:
            precision = torch.diag_embed(1 / self.variance)
            pull = self.mean / self.variance
        else:
            precision = (self.basis / self.variance[:, None, :]) @ self.basis.mT
            pull = (precision @ self.mean[..., None])[..., 0]
        stiffness, basis = torch.linalg.eigh(precision + seen)
        along = (pull + matrix.mT @ y / deviation**2)[:, None, :] @ basis
        mean = (along / stiffness[:, None, :] @ basis.mT)[:, 0]
        log_weight = self.measured(matrix, deviation).log_joint(y[None])[0].log_softmax(0)
        return GaussianMixture(log_weight, mean, 1 / stiffness, basis)

    @property
    def _shares(self) -> bool:
        """Whether all components have one covariance, so that no `[N, K, d]` is needed."""
        return len(self.variance) == 1 and (self.basis is None or len(self.basis) == 1)

    def _shared(self, x: Tensor, alpha: Tensor, sigma: Tensor) -> tuple[Tensor, Tensor]:
        """log_joint and denoised, of one covariance for all."""
        mean = self.mean
        if self.basis is not None:
            x, mean = x @ self.basis[0], mean @ self.basis[0]
        total = (alpha.square() * self.variance + sigma.square()).clamp(min=_NOTHING)
        squares = (x.square() / total).sum(1, True) - 2 * alpha * (x / total) @ mean.mT
        squares = squares + alpha.square() * ((1 / total) @ mean.square().mT)
        normaliser = total.log().sum(1, True) + self.dimensions * math.log(2 * math.pi)
        log_joint = self.log_weight - 0.5 * (squares + normaliser)
        gain = alpha * self.variance / total
        denoised = gain * x + (1 - alpha * gain) * (log_joint.softmax(1) @ mean)
        return log_joint, denoised if self.basis is None else denoised @ self.basis[0].mT

    def _shared_variance(self, share: Tensor, alpha: Tensor, sigma: Tensor) -> Tensor:
        """moments.variance, of one covariance for all and the components' `share`, `[N, K]`: what each has left, and
        how far apart their means are."""
        total = alpha.square() * self.variance + sigma.square()
        left = (self.variance * sigma.square() / total).where(total > 0, self.variance)
        narrowing = left / self.variance
        if self.basis is None:
            apart = share @ self.mean.square() - (share @ self.mean).square()
            return left + narrowing.square() * apart.clamp(min=0)
        basis = self.basis[0]
        mean = self.mean @ basis
        products = (mean[:, :, None] * mean[:, None, :]).flatten(1)

        def part(rows: slice) -> Tensor:
            centre = share[rows] @ mean
            apart = (share[rows] @ products).view(-1, *basis.shape) - centre[:, :, None] * centre[:, None, :]
            turned = basis * narrowing[rows, None, :]
            return ((turned @ apart) * turned).sum(2).clamp(min=0)

        return left @ basis.square().mT + _in_parts(part, len(share), basis.numel())

    def _each(self, x: Tensor, alpha: Tensor, sigma: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """log_joint `[N, K]`, and each component's mean and variance of x, `[N, K, d]`."""
        total = (alpha.square()[..., None] * self.variance + sigma.square()[..., None]).clamp(min=_NOTHING)
        away = x[:, None] - alpha[..., None] * self.mean
        if self.basis is not None:
            away = _turned(away, self.basis)
        squares = (away.square() / total).sum(2) + total.log().sum(2) + self.dimensions * math.log(2 * math.pi)
        shift = alpha[..., None] * self.variance / total * away
        left = self.variance * (sigma.square()[..., None] / total).where(total > _NOTHING, 1.0)
        if self.basis is not None:
            shift = _turned(shift, self.basis.mT)
            left = _turned(left, self.basis.square().mT)
        return self.log_weight - 0.5 * squares, self.mean + shift, left

    def _noised(self, points: Tensor, alpha: Tensor | None, sigma: Tensor | None) -> tuple[Tensor, Tensor, Tensor]:
        """Points `[N, d]` and their levels of noise, `[N, 1]`, in the mixture's precision."""
        x = points.flatten(1).to(self.mean.dtype)
        alpha = x.new_ones(len(x)) if alpha is None else alpha.to(x)
        sigma = x.new_zeros(len(x)) if sigma is None else sigma.to(x)
        return x, alpha[:, None], sigma[:, None]

    def _fitting(self, matrix: Tensor, deviation: float) -> Tensor:
        if matrix.ndim != 2 or matrix.shape[1] != self.dimensions:
            raise ValueError(f"matrix has shape {tuple(matrix.shape)}: must have {self.dimensions} columns")
        if not 0 < deviation < math.inf:
            raise ValueError(f"deviation = {deviation}: must be above 0")
        return matrix.double()


class MixtureDenoiser(Denoiser):
    """The closed-form denoiser of a mixture on a process, in the process' own parametrisation.

    On a Brownian process its prediction is the drift (E[x | x_t] - x_t) / (1 - t) of the motion conditioned to end in
    the mixture (Doob's h-transform): there x_t = t x + sqrt(variance t (1 - t)) noise. With variance = "learned" the
    steps have the variance of each coordinate that fits the true reversal best (Bao et al. 2022, arXiv 2201.06503);
    of a single Gaussian along the coordinate axes they then are its exact reversal, however few.

    of_ends: the mixture is that of the objects that chains end in, and not of data that have the noise of the last grid
    point still to come: of a posterior that is no data with noise.
    """

    def __init__(
        self, mixture: GaussianMixture, process: GaussianProcess | BrownianProcess, of_ends: bool = False
    ) -> None:
        super().__init__()
        self.of_ends = of_ends
        if mixture.dimensions != math.prod(process.shape):
            raise ValueError(f"a mixture in {mixture.dimensions} dimensions for objects of shape {process.shape}")
        self.mixture, self.process = mixture, process

    def forward(self, state: Tensor, time: Tensor, condition: Tensor) -> Tensor:
        """The prediction at states `[N, *shape]`, times `[N]`; conditions are not looked at."""
        process, number = self.process, step_numbers(self.process, time)
        if self.mixture.mean.device != state.device:
            self.mixture = self.mixture.to(state.device)
        if isinstance(process, BrownianProcess):
            passed = number.double() / process.steps
            data = self.mixture.denoised(state, passed, (process.variance * passed * (1 - passed)).sqrt())
            drift = (data - state.flatten(1)) / (1 - passed)[:, None]
            return drift.view(state.shape).to(state.dtype)
        steps = _Steps.of(process, number, self.of_ends)
        if process.variance != "learned":
            mean = self.mixture.denoised(state, steps.alpha, steps.sigma)
        else:
            mean, variance = self.mixture.moments(state, steps.alpha, steps.sigma)
        data = steps.data(mean, state).view(state.shape).to(state.dtype)
        prediction = process.prediction_of(data, state, number)
        if process.variance != "learned":
            return prediction
        deviation = steps.variance(variance).sqrt().view(state.shape)
        return torch.cat((prediction, span_of(process, state, number, deviation)), 1)


def step_numbers(process: Process, time: Tensor) -> Tensor:
    """The steps `[N]` whose time a denoiser is told, `[N]`."""
    times = process.time(torch.arange(process.n_steps, device=time.device))
    return (time[:, None] - times).abs().argmin(1)


def span_of(process: GaussianProcess, state: Tensor, number: Tensor, deviation: Tensor) -> Tensor:
    """What the second half of a prediction with learned variance must be for the step to have this deviation."""
    zero, one = torch.zeros_like(state), torch.ones_like(state)
    low, high = (process.law(torch.cat((zero, side), 1), state, number).deviation.log() for side in (-one, one))
    return 2 * (deviation.to(state.dtype).log() - low) / (high - low) - 1


class _Steps(NamedTuple):
    """Of N steps, all `[N]` and float64: the state is alpha x + sigma noise, where x is the data or the chain's end;
    after: the same sigma, of where the step leads. noising: the variance that noise adds on the way back. gain: of x in
    the next state's mean. kept, lost: the predicted data are kept x - lost state.
    """

    alpha: Tensor
    sigma: Tensor
    after: Tensor
    noising: Tensor
    gain: Tensor
    kept: Tensor
    lost: Tensor

    @staticmethod
    def of(process: GaussianProcess, number: Tensor, of_ends: bool) -> _Steps:
        alphas, sigmas = (
            torch.tensor(each, dtype=torch.float64, device=number.device) for each in (process.alphas, process.sigmas)
        )
        signal, left = (alphas[-1], sigmas[-1].square()) if of_ends else (alphas.new_ones(()), alphas.new_zeros(()))
        alpha = alphas / signal
        variance = (sigmas.square() - alpha.square() * left).clamp(min=0)
        noising = variance[:-1] - (alphas[:-1] / alphas[1:]).square() * variance[1:]
        columns = (
            alpha[:-1], variance[:-1].sqrt(), variance[1:].sqrt(), noising,
            alpha[1:] * noising / variance[:-1],
            sigmas[:-1].square() / variance[:-1] / signal, left * alpha[:-1] / variance[:-1] / signal,
        )  # fmt: skip
        return _Steps(*(column[number] for column in columns))

    def data(self, mean: Tensor, state: Tensor) -> Tensor:
        """The predicted data that make a step right whose x has this mean, given the state: `[N, d]`."""
        return self.kept[:, None] * mean - self.lost[:, None] * state.flatten(1).double()

    def variance(self, variance: Tensor) -> Tensor:
        """Of the next state, where x has this variance given the state: what is left if x is known, and what it adds.
        `[N, d]` both."""
        left = self.after.square() * self.noising / self.sigma.square()
        return left[:, None] + self.gain.square()[:, None] * variance


def _turned(values: Tensor, basis: Tensor) -> Tensor:
    """Rows `[N, K or 1, d]`, each times the matrix of its component, `[K, d, d]`, or of all, `[1, d, d]`."""
    if len(basis) == 1:
        return values @ basis[0]
    return torch.einsum("nke,ked->nkd", values.expand(-1, len(basis), -1), basis)


def _turned_each(along: Tensor, basis: Tensor, chosen: Tensor, rows: slice) -> Tensor:
    return torch.einsum("nde,ne->nd", basis[chosen[rows]], along[rows])


def _in_parts(function: Callable[[slice], Tensor], rows: int, size: int) -> Tensor:
    """What `function` gives for all rows, so many at once that rows times `size` numbers are no burden."""
    at_once = max(1, _MOST_NUMBERS // size)
    return torch.cat([function(slice(first, first + at_once)) for first in range(0, max(rows, 1), at_once)])
