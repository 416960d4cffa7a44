"""Laws of one step of a chain: what the next state of each of N chains may be, given the state it is in."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

_HALF_LOG_TWO_PI = 0.5 * math.log(2 * math.pi)


class Law(Protocol):
    """The distribution of the next state, `[N, *shape]`, one for each of N chains."""

    def sample(self, generator: torch.Generator) -> Tensor:
        """One next state for each chain."""

    def log_prob(self, following: Tensor) -> Tensor:
        """Log-density or log-probability of a next state for each chain, summed over everything that a state has:
        float32 `[N]`."""

    def tempered(self, temperature: float) -> Law:
        """A wider law, or a narrower one below 1: the variance of a Gaussian times it, log-probabilities over it."""


@dataclass(frozen=True)
class GaussianLaw:
    """Independent normal coordinates. mean: `[N, *shape]`. deviation: above 0, `[N]` or `[N, *shape]`."""

    mean: Tensor
    deviation: Tensor

    def sample(self, generator: torch.Generator) -> Tensor:
        return self.mean + self._deviation * normal_like(self.mean, generator)

    def tempered(self, temperature: float) -> GaussianLaw:
        return GaussianLaw(self.mean, math.sqrt(temperature) * self.deviation)

    def log_prob(self, following: Tensor) -> Tensor:
        deviation = self._deviation.expand_as(self.mean)
        each = -0.5 * ((following - self.mean) / deviation).square() - deviation.log() - _HALF_LOG_TWO_PI
        return each.flatten(1).sum(1)

    @property
    def _deviation(self) -> Tensor:
        return per_chain(self.deviation, self.mean) if self.deviation.ndim == 1 else self.deviation


@dataclass(frozen=True)
class CategoricalLaw:
    """Independent tokens. log_probs: normalised over the last axis, `[N, L, K]`; minus infinity where impossible."""

    log_probs: Tensor

    def tempered(self, temperature: float) -> CategoricalLaw:
        return CategoricalLaw((self.log_probs / temperature).log_softmax(-1))

    def sample(self, generator: torch.Generator) -> Tensor:
        cumulative = self.log_probs.exp().double().cumsum(-1)
        uniform = torch.rand(
            cumulative.shape[:-1], generator=generator, device=generator.device, dtype=torch.float64
        ).to(cumulative.device)
        # at or above the number: below it is impossible, and a total that rounds to less than 1 must not end beyond
        chosen = (cumulative <= (uniform * cumulative[..., -1])[..., None]).sum(-1)
        return chosen.clamp(max=cumulative.shape[-1] - 1)

    def log_prob(self, following: Tensor) -> Tensor:
        return self.log_probs.gather(-1, following[..., None])[..., 0].flatten(1).sum(1)


@dataclass(frozen=True)
class OneTokenLaw:
    """One masked token becomes known, each masked position as likely; where none is masked nothing changes.

    log_probs: of what each token is, normalised over the last axis, `[N, L, V]`. state: `[N, L]`. mask: the token of
    what is not known.
    """

    log_probs: Tensor
    state: Tensor
    mask: int

    def tempered(self, temperature: float) -> OneTokenLaw:
        return OneTokenLaw((self.log_probs / temperature).log_softmax(-1), self.state, self.mask)

    def sample(self, generator: torch.Generator) -> Tensor:
        tokens = CategoricalLaw(self.log_probs).sample(generator)
        order = torch.rand(self.state.shape, generator=generator, device=generator.device).to(self.state.device)
        masked = self.state == self.mask
        chosen = torch.where(masked, order, -1.0).argmax(1, keepdim=True)
        return torch.where(masked, self.state.scatter(1, chosen, tokens.gather(1, chosen)), self.state)

    def log_prob(self, following: Tensor) -> Tensor:
        masked = self.state == self.mask
        count, changed = masked.sum(1), following != self.state
        one = (changed & masked & (following != self.mask)).sum(1) == (count > 0)
        possible = one & (changed.sum(1) == (count > 0))
        revealed = changed & masked & possible[:, None]
        # an index that exists where nothing is revealed: what it finds is left out
        token = torch.where(revealed, following, 0)
        said = self.log_probs.gather(-1, token[..., None])[..., 0]
        total = torch.where(revealed, said, 0.0).sum(1) - count.clamp(min=1).float().log()
        return torch.where(possible, total, -torch.inf)


def normal_like(state: Tensor, generator: torch.Generator) -> Tensor:
    """Standard normal numbers in the shape of `state`, from the generator's device."""
    return torch.randn(state.shape, generator=generator, device=generator.device).to(state.device)


def per_chain(values: Tensor, state: Tensor) -> Tensor:
    """`[N]` values, ready to meet states `[N, *shape]`."""
    return values.view(-1, *[1] * (state.ndim - 1))
