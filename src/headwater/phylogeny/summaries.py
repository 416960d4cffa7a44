"""What phylogeneticists say of a sample of trees: split frequencies, majority-rule consensus, the table of topologies,
Robinson-Foulds distances, and how far two samples are apart.

A split is the set of leaves on the side of an edge without leaf 0, as bits of uint64 words: bit i of word i // 64 is
leaf i. Only the n - 3 inner edges of a tree have one that says something. Weights may be of any sum.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import ArrayLike, NDArray

from headwater.native import kept_njit
from headwater.phylogeny.nexus import quoted
from headwater.phylogeny.trees import Floats, Ints, Trees, concatenated, from_canonical

Words = NDArray[np.uint64]

SMALLEST_COMPARED = 0.1
"""MrBayes' `minpartfreq`: a split below this frequency in every sample does not count in the average deviation."""


@dataclass(frozen=True)
class SplitTable:
    """Distinct splits, the most frequent first. splits: uint64 `[S, words]`. frequencies: float64 `[S]`. lengths:
    float64 `[S]`, the mean length of the edge over the trees that have it. leaf_lengths: float64 `[n]`, the mean
    lengths at the leaves. Both None where the trees have no lengths.
    """

    taxa: tuple[str, ...]
    splits: Words
    frequencies: Floats
    lengths: Floats | None = None
    leaf_lengths: Floats | None = None

    def members(self, index: int) -> tuple[str, ...]:
        """The taxa on the side of a split without the first taxon."""
        return tuple(name for i, name in enumerate(self.taxa) if _has(self.splits[index], i))


@dataclass(frozen=True)
class TopologyTable:
    """Distinct topologies, the most probable first, as in MrBayes' .trprobs.

    trees: one of each, with mean branch lengths where there are any. probabilities, cumulative: float64 `[K]`. index:
    int64 `[T]`, the row of each tree of the sample.
    """

    trees: Trees
    probabilities: Floats
    cumulative: Floats
    index: NDArray[np.int64]

    def credible(self, share: float = 0.95) -> int:
        """How many topologies, from the most probable, hold this share of the probability."""
        return int(np.searchsorted(self.cumulative, share - 1e-12) + 1)

    @property
    def simpson(self) -> float:
        """Simpson's diversity index: the probability that two draws differ in topology."""
        return float(1 - (self.probabilities**2).sum())


@dataclass(frozen=True)
class Consensus:
    """A tree that may have multifurcations, its top beside leaf 0.

    children: of each inner node, the first being the top; nodes below n are leaves, node n + i is inner node i.
    support: float64 `[inner]`, the frequency of the split above each, 1 at the top. lengths: float64 `[n + inner]`, the
    mean length of the edge above each node, or None.
    """

    taxa: tuple[str, ...]
    children: tuple[tuple[int, ...], ...]
    support: Floats
    lengths: Floats | None = None

    def newick(self, digits: int = 4) -> str:
        """Newick with support as labels of the inner nodes, as IQ-TREE, FigTree and Biopython read it."""
        n = len(self.taxa)

        def written(node: int) -> str:
            length = "" if self.lengths is None or node == n else f":{self.lengths[node]:.10g}"
            if node < n:
                return quoted(self.taxa[node]) + length
            inside = ",".join(written(child) for child in self.children[node - n])
            label = "" if node == n else f"{self.support[node - n]:.{digits}f}"
            return f"({inside}){label}{length}"

        return written(n) + ";"


def splits(trees: Trees) -> tuple[Words, Floats | None, Floats | None]:
    """The inner edges of each tree: splits uint64 `[T, n-3, words]`, their lengths `[T, n-3]`, the leaves' `[T, n]`."""
    table = trees.canonical().reshape(len(trees), -1, 2)
    lengths = np.empty((len(trees), 0, 2)) if trees.lengths is None else trees.canonical_lengths()
    found, inner, leaves = _splits(table, lengths)
    return (found, None, None) if trees.lengths is None else (found, inner, leaves)


def split_frequencies(trees: Trees, weights: ArrayLike | None = None) -> SplitTable:
    """The frequency of every split of a weighted sample."""
    w = _weights(trees, weights)
    found, inner, leaves = splits(trees)
    distinct, index = _distinct(found.reshape(-1, found.shape[2]))
    each = np.repeat(w, found.shape[1])
    frequency = _sums(index, each, len(distinct))
    order = np.argsort(-frequency, kind="stable")
    mean = None
    if inner is not None:
        total = _sums(index, each * inner.reshape(-1), len(distinct))
        mean = np.divide(total, frequency, out=np.zeros_like(total), where=frequency > 0)[order]
    leaf_lengths = None if leaves is None else w @ leaves
    return SplitTable(trees.taxa, distinct[order], np.minimum(frequency[order], 1), mean, leaf_lengths)


