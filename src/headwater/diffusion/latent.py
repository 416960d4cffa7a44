"""A prior in the latent space of an autoencoder: a chain draws z, a decoder makes the object x = decode(z) of it. The
posterior of z under r(decode(z)) is then like any other, its likelihood one of latents (`of_latents`).

The autoencoder is variational, with one learned deviation for all pixels (Kingma & Welling 2014, arXiv 1312.6114;
Rybkin et al. 2021, 2006.13202). On disk a latent prior is a folder with `autoencoder.json` in plain words, the weights
in `autoencoder.safetensors`, and the folder of the prior, `latents`.
"""

from __future__ import annotations

import copy
import json
import math
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TypeAlias

import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from headwater.diffusion.likelihoods import Likelihood, MeasurementLikelihood, Product, Tempered
from headwater.diffusion.operators import Operator
from headwater.diffusion.priors import AUTOENCODER, Prior, build, load_prior, load_weights, read_settings, save_prior
from headwater.runs import atomic

AUTOENCODER_WEIGHTS, LATENTS = "autoencoder.safetensors", "latents"
_FORMAT = "headwater.autoencoder.1"
_LARGEST = 65_536
"""Of any size in settings: they may come from a file."""
_FIRST_LOG_DEVIATION = -2.0  # small beside data of order 1: from above, latents would stay silent for long

Decode: TypeAlias = Callable[[Tensor], Tensor]
"""Objects `[N, *shape]` of latents `[N, *latent shape]`, differentiable."""


