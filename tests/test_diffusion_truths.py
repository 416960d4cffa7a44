"""What the diffusion benchmarks measure by is right where it is known: truths on grids and from modes, guided
denoisers, importance resampling, and the posteriors that they are used on."""

from __future__ import annotations

import json
import math
import sys
from pathlib import Path

import pytest
import torch
from torch import Tensor

sys.path.insert(0, str(Path(__file__).parents[1] / "benchmarks"))

import diffusion_phase
import diffusion_visibilities
from diffusion_guided import Climb, Guided
from diffusion_learning import Posterior, interval, keep, resampled, table
from diffusion_truth import by_grid, by_modes
from headwater.diffusion.likelihoods import GaussianLikelihood
from headwater.diffusion.mixtures import GaussianMixture, MixtureDenoiser
from headwater.diffusion.operators import Matrix
from headwater.diffusion.process import GaussianProcess


def mixture(dimensions: int) -> GaussianMixture:
    centre = torch.full((1, dimensions), 2.0)
    return GaussianMixture.of(torch.tensor([3.0, 1.0]), torch.cat([centre, -centre]), torch.tensor([0.25, 0.5]))


def test_truths_have_the_log_z_and_the_masses_of_a_known_mixture() -> None:
    flat = mixture(2)
    on_grid = by_grid(lambda x: flat.log_prob(x) + 1.5, -8, 8, 300, 2, 20_000, 0)
    assert on_grid.log_z == pytest.approx(1.5, abs=1e-3)
    deep = mixture(12)
    starts = 3 * torch.randn(10, 12, generator=torch.Generator().manual_seed(0))
    by_mode = by_modes(lambda x: deep.log_prob(x) + 1.5, starts, 40_000, 20_000, 0)
    assert by_mode.log_z == pytest.approx(1.5, abs=5 * by_mode.log_z_error)
    assert by_mode.log_z_error < 0.01
    for truth, known in ((on_grid, flat), (by_mode, deep)):
        share = known.responsibilities(truth.draws).mean(0)
        assert float(share[0]) == pytest.approx(0.75, abs=0.015)
        side = truth.draws[truth.draws[:, 0] > 0]
        torch.testing.assert_close(side.std(0), torch.full((known.dimensions,), 0.5), atol=0.03, rtol=0)


def linear(deviation: float, steps: int = 10) -> tuple[Posterior, Tensor, Tensor]:
    """A normal prior of one deviation and three measurements of five numbers, with the climb along what they see."""
    generator = torch.Generator().manual_seed(1)
    matrix, y = torch.randn(3, 5, generator=generator), torch.tensor([0.7, -1.0, 2.0])
    process = GaussianProcess.of((5,), steps, "cosine", "velocity", "learned", final_noise=0.05)
    data = GaussianMixture.of(torch.ones(1), torch.zeros(1, 5), deviation**2)
    _, values, basis = torch.linalg.svd(matrix, full_matrices=True)
    curvature = torch.cat([(values / 0.3).square(), torch.zeros(2)])
    climb = Climb(curvature, basis.mT, deviation, 1.0)
    return Posterior(process, data, GaussianLikelihood(Matrix((5,), matrix), 0.3, y), climb), matrix, y


def test_climbing_by_bayes_rule_is_the_exact_posterior_of_a_gaussian_prior() -> None:
    posterior, matrix, y = linear(0.8)
    process = posterior.process
    guided = Guided(process, posterior.prior(), posterior.likelihood.log_prob, posterior.climb)
    exact = MixtureDenoiser(posterior.data.posterior(matrix, y, 0.3), process)
    random = torch.Generator().manual_seed(2)
    number = torch.arange(10).repeat(20)
    truth = posterior.data.posterior(matrix, y, 0.3).sample(200, random)
    state = process.noised(truth, number, random)
    with torch.no_grad():
        said, expected = (
            process.predicted_data(denoiser(state, process.time(number), torch.empty(200, 0)), state, number)
            for denoiser in (guided, exact)
        )
    torch.testing.assert_close(said, expected, atol=2e-3, rtol=2e-3)


def test_a_guided_denoiser_says_what_the_prior_says_where_its_start_is_0_and_learns_more() -> None:
    posterior, _, _ = linear(0.8)
    climb = Climb(posterior.climb.curvature, posterior.climb.basis, 0.8)
    prior = posterior.prior()
    guided = Guided(posterior.process, prior, posterior.likelihood.log_prob, climb)
    state, time = torch.randn(7, 5, generator=torch.Generator().manual_seed(0)), torch.full((7,), 0.5)
    said = guided(state, time, torch.empty(7, 0))
    torch.testing.assert_close(said, prior(state, time, torch.empty(7, 0)))
    said.square().sum().backward()
    moved = {name for name, weight in guided.named_parameters() if weight.grad is not None and weight.grad.any()}
    assert {"factor.weight", "correction.last.weight"} <= moved
    with pytest.raises(ValueError, match="curvature has 2 numbers"):
        Guided(posterior.process, prior, posterior.likelihood.log_prob, Climb(torch.ones(2)))
    with pytest.raises(ValueError, match="basis has shape"):
        Climb(torch.ones(2), torch.eye(3))


