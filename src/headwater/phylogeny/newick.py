"""Newick text into merges and lengths, compiled: about ten microseconds a tree of 27 taxa.

Labels are looked up by hash (FNV-1a) and then compared byte for byte.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from headwater.native import kept_njit
from headwater.phylogeny.trees import Floats, Ints

FAULTS = {
    1: "{label!r} is none of the taxa",
    2: "{label!r} comes twice",
    3: "a multifurcation: a node of {count} children; trees must be binary, but for three subtrees at an unrooted top",
    4: "a node with one child",
    5: "not Newick: brackets or commas do not fit",
    6: "{count} taxa of {taxa}",
    7: "a branch length that is not a number, or is negative",
    8: "{count} branch lengths; all edges must have one, or none",
}
"""What is wrong with a tree, by the code that `parse` gives."""


@kept_njit()
def _hash(text: NDArray[np.uint8], start: int, stop: int) -> np.uint64:  # pragma: no cover - compiled
    value = np.uint64(14695981039346656037)
    for i in range(start, stop):
        value = (value ^ np.uint64(text[i])) * np.uint64(1099511628211)
    return value


@kept_njit()
def label_table(labels: NDArray[np.uint8], starts: NDArray[np.int64]) -> NDArray[np.int64]:  # pragma: no cover
    """An open hash table of the labels that lie one after another: the number of one, or -1."""
    size = 4
    while size < 3 * len(starts):
        size *= 2
    table = np.full(size, -1, dtype=np.int64)
    for i in range(len(starts) - 1):
        slot = np.int64(_hash(labels, starts[i], starts[i + 1]) & np.uint64(size - 1))
        while table[slot] >= 0:
            slot = (slot + 1) % size
        table[slot] = i
    return table


@kept_njit()
def _find(
    text: NDArray[np.uint8], start: int, stop: int, table: NDArray[np.int64], labels: NDArray[np.uint8],
    starts: NDArray[np.int64],
) -> int:  # fmt: skip  # pragma: no cover - compiled
    size = len(table)
    slot = np.int64(_hash(text, start, stop) & np.uint64(size - 1))
    while table[slot] >= 0:
        i = table[slot]
        if starts[i + 1] - starts[i] == stop - start:
            same = True
            for j in range(stop - start):
                if labels[starts[i] + j] != text[start + j]:
                    same = False
                    break
            if same:
                return i
        slot = (slot + 1) % size
    return -1


@kept_njit()
def _number(text: NDArray[np.uint8], start: int, stop: int) -> tuple[float, int]:  # pragma: no cover - compiled
    """A decimal number at `start`, and where it ends; the end is -1 where there is none."""
    i, negative, digits, mantissa, exponent = start, False, 0, np.int64(0), 0
    if i < stop and (text[i] == 45 or text[i] == 43):
        negative = text[i] == 45
        i += 1
    point = False
    while i < stop:
        c = text[i]
        if 48 <= c <= 57:
            if mantissa < 100000000000000000:
                mantissa = mantissa * 10 + (np.int64(c) - 48)
                exponent -= 1 if point else 0
            else:
                exponent += 0 if point else 1
            digits += 1
        elif c == 46 and not point:
            point = True
        else:
            break
        i += 1
    if digits == 0:
        return 0.0, -1
    if i < stop and (text[i] == 101 or text[i] == 69):
        i += 1
        down = i < stop and text[i] == 45
        if i < stop and (text[i] == 45 or text[i] == 43):
            i += 1
        power, seen = 0, 0
        while i < stop and 48 <= text[i] <= 57:
            if power < 10000:
                power = power * 10 + (text[i] - 48)
            seen += 1
            i += 1
        if seen == 0:
            return 0.0, -1
        exponent += -power if down else power
    value = np.float64(mantissa)
    if exponent < 0:
        value = value / 10.0 ** (-exponent) if exponent > -300 else value / 1e290 / 10.0 ** (-exponent - 290)
    else:
        value = value * 10.0**exponent
    return (-value if negative else value), i


@kept_njit()
def parse(
    text: NDArray[np.uint8], spans: NDArray[np.int64], table: NDArray[np.int64], labels: NDArray[np.uint8],
    starts: NDArray[np.int64], leaf: Ints, merges: Ints, lengths: Floats, given: NDArray[np.bool_],
) -> tuple[int, int, int, int]:  # fmt: skip  # pragma: no cover - compiled
    """Fill the trees; (tree, fault, position, number) of the first fault, whose code is a key of `FAULTS`, or 0."""
    trees, joins, _ = merges.shape
    n = joins + 1
    nodes = np.empty(4 * n, dtype=np.int64)  # open nodes and, as -1, open brackets
    above = np.empty(4 * n)
    seen = np.empty(n, dtype=np.int64)
    seen[:] = -1
    for t in range(trees):
        i, stop = spans[t, 0], spans[t, 1]
        top, depth, made, found, measured = 0, 0, 0, 0, 0
        expect = True  # a subtree must come next
        done = False
        while i < stop:
            c = text[i]
            if c <= 32:
                i += 1
            elif c == 91:  # a comment
                while i < stop and text[i] != 93:
                    i += 1
                i += 1
            elif c == 40:  # (
                if not expect or done or depth > 2 * n:
                    return t, 5, i, 0
                nodes[top] = -1
                top += 1
                depth += 1
                i += 1
            elif c == 44:  # ,
                if expect or depth == 0:
                    return t, 5, i, 0
                expect = True
                i += 1
            elif c == 41:  # )
                if expect or depth == 0:
                    return t, 5, i, 0
                children = 0
                while nodes[top - 1 - children] >= 0:
                    children += 1
                base = top - children
                if children == 1:
                    return t, 4, i, 1
                if children > 3 or (children == 3 and depth > 1):
                    return t, 3, i, children
                if made + children - 1 > joins or (depth == 1 and found != n):
                    return t, 6, i, found
                last = base
                if children == 3:
                    merges[t, made, 0], merges[t, made, 1] = nodes[base], nodes[base + 1]
                    lengths[t, made, 0], lengths[t, made, 1] = above[base], above[base + 1]
                    nodes[base + 1], above[base + 1] = n + made, 0.0
                    made += 1
                    last = base + 1
                merges[t, made, 0], merges[t, made, 1] = nodes[last], nodes[last + 1]
                if depth == 1:
                    lengths[t, made, 0], lengths[t, made, 1] = above[last] + above[last + 1], 0.0
                else:
                    lengths[t, made, 0], lengths[t, made, 1] = above[last], above[last + 1]
                top = base
                nodes[top - 1] = n + made
                above[top - 1] = 0.0
                made += 1
                depth -= 1
                done = depth == 0
                edges = 2 * n - 3 if children == 3 else 2 * n - 2
                if done and measured != 0 and measured != edges:
                    return t, 8, i, measured
                given[t] = measured > 0
                i += 1
            elif c == 58:  # a length
                i += 1
                while i < stop and (text[i] <= 32 or text[i] == 91):
                    if text[i] == 91:
                        while i < stop and text[i] != 93:
                            i += 1
                    i += 1
                value, end = _number(text, i, stop)
                after = text[end] if 0 <= end < stop else 32
                whole = end >= 0 and (after <= 32 or after == 41 or after == 44 or after == 91)
                if not whole or expect or not value >= 0.0 or not value < 1e300:
                    return t, 7, i, 0
                if not done:
                    above[top - 1] = value
                    measured += 1
                i = end
            else:  # a label
                begin = i
                if c == 39:
                    i += 1
                    while i < stop and (text[i] != 39 or (i + 1 < stop and text[i + 1] == 39)):
                        i += 2 if text[i] == 39 else 1
                    left, right = begin + 1, i
                    i += 1
                else:
                    while (
                        i < stop
                        and text[i] > 32
                        and not (text[i] == 40 or text[i] == 41 or text[i] == 44 or text[i] == 58 or text[i] == 91)
                    ):
                        i += 1
                    left, right = begin, i
                if not expect:  # the name or support of an inner node
                    continue
                word = _find(text, left, right, table, labels, starts)
                if word < 0:
                    return t, 1, begin, 0
                v = leaf[word]
                if seen[v] == t:
                    return t, 2, begin, 0
                seen[v] = t
                nodes[top] = v
                above[top] = 0.0
                top += 1
                found += 1
                expect = False
        if not done:
            return t, 5, stop - 1, 0
    return -1, 0, 0, 0
