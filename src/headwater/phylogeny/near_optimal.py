"""All trees of few changes: a search through the trees that one pruning and regrafting leads to, as far as they are
nearly as short as the shortest.

A tree of n leaves has 2 (n - 3) (2n - 7) such neighbours (Allen & Steel 2001). None of them is scored as a whole: where
a pruned subtree goes into an edge, it costs the sites at which its Fitch set shares no state with the set of a node set
into that edge (Gladstein 1997).
"""

from __future__ import annotations

from collections import deque
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from headwater.native import kept_njit
from headwater.phylogeny.fitch import compare, merge, scores
from headwater.phylogeny.walks import rooted_table, walks_to

_BEYOND = (0, 2, 4, 8)  # DS2's trees within 4 changes of the best hang together through trees 8 changes further off


@dataclass(frozen=True)
class NearOptimal:
    """tables: int32 `[K, 2 (n-1)]`, distinct trees, shortest first. changes: int64 `[K]`, without the constant of the
    sites. beyond: these are all trees that are reached through trees of so many changes more than asked for; -1 where
    the search ended before it had looked at all neighbours even of these.
    """

    tables: Tensor
    changes: Tensor
    beyond: int


def near_optimal(leaves: NDArray[np.uint64], starts: Tensor, more: int, most: int) -> NearOptimal:
    """Trees within `more` changes of the shortest that prunings and regraftings lead to from `starts` `[T, 2 (n-1)]`,
    on ways through trees that have up to 0, 2, 4, at last 8 changes more than that, as far as they can be searched.

    leaves: `fitch.Sites.leaves`. most: a search ends once it has met so many trees.
    """
    reached = -1
    for beyond in _BEYOND:
        found = _search(leaves, starts, more, most, beyond)
        starts = found.tables
        if found.beyond < 0:
            return found if reached < 0 else _search(leaves, starts, more, most, reached)
        reached = beyond
    return found