def test_resampling_of_the_prior_finds_the_log_evidence_of_a_linear_measurement() -> None:
    posterior, matrix, y = linear(0.8, steps=20)
    x, found = resampled(posterior, 120_000, 5000, torch.Generator().manual_seed(0))
    log_z = float(posterior.ends.log_evidence(matrix, y[None], 0.3)[0])
    assert found.log_z == pytest.approx(log_z, abs=5 * found.log_z_error)
    exact = posterior.ends.posterior(matrix, y, 0.3)
    error = 5 * float(exact.variance.max().sqrt()) / found.effective_sample_size**0.5
    torch.testing.assert_close(x.mean(0).double(), exact.mean[0], atol=error, rtol=0)


@pytest.mark.parametrize("dimensions", [2, 16])
def test_images_of_an_object_measure_alike_so_that_a_posterior_keeps_the_priors_shares(dimensions: int) -> None:
    posterior = diffusion_phase.problem(dimensions, 0)
    x = posterior.data.sample(50, torch.Generator().manual_seed(0))
    empty = torch.empty(50, 0)
    for image in (-x, x.flip(1), -x.flip(1)):
        expected = posterior.likelihood.log_prob(x, empty)
        torch.testing.assert_close(posterior.likelihood.log_prob(image, empty), expected, rtol=1e-3, atol=1e-2)
    truth = diffusion_phase.truth_of(dimensions, 0)
    masses = posterior.ends.responsibilities(truth.draws).mean(0).view(-1, 4).sum(0)
    torch.testing.assert_close(masses, diffusion_phase.SHARES, atol=0.02, rtol=0)


def test_visibilities_are_those_of_the_image_and_amplitudes_those_of_its_point_reflection_too() -> None:
    seen = diffusion_visibilities.array()
    points = diffusion_visibilities.baselines()
    assert float(points.norm(dim=1).max()) == pytest.approx(4.0)
    image = seen.images(seen.prior.sample(1, torch.Generator().manual_seed(0)))[0]
    axis = torch.arange(8) - 3.5
    turns = points[:, 0, None, None] * axis + points[:, 1, None, None] * axis[:, None]
    waves = (-2j * math.pi / 8 * turns).exp()
    expected = (waves * image.view(8, 8)).sum((1, 2))
    said = seen.visibilities @ image
    torch.testing.assert_close(torch.complex(*said.chunk(2)), expected, atol=1e-3, rtol=1e-3)
    amplitudes = diffusion_visibilities.Amplitudes(seen.visibilities)
    reflected = image.view(8, 8).flip(0, 1).flatten()
    torch.testing.assert_close(amplitudes(image[None]), amplitudes(reflected[None]), atol=1e-3, rtol=1e-3)
    torch.testing.assert_close(amplitudes(image[None])[0], expected.abs(), atol=1e-3, rtol=1e-3)


def test_the_array_prior_is_that_of_images_and_its_curvature_that_of_the_singular_values() -> None:
    posterior, _ = diffusion_visibilities.problem("complex", 0)
    seen = diffusion_visibilities.array()
    whitened = (seen.visibilities @ seen.matrix).double()
    gram = whitened.mT @ whitened
    torch.testing.assert_close(gram, torch.diag(gram.diagonal()), atol=1e-2, rtol=0)
    expected = gram.diagonal().float() / diffusion_visibilities.NOISE**2
    torch.testing.assert_close(posterior.climb.curvature, expected, atol=1e-3, rtol=1e-3)


def test_rows_are_made_once_and_a_table_shows_their_mean_and_interval(tmp_path: Path) -> None:
    output, made = tmp_path / "results.json", []

    def make(value: float) -> dict[str, object]:
        made.append(value)
        return {"error": value}

    for _ in range(2):
        rows = [
            keep(output, {"seed": seed, "sampler": "x"}, lambda seed=seed: make(seed + 1.0), ["a"]) for seed in (0, 1)
        ]
    assert made == [1.0, 2.0]
    assert json.loads(output.read_text())["rows"] == rows
    assert table(rows, ("sampler",), {"error": "off by", "absent": "none"})[2] == "| x | 1.5 ± 6.4 |  |"
    assert interval([2.0]) == "2"
