"""The page of `phylogeny_posterior.py`, and its curves: `python benchmarks/phylogeny_posterior_report.py
results/phylogeny-posterior-....json` writes them again, next to the file.
"""

from __future__ import annotations

import json
import sys
import textwrap
from pathlib import Path
from typing import Any

from headwater.report.figures import line_figure

Row = dict[str, Any]

_COLUMNS = (
    ("split_deviation", "split deviation"),
    ("topology_distance", "topology total variation"),
    ("covered", "mass covered"),
)


def write_report(path: Path) -> Path:
    """Write tables and curves beside the results file at `path`. Returns the page."""
    results = json.loads(path.read_text())
    page = path.with_suffix(".md")
    parts = [_head(results, path), _agreement(results), _evidence(results), *_curves(results, path), _log(results)]
    page.write_text("\n\n".join(part for part in parts if part) + "\n")
    return page


def _head(results: Row, path: Path) -> str:
    facts, data = results["provenance"], results["alignment"]
    versions = ", ".join(f"{name} {number}" for name, number in facts["versions"].items())
    said = [f"{data['taxa']} taxa, {data['sites']:,} sites; JC69 unless the settings say otherwise."]
    if ours := results.get("headwater"):
        said.append(
            f"Headwater: {_number(ours['iterations'])} iterations, {_number(ours['trajectories'])} trajectories, "
            f"{_number(ours['training_cpu'])} CPU-seconds of training ({_number(ours['training_wall'])} s by the clock "
            f"as the machine then was); {results['samples']:,} trees drawn in {_number(ours['drawing_cpu'])} more."
        )
    if theirs := results.get("mrbayes"):
        said.append(f"MrBayes: {theirs['runs']} runs, {_number(theirs['cpu'])} CPU-seconds.")
    said.append(
        f"{facts['date']}; {facts['cpu']}, {facts['cores']} cores, shared with other work (load {results['load']}); "
        f"{facts['system']}, Python {facts['python']}, {versions}; ours at {facts['commit'][:10]}. All numbers: "
        f"`{path.name}`."
    )
    title = f"# Phylogeny, posterior: {data['name']}"
    return "\n\n".join([title, f"    {facts['command']}", textwrap.fill(" ".join(said), 120, break_on_hyphens=False)])


def _agreement(results: Row) -> str:
    rows: list[tuple[str, Row]] = []
    if ours := results.get("headwater"):
        rows += [
            (f"Headwater, {label}", ours[key])
            for label, key in (("with importance weights", "weighted"), ("as drawn", "drawn"))
            if key in ours
        ]
    theirs = results.get("mrbayes") or {}
    if theirs.get("agreement"):
        rows.append(("MrBayes" if "other runs" not in results["target"] else "MrBayes, one run", theirs["agreement"]))
    if theirs.get("between_runs") and "other runs" not in results["target"]:
        rows.append(("MrBayes, its runs with each other", theirs["between_runs"]))
    if not rows:
        return ""
    head = ["", "average standard deviation of split frequencies", "largest", "topology total variation",
            "of as many independent draws", "mass covered", "topologies", "independent draws"]  # fmt: skip
    lines = [f"## Agreement with {results['target']}", ""]
    if "target_topologies" in results:
        many, few = (", ".join(map(str, results[key])) for key in ("target_topologies", "target_for_95_percent"))
        lines += [f"The target has {many} topologies, {few} for 95 %.", ""]
    lines += ["| " + " | ".join(head) + " |", "|-" * len(head) + "|"]
    for label, row in rows:
        cells = [label, f"{row['split_deviation']:.4f}", f"{row['largest_deviation']:.4f}",
                 f"{row['topology_distance']:.4f}", f"{row['floor']:.4f}", f"{row['covered']:.4f}",
                 f"{row['topologies']:,}", f"{row['draws']:,}"]  # fmt: skip
        lines.append("| " + " | ".join(cells) + " |")
    said = "Draws with importance weights count as their effective sample size; MrBayes' count as if they were "
    lines += [
        "",
        textwrap.fill(said + "independent, which neighbours in a chain are not.", 120, break_on_hyphens=False),
    ]
    return "\n".join(lines)


