"""Inverse folding as a construction problem: fill the positions of a given RNA secondary structure, both ends of a
pair at once.

Only canonical pairs (G-C, A-U and the G-U wobble) are offered where the structure has a pair, so that every sequence
that is built can fold into it; how surely it does is the reward's question.
"""

from __future__ import annotations

import math

import numpy as np
import torch
from numba import njit
from torch import Tensor

from headwater.environments.base import Environment, Native, Objects, Tokens

FILLINGS = ("A", "C", "G", "U", "GC", "CG", "AU", "UA", "GU", "UG")
"""What one step writes: a base into an unpaired position, or the bases of a pair into its first and second position."""

_UNPAIRED = 4
_SMALLEST_HAIRPIN = 3
"""Unpaired bases that the backbone needs to turn round; ViennaRNA forbids tighter loops as nature does."""


class InverseFolding(Environment):
    """Sequences for a dot-bracket structure, one slot for each unpaired position and each pair, filled in the order of
    their first positions.

    States are `[N, slots]`: 0 for an empty slot, else 1 + index into `FILLINGS`. Action a writes `FILLINGS[a]`; only a
    full state may exit. Objects are strings as long as the structure, 4^unpaired * 6^pairs of them, each built in one
    way only. Raises ValueError for a structure that `pair_table` refuses.
    """

    def __init__(self, structure: str) -> None:
        partners = pair_table(structure)
        self.structure = structure
        self.slots = [(i, partner) for i, partner in enumerate(partners) if partner < 0 or partner > i]
        """The positions of each slot, from 0: (position, -1) for an unpaired base, (first, second) for a pair."""
        self.width = len(self.slots)
        self.n_actions = len(FILLINGS) + 1
        self.n_backward_actions = 1
        self.max_steps = self.width + 1
        self.feature_type = Tokens(length=self.width, vocabulary=len(FILLINGS) + 1)
        paired = torch.tensor([partner >= 0 for _, partner in self.slots])
        allowed = paired[:, None] == (torch.arange(len(FILLINGS)) >= _UNPAIRED)
        full = torch.zeros(1, len(FILLINGS), dtype=torch.bool)
        # Row k is the forward mask of a state with k slots filled; the last column is exit.
        self._masks = torch.cat(
            [torch.cat([allowed, full]), torch.arange(self.width + 1)[:, None] == self.width], dim=1
        )
        constants = paired.numpy().astype(np.int64)
        self.native = Native(_forward_mask, _step, _backward_mask, _backward_step, constants)

    @property
    def log_object_count(self) -> float:
        """Log of the number of sequences that can be built."""
        pairs = sum(partner >= 0 for _, partner in self.slots)
        return (self.width - pairs) * math.log(_UNPAIRED) + pairs * math.log(len(FILLINGS) - _UNPAIRED)

    def initial(self, count: int) -> Tensor:
        return torch.zeros(count, self.width, dtype=torch.int32)

    def forward_mask(self, states: Tensor) -> Tensor:
        return self._masks.to(states.device)[_filled(states)]

    def backward_mask(self, states: Tensor) -> Tensor:
        return states[:, :1] > 0

    def step(self, states: Tensor, actions: Tensor) -> Tensor:
        return states.scatter(1, _filled(states)[:, None], (actions + 1).to(states.dtype)[:, None])

    def backward_step(self, states: Tensor, backward_actions: Tensor) -> Tensor:
        return states.scatter(1, _filled(states)[:, None] - 1, 0)

    def backward_action(self, states: Tensor, actions: Tensor) -> Tensor:
        return torch.zeros_like(actions)

    def forward_action(self, states: Tensor, backward_actions: Tensor) -> Tensor:
        return states.gather(1, _filled(states)[:, None] - 1)[:, 0].to(torch.int64) - 1

    def features(self, states: Tensor) -> Tensor:
        return states

    def objects(self, states: Tensor) -> Objects:
        """RNA strings; every slot of `states` must be filled. Raises ValueError if one is not."""
        if bool((states == 0).any()):
            raise ValueError("a sequence with empty slots is not finished")
        sequences = []
        for row in states.tolist():
            letters = [""] * len(self.structure)
            for (first, second), value in zip(self.slots, row, strict=True):
                filling = FILLINGS[value - 1]
                letters[first] = filling[0]
                if second >= 0:
                    letters[second] = filling[1]
            sequences.append("".join(letters))
        return sequences

    def states(self, objects: Objects) -> Tensor:
        rows = [self._row(str(value)) for value in objects]
        return torch.tensor(rows, dtype=torch.int32).reshape(-1, self.width)

    def log_path_count(self, states: Tensor) -> Tensor:
        return torch.zeros(states.shape[0], dtype=torch.float64, device=states.device)

    def _row(self, sequence: str) -> list[int]:
        if len(sequence) != len(self.structure):
            raise ValueError(f"{sequence!r} has {len(sequence)} bases, the structure {len(self.structure)} positions")
        row = []
        for first, second in self.slots:
            filling = sequence[first] + (sequence[second] if second >= 0 else "")
            if filling not in FILLINGS:
                where = f"position {first + 1}" if second < 0 else f"the pair of positions {first + 1} and {second + 1}"
                raise ValueError(f"{sequence!r} has {filling!r} at {where}, which cannot stand there")
            row.append(FILLINGS.index(filling) + 1)
        return row


