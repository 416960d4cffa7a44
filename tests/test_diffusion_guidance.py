"""Training-free samplers, over a Gaussian prior whose chain and whose posterior are known in closed form."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import pytest
import torch
from torch import Tensor
from torch.distributions import MultivariateNormal, Normal

from headwater.diffusion.denoisers import ResidualMLP
from headwater.diffusion.guidance import (
    Draws,
    dps,
    importance_resampling,
    lgd_mc,
    prior_draws,
    pseudo_inverse_guidance,
    twisted_smc,
)
from headwater.diffusion.likelihoods import FunctionLikelihood, GaussianLikelihood, Tempered
from headwater.diffusion.operators import DynamicRange, Identity, Matrix
from headwater.diffusion.process import GaussianProcess
from headwater.reward_worker import RewardError


def seeded(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


@dataclass(frozen=True)
class Step:
    mean: Tensor
    deviation: float

    def sample(self, generator: torch.Generator) -> Tensor:
        return self.mean + self.deviation * torch.randn(self.mean.shape, generator=generator)

    def log_prob(self, following: Tensor) -> Tensor:
        return Normal(self.mean, self.deviation).log_prob(following).sum(1)


@dataclass(frozen=True)
class Chain:
    """Ancestral steps, told the mean of the data given the state."""

    alphas: tuple[float, ...]
    sigmas: tuple[float, ...]
    shape: tuple[int, ...]

    @property
    def n_steps(self) -> int:
        return len(self.alphas) - 1

    def start(self, count: int, generator: torch.Generator) -> Tensor:
        return self.sigmas[0] * torch.randn(count, *self.shape, generator=generator)

    def time(self, number: Tensor) -> Tensor:
        return 1 - number / self.n_steps

    def weights(self, k: int) -> tuple[float, float, float]:
        """Of the data and of the state in the next state's mean, and its deviation."""
        alpha, sigma = self.alphas, self.sigmas
        ratio = alpha[k] / alpha[k + 1]
        added = sigma[k] ** 2 - (ratio * sigma[k + 1]) ** 2
        of_data, of_state = alpha[k + 1] * added / sigma[k] ** 2, ratio * sigma[k + 1] ** 2 / sigma[k] ** 2
        return of_data, of_state, added**0.5 * sigma[k + 1] / sigma[k]

    def law(self, prediction: Tensor, state: Tensor, number: Tensor) -> Step:
        of_data, of_state, deviation = self.weights(int(number[0]))
        return Step(of_data * prediction + of_state * state, deviation)

    def predicted_data(self, prediction: Tensor, state: Tensor, number: Tensor) -> Tensor:
        return prediction


def preserving(steps: int, dimensions: int) -> Chain:
    angle = torch.linspace(0.02, math.pi / 2 - 0.02, steps + 1)
    return Chain(tuple(angle.sin().tolist()), tuple(angle.cos().tolist()), (dimensions,))


def exploding(steps: int, dimensions: int) -> Chain:
    sigma = torch.logspace(math.log10(30), -2, steps + 1)
    return Chain((1.0,) * (steps + 1), tuple(sigma.tolist()), (dimensions,))


class Gaussian:
    """The exact denoiser of the prior N(mean, covariance)."""

    def __init__(self, chain: Chain, mean: Tensor, covariance: Tensor) -> None:
        self.chain, self.mean, self.covariance = chain, mean, covariance

    def __call__(self, state: Tensor, time: Tensor, condition: Tensor) -> Tensor:
        k = round((1 - float(time[0])) * self.chain.n_steps)
        return self.mean + (state - self.chain.alphas[k] * self.mean) @ self.gain(k).T

    def gain(self, k: int) -> Tensor:
        alpha, sigma = self.chain.alphas[k], self.chain.sigmas[k]
        noisy = alpha**2 * self.covariance + sigma**2 * torch.eye(len(self.mean))
        return alpha * torch.linalg.solve(noisy, self.covariance).T

    def end(self) -> MultivariateNormal:
        """The law of the chain's last state, by recursion over its steps."""
        mean, covariance = torch.zeros_like(self.mean), self.chain.sigmas[0] ** 2 * torch.eye(len(self.mean))
        for k in range(self.chain.n_steps):
            of_data, of_state, deviation = self.chain.weights(k)
            step = of_data * self.gain(k) + of_state * torch.eye(len(mean))
            mean = step @ mean + of_data * (self.mean - self.chain.alphas[k] * self.gain(k) @ self.mean)
            covariance = step @ covariance @ step.T + deviation**2 * torch.eye(len(mean))
        return MultivariateNormal(mean, covariance)


