"""Samplers of a diffusion posterior that need no training, to compare a trained one with. DPS, LGD-MC and
pseudo-inverse guidance bend the prior's chain along a gradient, which is biased; twisted SMC corrects by weights what
it bends, and importance resampling only weighs draws of the prior: both are right in the limit of many particles.

With x^ = E[x | x_k] the prior's prediction of the data, a gradient g of log r in x_k adds sigma_k^2 / alpha_k g to x^:
Tweedie's formula with the guided score. The mean of the next state then moves by sigma_k|k+1^2 alpha_k+1 / alpha_k g,
where sigma_k|k+1^2 is the variance of x_k given x_k+1.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from headwater.diffusion.estimators import resample
from headwater.diffusion.likelihoods import GaussianLikelihood, Likelihood, ascent, require_support
from headwater.diffusion.process import GaussianProcess, Process
from headwater.reward import Reward

Denoise = Callable[[Tensor, Tensor, Tensor], Tensor]
"""The prior's prediction, of state `[N, *shape]`, time `[N]` and condition `[N, C]`."""

Potential = Callable[[Tensor, int], Tensor]
"""What a step climbs: a number for each predicted object `[N, *shape]` at a step, `[N]`, differentiable."""

GRAM_LIMIT = 4096
"""Most measured values for pseudo-inverse guidance, which decomposes a matrix of that size squared."""


_DOUBT = 5.0  # nats


@dataclass(frozen=True)
class Draws:
    """What a sampler drew, and what it cost.

    objects:        `[N, *shape]`.
    log_weight:     `[N]`, normalised; all alike for a sampler without weights.
    log_z:          an estimate of log Z whose exponential is right on average; None for a sampler without one.
    reward_calls:   objects that a likelihood was computed of.
    denoiser_calls: states that the prior's denoiser was run on.
    """

    objects: Tensor
    log_weight: Tensor
    log_z: float | None
    reward_calls: int
    denoiser_calls: int

    @property
    def effective_sample_size(self) -> float:
        """1 / sum of squared weights, from 1 to N. After resampling it is of the weights since: it does not count the
        particles that are copies of each other."""
        return _effective(self.log_weight)

    def resampled(self, count: int, generator: torch.Generator) -> Tensor:
        """Objects that all weigh alike, in random order: `[count, *shape]`, by systematic resampling."""
        return self.objects[resample(self.log_weight, count, generator)]


def dps(
    process: GaussianProcess,
    denoiser: Denoise,
    likelihood: Likelihood,
    condition: Tensor,
    generator: torch.Generator,
    scale: float = 1.0,
    limit: float = math.inf,
) -> Draws:
    """Diffusion posterior sampling (Chung et al. 2023, arXiv 2209.14687), one object for each row of `condition`.

    With Gaussian noise of one sigma each step goes `scale` along the gradient of -|y - A(x^)|: Algorithm 1 with its
    step size over the residual. Every other likelihood is followed by the gradient of log r(x^), as far as Bayes' rule
    says, times `scale`. limit: most that a step may move x^, root mean square.

    Raises TypeError where the likelihood is not differentiable, ValueError where the chain diverges.
    """
    if isinstance(likelihood, GaussianLikelihood) and not likelihood.sigma.dim():

        def climb(data: Tensor, number: int) -> Tensor:
            return -likelihood.residual(data, condition).flatten(1).norm(dim=1)

        return _bent(process, denoiser, climb, condition, generator, lambda number: scale, limit)

    def follow(data: Tensor, number: int) -> Tensor:
        return likelihood.log_prob(data, condition)

    return _bent(process, denoiser, follow, condition, generator, lambda number: scale * _reach(process, number), limit)