def topologies(trees: Trees, weights: ArrayLike | None = None) -> TopologyTable:
    """The distinct topologies of a weighted sample."""
    w = _weights(trees, weights)
    tables = trees.canonical()
    rows = np.ascontiguousarray(tables).view(np.dtype((np.void, tables.dtype.itemsize * tables.shape[1]))).reshape(-1)
    _, first, index = np.unique(rows, return_index=True, return_inverse=True)
    index = index.reshape(-1)
    probability = _sums(index, w, len(first))
    order = np.lexsort((first, -probability))
    place = np.empty_like(order)
    place[order] = np.arange(len(order))
    lengths = None
    if trees.lengths is not None:
        total = np.zeros((len(first), *trees.lengths.shape[1:]))
        np.add.at(total, index, trees.canonical_lengths() * w[:, None, None])
        lengths = total[order] / np.where(probability > 0, probability, 1)[order, None, None]
    distinct = from_canonical(trees.taxa, tables[first][order], lengths)
    return TopologyTable(distinct, probability[order], np.cumsum(probability[order]), place[index])


def robinson_foulds(trees: Trees, others: Trees | None = None) -> NDArray[np.int32]:
    """Robinson & Foulds (1981) distances, int32 `[T, T]` or `[T, U]`: the number of splits that only one tree has."""
    both = trees if others is None else concatenated([trees, others])
    found, _, _ = splits(both)
    _, index = _distinct(found.reshape(-1, found.shape[2]))
    numbers = np.sort(index.reshape(found.shape[:2]), axis=1)
    return _distances(numbers[: len(trees)], numbers if others is None else numbers[len(trees) :])


def consensus(trees: Trees, weights: ArrayLike | None = None, threshold: float = 0.5) -> Consensus:
    """The majority-rule consensus: all splits of a frequency above the threshold (Margush & McMorris 1981), with mean
    branch lengths. Raises ValueError for a threshold below 1/2, above which alone splits are sure to fit together.
    """
    if not 0.5 <= threshold <= 1:
        raise ValueError(f"threshold {threshold}: must be from 0.5 to 1")
    table = split_frequencies(trees, weights)
    kept = np.flatnonzero(table.frequencies > min(threshold, 1 - 1e-9))
    n = len(trees.taxa)
    sets = [frozenset(i for i in range(n) if _has(table.splits[k], i)) for k in kept]
    order = sorted(range(len(kept)), key=lambda i: -len(sets[i]))  # a set comes after every set that holds it
    children: list[list[int]] = [list(range(n))]
    owner: list[frozenset[int]] = [frozenset(range(n))]
    for i in order:
        inside = max(j for j, members in enumerate(owner) if members >= sets[i])
        taken = [node for node in children[inside] if (node in sets[i] if node < n else owner[node - n] <= sets[i])]
        children[inside] = [node for node in children[inside] if node not in set(taken)]
        children[inside].append(n + len(owner))
        owner.append(sets[i])
        children.append(taken)
    chosen = kept[order]
    lengths = None
    if table.lengths is not None and table.leaf_lengths is not None:
        lengths = np.concatenate([table.leaf_lengths, [0.0], table.lengths[chosen]])
    smallest = [min(members) for members in owner]
    ordered = tuple(tuple(sorted(nodes, key=lambda v: v if v < n else smallest[v - n])) for nodes in children)
    return Consensus(trees.taxa, ordered, np.concatenate([[1.0], table.frequencies[chosen]]), lengths)


@dataclass(frozen=True)
class Comparison:
    """How far two samples of trees are apart.

    split_deviation: average standard deviation of split frequencies, over splits with frequency 0.1 or more in either
    sample, each deviation of the two with n - 1 = 1 below the line, so |a - b| / sqrt 2, as MrBayes' `mcmc` and `sumt`
    compute it (src/mcmc.c, CalcPartFreqStats; splits of one taxon do not count). largest_deviation:
    the largest of them. topology_distance: total variation between the topologies' probabilities. split_correlation,
    topology_correlation: Pearson's, over all splits and topologies that either sample has; NaN where one does not vary.
    covered: the second sample's probability on topologies that the first has. splits: float64 `[S, 2]`, both
    frequencies of every split. topologies: `[K, 2]`.
    """

    split_deviation: float
    largest_deviation: float
    topology_distance: float
    split_correlation: float
    topology_correlation: float
    covered: float
    splits: Floats
    topologies: Floats