def conditioned(prior: MultivariateNormal, matrix: Tensor, sigma: float, y: Tensor) -> tuple[MultivariateNormal, float]:
    """The posterior and log p(y) where y is of the prior's objects times a matrix, and noise."""
    measured = matrix @ prior.covariance_matrix @ matrix.T + sigma**2 * torch.eye(len(matrix))
    gain = torch.linalg.solve(measured, matrix @ prior.covariance_matrix).T
    covariance = prior.covariance_matrix - gain @ matrix @ prior.covariance_matrix
    log_z = MultivariateNormal(matrix @ prior.mean, measured).log_prob(y).item()
    mean = prior.mean + gain @ (y - matrix @ prior.mean)
    return MultivariateNormal(mean, (covariance + covariance.T) / 2), log_z


MEAN = torch.tensor([0.5, -0.3, 0.2])
COVARIANCE = torch.tensor([[1.0, 0.5, 0.0], [0.5, 0.8, -0.2], [0.0, -0.2, 0.6]])
MATRIX = torch.tensor([[1.0, 0.5, -0.5], [0.2, -1.0, 0.3]])
SIGMA, Y = 0.4, torch.tensor([1.6, 1.1])
LIKELIHOOD = GaussianLikelihood(Matrix((3,), MATRIX), SIGMA, Y)
CHAINS = {"preserving": preserving(30, 3), "exploding": exploding(30, 3)}


def rows(count: int) -> Tensor:
    return torch.zeros(count, 0)


def moments(draws: Draws) -> tuple[Tensor, Tensor]:
    """Weighted mean and covariance."""
    weight = draws.log_weight.exp().float()
    mean = weight @ draws.objects
    centred = draws.objects - mean
    return mean, (weight[:, None] * centred).T @ centred


@pytest.mark.parametrize("kind", CHAINS)
def test_draws_of_the_prior_have_the_law_of_its_chain(kind: str) -> None:
    denoiser = Gaussian(CHAINS[kind], MEAN, COVARIANCE)
    objects = prior_draws(CHAINS[kind], denoiser, rows(50_000), seeded(0))
    torch.testing.assert_close(objects.mean(0), denoiser.end().mean, atol=0.02, rtol=0)
    torch.testing.assert_close(objects.T.cov(), denoiser.end().covariance_matrix, atol=0.03, rtol=0)


@pytest.mark.parametrize("kind", CHAINS)
def test_importance_resampling_converges_to_the_posterior(kind: str) -> None:
    denoiser = Gaussian(CHAINS[kind], MEAN, COVARIANCE)
    posterior, log_z = conditioned(denoiser.end(), MATRIX, SIGMA, Y)
    draws = importance_resampling(CHAINS[kind], denoiser, LIKELIHOOD, rows(100_000), seeded(1), batch_size=30_000)
    mean, covariance = moments(draws)
    torch.testing.assert_close(mean, posterior.mean, atol=0.02, rtol=0)
    torch.testing.assert_close(covariance, posterior.covariance_matrix, atol=0.03, rtol=0)
    assert draws.log_z == pytest.approx(log_z, abs=0.03)
    assert (draws.reward_calls, draws.denoiser_calls) == (100_000, 3_000_000)
    # Weights p(y | x) / p(y) of draws of the prior: N / ESS tends to E[p(y | x)^2] / p(y)^2.
    _, log_square = conditioned(denoiser.end(), MATRIX, SIGMA / math.sqrt(2), Y)
    log_square -= 2 * math.log(2 * math.sqrt(math.pi) * SIGMA)
    expected = 100_000 * math.exp(2 * log_z - log_square)
    assert draws.effective_sample_size == pytest.approx(expected, rel=0.1)


