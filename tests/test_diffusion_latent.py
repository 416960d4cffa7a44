"""Latent priors: likelihoods of latents are those of what they decode to, autoencoders learn, and folders come back."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from torch.distributions import Normal, kl_divergence

from headwater.diffusion.denoisers import ResidualMLP
from headwater.diffusion.guidance import dps
from headwater.diffusion.latent import (
    AUTOENCODER_WEIGHTS,
    Autoencoder,
    Decoded,
    LatentPrior,
    load_latent_prior,
    of_latents,
    save_latent_prior,
)
from headwater.diffusion.latent_fitting import AutoencoderFitting, fit_autoencoder
from headwater.diffusion.likelihoods import (
    ClassifierLikelihood,
    FunctionLikelihood,
    GaussianLikelihood,
    Likelihood,
    PoissonLikelihood,
    Product,
    Tempered,
)
from headwater.diffusion.mixtures import GaussianMixture, MixtureDenoiser
from headwater.diffusion.operators import Mask, Matrix, box_mask
from headwater.diffusion.priors import AUTOENCODER, Prior, Units, load_prior
from headwater.diffusion.process import GaussianProcess
from headwater.training import Training

NONE = torch.empty(64, 0)


def seeded(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def latent_prior(latent: int = 2) -> LatentPrior:
    torch.manual_seed(0)
    process = GaussianProcess.of((2,), 4, "cosine", "velocity", final_noise=0.1)
    prior = Prior(process, ResidualMLP((2,), width=8, blocks=1), Units(0.5, 2.0))
    return LatentPrior(prior, Autoencoder((1, 3, 3), latent, width=8))


def test_a_measurement_of_what_a_linear_decoder_makes_is_a_linear_measurement_of_latents() -> None:
    decoder, seen = torch.randn(6, 3, generator=seeded()), Mask((6,), box_mask((6,), slice(0, 2)))
    y, z = torch.tensor([0.3, -1.0]), torch.randn(64, 3, generator=seeded(1))
    ours = of_latents(GaussianLikelihood(seen, 0.2, y), lambda z: z @ decoder.mT, (3,))
    expected = GaussianLikelihood(Matrix((3,), decoder[:2]), 0.2, y)
    assert isinstance(ours, GaussianLikelihood)
    assert isinstance(ours.operator, Decoded)
    for one, other in zip(ours.gradient(z, NONE), expected.gradient(z, NONE), strict=True):
        torch.testing.assert_close(one, other)
    torch.testing.assert_close(ours.draw(z, seeded(2)), expected.draw(z, seeded(2)))
    asked = of_latents(GaussianLikelihood(seen, 0.2), lambda z: z @ decoder.mT, (3,))
    torch.testing.assert_close(asked.log_prob(z, y.expand(64, 2)), expected.log_prob(z, NONE))


def test_latent_dps_takes_the_steps_of_dps_on_the_decoded_measurement() -> None:
    process = GaussianProcess.of((3,), 12, "cosine", "velocity", "learned", final_noise=0.1)
    denoiser = MixtureDenoiser(GaussianMixture.of(torch.ones(1), torch.zeros(1, 3), 1.0), process)
    decoder, y = torch.randn(4, 3, generator=seeded()), torch.tensor([1.0, 0.0, -1.0, 2.0])
    whole = Mask((4,), box_mask((4,), slice(0, 4)))
    ours = of_latents(GaussianLikelihood(whole, 0.1, y), lambda z: z @ decoder.mT, (3,))
    other = GaussianLikelihood(Matrix((3,), decoder), 0.1, y)
    drawn = [dps(process, denoiser, likelihood, NONE, seeded(3), 0.5).objects for likelihood in (ours, other)]
    torch.testing.assert_close(drawn[0], drawn[1], atol=1e-4, rtol=1e-4)


def test_every_kind_of_likelihood_is_of_the_decoded_object() -> None:
    def decode(z: Tensor) -> Tensor:
        return torch.cat([z.square(), 1 - z], 1)

    counted = PoissonLikelihood(Mask((4,), box_mask((4,), slice(0, 2))), 3.0, 1.0)
    classified = ClassifierLikelihood(lambda x: x[:, :3])
    function = FunctionLikelihood(lambda x: -x.square().sum(1))
    all_three: Likelihood = Tempered(Product([counted, classified, function]), 0.7)
    z = torch.randn(64, 2, generator=seeded())
    condition = torch.randint(3, (64, 3), generator=seeded(1)).float()
    ours = of_latents(all_three, decode, (2,))
    assert ours.condition_size == 3
    torch.testing.assert_close(ours.log_prob(z, condition), all_three.log_prob(decode(z), condition))


def test_evidence_is_the_log_density_around_what_is_decoded_less_the_divergence_of_the_latents() -> None:
    autoencoder = latent_prior().autoencoder
    with torch.no_grad():
        autoencoder.log_deviation.fill_(-0.5)
    x, noise = torch.randn(64, 1, 3, 3, generator=seeded()), torch.randn(64, 2, generator=seeded(1))
    mean, deviation = autoencoder.encode(x)
    around = Normal(autoencoder.decode(mean + deviation * noise), torch.tensor(-0.5).exp())
    divergence = kl_divergence(Normal(mean, deviation), Normal(0.0, 1.0)).sum(1)
    torch.testing.assert_close(autoencoder.evidence(x, noise), around.log_prob(x).flatten(1).sum(1) - divergence)


def test_an_autoencoder_learns_a_curved_sheet_and_draws_near_it() -> None:
    def sheet(count: int, seed: int) -> Tensor:
        u, v = 3 * torch.rand(2, count, generator=seeded(seed)) - 1.5
        return torch.stack([u, v, u.square() - 1, u * v, v.square() - 1], 1)

    training = Training(iterations=400, batch_size=128, learning_rate=3e-3, schedule="cosine")
    autoencoder = fit_autoencoder(sheet(2000, 0), 2, 64, training, seed=1)
    held_out = sheet(500, 1)
    away = (autoencoder.decode(autoencoder.encode(held_out)[0]) - held_out).square().mean()
    left = torch.linalg.svdvals(held_out - held_out.mean(0)).square()[2:].sum() / held_out.numel()
    assert away < 0.3 * left  # of what the two principal components leave
    drawn = AutoencoderFitting(autoencoder).sample(torch.empty(500, 0), generator=seeded(2)).steps["state"]
    random = seeded(4)
    shuffled = torch.stack([column[torch.randperm(500, generator=random)] for column in held_out.mT], 1)
    near, far = (torch.cdist(points, sheet(2000, 3)).amin(1).median() for points in (drawn, shuffled))
    assert near < 0.5 * far


def test_a_latent_prior_comes_back_from_its_folder(tmp_path: Path) -> None:
    latent = latent_prior()
    save_latent_prior(latent, tmp_path)
    again = load_latent_prior(tmp_path)
    assert again.shape == (1, 3, 3)
    assert again.prior.units == Units(0.5, 2.0)
    drawn = [one.sample(torch.empty(5, 0), seeded(7)) for one in (latent, again)]
    assert drawn[0].shape == (5, 1, 3, 3)
    torch.testing.assert_close(drawn[0], drawn[1], atol=0, rtol=0)
    assert not any(weight.requires_grad for weight in again.autoencoder.parameters())
    with pytest.raises(ValueError, match="its prior is of latents"):
        load_prior(tmp_path)


def test_a_folder_that_is_no_latent_prior_says_what_is_wrong(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=f"there is no {AUTOENCODER} in it"):
        load_latent_prior(tmp_path)
    save_latent_prior(latent_prior(), tmp_path)
    settings = (tmp_path / AUTOENCODER).read_text()
    for change, complaint in (
        ({"format": "other"}, "format is 'other'"),
        ({"network": {"kind": "unet"}}, "network.kind is 'unet'"),
        ({"network": {"kind": "mlp", "shape": [1, 3, 3], "latent": 0}}, "latent = 0: must be a whole number"),
        ({"network": {"kind": "mlp", "shape": [1, 3, 3], "latent": 2, "width": 9}}, "has shape"),
    ):
        (tmp_path / AUTOENCODER).write_text(json.dumps(json.loads(settings) | change))
        with pytest.raises(ValueError, match=complaint):
            load_latent_prior(tmp_path)
    (tmp_path / AUTOENCODER).write_text(settings)
    weights = load_file(str(tmp_path / AUTOENCODER_WEIGHTS))
    save_file(weights | {"log_deviation": torch.tensor(float("nan"))}, str(tmp_path / AUTOENCODER_WEIGHTS))
    with pytest.raises(ValueError, match="log_deviation has a number that is not finite"):
        load_latent_prior(tmp_path)


def test_latents_of_another_size_than_the_prior_draws_are_refused() -> None:
    with pytest.raises(ValueError, match=r"the prior draws shape \(2,\), the autoencoder's latents have \(3,\)"):
        latent_prior(3)
    autoencoder = latent_prior().autoencoder
    with pytest.raises(ValueError, match=r"takes objects of shape \(1, 3, 3\), these have \(3, 3\)"):
        autoencoder.encode(torch.zeros(2, 3, 3))
    with pytest.raises(ValueError, match=r"takes latents of shape \(2,\)"):
        autoencoder.decode(torch.zeros(2, 3))
