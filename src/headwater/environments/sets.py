"""Subsets of given items, built one item at a time in any order."""

from __future__ import annotations

from collections.abc import Collection, Hashable, Sequence
from typing import cast

import numpy as np
import torch
from numba import njit
from torch import Tensor

from headwater.environments.base import Environment, Native, Objects, Tokens


class Sets(Environment):
    """Subsets of `items` with at most `size` of them, or exactly `size`. Objects are sorted tuples of items.

    A state is one 0 or 1 an item; action i adds item i, backward action i takes it out. A subclass that forbids
    combinations overrides `forward_mask` alone: whatever may be built can be taken apart in
    every order.
    """

    def __init__(self, items: int | Sequence[str], size: int, exact: bool = False) -> None:
        self.items: list[object] = list(range(items)) if isinstance(items, int) else list(items)
        count = len(self.items)
        if not count or len(set(self.items)) != count:
            raise ValueError(f"items = {self.items}: must be at least one, and all different")
        if not 1 <= size <= count:
            raise ValueError(f"size = {size}: must lie between 1 and the number of items, {count}")
        self.size, self.exact = size, exact
        self.width = count
        self.n_actions = count + 1
        self.n_backward_actions = count
        self.max_steps = size + 1
        self.feature_type = Tokens(length=count, vocabulary=2)
        constants = np.array([size, int(exact)], dtype=np.int64)
        self.native = Native(_forward_mask, _step, _backward_mask, _backward_step, constants, Sets)

    def initial(self, count: int) -> Tensor:
        return torch.zeros(count, self.width, dtype=torch.int32)

    def forward_mask(self, states: Tensor) -> Tensor:
        chosen = states.sum(1, keepdim=True)
        may_exit = chosen == self.size if self.exact else torch.ones_like(chosen, dtype=torch.bool)
        return torch.cat([(states == 0) & (chosen < self.size), may_exit], dim=1)

    def backward_mask(self, states: Tensor) -> Tensor:
        return states == 1

    def step(self, states: Tensor, actions: Tensor) -> Tensor:
        return states.scatter(1, actions[:, None], 1)

    def backward_step(self, states: Tensor, backward_actions: Tensor) -> Tensor:
        return states.scatter(1, backward_actions[:, None], 0)

    def backward_action(self, states: Tensor, actions: Tensor) -> Tensor:
        return actions.clamp(max=self.width - 1)

    def forward_action(self, states: Tensor, backward_actions: Tensor) -> Tensor:
        return backward_actions

    def objects(self, states: Tensor) -> Objects:
        return [tuple(self.items[index] for index in row.nonzero()[:, 0].tolist()) for row in states]

    def states(self, objects: Objects) -> Tensor:
        number = {item: index for index, item in enumerate(self.items)}
        states = self.initial(len(objects))
        for row, value in enumerate(objects):
            chosen = list(cast("Collection[Hashable]", value))
            unknown = [item for item in chosen if not isinstance(item, Hashable) or item not in number]
            fits = len(chosen) == self.size if self.exact else len(chosen) <= self.size
            if unknown or len(set(chosen)) != len(chosen) or not fits:
                raise ValueError(
                    f"{value!r} is no set of {'exactly' if self.exact else 'at most'} {self.size} of the items"
                )
            states[row, [number[item] for item in chosen]] = 1
        return states

    def log_path_count(self, states: Tensor) -> Tensor:
        return torch.lgamma(states.sum(1).double() + 1)


@njit(nogil=True)
def _forward_mask(state, constants, out):  # type: ignore[no-untyped-def]
    chosen = 0
    for item in range(state.size):
        chosen += state[item]
    for item in range(state.size):
        out[item] = state[item] == 0 and chosen < constants[0]
    out[state.size] = chosen == constants[0] or not constants[1]


@njit(nogil=True)
def _step(state, action, constants):  # type: ignore[no-untyped-def]
    state[action] = 1


@njit(nogil=True)
def _backward_mask(state, constants, out):  # type: ignore[no-untyped-def]
    for item in range(state.size):
        out[item] = state[item] == 1


@njit(nogil=True)
def _backward_step(state, backward_action, constants):  # type: ignore[no-untyped-def]
    state[backward_action] = 0
    return backward_action