@pytest.mark.parametrize("threshold", [0.0, 0.5, 1.0])
@pytest.mark.parametrize("twist", ["pseudo-inverse", "likelihood"])
@pytest.mark.parametrize("kind", CHAINS)
def test_twisted_smc_converges_to_the_posterior(kind: str, twist: str, threshold: float) -> None:
    likelihood = LIKELIHOOD if twist == "pseudo-inverse" else Tempered(LIKELIHOOD, 1.0)
    denoiser = Gaussian(CHAINS[kind], MEAN, COVARIANCE)
    posterior, log_z = conditioned(denoiser.end(), MATRIX, SIGMA, Y)
    draws = twisted_smc(CHAINS[kind], denoiser, likelihood, rows(10_000), seeded(2), threshold, scale=0.5)
    mean, covariance = moments(draws)
    torch.testing.assert_close(mean, posterior.mean, atol=0.05, rtol=0)
    torch.testing.assert_close(covariance, posterior.covariance_matrix, atol=0.06, rtol=0)
    assert draws.log_z == pytest.approx(log_z, abs=0.06)
    assert (draws.reward_calls, draws.denoiser_calls) == (310_000, 300_000)


def test_an_exact_twist_leaves_all_particles_alike() -> None:
    chain = preserving(150, 3)
    prior = MultivariateNormal(MEAN, 0.49 * torch.eye(3))
    denoiser = Gaussian(chain, MEAN, prior.covariance_matrix)
    draws = twisted_smc(chain, denoiser, LIKELIHOOD, rows(2000), seeded(3), threshold=0.0, deviation=0.7)
    assert draws.effective_sample_size > 1800
    assert draws.log_z == pytest.approx(conditioned(prior, MATRIX, SIGMA, Y)[1], abs=0.02)
    assert importance_resampling(chain, denoiser, LIKELIHOOD, rows(2000), seeded(3)).effective_sample_size < 200


def test_twisted_smc_is_right_of_a_nonlinear_measurement() -> None:
    chain = CHAINS["preserving"]
    denoiser = Gaussian(chain, MEAN, COVARIANCE)
    likelihood = GaussianLikelihood(DynamicRange((3,), 1.0), 0.3, torch.tensor([1.0, 0.1, -0.5]))
    draws = twisted_smc(chain, denoiser, likelihood, rows(20_000), seeded(3), scale=0.5)
    objects = denoiser.end().sample((400_000,))
    log_r = likelihood(objects, rows(400_000))
    weight = log_r.softmax(0)
    torch.testing.assert_close(moments(draws)[0], weight @ objects, atol=0.03, rtol=0)
    assert draws.log_z == pytest.approx(log_r.logsumexp(0).item() - math.log(400_000), abs=0.05)


def test_a_hard_constraint_is_met_by_every_particle_that_weighs() -> None:
    chain = CHAINS["preserving"]
    denoiser = Gaussian(chain, MEAN, COVARIANCE)

    def above(x: Tensor) -> Tensor:
        return torch.where(x[:, 0] > 1.5, 0 * x[:, 0], -math.inf)

    draws = twisted_smc(chain, denoiser, FunctionLikelihood(above), rows(5000), seeded(4))
    assert draws.resampled(1000, seeded(5))[:, 0].min() > 1.5
    marginal = Normal(denoiser.end().mean[0], denoiser.end().variance[0].sqrt())
    assert draws.log_z == pytest.approx(math.log(1 - marginal.cdf(torch.tensor(1.5)).item()), abs=0.3)


