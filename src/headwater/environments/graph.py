"""The whole state graph of a small environment: every state, every step, in topological order.

With it the exact distribution of a sampler follows by dynamic programming, and the checker can count objects and trajectories.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from headwater.environments.base import Environment


class TooManyStates(ValueError):
    """The environment has more states than the limit that was set."""


class CyclicGraph(ValueError):
    """Some state can be reached from itself. `state` lies on a cycle."""

    def __init__(self, state: list[int]) -> None:
        super().__init__(f"the state graph has a cycle: state {state} can be reached from itself")
        self.state = state


@dataclass(frozen=True)
class StateGraph:
    """M states and the E steps between them, exit left out.

    states: int32 `[M, width]`, topologically ordered, the initial state first. source, target, action: int64 `[E]`, the state that each
    step leaves, the state that it leads to (rows of `states`) and its action. terminal: bool `[M]`, the states that may exit.
    levels: edge numbers in groups; when one group's sources are reached, all steps into them were in earlier groups.
    """

    states: Tensor
    source: Tensor
    target: Tensor
    action: Tensor
    terminal: Tensor
    levels: list[Tensor]

    @cached_property
    def terminal_states(self) -> Tensor:
        """int32 `[objects, width]`."""
        return self.states[self.terminal]

    def path_counts(self) -> list[int]:
        """The exact number of action sequences from the initial state to each state."""
        counts = np.zeros(len(self.states), dtype=object)
        counts[0] = 1
        source, target = self.source.numpy(), self.target.numpy()
        for level in self.levels:
            edges = level.numpy()
            np.add.at(counts, target[edges], counts[source[edges]])
        return [int(count) for count in counts]


def enumerate_states(environment: Environment, limit: int = 1_000_000) -> StateGraph:
    """Visit every state that can be reached. Raises TooManyStates beyond `limit` states, CyclicGraph where there is a cycle."""
    frontier = environment.initial(1)
    keys, rows = _keys(frontier), frontier.numpy().copy()
    edges: list[tuple[NDArray[np.void], NDArray[np.void], Tensor]] = []
    while len(frontier):
        mask = environment.forward_mask(frontier)[:, :-1]
        where, actions = mask.nonzero(as_tuple=True)
        children = environment.step(frontier[where], actions)
        child_keys, first = np.unique(_keys(children), return_index=True)
        edges.append((_keys(frontier)[where.numpy()], _keys(children), actions))
        place = np.searchsorted(keys, child_keys).clip(max=len(keys) - 1)
        new = keys[place] != child_keys
        frontier = children[torch.from_numpy(first[new])]
        keys, rows = np.concatenate([keys, child_keys[new]]), np.concatenate([rows, frontier.numpy()])
        if len(keys) > limit:
            raise TooManyStates(f"{type(environment).__name__} has more than {limit:,} states")
        order = np.argsort(keys)
        keys, rows = keys[order], rows[order]
    source = np.concatenate([np.searchsorted(keys, sources) for sources, _, _ in edges])
    target = np.concatenate([np.searchsorted(keys, targets) for _, targets, _ in edges])
    depth = _longest_path(source, target, rows)
    order = np.argsort(depth, kind="stable")
    renumbered = np.empty_like(order)
    renumbered[order] = np.arange(len(order))
    states = torch.from_numpy(rows[order])
    edge_depth = torch.from_numpy(depth[source])
    return StateGraph(
        states=states,
        source=torch.from_numpy(renumbered[source]),
        target=torch.from_numpy(renumbered[target]),
        action=torch.cat([actions for _, _, actions in edges]),
        terminal=environment.forward_mask(states)[:, -1],
        levels=[(edge_depth == level).nonzero()[:, 0] for level in range(int(depth.max()) + 1)][: int(depth.max())],
    )


def _keys(states: Tensor) -> NDArray[np.void]:
    """Each state row as one comparable value, its bytes."""
    rows = np.ascontiguousarray(states.numpy())
    return rows.view(np.dtype((np.void, rows.dtype.itemsize * rows.shape[1])))[:, 0]


def _longest_path(source: NDArray[np.int64], target: NDArray[np.int64], rows: NDArray[np.int32]) -> NDArray[np.int64]:
    """Length of the longest path to each state: a topological order that lets whole levels be swept at once."""
    count = len(rows)
    by_source = np.argsort(source, kind="stable")
    targets = target[by_source]
    begin = np.searchsorted(source[by_source], np.arange(count + 1))
    waiting = np.bincount(target, minlength=count)
    depth = np.zeros(count, dtype=np.int64)
    ready = np.flatnonzero(waiting == 0)
    done, level = 0, 0
    while len(ready):
        depth[ready] = level
        done += len(ready)
        sizes = begin[ready + 1] - begin[ready]
        offsets = np.repeat(begin[ready] - (sizes.cumsum() - sizes), sizes) + np.arange(sizes.sum())
        reached, times = np.unique(targets[offsets], return_counts=True)
        waiting[reached] -= times
        ready = reached[waiting[reached] == 0]
        level += 1
    if done < count:
        raise CyclicGraph(rows[_on_cycle(source, target, waiting > 0)].tolist())
    return depth


def _on_cycle(source: NDArray[np.int64], target: NDArray[np.int64], left: NDArray[np.bool_]) -> int:
    """A state on a cycle: walk back among the states that never got ready until one repeats."""
    inner = left[source] & left[target]
    parent = dict(zip(target[inner].tolist(), source[inner].tolist(), strict=True))
    state, seen = next(iter(parent)), set()
    while state not in seen:
        seen.add(state)
        state = parent[state]
    return int(state)
