"""Densities of branch lengths: mixtures of log-normals, or bins that are uniform inside.

Both are placed about a guess, one for each branch, so that a network starts at the data's scale and learns what to add.
Densities are of the length itself, in expected substitutions per site, not of its logarithm.
"""

from __future__ import annotations

import math
from typing import Protocol

import torch
from torch import Tensor
from torch.nn import functional

_LOG_2PI = math.log(2 * math.pi)
_FURTHEST, _STRETCH = 4.0, 2.0  # how far a component can move from the guess, and widen or narrow, in log length


class LengthDensity(Protocol):
    """A family of densities over (0, inf), N at once."""

    @property
    def outputs(self) -> int:
        """Numbers that a network gives for each."""
        ...

    def sample(self, output: Tensor, guess: Tensor, generator: torch.Generator) -> Tensor:
        """One length for each row of output `[N, outputs]` and guess `[N]`: `[N]`."""
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

    def sample(self, output: Tensor, guess: Tensor, generator: torch.Generator) -> Tensor:
        log_weight, mean, log_width = self._parts(output, guess)
        uniform = torch.rand(len(output), 1, generator=generator, device=output.device)
        chosen = (log_weight.exp().cumsum(1) < uniform).sum(1, keepdim=True).clamp(max=self.components - 1)
        normal = torch.randn(len(output), 1, generator=generator, device=output.device)
        return (mean.gather(1, chosen) + log_width.gather(1, chosen).exp() * normal)[:, 0].exp().clamp(min=1e-30)

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

    def sample(self, output: Tensor, guess: Tensor, generator: torch.Generator) -> Tensor:
        uniform = torch.rand(len(output), 2, generator=generator, device=output.device)
        cumulative = self._log_weights(output, guess).exp().cumsum(1)
        chosen = (cumulative < uniform[:, :1]).sum(1).clamp(max=self.bins - 1)
        low, high = self.edges[chosen], self.edges[chosen + 1]
        return (low + (high - low) * uniform[:, 1]).clamp(min=1e-30)

    def log_prob(self, output: Tensor, guess: Tensor, lengths: Tensor) -> Tensor:
        inside = torch.bucketize(lengths, self.edges[1:-1], right=True)
        chosen = self._log_weights(output, guess).gather(1, inside[:, None])[:, 0]
        return torch.where(lengths < self.LONGEST, chosen - self.log_sizes[inside], -torch.inf)

    def _log_weights(self, output: Tensor, guess: Tensor) -> Tensor:
        start = -0.5 * (self.middles - guess.log()[:, None]).square()
        return functional.log_softmax(output.float() + start, dim=1)
