"""The report of a run: one HTML file that explains itself, holds all its figures and asks for nothing from outside.

`write_report` draws what every run has in common; a domain hands in `Section`s with its own pictures, and
`Findings` where the key figures are its own.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from headwater.report.findings import Card, Findings, common_findings, figures_of
from headwater.report.glossary import Term

if TYPE_CHECKING:
    from headwater.runs import Run

__all__ = ["Card", "Findings", "Section", "Term", "common_findings", "figures_of", "write_report"]


@dataclass(frozen=True)
class Section:
    """One section of a report, written by a domain.

    title: plain text. html: markup placed in the page as it is, so whoever writes it escapes what it quotes
    (`html.escape`). The page styles `table`, `figure` with `figcaption`, `pre` and `code`; `<div class="figures">` sets
    figures side by side, and a `<figure class="wide">` keeps its width and scrolls on a narrow screen.
    """

    title: str
    html: str


def write_report(
    run: Run,
    sections: Sequence[Section],
    defaults: Mapping[str, object] | None = None,
    findings: Findings | None = None,
) -> Path:
    """Write `report.html` and `figures/*.svg` into the run's folder and return the path of the page.

    Works at any stage of a run: what is not there yet is left out. defaults: the recipe's nested default settings; with
    them the report opens with the settings that differ, otherwise with the recipe's own. findings: what the run amounts
    to, if it is not what can be said of every sampler of one distribution.
    """
    from headwater.report.page import write  # drawing takes a moment to import, and most commands draw nothing

    return write(run, sections, defaults, findings or common_findings(figures_of(run)))
