"""Parameters of a substitution model that are sampled with the tree: their coordinates, their prior, the density that
the policy draws them from before the first merge.

Priors are MrBayes' defaults: kappa / (1 + kappa) uniform, frequencies and exchangeabilities uniform on their simplex,
the shape of the Gamma distribution exponential of rate 1, the share of invariable sites uniform. Coordinates are free
of bounds: log kappa, log-ratios to the last of a simplex, log alpha, the logit of a share. Densities are of these.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import ArrayLike
from torch import Tensor, nn
from torch.nn import functional

from headwater.phylogeny.models import Process, SubstitutionModel, process

_LOG_2PI = math.log(2 * math.pi)


@dataclass(frozen=True)
class FreeParameters:
    """The free parameters of one model, as p coordinates."""

    model: SubstitutionModel

    @property
    def blocks(self) -> list[tuple[str, int]]:
        """Each parameter and its number of coordinates."""
        found = [("kappa", 1)] if self.model.has_kappa else []
        found += [("frequencies", 3)] if self.model.has_frequencies else []
        found += [("exchangeabilities", 5)] if self.model.name == "GTR" else []
        found += [("alpha", 1)] if self.model.gamma_categories > 1 else []
        return found + ([("invariant", 1)] if self.model.invariant else [])

    @property
    def size(self) -> int:
        return sum(size for _, size in self.blocks)

    @property
    def names(self) -> list[str]:
        """A name for each number that a person reads: simplices have one more than coordinates."""
        of = {"frequencies": [f"pi({x})" for x in "ACGT"],
              "exchangeabilities": [f"r({x})" for x in ("AC", "AG", "AT", "CG", "CT", "GT")]}  # fmt: skip
        return [name for block, _ in self.blocks for name in of.get(block, [block])]

    def coordinates(self, **values: ArrayLike) -> Tensor:
        """Of given parameters: float32 `[p]`."""
        given = [np.atleast_1d(np.asarray(values[name], dtype=np.float64)) for name, _ in self.blocks]
        return self.coordinates_of(torch.from_numpy(np.concatenate([*given, np.empty(0)])[None]))[0]

    def coordinates_of(self, numbers: Tensor) -> Tensor:
        """The inverse of `numbers`: float32 `[T, p]`."""
        parts = []
        for (name, size), value in zip(self.blocks, torch.split(numbers.double(), self._widths, dim=1), strict=True):
            value = value.clamp(min=1e-6)
            if size > 1:
                value = value[:, :-1] / value[:, -1:]
            elif name == "invariant":
                value = value / (1 - value.clamp(max=1 - 1e-6))
            parts.append(value.log())
        return torch.cat([*parts, numbers.new_empty(len(numbers), 0)], 1).float()

    def numbers(self, coordinates: Tensor) -> Tensor:
        """What a person reads, in the order of `names`, at coordinates `[T, p]`: float64 `[T, len(names)]`."""
        return torch.cat([value.view(len(coordinates), -1) for value in self.values(coordinates).values()], 1)

    @property
    def _widths(self) -> list[int]:
        """How many of the `names` each parameter has."""
        return [size + (size > 1) for _, size in self.blocks]

    def values(self, coordinates: Tensor) -> dict[str, Tensor]:
        """The parameters at coordinates `[T, p]`, float64: `[T]`, simplices `[T, states]`."""
        found = {}
        parts = torch.split(coordinates.double(), [size for _, size in self.blocks], dim=1)
        for (name, size), x in zip(self.blocks, parts, strict=True):
            if size > 1:
                found[name] = functional.pad(x, (0, 1)).softmax(1)
            else:
                found[name] = torch.sigmoid(x[:, 0]) if name == "invariant" else x[:, 0].exp()
        return found

    def process(self, coordinates: Tensor) -> Process:
        """One set of parameters for each of T trees, held within what arithmetic can bear."""
        values = self.values(coordinates.double().clamp(-12, 12))
        if "invariant" in values:
            values["invariant"] = values["invariant"].clamp(max=0.999)
        if "alpha" in values:
            values["alpha"] = values["alpha"].clamp(0.02, 200)
        return process(self.model, **{name: value.numpy() for name, value in values.items()})

    def log_prior(self, coordinates: Tensor) -> Tensor:
        """float64 `[T]`."""
        total = torch.zeros(len(coordinates), dtype=torch.float64)
        parts = torch.split(coordinates.double(), [size for _, size in self.blocks], dim=1)
        for (name, size), x in zip(self.blocks, parts, strict=True):
            if size > 1:  # uniform on a simplex, times the Jacobian of the softmax: the product of the shares
                total += math.lgamma(size + 1) + functional.pad(x, (0, 1)).log_softmax(1).sum(1)
            elif name == "alpha":
                total += x[:, 0] - x[:, 0].exp()
            else:
                total += functional.logsigmoid(x[:, 0]) + functional.logsigmoid(-x[:, 0])
        return total


class ParameterDensity(nn.Module):
    """A normal density over p coordinates, with all its correlations: at first about `start` `[p]`, with the covariance
    of the lower triangular `factor` `[p, p]`.
    """

    def __init__(self, start: Tensor, factor: Tensor) -> None:
        super().__init__()
        self.start: Tensor
        self.factor: Tensor
        self.register_buffer("start", start.clone())
        self.register_buffer("factor", factor.clone())
        self.shift, self.log_width = nn.Parameter(torch.zeros(len(start))), nn.Parameter(torch.zeros(len(start)))
        self.mixed = nn.Parameter(torch.zeros(len(start), len(start)))

    def sample(self, count: int, generator: torch.Generator) -> Tensor:
        """`[count, p]`."""
        normal = torch.randn(count, len(self.shift), generator=generator)
        return self.start + (self.shift + normal @ self._learned().t()) @ self.factor.t()

    def log_prob(self, x: Tensor) -> Tensor:
        """`[T]` of `[T, p]`."""
        normal = torch.linalg.solve_triangular(self._learned(), (self.standardised(x) - self.shift).t(), upper=False)
        log_volume = self.log_width.sum() + self.factor.diagonal().log().sum()
        return -0.5 * normal.square().sum(0) - log_volume - 0.5 * len(self.shift) * _LOG_2PI

    def standardised(self, x: Tensor) -> Tensor:
        """Coordinates as their start and first covariance see them, which is what a network takes: `[T, p]`."""
        return torch.linalg.solve_triangular(self.factor, (x - self.start).t(), upper=False).t()

    def _learned(self) -> Tensor:
        """What training has made of the factor, in units of the first one."""
        return torch.diag(self.log_width.exp()) + self.mixed.tril(-1)
