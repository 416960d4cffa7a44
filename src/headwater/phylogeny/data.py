"""Alignments of DNA as sets of nucleotides, and the distinct columns that parsimony and likelihood are computed from.

A state is a set of bits, so that ambiguity codes need no rule of their own: A = 1, C = 2, G = 4, T = 8, unions for the
IUPAC codes, 15 for an unknown nucleotide ('?', 'N', 'X'), and 16 for a gap.
"""

from __future__ import annotations

import difflib
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import numpy as np
from numpy.typing import NDArray

from headwater.phylogeny.alignment_files import IUPAC, AlignmentError, Row, Rows, fasta_rows, nexus_rows, phylip_rows

LARGEST_FILE = 100_000_000
"""Bytes; a larger file is a genome given by mistake."""
FEWEST_TAXA = 4
"""Three taxa or fewer have one unrooted tree: there is nothing to infer."""
UNKNOWN, GAP = 15, 16

_HERE = Path(__file__).parent
_BITS = {"A": 1, "C": 2, "G": 4, "T": 8}
_ILLEGAL = 255
_STATE = np.full(256, _ILLEGAL, dtype=np.uint8)
for _letter, _bases in IUPAC.items():
    _STATE[ord(_letter)] = _STATE[ord(_letter.lower())] = sum(_BITS[base] for base in _bases)
_STATE[ord("-")] = GAP
_LEGAL = "A, C, G, T, U, the ambiguity codes R Y S W K M B D H V N X, '?' and '-'"
_AMINO_ACIDS_ONLY = frozenset("EFILPQZJ*")
_READERS = {"fasta": fasta_rows, "phylip": phylip_rows, "nexus": nexus_rows}


@dataclass(frozen=True)
class Partition:
    """Sites that share a model. sites: int64, counted from 0."""

    name: str
    sites: NDArray[np.int64]


@dataclass(frozen=True)
class Patterns:
    """The distinct columns of an alignment, each within one partition.

    masks: uint8 `[n, P]`, states as sets of bits. weights: float64 `[P]`, how many sites show the pattern. partition:
    int64 `[P]`, the place in `Alignment.partitions`.
    """

    masks: NDArray[np.uint8]
    weights: NDArray[np.float64]
    partition: NDArray[np.int64]


@dataclass(frozen=True)
class Alignment:
    """Aligned DNA. taxa: n distinct names. states: uint8 `[n, sites]`, sets of bits. partitions: disjoint sets of sites
    that together are all of them. source: the file it was read from.
    """

    taxa: tuple[str, ...]
    states: NDArray[np.uint8]
    partitions: tuple[Partition, ...]
    source: Path | None = None

    def __post_init__(self) -> None:
        if self.states.ndim != 2 or len(self.states) != len(self.taxa) or len(set(self.taxa)) < len(self.taxa):
            raise ValueError(
                f"states of shape {self.states.shape}: must have a row for each of {len(self.taxa)} different names"
            )
        together = np.sort(np.concatenate([part.sites for part in self.partitions]))
        if not np.array_equal(together, np.arange(self.sites)):
            raise ValueError("partitions: their sites must be disjoint and together be all sites, counted from 0")

    @property
    def sites(self) -> int:
        """The number of columns."""
        return self.states.shape[1]

    def patterns(self, gaps: Literal["missing", "state"] = "missing") -> Patterns:
        """The distinct columns with their counts; columns in which every state is unknown carry nothing and are left
        out.

        gaps: "missing" reads a gap as an unknown nucleotide (15), as likelihood programs do; "state" keeps it as a
        fifth state (16), as the published parsimony scores of DS1 to DS8 do. Raises ValueError for another word.
        """
        if gaps not in ("missing", "state"):
            raise ValueError(f"gaps {gaps!r}: must be 'missing' or 'state'")
        states = np.where(self.states == GAP, UNKNOWN, self.states) if gaps == "missing" else self.states
        parts = []
        for index, part in enumerate(self.partitions):
            columns, counts = np.unique(states[:, part.sites].T, axis=0, return_counts=True)
            kept = (columns != UNKNOWN).any(1)
            parts.append((columns[kept], counts[kept].astype(np.float64), np.full(kept.sum(), index, dtype=np.int64)))
        masks, weights, partition = (np.concatenate(arrays) for arrays in zip(*parts, strict=True))
        return Patterns(np.ascontiguousarray(masks.T), weights, partition)


