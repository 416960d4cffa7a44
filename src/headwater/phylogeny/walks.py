"""Forests and trees as arrays, and the walks between them, natively.

A trajectory of PhyloGFN (Zhou et al. 2024, arXiv 2310.08774) starts with the n leaves 0 .. n-1 and merges two trees at
each of its n - 1 steps; merge k makes node n + k. `merges` `[T, n-1, 2]` holds the nodes merged, the one with the
smaller leaf first. The last merge joins two trees by one edge, so what it makes is an unrooted tree.

A *table* `[T, 2 (n-1)]` is the same forest with no trace of the order in which it was made. An internal node is named
by b, the smallest leaf of the one of its children whose smallest leaf is larger: b in 1 .. n-1, no two alike. Columns
2 (b-1) and 2 (b-1) + 1 hold its children, the one with the smaller leaf first: leaves as they are, the internal node of
b as n - 1 + b; -1 where no merge has made such a node. A finished tree is held as rooted at leaf 0. Equal tables, equal
forests.
"""

from __future__ import annotations

from typing import TypeVar

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from headwater.native import kept_njit

Lengths = TypeVar("Lengths", NDArray[np.float32], NDArray[np.float64])


def tables_of(merges: Tensor, lengths: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """The tables of finished trees, int32 `[T, 2 (n-1)]`, and the length of the edge above each of their nodes, float32
    `[T, 2n-1]`; that of leaf 0 is the edge between it and the rest, which counts once: the node beside it has 0.

    merges: int32 `[T, n-1, 2]`. lengths: float32 `[T, n-1, 2]` above the children of each merge, of the last one in
    column 0 only; None for none, which gives zeros.
    """
    if lengths is None:
        lengths = torch.zeros(merges.shape)
    tables, above = canonical_tables(merges.numpy(), lengths.float().numpy())
    return torch.from_numpy(tables), torch.from_numpy(above)


def canonical_tables(merges: NDArray[np.int32], lengths: Lengths) -> tuple[NDArray[np.int32], Lengths]:
    """The same of arrays, with lengths of any precision."""
    count, n = len(merges), merges.shape[1] + 1
    tables, above = np.empty((count, 2 * (n - 1)), np.int32), np.zeros((count, 2 * n - 1), lengths.dtype)
    _tables_of(np.ascontiguousarray(merges, np.int32), np.ascontiguousarray(lengths), tables, above)
    return tables, above


def walks_to(tables: Tensor, above: Tensor | None, uniform: Tensor) -> tuple[Tensor, Tensor]:
    """Trajectories that end in given trees, as `tables_of` gives them: merges int32 and lengths float32, `[T, n-1, 2]`.

    uniform: float64 `[T, n-1]` in [0, 1), which decides in turn where the root stands (one of 2n - 3 edges) and which
    of the trees that are no leaf is taken apart next: the uniform backward policy.
    """
    count, n = len(tables), tables.shape[1] // 2 + 1
    if above is None:
        above = torch.zeros(count, 2 * n - 1)
    merges, lengths = np.empty((count, n - 1, 2), np.int32), np.zeros((count, n - 1, 2), np.float32)
    _walks_to(tables.int().contiguous().numpy(), above.float().contiguous().numpy(), uniform.numpy(), merges, lengths)
    return torch.from_numpy(merges), torch.from_numpy(lengths)


def forests_on_the_way(merges: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Of each of the n - 1 forests that a trajectory leaves: its trees, by smallest leaf; which two are merged; how
    many of the next forest's trees are no leaf.

    merges: `[T, n-1, 2]`. Returns roots int64 `[n-1, T, n]`, of which forest t uses the first n - t columns; places
    int64 `[T, n-1, 2]`, the columns merged; internal int64 `[T, n-1]`.
    """
    count, n = len(merges), merges.shape[1] + 1
    roots, places = np.zeros((n - 1, count, n), np.int64), np.empty((count, n - 1, 2), np.int64)
    internal = np.empty((count, n - 1), np.int64)
    _forests_on_the_way(merges.int().contiguous().numpy(), roots, places, internal)
    return torch.from_numpy(roots), torch.from_numpy(places), torch.from_numpy(internal)


def merges_of(tables: Tensor, made: int) -> tuple[Tensor, Tensor, Tensor]:
    """Unfinished forests of `made` merges each, made in one of the orders that could: merges int32 `[N, made, 2]`;
    their trees int64 `[N, n - made]` by smallest leaf; these smallest leaves, int64 `[N, n - made]`.
    """
    count, n = len(tables), tables.shape[1] // 2 + 1
    merges, roots = np.empty((count, made, 2), np.int32), np.empty((count, n - made), np.int64)
    smallest = np.empty((count, n - made), np.int64)
    _merges_of(tables.int().contiguous().numpy(), merges, roots, smallest)
    return torch.from_numpy(merges), torch.from_numpy(roots), torch.from_numpy(smallest)


@kept_njit()
def _children(beside, parent, smallest):  # type: ignore[no-untyped-def]
    """A node's neighbours but its parent, the one with the smaller leaf first."""
    low, high = -1, -1
    for k in range(3):
        if beside[k] != parent:
            low, high = beside[k], low
    return (low, high) if smallest[low] < smallest[high] else (high, low)


@kept_njit()
def rooted_table(first, second, length, n, root_a, root_b, table, above):  # type: ignore[no-untyped-def]
    """Write the table of an unrooted tree, given rooted.

    first, second: children of each internal node by number (node v has row v - n); length: above each node. The root's
    children are root_a and root_b, joined by one edge of length[root_a] + length[root_b].
    """
    # Neighbours in the unrooted tree: leaves have one, other nodes three.
    beside = np.full((2 * n - 1, 3), -1, np.int32)
    span = np.zeros((2 * n - 1, 3))
    filled = np.zeros(2 * n - 1, np.int32)
    stack = np.empty(2 * n, np.int32)
    stack[0], stack[1] = root_a, root_b
    height = 2
    beside[root_a, 0], beside[root_b, 0] = root_b, root_a
    span[root_a, 0] = span[root_b, 0] = length[root_a] + length[root_b]
    filled[root_a] = filled[root_b] = 1
    while height:
        height -= 1
        node = stack[height]
        if node < n:
            continue
        for side in range(2):
            child = first[node - n] if side == 0 else second[node - n]
            beside[node, filled[node]], span[node, filled[node]] = child, length[child]
            beside[child, 0], span[child, 0] = node, length[child]
            filled[node] += 1
            filled[child] = 1
            stack[height] = child
            height += 1
    # Walk away from leaf 0; in reverse order children come before parents.
    order, parent = np.empty(2 * n - 2, np.int32), np.full(2 * n - 1, -1, np.int32)
    edge = np.zeros(2 * n - 1)
    start = beside[0, 0]
    order[0], parent[start], count = start, 0, 1
    edge[0] = span[0, 0]
    at = 0
    while at < count:
        node = order[at]
        at += 1
        for k in range(filled[node]):
            other = beside[node, k]
            if other != parent[node]:
                parent[other], edge[other] = node, span[node, k]
                order[count] = other
                count += 1
    smallest, name = np.empty(2 * n - 1, np.int32), np.empty(2 * n - 1, np.int32)
    above[:] = 0.0
    above[0] = edge[0]
    for i in range(count - 1, -1, -1):
        node = order[i]
        if node < n:
            smallest[node] = name[node] = node
        else:
            low, high = _children(beside[node], parent[node], smallest)
            b = smallest[high]
            smallest[node], name[node] = smallest[low], n - 1 + b
            table[2 * (b - 1)], table[2 * (b - 1) + 1] = name[low], name[high]
        if node != start:
            above[name[node]] = edge[node]
    table[0], table[1] = 0, name[start]


@kept_njit()
def _tables_of(merges, lengths, tables, above):  # type: ignore[no-untyped-def]
    n = merges.shape[1] + 1
    length = np.zeros(2 * n - 1)
    for i in range(merges.shape[0]):
        for k in range(n - 1):
            length[merges[i, k, 0]], length[merges[i, k, 1]] = lengths[i, k, 0], lengths[i, k, 1]
        a, b = merges[i, n - 2, 0], merges[i, n - 2, 1]
        rooted_table(merges[i, :, 0], merges[i, :, 1], length, n, a, b, tables[i], above[i])


@kept_njit()
def _walks_to(tables, above, uniform, merges, lengths):  # type: ignore[no-untyped-def]
    n = tables.shape[1] // 2 + 1
    first, second = np.empty(n - 1, np.int32), np.empty(n - 1, np.int32)
    beside, span = np.empty((2 * n - 1, 3), np.int32), np.zeros((2 * n - 1, 3))
    filled = np.empty(2 * n - 1, np.int32)
    edges, spans = np.empty((2 * n - 3, 2), np.int32), np.empty(2 * n - 3)
    parent, order = np.empty(2 * n - 1, np.int32), np.empty(2 * n - 1, np.int32)
    smallest, made, length = np.empty(2 * n - 1, np.int32), np.empty(2 * n - 1, np.int32), np.zeros(2 * n - 1)
    open_trees = np.empty(n, np.int32)
    for i in range(tables.shape[0]):
        # The unrooted tree: the root of the table, node n, is no node of it.
        filled[:] = 0
        count = 0
        for b in range(1, n):
            node = n - 1 + b
            for side in range(2):
                child = tables[i, 2 * (b - 1) + side]
                if b == 1:
                    continue
                edges[count, 0], edges[count, 1], spans[count] = node, child, above[i, child]
                count += 1
        edges[count, 0], edges[count, 1], spans[count] = 0, tables[i, 1], above[i, 0]
        count += 1
        for e in range(count):
            for side in range(2):
                node, other = edges[e, side], edges[e, 1 - side]
                beside[node, filled[node]], span[node, filled[node]] = other, spans[e]
                filled[node] += 1
        cut = min(int(uniform[i, 0] * count), count - 1)
        a, b = edges[cut, 0], edges[cut, 1]
        # Root it there: parents before children, then smallest leaves from the leaves up.
        parent[a], parent[b] = b, a
        order[0], order[1] = a, b
        filled_order = 2
        at = 0
        while at < filled_order:
            node = order[at]
            at += 1
            for k in range(filled[node]):
                other = beside[node, k]
                if other != parent[node]:
                    parent[other], length[other] = node, span[node, k]
                    order[filled_order] = other
                    filled_order += 1
        for k in range(filled_order - 1, -1, -1):
            node = order[k]
            if node < n:
                smallest[node] = node
                continue
            low, high = _children(beside[node], parent[node], smallest)
            first[node - n], second[node - n], smallest[node] = low, high, smallest[low]
        if smallest[a] > smallest[b]:
            a, b = b, a
        # Take trees apart, last merge first; a node is numbered by the merge that makes it.
        for leaf in range(n):
            made[leaf] = leaf
        merges[i, n - 2, 0], merges[i, n - 2, 1] = a, b
        lengths[i, n - 2, 0], lengths[i, n - 2, 1] = spans[cut], 0.0
        size = 0
        for node in (a, b):
            if node >= n:
                open_trees[size] = node
                size += 1
        for k in range(n - 3, -1, -1):
            chosen = min(int(uniform[i, n - 2 - k] * size), size - 1)
            node = open_trees[chosen]
            size -= 1
            open_trees[chosen] = open_trees[size]
            made[node] = n + k
            low, high = first[node - n], second[node - n]
            merges[i, k, 0], merges[i, k, 1] = low, high
            lengths[i, k, 0], lengths[i, k, 1] = length[low], length[high]
            for child in (low, high):
                if child >= n:
                    open_trees[size] = child
                    size += 1
        for k in range(n - 1):
            for side in range(2):
                merges[i, k, side] = made[merges[i, k, side]]


@kept_njit()
def _forests_on_the_way(merges, roots, places, internal):  # type: ignore[no-untyped-def]
    n = merges.shape[1] + 1
    current = np.empty(n, np.int64)
    for i in range(merges.shape[0]):
        for leaf in range(n):
            current[leaf] = leaf
        grown = 0
        for k in range(n - 1):
            size = n - k
            first, second = -1, -1
            for place in range(size):
                roots[k, i, place] = current[place]
                if current[place] == merges[i, k, 0]:
                    first = place
                elif current[place] == merges[i, k, 1]:
                    second = place
            places[i, k, 0], places[i, k, 1] = first, second
            grown += 1 - (current[first] >= n) - (current[second] >= n)
            internal[i, k] = grown
            current[first] = n + k
            for place in range(second, size - 1):
                current[place] = current[place + 1]


@kept_njit()
def _merges_of(tables, merges, roots, smallest):  # type: ignore[no-untyped-def]
    n = tables.shape[1] // 2 + 1
    waiting, number, low = np.empty(n, np.int64), np.empty(2 * n - 1, np.int64), np.empty(2 * n - 1, np.int64)
    is_root = np.empty(2 * n - 1, np.bool_)
    for i in range(tables.shape[0]):
        for node in range(2 * n - 1):
            number[node], low[node], is_root[node] = (node, node, True) if node < n else (-1, -1, False)
        made = 0
        while made < merges.shape[1]:  # each round makes the nodes whose children are there
            for b in range(1, n):
                a, c, node = tables[i, 2 * (b - 1)], tables[i, 2 * (b - 1) + 1], n - 1 + b
                if a >= 0 and number[node] < 0 and number[a] >= 0 and number[c] >= 0:
                    merges[i, made, 0], merges[i, made, 1] = number[a], number[c]
                    number[node], low[node] = n + made, low[a]
                    is_root[node], is_root[a], is_root[c] = True, False, False
                    made += 1
        # by smallest leaf
        for node in range(2 * n - 1):
            if is_root[node]:
                waiting[low[node]] = number[node]
        place = 0
        for leaf in range(n):
            held = False
            for node in range(2 * n - 1):
                held = held or (is_root[node] and low[node] == leaf)
            if held:
                roots[i, place], smallest[i, place] = waiting[leaf], leaf
                place += 1
