"""Densities on a box: mixtures of products of Beta or truncated normal densities on [0, 1]^d, each exactly normalised.

Both kinds say where a step goes by a location in [0, 1] and how far it strays by a width, one of each a coordinate:
Beta(1 + c m, 1 + c (1 - m)) with its mode at m, and c such that its deviation is about the width, or the normal of mean
m and deviation width cut off at 0 and 1. Neither has a pole at an edge.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import Literal

import torch
from torch import Tensor

Kind = Literal["beta", "gaussian"]

UNIFORM = 1e-3
"""Share of every mixture that is uniform over the box: no log-density falls far below its logarithm, so that a step
which one side takes and the other finds unlikely costs a residual of some nats, not of thousands."""

EDGE = 1e-6
"""Points stay this far inside the box, so that single precision can tell them from its edge."""


@dataclass(frozen=True)
class BoxMixture:
    """N mixtures of K products over d coordinates, and of a share `UNIFORM` of the uniform density.

    log_weight: `[N, K]`, normalised. location, width: `[N, K, d]`, location in [0, 1], width positive.
    """

    kind: Kind
    log_weight: Tensor
    location: Tensor
    width: Tensor

    def log_prob(self, points: Tensor) -> Tensor:
        """Log-density of one point each, `[N, d]`: float32 `[N]`."""
        parts = self.log_densities(points[:, None, :]).sum(2)
        mixed = (self.log_weight + parts).logsumexp(1) + math.log1p(-UNIFORM)
        return torch.logaddexp(mixed, torch.full_like(mixed, math.log(UNIFORM))).float()

    def log_densities(self, x: Tensor) -> Tensor:
        """Log-densities of the components' coordinates at `x`, broadcast against `[N, K, d]`, in double precision: with
        narrow widths it is a small difference of large numbers.
        """
        x, location, width = x.double(), self.location.double(), self.width.double()
        if self.kind == "gaussian":
            scaled = (x - location) / width
            inside = torch.special.ndtr((1 - location) / width) - torch.special.ndtr(-location / width)
            return -0.5 * scaled.square() - (width * math.sqrt(2 * math.pi)).log() - inside.log()
        a, b = _beta_shapes(location, width)
        normaliser = torch.lgamma(a) + torch.lgamma(b) - torch.lgamma(a + b)
        return torch.xlogy(a - 1, x) + torch.special.xlog1py(b - 1, -x) - normaliser

    def sample(self, generator: torch.Generator) -> Tensor:
        """One point of each mixture: float32 `[N, d]`, strictly inside the box."""
        chosen = torch.multinomial(self.log_weight.exp(), 1, generator=generator)
        rows = torch.arange(len(chosen), device=chosen.device)
        location, width = (values[rows, chosen[:, 0]].double() for values in (self.location, self.width))
        if self.kind == "gaussian":
            low, high = torch.special.ndtr(-location / width), torch.special.ndtr((1 - location) / width)
            uniform = torch.rand(location.shape, generator=generator, dtype=torch.float64, device=location.device)
            x = location + width * torch.special.ndtri(low + (high - low) * uniform)
        else:
            a, b = (torch._standard_gamma(shape, generator=generator) for shape in _beta_shapes(location, width))
            x = a / (a + b)
        anywhere = torch.rand(len(x), 1 + x.shape[1], generator=generator, dtype=torch.float64, device=x.device)
        return torch.where(anywhere[:, :1] < UNIFORM, anywhere[:, 1:], x).clamp(EDGE, 1 - EDGE).float()

    def tempered(self, temperature: float) -> BoxMixture:
        """Flatter above 1, sharper below: weights to the power 1 / temperature, widths times its root, which is the
        tempered density of a single normal.
        """
        if temperature == 1:
            return self
        weight = (self.log_weight / temperature).log_softmax(1)
        return replace(self, log_weight=weight, width=self.width * math.sqrt(temperature))


def _beta_shapes(location: Tensor, width: Tensor) -> tuple[Tensor, Tensor]:
    """A concentration that makes the deviation about the width, in the middle of the box as at its edges."""
    concentration = location * (1 - location) / width.square() + 1 / width
    return 1 + concentration * location, 1 + concentration * (1 - location)
