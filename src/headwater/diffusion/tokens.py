"""Chains over strings of tokens: masked (absorbing) and uniform discrete diffusion (Austin et al. 2021, arXiv
2107.03006). A denoiser's prediction is the logits of each token of the data, `[N, L, V]`.

On a linear grid a share of about 1 - k / T of the tokens is noise at grid point k. A step draws its tokens
independently: a posterior in which they depend on each other is met the better, the more steps there are.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from headwater.diffusion.laws import CategoricalLaw
from headwater.diffusion.process import Process

FREE = -1
"""In `MaskedProcess.given`: a position that is not given."""


@dataclass(frozen=True)
class MaskedProcess(Process):
    """Tokens are revealed, once and for all, at random times: each masked one with probability 1 / (T - k) at step k.

    length: L. vocabulary: V; the mask is token V. steps: T, at most as many as make sense: L steps reveal about one
    token each. given: tokens that stand from the start, `FREE` elsewhere; none if empty.
    """

    length: int
    vocabulary: int
    steps: int
    given: tuple[int, ...] = ()

    def __post_init__(self) -> None:
        _require_positive(self, "length", "vocabulary", "steps")
        if self.given and len(self.given) != self.length:
            raise ValueError(f"given: {len(self.given)} tokens for strings of {self.length}")
        for position, token in enumerate(self.given):
            if not -1 <= token < self.vocabulary:
                raise ValueError(f"given[{position}] = {token}: must be from 0 to {self.vocabulary - 1}, or {FREE}")

    @property
    def shape(self) -> tuple[int, ...]:  # type: ignore[override]
        return (self.length,)

    @property
    def n_steps(self) -> int:
        return self.steps

    @property
    def mask(self) -> int:
        """The token of what is not known yet."""
        return self.vocabulary

    def start(self, count: int, generator: torch.Generator) -> Tensor:
        row = torch.full((self.length,), self.mask, device=generator.device)
        if self.given:
            given = torch.tensor(self.given, device=generator.device)
            row = torch.where(given == FREE, row, given)
        return row.expand(count, -1)

    def start_log_prob(self, state: Tensor) -> Tensor:
        return torch.zeros(len(state), device=state.device)

    def law(self, prediction: Tensor, state: Tensor, number: Tensor) -> CategoricalLaw:
        revealed = (1 / (self.steps - number.float()))[:, None, None]
        tokens = prediction.float().log_softmax(-1) + revealed.log()
        outcomes = torch.cat([tokens, (-revealed).log1p().expand_as(tokens[..., :1])], -1)
        stays = torch.full_like(outcomes, -torch.inf).scatter(-1, state[..., None], 0.0)
        return CategoricalLaw(torch.where((state == self.mask)[..., None], outcomes, stays))

    def noise(self, state: Tensor, number: Tensor, generator: torch.Generator) -> Tensor:
        return self._hidden(state, self._hiding(number), generator)

    def noise_log_prob(self, noised: Tensor, state: Tensor, number: Tensor) -> Tensor:
        hiding = self._hiding(number)[:, None]
        hidden, free = noised == self.mask, (state != self.mask) & self._free(state)
        each = torch.where(hidden, hiding.log(), (-hiding).log1p())
        return torch.where(free, each, 0.0).sum(1)

    def noised(self, data: Tensor, number: Tensor, generator: torch.Generator) -> Tensor:
        return self._hidden(data, 1 - number.float() / self.steps, generator)

    def _hiding(self, number: Tensor) -> Tensor:
        """The probability that a token known at grid point `number + 1` is masked at `number`."""
        return 1 / (number.float() + 1)

    def _hidden(self, state: Tensor, probability: Tensor, generator: torch.Generator) -> Tensor:
        uniform = torch.rand(state.shape, generator=generator, device=generator.device).to(state.device)
        return torch.where((uniform < probability[:, None]) & self._free(state), self.mask, state)

    def _free(self, state: Tensor) -> Tensor:
        if not self.given:
            return torch.ones_like(state, dtype=torch.bool)
        return (torch.tensor(self.given, device=state.device) == FREE).expand_as(state)


@dataclass(frozen=True)
class UniformProcess(Process):
    """Tokens of noise are uniformly random, and may change at every step. length: L. vocabulary: V. steps: T."""

    length: int
    vocabulary: int
    steps: int

    def __post_init__(self) -> None:
        _require_positive(self, "length", "vocabulary", "steps")

    @property
    def shape(self) -> tuple[int, ...]:  # type: ignore[override]
        return (self.length,)

    @property
    def n_steps(self) -> int:
        return self.steps

    def start(self, count: int, generator: torch.Generator) -> Tensor:
        return torch.randint(self.vocabulary, (count, self.length), generator=generator, device=generator.device)

    def start_log_prob(self, state: Tensor) -> Tensor:
        uniform = -torch.log(torch.tensor(float(self.vocabulary), device=state.device))
        return (self.length * uniform).expand(len(state))

    def law(self, prediction: Tensor, state: Tensor, number: Tensor) -> CategoricalLaw:
        """sum over x of q(x_k+1 | x_k, x) p(x | x_k), in time linear in V."""
        kept, kept_before = ((point / self.steps)[:, None, None] for point in (number.float() + 1, number.float()))
        here = torch.zeros_like(prediction, dtype=torch.float32).scatter(-1, state[..., None], 1.0)
        evidence = kept_before * here + (1 - kept_before) / self.vocabulary  # of x, in the state
        weight = prediction.float().softmax(-1) / evidence
        step = kept_before / kept
        likelihood = step * here + (1 - step) / self.vocabulary  # of x_k+1, in the state
        law = likelihood * (kept * weight + (1 - kept) / self.vocabulary * weight.sum(-1, keepdim=True))
        return CategoricalLaw((law / law.sum(-1, keepdim=True)).log())

    def noise(self, state: Tensor, number: Tensor, generator: torch.Generator) -> Tensor:
        return self._scattered(state, number.float() / (number.float() + 1), generator)

    def noise_log_prob(self, noised: Tensor, state: Tensor, number: Tensor) -> Tensor:
        kept = (number.float() / (number.float() + 1))[:, None]
        return (kept * (noised == state) + (1 - kept) / self.vocabulary).log().sum(1)

    def noised(self, data: Tensor, number: Tensor, generator: torch.Generator) -> Tensor:
        return self._scattered(data, number.float() / self.steps, generator)

    def _scattered(self, state: Tensor, kept: Tensor, generator: torch.Generator) -> Tensor:
        uniform = torch.rand(state.shape, generator=generator, device=generator.device).to(state.device)
        anywhere = torch.randint(self.vocabulary, state.shape, generator=generator, device=generator.device)
        return torch.where(uniform < kept[:, None], state, anywhere.to(state.device))


def _require_positive(process: Process, *names: str) -> None:
    for name in names:
        if getattr(process, name) < 1:
            raise ValueError(f"{name} = {getattr(process, name)}: must be at least 1")