def _search(leaves: NDArray[np.uint64], starts: Tensor, more: int, most: int, beyond: int) -> NearOptimal:
    merges, _ = walks_to(starts, None, torch.zeros(len(starts), starts.shape[1] // 2, dtype=torch.float64))
    lengths = scores(leaves, merges.numpy())
    shortest = int(lengths.min())
    found: dict[bytes, int] = {}
    waiting: deque[bytes] = deque()

    def meet(tables: NDArray[np.int32], changes: NDArray[np.int64]) -> None:
        for table, length in zip(tables, changes.tolist(), strict=True):
            key = table.tobytes()
            if key not in found:
                found[key] = length
                # a shorter tree at once: what is near it, not what is near where the search began, is asked for
                (waiting.appendleft if length < shortest else waiting.append)(key)

    meet(starts.int().numpy(), lengths)
    while waiting and len(found) < most:
        key = waiting.popleft()
        length = found[key]
        shortest = min(shortest, length)
        if length <= shortest + more + beyond:
            meet(*neighbours(leaves, np.frombuffer(key, np.int32), shortest + more + beyond - length))
    kept = sorted((length, key) for key, length in found.items() if length <= shortest + more)
    tables = np.frombuffer(b"".join(key for _, key in kept), np.int32).reshape(len(kept), -1)
    changes = torch.tensor([length for length, _ in kept])
    return NearOptimal(torch.tensor(tables), changes, -1 if waiting else beyond)


def neighbours(
    leaves: NDArray[np.uint64], table: NDArray[np.int32], more: int
) -> tuple[NDArray[np.int32], NDArray[np.int64]]:
    """The trees that one pruning and regrafting makes of a tree `[2 (n-1)]` and that have at most `more` changes more
    than it, distinct, without itself: int32 `[K, 2 (n-1)]`; and their changes, int64 `[K]`.

    leaves: `fitch.Sites.leaves`; the changes are without the constant.
    """
    merges, _ = walks_to(torch.tensor(table)[None], None, torch.zeros(1, len(table) // 2, dtype=torch.float64))
    n = len(leaves)
    tables, added = np.empty((2 * (2 * n - 3) ** 2, len(table)), np.int32), np.empty(2 * (2 * n - 3) ** 2, np.int64)
    count = _neighbours(leaves, np.array(table), more, tables, added)
    rows, first = np.unique(tables[:count], axis=0, return_index=True)
    return rows, scores(leaves, merges.numpy())[0] + added[first]


@kept_njit()
def _neighbours(leaves, table, more, tables, added):  # type: ignore[no-untyped-def]
    n, planes, words = leaves.shape
    size = planes * words
    beside = np.full((2 * n - 1, 3), -1, np.int32)
    filled = np.zeros(2 * n - 1, np.int32)
    for b in range(1, n):
        for side in range(2):
            child = table[2 * (b - 1) + side]
            node = n - 1 + b if b > 1 else 0
            if child != 0:
                beside[node, filled[node]], beside[child, filled[child]] = child, node
                filled[node] += 1
                filled[child] += 1
    # Sets of the subtree that each edge leads to: of node, away from its neighbour k, in row 3 node + k.
    away = np.empty((3 * (2 * n - 1)) * size, np.uint64)
    known = np.zeros((2 * n - 1, 3), np.bool_)
    stack, turns = np.empty((4 * n, 2), np.int32), 0
    for leaf in range(n):
        away[3 * leaf * size : (3 * leaf + 1) * size] = leaves[leaf].reshape(-1)
        known[leaf, 0] = True
    for node in range(n + 1, 2 * n - 1):
        for k in range(3):
            stack[0, 0], stack[0, 1], turns = node, k, 1
            while turns:
                v, at = stack[turns - 1]
                if known[v, at]:
                    turns -= 1
                    continue
                left, right = beside[v, (at + 1) % 3], beside[v, (at + 2) % 3]
                i, j = _place(beside, left, v), _place(beside, right, v)
                if known[left, i] and known[right, j]:
                    merge(away, (3 * left + i) * size, away, (3 * right + j) * size, away, (3 * v + at) * size,
                          planes, words)  # fmt: skip
                    known[v, at] = True
                    continue
                for child, place in ((left, i), (right, j)):
                    if not known[child, place]:
                        stack[turns, 0], stack[turns, 1] = child, place
                        turns += 1
    # Prune each subtree v from its joint u, whose other neighbours a and b are joined; graft it into every other edge.
    above, middle = np.empty((2 * n - 1) * size, np.uint64), np.empty(size, np.uint64)
    order, parent = np.empty(2 * n, np.int32), np.empty(2 * n - 1, np.int32)
    count = 0
    for u in range(n + 1, 2 * n - 1):
        for k in range(3):
            v, a, b = beside[u, k], beside[u, (k + 1) % 3], beside[u, (k + 2) % 3]
            pruned = (3 * v + _place(beside, v, u)) * size
            at_a, at_b = (3 * a + _place(beside, a, u)) * size, (3 * b + _place(beside, b, u)) * size
            merge(away, at_a, away, at_b, middle, 0, planes, words)
            saved, _ = compare(away, pruned, middle, 0, planes, words)
            # what is above a node is what the rest of the tree without v shows at the edge over it
            above[a * size : (a + 1) * size], above[b * size : (b + 1) * size] = (
                away[at_b : at_b + size], away[at_a : at_a + size],
            )  # fmt: skip
            order[0], order[1], parent[a], parent[b] = a, b, u, u
            waiting, at = 2, 0
            while at < waiting:
                x = order[at]
                at += 1
                if x < n:
                    continue
                for j in range(3):
                    child = beside[x, j]
                    if child == parent[x]:
                        continue
                    other = beside[x, 0] + beside[x, 1] + beside[x, 2] - child - parent[x]
                    parent[child] = x
                    order[waiting] = child
                    waiting += 1
                    merge(above, x * size, away, (3 * other + _place(beside, other, x)) * size,
                          above, child * size, planes, words)  # fmt: skip
                    merge(above, child * size, away, (3 * child + _place(beside, child, x)) * size, middle, 0,
                          planes, words)  # fmt: skip
                    cost, _ = compare(away, pruned, middle, 0, planes, words)
                    if cost - saved <= more:
                        _write(beside, n, u, v, a, b, x, child, tables[count])
                        added[count] = cost - saved
                        count += 1
    return count


@kept_njit()
def _place(beside, node, neighbour):  # type: ignore[no-untyped-def]
    """Which neighbour of `node` this is."""
    if beside[node, 0] == neighbour:
        return 0
    return 1 if beside[node, 1] == neighbour else 2


@kept_njit()
def _write(beside, n, u, v, a, b, x, y, table):  # type: ignore[no-untyped-def]
    """The table of the tree in which u, with v, has gone from between a and b to between x and y."""
    after = beside.copy()
    after[a, _place(beside, a, u)], after[b, _place(beside, b, u)] = b, a
    after[x, _place(after, x, y)], after[y, _place(after, y, x)] = u, u
    after[u, 0], after[u, 1], after[u, 2] = v, x, y
    first, second, length = np.empty(n - 1, np.int32), np.empty(n - 1, np.int32), np.zeros(2 * n - 1)
    order, parent = np.empty(2 * n, np.int32), np.empty(2 * n - 1, np.int32)
    order[0], parent[after[0, 0]] = after[0, 0], 0
    waiting, at = 1, 0
    while at < waiting:
        node = order[at]
        at += 1
        if node < n:
            continue
        place = _place(after, node, parent[node])
        first[node - n], second[node - n] = after[node, (place + 1) % 3], after[node, (place + 2) % 3]
        for child in (first[node - n], second[node - n]):
            parent[child] = node
            order[waiting] = child
            waiting += 1
    rooted_table(first, second, length, n, 0, after[0, 0], table, np.zeros(2 * n - 1))
