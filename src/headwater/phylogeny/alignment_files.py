"""Rows of FASTA, PHYLIP and NEXUS alignments, each piece with the line it stands in.

The readers here exist for their errors: Biopython, which reads every other format for us, keeps no line numbers, knows
no relaxed sequential PHYLIP, and stops at the mixed data types and MrBayes blocks of common NEXUS files. They judge no
letters: `data.py` does.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass, field

from headwater.phylogeny.nexus import commands, first_word, unquoted

IUPAC = {
    "A": "A", "C": "C", "G": "G", "T": "T", "U": "T", "R": "AG", "Y": "CT", "S": "CG", "W": "AT", "K": "GT", "M": "AC",
    "B": "CGT", "D": "AGT", "H": "ACT", "V": "ACG", "N": "ACGT", "X": "ACGT", "?": "ACGT",
}  # fmt: skip
"""The nucleotides that a letter stands for (Cornish-Bowden 1985, Nucleic Acids Research 13)."""

_LETTERS = frozenset("".join(IUPAC) + "".join(IUPAC).lower() + "-.")
_SET_LETTER = {frozenset(bases): letter for letter, bases in reversed(IUPAC.items()) if letter != "U"}


class AlignmentError(ValueError):
    """An alignment file that cannot be used; the message says where and why."""


@dataclass
class Row:
    """One taxon as the file gives it. line: where its name stands. pieces: (line, letters without blanks)."""

    name: str
    line: int
    pieces: list[tuple[int, str]] = field(default_factory=list)

    @property
    def text(self) -> str:
        return "".join(letters for _, letters in self.pieces)

    def replace(self, text: str) -> None:
        """Other letters, as many, in the same lines."""
        start = 0
        for i, (line, letters) in enumerate(self.pieces):
            self.pieces[i] = (line, text[start : start + len(letters)])
            start += len(letters)

    def line_of(self, position: int) -> int:
        """The line in which the letter at a position, counted from 0, stands."""
        for line, letters in self.pieces:
            if position < len(letters):
                return line
            position -= len(letters)
        return self.line


@dataclass
class Rows:
    """What a reader found. sites: the length that the file declares, None where it declares none. charsets: sites from
    0 by name. partition: the names of those sets that divide the alignment, empty where the file divides nothing.
    """

    rows: list[Row]
    sites: int | None = None
    charsets: dict[str, list[int]] = field(default_factory=dict)
    partition: list[str] = field(default_factory=list)


def fasta_rows(text: str, file: str) -> Rows:
    """Records of a FASTA file; a name is the header up to the first blank, or what stands in quotes."""
    rows: list[Row] = []
    for number, line in enumerate(text.split("\n"), start=1):
        line = line.strip()
        if line.startswith(">"):
            name = unquoted(first_word(line[1:])[0])
            if not name:
                raise AlignmentError(f"{file}, line {number}: a record without a name; write it after the '>'")
            rows.append(Row(name, number))
        elif line and not rows:
            raise AlignmentError(f"{file}, line {number}: letters before the first header; a record starts with '>'")
        elif line:
            rows[-1].pieces.append((number, "".join(line.split())))
    return Rows(rows)


def phylip_rows(text: str, file: str) -> Rows:
    """Rows of a PHYLIP file, whose first line is the number of taxa and of sites.

    Names may end at the first blank (relaxed) or fill ten columns (strict), and rows may be sequential or interleaved:
    the first reading in which every number fits is the one that is meant.
    """
    lines = [(i, line) for i, line in enumerate(text.split("\n"), start=1) if line.strip()]
    header = re.match(r"\s*(\d+)\s+(\d+)(?:\s|$)", lines[0][1]) if lines else None
    if header is None:
        raise AlignmentError(f"{file}, line 1: a PHYLIP file starts with the number of taxa and of sites")
    taxa, sites, body = int(header[1]), int(header[2]), lines[1:]
    if len(body) < taxa:
        raise AlignmentError(f"{file}, line {lines[0][0]}: {taxa} taxa are declared, {len(body)} lines of data follow")
    readings = []
    for strict in (False, True):
        for rows in (_sequential(body, sites, strict), _interleaved(body, taxa, strict)):
            names = {row.name for row in rows}
            if (
                len(rows) == taxa == len(names)
                and "" not in names
                and all(len(row.text) == sites and _LETTERS.issuperset(row.text) for row in rows)
            ):
                return Rows(rows, sites)
            readings.append(rows)

    def distance(rows: list[Row]) -> int:
        return abs(len(rows) - taxa) * max(sites, 1) + sum(abs(len(row.text) - sites) for row in rows)

    closest = min(readings, key=distance)  # nothing fits: the reading whose faults are the fewest to name
    if len(closest) != taxa:
        where = f"{file}, line {lines[0][0]}"
        raise AlignmentError(
            f"{where}: {taxa} taxa of {sites} sites are declared, the data read as {len(closest)} rows"
        )
    return Rows(closest, sites)


def nexus_rows(text: str, file: str) -> Rows:
    """The matrix of the DATA or CHARACTERS block of a NEXUS file, with its character sets and the partition in use.

    Of a mixed matrix the DNA part is taken, its sites counted anew. Gap, missing and match symbols become '-', '?' and
    the letter that is meant; a set like {AC} becomes its IUPAC letter.
    """
    block, chosen = "", ""
    layout, found = _Layout(), None
    charsets: dict[str, str] = {}
    partitions: dict[str, list[str]] = {}
    for line, word, rest in commands(text):
        in_matrix_block = block in ("data", "characters")
        assigned = re.fullmatch(r"\s*\*?\s*('[^']+'|[^\s=]+)[^=]*=\s*(.*)", rest, re.DOTALL)
        if word == "begin":
            block = rest.strip().lower()
        elif in_matrix_block and word == "dimensions":
            layout.sites = int(match[1]) if (match := re.search(r"nchar\s*=\s*(\d+)", rest, re.IGNORECASE)) else None
        elif in_matrix_block and word == "format":
            layout.read(rest, f"{file}, line {line}")
        elif in_matrix_block and word == "matrix":
            if found is not None:
                raise AlignmentError(f"{file}, line {line}: a second matrix; a file holds one alignment")
            found = _matrix(rest, line, layout, file)
        elif word == "charset" and assigned:
            charsets[unquoted(assigned[1])] = assigned[2]
        elif word in ("partition", "charpartition") and assigned:
            parts = re.sub(r"^\s*\d+\s*:", "", assigned[2]).split(",")
            partitions[assigned[1].lower()] = [unquoted(part.split(":")[-1].strip()) for part in parts if part.strip()]
            chosen = chosen or assigned[1].lower()
        elif word == "set" and (match := re.search(r"partition\s*=\s*(\S+)", rest, re.IGNORECASE)):
            chosen = match[1].lower()
    if found is None:
        raise AlignmentError(f"{file}: no MATRIX command in a DATA or CHARACTERS block, or no ';' after it")
    sites = layout.sites if layout.sites is not None else max((len(row.text) for row in found), default=0)
    sets: dict[str, list[int]] = {}
    for name, ranges in charsets.items():
        if (members := _charset_sites(ranges, sites, sets)) is not None:
            sets[name] = members
    rows = Rows(found, layout.sites, sets, [name for name in partitions.get(chosen, []) if name in sets])
    return _dna_part(rows, layout.mixed, file) if layout.mixed else rows


@dataclass
class _Layout:
    """What a FORMAT command says. mixed: (data type, first site, last site) of each part, sites from 1."""

    sites: int | None = None
    interleave: bool = False
    gap: str = "-"
    missing: str = "?"
    match: str = ""
    mixed: list[tuple[str, int, int]] = field(default_factory=list)

    def read(self, text: str, where: str) -> None:
        options = {}
        for match in re.finditer(r"(\w+)(?:\s*=\s*('[^']*'|\"[^\"]*\"|\w+\s*\([^)]*\)|\S+))?", text):
            options[match[1].lower()] = match[2] or "yes"
        if "transpose" in options or options.get("labels") == "no" or "nolabels" in options:
            raise AlignmentError(f"{where}: a matrix with taxa in columns or without names cannot be read")
        kind = options.get("datatype", "dna").lower()
        if kind.startswith("mixed"):
            self.mixed = [(a, int(b), int(c)) for a, b, c in re.findall(r"(\w+)\s*:\s*(\d+)\s*-\s*(\d+)", kind)]
        elif kind not in ("dna", "rna", "nucleotide"):
            raise AlignmentError(f"{where}: datatype={kind}; DNA is what is supported: dna, rna or nucleotide")
        self.interleave = options.get("interleave", "no").lower() != "no"
        self.gap = options.get("gap", self.gap).strip("'\"")
        self.missing = options.get("missing", self.missing).strip("'\"")
        self.match = options.get("matchchar", self.match).strip("'\"")
        for name, symbol in (("gap", self.gap), ("missing", self.missing), ("matchchar", self.match)):
            if len(symbol) != 1 and (symbol or name != "matchchar"):
                raise AlignmentError(f"{where}: {name}={symbol}; must be one character")


def _matrix(text: str, first_line: int, layout: _Layout, file: str) -> list[Row]:
    rows: list[Row] = []
    by_name: dict[str, Row] = {}
    open_row, have = Row("", 0), 0
    for number, line in enumerate(text.split("\n"), start=first_line):
        if not line.strip():
            continue
        word, rest = first_word(line)
        letters = "".join(rest.split())
        if layout.interleave and (name := unquoted(word)) in by_name:
            by_name[name].pieces.append((number, letters))
        elif rows and not layout.interleave and _goes_on(line, have, layout):
            letters = "".join(line.split())
            open_row.pieces.append((number, letters))
            have += len(letters)
        else:
            open_row, have = Row(unquoted(word), number, [(number, letters)]), len(letters)
            rows.append(open_row)
            by_name[open_row.name] = open_row
    for row in rows:
        row.pieces = [(line, _plain(letters, layout, row, line, file)) for line, letters in row.pieces]
    if layout.match and rows:
        first = rows[0].text
        for row in rows[1:]:
            letters = row.text
            meant = "".join(b if a == layout.match else a for a, b in zip(letters, first, strict=False))
            row.replace(meant + letters[len(first) :])
    return rows


def _goes_on(line: str, have: int, layout: _Layout) -> bool:
    """Whether a line of a sequential matrix belongs to the row before it, which has so many letters."""
    if layout.sites is None:
        return have == 0
    if have >= layout.sites:
        return False
    words = line.split(maxsplit=1)  # a name before the row is full: the row is too short, not the name a part of it
    return len(words) == 1 or _LETTERS.issuperset(words[0])


def _plain(letters: str, layout: _Layout, row: Row, line: int, file: str) -> str:
    def one_letter(match: re.Match[str]) -> str:
        inner = match[0][1:-1].upper().replace(",", "")
        if layout.mixed and not set(inner) <= set(IUPAC):
            return layout.missing  # of the part that is left out
        if not inner or not set(inner) <= set(IUPAC):
            raise AlignmentError(
                f"{file}, line {line}, taxon {row.name!r}: set {match[0]}; its letters must be nucleotides"
            )
        return _SET_LETTER[frozenset("".join(IUPAC[letter] for letter in inner))]

    letters = re.sub(r"\{[^}]*\}|\([^)]*\)", one_letter, letters)
    return letters.translate({ord(layout.missing): "?", ord(layout.gap): "-"})


def _dna_part(rows: Rows, mixed: Sequence[tuple[str, int, int]], file: str) -> Rows:
    """The columns that a mixed matrix calls DNA, RNA or nucleotide, and the character sets within them."""
    kept = [i for kind, first, last in mixed if kind in ("dna", "rna", "nucleotide") for i in range(first - 1, last)]
    if not kept:
        raise AlignmentError(f"{file}: a mixed matrix without a DNA part; DNA is what is supported")
    new = {old: i for i, old in enumerate(kept)}
    whole = [row for row in rows.rows if len(row.text) > max(kept)]
    if len(whole) < len(rows.rows):
        short = next(row for row in rows.rows if row not in whole)
        where = f"{file}, line {short.line}, taxon {short.name!r}"
        raise AlignmentError(f"{where}: {len(short.text)} sites; the parts of the matrix reach to {max(kept) + 1}")
    for row in rows.rows:
        start, pieces = 0, []
        for line, letters in row.pieces:
            pieces.append((line, "".join(a for i, a in enumerate(letters, start) if i in new)))
            start += len(letters)
        row.pieces = pieces
    sets = {name: [new[i] for i in members if i in new] for name, members in rows.charsets.items()}
    sets = {name: members for name, members in sets.items() if members}
    return Rows(rows.rows, len(kept), sets, [name for name in rows.partition if name in sets])


def _charset_sites(ranges: str, sites: int, known: dict[str, list[int]]) -> list[int] | None:
    """Sites from 0 of a character set like `1-9\\3 12 20-. other`; None where it cannot be understood."""
    found: list[int] = []
    for part in re.sub(r"\s*([-\\])\s*", r"\1", ranges.strip()).split():
        match = re.fullmatch(r"(\d+)(?:-(\d+|\.))?(?:\\(\d+))?", part)
        if match is None:
            if part not in known and part.lower() != "all":
                return None
            found += known.get(part, range(sites))
            continue
        last = sites if match[2] == "." else int(match[2] or match[1])
        step = int(match[3] or 1)
        if not 1 <= int(match[1]) <= last <= sites or step < 1:
            return None
        found += range(int(match[1]) - 1, last, step)
    return sorted(set(found))


def _named(line: str, strict: bool) -> tuple[str, str]:
    """Name and letters of a PHYLIP line that has both."""
    name, letters = (line[:10].strip(), line[10:]) if strict else first_word(line)
    return (name if strict else unquoted(name)), "".join(letters.split())


def _sequential(body: Sequence[tuple[int, str]], sites: int, strict: bool) -> list[Row]:
    rows: list[Row] = []
    have = sites
    for number, line in body:
        if have >= sites:
            name, letters = _named(line, strict)
            rows.append(Row(name, number))
            have = 0
        else:
            letters = "".join(line.split())
        rows[-1].pieces.append((number, letters))
        have += len(letters)
    return rows


def _interleaved(body: Sequence[tuple[int, str]], taxa: int, strict: bool) -> list[Row]:
    rows: list[Row] = []
    for i, (number, line) in enumerate(body):
        if i < taxa:
            name, letters = _named(line, strict)
            rows.append(Row(name, number, [(number, letters)]))
            continue
        row = rows[i % taxa]
        word, rest = first_word(line)
        row.pieces.append((number, "".join((rest if unquoted(word) == row.name else line).split())))
    return rows
