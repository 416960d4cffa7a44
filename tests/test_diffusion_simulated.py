"""Pairs of objects and measurements, chains walked back from them, and what a correction sees of a likelihood."""

from __future__ import annotations

import copy
import math

import pytest
import torch
from torch import Tensor

from headwater.diffusion.adapters import Adapter, Corrected
from headwater.diffusion.denoisers import ResidualMLP
from headwater.diffusion.guidance import dps, pseudo_inverse_guidance, twisted_smc
from headwater.diffusion.likelihoods import FunctionLikelihood, GaussianLikelihood
from headwater.diffusion.mixtures import GaussianMixture, MixtureDenoiser
from headwater.diffusion.operators import Matrix
from headwater.diffusion.policy import STATE, DiffusionPolicy
from headwater.diffusion.priors import Prior
from headwater.diffusion.process import GaussianProcess, Variance
from headwater.diffusion.simulated import FromPairs, Pairs
from headwater.objectives import Objective
from headwater.policies.base import NO_EXPLORATION
from headwater.training import ExplorationSettings, Trainer, Training


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def gaussian_prior(n_steps: int = 8, variance: Variance = "learned", deviation: float = 1.0) -> Prior:
    """N(0, deviation^2) in two dimensions."""
    process = GaussianProcess.of((2,), n_steps, "cosine", "velocity", variance, final_noise=0.1)
    mixture = GaussianMixture.of(torch.ones(1), torch.zeros(1, 2), deviation**2)
    return Prior(process, MixtureDenoiser(mixture, process))


def first_coordinate(sigma: float = 0.5) -> GaussianLikelihood:
    return GaussianLikelihood(Matrix((2,), torch.tensor([[1.0, 0.0]])), sigma)


def policy_of(prior: Prior) -> DiffusionPolicy:
    torch.manual_seed(0)
    adapter = Adapter("correction", width=32, blocks=1, langevin=True, gradient_at="data")
    return DiffusionPolicy(prior.process, prior.denoiser, adapter.posterior(prior, 1, first_coordinate()))


def test_simulated_measurements_are_of_their_objects() -> None:
    likelihood = first_coordinate(0.5)
    pairs = Pairs.simulated(gaussian_prior(), likelihood, 2000, generator(), batch_size=700)
    assert pairs.objects.shape == (2000, 2)
    assert pairs.size == 1
    noise = pairs.measurement[:, 0] - pairs.objects[:, 0]
    assert abs(float(noise.std()) - 0.5) < 0.03
    assert abs(float((noise * pairs.objects[:, 0]).mean())) < 0.04
    rows = pairs.draw(7, 3, generator())
    assert rows.shape == (7, 1)
    assert torch.equal(rows[0], rows[2])
    assert not torch.equal(rows[2], rows[3])


def test_an_object_is_found_by_its_measurement() -> None:
    objects = torch.arange(8.0).view(4, 2)
    pairs = Pairs(objects, torch.tensor([[3.0], [1.0], [1.0], [2.0]]))
    found, known = pairs.object_of(torch.tensor([[2.0], [5.0], [3.0]]), generator())
    assert known.tolist() == [True, False, True]
    assert torch.equal(found, objects[[3, 0]])
    several, _ = pairs.object_of(torch.ones(200, 1), generator())
    assert {tuple(row) for row in several.tolist()} == {(2.0, 3.0), (4.0, 5.0)}
    fixed = Pairs(objects, torch.empty(4, 0))
    assert len(torch.unique(fixed.object_of(torch.empty(200, 0), generator())[0], dim=0)) == 4


@pytest.mark.parametrize(
    ("objects", "measurement", "said"),
    [
        (torch.zeros(2, 2), torch.zeros(3, 1), r"\(2, 2\) and \(3, 1\)"),
        (torch.zeros(0, 2), torch.zeros(0, 1), "M above 0"),
        (torch.zeros(2, 2), torch.tensor([[0.0], [torch.nan]]), "1 of 2 have values that are not finite"),
    ],
)
def test_pairs_that_make_no_sense_are_refused(objects: Tensor, measurement: Tensor, said: str) -> None:
    with pytest.raises(ValueError, match=said):
        Pairs(objects, measurement)