def lgd_mc(
    process: GaussianProcess,
    denoiser: Denoise,
    likelihood: Likelihood,
    condition: Tensor,
    generator: torch.Generator,
    particles: int = 10,
    scale: float = 1.0,
    limit: float = math.inf,
    deviation: float = 1.0,
) -> Draws:
    """Loss-guided diffusion (Song et al. 2023, ICML, "Loss-guided diffusion models for plug-and-play controllable
    generation"): as `dps` along the gradient of the log of r's mean over `particles` draws of N(x^, r_k^2), the data
    given x_k if it were Gaussian of `deviation`. One object for each row of `condition`.
    """
    if particles < 1:
        raise ValueError(f"particles is {particles}, must be at least 1")
    repeated = condition.repeat_interleave(particles, 0)

    def climb(data: Tensor, number: int) -> Tensor:
        centres = data.repeat_interleave(particles, 0)
        noise = torch.randn(centres.shape, generator=generator, device=generator.device).to(centres.device)
        spread = _unexplained(process, number, deviation) ** 0.5
        log_r = likelihood.log_prob(centres + spread * noise, repeated)
        return log_r.reshape(-1, particles).logsumexp(1) - math.log(particles)

    draws = _bent(process, denoiser, climb, condition, generator, lambda k: scale * _reach(process, k), limit)
    return replace(draws, reward_calls=particles * draws.reward_calls)


def pseudo_inverse_guidance(
    process: GaussianProcess,
    denoiser: Denoise,
    likelihood: Likelihood,
    condition: Tensor,
    generator: torch.Generator,
    scale: float = 1.0,
    limit: float = math.inf,
    deviation: float = 1.0,
) -> Draws:
    """Pseudo-inverse guidance (Song et al. 2023, ICLR, "Pseudoinverse-guided diffusion models for inverse problems"):
    along the gradient of log N(y; A x^, r_k^2 A A' + sigma^2), with the data given x_k taken for N(x^, r_k^2), as it is
    where the prior is Gaussian of one `deviation`. One object for each row of `condition`.

    Raises TypeError for another likelihood than Gaussian noise on a linear operator, ValueError above `GRAM_LIMIT`
    measured values.
    """
    if not isinstance(likelihood, GaussianLikelihood) or not likelihood.operator.is_linear:
        raise TypeError("pseudo-inverse guidance is of Gaussian noise on a linear operator")
    size = math.prod(likelihood.operator.measured)
    if size > GRAM_LIMIT:
        raise ValueError(f"y has {size} values, of which pseudo-inverse guidance takes at most {GRAM_LIMIT}")
    climb = _marginal(process, likelihood, condition, deviation)
    return _bent(process, denoiser, climb, condition, generator, lambda k: scale * _reach(process, k), limit)


def twisted_smc(
    process: GaussianProcess,
    denoiser: Denoise,
    likelihood: Likelihood,
    condition: Tensor,
    generator: torch.Generator,
    threshold: float = 0.5,
    scale: float = 1.0,
    limit: float = math.inf,
    deviation: float = 1.0,
) -> Draws:
    """The twisted diffusion sampler (Wu et al. 2023, arXiv 2306.17775): particles that follow the gradient of a guess
    at log r, weighed so that they are of the posterior whatever the guess, and resampled where their effective number
    falls below `threshold` times N. Each row of `condition` is a particle of one posterior: the rows must be equal.

    The guess, or twist, is the potential of `pseudo_inverse_guidance` where there is one. Elsewhere it is log r(x^)
    times the share of the data's variance that x_k explains, if that is Gaussian of `deviation`: log r(x^) by itself is
    too sure of itself at first, and the weights then hang on few particles. So `deviation` should be that of the
    prior's draws: where it is far too small, so is the estimate of log Z.

    Raises TypeError where the likelihood is not differentiable, RewardError where r(x) is 0 for every particle.
    """
    _require_one(condition)
    guess = _twist(process, likelihood, condition, deviation)
    count = len(condition)
    state = process.start(count, generator).to(condition.device)
    weight = torch.full((count,), -math.log(count), dtype=torch.float64, device=state.device)
    log_z = torch.zeros((), dtype=torch.float64, device=state.device)
    twist = torch.zeros_like(weight)
    change = torch.zeros_like(weight)
    for k in range(process.n_steps):
        number = _numbers(k, state)
        with torch.enable_grad():
            state = state.detach().requires_grad_()
            prediction = denoiser(state, process.time(number), condition)
            log_r = guess(process.predicted_data(prediction, state, number), k)
            gradient = ascent(log_r, state).nan_to_num(0.0, 0.0, 0.0)
        ahead = _hopeful(log_r.detach().double())
        weight, log_z = _weighed(weight, log_z, change + ahead - twist)
        twist = ahead
        shift = _limited(scale * _reach(process, k) * gradient, process, k, limit)
        state, prediction = state.detach(), prediction.detach()
        if _effective(weight) < threshold * count:
            kept = resample(weight, count, generator)
            state, prediction, shift, twist = state[kept], prediction[kept], shift[kept], twist[kept]
            weight = torch.full_like(weight, -math.log(count))
        law = process.law(prediction, state, number)
        straight = law.sample(generator)
        state = straight + shift
        change = law.log_prob(state).double() - law.log_prob(straight).double()
    log_r = require_support(likelihood(state, condition), "particles").double().nan_to_num(-math.inf, neginf=-math.inf)
    weight, log_z = _weighed(weight, log_z, change + log_r - twist)
    return Draws(state, weight, float(log_z), count * (process.n_steps + 1), count * process.n_steps)


