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
        return _canonical(self.merges, np.empty((len(self), 0, 2)))[0].reshape(len(self), -1)

    def canonical_lengths(self) -> Floats:
        """The lengths in the canonical table's order, float64 `[T, n-1, 2]`: above each child; the root's one edge in
        column 0 of its row. Raises ValueError where the trees have none.
        """
        return _canonical(self.merges, self._some_lengths())[1]

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
def _canonical(merges: Ints, lengths: Floats) -> tuple[Ints, Floats]:  # pragma: no cover - compiled
    """Tables `[T, n-1, 2]` and, where lengths are given, the lengths in their order."""
    trees, joins, _ = merges.shape
    n = joins + 1
    with_lengths = lengths.shape[1] > 0
    tables = np.empty((trees, joins, 2), dtype=np.int32)
    ordered = np.zeros((trees, joins if with_lengths else 0, 2))
    parent = np.empty(2 * n, dtype=np.int64)
    above = np.zeros(2 * n)  # length of the edge to the parent
    at_left = np.empty(2 * n, dtype=np.int64)
    at_right = np.empty(2 * n, dtype=np.int64)
    smallest = np.empty(2 * n, dtype=np.int64)
    length = np.zeros(2 * n)
    name = np.empty(2 * n, dtype=np.int64)
    path = np.empty(2 * n, dtype=np.int64)
    root = 2 * n - 2
    for t in range(trees):
        for k in range(joins):
            for side in range(2):
                child = merges[t, k, side]
                parent[child] = n + k
                if with_lengths:
                    above[child] = lengths[t, k, side]
            at_left[n + k] = merges[t, k, 0]
            at_right[n + k] = merges[t, k, 1]
        for v in range(n):
            length[v] = above[v]
            smallest[v] = v
            name[v] = v
        for v in range(n, root):
            length[v] = above[v]
        # The two top nodes become neighbours: the edge between them has the whole length.
        a, b = at_left[root], at_right[root]
        whole = above[a] + above[b]
        length[a] = whole
        length[b] = whole
        # Turn the edges on the way from the top to leaf 0: what was the parent becomes a child.
        steps = 0
        path[0] = 0
        while path[steps] != root:
            path[steps + 1] = parent[path[steps]]
            steps += 1
        # path[0] is leaf 0 and path[steps-1] one of the two top nodes; its neighbour is the other.
        other = b if path[steps - 1] == a else a
        for i in range(1, steps):
            v = path[i]
            below = path[i - 1]
            new = path[i + 1] if i + 1 < steps else other
            if at_left[v] == below:
                at_left[v] = new
            else:
                at_right[v] = new
        # Lengths on that way now belong to the node on the far side from leaf 0.
        for i in range(steps - 1, 0, -1):
            length[path[i]] = above[path[i - 1]]
        if steps > 1:
            length[other] = whole
            rest = path[1]
            rest_length = above[0]
        else:  # leaf 0 is itself at the top
            rest = other
            rest_length = whole
        # Smallest leaves, children first: off the way in their old order, then the way from its far end.
        for k in range(joins - 1):
            v = n + k
            on_way = False
            for i in range(1, steps):
                on_way = on_way or path[i] == v
            if not on_way:
                smallest[v] = min(smallest[at_left[v]], smallest[at_right[v]])
                name[v] = n - 1 + max(smallest[at_left[v]], smallest[at_right[v]])
        for i in range(steps - 1, 0, -1):
            v = path[i]
            smallest[v] = min(smallest[at_left[v]], smallest[at_right[v]])
            name[v] = n - 1 + max(smallest[at_left[v]], smallest[at_right[v]])
        for k in range(joins - 1):
            v = n + k
            left, right = at_left[v], at_right[v]
            if smallest[left] > smallest[right]:
                left, right = right, left
            row = name[v] - n
            tables[t, row, 0] = name[left]
            tables[t, row, 1] = name[right]
            if with_lengths:
                ordered[t, row, 0] = length[left]
                ordered[t, row, 1] = length[right]
        tables[t, 0, 0] = 0
        tables[t, 0, 1] = name[rest]
        if with_lengths:
            ordered[t, 0, 0] = rest_length
    return tables, ordered


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
