"""The programs of phylogenetics as contenders: their command files, what they print, and the CPU time of a run.

MrBayes, IQ-TREE, RAxML and PHYLIP read an alignment and trees from files. Starting, reading and setting up are no tree
evaluations, so each turn is two runs, of few trees and of many, and the difference is what counts.
"""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from headwater.phylogeny.alignment_files import IUPAC
from headwater.phylogeny.data import GAP, UNKNOWN, Alignment
from headwater.phylogeny.trees import Trees

_BIT = {"A": 1, "C": 2, "G": 4, "T": 8}
_LETTERS = np.full(GAP + 1, "?")
for _letter, _bases in IUPAC.items():
    if _letter not in "UXN":
        _LETTERS[sum(_BIT[base] for base in _bases)] = _letter
_LETTERS[UNKNOWN], _LETTERS[GAP] = "?", "-"

KAPPA, ALPHA = 2.0, 0.5
"""Of HKY85+G4, fixed in every program."""


@dataclass(frozen=True)
class Run:
    """What one run of a program took and said."""

    cpu: float
    text: str


@dataclass
class Program:
    """A program that evaluates as many trees, or makes as many proposals, as it is asked to.

    run(count) does it once. least: the smaller of a turn's two counts. most: the larger at most. scores: the scores
    that a run's text tells, where they can be compared with ours.
    """

    run: Callable[[int], Run]
    least: int
    most: int
    scores: Callable[[str], list[float]] | None = None
    many: int = 0
    each: float = 0.0

    @property
    def is_fair(self) -> bool:
        """Whether a tree takes less than a second: a program that needs more does something else besides."""
        return self.each < 1

    def prepare(self, seconds: float) -> Run:
        """Choose the larger count so that a turn takes about `seconds`. Returns a run of the smaller."""
        few, some = self.run(self.least), self.run(min(2 * self.least, self.most))
        self.each = max((some.cpu - few.cpu) / (min(2 * self.least, self.most) - self.least), 1e-7)
        self.many = int(np.clip(self.least + seconds / self.each, self.least + 1, self.most))
        return few

    def turn(self, seconds: float) -> tuple[float, float]:
        """How many evaluations, and the CPU seconds that they took."""
        few, many = self.run(self.least).cpu, self.run(self.many).cpu
        return self.many - self.least, max(many - few, 1e-9)


def found(name: str, *places: str) -> Path | None:
    """Where a program is installed."""
    at = shutil.which(name) or next((place for place in places if Path(place).is_file()), None)
    return Path(at) if at else None


def version(command: list[str], pattern: str) -> str:
    """The version that a program tells of itself."""
    said = subprocess.run(command, capture_output=True, text=True, check=False, input="", timeout=60)
    match = re.search(pattern, said.stdout + said.stderr)
    return match[1] if match else "unknown"


def execute(command: list[str], folder: Path, limit: float, answers: str = "") -> Run:
    """Run to the end, at most `limit` seconds by the clock. Raises RuntimeError with a program's last words."""
    kept = folder / "said"
    with kept.open("w") as file:
        process = subprocess.Popen(command, cwd=folder, stdin=subprocess.PIPE, stdout=file, stderr=subprocess.STDOUT)
        assert process.stdin is not None
        process.stdin.write(answers.encode())
        process.stdin.close()
        ends = time.monotonic() + limit
        while True:
            pid, status, usage = os.wait4(process.pid, os.WNOHANG)
            if pid:
                break
            if time.monotonic() > ends:
                process.kill()
                os.wait4(process.pid, 0)
                process.returncode = -9
                raise TimeoutError(f"{Path(command[0]).name}: not done after {limit:g} s")
            time.sleep(0.02)
        process.returncode = os.waitstatus_to_exitcode(status)
    text = kept.read_text(errors="replace")
    if process.returncode:
        raise RuntimeError(f"{Path(command[0]).name} ended with status {process.returncode}:\n{text[-2000:]}")
    return Run(usage.ru_utime + usage.ru_stime, text)