@pytest.mark.parametrize("kind", CHAINS)
def test_pseudo_inverse_guidance_is_exact_for_an_isotropic_prior(kind: str) -> None:
    chain = {"preserving": preserving, "exploding": exploding}[kind](150, 3)
    denoiser = Gaussian(chain, MEAN, 0.49 * torch.eye(3))
    posterior, _ = conditioned(MultivariateNormal(MEAN, 0.49 * torch.eye(3)), MATRIX, SIGMA, Y)
    draws = pseudo_inverse_guidance(chain, denoiser, LIKELIHOOD, rows(20_000), seeded(6), deviation=0.7)
    mean, covariance = moments(draws)
    torch.testing.assert_close(mean, posterior.mean, atol=0.02, rtol=0)
    torch.testing.assert_close(covariance, posterior.covariance_matrix, atol=0.03, rtol=0)
    each = GaussianLikelihood(LIKELIHOOD.operator, torch.tensor([0.2, 0.9]), Y)
    mean, _ = moments(pseudo_inverse_guidance(chain, denoiser, each, rows(20_000), seeded(7), deviation=0.7))
    precision = torch.eye(3) / 0.49 + MATRIX.T @ torch.diag(each.sigma**-2) @ MATRIX
    expected = torch.linalg.solve(precision, MEAN / 0.49 + MATRIX.T @ (Y / each.sigma**2))
    torch.testing.assert_close(mean, expected, atol=0.03, rtol=0)


def test_loss_guidance_of_many_particles_is_exact_for_an_isotropic_prior() -> None:
    chain = preserving(100, 3)
    prior = MultivariateNormal(MEAN, 0.49 * torch.eye(3))
    denoiser = Gaussian(chain, MEAN, prior.covariance_matrix)
    draws = lgd_mc(chain, denoiser, LIKELIHOOD, rows(2000), seeded(6), particles=40, deviation=0.7)
    posterior, _ = conditioned(prior, MATRIX, SIGMA, Y)
    mean, covariance = moments(draws)
    torch.testing.assert_close(mean, posterior.mean, atol=0.05, rtol=0)
    torch.testing.assert_close(covariance, posterior.covariance_matrix, atol=0.06, rtol=0)


@pytest.mark.parametrize("kind", CHAINS)
@pytest.mark.parametrize("sampler", ["dps", "dps of another likelihood", "lgd", "pseudo-inverse"])
def test_guidance_brings_every_condition_nearer_to_its_measurement(sampler: str, kind: str) -> None:
    chain = CHAINS[kind]
    denoiser = Gaussian(chain, MEAN, COVARIANCE)
    y = Matrix((3,), MATRIX)(MultivariateNormal(MEAN, COVARIANCE).sample((400,)))
    likelihood = GaussianLikelihood(LIKELIHOOD.operator, SIGMA)
    if sampler == "dps":
        draws = dps(chain, denoiser, likelihood, y, seeded(8), scale=0.3)
    elif sampler == "lgd":
        draws = lgd_mc(chain, denoiser, likelihood, y, seeded(8), particles=4, limit=1.0)
    elif sampler == "pseudo-inverse":
        draws = pseudo_inverse_guidance(chain, denoiser, likelihood, y, seeded(8))
    else:
        draws = dps(chain, denoiser, Tempered(likelihood, 1.0), y, seeded(8), limit=1.0)
    free = prior_draws(chain, denoiser, y, seeded(8))
    far, near = (likelihood.residual(x, y).norm(dim=1).mean().item() for x in (free, draws.objects))
    assert near < 0.6 * far
    assert draws.log_z is None
    assert draws.effective_sample_size == pytest.approx(400)
    assert (draws.reward_calls, draws.denoiser_calls) == (12_000 * (4 if sampler == "lgd" else 1), 12_000)


