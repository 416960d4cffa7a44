"""Priors from diffusers take the scheduler's own steps, and what has no density is refused."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch
from torch import Tensor

from headwater.diffusion.adapters import Adapter
from headwater.diffusion.diffusers_prior import ConvolutionalNetwork, DiffusersDenoiser, process_of
from headwater.diffusion.priors import Prior, load_prior, save_prior
from headwater.diffusion.process import GaussianProcess

diffusers = pytest.importorskip("diffusers")

SHAPE = (2, 4, 4)
PREDICTIONS = ("epsilon", "sample", "v_prediction")


def steps_agree(scheduler, n_steps: int, eta: float = 1.0, within: float = 1e-5) -> tuple[int, int]:
    """Every step of the chain is the scheduler's own with the same noise; returns the steps of both."""
    process = process_of(scheduler, SHAPE, n_steps, eta)
    scheduler.set_timesteps(n_steps)
    implicit = isinstance(scheduler, diffusers.DDIMScheduler)
    learned = process.variance == "learned"
    random = torch.Generator().manual_seed(0)
    # the data and noise of real states: a prediction at random would make huge data at the noisy end
    data = torch.rand((3, *SHAPE), generator=random) * 3 - 1.5
    for number, step in enumerate(scheduler.timesteps[: process.n_steps]):
        assert process.time(torch.tensor([number]))[0] * scheduler.config.num_train_timesteps == pytest.approx(
            int(step)
        )
        numbers = torch.full((3,), number)
        state = process.noised(data, numbers, random)
        said = GaussianProcess.prediction_of(process, data, state, numbers)
        if learned:
            said = torch.cat([said, torch.rand((3, *SHAPE), generator=random) * 2 - 1], 1)
        law = process.law(said, state, numbers)
        drawn = law.sample(torch.Generator().manual_seed(number))
        more = {"eta": eta} if implicit else {}
        generator = torch.Generator().manual_seed(number)
        own = scheduler.step(said, step, state, generator=generator, **more).prev_sample
        torch.testing.assert_close(drawn, own, atol=within, rtol=1e-5)
        assert (law.deviation > 0).all()
        assert law.log_prob(drawn).isfinite().all()
    return process.n_steps, len(scheduler.timesteps)


@pytest.mark.parametrize("prediction", PREDICTIONS)
@pytest.mark.parametrize("clip", [False, True])
@pytest.mark.parametrize("spacing", ["leading", "linspace", "trailing"])
def test_a_ddpm_chain_steps_as_its_scheduler_does(prediction: str, clip: bool, spacing: str) -> None:
    for variance in ("fixed_small", "fixed_small_log", "fixed_large", "learned_range"):
        scheduler = diffusers.DDPMScheduler(
            num_train_timesteps=100, variance_type=variance, prediction_type=prediction, clip_sample=clip,
            timestep_spacing=spacing, beta_end=0.1,
        )  # fmt: skip
        ours, all_steps = steps_agree(scheduler, 9)
        # the last step is kept only where the scheduler adds noise of its own size in it
        assert ours == (all_steps if spacing == "trailing" and variance == "fixed_large" else all_steps - 1)


@pytest.mark.parametrize("prediction", PREDICTIONS)
@pytest.mark.parametrize("clip", [False, True])
@pytest.mark.parametrize("spacing", ["leading", "linspace", "trailing"])
def test_a_ddim_chain_steps_as_its_scheduler_does(prediction: str, clip: bool, spacing: str) -> None:
    for eta, to_one, offset in ((1.0, True, 0), (0.3, False, 1)):
        scheduler = diffusers.DDIMScheduler(
            num_train_timesteps=100, prediction_type=prediction, clip_sample=clip, timestep_spacing=spacing,
            set_alpha_to_one=to_one, steps_offset=offset, beta_schedule="scaled_linear", beta_end=0.1,
        )  # fmt: skip
        ours, all_steps = steps_agree(scheduler, 9, eta)
        assert ours in (all_steps - 1, all_steps)


def test_a_chain_from_pure_noise_steps_as_its_scheduler_does() -> None:
    settings = {"num_train_timesteps": 100, "rescale_betas_zero_snr": True, "timestep_spacing": "trailing"}
    for kind in (diffusers.DDPMScheduler, diffusers.DDIMScheduler):
        # of pure noise the DDIM scheduler takes the root of a rounding error, 1 - aim - deviation^2 in single precision
        within = 1e-5 if kind is diffusers.DDPMScheduler else 1e-3
        steps_agree(kind(prediction_type="v_prediction", clip_sample=False, **settings), 8, within=within)
        with pytest.raises(ValueError, match="rescale_betas_zero_snr"):
            process_of(kind(prediction_type="epsilon", **settings), SHAPE, 8)