def compare(
    trees: Trees, others: Trees, weights: ArrayLike | None = None, other_weights: ArrayLike | None = None
) -> Comparison:
    """Compare a weighted sample with another over the same taxa."""
    w, v = _weights(trees, weights), _weights(others, other_weights)
    both = concatenated([Trees(trees.taxa, trees.merges), Trees(others.taxa, others.merges)])
    ours, theirs = np.concatenate([w, np.zeros_like(v)]), np.concatenate([np.zeros_like(w), v])
    found, _, _ = splits(both)
    distinct, index = _distinct(found.reshape(-1, found.shape[2]))
    pairs = np.stack(
        [_sums(index, np.repeat(share, found.shape[1]), len(distinct)) for share in (ours, theirs)], axis=1
    )
    table = topologies(both)
    tops = np.stack([_sums(table.index, share, len(table.trees)) for share in (ours, theirs)], axis=1)
    counted = pairs[(pairs >= SMALLEST_COMPARED - 1e-12).any(1)]
    deviation = np.abs(counted[:, 0] - counted[:, 1]) / np.sqrt(2)
    return Comparison(
        float(deviation.mean()) if len(deviation) else 0.0,
        float(deviation.max(initial=0.0)),
        float(np.abs(tops[:, 0] - tops[:, 1]).sum() / 2),
        _correlation(pairs),
        _correlation(tops),
        float(tops[tops[:, 0] > 0, 1].sum()),
        pairs,
        tops,
    )


def _correlation(pairs: Floats) -> float:
    if len(pairs) < 2 or (np.ptp(pairs, axis=0) == 0).any():
        return float("nan")
    return float(np.corrcoef(pairs[:, 0], pairs[:, 1])[0, 1])


def _weights(trees: Trees, weights: ArrayLike | None) -> Floats:
    w = np.ones(len(trees)) if weights is None else np.asarray(weights, dtype=np.float64)
    if w.shape != (len(trees),) or not np.isfinite(w).all() or w.min(initial=0) < 0 or w.sum() == 0:
        raise ValueError(f"weights: must be {len(trees)} finite numbers, none negative and not all 0")
    return np.asarray(w / w.sum(), dtype=np.float64)


def _sums(index: NDArray[np.int64], values: Floats, size: int) -> Floats:
    return np.bincount(index, values, size).astype(np.float64)


def _has(split: Words, leaf: int) -> bool:
    return bool(split[leaf // 64] >> np.uint64(leaf % 64) & np.uint64(1))


def _distinct(rows: Words) -> tuple[Words, NDArray[np.int64]]:
    """Distinct rows and which of them each row is."""
    if rows.shape[1] == 1:
        values, index = np.unique(rows[:, 0], return_inverse=True)
        return values[:, None], index.reshape(-1)
    order = np.lexsort(rows.T)
    new = np.concatenate([[True], (rows[order[1:]] != rows[order[:-1]]).any(1)]) if len(rows) else np.empty(0, bool)
    index = np.empty(len(rows), dtype=np.int64)
    index[order] = np.cumsum(new) - 1
    return rows[order[new]], index


@kept_njit()
def _splits(tables: Ints, lengths: Floats) -> tuple[Words, Floats, Floats]:  # pragma: no cover - compiled
    trees, joins, _ = tables.shape
    n = joins + 1
    words = (n + 63) // 64
    with_lengths = lengths.shape[1] > 0
    found = np.zeros((trees, max(n - 3, 0), words), dtype=np.uint64)
    inner = np.zeros((trees if with_lengths else 0, max(n - 3, 0)))
    leaves = np.zeros((trees if with_lengths else 0, n))
    sets = np.zeros((joins, words), dtype=np.uint64)
    order = np.empty(joins, dtype=np.int64)
    for t in range(trees):
        order[0] = 0
        filled = 1
        for i in range(joins):  # parents before children
            row = order[i]
            sets[row] = np.uint64(0)
            for side in range(2):
                child = tables[t, row, side]
                if child >= n:
                    order[filled] = child - n
                    filled += 1
        for i in range(joins - 1, -1, -1):
            row = order[i]
            for side in range(2):
                child = tables[t, row, side]
                if child < n:
                    sets[row, child // 64] |= np.uint64(1) << np.uint64(child % 64)
                else:
                    for word in range(words):
                        sets[row, word] |= sets[child - n, word]
        if with_lengths:
            leaves[t, 0] = lengths[t, 0, 0]
        k = 0
        for i in range(joins):
            row = order[i]
            for side in range(2):
                child = tables[t, row, side]
                if i == 0:
                    if child < n and child > 0 and with_lengths:
                        leaves[t, child] = lengths[t, 0, 0]
                    continue
                if child < n:
                    if with_lengths:
                        leaves[t, child] = lengths[t, row, side]
                else:
                    found[t, k] = sets[child - n]
                    if with_lengths:
                        inner[t, k] = lengths[t, row, side]
                    k += 1
    return found, inner, leaves


@kept_njit()
def _distances(left: NDArray[np.int64], right: NDArray[np.int64]) -> NDArray[np.int32]:  # pragma: no cover - compiled
    count = left.shape[1]
    found = np.empty((len(left), len(right)), dtype=np.int32)
    for t in range(len(left)):
        for u in range(len(right)):
            i, j, common = 0, 0, 0
            while i < count and j < count:
                a, b = left[t, i], right[u, j]
                common += a == b
                i += a <= b
                j += b <= a
            found[t, u] = 2 * (count - common)
    return found
