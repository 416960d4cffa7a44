"""Trees from Newick and NEXUS files, such as MrBayes' `.t` and `.trprobs`.

The Newick reader is our own and compiled: a posterior sample has a hundred thousand trees, and its taxa and shape are
to be checked with errors that say which tree. Labels are looked up by hash (FNV-1a) and compared byte for byte.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from headwater.native import kept_njit
from headwater.phylogeny.data import taxa_difference
from headwater.phylogeny.nexus import commands, first_word, unquoted
from headwater.phylogeny.trees import Floats, Ints, Trees

LARGEST_FILE = 2_000_000_000
"""Bytes."""

_TREE = re.compile(
    rb"\bu?tree\s+\*?\s*('(?:[^']|'')*'|[^\s=\[]+)\s*((?:\[[^\]]*\]\s*)*)=\s*((?:\[[^\]]*\]\s*)*)"
    rb"([^;']*(?:'[^']*'[^;']*)*);",
    re.IGNORECASE,
)
_ONE = re.compile(rb"([^;']*(?:'[^']*'[^;']*)*);")
_BEGIN = re.compile(rb"\bbegin\s+trees\s*;", re.IGNORECASE)
_WEIGHT = re.compile(rb"&\s*w\s+([-+.\deE]+)(?:\s*/\s*([-+.\deE]+))?", re.IGNORECASE)
_PROBABILITY = re.compile(rb"&[^\]]*\bprob(?:ability)?\s*=\s*([-+.\deE]+)", re.IGNORECASE)
_WORD = re.compile(r"'(?:[^']|'')*'|[^\s,:()\[\];]+")


class TreeFileError(ValueError):
    """A tree file that cannot be used; the message says which tree and why."""


@dataclass(frozen=True)
class TreeSample:
    """Trees of a file. weights: float64 `[T]`, as the file gives them, or 1 each. names: of the trees in the file."""

    trees: Trees
    weights: Floats
    names: tuple[str, ...] = ()


def read_trees(path: str | Path, taxa: Sequence[str] | None = None, burn_in: float = 0.0) -> TreeSample:
    """The trees of a Newick or NEXUS file, unrooted and binary.

    taxa: of the alignment, in its order; None takes those of the file's first tree or its translate block. burn_in: the
    share of the trees, from the first, that is left out, as MrBayes' burninfrac. A rooted tree is unrooted by joining
    the two edges at its root. Weights are those of [&W ...] or [&prob=...] comments.

    Raises TreeFileError, a ValueError: for other taxa than the alignment's, listing the difference both ways; a
    multifurcation other than the three subtrees at an unrooted top; a node of one child; lengths that are missing in
    part, negative or no numbers; a file without trees, not text, or too large. Raises OSError where there is no file.
    """
    if not 0 <= burn_in < 1:
        raise ValueError(f"burn_in {burn_in}: must be a share, at least 0 and below 1")
    path = Path(path)
    if (size := path.stat().st_size) > LARGEST_FILE:
        raise TreeFileError(f"{path}: {size:,} bytes; at most {LARGEST_FILE:,} are read")
    content = path.read_bytes()
    if b"\0" in content or content[:2] == b"\x1f\x8b":
        raise TreeFileError(f"{path}: not a text file; give the trees as Newick or NEXUS")
    return parse_trees(content, taxa, burn_in, str(path))


def parse_trees(
    content: bytes | str, taxa: Sequence[str] | None = None, burn_in: float = 0.0, source: str = "trees"
) -> TreeSample:
    """`read_trees` of text already at hand; `source` is what errors call it."""
    content = content.encode("utf-8") if isinstance(content, str) else content
    content = content.removeprefix(b"\xef\xbb\xbf")
    translate: dict[str, str] = {}
    if content.lstrip()[:6].lower() == b"#nexus":
        begin = _BEGIN.search(content)
        if begin is None:
            raise TreeFileError(f"{source}: a NEXUS file without a TREES block")
        matches = list(_TREE.finditer(content, begin.end()))
        translate = _translation(content[begin.end() : matches[0].start()]) if matches else {}
        spans = [match.span(4) for match in matches]
        names = [match[1].decode("utf-8", "replace") for match in matches]
        weights = [_weight(match[2] + match[3]) for match in matches]
    else:
        matches = [match for match in _ONE.finditer(content) if match[1].strip()]
        spans, names, weights = [match.span(1) for match in matches], [], [_weight(match[1][:80]) for match in matches]
    if not spans:
        raise TreeFileError(f"{source}: no trees; a tree ends with ';'")
    first = int(burn_in * len(spans))
    labels = _labels(content[slice(*spans[first])], translate)
    found = list(dict.fromkeys(translate.values() if set(translate.values()) >= set(labels) else labels))
    if taxa is None:
        taxa = found if len(found) == len(labels) else labels
    elif difference := taxa_difference(set(labels), set(taxa)):
        raise TreeFileError(f"{source}, tree {first + 1}: other taxa than the alignment's: {difference}")
    trees = _parsed(content, spans[first:], list(taxa), translate, source, first)
    return TreeSample(trees, np.array(weights[first:]), tuple(unquoted(name) for name in names[first:]))


def _translation(header: bytes) -> dict[str, str]:
    for _, word, rest in commands(header.decode("utf-8", "replace") + ";"):
        if word == "translate":
            pairs = [first_word(pair) for pair in re.split(r",(?=(?:[^']*'[^']*')*[^']*$)", rest) if pair.strip()]
            return {unquoted(key): unquoted(name.strip()) for key, name in pairs}
    return {}


def _weight(comments: bytes) -> float:
    if b"&" not in comments:
        return 1.0
    if match := _WEIGHT.search(comments):
        return float(match[1]) / float(match[2] or 1)
    return float(match[1]) if (match := _PROBABILITY.search(comments)) else 1.0


def _labels(tree: bytes, translate: Mapping[str, str]) -> list[str]:
    """The taxa of one Newick tree in the order in which they come."""
    text = re.sub(r"\[[^\]]*\]", "", tree.decode("utf-8", "replace"))
    words = [unquoted(match[0]) for match in re.finditer(r"(?<=[(,])\s*('(?:[^']|'')*'|[^\s,:()\[\];']+)", text)]
    words = [unquoted(word.strip()) for word in words]
    return [translate.get(word, word) for word in words]


_FAULTS = {
    1: "{label!r} is none of the taxa",
    2: "{label!r} comes twice",
    3: "a multifurcation (a node of {count} children); only binary trees can be read, with three subtrees at an unrooted top",
    4: "a node with one child",
    5: "not Newick: brackets or commas do not fit",
    6: "{count} taxa of {taxa}",
    7: "a branch length that is not a number, or is negative",
    8: "{count} branch lengths; all edges must have one, or none",
}


def _parsed(
    content: bytes,
    spans: Sequence[tuple[int, int]],
    taxa: list[str],
    translate: Mapping[str, str],
    source: str,
    first: int,
) -> Trees:
    words = {name: i for i, name in enumerate(taxa)}
    words |= {key: words[name] for key, name in translate.items() if name in words}
    encoded = [word.encode("utf-8") for word in words]
    starts = np.cumsum([0, *map(len, encoded)])
    label_bytes = np.frombuffer(b"".join(encoded) or b" ", dtype=np.uint8)
    table = _label_table(label_bytes, starts)
    leaf = np.array(list(words.values()), dtype=np.int32)
    count = len(spans)
    merges = np.empty((count, len(taxa) - 1, 2), dtype=np.int32)
    lengths = np.zeros((count, len(taxa) - 1, 2))
    given = np.zeros(count, dtype=np.bool_)
    text = np.frombuffer(content, dtype=np.uint8)
    tree, fault, position, number = _parse(
        text, np.array(spans, dtype=np.int64), table, label_bytes, starts, leaf, merges, lengths, given
    )
    if fault:
        line = content.count(b"\n", 0, position) + 1
        label = unquoted((_WORD.match(content[position : position + 200].decode("utf-8", "replace")) or [""])[0])
        said = _FAULTS[fault].format(label=label, count=number, taxa=len(taxa))
        raise TreeFileError(f"{source}, line {line}, tree {first + tree + 1}: {said}")
    if given.any() and not given.all():
        without = int(np.flatnonzero(~given)[0])
        raise TreeFileError(f"{source}, tree {first + without + 1}: no branch lengths, where other trees have them")
    return Trees(tuple(taxa), merges, lengths if given.all() else None)


@kept_njit()
def _hash(text: NDArray[np.uint8], start: int, stop: int) -> np.uint64:  # pragma: no cover - compiled
    value = np.uint64(14695981039346656037)
    for i in range(start, stop):
        value = (value ^ np.uint64(text[i])) * np.uint64(1099511628211)
    return value


@kept_njit()
def _label_table(labels: NDArray[np.uint8], starts: NDArray[np.int64]) -> NDArray[np.int64]:  # pragma: no cover
    """An open hash table: the number of a label, or -1."""
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
            power = min(power * 10 + (np.int64(text[i]) - 48), 10000)
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
def _parse(
    text: NDArray[np.uint8], spans: NDArray[np.int64], table: NDArray[np.int64], labels: NDArray[np.uint8],
    starts: NDArray[np.int64], leaf: Ints, merges: Ints, lengths: Floats, given: NDArray[np.bool_],
) -> tuple[int, int, int, int]:  # fmt: skip  # pragma: no cover - compiled
    """Fill the trees; (tree, fault, position, number) of the first fault, whose code is a key of `_FAULTS`, or 0."""
    trees, joins, _ = merges.shape
    n = joins + 1
    nodes = np.empty(4 * n + 8, dtype=np.int64)  # open nodes and, as -1, open brackets
    above = np.empty(4 * n + 8)
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
                if not expect or done or top >= 4 * n + 4:
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
                if end < 0 or expect or not value >= 0.0 or not value < 1e300:
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
            if top > 0 and i > 0 and text[i - 1] == 41:
                expect = False
        if not done:
            return t, 5, stop - 1, 0
    return -1, 0, 0, 0