def _evidence(results: Row) -> str:
    lines = ["## Log marginal likelihood", "", "|  | nats | spread |", "|-|-|-|"]
    if ours := results.get("headwater"):
        found = ours["evidence"]
        lines.append(
            f"| Headwater, effective sample size {found['effective']:.1%} of {found['draws']:,} | "
            f"{found['log_marginal_likelihood']:.2f} | 95 % interval +- {found['interval']:.2f} |"
        )
    lines += [f"| {name} | {value:.2f} | {spread:g} |" for name, (value, spread) in results["known"].items()]
    lines += ["", "Known values and where they come from: `benchmarks/phylogeny_known.py`."] if results["known"] else []
    return "\n".join(lines) if ours or results["known"] else ""


def _curves(results: Row, path: Path) -> list[str]:
    ours = (results.get("headwater") or {}).get("curve", [])
    theirs = [row for row in (results.get("mrbayes") or {}).get("curve", []) if row["cpu"] is not None]
    parts = []
    if ours or theirs:
        head = ["CPU-seconds", "who", *(title for _, title in _COLUMNS), "log marginal likelihood", "effective"]
        lines = ["## By CPU seconds", "", "| " + " | ".join(head) + " |", "|-" * len(head) + "|"]
        table = [(row["cpu"], "Headwater", row.get("weighted"), row["evidence"]) for row in ours]
        table += [(row["cpu"], "MrBayes", row, None) for row in theirs]
        for cpu, who, row, found in sorted(table, key=lambda each: each[0]):
            cells = [f"{cpu:,.1f}", who, *(f"{row[key]:.4f}" if row else "" for key, _ in _COLUMNS)]
            if found:
                cells.append(f"{found['log_marginal_likelihood']:.2f} +- {found['interval']:.2f}")
                cells.append(f"{found['effective']:.1%}")
            else:
                cells += ["", ""]
            lines.append("| " + " | ".join(cells) + " |")
        parts.append("\n".join(lines))
    for key, title, tail in (
        ("topology_distance", "Topology total variation", "topologies"),
        ("split_deviation", "Average standard deviation of split frequencies", "splits"),
    ):
        curves = {}
        for label, rows in (("Headwater", [(row["cpu"], row.get("weighted")) for row in ours]),
                            ("MrBayes", [(row["cpu"], row) for row in theirs])):  # fmt: skip
            points = [(cpu, row[key]) for cpu, row in rows if row]
            if len(points) > 1:
                curves[label] = tuple(zip(*points, strict=True))
        if curves:
            figure = path.with_name(f"{path.stem}-{tail}.svg")
            size = (6.4, 3.4)
            figure.write_text(line_figure(curves, x_label="CPU seconds", title=title, log_y=True, size=size) + "\n")
            parts.append(f"![{title}]({figure.name})")
    return parts


def _log(results: Row) -> str:
    """What the run itself measured while it trained."""
    rows = (results.get("headwater") or {}).get("metrics", [])
    if not rows:
        return ""
    head = ["iteration", "seconds by the clock", "log marginal likelihood", "effective sample size of 128"]
    lines = ["## The run's own evaluations", "", "| " + " | ".join(head) + " |", "|-" * len(head) + "|"]
    for row in rows[:: max(1, len(rows) // 12)]:
        found = f"{float(row['eval/log_z_estimate']):.2f} +- {float(row['eval/log_z_interval']):.2f}"
        effective = f"{float(row['eval/effective_sample_size']):.1%}"
        lines.append(f"| {_number(row['iteration'])} | {_number(row['seconds'])} | {found} | {effective} |")
    return "\n".join(lines)


def _number(value: float | None) -> str:
    return "?" if value is None else f"{value:,.1f}" if value < 100 and value != int(value) else f"{value:,.0f}"


if __name__ == "__main__":
    print(write_report(Path(sys.argv[1])))