@pytest.mark.parametrize(
    ("scheduler", "eta", "said"),
    [
        (lambda: diffusers.DDIMScheduler(), 0.0, "eta = 0.0.*deterministic"),
        (lambda: diffusers.DDIMScheduler(thresholding=True), 1.0, "thresholding"),
        (lambda: diffusers.DDPMScheduler(thresholding=True), 1.0, "thresholding"),
        (lambda: diffusers.DDPMScheduler(variance_type="fixed_large_log"), 1.0, "variance_type = 'fixed_large_log'"),
        (lambda: diffusers.DDPMScheduler(variance_type="learned"), 1.0, "variance_type = 'learned'"),
        (lambda: diffusers.PNDMScheduler(), 1.0, "PNDMScheduler: must be one of DDPMScheduler"),
    ],
)
def test_a_scheduler_whose_steps_have_no_density_is_refused(scheduler, eta: float, said: str) -> None:
    with pytest.raises(ValueError, match=said):
        process_of(scheduler(), SHAPE, 10, eta)


def unet(**settings: object) -> torch.nn.Module:
    torch.manual_seed(0)
    return diffusers.UNet2DModel(
        sample_size=4, in_channels=2, out_channels=settings.pop("out_channels", 2), block_out_channels=(8, 8),
        layers_per_block=1, down_block_types=("DownBlock2D", "AttnDownBlock2D"),
        up_block_types=("AttnUpBlock2D", "UpBlock2D"), norm_num_groups=4, attention_head_dim=4, **settings,
    )  # fmt: skip


def pipeline(folder: Path, model: torch.nn.Module, scheduler=None, name: str = "unet") -> Path:
    model.save_pretrained(folder / name)
    (scheduler or diffusers.DDPMScheduler(num_train_timesteps=100)).save_pretrained(folder / "scheduler")
    return folder


def test_a_pipeline_folder_becomes_a_prior_that_draws_what_the_pipeline_draws(tmp_path: Path) -> None:
    scheduler = diffusers.DDPMScheduler(num_train_timesteps=100, beta_end=0.1)
    diffusers.DDPMPipeline(unet(), scheduler).save_pretrained(tmp_path)
    prior = load_prior(tmp_path, 6)
    assert prior.process.shape == SHAPE
    assert prior.process.n_steps == 5
    drawn, log_prob = prior.sample(torch.empty(3, 0), torch.Generator().manual_seed(1))
    model, random = unet().eval(), torch.Generator().manual_seed(1)
    scheduler.set_timesteps(6)
    state = torch.randn((3, *SHAPE), generator=random)
    with torch.no_grad():
        for step in scheduler.timesteps[:-1]:
            state = scheduler.step(model(state, step).sample, step, state, generator=random).prev_sample
    torch.testing.assert_close(drawn, state, atol=1e-4, rtol=1e-4)
    assert log_prob.isfinite().all()
    assert not any(weight.requires_grad for weight in prior.denoiser.parameters())


def test_models_over_lines_and_with_classes_are_priors_too(tmp_path: Path) -> None:
    torch.manual_seed(0)
    line = diffusers.UNet1DModel(
        sample_size=16, in_channels=2, out_channels=2, block_out_channels=(8, 8), extra_in_channels=0,
        down_block_types=("DownBlock1D", "DownBlock1D"), up_block_types=("UpBlock1D", "UpBlock1D"), norm_num_groups=4,
        use_timestep_embedding=True, time_embedding_type="positional", act_fn="silu", downsample_each_block=True,
        out_block_type="OutConv1DBlock",
    )  # fmt: skip
    assert load_prior(pipeline(tmp_path / "line", line), 5).process.shape == (2, 16)
    tiny = diffusers.DiTTransformer2DModel(
        num_attention_heads=2, attention_head_dim=4, in_channels=2, out_channels=4, num_layers=1, sample_size=4,
        patch_size=2, num_embeds_ada_norm=5, norm_num_groups=1,
    )  # fmt: skip
    learned = diffusers.DDPMScheduler(num_train_timesteps=100, variance_type="learned_range")
    prior = load_prior(pipeline(tmp_path / "classes", tiny, learned, "transformer"), 5)
    assert prior.denoiser.condition == 1
    state, time = torch.randn(2, *SHAPE), torch.full((2,), 0.5)
    one, other = (prior.denoiser(state, time, torch.full((2, 3), float(label))) for label in (1, 2))
    assert one.shape == (2, 4, 4, 4)
    assert not torch.equal(one, other)