class Files:
    """The alignment and the trees as files of a folder, in which programs run.

    trees: with lengths, over `names` of alignment.taxa in order.
    """

    def __init__(self, folder: Path, alignment: Alignment, trees: Trees, limit: float) -> None:
        self.folder, self.limit = folder, limit
        self.names = [f"t{i:04d}" for i in range(len(alignment.taxa))]
        rows = ["".join(_LETTERS[row]) for row in alignment.states]
        self.alignment = self._phylip("alignment.phy", rows)
        self.gaps_missing = self._phylip("missing.phy", [row.replace("-", "?") for row in rows])
        matrix = "\n".join(f"{name} {row}" for name, row in zip(self.names, rows, strict=True))
        size = f"ntax={len(rows)} nchar={len(rows[0])}"
        form = "datatype=dna gap=- missing=?"
        (folder / "alignment.nex").write_text(
            f"#NEXUS\nbegin data;\ndimensions {size};\nformat {form};\nmatrix\n{matrix}\n;\nend;\n"
        )
        self.newick = trees.newick(self.names)

    def _phylip(self, name: str, rows: list[str]) -> Path:
        lines = [f"{len(rows)} {len(rows[0])}", *(f"{a:<10}{b}" for a, b in zip(self.names, rows, strict=True))]
        (self.folder / name).write_text("\n".join(lines) + "\n")
        return self.folder / name

    def trees(self, count: int, lengths: bool = True) -> str:
        """The first `count` trees, one a line."""
        text = "\n".join(self.newick[:count]) + "\n"
        return text if lengths else re.sub(r":[-+.\deE]+", "", text)

    # The programs

    def mrbayes(self, program: Path, model: str, beagle: bool) -> Program:
        """One chain, one run: proposals, each with the likelihood that it needs, and nothing sampled or diagnosed."""
        nst, rates = ("1", "equal") if model == "JC69" else ("2", "gamma ngammacat=4")
        fixed = f" tratiopr=fixed({KAPPA}) shapepr=fixed({ALPHA})" if model != "JC69" else ""
        frequencies = "equal" if model == "JC69" else "empirical"
        engine = "usebeagle=yes beagledevice=cpu beagleprecision=double beaglesse=yes" if beagle else "usebeagle=no"

        def run(count: int) -> Run:
            (self.folder / "chain.nex").write_text(
                "#NEXUS\nbegin mrbayes;\nset autoclose=yes nowarn=yes seed=1 swapseed=1;\nexecute alignment.nex;\n"
                f"lset nst={nst} rates={rates};\n"
                f"prset statefreqpr=fixed({frequencies}){fixed} brlenspr=unconstrained:exp(10.0) topologypr=uniform;\n"
                f"set {engine};\n"
                f"mcmcp nruns=1 nchains=1 ngen={count} samplefreq={count} printfreq={count} mcmcdiagn=no "
                "checkpoint=no filename=chain;\nmcmc;\nend;\n"
            )
            return execute([str(program), "chain.nex"], self.folder, self.limit)

        return Program(run, 1000, 10_000_000)

    def iqtree(self, program: Path, model: str, fit: bool) -> Program:
        """Given trees: their log-likelihoods as they are, or with branch lengths fitted."""
        name = "JC" if model == "JC69" else f"HKY{{{KAPPA}}}+F+G4{{{ALPHA}}}"
        command = [str(program), "-s", str(self.alignment), "-m", name, "-n", "0", "-z", "given", "-nt", "1", "-redo"]
        command += ["-quiet", "-pre", "given_out", *([] if fit else ["-blfix"])]

        def run(count: int) -> Run:
            (self.folder / "given").write_text(self.trees(count))
            return Run(execute(command, self.folder, self.limit).cpu, (self.folder / "given_out.log").read_text())

        return Program(run, 50, len(self.newick), lambda text: _numbers(r"Tree \d+ / LogL: (\S+)", text))

    def raxml(self, program: Path) -> Program:
        """Given trees with branch lengths fitted, JC69: it has no way to take lengths as they are."""
        command = [str(program), "-T", "1", "-f", "n", "-s", str(self.alignment), "-m", "GTRCAT", "-V", "--JC69"]
        command += ["-z", "given", "-n", "given", "-p", "1"]

        def run(count: int) -> Run:
            (self.folder / "given").write_text(self.trees(count))
            for old in self.folder.glob("RAxML_*"):
                old.unlink()
            return execute(command, self.folder, self.limit)

        return Program(run, 1, len(self.newick), lambda text: _numbers(r"Tree \d+ Likelihood (\S+)", text))

    def dnapars(self, program: Path, gap_is_state: bool) -> Program:
        """Given trees: their steps, which it writes with a drawing of each; its test of the first hundred is in both
        runs of a turn.
        """
        source = self.alignment if gap_is_state else self.gaps_missing

        def run(count: int) -> Run:
            for old in ("outfile", "outtree"):
                (self.folder / old).unlink(missing_ok=True)
            shutil.copy(source, self.folder / "infile")
            (self.folder / "intree").write_text(f"{count}\n{self.trees(count, lengths=False)}")
            done = execute([str(program)], self.folder, self.limit, "U\nY\n1\n")
            return Run(done.cpu, (self.folder / "outfile").read_text(errors="replace"))

        return Program(run, 100, min(1000, len(self.newick)), lambda text: _numbers(r"total of\s+(\S+)", text))


def _numbers(pattern: str, text: str) -> list[float]:
    return [float(number) for number in re.findall(pattern, text)]