def importance_resampling(
    process: Process,
    denoiser: Denoise,
    reward: Reward,
    condition: Tensor,
    generator: torch.Generator,
    batch_size: int = 1024,
) -> Draws:
    """Draws of the prior, weighed by r: one for each row of `condition`, all of one posterior, so that the rows must be
    equal; `batch_size` at once. Any reward will do, and any process. An object on which the reward failed weighs
    nothing.

    Raises RewardError where r(x) is 0 for every draw.
    """
    _require_one(condition)
    batches = torch.split(condition, batch_size)
    objects = torch.cat([prior_draws(process, denoiser, rows, generator) for rows in batches])
    log_r = torch.cat(
        [reward(some, rows) for some, rows in zip(torch.split(objects, batch_size), batches, strict=True)]
    )
    log_r = require_support(log_r).double().nan_to_num(-math.inf, neginf=-math.inf)
    total = log_r.logsumexp(0)
    log_z = float(total) - math.log(len(log_r))
    return Draws(objects, log_r - total, log_z, len(log_r), len(log_r) * process.n_steps)


@torch.no_grad()
def prior_draws(process: Process, denoiser: Denoise, condition: Tensor, generator: torch.Generator) -> Tensor:
    """An object of the prior for each row of `condition`: `[N, *shape]`."""
    state = process.start(len(condition), generator).to(condition.device)
    for k in range(process.n_steps):
        number = _numbers(k, state)
        state = process.law(denoiser(state, process.time(number), condition), state, number).sample(generator)
    return state


def _bent(
    process: GaussianProcess,
    denoiser: Denoise,
    climb: Potential,
    condition: Tensor,
    generator: torch.Generator,
    step: Callable[[int], float],
    limit: float,
) -> Draws:
    """The prior's chain, each next state moved by `step(k)` times the gradient of `climb(x^, k)` in x_k."""
    state = process.start(len(condition), generator).to(condition.device)
    for k in range(process.n_steps):
        number = _numbers(k, state)
        with torch.enable_grad():
            state = state.detach().requires_grad_()
            prediction = denoiser(state, process.time(number), condition)
            gradient = ascent(climb(process.predicted_data(prediction, state, number), k), state)
        law = process.law(prediction.detach(), state.detach(), number)
        state = law.sample(generator) + _limited(step(k) * gradient, process, k, limit)
    if wrong := int((~state.flatten(1).isfinite()).any(1).sum()):
        raise ValueError(f"guidance diverged for {wrong} of {len(state)} objects: lower scale, or set limit")
    cost = len(state) * process.n_steps
    weight = torch.full((len(state),), -math.log(len(state)), dtype=torch.float64, device=state.device)
    return Draws(state, weight, None, cost, cost)


def _reach(process: GaussianProcess, k: int) -> float:
    """How far the mean of the next state moves with a gradient of log r in x_k. Where x_k is noise alone: nowhere."""
    alpha = process.alphas[k]
    return _added(process, k) * process.alphas[k + 1] / alpha if alpha else 0.0


