"""A posterior's denoiser, made from the prior's so that at the start both say the same, bit for bit: a copy of it, the
prior with low-rank adapters (Hu et al. 2021, arXiv 2106.09685), or the prior with a correction that starts at zero.

A correction may have the gradient of the log-likelihood as a part of it: the Langevin parametrisation of Zhang & Chen
2022 (arXiv 2111.15141), as relative trajectory balance uses it (2405.20971).
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal, TypeAlias, get_args

import torch
from torch import Tensor, nn

from headwater.diffusion.denoisers import Denoiser, Network, ResidualMLP, TokenTransformer, time_features
from headwater.diffusion.priors import Prior
from headwater.diffusion.process import GaussianProcess
from headwater.diffusion.tokens import RevealingProcess, UniformProcess

LogLikelihood: TypeAlias = Callable[[Tensor, Tensor], Tensor]
"""log r `[N]` of states `[N, *shape]` under conditions `[N, C]`, differentiable in the states."""
Kind = Literal["copy", "lora", "correction"]

_ALL = ("all",)
_HIDDEN = 64


@dataclass(frozen=True)
class Adapter:
    """How the posterior's network is made from the prior's."""

    kind: Kind = "copy"
    """copy: all its weights learn. lora: low-rank adapters in it learn. correction: a network beside it learns what to
    add."""
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
    langevin: bool = False
    """Let the correction scale the gradient of the log-likelihood at the state, and add it."""
    largest_gradient: float = 100.0
    """What each coordinate of this gradient is clipped to."""

    def __post_init__(self) -> None:
        if self.kind not in get_args(Kind):
            raise ValueError(f"kind = {self.kind!r}: must be one of {', '.join(get_args(Kind))}")
        for name in ("rank", "width", "blocks"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} = {getattr(self, name)}: must be at least 1")
        for name in ("alpha", "largest_gradient"):
            if not getattr(self, name) > 0:
                raise ValueError(f"{name} = {getattr(self, name)}: must be above 0")
        if self.langevin and self.kind != "correction":
            raise ValueError(f"langevin: only with kind = 'correction', which is {self.kind!r}")

    def posterior(self, prior: Prior, columns: int = 0, log_likelihood: LogLikelihood | None = None) -> Denoiser:
        """A denoiser that says what the prior's does, and learns.

        columns: of the condition besides those that the prior looks at, such as a measurement. log_likelihood: for the
        Langevin parametrisation. Raises ValueError for what does not go together.
        """
        if self.langevin and log_likelihood is None:
            raise ValueError("langevin: needs a likelihood that has a gradient")
        if self.kind == "copy":
            return prior.denoiser.widened(columns).requires_grad_(True)
        if self.kind == "lora":
            if columns:
                raise ValueError(f"kind = 'lora': the prior's layers cannot see {columns} more columns; make a copy")
            return with_adapters(prior.denoiser, self.rank, self.alpha, self.targets)
        correction = self._correction(prior, prior.denoiser.condition + columns)
        gradient = None
        if self.langevin:
            assert log_likelihood is not None
            gradient = _Gradient(prior, log_likelihood, self.largest_gradient)
        return Corrected(prior.denoiser, correction, gradient)

    def _correction(self, prior: Prior, condition: int) -> Network:
        process = prior.process
        if isinstance(process, (RevealingProcess, UniformProcess)):
            width = -(-self.width // 4) * 4  # for its heads
            return TokenTransformer(process.length, process.vocabulary, condition, width, self.blocks)
        learned = isinstance(process, GaussianProcess) and process.variance == "learned"
        return ResidualMLP(process.shape, condition, self.width, self.blocks, learned)


class Corrected(Denoiser):
    """What `prior` says plus what `correction` says, which learns and starts at zero; and a multiple of a gradient,
    which starts at zero too. The prior is kept as it is, not copied, and does not learn.
    """

    def __init__(self, prior: Denoiser, correction: Denoiser, gradient: _Gradient | None = None) -> None:
        super().__init__()
        self.condition = max(prior.condition, correction.condition)
        self.prior = prior.requires_grad_(False)
        correction.silence()
        self.correction, self.gradient = correction, gradient

    def forward(self, state: Tensor, time: Tensor, condition: Tensor) -> Tensor:
        said = self.prior(state, time, condition) + self.correction(state, time, condition)
        return said if self.gradient is None else said + self.gradient(state, time, condition)


class _Gradient(nn.Module):
    """The clipped gradient of the log-likelihood at the state, times a factor that is learned as a function of time,
    one for each channel."""

    def __init__(self, prior: Prior, log_likelihood: LogLikelihood, largest: float) -> None:
        super().__init__()
        if not isinstance(prior.process, GaussianProcess):
            raise ValueError(f"langevin: strings of tokens or a {type(prior.process).__name__} have no such gradient")
        self.log_likelihood, self.largest = log_likelihood, largest
        self.twice = prior.process.variance == "learned"
        self.enter = nn.Linear(time_features(torch.zeros(1)).shape[1], _HIDDEN)
        self.last = nn.Linear(_HIDDEN, prior.process.shape[0])
        nn.init.zeros_(self.last.weight), nn.init.zeros_(self.last.bias)

    def forward(self, state: Tensor, time: Tensor, condition: Tensor) -> Tensor:
        with torch.enable_grad():
            here = state.detach().requires_grad_()
            (slope,) = torch.autograd.grad(self.log_likelihood(here, condition).sum(), here)
        slope = slope.nan_to_num(0.0, self.largest, -self.largest).clamp(-self.largest, self.largest)
        factor = self.last(nn.functional.silu(self.enter(time_features(time))))
        pushed = factor.view(*factor.shape, *[1] * (state.ndim - 2)) * slope
        return torch.cat([pushed, torch.zeros_like(pushed)], 1) if self.twice else pushed


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
