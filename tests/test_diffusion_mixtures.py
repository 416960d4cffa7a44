"""Gaussian mixtures: densities, denoisers and posteriors against quadrature, autograd and closed forms."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
import torch
from torch import Tensor

from headwater.diffusion.mixtures import GaussianMixture, MixtureDenoiser, step_numbers
from headwater.diffusion.process import BrownianProcess, GaussianProcess

NONE = torch.empty(0, 0)


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def mixture(kind: str, dimensions: int = 2, count: int = 3) -> GaussianMixture:
    """Of components that share one variance; with one each; with one a coordinate; or turned, each its own way."""
    draws = generator(7)
    weight = torch.rand(count, generator=draws) + 0.2
    mean = 2 * torch.randn(count, dimensions, generator=draws)
    if kind == "shared":
        return GaussianMixture.of(weight, mean, 0.4)
    if kind == "isotropic":
        return GaussianMixture.of(weight, mean, torch.rand(count, generator=draws) + 0.1)
    diagonal = GaussianMixture.of(weight, mean, torch.rand(count, dimensions, generator=draws) + 0.1)
    if kind == "diagonal":
        return diagonal
    matrix = torch.randn(1 if kind == "turned alike" else count, dimensions, dimensions, generator=draws).double()
    variance = diagonal.variance[:1] if kind == "turned alike" else diagonal.variance
    return GaussianMixture(diagonal.log_weight, diagonal.mean, variance, torch.linalg.qr(matrix)[0])


KINDS = ("shared", "isotropic", "diagonal", "turned", "turned alike")


def covariances(one: GaussianMixture) -> Tensor:
    """`[K, d, d]`."""
    basis = torch.eye(one.dimensions, dtype=torch.float64)[None] if one.basis is None else one.basis
    full = (basis * one.variance[:, None, :]) @ basis.mT
    return full.expand(len(one), -1, -1)


def density(one: GaussianMixture) -> torch.distributions.MixtureSameFamily:
    """The same mixture, by torch's own classes."""
    parts = torch.distributions.MultivariateNormal(one.mean, covariances(one))
    return torch.distributions.MixtureSameFamily(torch.distributions.Categorical(one.weight), parts)


def grid(half: float, cells: int) -> tuple[Tensor, float]:
    """Midpoints of a square around the origin, and the area of a cell."""
    axis = (torch.arange(cells, dtype=torch.float64) + 0.5) * (2 * half / cells) - half
    return torch.cartesian_prod(axis, axis), (2 * half / cells) ** 2


@pytest.mark.parametrize("kind", KINDS)
def test_log_density_and_draws_are_those_of_the_mixture(kind: str) -> None:
    one = mixture(kind, 3)
    points = 2 * torch.randn(50, 3, generator=generator(), dtype=torch.float64)
    torch.testing.assert_close(one.log_prob(points), density(one).log_prob(points))
    draws = one.sample(40_000, generator()).double()
    wanted = one.weight @ one.mean
    between = (one.weight[:, None, None] * (one.mean - wanted)[:, :, None] * (one.mean - wanted)[:, None]).sum(0)
    covariance = (one.weight[:, None, None] * covariances(one)).sum(0) + between
    assert float((draws.mean(0) - wanted).abs().max()) < 0.05
    assert float((draws.T.cov() - covariance).abs().max()) < 0.15