class Autoencoder(nn.Module):
    """Multilayer perceptrons from objects to latents, near to standard normal ones all together, and back.

    shape: of an object. latent: d_z, how many numbers a latent has. width: of two hidden layers. Raises ValueError
    naming a size that is out of range.
    """

    def __init__(self, shape: tuple[int, ...] | list[int], latent: int, width: int = 256) -> None:
        super().__init__()
        for name, value in (("latent", latent), ("width", width), *(("shape", size) for size in shape)):
            if not isinstance(value, int) or isinstance(value, bool) or not 1 <= value <= _LARGEST:
                raise ValueError(f"{name} = {value!r}: must be a whole number from 1 to {_LARGEST}")
        self.shape, self.latent, self.width = tuple(shape), latent, width
        size = math.prod(self.shape)
        self.encoder = _perceptron(size, width, 2 * latent)
        self.decoder = _perceptron(latent, width, size)
        self.log_deviation = nn.Parameter(torch.tensor(_FIRST_LOG_DEVIATION))

    def settings(self) -> dict[str, object]:
        """The arguments that it was built with."""
        return {"shape": list(self.shape), "latent": self.latent, "width": self.width}

    def encode(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Mean and deviation of the latents of `[N, *shape]`: `[N, d_z]` both."""
        if x.shape[1:] != self.shape:
            raise ValueError(f"the autoencoder takes objects of shape {self.shape}, these have {tuple(x.shape[1:])}")
        mean, log_deviation = self.encoder(x.flatten(1)).chunk(2, 1)
        return mean, log_deviation.clamp(-10, 5).exp()

    def decode(self, z: Tensor) -> Tensor:
        """Objects of latents `[N, d_z]`: `[N, *shape]`."""
        if z.shape[1:] != (self.latent,):
            raise ValueError(
                f"the autoencoder takes latents of shape ({self.latent},), these have {tuple(z.shape[1:])}"
            )
        return self.decoder(z).view(len(z), *self.shape)

    def evidence(self, x: Tensor, noise: Tensor) -> Tensor:
        """A lower bound on log p(x) by one draw of the latents each, made of standard normal `noise` `[N, d_z]`: the
        log-density of x around what is decoded, less the divergence of the latents from N(0, I). `[N]`."""
        mean, deviation = self.encode(x)
        away = (x - self.decode(mean + deviation * noise)).flatten(1) / self.log_deviation.exp()
        size = away.shape[1]
        log_density = -0.5 * away.square().sum(1) - size * (self.log_deviation + 0.5 * math.log(2 * math.pi))
        divergence = 0.5 * (mean.square() + deviation.square() - 1).sum(1) - deviation.log().sum(1)
        return log_density - divergence


@dataclass
class LatentPrior:
    """An autoencoder, and a prior of its latents as one. `prior.units` are of the decoded objects."""

    prior: Prior
    autoencoder: Autoencoder

    def __post_init__(self) -> None:
        if tuple(self.prior.process.shape) != (self.autoencoder.latent,):
            raise ValueError(
                f"the prior draws shape {tuple(self.prior.process.shape)}, the autoencoder's latents have "
                f"({self.autoencoder.latent},)"
            )
        self.autoencoder.eval().requires_grad_(False)

    @property
    def shape(self) -> tuple[int, ...]:
        """Of a decoded object."""
        return self.autoencoder.shape

    def decode(self, z: Tensor) -> Tensor:
        """Objects `[N, *shape]` of latents `[N, d_z]`."""
        return self.autoencoder.decode(z)

    def sample(self, condition: Tensor, generator: torch.Generator) -> Tensor:
        """One object for each row of `condition`: `[N, *shape]`."""
        with torch.no_grad():
            return self.decode(self.prior.sample(condition, generator)[0])


def save_latent_prior(latent: LatentPrior, folder: Path) -> None:
    """Write the folder. Raises ValueError where `save_prior` does."""
    save_prior(latent.prior, folder / LATENTS)
    weights = {name: weight.detach().cpu().contiguous() for name, weight in latent.autoencoder.state_dict().items()}
    with atomic(folder / AUTOENCODER_WEIGHTS) as partial:
        save_file(weights, str(partial))
    content = {"format": _FORMAT, "network": {"kind": "mlp", **latent.autoencoder.settings()}}
    with atomic(folder / AUTOENCODER) as partial:
        partial.write_text(json.dumps(content, indent=1) + "\n")


def load_latent_prior(path: str | Path) -> LatentPrior:
    """The latent prior in a folder that `save_latent_prior` has written.

    Raises ValueError naming the file, and the field in it, that is missing or makes no sense.
    """
    folder = Path(path)
    if not is_latent(folder):
        raise ValueError(f"{folder}: no latent prior, there is no {AUTOENCODER} in it")
    file = folder / AUTOENCODER
    content = read_settings(file)
    if content.get("format") != _FORMAT:
        raise ValueError(f"{file}: format is {content.get('format')!r}, must be {_FORMAT!r}")
    with torch.device("meta"):  # nothing is allocated for sizes that the weights do not have
        autoencoder = build(file, "network", {"mlp": Autoencoder}, content.get("network"))
    load_weights(autoencoder, folder / AUTOENCODER_WEIGHTS)
    try:
        return LatentPrior(load_prior(folder / LATENTS), autoencoder)
    except ValueError as error:
        raise ValueError(f"{folder}: {error}") from error


def is_latent(folder: Path) -> bool:
    """Whether a folder says that the prior in it is of latents."""
    return (folder / AUTOENCODER).is_file()


class Decoded(Operator):
    """What `operator` measures of the objects that latents of `shape` are decoded to."""

    is_linear = False

    def __init__(self, operator: Operator, decode: Decode, shape: tuple[int, ...]) -> None:
        super().__init__(shape, operator.measured)
        self.operator = operator
        self.decode = decode

    def compute(self, x: Tensor) -> Tensor:
        return self.operator(self.decode(x))


class DecodedLikelihood(Likelihood):
    """r(decode(z)) of a likelihood that is of no measurement."""

    def __init__(self, likelihood: Likelihood, decode: Decode) -> None:
        self.likelihood, self.decode = likelihood, decode
        self.condition_size = likelihood.condition_size

    def compute(self, x: Tensor, condition: Tensor) -> Tensor:
        return self.likelihood.log_prob(self.decode(x), condition)


def of_latents(likelihood: Likelihood, decode: Decode, shape: tuple[int, ...]) -> Likelihood:
    """The likelihood r(decode(z)) of latents of `shape`, by a likelihood r(x). A measurement stays one of its own
    kind, whose operator decodes first, so that whatever takes a `GaussianLikelihood` takes this: DPS in latent space,
    for one."""
    if isinstance(likelihood, MeasurementLikelihood):
        composed = copy.copy(likelihood)
        composed.operator = Decoded(likelihood.operator, decode, shape)
        return composed
    if isinstance(likelihood, Product):
        return Product([of_latents(part, decode, shape) for part in likelihood.parts])
    if isinstance(likelihood, Tempered):
        return Tempered(of_latents(likelihood.likelihood, decode, shape), likelihood.beta)
    return DecodedLikelihood(likelihood, decode)


def _perceptron(entering: int, width: int, leaving: int) -> nn.Sequential:
    return nn.Sequential(
        nn.Linear(entering, width), nn.SiLU(), nn.Linear(width, width), nn.SiLU(), nn.Linear(width, leaving)
    )
