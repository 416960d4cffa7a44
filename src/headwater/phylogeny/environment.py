"""Forests of rooted trees that merge into one unrooted tree: the discrete space of PhyloGFN (Zhou et al. 2024,
arXiv 2310.08774), whose finished objects are all (2n - 5)!! unrooted topologies.

A state is a table of `walks.py`. A step merges two of its trees; undoing one takes a tree that is no leaf apart, or, of
a finished tree, cuts one of its 2n - 3 edges. Here every state can be asked for on its own, which exact distributions
need; `TreePolicy` draws whole trajectories without it.
"""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from headwater.environments.base import Environment, Objects, Tokens
from headwater.native import kept_njit
from headwater.phylogeny.walks import rooted_table


class Forests(Environment):
    """Forests over n leaves, n at least 3.

    Forward action of leaves a < b, numbered row by row in the upper triangle of an n x n matrix: merge the trees whose
    smallest leaves they are. Backward action b - 1, b in 1 .. n-1: take the tree of internal node b apart. Backward
    action n - 1 + v: cut the edge above node v of a finished tree. Objects are tables, int32 `[T, 2 (n-1)]`.
    """

    def __init__(self, n: int) -> None:
        if n < 3:
            raise ValueError(f"n = {n}: a tree needs at least three leaves")
        self.n = n
        self.n_actions = n * (n - 1) // 2 + 1
        self.n_backward_actions = (n - 1) + (2 * n - 1)
        self.width = 2 * (n - 1)
        self.max_steps = n
        self.feature_type = Tokens(self.width, 2 * n)

    def initial(self, count: int) -> Tensor:
        return torch.full((count, self.width), -1, dtype=torch.int32)

    def features(self, states: Tensor) -> Tensor:
        return states + 1

    def forward_mask(self, states: Tensor) -> Tensor:
        mask = np.zeros((len(states), self.n_actions), np.bool_)
        _forward_mask(_rows(states), self.n, mask)
        return torch.from_numpy(mask).to(states.device)

    def backward_mask(self, states: Tensor) -> Tensor:
        mask = np.zeros((len(states), self.n_backward_actions), np.bool_)
        _backward_mask(_rows(states), self.n, mask)
        return torch.from_numpy(mask).to(states.device)

    def step(self, states: Tensor, actions: Tensor) -> Tensor:
        after = np.empty((len(states), self.width), np.int32)
        _step(_rows(states), actions.cpu().numpy(), self.n, after)
        return torch.from_numpy(after).to(states.device)

    def backward_step(self, states: Tensor, backward_actions: Tensor) -> Tensor:
        return self._undone(states, backward_actions)[0]

    def forward_action(self, states: Tensor, backward_actions: Tensor) -> Tensor:
        return self._undone(states, backward_actions)[1]

    def backward_action(self, states: Tensor, actions: Tensor) -> Tensor:
        found = np.empty(len(states), np.int64)
        _backward_action(_rows(states), actions.cpu().numpy(), self.n, found)
        return torch.from_numpy(found).to(states.device)

    def objects(self, states: Tensor) -> Objects:
        return states

    def states(self, objects: Objects) -> Tensor:
        rows = torch.as_tensor(objects).to(torch.int32)
        if rows.ndim != 2 or rows.shape[1] != self.width:
            raise ValueError(f"trees over {self.n} leaves have shape [T, {self.width}], not {tuple(rows.shape)}")
        bad = _first_bad(_rows(rows), self.n)
        if bad >= 0:
            raise ValueError(f"object {bad}, {rows[bad].tolist()}, is no tree over {self.n} leaves")
        return rows

    def _undone(self, states: Tensor, backward_actions: Tensor) -> tuple[Tensor, Tensor]:
        before, actions = np.empty((len(states), self.width), np.int32), np.empty(len(states), np.int64)
        _backward_step(_rows(states), backward_actions.cpu().numpy(), self.n, before, actions)
        return torch.from_numpy(before).to(states.device), torch.from_numpy(actions).to(states.device)


def _rows(states: Tensor) -> np.ndarray:
    return states.to("cpu", torch.int32).contiguous().numpy()


@kept_njit()
def _pair(a, b, n):  # type: ignore[no-untyped-def]
    return a * (2 * n - a - 1) // 2 + b - a - 1


@kept_njit()
def _trees(row, n, root):  # type: ignore[no-untyped-def]
    """The tree whose smallest leaf is a, by its node, into root[a]; -1 where a is no tree's smallest. How many."""
    below = np.zeros(2 * n - 1, np.bool_)
    count = n
    for column in range(row.size):
        if row[column] >= 0:
            below[row[column]] = True
    for leaf in range(n):
        root[leaf] = -1
    for node in range(2 * n - 1):
        if below[node] or (node >= n and row[2 * (node - n)] < 0):
            continue
        low = node
        while low >= n:
            low = row[2 * (low - n)]
        root[low] = node
    for b in range(1, n):
        count -= row[2 * (b - 1)] >= 0
    return count


@kept_njit()
def _forward_mask(rows, n, mask):  # type: ignore[no-untyped-def]
    root = np.empty(n, np.int64)
    for i in range(rows.shape[0]):
        if _trees(rows[i], n, root) == 1:
            mask[i, mask.shape[1] - 1] = True
            continue
        for a in range(n):
            for b in range(a + 1, n):
                mask[i, _pair(a, b, n)] = root[a] >= 0 and root[b] >= 0


