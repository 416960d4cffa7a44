"""The settings of a substitution model, and the process that they make of an alignment's partition."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

from headwater.phylogeny.models import Name, Process, SubstitutionModel, empirical_frequencies, process
from headwater.phylogeny.parameters import FreeParameters


@dataclass(frozen=True)
class ModelSettings:
    """How DNA changes along a branch. Parameters that the model does not have are not looked at."""

    name: Name = "JC69"
    """JC69, K80, HKY85 or GTR."""
    gamma_categories: int = 1
    """Rate categories of +Gamma, such as 4; 1 for equal rates."""
    invariant: bool = False
    """Whether a share of the sites never changes, +I."""
    kappa: float = 2.0
    """Rate of transitions over that of transversions."""
    frequencies: tuple[float, float, float, float] | None = None
    """Of A, C, G, T; the alignment's own if not given."""
    exchangeabilities: tuple[float, float, float, float, float, float] = (1.0, 1.0, 1.0, 1.0, 1.0, 1.0)
    """Of GTR: AC AG AT CG CT GT."""
    alpha: float = 0.5
    """Shape of the Gamma distribution."""
    invariant_share: float = 0.1
    """Share of the sites that never change."""
    sampled: bool = False
    """Sample the parameters with the tree, of each partition by itself, under MrBayes' default priors; what is given
    here is where they start."""

    def __post_init__(self) -> None:
        self._process(np.full(4, 0.25) if self.frequencies is None else np.array(self.frequencies))
        if self.sampled and not self.free.size:
            raise ValueError(f"sampled: {self} has no free parameters; choose another model, +Gamma or +I")

    def process(self, masks: NDArray[np.uint8], weights: NDArray[np.float64]) -> Process:
        """For patterns `[n, P]` of one partition."""
        if self.frequencies is not None:
            return self._process(np.array(self.frequencies))
        return self._process(empirical_frequencies(masks, weights))

    @property
    def free(self) -> FreeParameters:
        return FreeParameters(SubstitutionModel(self.name, self.gamma_categories, self.invariant))

    def start(self, masks: NDArray[np.uint8], weights: NDArray[np.float64]) -> Tensor:
        """Coordinates of the parameters for patterns of one partition: `[p]`."""
        frequencies = empirical_frequencies(masks, weights) if self.frequencies is None else self.frequencies
        return self.free.coordinates(
            kappa=self.kappa, frequencies=frequencies, exchangeabilities=self.exchangeabilities, alpha=self.alpha,
            invariant=self.invariant_share,
        )  # fmt: skip

    def _process(self, frequencies: NDArray[np.float64]) -> Process:
        model = SubstitutionModel(self.name, self.gamma_categories, self.invariant)
        return process(
            model, self.kappa, frequencies, self.exchangeabilities, self.alpha,
            self.invariant_share if self.invariant else 0.0,
        )  # fmt: skip

    def __str__(self) -> str:
        return str(SubstitutionModel(self.name, self.gamma_categories, self.invariant))
