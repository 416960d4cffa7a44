"""Unrooted binary trees in batches, as arrays: merges with branch lengths, a canonical table, Newick and NEXUS text.

Leaves are nodes 0 .. n-1 and merge k makes node n + k of two nodes made before. The last merge joins the last two
trees: its node, the root, stands somewhere on an edge and means nothing.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import ArrayLike, NDArray

from headwater.native import kept_njit
from headwater.phylogeny.nexus import quoted
from headwater.phylogeny.walks import canonical_tables

Ints = NDArray[np.int32]
Floats = NDArray[np.float64]


@dataclass(frozen=True)
class Trees:
    """T unrooted trees over n taxa.

    merges: int32 `[T, n-1, 2]`, the two nodes that each merge joins. lengths: float64 `[T, n-1, 2]`, expected
    substitutions per site on the edge above each of the two; the one edge of the last merge has its whole length in
    column 0 and 0 in column 1. None where trees have no lengths.
    """

    taxa: tuple[str, ...]
    merges: Ints
    lengths: Floats | None = None

    def __post_init__(self) -> None:
        shape = (len(self.merges), len(self.taxa) - 1, 2)
        if len(self.taxa) < 3 or self.merges.shape != shape:
            raise ValueError(
                f"merges have shape {self.merges.shape}; of {len(self.taxa)} taxa it must be {shape}, n >= 3"
            )
        if self.lengths is not None and self.lengths.shape != shape:
            raise ValueError(f"lengths have shape {self.lengths.shape}; it must be {shape}, as of the merges")

    def __len__(self) -> int:
        return len(self.merges)

    def __getitem__(self, chosen: slice | NDArray[np.integer] | NDArray[np.bool_] | Sequence[int]) -> Trees:
        """The chosen trees: a slice, a mask or indices."""
        return Trees(self.taxa, self.merges[chosen], None if self.lengths is None else self.lengths[chosen])

    def canonical(self) -> Ints:
        """The canonical table of each tree, int32 `[T, 2(n-1)]`: equal rows are equal unrooted topologies.

        A tree is rooted at leaf 0 and each node named by b, the larger of the smallest leaves of its two children,
        which no other node has. Entries 2(b-1) and 2(b-1) + 1 are the children of node n-1+b, the one with the smaller
        smallest leaf first; node n is the root, with leaf 0 and the rest.
        """
        return canonical_tables(self.merges, np.zeros(self.merges.shape))[0]

    def canonical_lengths(self) -> Floats:
        """The lengths in the canonical table's order, float64 `[T, n-1, 2]`: above each child; the root's one edge in
        column 0 of its row. Raises ValueError where the trees have none.
        """
        tables, above = canonical_tables(self.merges, self._some_lengths())
        lengths = np.take_along_axis(above, tables.astype(np.int64), axis=1).reshape(self.merges.shape)
        lengths[:, 0, 1] = 0  # the root's two edges are one
        return lengths

    def relabelled(self, taxa: Sequence[str]) -> Trees:
        """The same trees with leaves numbered as in `taxa`. Raises ValueError unless these are the same names."""
        if set(taxa) != set(self.taxa) or len(taxa) != len(self.taxa):
            raise ValueError(f"taxa {list(taxa)}: must be the trees' own {list(self.taxa)} in any order")
        place = {name: i for i, name in enumerate(taxa)}
        number = np.arange(2 * len(taxa) - 1, dtype=np.int32)
        number[: len(taxa)] = [place[name] for name in self.taxa]
        return Trees(tuple(taxa), number[self.merges].astype(np.int32), self.lengths)

    def newick(self, names: Sequence[str] | None = None) -> list[str]:
        """Each tree as Newick, unrooted: leaf 0 and two subtrees at the top; equal trees give equal text.

        names: other words for the taxa, written as they are.
        """
        names = [quoted(name) for name in self.taxa] if names is None else names
        tables = self.canonical().reshape(len(self), -1, 2).tolist()
        lengths = None if self.lengths is None else self.canonical_lengths().tolist()
        return [_newick(table, lengths[i] if lengths else None, names) for i, table in enumerate(tables)]

    def write_newick(self, path: str | Path) -> None:
        """One tree a line."""
        Path(path).write_text("".join(f"{tree}\n" for tree in self.newick()), encoding="utf-8")

    def write_nexus(self, path: str | Path, weights: ArrayLike | None = None, names: Iterable[str] = ()) -> None:
        """A NEXUS tree file with a translate block, as MrBayes, FigTree, DendroPy and Biopython read it.

        weights: probability of each tree, written as [&W ...]. names: of the trees, else tree_1, tree_2, ...
        """
        lines = ["#NEXUS", "", "begin trees;", "  translate"]
        lines += [f"    {i} {quoted(name)}," for i, name in enumerate(self.taxa, start=1)]
        lines[-1] = lines[-1][:-1] + ";"
        labels = list(names) or [f"tree_{i}" for i in range(1, len(self) + 1)]
        shares = [""] * len(self) if weights is None else [f"[&W {share:.6g}] " for share in np.asarray(weights)]
        numbered = self.newick([str(i) for i in range(1, len(self.taxa) + 1)])
        for label, share, text in zip(labels, shares, numbered, strict=True):
            lines.append(f"  tree {quoted(label)} = [&U] {share}{text}")
        Path(path).write_text("\n".join([*lines, "end;", ""]), encoding="utf-8")

    def _some_lengths(self) -> Floats:
        if self.lengths is None:
            raise ValueError("these trees have no branch lengths")
        return self.lengths


def from_canonical(taxa: Sequence[str], tables: Ints, lengths: Floats | None = None) -> Trees:
    """The trees of canonical tables `[T, 2(n-1)]` with lengths `[T, n-1, 2]` in the same order, merges in an order in
    which every node is made before it is joined.
    """
    count = len(taxa) - 1
    tables = np.ascontiguousarray(tables, dtype=np.int32).reshape(-1, count, 2)
    merges, order = _from_canonical(tables)
    return Trees(
        tuple(taxa), merges, None if lengths is None else np.take_along_axis(lengths, order[:, :, None], axis=1)
    )


def concatenated(parts: Sequence[Trees]) -> Trees:
    """One batch of several over the same taxa; lengths are kept where all have them."""
    lengths = [part.lengths for part in parts if part.lengths is not None]
    return Trees(
        parts[0].taxa,
        np.concatenate([part.relabelled(parts[0].taxa).merges for part in parts]),
        np.concatenate(lengths) if len(lengths) == len(parts) else None,
    )


def _newick(table: list[list[int]], lengths: list[list[float]] | None, names: Sequence[str]) -> str:
    count = len(names)

    def above(b: int, side: int) -> str:
        return "" if lengths is None else f":{lengths[b - 1][side]:.10g}"

    b = table[0][1] - count + 1
    text = ["(", names[0], above(1, 0), ","]
    # What is still to be written, the next last: without recursion, since a tree may be as deep as it has taxa.
    stack: list[int | str] = [");", above(b, 1), table[b - 1][1], ",", above(b, 0), table[b - 1][0]]
    while stack:
        item = stack.pop()
        if isinstance(item, str):
            text.append(item)
        elif item < count:
            text.append(names[item])
        else:
            b = item - count + 1
            text.append("(")
            stack += [")", above(b, 1), table[b - 1][1], ",", above(b, 0), table[b - 1][0]]
    return "".join(text)


@kept_njit()
def _from_canonical(tables: Ints) -> tuple[Ints, NDArray[np.int64]]:  # pragma: no cover - compiled
    """Merges `[T, n-1, 2]` and the row of the table that each came from `[T, n-1]`."""
    trees, joins, _ = tables.shape
    n = joins + 1
    merges = np.empty((trees, joins, 2), dtype=np.int32)
    order = np.empty((trees, joins), dtype=np.int64)
    stack = np.empty(2 * n, dtype=np.int64)
    place = np.empty(2 * n, dtype=np.int32)
    for v in range(n):
        place[v] = v
    for t in range(trees):
        # Parents first, then read backwards.
        stack[0] = 0
        top = 1
        found = joins
        while top > 0:
            top -= 1
            row = stack[top]
            found -= 1
            order[t, found] = row
            for side in range(2):
                child = tables[t, row, side]
                if child >= n:
                    stack[top] = child - n
                    top += 1
        for k in range(joins):
            row = order[t, k]
            for side in range(2):
                merges[t, k, side] = place[tables[t, row, side]]
            place[n + row] = n + k
    return merges, order