def read_alignment(path: str | Path, format: str | None = None) -> Alignment:
    """The DNA alignment of a file: FASTA, PHYLIP (strict or relaxed, sequential or interleaved) or NEXUS, told apart by
    their first letters, or with `format` any alignment format that Biopython knows ("clustal", "stockholm", ...).

    The partition that a NEXUS file sets is kept; without one, its character sets are, where they divide the alignment.
    Of a mixed matrix the DNA part is taken. Raises AlignmentError, a ValueError, that names file, line, taxon, letter
    and position: for rows of unequal lengths, repeated names, fewer than four taxa, letters that stand for no
    nucleotide, a row of gaps and unknowns alone, proteins, a file that is empty, binary, above `LARGEST_FILE` bytes or
    in none of the formats. Raises OSError where there is no such file.
    """
    path = Path(path)
    if (size := path.stat().st_size) > LARGEST_FILE:
        raise AlignmentError(f"{path}: {size:,} bytes; at most {LARGEST_FILE:,} are read")
    content = path.read_bytes()
    if b"\0" in content or content[:2] == b"\x1f\x8b":
        raise AlignmentError(f"{path}: not a text file; give the alignment itself as FASTA, PHYLIP or NEXUS")
    try:
        text = content.decode("utf-8-sig").replace("\r\n", "\n").replace("\r", "\n")
    except UnicodeDecodeError as error:
        raise AlignmentError(f"{path}: not a text file ({error.reason} at byte {error.start})") from error
    if not text.strip():
        raise AlignmentError(f"{path}: the file is empty; legal are FASTA, PHYLIP and NEXUS")
    chosen = (format or _format_of(text, path)).lower()
    rows = _READERS[chosen](text, str(path)) if chosen in _READERS else _biopython_rows(path, chosen)
    return _alignment(rows, path)


def primates() -> Alignment:
    """The demo's alignment: 12 primates, 898 sites of mitochondrial DNA (Hayasaka, Gojobori & Horai 1988)."""
    return read_alignment(_HERE / "primates.fasta", "fasta")


def _format_of(text: str, path: Path) -> str:
    start = text.lstrip()
    if start.startswith(">"):
        return "fasta"
    if start[:6].lower() == "#nexus":
        return "nexus"
    if re.match(r"\d+\s+\d+(\s|$)", start):
        return "phylip"
    raise AlignmentError(
        f"{path}, line 1: starts with {start[:20].splitlines()[0]!r}; legal are FASTA ('>name'), PHYLIP (numbers of "
        "taxa and sites) and NEXUS ('#NEXUS'), and others by their name in Biopython given as the format"
    )


def _biopython_rows(path: Path, format: str) -> Rows:
    try:
        from Bio import AlignIO
    except ImportError as error:
        raise ImportError(
            f"format {format!r}: read with Biopython; install it with pip install 'headwater[phylogeny]'"
        ) from error
    try:
        records = list(AlignIO.read(path, format))
    except ValueError as error:
        raise AlignmentError(f"{path}, as {format!r}: {error}") from error
    return Rows([Row(record.id, 0, [(0, str(record.seq))]) for record in records])


