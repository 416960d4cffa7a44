"""What the network sees of a forest as it grows: Fitch's sets, or partial likelihoods, of every node; how far apart
every two trees are.

All of it is computed by one merge at a time, for many trajectories side by side.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from headwater.phylogeny import felsenstein, fitch
from headwater.phylogeny.models import Process
from headwater.phylogeny.neighbour_joining import distances
from headwater.phylogeny.pairs import Apart
from headwater.phylogeny.parameters import FreeParameters

_UNKNOWN = 15  # any of A, C, G, T
_SCALE = 0.3  # of a pattern of mean weight, so that sums over hundreds of them are of order one


class Grown(ABC):
    """What is known of T forests that grow in step.

    apart: of pairs of nodes, those between leaves and where asked for by `join`. features: float32 `[T, n - 2,
    features]`, of node n + k in row k.
    """

    def __init__(self, evidence: Evidence, count: int) -> None:
        n = evidence.n
        self.evidence = evidence
        self.sets = np.empty((count, n - 1, *evidence.sites.leaves.shape[1:]), np.uint64)
        self.apart = Apart(*torch.zeros(3, count, 2 * n - 1, 2 * n - 1))
        for table, known in zip(self.apart, evidence.leaves_apart, strict=True):
            table[:, :n, :n] = known
        self.features = torch.empty(count, n - 2, evidence.features)

    def join(self, step: int, left: Tensor, right: Tensor, lengths: Tensor, others: Tensor) -> None:
        """Merge nodes `left` and `right`, int32 `[T]`, by edges of `lengths` `[T, 2]`, into node n + step, describe it,
        and compare it with `others`, int64 `[T, K]` (itself among them does no harm).
        """
        evidence = self.evidence
        first, second = left.numpy(), right.numpy()
        fitch.join(evidence.sites.leaves, self.sets, first, second, step)
        node = evidence.n + step
        nodes = np.full(len(first), node, np.int32)
        changes, comparable = np.empty((2, *others.shape), np.int32)
        fitch.pair_costs(evidence.sites.leaves, self.sets, nodes, others.int().numpy(), changes, comparable)
        self.apart.note(node, others, changes, comparable, evidence.alike)
        self._describe(step, first, second, lengths)

    @abstractmethod
    def _describe(self, step: int, left: NDArray[np.int32], right: NDArray[np.int32], lengths: Tensor) -> None:
        """Write the features of node n + step."""


class Evidence(ABC):
    """An alignment as a network sees it.

    n: leaves. n_sites: sites of the alignment. features: numbers that describe a node. leaves: float32 `[n, features]`.
    has_lengths: whether the edges' lengths matter. sites: all variable sites, for comparing trees; alike: about how
    many others any two have in common.
    """

    has_lengths: bool

    def __init__(self, masks: NDArray[np.uint8], weights: NDArray[np.float64], planes: int) -> None:
        self.n, self.n_sites, self.planes = len(masks), float(weights.sum()), planes
        self.masks, self.weights = masks, torch.from_numpy(np.asarray(weights, np.float64))
        self.sites = fitch.pack(masks, weights, planes, informative_only=False)
        varies = np.bitwise_and.reduce(masks, axis=0) == 0  # the sites packed
        # known by most trees and the same in all: a share of them is as good as a count
        self.alike = float(((masks != _UNKNOWN).mean(0) * weights)[~varies].sum())
        n = self.n
        changes, comparable = np.empty((2, n, n), np.int32)
        nodes, every = np.arange(n, dtype=np.int32), np.tile(np.arange(n, dtype=np.int32), (n, 1))
        nothing = np.empty((n, n - 1, *self.sites.leaves.shape[1:]), np.uint64)
        fitch.pair_costs(self.sites.leaves, nothing, nodes, every, changes, comparable)
        self.leaves_apart = Apart(*torch.zeros(3, 1, n, n))
        for leaf in range(n):
            row = slice(leaf, leaf + 1)
            others = torch.arange(n)[None]
            self.leaves_apart.note(leaf, others, changes[row], comparable[row], self.alike)
        self.features: int
        self.leaves: Tensor

    @property
    def distances(self) -> NDArray[np.float64]:
        """Distances of leaves, corrected for unseen changes (Jukes & Cantor 1969): float64 `[n, n]`."""
        return distances(self.masks, self.weights[None].numpy())[0]

    def resampled_distances(self, count: int, generator: torch.Generator) -> NDArray[np.float64]:
        """The same from sites drawn with replacement: float64 `[count, n, n]`."""
        drawn = torch.multinomial(self.weights, count * int(self.n_sites), True, generator=generator).view(count, -1)
        counts = torch.zeros(count, len(self.weights), dtype=torch.float64)
        return distances(self.masks, counts.scatter_add_(1, drawn, torch.ones(drawn.shape).double()).numpy())

    @property
    def parameters(self) -> int:
        """Coordinates of model parameters that a tree comes with."""
        return 0

    @abstractmethod
    def start(self, count: int, parameters: Tensor | None = None) -> Grown:
        """`count` forests of n leaves; `parameters` `[count, parameters]` where there are some."""


class ParsimonyEvidence(Evidence):
    """Fitch's sets at every pattern that parsimony tells trees apart by.

    masks: uint8 `[n, P]`, sets of states as bits. weights: `[P]`. planes: 4, or 5 where a gap is a state.
    """

    has_lengths = False

    def __init__(self, masks: NDArray[np.uint8], weights: NDArray[np.float64], planes: int = 4) -> None:
        super().__init__(masks, weights, planes)
        self.seen = fitch.pack(masks, np.ones_like(weights), planes)  # each pattern once
        after = np.bitwise_and.reduce(self.seen.leaves, axis=(0, 1))  # 1 only after the last site
        self.size = max(1, int((np.unpackbits(after.view(np.uint8)) == 0).sum()))  # at least one number to look at
        self.features = planes * self.size
        self.leaves = _bits(self.seen.leaves, self.size)

    def start(self, count: int, parameters: Tensor | None = None) -> Grown:
        return _SetsGrown(self, count)


class _SetsGrown(Grown):
    def __init__(self, evidence: ParsimonyEvidence, count: int) -> None:
        super().__init__(evidence, count)
        self.seen = np.empty((count, evidence.n - 1, *evidence.seen.leaves.shape[1:]), np.uint64)
        self.leaves, self.size = evidence.seen.leaves, evidence.size

    def _describe(self, step: int, left: NDArray[np.int32], right: NDArray[np.int32], lengths: Tensor) -> None:
        fitch.join(self.leaves, self.seen, left, right, step)
        self.features[:, step] = _bits(np.ascontiguousarray(self.seen[:, step]), self.size)


def _bits(sets: NDArray[np.uint64], size: int) -> Tensor:
    """The first `size` bits of `[T, planes, W]` words -> `[T, planes * size]` features, -0.3 or 0.7 times the scale.

    Not those after the last site: thousands of inputs that never differ would throw an optimiser about.
    """
    bits = np.unpackbits(sets.view(np.uint8), axis=2, count=size, bitorder="little")
    return (torch.from_numpy(bits).view(len(sets), -1).float() - 0.3) * _SCALE


class LikelihoodEvidence(Evidence):
    """Partial likelihoods at every variable pattern, averaged over rate categories, as a share of what is expected of
    a node that nothing is known of.

    parts: masks (no gaps), weights and process of every partition. free: the parameters of each partition's model that
    are sampled with the tree, in the place of those of its process; none if not given. Where there are some, calls take
    their coordinates, `parameters` `[T, parameters of all partitions]`.
    """

    has_lengths = True

    def __init__(
        self,
        parts: Sequence[tuple[NDArray[np.uint8], NDArray[np.float64], Process]],
        free: Sequence[FreeParameters] = (),
    ) -> None:
        self.free = tuple(free)
        masks = np.concatenate([part[0] for part in parts], 1)
        super().__init__(masks, np.concatenate([part[1] for part in parts]), 4)
        self.parts = [_Part(*part) for part in parts]
        self.features = sum(part.features for part in self.parts)
        self.leaves = torch.cat([part.of_leaves() for part in self.parts], 1)

    @property
    def parameters(self) -> int:
        return sum(free.size for free in self.free)

    def start(self, count: int, parameters: Tensor | None = None) -> Grown:
        return _PartialsGrown(self, count, self.processes(parameters))

    def processes(self, parameters: Tensor | None) -> list[Process]:
        """Of each partition."""
        if parameters is None or not self.free:
            return [part.process for part in self.parts]
        pieces = torch.split(parameters, [free.size for free in self.free], dim=1)
        return [free.process(piece) for free, piece in zip(self.free, pieces, strict=True)]

    def log_prior(self, parameters: Tensor) -> Tensor:
        """log p(parameters) of all partitions: float64 `[T]`."""
        pieces = torch.split(parameters, [free.size for free in self.free], dim=1)
        total = torch.zeros(len(parameters), dtype=torch.float64)
        for free, piece in zip(self.free, pieces, strict=True):
            total += free.log_prior(piece)
        return total

    def log_likelihood(self, merges: Tensor, lengths: Tensor, parameters: Tensor | None = None) -> Tensor:
        """log p(alignment | tree, lengths, parameters) of whole trees `[T, n-1, 2]`: float64 `[T]`."""
        total = torch.zeros(len(merges), dtype=torch.float64)
        for part, process in zip(self.parts, self.processes(parameters), strict=True):
            total += torch.from_numpy(
                felsenstein.log_likelihoods(part.tips, process, merges.numpy(), lengths.double().numpy())
            )
        return total


class _Part:
    """One partition, its variable patterns first."""

    def __init__(self, masks: NDArray[np.uint8], weights: NDArray[np.float64], process: Process) -> None:
        constant = np.bitwise_and.reduce(masks, axis=0) > 0
        order = np.argsort(constant, kind="stable")
        self.tips = felsenstein.tips(np.ascontiguousarray(masks[:, order]), weights[order])
        self.process = process
        self.seen = int((~constant).sum())
        self.features = 4 * self.seen
        seen = torch.from_numpy(weights[order][: self.seen]).float()
        self.scale = _SCALE * (seen / seen.mean().clamp(min=1e-9)).sqrt() if self.seen else seen

    def of_leaves(self) -> Tensor:
        partials = torch.from_numpy(self.tips.partials[:, :, : self.seen])
        frequencies = torch.tensor(self.process.frequencies[0], dtype=torch.float32)
        out = torch.empty(len(partials), self.features)
        self.write(partials / (partials * frequencies[:, None]).sum(1, keepdim=True), out)
        return out

    def write(self, partials: Tensor, out: Tensor) -> None:
        """`[T, 4, seen]` -> `out` `[T, features]`."""
        out = out.view(partials.shape)
        torch.sub(partials, 1.0, out=out)
        out *= self.scale


class _PartialsGrown(Grown):
    def __init__(self, evidence: LikelihoodEvidence, count: int, processes: list[Process]) -> None:
        super().__init__(evidence, count)
        self.parts, self.processes = evidence.parts, processes
        self.partials = [
            np.empty((count, evidence.n - 1, process.rates.shape[1], *part.tips.partials.shape[1:]), np.float32)
            for part, process in zip(evidence.parts, processes, strict=True)
        ]

    def _describe(self, step: int, left: NDArray[np.int32], right: NDArray[np.int32], lengths: Tensor) -> None:
        columns = torch.split(self.features[:, step], [part.features for part in self.parts], 1)
        for part, process, tables, out in zip(self.parts, self.processes, self.partials, columns, strict=True):
            felsenstein.join(part.tips, process, tables, left, right, lengths.double().numpy(), step)
            new = torch.from_numpy(tables[:, step, :, :, : part.seen])
            part.write(new[:, 0] if new.shape[1] == 1 else new.mean(1), out)
