"""Densities of branch lengths: mixtures of log-normals, or bins that are uniform inside.

Both are placed about a guess, one for each branch, so that a network starts at the data's scale and learns what to add.
Densities are of the length itself, in expected substitutions per site, not of its logarithm.
"""

from __future__ import annotations

import math
from typing import Protocol

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional

from headwater.native import kept_njit

_LOG_2PI = math.log(2 * math.pi)
_FURTHEST, _STRETCH = 4.0, 2.0  # how far a component can move from the guess, and widen or narrow, in log length


class LengthDensity(Protocol):
    """A family of densities over (0, inf), N at once."""

    @property
    def outputs(self) -> int:
        """Numbers that a network gives for each."""
        ...

    def draw(self, output: Tensor, guess: Tensor, generator: torch.Generator) -> tuple[Tensor, Tensor]:
        """One length for each row of output `[N, outputs]` and guess `[N]`, and its log-density: `[N]` each."""
        ...

    def log_prob(self, output: Tensor, guess: Tensor, lengths: Tensor) -> Tensor:
        """Log-density of each length: `[N]`."""
        ...


class MixtureLengths:
    """Mixtures of log-normal densities. Nothing is clipped: a point mass at a border would bias the balance.

    sites: of the alignment. A branch on which c substitutions are expected is known to about 1 / sqrt(c) of its length:
    so wide are the components at the start.
    """

    def __init__(self, components: int, sites: float) -> None:
        self.components, self.sites = components, sites
        self.offsets = torch.linspace(-1, 1, components) if components > 1 else torch.zeros(1)

    @property
    def outputs(self) -> int:
        return 3 * self.components

    def draw(self, output: Tensor, guess: Tensor, generator: torch.Generator) -> tuple[Tensor, Tensor]:
        uniform = torch.rand(len(output), generator=generator)
        normal = torch.randn(len(output), generator=generator)
        lengths, log_density = torch.empty(2, len(output))
        inputs = (x.numpy() for x in (output.float(), guess, self.offsets, uniform, normal))
        _draw(*inputs, self.sites, lengths.numpy(), log_density.numpy())
        return lengths, log_density

    def log_prob(self, output: Tensor, guess: Tensor, lengths: Tensor) -> Tensor:
        log_weight, mean, log_width = self._parts(output, guess)
        log_length = lengths.log()[:, None]
        normal = -0.5 * ((log_length - mean) * (-log_width).exp()).square() - log_width - 0.5 * _LOG_2PI
        return (log_weight + normal).logsumexp(1) - log_length[:, 0]

    def _parts(self, output: Tensor, guess: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        log_weight, shift, stretch = output.float().chunk(3, dim=1)
        log_known = -0.5 * (guess * self.sites + 1).log()[:, None]
        mean = guess.log()[:, None] + log_known.exp() * self.offsets + _FURTHEST * torch.tanh(shift / _FURTHEST)
        return log_weight.log_softmax(1), mean, log_known + _STRETCH * torch.tanh(stretch / _STRETCH)


class BinnedLengths:
    """Bins evenly wide in log length between `SHORTEST` and `LONGEST`, uniform inside, which together hold every length
    that can be drawn.
    """

    SHORTEST, LONGEST = 1e-6, 10.0

    def __init__(self, bins: int) -> None:
        self.bins = bins
        self.edges = torch.logspace(math.log10(self.SHORTEST), math.log10(self.LONGEST), bins + 1)
        self.edges[0] = 0.0
        self.log_sizes = (self.edges[1:] - self.edges[:-1]).log()
        self.middles = torch.linspace(math.log(self.SHORTEST), math.log(self.LONGEST), bins)

    @property
    def outputs(self) -> int:
        return self.bins

    def draw(self, output: Tensor, guess: Tensor, generator: torch.Generator) -> tuple[Tensor, Tensor]:
        uniform = torch.rand(len(output), 2, generator=generator, device=output.device)
        cumulative = self._log_weights(output, guess).exp().cumsum(1)
        chosen = (cumulative < uniform[:, :1]).sum(1).clamp(max=self.bins - 1)
        low, high = self.edges[chosen], self.edges[chosen + 1]
        lengths = (low + (high - low) * uniform[:, 1]).clamp(min=1e-30)
        return lengths, self.log_prob(output, guess, lengths)

    def log_prob(self, output: Tensor, guess: Tensor, lengths: Tensor) -> Tensor:
        inside = torch.bucketize(lengths.contiguous(), self.edges[1:-1], right=True)
        chosen = self._log_weights(output, guess).gather(1, inside[:, None])[:, 0]
        return torch.where(lengths < self.LONGEST, chosen - self.log_sizes[inside], -torch.inf)

    def _log_weights(self, output: Tensor, guess: Tensor) -> Tensor:
        start = -0.5 * (self.middles - guess.log()[:, None]).square()
        return functional.log_softmax(output.float() + start, dim=1)


@kept_njit()
def _draw(output, guess, offsets, uniform, normal, sites, lengths, log_density):  # type: ignore[no-untyped-def]
    """`MixtureLengths.log_prob` and what its docstring says, a row at a time."""
    components = len(offsets)
    log_weight, mean, log_width = np.empty(components), np.empty(components), np.empty(components)
    for i in range(len(guess)):
        log_known, log_guess, highest = -0.5 * math.log(guess[i] * sites + 1), math.log(guess[i]), -math.inf
        for k in range(components):
            log_weight[k] = output[i, k]
            highest = max(highest, log_weight[k])
            shift, stretch = output[i, components + k], output[i, 2 * components + k]
            mean[k] = log_guess + math.exp(log_known) * offsets[k] + _FURTHEST * math.tanh(shift / _FURTHEST)
            log_width[k] = log_known + _STRETCH * math.tanh(stretch / _STRETCH)
        total = 0.0
        for k in range(components):
            total += math.exp(log_weight[k] - highest)
        chosen, cumulative = components - 1, 0.0
        for k in range(components - 1, -1, -1):
            log_weight[k] -= highest + math.log(total)
        for k in range(components):
            cumulative += math.exp(log_weight[k])
            if uniform[i] <= cumulative:
                chosen = k
                break
        lengths[i] = max(math.exp(mean[chosen] + math.exp(log_width[chosen]) * normal[i]), 1e-30)
        log_length, highest, total = math.log(lengths[i]), -math.inf, 0.0
        for k in range(components):
            away = (log_length - mean[k]) * math.exp(-log_width[k])
            log_weight[k] += -0.5 * away * away - log_width[k] - 0.5 * _LOG_2PI
            highest = max(highest, log_weight[k])
        for k in range(components):
            total += math.exp(log_weight[k] - highest)
        log_density[i] = highest + math.log(total) - log_length
