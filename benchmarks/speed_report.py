"""The results of `speed.py` as one page of Markdown tables and three pictures: `python benchmarks/speed_report.py
results/speed-....json` writes them again, next to the file. With a second file, the parts that were measured in it
take the place of those in the first, and say where they come from.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from headwater.report.figures import line_figure

OURS = "headwater"
Row = dict[str, Any]


def write_report(path: Path) -> None:
    """Write speed.md and its pictures beside the results file at `path`."""
    results = json.loads(path.read_text())
    parts: list[tuple[str, Callable[[list[Row]], str]]] = [
        ("iteration", _iterations),
        ("training", _training),
        ("quality", _quality),
        ("by_length", lambda rows: _curve(rows[-1], "mean_length", "mean length", path, "speed-length.svg")),
        ("by_horizon", lambda rows: _curve(rows[-1], "horizon", "longest possible", path, "speed-horizon.svg")),
    ]
    page = [_head(results["provenance"], path)]
    apart = results.get("measured_apart", {})
    page += [_with_source(section(results[name]), apart.get(name)) for name, section in parts if name in results]
    path.with_name("speed.md").write_text("\n\n".join(page) + "\n")


def replace_parts(path: Path, later: Path) -> None:
    """Put the parts in the results file `later` in the place of those in the one at `path`."""
    results, new = json.loads(path.read_text()), json.loads(later.read_text())
    facts = new.pop("provenance")
    results |= new
    results.setdefault("measured_apart", {}).update(dict.fromkeys(new, facts))
    path.write_text(json.dumps(results, indent=1) + "\n")


def _with_source(section: str, facts: Row | None) -> str:
    """A section that was measured apart from the rest says when, and of what."""
    if facts is None:
        return section
    heading, _, rest = section.partition("\n\n")
    ours = facts["commit"][:10] + " with changes" * facts["commit"].endswith("changes")
    return f"{heading}\n\n    {facts['command']}\n\nMeasured apart, {facts['date']}; ours at {ours}.\n\n{rest}"


def _head(facts: Row, path: Path) -> str:
    versions = ", ".join(f"{name} {number}" for name, number in facts["versions"].items())
    peers = ", ".join(f"{name} at {commit[:10]}" for name, commit in facts["peers"].items())
    ours = facts["commit"][:10] + " with changes" * facts["commit"].endswith("changes")
    return f"""# Speed

    {facts["command"]}

{facts["date"]}; {facts["cpu"]}, {facts["cores"]} cores, {facts["memory_bytes"] / 2**30:.0f} GiB, {facts["system"]},
Python {facts["python"]}, {versions}; ours at {ours}; {peers or "no peers"}. All numbers: `{path.name}`.

Batch 16 everywhere. Contenders take turns; a ratio is the peer's time over ours in the same round, above 1 where ours
is faster, as median (lowest to highest). CPU time is that of all threads of the process. "gfnx" has its logging,
metrics and progress bar taken out; compiling is never part of a turn. Load is the machine's load average."""


def _iterations(rows: list[Row]) -> str:
    head = ["task", "lengths", "threads", "contender", "parameters", "mean length", "ms CPU", "ms wall", "ratio CPU",
            "ratio wall", "load"]  # fmt: skip
    lines, memory = [], []
    for row in rows:
        for name, numbers in row["contenders"].items():
            ratio = row["ratios"].get(name)
            lines.append([
                row["task"], row["regime"], row["threads"], name, f"{numbers['about']['parameters']:,}",
                f"{numbers['mean_length']:.1f}", _spread(numbers["cpu_ms"]), _spread(numbers["wall_ms"]),
                _spread(ratio["cpu"]) if ratio else "1", _spread(ratio["wall"]) if ratio else "1",
                f"{row['load'][0]:.0f} to {row['load'][1]:.0f}",
            ])  # fmt: skip
            held = numbers["memory"]
            memory.append([
                row["task"], row["regime"], row["threads"], name, f"{numbers['mean_length']:.1f}",
                f"{held['bytes']:,.0f}", f"{held['states_and_actions']:,.0f}",
                f"{held['peak_resident_bytes'] / 2**20:,.0f}", f"{numbers['about']['start_seconds']:.0f}",
                f"{numbers['about'].get('compile_seconds', 0):.0f}",
            ])  # fmt: skip
    held_head = ["task", "lengths", "threads", "contender", "mean length", "bytes a trajectory",
                 "of them states and actions", "peak resident MiB", "start-up s", "of it compiling s"]  # fmt: skip
    return (
        "## One iteration\n\nLearning rate 0 on the hypergrid, so lengths stay: those of an untrained sampler, and of "
        "one fitted to the target. The lengths of the other tasks are fixed.\n\n"
        f"{_table(head, lines)}\n\n## Memory and start-up\n\nA batch of trajectories as its rollout returns it: ours "
        "packed, the peers' padded; gfnx's holds observations and logits too (its compiled loop keeps only what it "
        f"uses).\n\n{_table(held_head, memory)}"
    )


