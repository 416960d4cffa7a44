"""The page of `phylogeny_speed.py`: `python benchmarks/phylogeny_speed_report.py results/phylogeny-speed-....json`
writes it again, next to the file.
"""

from __future__ import annotations

import json
import sys
import textwrap
from pathlib import Path
from statistics import median
from typing import Any

Row = dict[str, Any]


def write_report(path: Path) -> Path:
    """Write the tables beside the results file at `path`. Returns the page."""
    results = json.loads(path.read_text())
    page = path.with_suffix(".md")
    page.write_text("\n\n".join([_head(results, path), *(_group(group) for group in results["groups"])]) + "\n")
    return page


def _head(results: Row, path: Path) -> str:
    facts, data = results["provenance"], results["alignment"]
    versions = ", ".join(f"{name} {number}" for name, number in (facts["versions"] | results["peers"]).items())
    where = (
        f"{data['taxa']} taxa, {data['sites']:,} sites, {data['patterns']:,} distinct columns. {facts['date']}; "
        f"{facts['cpu']}, one of {facts['cores']} cores, shared with other work (load {results['load'][0]} at the "
        f"start, {results['load'][1]} at the end); {facts['system']}, Python {facts['python']}, {versions}; ours at "
        f"{facts['commit'][:10]}. All numbers: `{path.name}`."
    )
    how = (
        f"Rates are per second of CPU time (user and system): the median of {results['rounds']} rounds (lowest to "
        f"highest). In a round all take turns of about {results['seconds']:g} s on the same core; the ratio is ours "
        "over theirs in the same round, above 1 where ours is faster. Starting a program, reading its files and "
        "setting up are taken out: a turn of a program is the difference of two runs, of few trees and of many. Our "
        f"kernels are given {results['trees_at_once']:,} trees a call. "
        '"Difference" is its scores less ours, lowest and highest, over so many trees.'
    )
    title = f"# Phylogeny, speed on one core: {data['name']}"
    return "\n\n".join([title, f"    {facts['command']}", _filled(where), _filled(how)])


def _group(group: Row) -> str:
    ours = [each for each in group["contenders"] if each["name"].startswith(group["contenders"][0]["name"])]
    lines = [f"## {group['title']}", "", _filled(group["note"]), ""]
    noted, agreed = (any(each[key] for each in group["contenders"]) for key in ("note", "agreement"))
    head = ["", f"{group['unit']} per CPU-second", "ours over theirs"]
    head += ["difference"] * agreed + ["settings"] * noted
    lines += ["| " + " | ".join(head) + " |", "|-" * len(head) + "|"]
    for each in group["contenders"]:
        ratio = ""
        if each not in ours:
            ratio = " / ".join(_spread(_ratios(mine["rates"], each["rates"])) for mine in ours)
        cells = [each["name"], _spread(each["rates"]), ratio]
        if agreed:
            cells.append("" if each["agreement"] is None else _difference(*each["agreement"]))
        if noted:
            cells.append(each["note"])
        lines.append("| " + " | ".join(cells) + " |")
    lines += ["", *(f"- {said}" for said in group["left_out"])]
    return "\n".join(lines).rstrip()


def _filled(text: str) -> str:
    return textwrap.fill(text, 120, break_on_hyphens=False)


def _ratios(ours: list[float], theirs: list[float]) -> list[float]:
    return [mine / other for mine, other in zip(ours, theirs, strict=True)]


def _difference(low: float, high: float, count: int) -> str:
    return f"{low:.2g} to {high:.2g} ({count} trees)" if low != high else f"{low:g} ({count} trees)"


def _spread(values: list[float]) -> str:
    return f"{_short(median(values))} ({_short(min(values))} to {_short(max(values))})"


def _short(value: float) -> str:
    digits = 0 if value >= 100 else 1 if value >= 10 else 2
    return f"{value:,.{digits}f}"


if __name__ == "__main__":
    print(write_report(Path(sys.argv[1])))
