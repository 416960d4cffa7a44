"""Strings of which everything is known: a Markov chain as a prior over tokens, with the law of each token given any
others (forward-backward: Rabiner 1989, Proc. IEEE 77, 257-286); and, where they can be enumerated, the probabilities
with which a masked chain of any denoiser ends in each string.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional

from headwater.diffusion.tokens import FREE, RevealingProcess

_MOST_STEPS = 20_000_000
"""From one state to another, of all chains together: what `end_probabilities` takes."""


@dataclass(frozen=True, eq=False)
class MarkovStrings:
    """Strings of `length` tokens. initial: `[V]`, of the first. transition: `[V, V]`, of the next, given one, each row
    with sum 1; all above 0."""

    initial: Tensor
    transition: Tensor
    length: int

    def __post_init__(self) -> None:
        count = len(self.initial)
        if self.initial.shape != (count,) or self.transition.shape != (count, count):
            shapes = f"{tuple(self.initial.shape)} and {tuple(self.transition.shape)}"
            raise ValueError(f"initial and transition have shapes {shapes}: must be [V] and [V, V]")
        for name in ("initial", "transition"):
            values = getattr(self, name)
            if not bool((values > 0).all()) or float((values.sum(-1) - 1).abs().max()) > 1e-5:
                raise ValueError(f"{name}: must be probabilities above 0 that sum to 1")

    @staticmethod
    def random(vocabulary: int, length: int, generator: torch.Generator, spread: float = 1.0) -> MarkovStrings:
        """Softmax of normal numbers of deviation `spread`."""
        drawn = spread * torch.randn(vocabulary + 1, vocabulary, generator=generator)
        return MarkovStrings(drawn[0].softmax(0), drawn[1:].softmax(1), length)

    def log_prob(self, strings: Tensor) -> Tensor:
        """Of `[N, L]`: `[N]`."""
        steps = self.transition[strings[:, :-1], strings[:, 1:]].log().sum(1)
        return self.initial[strings[:, 0]].log() + steps

    def log_conditionals(self, state: Tensor) -> Tensor:
        """The log-probability of each token given all others that are known, the mask being token V: of states
        `[N, L]`, `[N, L, V]`. A known token's own is what the others say of it."""
        vocabulary = len(self.initial)
        here = functional.one_hot(state, vocabulary + 1)[..., :vocabulary].float()
        here = torch.where((state == vocabulary)[..., None], 1.0, here)  # what the state says of each token
        before = [self.initial.expand(len(state), -1)]
        after = [torch.ones_like(before[0])]
        for position in range(self.length - 1):
            before.append(_normalised((before[-1] * here[:, position]) @ self.transition))
            after.append(_normalised((after[-1] * here[:, -1 - position]) @ self.transition.mT))
        weight = torch.stack(before, 1) * torch.stack(after[::-1], 1)
        return _normalised(weight).log()


class MarkovDenoiser(nn.Module):
    """The exact denoiser of Markov strings: the true law of each token given the revealed ones."""

    condition = 0

    def __init__(self, strings: MarkovStrings) -> None:
        super().__init__()
        self.strings = strings

    def forward(self, state: Tensor, time: Tensor, condition: Tensor) -> Tensor:
        """Logits `[N, L, V]` at states `[N, L]`; times and conditions are not looked at."""
        return self.strings.log_conditionals(state)


def every_string(process: RevealingProcess) -> Tensor:
    """What chains may end in: `[V^F, L]`, F the number of tokens that are not given."""
    return _product([range(process.vocabulary) if token == FREE else (token,) for token in _given(process)])


@torch.no_grad()
def end_probabilities(process: RevealingProcess, denoiser: nn.Module, condition: Tensor | None = None) -> Tensor:
    """With what probability a chain ends in each of `every_string`: float64 `[V^F]`, by passing on the probability of
    every state, under one condition row `[1, C]`.

    Raises ValueError where there are too many steps from one state to another, (2 V + 1)^F.
    """
    given, vocabulary = _given(process), process.vocabulary
    n_steps = (2 * vocabulary + 1) ** given.count(FREE)
    if n_steps > _MOST_STEPS:
        raise ValueError(f"{n_steps} steps between states: at most {_MOST_STEPS} are enumerated")
    # a masked token stays or becomes any, a known one stays: pairs of (before, after), numbered in base V + 1
    moves = [(process.mask, each) for each in range(vocabulary + 1)] + [(each, each) for each in range(vocabulary)]
    number = torch.arange(len(moves))
    free = [token == FREE for token in given]
    pairs = _product([number.tolist() if is_free else (0,) for is_free in free])
    table = torch.tensor(moves)[pairs]  # `[steps, L, 2]`
    known = torch.tensor([token if token != FREE else 0 for token in given])
    before, after = (torch.where(torch.tensor(free), table[..., side], known) for side in (0, 1))
    symbols = [range(vocabulary + 1) if is_free else (token,) for is_free, token in zip(free, given, strict=True)]
    states = _product(symbols)
    place = torch.tensor([(vocabulary + 1) ** sum(free[position + 1 :]) for position in range(process.length)])
    place = place * torch.tensor(free)
    source, target = (before * place).sum(1), (after * place).sum(1)
    rows = (torch.empty(1, 0) if condition is None else condition).expand(len(states), -1)
    mass = torch.zeros(len(states), dtype=torch.float64)
    mass[-1] = 1.0  # all masked, the last in order
    for step in range(process.n_steps):
        said = denoiser(states, process.time(torch.full((len(states),), step)), rows)
        reached = (mass[source] > 0).nonzero()[:, 0]
        law = process.law(said[source[reached]], before[reached], torch.full((len(reached),), step))
        passed = mass[source[reached]] * law.log_prob(after[reached]).double().exp()
        mass = torch.zeros_like(mass).index_add(0, target[reached], passed)
    return mass[(every_string(process) * place).sum(1)]


def _given(process: RevealingProcess) -> Sequence[int]:
    return process.given or (FREE,) * process.length


def _product(choices: Sequence[Sequence[int]]) -> Tensor:
    """Every row that has one of each position's choices, the last position changing fastest."""
    columns = torch.meshgrid(*(torch.tensor(tuple(each)) for each in choices), indexing="ij")
    return torch.stack([column.flatten() for column in columns], 1)


def _normalised(weight: Tensor) -> Tensor:
    return weight / weight.sum(-1, keepdim=True)