@pytest.mark.parametrize(("share", "walked"), [(0.25, 1), (0.0, 1), (0.6, 2), (1.0, 4)])
def test_of_each_measurement_so_many_chains_are_walked_back_from_its_object(share: float, walked: int) -> None:
    prior = gaussian_prior()
    pairs = Pairs(100 + torch.arange(6.0).view(3, 2), torch.tensor([[1.0], [2.0], [3.0]]))
    explorer = FromPairs.of(pairs, share)(policy_of(prior))
    condition = torch.tensor([[2.0], [1.0], [9.0]]).repeat_interleave(4, 0)
    drawn = explorer.sample(condition, NO_EXPLORATION, generator())
    ends = drawn.steps[STATE][drawn.last]
    for y, expected in ((1.0, [100.0, 101.0]), (2.0, [102.0, 103.0])):
        own = ends[drawn.condition[:, 0] == y]
        assert len(own) == 4
        assert int((own == torch.tensor(expected)).all(1).sum()) == walked
    assert int((ends > 50).all(1).sum()) == 2 * walked  # nothing under a measurement that is not among the pairs
    with pytest.raises(ValueError, match="share = 2"):
        FromPairs(policy_of(prior), pairs, 2)


def test_one_sampler_learns_the_posteriors_of_all_measurements() -> None:
    prior, likelihood = gaussian_prior(), first_coordinate(0.5)
    pairs = Pairs.simulated(prior, likelihood, 2000, generator())
    policy = policy_of(prior)
    settings = Training(iterations=100, batch_size=64, group_size=4, learning_rate=3e-3, schedule="cosine")
    Trainer(
        policy, likelihood, pairs, Objective("vargrad"), settings, ExplorationSettings(epsilon=0.0),
        explorer=FromPairs.of(pairs),
    ).run(progress_bar=False)  # fmt: skip
    y = torch.tensor([[-1.5], [0.0], [1.5]])
    drawn = policy.sample(y.repeat_interleave(1000, 0), NO_EXPLORATION, generator(1))
    x = torch.as_tensor(policy.objects(drawn)).view(3, 1000, 2)
    torch.testing.assert_close(x[:, :, 0].mean(1), 0.8 * y[:, 0], atol=0.1, rtol=0)
    torch.testing.assert_close(x[:, :, 1].mean(1), torch.zeros(3), atol=0.15, rtol=0)
    torch.testing.assert_close(x[:, :, 0].std(1), torch.full((3,), 0.2**0.5), atol=0.08, rtol=0)


def test_at_the_data_a_push_is_what_bayes_rule_says_of_a_gaussian() -> None:
    prior = gaussian_prior(deviation=2.0)
    matrix, sigma = torch.tensor([[1.0, 0.5], [0.2, -1.0], [0.0, 0.3]]), 0.4
    likelihood = GaussianLikelihood(Matrix((2,), matrix), sigma)
    adapter = Adapter("correction", langevin=True, gradient_at="data", deviation=2.0)
    posterior = adapter.posterior(prior, 3, likelihood)
    assert isinstance(posterior, Corrected)
    assert posterior.gradient is not None
    number = torch.arange(8)
    state, y = torch.randn(8, 2, generator=generator()), torch.randn(8, 3, generator=generator(1))
    time, said = prior.process.time(number), prior.denoiser(state, prior.process.time(number), y)
    push, seen = posterior.gradient.push(said, state, time, y)
    assert seen.shape == (8, 4)
    assert isinstance(prior.process, GaussianProcess)
    alpha, noise = prior.process.alpha_sigma(number)
    for row in range(8):
        unknown = 1 / (1 / 4 + (alpha[row] / noise[row]) ** 2)
        known = unknown * alpha[row] / noise[row] ** 2 * state[row]
        precision = torch.eye(2) / unknown + matrix.T @ matrix / sigma**2
        mean = torch.linalg.solve(precision, known / unknown + matrix.T @ y[row] / sigma**2)
        torch.testing.assert_close(push[row], mean - known, atol=1e-4, rtol=1e-4)
    posterior.gradient.last.bias.data.fill_(1.0)  # all of it
    moved = prior.process.predicted_data(posterior(state, time, y), state, number)
    torch.testing.assert_close(moved, prior.process.predicted_data(said, state, number) + push, atol=1e-4, rtol=1e-4)


