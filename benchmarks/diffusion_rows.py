"""What the benchmarks of diffusion posteriors share: rows of figures that are kept as soon as they are measured, so
that a command that is started again goes on where it was; and cells of tables."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Sequence
from pathlib import Path

from headwater.training import Trainer
from provenance import load, provenance

Figures = dict[str, object]


class Rows:
    """Rows of figures in a JSON file, each with a key of its own."""

    def __init__(self, path: Path, command: list[str]) -> None:
        self.path, self.command = path, command
        self.rows: list[Figures] = json.loads(path.read_text())["rows"] if path.exists() else []

    def measure(self, key: Figures, figures: Callable[[], Figures]) -> Figures:
        """The row with this key, measured now unless it is there."""
        for row in self.rows:
            if all(row.get(name) == value for name, value in key.items()):
                return row
        row = key | figures()
        self.rows.append(row)
        content = {"provenance": provenance(self.command), "load": load(), "rows": self.rows}
        self.path.write_text(json.dumps(content, indent=1) + "\n")
        print(*(f"{name} {cell(value)}" for name, value in row.items()), flush=True)
        return row

    def where(self, **key: object) -> list[Figures]:
        """All rows with these values."""
        return [row for row in self.rows if all(row.get(name) == value for name, value in key.items())]


def run_to_the_end(trainer: Trainer) -> None:
    """Train; a training that was interrupted ends the benchmark, so that it is not taken for one that was not."""
    trainer.run(progress_bar=False)
    if trainer.interrupted:
        raise KeyboardInterrupt


def cell(value: object) -> str:
    """As it stands in a table."""
    if value is None or (isinstance(value, float) and math.isnan(value)):
        return ""
    if isinstance(value, float):
        return f"{value:,.0f}" if abs(value) >= 1000 else f"{value:.3g}"
    return f"{value:,}" if isinstance(value, int) else str(value)


def over_seeds(rows: Sequence[Figures], name: str) -> str:
    """The mean of a figure, and its range where there are several."""
    values = [float(str(row[name])) for row in rows if row.get(name) is not None]
    if not values:
        return ""
    mean = sum(values) / len(values)
    return cell(mean) if max(values) == min(values) else f"{cell(mean)} ({cell(min(values))} to {cell(max(values))})"


def table(heads: Sequence[str], lines: Sequence[Sequence[str]]) -> list[str]:
    """Lines of a table in Markdown."""
    return ["| " + " | ".join(line) + " |" for line in (heads, ["---"] * len(heads), *lines)]


def machine(rows: Rows) -> str:
    """Where and when the rows were measured."""
    told = json.loads(rows.path.read_text())
    of, load_then = told["provenance"], told["load"]
    return (
        f"{of['cpu']}, {of['cores']} cores, one thread, shared with other work (load {load_then}); "
        f"torch {of['versions']['torch']}; commit {of['commit'][:12]}; {of['date']}."
    )
