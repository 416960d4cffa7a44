"""Sequences over any alphabet, of fixed or bounded length, grown at the end or at both ends.

A state holds the symbols so far, packed to the left, and an empty mark (the number past the last symbol) in the places
that follow.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Literal

import numpy as np
import torch
from numba import njit
from torch import Tensor

from headwater.environments.base import Environment, Native, Objects, Tokens


class Sequences(Environment):
    """Strings of `min_length` to `max_length` symbols (`min_length` is `max_length` unless given).

    construction "append" adds symbols at the end: every string has one trajectory. "prepend-append" grows at both ends:
    actions `0 .. k - 1` append, `k .. 2 k - 1` prepend (never to the empty string), and a backward action drops the
    last or the first symbol.
    allowed: with "append", bool `[max_length, k]`, the symbols that may stand in each place; at least one in each.
    Symbols are strings of one common length. Subclasses may narrow `forward_mask`, as long as
    every symbol that is forbidden in a state stays forbidden on every way to the objects beyond it.
    """

    def __init__(
        self,
        alphabet: Sequence[str],
        max_length: int,
        min_length: int | None = None,
        construction: Literal["append", "prepend-append"] = "append",
        allowed: Tensor | None = None,
    ) -> None:
        min_length = max_length if min_length is None else min_length
        if (
            not alphabet
            or len(set(alphabet)) != len(alphabet)
            or len({len(symbol) for symbol in alphabet}) != 1
            or not alphabet[0]
        ):
            raise ValueError(f"alphabet = {list(alphabet)}: must be different symbols of one common length")
        if max_length < 1:
            raise ValueError(f"max_length = {max_length}: must be at least 1")
        if not 0 <= min_length <= max_length:
            raise ValueError(f"min_length = {min_length}: must lie between 0 and max_length = {max_length}")
        if construction not in ("append", "prepend-append"):
            raise ValueError(f"construction = {construction!r}: must be 'append' or 'prepend-append'")
        size = len(alphabet)
        if allowed is not None:
            if construction != "append":
                raise ValueError("allowed goes with construction = 'append' only")
            if allowed.shape != (max_length, size) or not allowed.any(1).all():
                raise ValueError(f"allowed must be [{max_length}, {size}] with a legal symbol in every place")
        self.alphabet, self.max_length, self.min_length = list(alphabet), max_length, min_length
        self.construction, self.both_ends = construction, construction == "prepend-append"
        self.empty = size
        self.width = max_length
        self.n_actions = (2 * size if self.both_ends else size) + 1
        self.n_backward_actions = 2 if self.both_ends else 1
        self.max_steps = max_length + 1
        self.feature_type = Tokens(length=max_length, vocabulary=size + 1)
        self._allowed = torch.ones(max_length, size, dtype=torch.bool) if allowed is None else allowed.bool()
        points = [[ord(character) for character in symbol] for symbol in [*self.alphabet, "\0" * len(alphabet[0])]]
        self._code_points = np.array(points, dtype=np.uint32)  # a string's trailing zeros are no part of it
        header = [size, min_length, int(self.both_ends)]
        constants = np.concatenate([header, self._allowed.flatten().numpy()]).astype(np.int64)
        self.native = Native(_forward_mask, _step, _backward_mask, _backward_step, constants, Sequences)

    def lengths(self, states: Tensor) -> Tensor:
        """The number of symbols in each state: int64 `[N]`."""
        return (states != self.empty).sum(1)

    def initial(self, count: int) -> Tensor:
        return torch.full((count, self.max_length), self.empty, dtype=torch.int32)

    def forward_mask(self, states: Tensor) -> Tensor:
        lengths = self.lengths(states)
        has_room = (lengths < self.max_length)[:, None]
        append = self._allowed.to(states.device)[lengths.clamp(max=self.max_length - 1)] & has_room
        may_exit = (lengths >= self.min_length)[:, None]
        if not self.both_ends:
            return torch.cat([append, may_exit], dim=1)
        return torch.cat([append, append & (lengths > 0)[:, None], may_exit], dim=1)

    def backward_mask(self, states: Tensor) -> Tensor:
        lengths = self.lengths(states)
        if not self.both_ends:
            return (lengths > 0)[:, None]
        return torch.stack([lengths > 0, lengths > 1], dim=1)

    def step(self, states: Tensor, actions: Tensor) -> Tensor:
        symbols = (actions % self.empty).to(states.dtype)[:, None]
        appended = states.scatter(1, self.lengths(states)[:, None], symbols)
        if not self.both_ends:
            return appended
        prepended = torch.cat([symbols, states[:, :-1]], dim=1)
        return torch.where((actions >= self.empty)[:, None], prepended, appended)

    def backward_step(self, states: Tensor, backward_actions: Tensor) -> Tensor:
        shortened = states.scatter(1, self.lengths(states)[:, None] - 1, self.empty)
        if not self.both_ends:
            return shortened
        shifted = torch.cat([states[:, 1:], torch.full_like(states[:, :1], self.empty)], dim=1)
        return torch.where((backward_actions == 1)[:, None], shifted, shortened)

    def backward_action(self, states: Tensor, actions: Tensor) -> Tensor:
        if not self.both_ends:
            return torch.zeros_like(actions)
        return ((actions >= self.empty) & (actions != self.exit_action)).long()

    def forward_action(self, states: Tensor, backward_actions: Tensor) -> Tensor:
        last = states.gather(1, self.lengths(states)[:, None] - 1)[:, 0].long()
        if not self.both_ends:
            return last
        return torch.where(backward_actions == 1, states[:, 0].long() + self.empty, last)

    def objects(self, states: Tensor) -> Objects:
        points = self._code_points[states.cpu().numpy()]
        characters = points.shape[1] * points.shape[2]
        return points.reshape(len(states), characters).view(f"<U{characters}")[:, 0].tolist()

    def states(self, objects: Objects) -> Tensor:
        number = {symbol: index for index, symbol in enumerate(self.alphabet)}
        size, allowed = len(self.alphabet[0]), self._allowed.tolist()
        rows = []
        for value in objects:
            text = str(value)
            symbols = [number.get(text[i : i + size], -1) for i in range(0, len(text), size)]
            if -1 in symbols or not self.min_length <= len(symbols) <= self.max_length:
                raise ValueError(
                    f"{text!r} is no sequence of {self.min_length} to {self.max_length} "
                    f"symbols out of {' '.join(self.alphabet[:20])}"
                )
            if not all(allowed[place][symbol] for place, symbol in enumerate(symbols)):
                raise ValueError(f"{text!r} has a symbol in a place where it is not allowed")
            rows.append(symbols + [self.empty] * (self.max_length - len(symbols)))
        return torch.tensor(rows, dtype=torch.int32).reshape(-1, self.max_length)

    def log_path_count(self, states: Tensor) -> Tensor:
        if not self.both_ends:
            return torch.zeros(states.shape[0], dtype=torch.float64, device=states.device)
        return (self.lengths(states) - 1).clamp(min=0).double() * math.log(2)


@njit(nogil=True)
def _length(state, empty):  # type: ignore[no-untyped-def]
    length = state.size
    while length > 0 and state[length - 1] == empty:
        length -= 1
    return length


@njit(nogil=True)
def _forward_mask(state, constants, out):  # type: ignore[no-untyped-def]
    size, min_length, both_ends = constants[0], constants[1], constants[2]
    length = _length(state, size)
    for symbol in range(size):
        legal = length < state.size and constants[3 + length * size + symbol] == 1
        out[symbol] = legal
        if both_ends:
            out[size + symbol] = legal and length > 0
    out[out.size - 1] = length >= min_length


@njit(nogil=True)
def _step(state, action, constants):  # type: ignore[no-untyped-def]
    size = constants[0]
    length = _length(state, size)
    if action < size:
        state[length] = action
        return
    for place in range(length, 0, -1):
        state[place] = state[place - 1]
    state[0] = action - size


@njit(nogil=True)
def _backward_mask(state, constants, out):  # type: ignore[no-untyped-def]
    length = _length(state, constants[0])
    out[0] = length > 0
    if constants[2]:
        out[1] = length > 1


@njit(nogil=True)
def _backward_step(state, backward_action, constants):  # type: ignore[no-untyped-def]
    size = constants[0]
    length = _length(state, size)
    if backward_action == 0:
        action = state[length - 1]
    else:
        action = state[0] + size
        for place in range(length - 1):
            state[place] = state[place + 1]
    state[length - 1] = size
    return action
