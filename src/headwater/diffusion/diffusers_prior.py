"""Priors from diffusers: a pipeline folder with a model and a DDPM or DDIM scheduler, as a chain whose law's mean and
deviation are those of the scheduler's own `step` (which tells neither).

A DDPM scheduler is a `GaussianProcess` as it is (Ho et al. 2020, arXiv 2006.11239); a DDIM scheduler steps otherwise
(Song et al. 2020, 2010.02502, equation 12). Where the last step would be deterministic the chain ends one step earlier,
with the noise that the scheduler would take away there.
"""

from __future__ import annotations

import json
import math
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from headwater.diffusion.denoisers import Denoiser, Network, NetworkSetting
from headwater.diffusion.laws import GaussianLaw, per_chain
from headwater.diffusion.priors import Prior
from headwater.diffusion.process import GaussianProcess, Parametrisation, Variance

if TYPE_CHECKING:
    from diffusers import DDIMScheduler, DDPMScheduler

_MODELS = ("UNet2DModel", "UNet1DModel", "DiTTransformer2DModel")
_MODEL_FOLDERS = ("unet", "transformer")
_SCHEDULERS = ("DDPMScheduler", "DDIMScheduler")
_PREDICTIONS: dict[str, Parametrisation] = {"epsilon": "noise", "sample": "data", "v_prediction": "velocity"}
_VARIANCES: dict[str, Variance] = {
    "fixed_small": "small", "fixed_small_log": "small", "fixed_large": "large", "learned_range": "learned"
}  # fmt: skip
_LEAST_ALPHA = 1e-7
"""In the place of 0 in a chain that starts from pure noise: its signal-to-noise ratio is divided by."""


def load_pipeline(folder: Path, n_steps: int = 0, eta: float = 1.0) -> Prior:
    """The prior in a pipeline folder of diffusers, on `n_steps` of its scheduler's steps; 0 for all that it was trained
    with. eta: of a DDIM scheduler, above 0 to 1.

    Raises ValueError naming the folder and what in it is missing, or is not one that a posterior can be learned from.
    """
    diffusers = _diffusers()
    scheduler_folder = folder / "scheduler"
    found = [folder / name for name in _MODEL_FOLDERS if (folder / name / "config.json").is_file()]
    if not found and not scheduler_folder.is_dir():
        what = "a model without scheduler/" if (folder / "config.json").is_file() else "not a prior"
        raise ValueError(
            f"{folder}: {what}; a prior is a folder with prior.json, a run folder of train prior, or a "
            f"diffusers pipeline folder with scheduler/ and unet/ or transformer/"
        )
    if not found:
        raise ValueError(f"{folder}: no model in it: unet/config.json or transformer/config.json")
    if not (scheduler_folder / "scheduler_config.json").is_file():
        raise ValueError(f"{folder}: no scheduler in it: scheduler/scheduler_config.json says what the model predicts")
    name = _class_name(scheduler_folder / "scheduler_config.json", _SCHEDULERS)
    try:
        scheduler = getattr(diffusers, name).from_pretrained(scheduler_folder, local_files_only=True)
        process, train_steps = _process(scheduler, n_steps, eta)
    except (OSError, ValueError, TypeError, NotImplementedError) as error:
        raise ValueError(f"{scheduler_folder}: {error}") from error
    model = _load_model(found[0])
    denoiser = DiffusersDenoiser(model, train_steps)
    shape = denoiser.shape
    twice = model.config.out_channels == 2 * model.config.in_channels
    if twice != (process.variance == "learned"):
        raise ValueError(
            f"{folder}: the model has {model.config.in_channels} channels in and {model.config.out_channels} out, "
            f"which does not fit variance_type = {scheduler.config.get('variance_type')!r} of its scheduler"
        )
    return Prior(_with_shape(process, shape), denoiser.requires_grad_(False))


def process_of(
    scheduler: DDPMScheduler | DDIMScheduler, shape: tuple[int, ...], n_steps: int = 0, eta: float = 1.0
) -> GaussianProcess:
    """The chain that a scheduler steps along, for states of `shape`. Raises ValueError saying which setting of it makes
    a step deterministic, or has no law that could be written down."""
    return _with_shape(_process(scheduler, n_steps, eta)[0], shape)


class DiffusersDenoiser(Denoiser):
    """A `UNet2DModel`, `UNet1DModel` or `DiTTransformer2DModel`. Where it has classes, the first column of the
    condition is the number of one.

    train_steps: number of steps that the model was trained with; times are shares of it.
    """

    def __init__(self, model: nn.Module, train_steps: int) -> None:
        super().__init__()
        self.model, self.train_steps = model.eval(), train_steps
        config: Any = model.config
        name = type(model).__name__
        self.classes = config.num_embeds_ada_norm if name.startswith("DiT") else config.get("num_class_embeds")
        self.condition = 1 if self.classes else 0
        size = config.sample_size
        if size is None:
            raise ValueError(f"sample_size is not in the configuration of this {name}: what shape has an object?")
        axes = 1 if name == "UNet1DModel" else 2
        self.shape = (config.in_channels, *([size] * axes if isinstance(size, int) else size))

    def forward(self, state: Tensor, time: Tensor, condition: Tensor) -> Tensor:
        step = (time * self.train_steps).round().long()
        classes = {"class_labels": condition[:, 0].long()} if self.classes else {}
        return self.model(state, step, **classes, return_dict=False)[0]

    def train(self, mode: bool = True) -> DiffusersDenoiser:
        """Dropout stays off: log-probabilities must be those of the sampler."""
        return super().train(False)

    def silence(self) -> None:
        last = getattr(self.model, "conv_out", None) or getattr(self.model, "proj_out_2", None)
        if last is None:
            return super().silence()
        nn.init.zeros_(last.weight), nn.init.zeros_(last.bias)