def _alignment(rows: Rows, path: Path) -> Alignment:
    """The rows as an alignment, after every check."""
    _check_names(rows, path)
    _check_letters(rows, path)
    length = rows.sites if rows.sites is not None else len(rows.rows[0].text)
    for row in rows.rows:
        if (found := len(row.text)) != length:
            said = "are declared" if rows.sites is not None else f"has the first taxon, {rows.rows[0].name!r}"
            raise AlignmentError(
                f"{_where(path, row)}: {found} sites; {length} {said}, and all rows must be of one length"
            )
    if not length:
        raise AlignmentError(f"{path}: the rows hold no letters")
    states = np.stack([_states(row.text) for row in rows.rows])
    for row, line in zip(rows.rows, states, strict=True):
        if (line >= UNKNOWN).all():
            raise AlignmentError(
                f"{_where(path, row)}: gaps and unknown nucleotides alone; such a taxon fits anywhere: leave it out"
            )
    return Alignment(tuple(row.name for row in rows.rows), states, _partitions(rows, length, path), path)


def _states(letters: str) -> NDArray[np.uint8]:
    # A letter beyond Latin-1 becomes several, of which the first, a backslash, is as illegal and in the same place.
    return _STATE[np.frombuffer(letters.encode("latin-1", "backslashreplace"), dtype=np.uint8)]


def _check_names(rows: Rows, path: Path) -> None:
    seen: dict[str, Row] = {}
    for row in rows.rows:
        if row.name in seen:
            raise AlignmentError(
                f"{_where(path, row)}: this name was already given in line {seen[row.name].line}; names must differ"
            )
        seen[row.name] = row
    if len(rows.rows) < FEWEST_TAXA:
        raise AlignmentError(f"{path}: {len(rows.rows)} taxa; an unrooted tree to infer needs at least {FEWEST_TAXA}")


def _check_letters(rows: Rows, path: Path) -> None:
    text = "".join(row.text for row in rows.rows).upper()
    amino_acids = sum(text.count(letter) for letter in _AMINO_ACIDS_ONLY)
    if amino_acids > 0.05 * len(text):
        raise AlignmentError(
            f"{path}: {amino_acids:,} of {len(text):,} letters stand for amino acids alone (E, F, I, L, P, Q ...): "
            "this seems to be a protein alignment, and DNA is what is supported"
        )
    for row in rows.rows:
        letters = row.text
        illegal = np.flatnonzero(_states(letters) == _ILLEGAL)
        if len(illegal):
            position = int(illegal[0])
            hint = " (a match character must be declared: NEXUS, matchchar=.)" if letters[position] == "." else ""
            raise AlignmentError(
                f"{_where(path, row, row.line_of(position))}, position {position + 1}: letter {letters[position]!r}; "
                f"legal are {_LEGAL}{hint}"
            )


def _where(path: Path, row: Row, line: int | None = None) -> str:
    number = row.line if line is None else line
    return f"{path}{f', line {number}' if number else ''}, taxon {row.name!r}"


def _partitions(rows: Rows, sites: int, path: Path) -> tuple[Partition, ...]:
    names = rows.partition or list(rows.charsets)
    members = [np.array(rows.charsets[name], dtype=np.int64) for name in names]
    together = np.sort(np.concatenate(members)) if members else np.empty(0, dtype=np.int64)
    if np.array_equal(together, np.arange(sites)):
        return tuple(Partition(name, part) for name, part in zip(names, members, strict=True))
    if rows.partition:
        raise AlignmentError(
            f"{path}: partition into {', '.join(names)}: its sets must be disjoint and together be all {sites} sites"
        )
    return (Partition("all", np.arange(sites, dtype=np.int64)),)


def taxa_difference(found: set[str], expected: set[str]) -> str:
    """What to say of two sets of taxa that should be one: the names on either side only, with near matches; empty where
    they agree.
    """
    extra, lacking = sorted(found - expected), sorted(expected - found)
    parts = []
    if extra:
        parts.append("only in the trees: " + ", ".join(repr(name) for name in extra))
    if lacking:
        parts.append("only in the alignment: " + ", ".join(repr(name) for name in lacking))
    close = [(name, match[0]) for name in extra if (match := difflib.get_close_matches(name, lacking, 1, 0.8))]
    if close:
        parts.append("near matches: " + ", ".join(f"{a!r} and {b!r}" for a, b in close))
    return "; ".join(parts)