def test_the_limit_bounds_what_a_step_moves() -> None:
    chain = CHAINS["preserving"]
    denoiser = Gaussian(chain, MEAN, COVARIANCE)
    free = prior_draws(chain, denoiser, rows(50), seeded(9))
    still = dps(chain, denoiser, LIKELIHOOD, rows(50), seeded(9), scale=100.0, limit=1e-5).objects
    torch.testing.assert_close(still, free, atol=1e-3, rtol=0)
    assert not torch.equal(still, free)


def test_a_generator_repeats_and_resampling_follows_the_weights() -> None:
    chain = CHAINS["preserving"]
    denoiser = Gaussian(chain, MEAN, COVARIANCE)
    first, again, other = (twisted_smc(chain, denoiser, LIKELIHOOD, rows(50), seeded(s)).objects for s in (1, 1, 2))
    assert torch.equal(first, again)
    assert not torch.equal(first, other)
    draws = Draws(torch.arange(3.0)[:, None], torch.tensor([0.25, 0.0, 0.75]).log(), None, 3, 3)
    assert sorted(draws.resampled(8, seeded(0))[:, 0].tolist()) == [0, 0, 2, 2, 2, 2, 2, 2]
    assert draws.effective_sample_size == pytest.approx(1.6)


def test_what_cannot_be_guided_is_told() -> None:
    chain = CHAINS["preserving"]
    denoiser = Gaussian(chain, MEAN, COVARIANCE)
    generator = seeded(0)
    nowhere = FunctionLikelihood(lambda x: 0 * x.sum(1) - math.inf)
    for sampler in (importance_resampling, twisted_smc):
        with pytest.raises(RewardError, match=r"r\(x\) = 0 on all 8 "):
            sampler(chain, denoiser, nowhere, rows(8), generator)
        with pytest.raises(ValueError, match="condition has different rows"):
            sampler(chain, denoiser, nowhere, torch.eye(8), generator)
    flat = FunctionLikelihood(lambda x: x.detach().sum(1))
    for guided in (dps, lgd_mc, twisted_smc):
        with pytest.raises(TypeError, match="not differentiable"):
            guided(chain, denoiser, flat, rows(8), generator)
    with pytest.raises(TypeError, match="Gaussian noise on a linear operator"):
        pseudo_inverse_guidance(chain, denoiser, flat, rows(8), generator)
    with pytest.raises(ValueError, match="particles is 0, must be at least 1"):
        lgd_mc(chain, denoiser, LIKELIHOOD, rows(8), generator, particles=0)
    large = GaussianLikelihood(Matrix((3,), torch.ones(5000, 3)), 1.0)
    with pytest.raises(ValueError, match="y has 5000 values, of which pseudo-inverse guidance takes at most 4096"):
        pseudo_inverse_guidance(chain, denoiser, large, rows(8), generator)
    with pytest.raises(ValueError, match="diverged for 8 of 8 objects: lower scale, or set limit"):
        dps(chain, denoiser, FunctionLikelihood(lambda x: x.pow(4).sum(1)), rows(8), generator, scale=1e6)


@pytest.mark.parametrize("sampler", [dps, lgd_mc, pseudo_inverse_guidance, twisted_smc])
def test_a_prior_of_learned_variance_is_guided_too(sampler: Callable[..., Draws]) -> None:
    process = GaussianProcess.of((2,), 5, "cosine", "data", "learned", final_noise=0.2)
    denoiser = ResidualMLP((2,), width=8, blocks=1, learned_variance=True)
    likelihood = GaussianLikelihood(Identity((2,)), 0.5, torch.zeros(2))
    drawn = sampler(process, denoiser, likelihood, torch.empty(6, 0), torch.Generator().manual_seed(0))
    assert drawn.objects.shape == (6, 2)
    assert bool(drawn.objects.isfinite().all())
