"""What makes a tree good: few changes (parsimony), or a high posterior probability of tree and branch lengths."""

from __future__ import annotations

import math

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from headwater.environments.base import Objects
from headwater.phylogeny import fitch
from headwater.phylogeny.evidence import LikelihoodEvidence
from headwater.phylogeny.walks import walks_to


class ParsimonyReward:
    """log R = constant - changes, at temperature 1. Objects are tables, `[T, 2 (n-1)]` (see `walks.py`).

    masks: uint8 `[n, P]`, weights: `[P]`, of the alignment's patterns; planes: 5 where a gap is a state, else 4.
    """

    def __init__(
        self, masks: NDArray[np.uint8], weights: NDArray[np.float64], planes: int = 4, constant: float = 0.0
    ) -> None:
        self.sites, self.constant = fitch.pack(masks, weights, planes), constant

    def __call__(self, objects: Objects, condition: Tensor) -> Tensor:
        return (self.constant - self.changes(torch.as_tensor(objects)).double()).float()

    def changes(self, tables: Tensor) -> Tensor:
        """Fitch's length of each tree: int64 `[T]`."""
        merges, _ = walks_to(tables, None, no_choice(tables))
        return torch.from_numpy(fitch.scores(self.sites.leaves, merges.numpy()) + self.sites.constant)


class PosteriorReward:
    """log R = log p(alignment | tree, lengths) + log p(lengths) + log p(tree): its integral is the marginal likelihood.

    Lengths are exponential of rate `branch_rate`, each by itself; all (2n - 5)!! unrooted topologies are equally
    probable. Objects are float32 `[T, 2 (n-1) + 2n-1 + p]`: a table, lengths above its nodes, and the coordinates of
    model parameters, where they are sampled. constant: taken from log R, so that powers of it stay near one.
    """

    def __init__(self, evidence: LikelihoodEvidence, branch_rate: float = 10.0, constant: float = 0.0) -> None:
        if not 0 < branch_rate < math.inf:
            raise ValueError(f"branch_rate = {branch_rate}: must be positive")
        self.evidence, self.branch_rate, self.constant = evidence, branch_rate, constant

    def __call__(self, objects: Objects, condition: Tensor) -> Tensor:
        values = torch.as_tensor(objects)
        return (self.log_likelihood(values) + self.log_prior(values) - self.constant).float()

    def log_likelihood(self, objects: Tensor) -> Tensor:
        """float64 `[T]`."""
        tables, above, parameters = self._parts(objects)
        merges, lengths = walks_to(tables, above, no_choice(tables))
        return self.evidence.log_likelihood(merges, lengths, parameters)

    def log_prior(self, objects: Tensor) -> Tensor:
        """Of topology, lengths and parameters: float64 `[T]`."""
        n = self.evidence.n
        _, above, parameters = self._parts(objects)
        total = (2 * n - 3) * math.log(self.branch_rate) - self.branch_rate * above.double().sum(1) - log_topologies(n)
        if parameters is not None:
            total += self.evidence.log_prior(parameters)
        return total

    def _parts(self, objects: Tensor) -> tuple[Tensor, Tensor, Tensor | None]:
        n = self.evidence.n
        table, above, parameters = torch.split(objects, [2 * (n - 1), 2 * n - 1, self.evidence.parameters], dim=1)
        return table.int(), above, parameters if self.evidence.parameters else None


def log_topologies(n: int) -> float:
    """log of (2n - 5)!!, the number of unrooted binary trees over n leaves (Felsenstein 1978)."""
    return math.lgamma(2 * n - 3) - math.lgamma(n - 1) - (n - 2) * math.log(2)


def no_choice(tables: Tensor) -> Tensor:
    """Whichever root and order: no score depends on them."""
    return torch.zeros(len(tables), tables.shape[1] // 2, dtype=torch.float64)