def test_an_incomplete_pipeline_folder_says_what_is_missing(tmp_path: Path) -> None:
    def broken(name: str, remove: str) -> Path:
        folder = pipeline(tmp_path / name, unet())
        path = folder / remove
        shutil.rmtree(path) if path.is_dir() else path.unlink()
        return folder

    with pytest.raises(ValueError, match="no scheduler in it"):
        load_prior(broken("without-scheduler", "scheduler"), 5)
    with pytest.raises(ValueError, match="no model in it"):
        load_prior(broken("without-model", "unet"), 5)
    with pytest.raises(ValueError, match="unet: cannot be loaded as a UNet2DModel"):
        load_prior(broken("without-weights", "unet/diffusion_pytorch_model.safetensors"), 5)
    unet().save_pretrained(tmp_path / "bare")
    with pytest.raises(ValueError, match="a model without scheduler/"):
        load_prior(tmp_path / "bare", 5)
    other = pipeline(tmp_path / "other", unet())
    file = other / "scheduler" / "scheduler_config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | {"_class_name": "FlowMatchEulerDiscreteScheduler"}))
    with pytest.raises(ValueError, match="_class_name is 'FlowMatchEulerDiscreteScheduler'"):
        load_prior(other, 5)
    with pytest.raises(ValueError, match=r"2 channels in and 4 out.*variance_type"):
        load_prior(pipeline(tmp_path / "twice", unet(out_channels=4)), 5)
    with pytest.raises(ValueError, match="n_steps = 101"):
        load_prior(pipeline(tmp_path / "steps", unet()), 101)


def test_posteriors_of_a_unet_say_what_it_says_and_learn() -> None:
    scheduler = diffusers.DDIMScheduler(num_train_timesteps=100)
    prior = Prior(process_of(scheduler, SHAPE, 5), DiffusersDenoiser(unet(), 100).requires_grad_(False))
    state, time, y = torch.randn(3, *SHAPE), torch.tensor([0.9, 0.5, 0.01]), torch.randn(3, 4)
    with torch.no_grad():
        said = prior.denoiser(state, time, torch.empty(3, 0))
    pytest.importorskip("peft")
    for adapter, columns in ((Adapter(), 0), (Adapter("lora", rank=2), 0), (Adapter("correction", width=16), 4)):
        posterior = adapter.posterior(prior, columns)
        with torch.no_grad():
            if adapter.kind == "copy":  # torch rounds convolutions otherwise where their weights learn
                torch.testing.assert_close(posterior(state, time, y), said, atol=1e-6, rtol=1e-6)
            else:
                at_first, channels = posterior(state, time, y), said.shape[1]
                assert torch.equal(at_first[:, :channels], said), adapter.kind
                assert not at_first[:, channels:].any()
        own: Tensor = posterior(state, time, y)
        own.square().sum().backward()
        gradients = [w.grad for w in posterior.parameters() if w.requires_grad]
        assert any(g is not None and g.abs().sum() > 0 for g in gradients), adapter.kind
    with pytest.raises(ValueError, match="takes no condition"):
        Adapter().posterior(prior, 4)


def test_a_convolutional_prior_of_our_own_is_written_and_read(tmp_path: Path) -> None:
    torch.manual_seed(0)
    process = GaussianProcess.of(SHAPE, 5, parametrisation="velocity")
    prior = Prior(process, ConvolutionalNetwork(SHAPE, width=8))
    save_prior(prior, tmp_path)
    read = load_prior(tmp_path)
    state, time = torch.randn(2, *SHAPE), torch.tensor([0.9, 0.1])
    nothing = torch.empty(2, 0)
    with torch.no_grad():
        said, again = (one.denoiser.requires_grad_(False)(state, time, nothing) for one in (prior, read))
    assert torch.equal(said, again)
    with pytest.raises(ValueError, match="levels = 4"):
        ConvolutionalNetwork(SHAPE, levels=4)
