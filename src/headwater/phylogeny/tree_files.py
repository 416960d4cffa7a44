"""Trees from Newick and NEXUS files, such as MrBayes' `.t` and `.trprobs`.

A posterior sample has a hundred thousand trees, for which Biopython and DendroPy make an object a node; `newick.py`
reads them at ten times their speed and more, and its errors say which tree is at fault.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import numpy as np

from headwater.phylogeny.data import taxa_difference
from headwater.phylogeny.newick import FAULTS, label_table, parse
from headwater.phylogeny.nexus import commands, first_word, unquoted, without_comments
from headwater.phylogeny.trees import Floats, Trees

LARGEST_FILE = 2_000_000_000
"""Bytes."""

_HEAD = re.compile(
    rb"\bu?tree\s+\*?\s*('(?:[^']|'')*'|[^\s=\[]+)\s*((?:\[[^\]]{0,1000}\]\s*)*)=\s*((?:\[[^\]]{0,1000}\]\s*)*)",
    re.IGNORECASE,
)
_BODY = re.compile(rb"([^;']*+(?:'[^']*+'[^;']*+)*+);")
_BEGIN = re.compile(rb"\bbegin\s+trees\s*;", re.IGNORECASE)
_WEIGHT = re.compile(rb"&\s*w\s+([-+.\deE]+)(?:\s*/\s*([-+.\deE]+))?", re.IGNORECASE)
_PROBABILITY = re.compile(rb"&[^\]]*\bprob(?:ability)?\s*=\s*([-+.\deE]+)", re.IGNORECASE)
_LEAF = re.compile(r"(?<=[(,])\s*('(?:[^']|'')*'|[^\s,:()\[\];']+)")
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
    the two edges at its root. Weights are those of [&W ...] or [&prob=...] comments. An underscore in the file may
    stand for a blank in a name.

    Raises TreeFileError, a ValueError: for other taxa than the alignment's, listing the difference both ways; a
    multifurcation other than the three subtrees at an unrooted top; a node of one child; lengths that are missing in
    part, negative or no numbers; a file without trees, not text, or too large. Raises OSError where there is no file.
    """
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
    if not 0 <= burn_in < 1:
        raise ValueError(f"burn_in {burn_in}: must be a share, at least 0 and below 1")
    content = content.encode("utf-8") if isinstance(content, str) else content
    content = content.removeprefix(b"\xef\xbb\xbf")
    statements, translate = _statements(content, source)
    if not statements:
        raise TreeFileError(f"{source}: no trees; a tree ends with ';'")
    first = int(burn_in * len(statements))
    statements = statements[first:]
    spans = [statement.span for statement in statements]
    labels = _labels(content[slice(*spans[0])], translate)
    # An unquoted underscore may be a blank's: DendroPy and others write them so.
    blanks = {name.replace(" ", "_"): name for name in taxa or () if " " in name}
    translate |= {word: name for word, name in blanks.items() if word not in (taxa or ())}
    labels = [translate.get(label, label) for label in labels]
    if taxa is None:
        taxa = list(dict.fromkeys(translate.values() if set(translate.values()) >= set(labels) else labels))
    elif len(set(labels)) == len(labels) and (difference := taxa_difference(set(labels), set(taxa))):
        raise TreeFileError(f"{source}, tree {first + 1}: other taxa than the alignment's: {difference}")
    trees = _parsed(content, spans, list(taxa), translate, source, first)
    weights = np.array([_weight(statement.comments) for statement in statements])
    names = tuple(unquoted(statement.name.decode("utf-8", "replace")) for statement in statements)
    return TreeSample(trees, weights, names if any(names) else ())


class _Statement(NamedTuple):
    """One tree in the text: its name and comments, empty in a Newick file, and where its Newick stands."""

    name: bytes
    comments: bytes
    span: tuple[int, int]


def _statements(content: bytes, source: str) -> tuple[list[_Statement], dict[str, str]]:
    """Every tree of the text, and the names that its numbers stand for."""
    found: list[_Statement] = []
    translate: dict[str, str] = {}
    at, nexus = 0, content.lstrip()[:6].lower() == b"#nexus"
    if nexus:
        if (begin := _BEGIN.search(content)) is None:
            raise TreeFileError(f"{source}: a NEXUS file without a TREES block")
        at = begin.end()
    while at < len(content):
        head = _HEAD.search(content, at) if nexus else None
        if nexus and head is None:
            break
        if head and not found:
            translate = _translation(content[at : head.start()])
        start = head.end() if head else at
        if (body := _BODY.match(content, start)) is None:
            if not nexus and not content[start:].strip():
                break
            line = content.count(b"\n", 0, start) + 1
            raise TreeFileError(f"{source}, line {line}: a tree without a ';' at its end, or a quotation mark too many")
        at = body.end()
        if head:
            found.append(_Statement(head[1], head[2] + head[3], body.span(1)))
        elif body[1].strip():
            found.append(_Statement(b"", body[1][:100], body.span(1)))
    return found, translate


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
    text = without_comments(tree.decode("utf-8", "replace"))
    words = [unquoted(match[1]) for match in _LEAF.finditer(text)]
    return [translate.get(word, word) for word in words]


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
    words |= {word.replace("'", "''"): i for word, i in words.items() if "'" in word}  # as it stands between quotes
    encoded = [word.encode("utf-8") for word in words]
    starts = np.cumsum([0, *map(len, encoded)])
    label_bytes = np.frombuffer(b"".join(encoded) or b" ", dtype=np.uint8)
    table = label_table(label_bytes, starts)
    leaf = np.array(list(words.values()), dtype=np.int32)
    count = len(spans)
    merges = np.empty((count, len(taxa) - 1, 2), dtype=np.int32)
    lengths = np.zeros((count, len(taxa) - 1, 2))
    given = np.zeros(count, dtype=np.bool_)
    text = np.frombuffer(content, dtype=np.uint8)
    tree, fault, position, number = parse(
        text, np.array(spans, dtype=np.int64), table, label_bytes, starts, leaf, merges, lengths, given
    )
    if fault:
        line = content.count(b"\n", 0, position) + 1
        word = _WORD.match(content[position : position + 200].decode("utf-8", "replace"))
        said = FAULTS[fault].format(label=unquoted(word[0]) if word else "", count=number, taxa=len(taxa))
        raise TreeFileError(f"{source}, line {line}, tree {first + tree + 1}: {said}")
    if given.any() and not given.all():
        without = int(np.flatnonzero(~given)[0])
        raise TreeFileError(f"{source}, tree {first + without + 1}: no branch lengths, where other trees have them")
    return Trees(tuple(taxa), merges, lengths if given.all() else None)