def pair_table(structure: str) -> list[int]:
    """The partner of each position of a dot-bracket structure, counted from 0, and -1 for an unpaired position.

    Raises ValueError, with positions counted from 1: for an empty structure, a character other than '.', '(' and ')',
    a bracket without its other half, or a hairpin loop of fewer than 3 bases, which no RNA can fold into.
    """
    if not structure:
        raise ValueError("structure: empty; write it in dot-bracket notation, such as ((((...))))")
    partners = [-1] * len(structure)
    still_open: list[int] = []
    for position, symbol in enumerate(structure):
        if symbol == "(":
            still_open.append(position)
        elif symbol == ")":
            if not still_open:
                raise ValueError(f"structure: the ')' at position {position + 1} closes nothing")
            partner = still_open.pop()
            partners[partner], partners[position] = position, partner
            inside = position - partner - 1
            if inside < _SMALLEST_HAIRPIN:
                raise ValueError(
                    f"structure: the pair of positions {partner + 1} and {position + 1} encloses {inside} bases; "
                    f"a hairpin loop needs at least {_SMALLEST_HAIRPIN}"
                )
        elif symbol != ".":
            hint = "; pseudoknots are not supported" if symbol in "[]{}<>" or symbol.isalpha() else ""
            raise ValueError(f"structure: {symbol!r} at position {position + 1}; legal are '.', '(' and ')'{hint}")
    if still_open:
        raise ValueError(f"structure: the '(' at position {still_open[-1] + 1} is never closed")
    return partners


def _filled(states: Tensor) -> Tensor:
    return (states > 0).sum(1)


@njit(nogil=True)
def _count(state):  # type: ignore[no-untyped-def]
    filled = 0
    while filled < state.size and state[filled] > 0:
        filled += 1
    return filled


@njit(nogil=True)
def _forward_mask(state, constants, out):  # type: ignore[no-untyped-def]
    filled = _count(state)
    out[:] = False
    if filled == state.size:
        out[out.size - 1] = True
    elif constants[filled] == 1:
        out[_UNPAIRED : out.size - 1] = True
    else:
        out[:_UNPAIRED] = True


@njit(nogil=True)
def _step(state, action, constants):  # type: ignore[no-untyped-def]
    state[_count(state)] = action + 1


@njit(nogil=True)
def _backward_mask(state, constants, out):  # type: ignore[no-untyped-def]
    out[0] = state[0] > 0


@njit(nogil=True)
def _backward_step(state, backward_action, constants):  # type: ignore[no-untyped-def]
    last = _count(state) - 1
    action = state[last] - 1
    state[last] = 0
    return action
