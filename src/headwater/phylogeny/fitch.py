"""The parsimony length of trees: Fitch's sets of states (Fitch 1971), one bit a site and state.

A node's set is kept as `planes` of bits, one a state (A, C, G, T and, where a gap is a state, the gap), each of `W`
words of 64 sites. Joining two nodes takes what both sets have where they share a state; elsewhere what either has, and
one change is counted.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from headwater.native import kept_njit
from headwater.phylogeny.words import WORDS, add_zeros, both, either, load, none, store, total, without


class Sites(NamedTuple):
    """Bits of the leaves' sets, and the changes that the sites left out cost on every tree.

    leaves: uint64 `[n, planes, W]`, `W` a multiple of eight; bits after the last site are 1 in every set.
    """

    leaves: NDArray[np.uint64]
    constant: int


def pack(
    masks: NDArray[np.uint8], weights: NDArray[np.float64], planes: int = 4, informative_only: bool = True
) -> Sites:
    """The bits of alignment patterns.

    masks: uint8 `[n, P]`, a set of states a cell: bits 1, 2, 4, 8 for A, C, G, T and, with five planes, 16 for a gap.
    weights: how many sites have each pattern, `[P]`, whole numbers. planes: 4, or 5 where a gap is a state.
    informative_only: leave out sites that cost the same on every tree; else only those that cost nothing on any. A site
    is left out where the fewest states that meet every leaf's set, less one (no tree costs less), are as many as the
    leaves that lack the commonest state (no tree costs more).
    """
    if planes not in (4, 5):
        raise ValueError(f"planes = {planes}: must be 4 (a gap is missing data) or 5 (a gap is a state)")
    if masks.ndim != 2 or masks.dtype != np.uint8 or weights.shape != masks.shape[1:]:
        raise ValueError(f"masks {masks.dtype} {masks.shape}, weights {weights.shape}: must be uint8 [n, P] and [P]")
    if masks.size and not 0 < int(masks.min()) <= int(masks.max()) < 1 << planes:
        raise ValueError(f"masks from {masks.min()} to {masks.max()}: must be from 1 to {(1 << planes) - 1}")
    counts = weights.astype(np.int64)
    if (counts != weights).any() or (counts < 0).any():
        raise ValueError("weights: must be whole numbers from 0 on, the sites that have a pattern")
    states = np.arange(planes)
    subsets = np.arange(1, 1 << planes)
    sizes = (subsets[:, None] >> states & 1).sum(1)
    meets = np.array([(masks & np.uint8(subset)).astype(bool).all(0) for subset in subsets])
    least = np.where(meets, sizes[:, None], planes).min(0) - 1
    most = len(masks) - (masks[:, :, None] >> states & 1).sum(0).max(1)
    kept = least < most if informative_only else most > 0
    sites = np.repeat(masks[:, kept], counts[kept], axis=1)
    width = max(1, -(-sites.shape[1] // (64 * WORDS))) * 64 * WORDS
    bits = np.ones((len(masks), planes, width), dtype=bool)
    bits[:, :, : sites.shape[1]] = sites[:, None] >> states.astype(np.uint8)[:, None] & 1
    leaves = np.packbits(bits, axis=-1, bitorder="little").view(np.uint64)
    return Sites(leaves, int((least * counts)[~kept].sum()))


def scores(leaves: NDArray[np.uint64], merges: NDArray[np.int32]) -> NDArray[np.int64]:
    """Changes of whole trees `[T, n-1, 2]` at the packed sites, int64 `[T]`: add the constant that `pack` gives."""
    return _scores(np.ascontiguousarray(leaves), np.ascontiguousarray(merges, dtype=np.int32))


def join(
    leaves: NDArray[np.uint64],
    tables: NDArray[np.uint64],
    left: NDArray[np.int32],
    right: NDArray[np.int32],
    step: int,
) -> NDArray[np.int32]:
    """Join nodes `left[t]` and `right[t]` of every trajectory into node n + step: the changes that it adds, int32
    `[T]`.

    tables: uint64 `[T, n-1, planes, W]`, contiguous; row `step` is written, the rows of `left` and `right` are read.
    """
    left, right = np.ascontiguousarray(left, dtype=np.int32), np.ascontiguousarray(right, dtype=np.int32)
    return _join(leaves, tables, left, right, step)


def pair_costs(
    leaves: NDArray[np.uint64],
    tables: NDArray[np.uint64],
    node: NDArray[np.int32],
    others: NDArray[np.int32],
    out_changes: NDArray[np.int32],
    out_comparable: NDArray[np.int32],
) -> None:
    """What joining `node[t]` with each of `others[t]` would add, without joining them.

    others: int32 `[T, K]`. out_changes: int32 `[T, K]`, sites at which the two share no state. out_comparable: int32
    `[T, K]`, sites at which neither may be any of A, C, G, T, as a missing cell may.
    """
    node, others = np.ascontiguousarray(node, dtype=np.int32), np.ascontiguousarray(others, dtype=np.int32)
    _pair_costs(leaves, tables, node, others, out_changes, out_comparable)


def reference_scores(
    masks: NDArray[np.uint8], weights: NDArray[np.float64], merges: NDArray[np.int32]
) -> NDArray[np.int64]:
    """`scores` and the constant, a pattern at a time: masks uint8 `[n, P]`."""
    result = np.zeros(len(merges), dtype=np.int64)
    for t, tree in enumerate(merges):
        sets = list(masks)
        for left, right in tree:
            shared = sets[left] & sets[right]
            sets.append(np.where(shared, shared, sets[left] | sets[right]))
            result[t] += int(weights[shared == 0].sum())
    return result


@kept_njit()
def _scores(leaves, merges):  # type: ignore[no-untyped-def]
    n, planes, words = leaves.shape
    size = planes * words
    nodes = np.empty((2 * n - 1) * size, dtype=np.uint64)
    nodes[: n * size] = leaves.reshape(-1)
    changes = np.empty(len(merges), dtype=np.int64)
    for t in range(len(merges)):
        count = 0
        for k in range(n - 1):
            count += merge(nodes, merges[t, k, 0] * size, nodes, merges[t, k, 1] * size, nodes, (n + k) * size,
                            planes, words)  # fmt: skip
        changes[t] = count
    return changes


@kept_njit()
def _join(leaves, tables, left, right, step):  # type: ignore[no-untyped-def]
    n, planes, words = leaves.shape
    size = planes * words
    tips = leaves.reshape(-1)
    changes = np.empty(len(tables), dtype=np.int32)
    for t in range(len(tables)):
        nodes = tables[t].reshape(-1)
        x, i = (tips, left[t]) if left[t] < n else (nodes, left[t] - n)
        y, j = (tips, right[t]) if right[t] < n else (nodes, right[t] - n)
        changes[t] = merge(x, i * size, y, j * size, nodes, step * size, planes, words)
    return changes


@kept_njit()
def _pair_costs(leaves, tables, node, others, out_changes, out_comparable):  # type: ignore[no-untyped-def]
    n, planes, words = leaves.shape
    size = planes * words
    tips = leaves.reshape(-1)
    for t in range(len(tables)):
        nodes = tables[t].reshape(-1)
        x, i = (tips, node[t]) if node[t] < n else (nodes, node[t] - n)
        for k in range(others.shape[1]):
            other = others[t, k]
            y, j = (tips, other) if other < n else (nodes, other - n)
            changes, comparable = compare(x, i * size, y, j * size, planes, words)
            out_changes[t, k] = changes
            out_comparable[t, k] = comparable


@kept_njit()
def merge(x, i, y, j, out, o, planes, words):  # type: ignore[no-untyped-def]
    """Write the joined set of two nodes, and count the sites where they share no state."""
    count = none()
    for w in range(0, words, WORDS):
        a0, b0 = load(x, i + w), load(y, j + w)
        a1, b1 = load(x, i + words + w), load(y, j + words + w)
        a2, b2 = load(x, i + 2 * words + w), load(y, j + 2 * words + w)
        a3, b3 = load(x, i + 3 * words + w), load(y, j + 3 * words + w)
        shared = either(either(both(a0, b0), both(a1, b1)), either(both(a2, b2), both(a3, b3)))
        if planes == 5:
            a4, b4 = load(x, i + 4 * words + w), load(y, j + 4 * words + w)
            shared = either(shared, both(a4, b4))
            store(out, o + 4 * words + w, either(both(a4, b4), without(either(a4, b4), shared)))
        store(out, o + w, either(both(a0, b0), without(either(a0, b0), shared)))
        store(out, o + words + w, either(both(a1, b1), without(either(a1, b1), shared)))
        store(out, o + 2 * words + w, either(both(a2, b2), without(either(a2, b2), shared)))
        store(out, o + 3 * words + w, either(both(a3, b3), without(either(a3, b3), shared)))
        count = add_zeros(count, shared)
    return total(count)


@kept_njit()
def compare(x, i, y, j, planes, words):  # type: ignore[no-untyped-def]
    """Sites where two nodes share no state, and where neither has all of the first four."""
    changes, comparable = none(), none()
    for w in range(0, words, WORDS):
        a0, b0 = load(x, i + w), load(y, j + w)
        a1, b1 = load(x, i + words + w), load(y, j + words + w)
        a2, b2 = load(x, i + 2 * words + w), load(y, j + 2 * words + w)
        a3, b3 = load(x, i + 3 * words + w), load(y, j + 3 * words + w)
        shared = either(either(both(a0, b0), both(a1, b1)), either(both(a2, b2), both(a3, b3)))
        if planes == 5:
            shared = either(shared, both(load(x, i + 4 * words + w), load(y, j + 4 * words + w)))
        changes = add_zeros(changes, shared)
        full = either(both(both(a0, a1), both(a2, a3)), both(both(b0, b1), both(b2, b3)))
        comparable = add_zeros(comparable, full)
    return total(changes), total(comparable)
