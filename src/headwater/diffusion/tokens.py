"""Chains over strings of tokens: masked (absorbing) and uniform discrete diffusion (Austin et al. 2021, arXiv
2107.03006), and masked diffusion that reveals one token a step (the any-order chain of Hoogeboom et al. 2022,
2110.02037). A denoiser's prediction is the logits of each token of the data, `[N, L, V]`.

On a linear grid a share of about 1 - k / T of the tokens is noise at grid point k. A step draws its tokens
independently: a prior or posterior in which they depend on each other is met the better, the more steps there are, and
exactly where a step reveals one.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from headwater.diffusion.laws import CategoricalLaw, Law, OneTokenLaw
from headwater.diffusion.process import Process

FREE = -1
"""In `RevealingProcess.given`: a position that is not given."""


class RevealingProcess(Process):
    """Strings that are masked at first, and whose tokens are revealed once and for all.

    length: L. vocabulary: V; the mask is token V. given: tokens that stand from the start, `FREE` elsewhere; none if
    empty. A prior's own process with other tokens given fills in what they leave open.
    """

    length: int
    vocabulary: int
    given: tuple[int, ...]

    @property
    def shape(self) -> tuple[int, ...]:  # type: ignore[override]
        return (self.length,)

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

    def _require_given(self) -> None:
        """Raise ValueError for given tokens that do not fit."""
        if self.given and len(self.given) != self.length:
            raise ValueError(f"given: {len(self.given)} tokens for strings of {self.length}")
        for position, token in enumerate(self.given):
            if not -1 <= token < self.vocabulary:
                raise ValueError(f"given[{position}] = {token}: must be from 0 to {self.vocabulary - 1}, or {FREE}")

    def _free(self, state: Tensor) -> Tensor:
        if not self.given:
            return torch.ones_like(state, dtype=torch.bool)
        return (torch.tensor(self.given, device=state.device) == FREE).expand_as(state)


@dataclass(frozen=True)
class MaskedProcess(RevealingProcess):
    """Tokens are revealed at random times: each masked one with probability 1 / (T - k) at step k.

    steps: T, at most as many as make sense: L steps reveal about one token each.
    """

    length: int
    vocabulary: int
    steps: int
    given: tuple[int, ...] = ()

    def __post_init__(self) -> None:
        _require_positive(self, "length", "vocabulary", "steps")
        self._require_given()

    @property
    def n_steps(self) -> int:
        return self.steps

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


@dataclass(frozen=True)
class OneByOneProcess(RevealingProcess):
    """Every step reveals one token, each masked position as likely, so that there are as many steps as tokens not
    given. With the true law of each token given the revealed ones it ends in the data's own distribution: no two
    tokens are ever drawn independently of each other. Walking back masks one revealed token, each as likely.
    """

    length: int
    vocabulary: int
    given: tuple[int, ...] = ()

    def __post_init__(self) -> None:
        _require_positive(self, "length", "vocabulary")
        self._require_given()
        if not self.n_steps:
            raise ValueError(f"given: all {self.length} tokens are, none is left to be revealed")

    @property
    def n_steps(self) -> int:
        return self.given.count(FREE) if self.given else self.length

    def time(self, number: Tensor) -> Tensor:
        """The share of all tokens that are masked: what is given counts as revealed, so that a denoiser is told of a
        state what it was told when it learned."""
        return (self.n_steps - number.float()) / self.length

    def law(self, prediction: Tensor, state: Tensor, number: Tensor) -> Law:
        return OneTokenLaw(prediction.float().log_softmax(-1), state, self.mask)

    def noise(self, state: Tensor, number: Tensor, generator: torch.Generator) -> Tensor:
        known = (state != self.mask) & self._free(state)
        order = torch.rand(state.shape, generator=generator, device=generator.device).to(state.device)
        hidden = torch.where(known, order, -1.0).argmax(1, keepdim=True)
        return torch.where(known, state.scatter(1, hidden, self.mask), state)

    def noise_log_prob(self, noised: Tensor, state: Tensor, number: Tensor) -> Tensor:
        known = ((state != self.mask) & self._free(state)).sum(1)
        changed = noised != state
        one = (changed & self._free(state) & (noised == self.mask)).sum(1) == (known > 0)
        possible = one & (changed.sum(1) == (known > 0))
        return torch.where(possible, -known.clamp(min=1).float().log(), -torch.inf)

    def noised(self, data: Tensor, number: Tensor, generator: torch.Generator) -> Tensor:
        free = self._free(data)
        order = torch.rand(data.shape, generator=generator, device=generator.device).to(data.device)
        rank = torch.where(free, order, 2.0).argsort(1).argsort(1)
        return torch.where(free & (rank >= number[:, None]), self.mask, data)


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
