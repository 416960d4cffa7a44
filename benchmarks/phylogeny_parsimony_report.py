"""The page of `phylogeny_parsimony.py`: `python benchmarks/phylogeny_parsimony_report.py
results/phylogeny-parsimony.json` writes it again, next to the file.
"""

from __future__ import annotations

import json
import sys
import textwrap
from pathlib import Path
from typing import Any

Row = dict[str, Any]

_OF_TREES = """A count in five numbers: trees within 0, 1, 2, 3 and 4 changes of the optimum. All there are: those that
hang together by prunings and regraftings through trees of up to "through" changes more; others may exist. Sampler: all
draws at the temperatures below together. Chains alone: where they come to in the moves of at most 500 iterations; they
give no probabilities. CPU-seconds of one core."""
_OF_TEMPERATURES = """One sampler a data set serves all temperatures. Optimal: draws that have the fewest changes there
are. Effective: sample size of the importance weights of single trajectories, as a share of the draws. Exact log Z, and
total variation of drawn trees and of weighted ones against exact probabilities beside what as many perfect draws would
have, at T = 0.25, where trees further than four changes off have next to none."""


def write_report(path: Path) -> Path:
    """Write the tables beside the results file at `path`. Returns the page."""
    rows: dict[str, Row] = json.loads(path.read_text())
    parts = ["# Phylogeny: near-optimal trees by parsimony, a gap as fifth state", *_commands(rows)]
    parts += ["## Distinct trees within four changes of the optimum", _trees(rows), _note(_OF_TREES)]
    parts += ["## By temperature", _temperatures(rows), _note(_OF_TEMPERATURES), _machine(rows)]
    page = path.with_suffix(".md")
    page.write_text("\n\n".join(parts) + "\n")
    return page


def _commands(rows: dict[str, Row]) -> list[str]:
    commands = dict.fromkeys(row[key] for key in ("training", "command") for row in rows.values())
    return [f"    {command}" for command in commands if command]


def _trees(rows: dict[str, Row]) -> str:
    head = ["", "taxa", "PAUP*: optimum (trees)", "dnapars: best (trees), CPU", "all there are", "through", "CPU",
            "chains alone", "CPU", "sampler", "CPU, training and drawing", "iterations x batch"]  # fmt: skip
    lines = [_line(head), "|-" * len(head) + "|"]
    for name, row in rows.items():
        published, program, exist = row["published"], row["dnapars"], row["exist"]
        lines.append(_line([
            name, row["taxa"],
            "" if published is None else f"{published[0]:,}" + (f" ({published[1]})" if published[1] else ""),
            "" if program is None else f"{program['shortest']:,} ({program['trees']}), {program['cpu']:.0f} s",
            _five(exist["within"]), exist["beyond"], f"{exist['cpu']:.1f} s",
            _five(row["chains"]["within"]), f"{row['chains']['cpu']:.0f} s",
            _five(row["sampler"]["within"]), f"{row['training_cpu']:,.0f} + {row['sampler']['cpu']:.0f} s",
            f"{row['iterations']:,}" + (f" of {row['planned']:,}" if row["iterations"] < row["planned"] else "")
            + f" x {row['batch_size']}",
        ]))  # fmt: skip
    return "\n".join(lines)


def _temperatures(rows: dict[str, Row]) -> str:
    head = ["", "T", "shortest", "optimal", "median", "within 0 .. 4", "log Z", "exact", "effective",
            "total variation drawn / weighted / floor"]  # fmt: skip
    lines = [_line(head), "|-" * len(head) + "|"]
    for name, row in rows.items():
        for temperature, found in row["temperatures"].items():
            distance = found["total_variation"]
            exact = f"{row['exact_log_z']:.3f}" if distance else ""
            apart = " / ".join(f"{distance[key]:.3f}" for key in ("drawn", "weighted", "floor")) if distance else ""
            lines.append(_line([
                name, temperature, f"{found['shortest']:,}", f"{found['optimal']:.1%}", f"{found['median']:,.0f}",
                _five(found["within"]), f"{found['log_z']:.3f} +- {found['interval']:.3f}", exact,
                f"{found['effective']:.1%}", apart,
            ]))  # fmt: skip
    return "\n".join(lines)


def _machine(rows: dict[str, Row]) -> str:
    said = []
    for name, row in rows.items():
        versions = ", ".join(f"{package} {number}" for package, number in row["versions"].items())
        said.append(
            f"{name}: {row['date']}, {row['cpu']}, one of {row['cores']} cores shared with other work (load "
            f"{row['load']}), Python {row['python']}, {versions}, ours at {row['commit'][:10]}."
        )
    return "\n".join(f"- {each}" for each in said)


def _five(counts: list[int]) -> str:
    return " / ".join(f"{count:,}" for count in counts)


def _line(cells: list[object]) -> str:
    return "| " + " | ".join(str(cell) for cell in cells) + " |"


def _note(text: str) -> str:
    return textwrap.fill(text, 120, break_on_hyphens=False)


if __name__ == "__main__":
    print(write_report(Path(sys.argv[1])))
