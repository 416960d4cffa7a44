"""Inverse folding as a construction problem: fill the positions of a given RNA secondary structure, both ends of a
pair at once.

Only canonical pairs (G-C, A-U and the G-U wobble) are offered where the structure has a pair, so that every sequence
that is built can fold into it; how surely it does is the reward's question.
"""

from __future__ import annotations

import torch
from torch import Tensor

from headwater.environments.base import Objects
from headwater.environments.sequences import Sequences

FILLINGS = ("A-", "C-", "G-", "U-", "GC", "CG", "AU", "UA", "GU", "UG")
"""What one step writes: a base into an unpaired position, or the bases of a pair into its first and second position."""

_UNPAIRED = 4
_SMALLEST_HAIRPIN = 3
"""Unpaired bases that the backbone needs to turn round; ViennaRNA forbids tighter loops as nature does."""


class InverseFolding(Sequences):
    """Sequences for a dot-bracket structure: one slot for each unpaired position and each pair, filled in the order of
    their first positions with the `FILLINGS` that fit.

    Objects are strings as long as the structure, 4^unpaired * 6^pairs of them, each built in one way only. Raises
    ValueError for a structure that `pair_table` refuses.
    """

    def __init__(self, structure: str) -> None:
        partners = pair_table(structure)
        self.structure = structure
        self.slots = [(i, partner) for i, partner in enumerate(partners) if partner < 0 or partner > i]
        """The positions of each slot, from 0: (position, -1) for an unpaired base, (first, second) for a pair."""
        paired = torch.tensor([partner >= 0 for _, partner in self.slots])
        allowed = paired[:, None] == (torch.arange(len(FILLINGS)) >= _UNPAIRED)
        super().__init__(FILLINGS, len(self.slots), allowed=allowed)

    def objects(self, states: Tensor) -> Objects:
        """RNA strings; every slot of `states` must be filled. Raises ValueError if one is not."""
        if bool((states == self.empty).any()):
            raise ValueError("a sequence with empty slots is not finished")
        sequences = []
        for row in states.tolist():
            letters = [""] * len(self.structure)
            for (first, second), filling in zip(self.slots, row, strict=True):
                letters[first] = FILLINGS[filling][0]
                if second >= 0:
                    letters[second] = FILLINGS[filling][1]
            sequences.append("".join(letters))
        return sequences

    def states(self, objects: Objects) -> Tensor:
        rows = [self._row(str(value)) for value in objects]
        return torch.tensor(rows, dtype=torch.int32).reshape(-1, self.width)

    def _row(self, sequence: str) -> list[int]:
        if len(sequence) != len(self.structure):
            raise ValueError(f"{sequence!r} has {len(sequence)} bases, the structure {len(self.structure)} positions")
        row = []
        for first, second in self.slots:
            filling = sequence[first] + (sequence[second] if second >= 0 else "-")
            if filling not in FILLINGS:
                where = f"position {first + 1}" if second < 0 else f"the pair of positions {first + 1} and {second + 1}"
                raise ValueError(f"{sequence!r} has {filling.strip('-')!r} at {where}, which cannot stand there")
            row.append(FILLINGS.index(filling))
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