class ConvolutionalNetwork(Network):
    """A `UNet2DModel` of our own size for images `[channels, height, width]`.

    width: channels of its first level, a multiple of 4, twice as many in the others. blocks: residual blocks a level.
    levels: resolutions, each half of the one before; the deepest has attention. Raises ValueError naming what is out of
    range, or where the extra is missing.
    """

    def __init__(
        self,
        shape: tuple[int, ...] | list[int],
        condition: int = 0,
        width: int = 32,
        blocks: int = 1,
        levels: int = 2,
        learned_variance: bool = False,
    ) -> None:
        super().__init__()
        if condition:
            raise ValueError(f"condition = {condition}: the convolutional network takes none")
        if len(shape) != 3:
            raise ValueError(f"shape = {list(shape)}: the convolutional network is for images, channels first")
        if not 1 <= levels <= 6 or any(length % 2 ** (levels - 1) for length in shape[1:]):
            raise ValueError(f"levels = {levels}: height and width of {list(shape)} must halve so often less one")
        if not (0 < width <= 4096 and width % 4 == 0 and 1 <= blocks <= 100):
            raise ValueError(f"width = {width}, blocks = {blocks}: width must be a multiple of 4, blocks 1 to 100")
        self.shape, self.learned_variance = tuple(shape), bool(learned_variance)
        plain, with_attention = levels - 1, 1
        self.model = _diffusers().UNet2DModel(
            sample_size=tuple(shape[1:]), in_channels=shape[0], out_channels=shape[0] * (2 if learned_variance else 1),
            block_out_channels=(width, *[2 * width] * (levels - 1)), layers_per_block=blocks,
            down_block_types=("DownBlock2D",) * plain + ("AttnDownBlock2D",) * with_attention,
            up_block_types=("AttnUpBlock2D",) * with_attention + ("UpBlock2D",) * plain,
            norm_num_groups=4, attention_head_dim=max(4, width // 4),
        ).eval()  # fmt: skip
        self._settings: dict[str, NetworkSetting] = {
            "shape": list(shape), "width": width, "blocks": blocks, "levels": levels,
            "learned_variance": self.learned_variance,
        }  # fmt: skip

    def settings(self) -> dict[str, NetworkSetting]:
        return dict(self._settings)

    def forward(self, state: Tensor, time: Tensor, condition: Tensor) -> Tensor:
        return self.model(state, time * 1000, return_dict=False)[0]

    def widened(self, columns: int) -> Denoiser:
        return Denoiser.widened(self, columns)

    def silence(self) -> None:
        nn.init.zeros_(self.model.conv_out.weight), nn.init.zeros_(self.model.conv_out.bias)


@dataclass(frozen=True)
class ImplicitProcess(GaussianProcess):
    """The chain of a DDIM scheduler with noise. towards: alpha of the point that each step aims at, which need not be
    that of the next grid point. eta: 1 for the noise of the small variance, less for less.

    The data in a step are clipped, if at all, the noise in it is as it was predicted.
    """

    towards: tuple[float, ...] = ()
    eta: float = 1.0

    def law(self, prediction: Tensor, state: Tensor, number: Tensor) -> GaussianLaw:
        alpha, sigma, towards, left = (
            per_chain(self._at(name, number), state) for name in ("alpha", "sigma", "towards", "left")
        )
        if self.parametrisation == "noise":
            noise = prediction
        elif self.parametrisation == "velocity":
            noise = alpha * prediction + sigma * state
        else:
            noise = (state - alpha * prediction) / sigma
        mean = towards * self.predicted_data(prediction, state, number) + left * noise
        return GaussianLaw(mean, self._at("deviation", number))

    @cached_property
    def _tables(self) -> dict[str, Tensor]:
        signal, aims = ([alpha**2 for alpha in alphas] for alphas in (self.alphas[:-1], self.towards))
        deviations = _implicit_deviations(signal, aims, self.eta)
        left = [math.sqrt(max(1 - aim - one**2, 0.0)) for aim, one in zip(aims, deviations, strict=True)]
        own = {"towards": self.towards, "deviation": deviations, "left": left}
        return super()._tables | {name: torch.tensor(values) for name, values in own.items()}


def _process(scheduler: Any, n_steps: int, eta: float) -> tuple[GaussianProcess, int]:
    """The chain, of no shape yet, and the number of steps that the model was trained with."""
    config, name = scheduler.config, type(scheduler).__name__
    train_steps = int(config.num_train_timesteps)
    if name not in _SCHEDULERS:
        raise ValueError(f"{name}: must be one of {', '.join(_SCHEDULERS)}, whose steps have a density")
    if not 0 <= n_steps <= train_steps:
        raise ValueError(f"n_steps = {n_steps}: must be from 1 to {train_steps}, or 0 for these")
    if config.thresholding:
        raise ValueError(
            "thresholding: the prediction is scaled by a quantile of itself; only clip_sample is supported"
        )
    if config.prediction_type not in _PREDICTIONS:
        raise ValueError(f"prediction_type = {config.prediction_type!r}: must be one of {', '.join(_PREDICTIONS)}")
    scheduler.set_timesteps(n_steps or train_steps)
    steps: list[int] = scheduler.timesteps.tolist()
    signal: list[float] = scheduler.alphas_cumprod.double().tolist()  # alpha^2
    if config.prediction_type == "epsilon" and signal[steps[0]] <= 0:
        raise ValueError("rescale_betas_zero_snr: at pure noise, predicted noise (epsilon) says nothing about the data")
    clip = float(config.clip_sample_range) if config.clip_sample else 0.0
    told = tuple(step / train_steps for step in steps)
    parametrisation = _PREDICTIONS[config.prediction_type]
    if name == "DDPMScheduler":
        variance = _VARIANCES.get(config.variance_type)
        if variance is None:
            raise ValueError(f"variance_type = {config.variance_type!r}: must be one of {', '.join(_VARIANCES)}")
        # its step at 0 adds no noise; one from elsewhere to the data does, unless its variance is that of q
        ends = steps[-1] == 0 or variance != "large"
        grid = [signal[step] for step in steps] + ([] if ends else [1.0])
        return GaussianProcess(
            (1,), *_points(grid), parametrisation, variance, clip, told[: len(grid) - 1]
        ), train_steps
    if not 0 < eta <= 1:
        raise ValueError(f"eta = {eta}: must be above 0 and at most 1; at 0 DDIM is deterministic, and has no density")
    stride = train_steps // len(steps)
    final = float(scheduler.final_alpha_cumprod)
    towards = [signal[step - stride] if step >= stride else final for step in steps]
    deviations = _implicit_deviations([signal[step] for step in steps], towards, eta)
    kept = len(steps) - (deviations[-1] <= 0)
    grid = [signal[step] for step in steps[: kept + 1]] + (towards[-1:] if kept == len(steps) else [])
    aims = tuple(math.sqrt(value) for value in towards[:kept])
    alphas, sigmas = _points(grid)
    process = ImplicitProcess((1,), alphas, sigmas, parametrisation, "large", clip, told[:kept], aims, eta)
    return process, train_steps


def _points(grid: list[float]) -> tuple[tuple[float, ...], tuple[float, ...]]:
    """alphas and sigmas of grid points, from alpha^2."""
    if len(grid) < 2:
        raise ValueError("n_steps = 1: the only step would be deterministic; take 2 or more")
    alphas = tuple(max(math.sqrt(value), _LEAST_ALPHA) for value in grid)
    return alphas, tuple(math.sqrt(1 - value) for value in grid)


def _implicit_deviations(signal: list[float], towards: list[float], eta: float) -> list[float]:
    """Equation 16 of the paper, from alpha^2 of where a step starts and of what it aims at."""
    return [
        eta * math.sqrt(max((1 - aim) / (1 - here) * (1 - here / aim), 0.0))
        for here, aim in zip(signal, towards, strict=True)
    ]


def _with_shape(process: GaussianProcess, shape: tuple[int, ...]) -> GaussianProcess:
    return replace(process, shape=tuple(shape))


def _load_model(folder: Path) -> Any:
    name = _class_name(folder / "config.json", _MODELS)
    try:
        model, told = getattr(_diffusers(), name).from_pretrained(
            folder, local_files_only=True, use_safetensors=True, output_loading_info=True, low_cpu_mem_usage=False
        )
    except (OSError, ValueError, TypeError, RuntimeError) as error:
        raise ValueError(f"{folder}: cannot be loaded as a {name}: {str(error).strip().splitlines()[0]}") from error
    if told["missing_keys"]:  # the library has drawn them at random
        raise ValueError(f"{folder}: weights are missing: {', '.join(sorted(told['missing_keys'])[:3])}, ...")
    return model.float()


def _class_name(file: Path, names: tuple[str, ...]) -> str:
    try:
        name = json.loads(file.read_text()).get("_class_name")
    except (OSError, ValueError, AttributeError) as error:
        raise ValueError(f"{file}: cannot be read as JSON: {error}") from error
    if name not in names:
        raise ValueError(f"{file}: _class_name is {name!r}, must be one of {', '.join(names)}")
    return name


def _diffusers() -> Any:
    try:
        import diffusers  # takes seconds
    except ImportError as error:
        raise ValueError("diffusers is not installed: pip install 'headwater[diffusion]'") from error
    return diffusers
