"""Chains of known priors: their own log Z, and the optimal denoiser of a linear-Gaussian chain."""

from __future__ import annotations

import math

import pytest
import torch

from headwater.diffusion.chains import GaussianChain, QuadraticReward, draw_chains, walk_back
from headwater.diffusion.mixtures import GaussianMixture, MixtureDenoiser
from headwater.diffusion.process import BrownianProcess, GaussianProcess

GAUSSIAN = GaussianMixture.of(torch.ones(1), torch.tensor([[0.5, -1.0, 0.2]]), torch.tensor([[0.3, 2.0, 0.8]]))
TILT = QuadraticReward(torch.tensor([1.0, -0.5, 0.0]).double(), torch.zeros(3).double(), -0.3)
SEEN = QuadraticReward.of_measurement(torch.tensor([1.0, 0.0, -2.0]), torch.tensor([0.9, 0.0, 1.0]), 0.4)
CASES = [
    (GaussianProcess.of((3,), 5, "cosine", "noise", "large"), TILT),
    (GaussianProcess.of((3,), 5, "cosine", "velocity", "small", final_noise=0.1), TILT),
    (GaussianProcess.of((3,), 5, "exploding", "data", "large", largest_noise=5.0), TILT),
    (GaussianProcess.of((3,), 5, "cosine", "noise", "learned", final_noise=0.1), SEEN),
    (BrownianProcess((3,), 5, 2.0), TILT),
]
NAMES = ["noise, large", "velocity, small", "exploding, data", "noise, learned", "brownian"]


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


@pytest.mark.parametrize(("process", "reward"), CASES, ids=NAMES)
def test_with_the_optimal_denoiser_every_chain_is_in_balance(
    process: GaussianProcess | BrownianProcess, reward: QuadraticReward
) -> None:
    prior = MixtureDenoiser(GAUSSIAN, process)
    chain = GaussianChain(process, prior, reward)
    nothing = torch.empty(200, 0)
    drawn = draw_chains(process, prior, chain.denoiser(), reward, nothing, generator())
    # all that may be left of a residual is what the start knows of the data
    start = process.start(200, generator())
    known = chain.log_expected_reward(start, torch.zeros(200, dtype=torch.int64))
    torch.testing.assert_close(drawn.log_ratio - drawn.log_reward, -known, atol=2e-3, rtol=0)
    # and of chains of the prior it is the same: balance holds along every chain
    ours = draw_chains(process, chain.denoiser(), prior, reward, nothing, generator())
    torch.testing.assert_close(-ours.log_ratio - ours.log_reward, -known, atol=2e-3, rtol=0)
    assert float((drawn.log_reward - ours.log_reward).abs().mean()) > 0.1


@pytest.mark.parametrize(("process", "reward"), CASES, ids=NAMES)
def test_log_z_of_the_chain_is_the_mean_reward_of_its_ends(
    process: GaussianProcess | BrownianProcess, reward: QuadraticReward
) -> None:
    prior = MixtureDenoiser(GAUSSIAN, process)
    drawn = draw_chains(process, prior, prior, reward, torch.empty(100_000, 0), generator())
    assert bool((drawn.log_ratio == 0).all())
    estimate = float(drawn.log_reward.logsumexp(0)) - math.log(100_000)
    assert abs(GaussianChain(process, prior, reward).log_z - estimate) < 0.03


def test_the_likelihood_of_a_measurement_is_normalised_and_leaves_out_what_is_not_seen() -> None:
    points = torch.randn(20, 3, generator=generator())
    y = torch.distributions.Normal(points[:, [0, 2]] * torch.tensor([1.0, -2.0]), 0.4)
    expected = y.log_prob(torch.tensor([0.9, 1.0])).sum(1)
    torch.testing.assert_close(SEEN(points, torch.empty(20, 0)), expected)