def _added(process: GaussianProcess, k: int) -> float:
    """The variance of x_k given x_k+1, that is, of the noise between them."""
    ratio = process.alphas[k] / process.alphas[k + 1]
    return process.sigmas[k] ** 2 - (ratio * process.sigmas[k + 1]) ** 2


def _limited(shift: Tensor, process: GaussianProcess, k: int, limit: float) -> Tensor:
    """The shift, no longer than what moves x^ by `limit`, root mean square."""
    if limit == math.inf:
        return shift
    share = process.alphas[k + 1] * _added(process, k) / process.sigmas[k] ** 2  # of x^ in the mean
    length = shift.flatten(1).square().mean(1).sqrt().clamp(min=torch.finfo(shift.dtype).tiny)
    return shift * (limit * share / length).clamp(max=1).reshape(-1, *[1] * (shift.dim() - 1))


def _unexplained(process: GaussianProcess, k: int, deviation: float) -> float:
    """The variance of the data given x_k, of Gaussian data of one deviation."""
    alpha, sigma = process.alphas[k], process.sigmas[k]
    return (deviation * sigma) ** 2 / ((alpha * deviation) ** 2 + sigma**2)


def _marginal(
    process: GaussianProcess, likelihood: GaussianLikelihood, condition: Tensor, deviation: float
) -> Potential:
    """log N(y; A x^, r_k^2 A A' + sigma^2) without its constant, for a linear A."""
    spectrum, vectors = (part.to(condition.device) for part in whitened_gram(likelihood))
    sigma = likelihood.sigma.to(condition.device)

    def potential(data: Tensor, number: int) -> Tensor:
        residual = (likelihood.residual(data, condition) / sigma).flatten(1) @ vectors
        return -0.5 * (residual.square() / (1 + _unexplained(process, number, deviation) * spectrum)).sum(1)

    return potential


def _twist(process: GaussianProcess, likelihood: Likelihood, condition: Tensor, deviation: float) -> Potential:
    if (
        isinstance(likelihood, GaussianLikelihood)
        and likelihood.operator.is_linear
        and math.prod(likelihood.operator.measured) <= GRAM_LIMIT
    ):
        return _marginal(process, likelihood, condition, deviation)

    def potential(data: Tensor, number: int) -> Tensor:
        explained = 1 - _unexplained(process, number, deviation) / deviation**2
        return explained * likelihood.log_prob(data, condition)

    return potential


def _hopeful(log_r: Tensor) -> Tensor:
    """log r of predicted objects, with a little below the lowest where it is 0 or failed: they may yet come right."""
    known = log_r[log_r.isfinite()]
    low = float(known.min()) - _DOUBT if len(known) else 0.0
    return torch.where(log_r.isfinite(), log_r, low)


def whitened_gram(likelihood: GaussianLikelihood) -> tuple[Tensor, Tensor]:
    """Eigenvalues and eigenvectors of A A' divided by sigma on both sides."""
    operator = likelihood.operator
    size = math.prod(operator.measured)
    units = torch.eye(size, device=next(operator.buffers(), torch.empty(0)).device)
    with torch.no_grad():
        gram = operator(operator.adjoint(units.reshape(size, *operator.measured))).flatten(1).double()
    sigma = likelihood.sigma.expand(operator.measured).flatten().to(gram)
    values, vectors = torch.linalg.eigh((gram + gram.T) / 2 / sigma[:, None] / sigma)
    return values.clamp(min=0).float(), vectors.float()


def _weighed(weight: Tensor, log_z: Tensor, change: Tensor) -> tuple[Tensor, Tensor]:
    """Normalised log-weights after a change, and log Z with their total."""
    total = (weight + change).logsumexp(0)
    return weight + change - total, log_z + total


def _effective(log_weight: Tensor) -> float:
    return math.exp(-float((2 * log_weight).logsumexp(0)))


def _numbers(k: int, state: Tensor) -> Tensor:
    return torch.full((len(state),), k, dtype=torch.int64, device=state.device)


def _require_one(condition: Tensor) -> None:
    if not (condition == condition[:1]).all():
        raise ValueError("condition has different rows: the particles of one posterior share one condition")
