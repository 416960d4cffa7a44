"""Directed acyclic graphs over named nodes, built edge by edge (Deleu et al. 2022, arXiv 2202.13903).

A state is the adjacency matrix alone. Deleu et al. carry its transitive closure along too, which is cheap to keep when
an edge is added but not when one is taken out; the closure is computed anew here, by bit operations on a row at a time.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import cast

import numpy as np
import torch
from numba import njit
from torch import Tensor

from headwater.environments.base import Environment, Native, Objects, Tokens
from headwater.environments.rows import integer_rows

MOST_NODES = 62
"""A set of nodes is the bits of one 64-bit integer."""
NO_EDGES = "no edges"
_ARROW = "->"


class Dags(Environment):
    """Directed acyclic graphs on `nodes` (a number, or names), no node with more than `max_parents` parents.

    A state holds the adjacency matrix row by row: entry `i * n + j` is 1 for an edge from node i to node j. Action
    `i * n + j` adds that edge, the backward action of the same number takes it out, and every graph may exit. Objects
    are adjacency matrices, int32 `[T, n, n]`.
    """

    def __init__(self, nodes: int | Sequence[str], max_parents: int | None = None) -> None:
        self.names = node_names(nodes) if isinstance(nodes, int) else tuple(nodes)
        count = len(self.names)
        if not 1 <= count <= MOST_NODES:
            raise ValueError(f"nodes = {nodes}: must be 1 to {MOST_NODES}")
        if len(set(self.names)) < count:
            raise ValueError(f"nodes = {nodes}: the names must differ")
        if max_parents is not None and max_parents < 1:
            raise ValueError(f"max_parents = {max_parents}: must be at least 1")
        self.nodes, self.max_parents = count, count if max_parents is None else max_parents
        self.width = count * count
        self.n_actions = self.width + 1
        self.n_backward_actions = self.width
        self.max_steps = sum(min(before, self.max_parents) for before in range(count)) + 1
        self.feature_type = Tokens(length=self.width, vocabulary=2)
        constants = np.array([count, self.max_parents], dtype=np.int64)
        self.native = Native(_forward_mask, _step, _backward_mask, _backward_step, constants, Dags)

    def initial(self, count: int) -> Tensor:
        return torch.zeros(count, self.width, dtype=torch.int32)

    def forward_mask(self, states: Tensor) -> Tensor:
        graphs = states.reshape(-1, self.nodes, self.nodes)
        full = graphs.sum(1, keepdim=True) >= self.max_parents
        closes_a_cycle = reachable(graphs).transpose(1, 2)
        legal = ~((graphs > 0) | closes_a_cycle | full)
        may_exit = torch.ones(len(states), 1, dtype=torch.bool, device=states.device)
        return torch.cat([legal.flatten(1), may_exit], dim=1)

    def backward_mask(self, states: Tensor) -> Tensor:
        return states > 0

    def step(self, states: Tensor, actions: Tensor) -> Tensor:
        return states.scatter(1, actions[:, None], 1)

    def backward_step(self, states: Tensor, backward_actions: Tensor) -> Tensor:
        return states.scatter(1, backward_actions[:, None], 0)

    def backward_action(self, states: Tensor, actions: Tensor) -> Tensor:
        return actions.clamp(max=self.width - 1)

    def forward_action(self, states: Tensor, backward_actions: Tensor) -> Tensor:
        return backward_actions

    def objects(self, states: Tensor) -> Objects:
        return states.reshape(-1, self.nodes, self.nodes)

    def states(self, objects: Objects) -> Tensor:
        shape = (len(objects), self.nodes, self.nodes)
        try:
            matrices = np.asarray(objects.cpu() if isinstance(objects, Tensor) else objects)
        except ValueError as error:
            raise ValueError(f"each object must be a matrix of {self.nodes} x {self.nodes} entries") from error
        if len(objects) and matrices.shape != shape:
            raise ValueError(f"objects of shape {matrices.shape}: must be {shape}, one adjacency matrix each")
        states = integer_rows(cast("Sequence[object]", matrices.reshape(len(objects), self.width)), self.width, 2)
        graphs = states.reshape(-1, self.nodes, self.nodes)
        cyclic = ((graphs > 0) & reachable(graphs).transpose(1, 2)).flatten(1).any(1)
        crowded = (graphs.sum(1) > self.max_parents).any(1)
        for wrong, reason in ((cyclic, "has a cycle"), (crowded, f"has a node of over {self.max_parents} parents")):
            if wrong.any():
                raise ValueError(f"graph {graph_text(graphs[wrong][:1], self.names)[0]!r} {reason}")
        return states

    def log_path_count(self, states: Tensor) -> Tensor:
        """Whatever is taken out of an acyclic graph, it stays one: its E edges can be added in all E! orders."""
        return torch.lgamma(states.sum(1).double() + 1)


def node_names(count: int) -> tuple[str, ...]:
    """A, B, C ... where the alphabet suffices, else X1, X2, X3 ..."""
    return tuple(chr(ord("A") + i) if count <= 26 else f"X{i + 1}" for i in range(count))


def reachable(graphs: Tensor) -> Tensor:
    """Whether a walk along edges leads from node i to node j, each node to itself included: bool `[N, n, n]`."""
    reach = (graphs + torch.eye(graphs.shape[1], dtype=graphs.dtype, device=graphs.device)).clamp(max=1).float()
    steps = 1
    while steps < graphs.shape[1] - 1:  # reach covers walks of up to `steps` edges
        reach = (reach @ reach).clamp(max=1)
        steps *= 2
    return reach > 0


def graph_text(graphs: Tensor, names: Sequence[str]) -> list[str]:
    """Each adjacency matrix of `[T, n, n]` as its edges: `A->B B->C`."""
    lines: list[list[str]] = [[] for _ in range(len(graphs))]
    for graph, parent, child in graphs.nonzero().tolist():
        lines[graph].append(f"{names[parent]}{_ARROW}{names[child]}")
    return [" ".join(edges) or NO_EDGES for edges in lines]


def text_graphs(lines: Sequence[str], names: Sequence[str]) -> Tensor:
    """The inverse of `graph_text`: int32 `[T, n, n]`. Raises ValueError naming an edge between unknown nodes."""
    place = {name: index for index, name in enumerate(names)}
    graphs = torch.zeros(len(lines), len(names), len(names), dtype=torch.int32)
    for row, line in enumerate(lines):
        for edge in sorted(edges_of(line)):
            parent, arrow, child = edge.partition(_ARROW)
            if not arrow or parent not in place or child not in place:
                raise ValueError(
                    f"{edge!r} is no edge such as {names[0]}{_ARROW}{names[-1]} between {', '.join(names)}"
                )
            graphs[row, place[parent], place[child]] = 1
    return graphs


def edges_of(line: str) -> set[str]:
    """The edges of a graph given as text."""
    return set() if line.strip() == NO_EDGES else set(line.split())


def structural_hamming_distance(a: str, b: str) -> int:
    """Pairs of nodes that two graphs, given as text, join differently; a reversed edge is one difference."""
    differing = edges_of(a) ^ edges_of(b)
    return len({frozenset(edge.split(_ARROW)) for edge in differing})


@njit(nogil=True)
def _forward_mask(state, constants, out):  # type: ignore[no-untyped-def]
    n, most = constants[0], constants[1]
    reach = np.empty(n, np.int64)  # bit j of entry i: node j can be reached from node i
    for i in range(n):
        reach[i] = np.int64(1) << np.int64(i)
        for j in range(n):
            reach[i] |= np.int64(state[i * n + j]) << np.int64(j)
    for middle in range(n):  # Warshall's algorithm, a row of the closure at a time
        for i in range(n):
            if (reach[i] >> np.int64(middle)) & 1:
                reach[i] |= reach[middle]
    for j in range(n):
        parents = 0
        for i in range(n):
            parents += state[i * n + j]
        for i in range(n):
            cyclic = (reach[j] >> np.int64(i)) & 1
            out[i * n + j] = parents < most and state[i * n + j] == 0 and cyclic == 0
    out[n * n] = True


@njit(nogil=True)
def _step(state, action, constants):  # type: ignore[no-untyped-def]
    state[action] = 1


@njit(nogil=True)
def _backward_mask(state, constants, out):  # type: ignore[no-untyped-def]
    for edge in range(state.size):
        out[edge] = state[edge] > 0


@njit(nogil=True)
def _backward_step(state, backward_action, constants):  # type: ignore[no-untyped-def]
    state[backward_action] = 0
    return backward_action
