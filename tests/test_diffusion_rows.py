"""Rows of figures that a benchmark keeps as it goes."""

from __future__ import annotations

import json
import math
from pathlib import Path

from diffusion_rows import Figures, Rows, cell, over_seeds, table


def test_a_row_is_measured_once_and_kept_at_once(tmp_path: Path) -> None:
    path, asked = tmp_path / "rows.json", []

    def figures() -> Figures:
        asked.append(1)
        return {"value": 0.25, "bound": math.nan}

    rows = Rows(path, ["command"])
    rows.measure({"sampler": "a", "seed": 0}, figures)
    rows.measure({"sampler": "a", "seed": 1}, figures)
    again = Rows(path, ["command"])
    assert again.measure({"sampler": "a", "seed": 0}, figures)["value"] == 0.25
    assert len(asked) == 2
    assert json.loads(path.read_text())["rows"][1] == {"sampler": "a", "seed": 1, "value": 0.25, "bound": None}
    assert len(again.where(sampler="a")) == 2
    assert again.where(sampler="b") == []


def test_cells_show_means_and_ranges() -> None:
    assert over_seeds([{"x": 1.0}, {"x": 2.0}, {"x": None}], "x") == "1.5 (1 to 2)"
    assert over_seeds([{"x": 3}, {"x": 3}], "x") == "3"
    assert over_seeds([{}], "x") == ""
    assert [cell(value) for value in (1234.5, 1234, 0.12345, None, "a")] == ["1,234", "1,234", "0.123", "", "a"]
    assert table(["a", "b"], [["1", "2"]]) == ["| a | b |", "| --- | --- |", "| 1 | 2 |"]