@pytest.mark.parametrize("kind", KINDS)
def test_the_denoiser_is_the_mean_of_the_data_given_the_state_by_quadrature(kind: str) -> None:
    one, (points, area) = mixture(kind), grid(9.0, 300)
    states = torch.randn(4, 2, generator=generator(3), dtype=torch.float64)
    alpha, sigma = torch.tensor([0.9, 0.5, 0.1, 1.0]), torch.tensor([0.5, 0.8, 1.0, 0.4])
    away = states[:, None] - alpha[:, None, None] * points
    weights = one.log_prob(points) - 0.5 * (away / sigma[:, None, None]).square().sum(2)
    share = weights.softmax(1)
    mean = share @ points
    variance = share @ points.square() - mean.square()
    torch.testing.assert_close(one.denoised(states, alpha, sigma), mean, rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(one.moments(states, alpha, sigma).mean, mean, rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(one.moments(states, alpha, sigma).variance, variance, rtol=1e-6, atol=1e-6)
    normaliser = weights.exp().sum(1) * area / (2 * math.pi * sigma.square())
    torch.testing.assert_close(one.log_joint(states, alpha, sigma).logsumexp(1), normaliser.log().double())


@pytest.mark.parametrize("kind", KINDS)
def test_the_posterior_is_prior_times_likelihood_over_the_evidence_everywhere(kind: str) -> None:
    one = mixture(kind, 3, 4)
    matrix, y = torch.randn(2, 3, generator=generator(1)).double(), torch.tensor([0.7, -1.1]).double()
    posterior = one.posterior(matrix, y, 0.3)
    points = torch.randn(60, 3, generator=generator(2), dtype=torch.float64)
    away = (points @ matrix.T - y) / 0.3
    likelihood = -0.5 * away.square().sum(1) - 2 * math.log(0.3 * math.sqrt(2 * math.pi))
    log_z = one.log_evidence(matrix, y[None], 0.3)
    torch.testing.assert_close(posterior.log_prob(points), one.log_prob(points) + likelihood - log_z)
    # a second measurement of the posterior is one measurement of both
    again = posterior.posterior(matrix[:1], y[:1], 0.5)
    both = one.posterior(torch.cat((matrix / 0.3, matrix[:1] / 0.5)), torch.cat((y / 0.3, y[:1] / 0.5)), 1.0)
    torch.testing.assert_close(again.log_prob(points), both.log_prob(points))


def test_evidence_is_the_mean_likelihood_of_the_priors_draws() -> None:
    one, matrix = mixture("isotropic"), torch.tensor([[1.0, -0.5]])
    y = torch.tensor([[0.5], [2.0], [-3.0]])
    x = one.sample(200_000, generator())
    likelihood = torch.distributions.Normal(x @ matrix.T, 0.5).log_prob(y.T).double()
    estimate = likelihood.logsumexp(0) - math.log(len(x))
    torch.testing.assert_close(one.log_evidence(matrix, y, 0.5), estimate, atol=0.03, rtol=0)
    assert float((one.measured(matrix, 0.5).sample(200_000, generator()).mean() - (x @ matrix.T).mean()).abs()) < 0.02


def test_responsibilities_of_the_posteriors_points_average_to_the_posteriors_weights() -> None:
    one = mixture("shared", 2, 5)
    posterior = one.posterior(torch.tensor([[1.0, 0.3]]), torch.tensor([0.8]), 0.5)
    points = posterior.sample(40_000, generator())
    torch.testing.assert_close(one.responsibilities(points).mean(0), posterior.weight, atol=0.01, rtol=0)


PROCESSES = [
    GaussianProcess.of((2, 2), 8, schedule, parametrisation, final_noise=0.1)  # type: ignore[arg-type]
    for schedule in ("linear", "cosine", "exploding")
    for parametrisation in ("noise", "data", "velocity")
]


@pytest.mark.parametrize("process", PROCESSES, ids=lambda one: one.parametrisation)
def test_every_parametrisation_predicts_the_mean_of_the_data_in_the_shape_of_the_objects(
    process: GaussianProcess,
) -> None:
    one = mixture("diagonal", 4)
    denoiser = MixtureDenoiser(one, process)
    number = torch.arange(8)
    assert bool((step_numbers(process, process.time(number)) == number).all())
    state = process.noised(one.sample(8, generator()).view(8, 2, 2), number, generator())
    prediction = denoiser(state, process.time(number), NONE)
    assert prediction.shape == state.shape
    assert prediction.dtype == torch.float32
    expected = one.denoised(state, *process.alpha_sigma(number)).float().view(8, 2, 2)
    torch.testing.assert_close(process.predicted_data(prediction, state, number), expected, rtol=1e-4, atol=1e-4)


def test_the_brownian_drift_is_the_gradient_of_the_h_transform() -> None:
    one, process = mixture("diagonal"), BrownianProcess((2,), 10, variance=3.0)
    denoiser = MixtureDenoiser(one, process)
    points, _ = grid(10.0, 250)
    number = torch.tensor([2, 5, 9])
    state = torch.tensor([[0.3, -0.2], [1.0, 0.4], [-1.0, 0.5]])
    at = state.double().requires_grad_()
    left = 3.0 * (1 - number.double() / 10)[:, None]
    # log h(x, t) = log E[p / N(0, 3) (x_1) | x_t = x] of the motion without drift
    ratio = one.log_prob(points) + points.square().sum(1) / (2 * 3.0)
    h = (ratio - (at[:, None] - points).square().sum(2) / (2 * left)).logsumexp(1)
    (gradient,) = torch.autograd.grad(h.sum(), at)
    torch.testing.assert_close(
        denoiser(state, process.time(number), NONE).double(), 3.0 * gradient, rtol=1e-4, atol=1e-4
    )
    origin = denoiser(torch.zeros(1, 2), torch.ones(1), NONE)
    torch.testing.assert_close(origin[0].double(), one.weight @ one.mean, rtol=1e-5, atol=1e-5)


def chain_ends(process: GaussianProcess | BrownianProcess, denoiser: MixtureDenoiser, count: int) -> Tensor:
    draws = generator()
    state = process.start(count, draws)
    for step in range(process.n_steps):
        number = torch.full((count,), step)
        state = process.law(denoiser(state, process.time(number), NONE), state, number).sample(draws)
    return state


@pytest.mark.parametrize(
    "process",
    [
        GaussianProcess.of((2,), 60, "cosine", variance="large"),
        GaussianProcess.of((2,), 100, "exploding", variance="small"),
        BrownianProcess((2,), 120, variance=4.0),
    ],
    ids=["variance-preserving", "variance-exploding", "brownian"],
)
def test_a_fine_chain_with_the_closed_form_denoiser_ends_in_the_mixture(process: GaussianProcess) -> None:
    one = mixture("isotropic")
    ends = chain_ends(process, MixtureDenoiser(one, process), 1500)
    shares = one.responsibilities(ends).mean(0)
    assert float((shares - one.weight).abs().max()) < 0.04
    assert float((ends.double().mean(0) - one.weight @ one.mean).abs().max()) < 0.15
    inside = -one.log_prob(ends).mean()
    exact = -one.log_prob(one.sample(20_000, generator(5))).mean()
    assert abs(float(inside - exact)) < 0.12


def test_of_one_gaussian_three_steps_of_learned_variance_are_exact() -> None:
    one = GaussianMixture.of(torch.ones(1), torch.tensor([[0.5, -1.0]]), torch.tensor([[0.3, 2.0]]))
    process = GaussianProcess.of((2,), 3, "cosine", variance="learned", final_noise=0.2)
    ends = chain_ends(process, MixtureDenoiser(one, process), 40_000).double()
    alpha, sigma = process.alphas[-1], process.sigmas[-1]
    torch.testing.assert_close(ends.mean(0), alpha * one.mean[0], atol=0.03, rtol=0)
    torch.testing.assert_close(ends.var(0), alpha**2 * one.variance[0] + sigma**2, atol=0.05, rtol=0)


@pytest.mark.parametrize(
    ("build", "said"),
    [
        (lambda: GaussianMixture.of(torch.ones(2), torch.zeros(2, 3), 0.0), "variance = 0"),
        (lambda: GaussianMixture.of(torch.tensor([1.0, -1.0]), torch.zeros(2, 3), 1.0), "weight"),
        (lambda: GaussianMixture.of(torch.ones(3), torch.zeros(2, 3), 1.0), "log_weight has shape"),
        (lambda: GaussianMixture.of(torch.ones(2), torch.zeros(2, 3) / 0, 1.0), "mean: not finite"),
        (lambda: mixture("shared").posterior(torch.ones(1, 3), torch.ones(1), 1.0), "2 columns"),
        (lambda: mixture("shared").posterior(torch.ones(1, 2), torch.ones(2), 1.0), "must be 1 finite"),
        (lambda: mixture("shared").posterior(torch.ones(1, 2), torch.tensor([math.nan]), 1.0), "must be 1 finite"),
        (lambda: mixture("shared").measured(torch.ones(1, 2), 0.0), "deviation = 0"),
        (lambda: MixtureDenoiser(mixture("shared"), BrownianProcess((3,), 4)), "2 dimensions for objects of shape"),
    ],
)
def test_what_makes_no_sense_is_an_error_that_says_which(build: object, said: str) -> None:
    with pytest.raises(ValueError, match=said):
        build()  # type: ignore[operator]


@pytest.mark.parametrize("variance", ["large", "learned"])
@pytest.mark.parametrize("schedule", ["cosine", "exploding"])
def test_a_denoiser_told_of_the_ends_says_the_same_as_one_told_of_the_data(schedule: str, variance: str) -> None:
    process = GaussianProcess.of((2,), 6, schedule, "velocity", variance, final_noise=0.3)  # type: ignore[arg-type]
    if schedule == "exploding":
        process = replace(process, sigmas=tuple(sigma + 0.3 for sigma in process.sigmas))
    one, number = mixture("diagonal"), torch.arange(6)
    ends = one.noised(process.alphas[-1], process.sigmas[-1])
    state = process.noised(one.sample(6, generator()), number, generator())
    of_data = MixtureDenoiser(one, process)(state, process.time(number), NONE)
    of_ends = MixtureDenoiser(ends, process, of_ends=True)(state, process.time(number), NONE)
    law, other = (process.law(each, state, number) for each in (of_data, of_ends))
    torch.testing.assert_close(law.mean, other.mean, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(law.deviation, other.deviation, rtol=1e-4, atol=1e-4)
