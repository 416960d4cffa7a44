"""The state graph of an environment that is small enough to enumerate: every state, every step, in topological order.

Exact distributions, partition functions and path counts are sweeps over it (dynamic programming): what is known of all
parents of a level of states gives the level at once.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

import numpy as np
import torch
from numba import njit
from torch import Tensor

from headwater.environments.base import Environment, identity

_CHUNK = 1 << 18  # mask entries looked at in one go, so that large action sets need no large memory


class TooManyStates(ValueError):
    """The environment has more states than the limit."""


class CyclicGraph(ValueError):
    """Some state can be reached from itself; `state` is one."""

    def __init__(self, state: list[int]) -> None:
        super().__init__(f"the environment has a cycle: steps lead from state {tuple(state)} back to itself")
        self.state = state


@dataclass(frozen=True)
class StateGraph:
    """M states that can be reached and the E steps between them.

    states:     int32 `[M, width]`; row 0 is the initial state, and every step leads to a later row.
    source, target, action: int64 `[E]`, the steps, exit excepted; sorted by target.
    terminal:   bool `[M]`, the states that may exit.
    levels:     groups of edges (rows of `source`), each with all edges into some states. All edges into the sources of
                a group come in earlier groups, and all edges out of its targets in later ones.
    """

    states: Tensor
    source: Tensor
    target: Tensor
    action: Tensor
    terminal: Tensor
    levels: list[Tensor]

    def __len__(self) -> int:
        return self.states.shape[0]

    def path_counts(self) -> list[int]:
        """The exact number of action sequences from the initial state to each state."""
        counts = np.zeros(len(self), dtype=object)
        counts[0] = 1
        source, target = self.source.numpy(), self.target.numpy()
        for edges in self.levels:
            np.add.at(counts, target[edges.numpy()], counts[source[edges.numpy()]])
        return [int(count) for count in counts]

    def log_path_sums(self, log_weight: Tensor) -> Tensor:
        """Log of the sum, over all paths from the initial state to each state, of the product of their edges' weights.

        log_weight: `[E]`. With log P_F of the steps this is the log-probability of passing through each state.
        Returns float64 `[M]`.
        """
        log_weight = log_weight.to(torch.float64)
        sums = torch.full((len(self),), -torch.inf, dtype=torch.float64)
        sums[0] = 0.0
        for edges in self.levels:
            first, last = int(self.target[edges[0]]), int(self.target[edges[-1]])
            into = self.target[edges] - first
            value = sums[self.source[edges]] + log_weight[edges]
            lowest = torch.full((last - first + 1,), torch.finfo(torch.float64).min, dtype=torch.float64)
            highest = lowest.scatter_reduce(0, into, value, "amax")  # finite: -inf minus -inf would be NaN
            total = torch.zeros_like(highest).index_add(0, into, (value - highest[into]).exp())
            sums[first : last + 1] = highest + total.log()
        return sums

    def rows(self, states: Tensor) -> Tensor:
        """The row of each of `states` (`[N, width]`): int64 `[N]`. Raises ValueError naming a state that is in none."""
        found = self._table.find(states)
        if (found < 0).any():
            missing = tuple(states[found < 0][0].tolist())
            raise ValueError(f"state {missing} cannot be reached from the initial state")
        return found

    @cached_property
    def _table(self) -> _Table:
        table = _Table(self.states.shape[1])
        table.add(self.states, limit=len(self))
        return table


def enumerate_states(environment: Environment, limit: int = 1_000_000) -> StateGraph:
    """All states that can be reached from the initial state, breadth first, and all steps between them.

    Raises TooManyStates if there are more than `limit` states, and CyclicGraph for a cycle; both are ValueErrors.
    """
    table = _Table(environment.width)
    table.add(environment.initial(1), limit)
    n_rows = max(1, _CHUNK // environment.n_actions)
    sources, targets, actions, may_exit = [], [], [], []
    done = 0
    while done < table.count:
        states = table.states(done, min(done + n_rows, table.count))
        mask = environment.forward_mask(states)
        may_exit.append(mask[:, environment.exit_action])
        row, action = mask[:, : environment.exit_action].nonzero(as_tuple=True)
        sources.append(row + done)
        actions.append(action)
        targets.append(table.add(environment.step(states[row], action), limit))
        done += len(states)
    source, target = torch.cat(sources), torch.cat(targets)
    level = _depths(table.states(0, table.count), source, target)
    return _in_topological_order(
        table.states(0, table.count), source, target, torch.cat(actions), torch.cat(may_exit), level
    )


def _depths(states: Tensor, source: Tensor, target: Tensor) -> Tensor:
    """The number of steps of the longest path to each state; `source` is sorted."""
    count = states.shape[0]
    first_edge = np.concatenate([[0], np.bincount(source.numpy(), minlength=count).cumsum()])
    depth = torch.from_numpy(_longest_paths(first_edge, target.numpy(), count))
    if (depth < 0).any():
        raise CyclicGraph(states[_state_on_a_cycle(depth < 0, source, target)].tolist())
    return depth


def _state_on_a_cycle(unresolved: Tensor, source: Tensor, target: Tensor) -> int:
    """Every state without a depth has a parent without one: to walk from parent to parent is to end on a cycle."""
    between = unresolved[source] & unresolved[target]
    parent = dict(zip(target[between].tolist(), source[between].tolist(), strict=True))
    row = next(iter(parent))
    seen: set[int] = set()
    while row not in seen:
        seen.add(row)
        row = parent[row]
    return row


def _in_topological_order(
    states: Tensor, source: Tensor, target: Tensor, action: Tensor, terminal: Tensor, depth: Tensor
) -> StateGraph:
    order = depth.argsort(stable=True)
    row = torch.empty_like(order)
    row[order] = torch.arange(len(order))
    source, target = row[source], row[target]
    by_target = target.argsort(stable=True)
    source, target, action = source[by_target], target[by_target], action[by_target]
    sizes = torch.bincount(depth[order][target])[1:].tolist()  # the initial state has no edges in
    levels = list(torch.split_with_sizes(torch.arange(len(source)), sizes)) if sizes else []
    return StateGraph(states[order], source, target, action, terminal[order], levels)


class _Table:
    """Distinct state rows, numbered in the order in which they were added: a hash table that compares whole rows."""

    def __init__(self, width: int) -> None:
        self.count = 0
        self._rows = np.empty((0, width), np.int32)
        self._hashes = np.empty(0, np.int64)
        self._slots = np.full(2, -1)

    def states(self, start: int, end: int) -> Tensor:
        return torch.from_numpy(self._rows[start:end].copy())

    def add(self, states: Tensor, limit: int) -> Tensor:
        """The number of each row, new or known: int64 `[N]`."""
        self._reserve(self.count + states.shape[0])
        rows, hashes = _arrays(states)
        found, self.count = _add(rows, hashes, self._rows, self._hashes, self._slots, self.count, limit)
        if self.count > limit:
            raise TooManyStates(f"the environment has more than {limit} states, the limit of this enumeration")
        return torch.from_numpy(found)

    def find(self, states: Tensor) -> Tensor:
        """The number of each row, -1 if unknown: int64 `[N]`."""
        return torch.from_numpy(_find(*_arrays(states), self._rows, self._hashes, self._slots))

    def _reserve(self, count: int) -> None:
        if count > len(self._rows):
            capacity = max(2 * len(self._rows), count)
            rows, hashes = np.empty((capacity, self._rows.shape[1]), np.int32), np.empty(capacity, np.int64)
            rows[: self.count], hashes[: self.count] = self._rows[: self.count], self._hashes[: self.count]
            self._rows, self._hashes = rows, hashes
            self._slots = np.full(1 << (2 * capacity).bit_length(), -1)
            _refill(self._hashes, self._slots, self.count)


def _arrays(states: Tensor) -> tuple[np.ndarray, np.ndarray]:
    rows = states.to("cpu", torch.int32).contiguous()
    return rows.numpy(), identity(rows).numpy()


@njit(nogil=True)
def _slot_of(row, value, rows, hashes, slots):  # type: ignore[no-untyped-def]
    """The slot that holds the row, or the empty one where it belongs."""
    slot = value & (slots.size - 1)
    while slots[slot] >= 0:
        known = slots[slot]
        if hashes[known] == value:
            equal = True
            for k in range(row.size):
                equal = equal and rows[known, k] == row[k]
            if equal:
                break
        slot = (slot + 1) & (slots.size - 1)
    return slot


@njit(nogil=True)
def _add(new_rows, new_hashes, rows, hashes, slots, count, limit):  # type: ignore[no-untyped-def]
    found = np.empty(new_hashes.size, np.int64)
    for i in range(new_hashes.size):
        slot = _slot_of(new_rows[i], new_hashes[i], rows, hashes, slots)
        if slots[slot] < 0:
            slots[slot], rows[count], hashes[count] = count, new_rows[i], new_hashes[i]
            count += 1
            if count > limit:
                break
        found[i] = slots[slot]
    return found, count


@njit(nogil=True)
def _find(wanted_rows, wanted_hashes, rows, hashes, slots):  # type: ignore[no-untyped-def]
    found = np.empty(wanted_hashes.size, np.int64)
    for i in range(wanted_hashes.size):
        found[i] = slots[_slot_of(wanted_rows[i], wanted_hashes[i], rows, hashes, slots)]
    return found


@njit(nogil=True)
def _refill(hashes, slots, count):  # type: ignore[no-untyped-def]
    for i in range(count):
        slot = hashes[i] & (slots.size - 1)
        while slots[slot] >= 0:
            slot = (slot + 1) & (slots.size - 1)
        slots[slot] = i


@njit(nogil=True)
def _longest_paths(first_edge, target, count):  # type: ignore[no-untyped-def]
    """Steps of the longest path to each state, -1 where a cycle lies on the way (Kahn's algorithm)."""
    waiting = np.zeros(count, np.int64)
    for edge in range(target.size):
        waiting[target[edge]] += 1
    depth = np.full(count, -1)
    longest = np.zeros(count, np.int64)
    queue = np.empty(count, np.int64)
    filled = 0
    if waiting[0] == 0:
        queue[0], filled = 0, 1
    taken = 0
    while taken < filled:
        state = queue[taken]
        taken += 1
        depth[state] = longest[state]
        for edge in range(first_edge[state], first_edge[state + 1]):
            child = target[edge]
            longest[child] = max(longest[child], longest[state] + 1)
            waiting[child] -= 1
            if waiting[child] == 0:
                queue[filled] = child
                filled += 1
    return depth
