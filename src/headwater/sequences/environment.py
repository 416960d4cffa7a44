"""Inverse folding as a construction problem: fill the positions of a given RNA secondary structure, both ends of a
pair at once.

Only canonical pairs (G-C, A-U and the G-U wobble) are offered where the structure has a pair, so that every sequence
that is built can fold into it; how surely it does is the reward's question.
"""

from __future__ import annotations

_SMALLEST_HAIRPIN = 3
"""Unpaired bases that the backbone needs to turn round; ViennaRNA forbids tighter loops as nature does."""


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