def test_log_z_of_a_coarse_chain_differs_from_the_mixtures_and_the_posteriors_denoiser_finds_it() -> None:
    """Of a mixture, where no closed form is at hand: with the posterior's denoiser few chains do what many of the
    prior's do, and neither agrees with the mixture's own evidence."""
    weight, mean = torch.tensor([1.0, 2.0]), torch.tensor([[-1.5, 0.0], [1.0, 1.0]])
    one = GaussianMixture.of(weight, mean, 0.1)
    process = GaussianProcess.of((2,), 5, "cosine", variance="large")
    matrix, y = torch.tensor([[1.0, 0.5]]), torch.tensor([-1.2])

    def reward(objects: torch.Tensor, condition: torch.Tensor) -> torch.Tensor:
        return torch.distributions.Normal(objects @ matrix[0], 0.2).log_prob(y[0])

    prior = MixtureDenoiser(one, process)
    posterior = MixtureDenoiser(one.posterior(matrix, y, 0.2), process)
    many = draw_chains(process, prior, prior, reward, torch.empty(40_000, 0), generator())
    few = draw_chains(process, prior, posterior, reward, torch.empty(4000, 0), generator())
    log_z = [
        float((each.log_reward - each.log_ratio).logsumexp(0)) - math.log(len(each.objects)) for each in (many, few)
    ]
    assert abs(log_z[0] - log_z[1]) < 0.05
    assert abs(log_z[0] - float(one.log_evidence(matrix, y[None], 0.2))) > 0.1


def test_a_curvature_that_fixed_variances_cannot_follow_is_refused() -> None:
    process = GaussianProcess.of((3,), 5)
    with pytest.raises(ValueError, match="curvature: must be 0"):
        GaussianChain(process, MixtureDenoiser(GAUSSIAN, process), SEEN)
    with pytest.raises(ValueError, match="curvature = -1"):
        QuadraticReward(torch.zeros(2), torch.tensor([0.0, -1.0]))
    with pytest.raises(ValueError, match="slope: 2 numbers"):
        GaussianChain(process, MixtureDenoiser(GAUSSIAN, process), QuadraticReward(torch.zeros(2), torch.zeros(2)))


def test_chains_walked_back_from_the_posterior_bound_log_z_from_above() -> None:
    """Of one Gaussian with learned variances the noising process is the reversal of the prior's chain exactly, and the
    bound's distance is the divergence of the posterior's chains from the prior's."""
    process, reward = CASES[3]
    prior = MixtureDenoiser(GAUSSIAN, process)
    chain = GaussianChain(process, prior, reward)
    matrix, y = torch.tensor([[1.0, 0.0, 0.0], [0.0, 0.0, -2.0]]), torch.tensor([0.9, 1.0])
    # the chain's ends are the Gaussian's draws, shrunk and with the noise that is left
    ends = GAUSSIAN.noised(process.alphas[-1], process.sigmas[-1])  # type: ignore[union-attr]
    objects = ends.posterior(matrix, y, 0.4).sample(4000, generator())
    nothing = torch.empty(4000, 0)
    assert abs(chain.log_z - float(ends.log_evidence(matrix, y[None], 0.4))) < 1e-2
    balanced = walk_back(process, prior, chain.denoiser(), reward, objects, nothing, generator())
    weight = balanced.log_reward - balanced.log_ratio
    assert abs(float(weight.mean()) - chain.log_z) < 1e-2
    loose = walk_back(process, prior, prior, reward, objects, nothing, generator())
    assert bool((loose.log_ratio == 0).all())
    assert float(loose.log_reward.mean()) > chain.log_z + 0.5


def test_the_denoiser_of_the_exact_posterior_is_the_optimal_one_where_both_are_known() -> None:
    process, reward = CASES[3]
    prior = MixtureDenoiser(GAUSSIAN, process)
    matrix, y = torch.tensor([[1.0, 0.0, 0.0], [0.0, 0.0, -2.0]]), torch.tensor([0.9, 1.0])
    ends = GAUSSIAN.noised(process.alphas[-1], process.sigmas[-1])  # type: ignore[union-attr]
    posterior = MixtureDenoiser(ends.posterior(matrix, y, 0.4), process, of_ends=True)
    state, number = process.start(5, generator()), torch.arange(5)
    optimal = GaussianChain(process, prior, reward).denoiser()
    law, other = (
        process.law(each(state, process.time(number), torch.empty(5, 0)), state, number)
        for each in (optimal, posterior)
    )
    torch.testing.assert_close(law.mean, other.mean, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(law.deviation, other.deviation, rtol=1e-4, atol=1e-4)