def test_at_the_data_the_gradient_of_any_likelihood_is_clipped() -> None:
    prior = gaussian_prior()
    steep = FunctionLikelihood(lambda x: 1e6 * x.sum(1))
    posterior = Adapter("correction", langevin=True, gradient_at="data", largest_gradient=3.0).posterior(
        prior, 0, steep
    )
    assert isinstance(posterior, Corrected)
    assert posterior.gradient is not None
    state, time = torch.randn(4, 2, generator=generator()), torch.full((4,), 0.5)
    said = prior.denoiser(state, time, torch.empty(4, 0))
    push, _ = posterior.gradient.push(said, state, time, torch.empty(4, 0))
    assert 0 < float(push.max()) <= 3
    assert torch.equal(posterior(state, time, torch.empty(4, 0)), said)
    with pytest.raises(ValueError, match="gradient_at = 'end'"):
        Adapter("correction", langevin=True, gradient_at="end")  # type: ignore[arg-type]


def test_a_correction_sees_conditions_whitened_by_examples() -> None:
    prior = gaussian_prior()
    mixing = torch.tensor([[3.0, 0.0, 0.0], [2.9, 0.1, 0.0], [1.0, 0.0, 0.0]])
    examples = 10 + torch.randn(500, 3, generator=generator()) @ mixing.T
    posterior = Adapter("correction").posterior(prior, 3, examples=examples)
    assert isinstance(posterior, Corrected)
    heard: list[Tensor] = []
    posterior.correction.register_forward_hook(lambda module, given, said: heard.append(given[2]))
    posterior(torch.zeros(500, 2), torch.ones(500), examples)
    torch.testing.assert_close(heard[0].mean(0), torch.zeros(3), atol=1e-2, rtol=0)
    covariance = heard[0].T.cov()
    torch.testing.assert_close(covariance[1:, 1:], torch.eye(2), atol=1e-2, rtol=0)
    assert float(covariance[0, 0]) < 1e-2  # of the direction in which they do not vary


def test_the_prior_is_asked_once_for_a_correction_and_says_the_same() -> None:
    prior = Prior(GaussianProcess.of((2,), 5, final_noise=0.1), ResidualMLP((2,), 0, 16, 1))
    policy = DiffusionPolicy(prior.process, prior.denoiser, Adapter("correction").posterior(prior))
    with torch.no_grad():
        for parameter in policy.parameters():
            parameter.add_(0.1 * torch.randn(parameter.shape, generator=generator()))
    batch = policy.sample(torch.empty(6, 0), NO_EXPLORATION, generator())
    asked = []
    prior.denoiser.register_forward_hook(lambda module, given, said: asked.append(len(said)))
    once = policy.log_probs(batch)
    assert asked == [6 * 5]
    apart = DiffusionPolicy(prior.process, copy.deepcopy(prior.denoiser), policy.posterior).log_probs(batch)
    torch.testing.assert_close(once.forward, apart.forward)
    torch.testing.assert_close(once.backward, apart.backward)
    policy.steps_at_once = 7
    torch.testing.assert_close(policy.log_probs(batch).forward, apart.forward)


def test_guidance_leaves_what_a_prior_says_of_its_variance_alone() -> None:
    prior, likelihood = gaussian_prior(20), first_coordinate(0.5)
    rows = torch.full((400, 1), 1.5)
    assert isinstance(prior.process, GaussianProcess)
    given = (prior.process, prior.denoiser, likelihood, rows, generator())
    guided = pseudo_inverse_guidance(*given).objects
    assert abs(float(guided[:, 0].mean()) - 1.2) < 0.2
    assert dps(*given, scale=0.1).objects.shape == (400, 2)
    draws = twisted_smc(*given)
    assert draws.log_z is not None
    assert abs(draws.log_z + 0.5 * (1.5**2 / 1.25 + math.log(2 * math.pi * 1.25))) < 0.3


def test_a_mixture_in_single_precision_says_nearly_the_same() -> None:
    mixture = GaussianMixture.of(torch.ones(50), torch.randn(50, 8, generator=generator()), 0.1)
    x, half = torch.randn(30, 8, generator=generator(1)), torch.full((30,), 0.5)
    double, single = (each.moments(x, half, half) for each in (mixture, mixture.to(torch.float32)))
    assert single.mean.dtype == torch.float32
    torch.testing.assert_close(single.mean, double.mean.float(), atol=1e-4, rtol=1e-4)
    torch.testing.assert_close(single.variance, double.variance.float(), atol=1e-4, rtol=1e-3)