def _training(rows: list[Row]) -> str:
    head = ["threads", "seed", "contender", "iterations", "mean length from", "to", "total variation at the end",
            "CPU s", "wall s", "ratio CPU", "ratio wall", "load"]  # fmt: skip
    lines = []
    for row in rows:
        ours = row["contenders"][OURS]
        for name, numbers in row["contenders"].items():
            lines.append([
                row["threads"], row["seed"], name, f"{row['iterations']:,}", f"{numbers['lengths'][0]:.1f}",
                f"{numbers['lengths'][-1]:.1f}", f"{numbers['total_variation']:.3f}", f"{numbers['cpu_seconds']:.1f}",
                f"{numbers['wall_seconds']:.1f}", f"{numbers['cpu_seconds'] / ours['cpu_seconds']:.2f}",
                f"{numbers['wall_seconds'] / ours['wall_seconds']:.2f}", f"{row['load']:.0f}",
            ])  # fmt: skip
    return (
        "## Whole training runs\n\nHypergrid 20^4, trajectory balance, Adam 1e-3 (log Z 0.1), uniform actions from 10 "
        "per cent to none over the first 48 per cent of the run.\n\n" + _table(head, lines)
    )


def _quality(rows: list[Row]) -> str:
    head = ["contender", "seed", "threads", "target", "reached", "iterations", "total variation", "wall s", "CPU s",
            "compiling before s", "settings"]  # fmt: skip
    lines = [
        [
            row["contender"], row["seed"], row["threads"], row["target"], "yes" if row["reached"] else "no, cut off",
            f"{row['iterations']:,}", f"{row['curve'][-1]['total_variation']:.3f}", f"{row['wall']:.0f}",
            f"{row['cpu']:.0f}", f"{row['about'].get('compile_seconds', 0):.0f}", _settings(row["task"]),
        ]
        for row in rows
    ]  # fmt: skip
    return (
        "## Time to quality\n\nHypergrid 20^4: training until the exact total variation is below "
        "the target. Everybody's logits at all 160,000 states go through one computation, outside the clock.\n\n"
        + _table(head, lines)
    )


def _curve(rows: list[Row], key: str, label: str, path: Path, picture: str) -> str:
    names = list(rows[0]["contenders"])

    def at(row: Row, name: str) -> float:
        return float(row["contenders"][name]["mean_length"] if key == "mean_length" else row[key])

    milliseconds = {
        name: ([at(row, name) for row in rows], [row["contenders"][name]["cpu_ms"]["median"] for row in rows])
        for name in names
    }
    title = f"CPU milliseconds of an iteration over the {label} trajectory"
    x_label = f"{label} trajectory, steps; CPU ms of an iteration"
    path.with_name(picture).write_text(line_figure(milliseconds, x_label=x_label, title=title))
    head = [f"{label}, steps"] + [f"{name}: {what}" for what in ("ms CPU", "bytes a trajectory") for name in names]
    lines = [
        [
            f"{at(row, OURS):.1f}",
            *(_spread(row["contenders"][name]["cpu_ms"]) for name in names),
            *(f"{row['contenders'][name]['memory']['bytes']:,.0f}" for name in names),
        ]
        for row in rows
    ]
    fixed = "20^4, longest possible 77" if key == "mean_length" else "mean length about 10, side 8 and more"
    heading = f"## Cost over the {label} trajectory\n\nHypergrid, {fixed}."
    return f"{heading}\n\n![{title}]({picture})\n\n{_table(head, lines)}"


def _spread(value: dict[str, float]) -> str:
    return f"{value['median']:.2f} ({value['low']:.2f} to {value['high']:.2f})"


def _settings(task: Row) -> str:
    exploring = f"epsilon {task['epsilon']} to {task['epsilon_end']} over {task['epsilon_iterations']:,}"
    extra = "".join(f", {name} {value}" for name, value in task["settings"].items())
    rates = f"Adam {task['learning_rate']}, log Z {task['log_z_learning_rate']}"
    return f"{task['objective']}, batch {task['batch_size']}, {rates}, {exploring}{extra}"


def _table(head: Sequence[str], rows: Sequence[Sequence[object]]) -> str:
    lines = [head, ["---"] * len(head), *rows]
    return "\n".join("| " + " | ".join(map(str, line)) + " |" for line in lines)


if __name__ == "__main__":
    for later_file in sys.argv[2:]:
        replace_parts(Path(sys.argv[1]), Path(later_file))
    write_report(Path(sys.argv[1]))
