"""Modes that a posterior must tell apart: waves of the state, chains from a seeded replay, and their benchmarks."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
import torch
from torch import Tensor

sys.path.insert(0, str(Path(__file__).parents[1] / "benchmarks"))

import diffusion_energies
import diffusion_modes
from diffusion_energies import Gaussians, Scaled, even_chain, normal_prior
from diffusion_known import Figures, nine
from headwater.diffusion.adapters import Adapter
from headwater.diffusion.chains import draw_chains
from headwater.diffusion.denoisers import ResidualMLP
from headwater.diffusion.mixtures import GaussianMixture, MixtureDenoiser
from headwater.diffusion.priors import Prior
from headwater.diffusion.process import GaussianProcess
from headwater.diffusion.targets import DensityRatio, Energy, Funnel, ManyWell, OverNormal
from headwater.objectives import Objective
from headwater.search import ExplorationSettings
from headwater.training import Training


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def error_of_fit(octaves: int, updates: int = 100) -> float:
    """Mean squared error on a function that changes sign every unit."""
    torch.manual_seed(0)
    network, drawing = ResidualMLP((1,), 0, 32, 1, octaves=octaves), generator()
    optimizer = torch.optim.Adam(network.parameters(), 5e-3)

    def error(count: int) -> Tensor:
        x = 16 * torch.rand(count, 1, generator=drawing) - 8
        return (network(x, torch.ones(count), torch.empty(count, 0)) - (torch.pi * x).sin()).square().mean()

    for _ in range(updates):
        optimizer.zero_grad()
        error(128).backward()  # type: ignore[no-untyped-call]
        optimizer.step()
    return float(error(2000).detach())


def test_waves_of_the_state_let_a_network_learn_what_changes_fast() -> None:
    assert error_of_fit(octaves=5) < 0.02
    assert error_of_fit(octaves=0) > 0.2


def test_waves_have_the_periods_that_they_are_said_to_have() -> None:
    network = ResidualMLP((1,), 0, 8, 1, octaves=3)
    with torch.no_grad():
        network.enter.weight[:, :2] = 0  # of the state, only its waves are left
    states = torch.tensor([[3.0], [35.0], [19.0]])
    said = network(states, torch.ones(3), torch.empty(3, 0))
    torch.testing.assert_close(said[1], said[0])
    assert not torch.allclose(said[2], said[0], atol=1e-3)  # half a period of the longest wave
    assert network.settings()["octaves"] == 3
    with pytest.raises(ValueError, match="octaves = -1"):
        ResidualMLP((1,), octaves=-1)
    with pytest.raises(ValueError, match="octaves = -1"):
        Adapter(octaves=-1)


def test_a_correction_of_a_closed_form_prior_starts_as_the_prior() -> None:
    problem = nine(4, "learned")
    assert isinstance(problem.prior, MixtureDenoiser)
    posterior = Adapter("correction", width=8, octaves=2).posterior(Prior(problem.process, problem.prior))
    state, time = 5 * torch.randn(6, 2, generator=generator()), problem.process.time(torch.arange(6) % 4)
    rows = torch.empty(6, 0)
    assert torch.equal(posterior(state, time, rows), problem.prior(state, time, rows))


def test_a_seeded_replay_and_chains_of_its_own_teach_a_sampler_which_modes_there_are() -> None:
    """Three modes, of which the reward leaves the outer two, one four times the other."""
    process = GaussianProcess.of((1,), 6, "exploding", "noise", "learned", largest_noise=12.0, smallest_noise=0.2)
    place = torch.tensor([[-4.0], [0.0], [4.0]])
    mixture, target = (
        GaussianMixture.of(torch.tensor(weight), place, 0.3) for weight in ([1.0, 1.0, 1.0], [0.8, 0.0, 0.2])
    )
    prior = MixtureDenoiser(mixture, process)
    ends = [each.noised(1.0, 0.2) for each in (target, mixture)]
    reward = DensityRatio(*ends)
    method = diffusion_modes.Method(
        "", Training(150, 64, 32, 200, True, learning_rate=5e-3, schedule="cosine"), Objective("tb", "huber"),
        ExplorationSettings(epsilon=0.0), adapter=Adapter("correction", width=32, blocks=1, octaves=4),
    )  # fmt: skip
    posterior, trainer, _ = diffusion_modes.train(process, prior, reward, method, 0)
    assert trainer.search.drawn == 200 + 150 * 64
    drawn = draw_chains(process, prior, posterior, reward, torch.empty(1000, 0), generator())
    share = mixture.responsibilities(drawn.objects).mean(0)
    assert float(share[1]) < 0.1  # a third, under the prior
    assert float(share[0]) == pytest.approx(0.8, abs=0.12)


@pytest.mark.parametrize("energy", [Gaussians(), Funnel(3), ManyWell(1)])
def test_the_prior_of_an_energy_is_normal_and_the_rewards_log_z_the_energys(energy: Energy) -> None:
    process, prior = normal_prior(energy.dimensions, 5)
    ends, log_prob = Prior(process, prior).sample(torch.empty(4000, 0), generator())
    assert float(ends.mean(0).abs().max()) < 0.07
    assert float((ends.std(0) - 1).abs().max()) < 0.05
    exact = torch.distributions.Normal(0.0, 1.0).log_prob(ends).sum(1)
    torch.testing.assert_close(log_prob, exact, atol=2e-3, rtol=0)  # its chain is the noising process, reversed
    reward, inside = Scaled(OverNormal(energy, 2.0**2)), energy.sample(50, generator(1))
    normal = torch.distributions.Normal(0.0, 2.0).log_prob(inside).sum(1)
    said = reward(inside / 2, torch.empty(50, 0))
    torch.testing.assert_close(said, energy(inside, torch.empty(50, 0)) - normal, atol=2e-3, rtol=1e-4)


def test_an_even_chain_keeps_variance_one_and_falls_by_one_factor() -> None:
    process = even_chain(2, 7)
    alphas, sigmas = torch.tensor(process.alphas), torch.tensor(process.sigmas)
    torch.testing.assert_close(alphas.square() + sigmas.square(), torch.ones(8))
    steps = (sigmas / alphas).log().diff()
    torch.testing.assert_close(steps, steps[:1].expand(7))
    assert process.start_deviation == pytest.approx(1.0)


def test_a_goal_is_missed_if_one_run_misses_it() -> None:
    run: Figures = {"modes_found": 9, "modes": 9, "total_variation": 0.07, "log_z": 0.0, "share": 0.5}
    run |= {"cpu_seconds": 90.0}
    (said, _) = diffusion_modes.verdict([run, run | {"total_variation": 0.09}])
    assert "variation at most 0.08: missed" in said
    assert "all modes found: reached" in said
    row = diffusion_energies.compared("funnel", [{"gap": 0.6, "reweighted_error": -0.5}])
    assert row.endswith("| yes | no |")
