"""Filling a fixed number of slots with symbols, in any order: non-autoregressive construction."""

from __future__ import annotations

import numpy as np
import torch
from numba import njit
from torch import Tensor

from headwater.environments.base import Environment, Native, Objects, Tokens
from headwater.environments.rows import integer_rows


class Slots(Environment):
    """`length` slots, each to be filled with one of `symbols` symbols; exit when all are full.

    A state holds each slot's symbol, or `symbols` for an empty one. Action `slot * symbols + symbol` fills a slot; a
    backward action empties one, so there are far fewer of them. Objects are the symbols, an integer tensor `[T,
    length]`.
    """

    def __init__(self, length: int, symbols: int) -> None:
        if length < 1 or symbols < 1:
            raise ValueError(f"length = {length}, symbols = {symbols}: must be at least 1")
        self.length, self.symbols = length, symbols
        self.width = length
        self.n_actions = length * symbols + 1
        self.n_backward_actions = length
        self.max_steps = length + 1
        self.feature_type = Tokens(length=length, vocabulary=symbols + 1)
        self.native = Native(
            _forward_mask, _step, _backward_mask, _backward_step, np.array([symbols], dtype=np.int64), Slots
        )

    def initial(self, count: int) -> Tensor:
        return torch.full((count, self.length), self.symbols, dtype=torch.int32)

    def forward_mask(self, states: Tensor) -> Tensor:
        empty = states == self.symbols
        return torch.cat([empty.repeat_interleave(self.symbols, dim=1), ~empty.any(1, keepdim=True)], dim=1)

    def backward_mask(self, states: Tensor) -> Tensor:
        return states != self.symbols

    def step(self, states: Tensor, actions: Tensor) -> Tensor:
        symbols = (actions % self.symbols).to(states.dtype)
        return states.scatter(1, (actions // self.symbols)[:, None], symbols[:, None])

    def backward_step(self, states: Tensor, backward_actions: Tensor) -> Tensor:
        return states.scatter(1, backward_actions[:, None], self.symbols)

    def backward_action(self, states: Tensor, actions: Tensor) -> Tensor:
        return (actions // self.symbols).clamp(max=self.length - 1)

    def forward_action(self, states: Tensor, backward_actions: Tensor) -> Tensor:
        return backward_actions * self.symbols + states.gather(1, backward_actions[:, None])[:, 0]

    def objects(self, states: Tensor) -> Objects:
        return states

    def states(self, objects: Objects) -> Tensor:
        return integer_rows(objects, self.length, self.symbols)

    def log_path_count(self, states: Tensor) -> Tensor:
        return torch.lgamma((states != self.symbols).sum(1).double() + 1)


@njit(nogil=True)
def _forward_mask(state, constants, out):  # type: ignore[no-untyped-def]
    symbols = constants[0]
    full = True
    for slot in range(state.size):
        empty = state[slot] == symbols
        full = full and not empty
        for symbol in range(symbols):
            out[slot * symbols + symbol] = empty
    out[out.size - 1] = full


@njit(nogil=True)
def _step(state, action, constants):  # type: ignore[no-untyped-def]
    state[action // constants[0]] = action % constants[0]


@njit(nogil=True)
def _backward_mask(state, constants, out):  # type: ignore[no-untyped-def]
    for slot in range(state.size):
        out[slot] = state[slot] != constants[0]


@njit(nogil=True)
def _backward_step(state, backward_action, constants):  # type: ignore[no-untyped-def]
    action = backward_action * constants[0] + state[backward_action]
    state[backward_action] = constants[0]
    return action
