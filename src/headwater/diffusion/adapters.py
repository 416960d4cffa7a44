"""A posterior's denoiser, made from the prior's so that at the start both say the same, bit for bit: a copy of it, the
prior with low-rank adapters (Hu et al. 2021, arXiv 2106.09685), or the prior with a correction that starts at zero.

A correction may have the gradient of the log-likelihood as a part of it: the Langevin parametrisation of Zhang & Chen
2022 (arXiv 2111.15141), as relative trajectory balance uses it (2405.20971).
"""

from __future__ import annotations

import copy
from dataclasses import dataclass
from typing import Literal, get_args

import torch
from torch import Tensor, nn

from headwater.diffusion.denoisers import Denoiser, Network, ResidualMLP, TokenTransformer
from headwater.diffusion.langevin import Langevin, LogLikelihood, Place
from headwater.diffusion.priors import Prior
from headwater.diffusion.process import GaussianProcess
from headwater.diffusion.tokens import RevealingProcess, UniformProcess

Kind = Literal["copy", "lora", "correction"]

_ALL = ("all",)
_LEAST = 1e-6  # of the largest variance
_MOST_WHITENED = 512  # columns


@dataclass(frozen=True)
class Adapter:
    """How the posterior's network is made from the prior's."""

    kind: Kind = "copy"
    """copy: all its weights learn. lora: low-rank adapters in it learn. correction: a network beside it learns what to
    add, and in a Gaussian chain how much narrower each step is than the prior's."""
    rank: int = 8
    """Of every low-rank adapter."""
    alpha: float = 8.0
    """The adapters' output is scaled by alpha / rank."""
    targets: tuple[str, ...] = _ALL
    """Names of the layers that get an adapter; all: every linear or convolutional one."""
    width: int = 128
    """Of the correction."""
    blocks: int = 2
    """Of the correction."""
    octaves: int = 0
    """Of the correction, for vectors: how many waves of each coordinate it sees, of periods 32, 16, 8 and so on, to
    tell modes close together apart; in few dimensions."""
    langevin: bool = False
    """Let a correction scale the gradient of the log-likelihood, and add it; nothing to the other kinds."""
    gradient_at: Place = "state"
    """Where that gradient is taken. state: at the noised state. data: at the data that the prior predicts, and scaled
    to how far Bayes' rule would move them; the correction's own network then sees it too."""
    deviation: float = 1.0
    """Of the data, or of one mode of them: with gradient_at = data, how far they may move."""
    largest_gradient: float = 100.0
    """What each coordinate of this gradient is clipped to."""

    def __post_init__(self) -> None:
        if self.kind not in get_args(Kind):
            raise ValueError(f"kind = {self.kind!r}: must be one of {', '.join(get_args(Kind))}")
        for name in ("rank", "width", "blocks"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} = {getattr(self, name)}: must be at least 1")
        if self.octaves < 0:
            raise ValueError(f"octaves = {self.octaves}: must not be negative")
        if self.gradient_at not in get_args(Place):
            raise ValueError(f"gradient_at = {self.gradient_at!r}: must be one of {', '.join(get_args(Place))}")
        for name in ("alpha", "deviation", "largest_gradient"):
            if not getattr(self, name) > 0:
                raise ValueError(f"{name} = {getattr(self, name)}: must be above 0")

    def posterior(
        self,
        prior: Prior,
        columns: int = 0,
        log_likelihood: LogLikelihood | None = None,
        examples: Tensor | None = None,
    ) -> Denoiser:
        """A denoiser that says what the prior's does, and learns.

        columns: of the condition besides those that the prior looks at, such as a measurement. log_likelihood: for the
        Langevin parametrisation. examples: conditions `[M, C]`, by whose mean and covariance those that a correction
        sees are whitened: what decides between modes is often a small part of a measurement. Raises ValueError for
        what does not go together.
        """
        if self.langevin and self.kind == "correction" and log_likelihood is None:
            raise ValueError("langevin: needs a likelihood that has a gradient")
        if self.kind == "copy":
            return prior.denoiser.widened(columns).requires_grad_(True)
        if self.kind == "lora":
            if columns:
                raise ValueError(f"kind = 'lora': the prior's layers cannot see {columns} more columns; make a copy")
            return with_adapters(prior.denoiser, self.rank, self.alpha, self.targets)
        columns += prior.denoiser.condition
        gradient, seen = None, columns
        if self.langevin:
            assert log_likelihood is not None
            gradient = Langevin(prior.process, log_likelihood, self.gradient_at, self.deviation, self.largest_gradient)
            seen += gradient.columns
        return Corrected(prior.denoiser, self._correction(prior, seen), gradient, columns, examples)

    def _correction(self, prior: Prior, condition: int) -> Network:
        process = prior.process
        if isinstance(process, (RevealingProcess, UniformProcess)):
            width = -(-self.width // 4) * 4  # for its heads
            return TokenTransformer(process.length, process.vocabulary, condition, width, self.blocks)
        narrows = isinstance(process, GaussianProcess)
        return ResidualMLP(process.shape, condition, self.width, self.blocks, narrows, self.octaves)


class Corrected(Denoiser):
    """What `prior` says plus what `correction` says, which learns and starts at zero; and a multiple of a gradient,
    which starts at zero too. The prior is kept as it is, not copied, and does not learn.

    condition: how many columns of it are looked at, as many as either does if not given; `examples` of them say how the
    correction's are whitened.
    """

    centre: Tensor
    whitening: Tensor

    def __init__(
        self,
        prior: Denoiser,
        correction: Denoiser,
        gradient: Langevin | None = None,
        condition: int | None = None,
        examples: Tensor | None = None,
    ) -> None:
        super().__init__()
        self.condition = max(prior.condition, correction.condition) if condition is None else condition
        self.prior = prior.requires_grad_(False)
        correction.silence()
        self.correction, self.gradient = correction, gradient
        centre, whitening = torch.zeros(self.condition), torch.ones(self.condition)
        if examples is not None:
            centre, whitening = examples.mean(0), _whitening(examples)
        self.register_buffer("centre", centre)
        self.register_buffer("whitening", whitening)

    def forward(self, state: Tensor, time: Tensor, condition: Tensor) -> Tensor:
        return self.after(self.prior(state, time, condition), state, time, condition)

    def after(self, said: Tensor, state: Tensor, time: Tensor, condition: Tensor) -> Tensor:
        """The prediction, when the prior has said something already."""
        return _sum(self._change(said, state, time, condition), said)

    def _change(self, said: Tensor, state: Tensor, time: Tensor, condition: Tensor) -> Tensor:
        seen = condition[:, : self.condition] - self.centre
        seen = seen @ self.whitening if self.whitening.ndim == 2 else seen * self.whitening
        if self.gradient is None:
            return self.correction(state, time, seen)
        push, features = self.gradient.push(said, state, time, condition)
        said = self.correction(state, time, torch.cat([seen, features], 1))
        return _sum(said, self.gradient.scaled(push, time))


def _sum(longer: Tensor, shorter: Tensor) -> Tensor:
    """The second added to the first channels of the first: it may lack those of the variance."""
    channels = shorter.shape[1]
    if channels == longer.shape[1]:
        return longer + shorter
    return torch.cat([longer[:, :channels] + shorter, longer[:, channels:]], 1)


def _whitening(examples: Tensor) -> Tensor:
    """What centred rows must be multiplied by to be uncorrelated and of unit variance, `[C, C]`; directions in which
    examples `[M, C]` hardly vary are left small. Of many columns, or few examples, each is only scaled: `[C]`."""
    count, columns = examples.shape
    if columns > _MOST_WHITENED or count < 2 * columns:
        return 1 / examples.std(0).clamp(min=torch.finfo(examples.dtype).tiny)
    variance, basis = torch.linalg.eigh(examples.double().T.cov().reshape(columns, columns))
    return (basis / variance.clamp(min=_LEAST * float(variance.max())).sqrt()).to(examples.dtype)


def with_adapters(denoiser: Denoiser, rank: int, alpha: float, targets: tuple[str, ...] = _ALL) -> Denoiser:
    """The same network with low-rank adapters that alone learn. Its own weights are those of `denoiser`, not a copy.

    Raises ValueError, naming the layers there are, where `targets` names none of them, or where the extra is missing.
    """
    try:
        from peft import LoraConfig, inject_adapter_in_model
    except ImportError as error:
        raise ValueError("kind = 'lora' needs the extra diffusion: pip install 'headwater[diffusion]'") from error
    denoiser.requires_grad_(False)
    adapted = copy.deepcopy(denoiser, {id(weight): weight for weight in denoiser.parameters()})
    layers = [name for name, module in adapted.named_modules() if isinstance(module, (nn.Linear, nn.Conv1d, nn.Conv2d))]
    chosen = layers if targets == _ALL else [name for name in layers if name.endswith(targets)]
    if not chosen:
        raise ValueError(f"targets = {', '.join(targets)}: must be all or names of layers, such as {', '.join(layers)}")
    settings = LoraConfig(
        r=rank, lora_alpha=alpha, target_modules=chosen, init_lora_weights="gaussian", lora_dropout=0.0
    )
    inject_adapter_in_model(settings, adapted)
    return adapted