@kept_njit()
def _backward_mask(rows, n, mask):  # type: ignore[no-untyped-def]
    root = np.empty(n, np.int64)
    for i in range(rows.shape[0]):
        if _trees(rows[i], n, root) == 1:
            for node in range(2 * n - 1):
                # the root is no node of the unrooted tree, and its two edges are one: that above leaf 0
                mask[i, n - 1 + node] = node != n and node != rows[i, 1]
            continue
        for a in range(n):
            if root[a] >= n:
                mask[i, root[a] - n] = True


@kept_njit()
def _finish(row, n, a, b, out):  # type: ignore[no-untyped-def]
    """Join the two trees of nodes a and b, all that there are, by an edge."""
    first, second = np.empty(n - 1, np.int32), np.empty(n - 1, np.int32)
    for k in range(n - 1):
        first[k], second[k] = row[2 * k], row[2 * k + 1]
    rooted_table(first, second, np.zeros(2 * n - 1), n, a, b, out, np.zeros(2 * n - 1))


@kept_njit()
def _step(rows, actions, n, out):  # type: ignore[no-untyped-def]
    root = np.empty(n, np.int64)
    for i in range(rows.shape[0]):
        a, rest = 0, actions[i]
        while rest >= n - 1 - a:
            rest -= n - 1 - a
            a += 1
        b = a + 1 + rest
        count = _trees(rows[i], n, root)
        out[i] = rows[i]
        if count == 2:
            _finish(rows[i], n, root[a], root[b], out[i])
        else:
            out[i, 2 * (b - 1)], out[i, 2 * (b - 1) + 1] = root[a], root[b]


@kept_njit()
def _smallest(row, node, n):  # type: ignore[no-untyped-def]
    while node >= n:
        node = row[2 * (node - n)]
    return node


@kept_njit()
def _backward_step(rows, undo, n, out, actions):  # type: ignore[no-untyped-def]
    parent, path = np.empty(2 * n - 1, np.int64), np.empty(2 * n - 1, np.int64)
    for i in range(rows.shape[0]):
        out[i] = rows[i]
        if undo[i] < n - 1:
            column = 2 * undo[i]
            a, b = _smallest(rows[i], rows[i, column], n), undo[i] + 1
            out[i, column] = out[i, column + 1] = -1
            actions[i] = _pair(a, b, n)
            continue
        # Cut the edge above a node: the side of leaf 0 is turned so that its root stands at the cut.
        node = undo[i] - (n - 1)
        b = _smallest(rows[i], node, n)
        actions[i] = _pair(0, b, n)
        out[i, 0] = out[i, 1] = -1
        if node == 0:
            actions[i] = _pair(0, 1, n)
            continue
        for k in range(1, n - 1):
            parent[rows[i, 2 * k]] = parent[rows[i, 2 * k + 1]] = n + k
        parent[rows[i, 1]] = -1
        # From the cut up to the top node, children of each node on the path become the other child and what was above.
        steps, above = 0, parent[node]
        while above >= 0:
            path[steps] = above
            steps += 1
            above = parent[above]
        for k in range(steps):
            out[i, 2 * (path[k] - n)] = out[i, 2 * (path[k] - n) + 1] = -1
        # from the top down: the part that holds leaf 0 grows by the other child of each node on the path
        grown = 0
        for k in range(steps - 1, -1, -1):
            came = path[k - 1] if k else node
            column = 2 * (path[k] - n)
            other = rows[i, column] if rows[i, column + 1] == came else rows[i, column + 1]
            name = _smallest(rows[i], other, n)
            out[i, 2 * (name - 1)], out[i, 2 * (name - 1) + 1] = grown, other
            grown = n - 1 + name


@kept_njit()
def _backward_action(rows, actions, n, found):  # type: ignore[no-untyped-def]
    root = np.empty(n, np.int64)
    for i in range(rows.shape[0]):
        count = _trees(rows[i], n, root)
        a, rest = 0, actions[i]
        while a < n - 1 and rest >= n - 1 - a:
            rest -= n - 1 - a
            a += 1
        b = a + 1 + rest
        if count == 1 or a >= n - 1:
            found[i] = 0
        elif count > 2:
            found[i] = b - 1
        else:  # the tree that does not hold leaf 0 keeps its names in the finished tree
            found[i] = n - 1 + (root[b] if root[0] != 0 else 0)


@kept_njit()
def _first_bad(rows, n):  # type: ignore[no-untyped-def]
    """The first row that is no finished tree in its one form; -1 if all are."""
    seen = np.empty(2 * n - 1, np.bool_)
    for i in range(rows.shape[0]):
        row = rows[i]
        seen[:] = False
        good = row[0] == 0
        for column in range(row.size):
            node = row[column]
            good = good and 0 <= node < 2 * n - 1 and node != n
            good = good and not seen[node]
            if good:
                seen[node] = True
        if not good:
            return i
        # no cycle: first children lead from every node to a leaf in fewer than n steps, and give it its name
        for b in range(1, n):
            node, steps = row[2 * (b - 1) + 1], 0
            while node >= n and steps < n:
                node = row[2 * (node - n)]
                steps += 1
            low, more = row[2 * (b - 1)], 0
            while low >= n and more < n:
                low = row[2 * (low - n)]
                more += 1
            if node != b or low >= b or steps >= n or more >= n:
                return i
    return -1
