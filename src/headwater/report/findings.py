"""What a run amounts to: the few figures that its report opens with, and that a terminal shows in the end.

A recipe says it of its domain's figures; `common_findings` is what can be said of every sampler of one distribution.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field
from math import isfinite, nan
from typing import TYPE_CHECKING

from headwater.report.glossary import Term
from headwater.report.numbers import as_float, number

if TYPE_CHECKING:
    from headwater.runs import Run

Figures = Mapping[str, object]


@dataclass(frozen=True)
class Card:
    """A key figure. note: what to read it against."""

    label: str
    value: str
    note: str = ""


@dataclass(frozen=True)
class Findings:
    """What a domain says of a run's figures; all of it plain text.

    headline: lines on a terminal. verdict: the sentences that the report opens with; without any it counts samples.
    cards: key figures of quality, before those of effort that every report has. terms: what figures are called, and
    mean, by name; beyond the glossary's or in their place. shown: figures that the domain's sections show, which the
    table of all figures leaves out.
    """

    headline: Sequence[str] = ()
    verdict: Sequence[str] = ()
    cards: Sequence[Card] = ()
    terms: Mapping[str, Term] = field(default_factory=dict)
    shown: Collection[str] = ()


def figures_of(run: Run) -> dict[str, object]:
    """The figures of evaluation.json; and of training `trajectories`, and `log_z` as it was learnt."""
    logged = {name: value for row in run.metrics() for name, value in row.items() if name in ("trajectories", "log_z")}
    return logged | run.evaluation()


def common_findings(figures: Figures) -> Findings:
    """Of exact total variation or else of correlation, of log Z, and of the best objects beside random search's."""
    return Findings(
        headline=[
            *line(figures, "total variation from the exact distribution: {:.4f}", "total_variation"),
            *line(figures, "Pearson correlation of log-reward and log-probability: {:.3f}", "pearson"),
            *line(
                figures,
                "mean log-reward of the top 100: {:.3f}; of random search with {:,} reward calls: {:.3f}",
                "top_100_mean_log_reward", "baseline_calls", "baseline_top_100_mean_log_reward",
            ),
        ],
        verdict=_verdict(figures),
        cards=_cards(figures),
    )  # fmt: skip


def line(figures: Figures, text: str, *names: str) -> list[str]:
    """A line of a terminal: `text` with the figures of these names in it; none where one of them is not known."""
    values = [figures.get(name) for name in names]
    return [text.format(*values)] if all(isinstance(value, (int, float)) for value in values) else []


def after(figures: Figures) -> str:
    """How a sentence of a verdict begins: "After 12,500 trajectories the"."""
    drawn = as_float(figures.get("trajectories"))
    return f"After {number(drawn)} trajectories the" if isfinite(drawn) else "The"


def best_log_z(figures: Figures) -> float:
    """The best estimate of log Z there is, NaN without one."""
    known = [as_float(figures.get(name)) for name in ("log_z_estimate", "log_z")]
    return next((value for value in known if isfinite(value)), nan)


def _cards(figures: Figures) -> list[Card]:
    cards = []
    log_z, exact = best_log_z(figures), as_float(figures.get("log_z_exact"))
    if isfinite(log_z):
        cards.append(Card("log Z", f"{log_z:.3f}", f"exact {exact:.3f}" if isfinite(exact) else "learnt"))
    if "total_variation" in figures:
        cards.append(Card("Total variation", number(as_float(figures["total_variation"])), "exact; 0 is perfect"))
    elif "pearson" in figures:
        cards.append(Card("Pearson", number(as_float(figures["pearson"])), "log R with log-probability"))
    return cards


def _verdict(figures: Figures) -> list[str]:
    said = []
    distance, correlation = as_float(figures.get("total_variation")), as_float(figures.get("pearson"))
    if isfinite(distance):
        said.append(
            f"{after(figures)} sampler is within {number(distance)} of the target distribution in exact total "
            "variation."
        )
    elif isfinite(correlation):
        said.append(
            f"{after(figures)} sampler's log-probabilities follow log-reward with a Pearson correlation of "
            f"{correlation:.3f}."
        )
    top = as_float(figures.get("top_100_mean_log_reward"))
    baseline = as_float(figures.get("baseline_top_100_mean_log_reward"))
    if isfinite(top) and isfinite(baseline):
        spent = as_float(figures.get("baseline_calls"))
        calls = f" with {number(spent)} reward calls" if isfinite(spent) else ""
        said.append(
            f"Its 100 best objects have a mean log-reward of {number(top)}; "
            f"those of random search{calls} have {number(baseline)}."
        )
    return said
