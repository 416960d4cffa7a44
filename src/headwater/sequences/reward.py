"""What makes an RNA design good, by ViennaRNA's nearest-neighbour energy model at 37 C (Lorenz et al. 2011, extra
`rna`).

Binding: normalised duplex energies with target RNAs, the RNA landscapes of FLEXS (Sinai et al. 2020, arXiv
2010.02141). Inverse folding: the ensemble defect from a wanted structure (Zadeh et al. 2011). Both are scored one
design at a time: ViennaRNA holds the interpreter lock while it computes, so threads do not help.
"""

from __future__ import annotations

import importlib
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from types import ModuleType

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from headwater.environments.base import Objects
from headwater.sequences.data import BASES
from headwater.sequences.environment import pair_table

_NO_DUPLEX = 1000.0
"""kcal/mol; `duplexfold` answers 100000 where not one base pair is possible."""

_COMPLEMENT = str.maketrans("ACGU", "UGCA")


def viennarna() -> ModuleType:
    """ViennaRNA's Python module. Raises ImportError naming the extra to install where it is missing."""
    try:
        return importlib.import_module("RNA")
    except ImportError as error:
        raise ImportError("RNA design needs ViennaRNA, which is not installed: pip install 'headwater[rna]'") from error


def best_duplex(first: str, second: str) -> tuple[float, list[tuple[int, int]]]:
    """The minimum-free-energy duplex of two RNAs: its energy in kcal/mol, and its base pairs.

    Pairs are (position in first, position in second), 1-based from each 5' end, the first ascending and so the second
    descending. Without any possible base pair the energy is 0 and the list empty.
    """
    duplex = viennarna().duplexfold(first, second)
    upper, lower = duplex.structure.split("&")
    # ViennaRNA gives where the drawn part of the first strand ends and where that of the second begins.
    start = duplex.i - len(upper) + 1
    openings = [start + k for k, symbol in enumerate(upper) if symbol == "("]
    closings = [duplex.j + k for k, symbol in enumerate(lower) if symbol == ")"]
    energy = float(duplex.energy) if openings else 0.0
    return energy, list(zip(openings, reversed(closings), strict=True))


@dataclass(frozen=True)
class BindingReward:
    """R(x) = exp(fitness(x) / temperature): how well designs of `length` bases bind all `targets`, as FLEXS scores it.

    fitness(x) is the mean over targets of E(x, target) / E_norm(target): E is the energy of the best duplex, and
    E_norm that of the target with its own reverse complement, scaled by length / len(target). So 1 is about a perfect
    match with every target. targets: RNA strings, 5' to 3'. length: bases in a design. temperature: in units of
    fitness.
    """

    targets: Sequence[str]
    length: int = 14
    temperature: float = 0.02

    def __post_init__(self) -> None:
        if isinstance(self.targets, str) or not self.targets:
            raise ValueError(f"targets = {self.targets!r}: must be at least one RNA sequence, in a list")
        for target in self.targets:
            _check(target, max(len(target), 1), "targets")
        if self.length < 1:
            raise ValueError(f"length = {self.length}: must be at least 1")
        _check_temperature(self.temperature)

    @cached_property
    def norms(self) -> NDArray[np.float64]:
        """E_norm of each target, kcal/mol, below 0: `[targets]`. Raises ValueError for a target that nothing binds."""
        rna = viennarna()
        norms = np.zeros(len(self.targets))
        for index, target in enumerate(self.targets):
            complement = target.translate(_COMPLEMENT)[::-1]
            norms[index] = rna.duplexfold(complement, target).energy * self.length / len(target)
            if norms[index] >= 0:
                raise ValueError(f"targets: {target!r} forms no stable duplex, even with its reverse complement")
        return norms

    def energies(self, sequences: Sequence[str]) -> NDArray[np.float64]:
        """Energy of the best duplex of each design with each target, kcal/mol: `[N, targets]`; 0 where no base can
        pair.

        Raises ValueError naming a sequence that is not `length` letters out of A, C, G, U.
        """
        duplexfold = viennarna().duplexfold
        energies = np.empty((len(sequences), len(self.targets)))
        for row, sequence in enumerate(sequences):
            _check(sequence, self.length, "sequences")
            for column, target in enumerate(self.targets):
                energies[row, column] = duplexfold(target, sequence).energy
        return np.where(energies < _NO_DUPLEX, energies, 0.0)

    def fitness(self, sequences: Sequence[str]) -> NDArray[np.float64]:
        """The FLEXS fitness of each design: `[N]`. Raises as `energies` does."""
        return (self.energies(sequences) / self.norms).mean(1)

    def __call__(self, objects: Objects, condition: Tensor) -> Tensor:
        """Log-reward of N designs, strings of `length` bases: float32 `[N]`."""
        return torch.from_numpy(self.fitness(_strings(objects)) / self.temperature).float()


@dataclass(frozen=True)
class InverseFoldingReward:
    """R(x) = exp(-defect(x) / temperature): how surely designs fold into the dot-bracket `structure`.

    defect(x) is the ensemble defect: the fraction of bases, averaged over x's equilibrium ensemble, that are not
    paired (or unpaired) as in the structure; from 0, a perfect design, to 1 (Zadeh et al. 2011). temperature: in units
    of the defect.
    """

    structure: str
    temperature: float = 0.02

    def __post_init__(self) -> None:
        pair_table(self.structure)
        _check_temperature(self.temperature)

    def defect(self, sequences: Sequence[str]) -> NDArray[np.float64]:
        """Ensemble defect of each design, 0 .. 1: `[N]`.

        Raises ValueError naming a sequence that is not as many letters out of A, C, G, U as the structure has
        positions.
        """
        return np.array(
            [self._folded(sequence).ensemble_defect(self.structure) for sequence in sequences], dtype=np.float64
        )

    def target_probability(self, sequence: str) -> float:
        """Probability of the wanted structure in the equilibrium ensemble of one design, 0 .. 1. Raises as `defect`
        does.
        """
        return float(self._folded(sequence).pr_structure(self.structure))

    def mfe_structure(self, sequence: str) -> str:
        """The minimum-free-energy structure of one design, dot-bracket. Raises as `defect` does."""
        _check(sequence, len(self.structure), "sequences")
        return str(viennarna().fold_compound(sequence).mfe()[0])

    def __call__(self, objects: Objects, condition: Tensor) -> Tensor:
        """Log-reward of N designs, strings as long as the structure: float32 `[N]`."""
        return torch.from_numpy(-self.defect(_strings(objects)) / self.temperature).float()

    def _folded(self, sequence: str):  # type: ignore[no-untyped-def]
        _check(sequence, len(self.structure), "sequences")
        compound = viennarna().fold_compound(sequence)
        # The partition function of a long, stable design overflows unless it is scaled by the minimum free energy.
        compound.exp_params_rescale(compound.mfe()[1])
        compound.pf()
        return compound


def _strings(objects: Objects) -> list[str]:
    if isinstance(objects, Tensor):
        raise TypeError("RNA rewards score strings of bases, not tensors")
    return [str(value) for value in objects]


def _check(sequence: str, length: int, field: str) -> None:
    if len(sequence) != length or sequence.strip(BASES):
        raise ValueError(f"{field}: {sequence!r} is not {length} letters out of A, C, G, U")


def _check_temperature(temperature: float) -> None:
    if not (0 < temperature < float("inf")):
        raise ValueError(f"temperature = {temperature}: must be positive and finite")
