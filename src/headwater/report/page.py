"""The report's page: gathers what a run has, fills `page.html` with every quoted text escaped, writes both.

The page holds its style and figures, and its content security policy forbids scripts and requests, whatever a section
may contain.
"""

from __future__ import annotations

import math
import re
import shlex
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from html import unescape
from importlib.resources import files
from pathlib import Path

import numpy as np
from jinja2 import Environment, PackageLoader, StrictUndefined, Template
from markupsafe import Markup

from headwater.objects import UNTRAINED
from headwater.report import Section, charts, numbers
from headwater.report.figures import DARK_PALETTE, PALETTE
from headwater.report.findings import Card, Findings, best_log_z, figures_of
from headwater.report.glossary import EVALUATION, evaluation_term
from headwater.report.numbers import as_float, number
from headwater.runs import Run, Samples, atomic

_BEST = 20
_MOST_CHARACTERS = 300
_MOST_EXTRA_COLUMNS = 4


def write(run: Run, sections: Sequence[Section], defaults: Mapping[str, object] | None, findings: Findings) -> Path:
    """`headwater.report.write_report`, with drawing imported."""
    rows, evaluation, samples = run.metrics(), run.evaluation(), run.samples()
    last: dict[str, object] = {name: value for row in rows for name, value in row.items()}
    convergence = charts.convergence_charts(rows, evaluation, findings.terms)
    by_time = charts.quality_by_time_chart(rows)
    convergence += [by_time] if by_time else []
    throughput, searching = charts.throughput_chart(rows), charts.search_charts(rows)
    baseline = evaluation.get("baseline_log_reward")
    rewards = charts.reward_chart(samples, baseline if isinstance(baseline, list) else []) if samples else None
    calibration = (
        charts.calibration_chart(samples, best_log_z(figures_of(run))) if samples and samples.is_logarithm else None
    )
    sampled = [chart for chart in (rewards, calibration) if chart]
    html = _template().render(
        run=run,
        recipe=run.recipe_name,
        settings=_flat(run.settings),
        asked=_asked(run.settings, defaults),
        compared=defaults is not None,
        provenance=_Provenance.of(run.provenance),
        cards=_cards(findings, last, samples),
        verdict=_verdict(findings, samples),
        notices=_notices(run, last, evaluation, samples),
        failed=_failures(last),
        figures_of_evaluation=_evaluation_table(evaluation, findings),
        best=_best_objects(samples) if samples and samples.is_logarithm else None,
        sections=[(section.title, Markup(_themed(section.html))) for section in sections],
        convergence=_inlined(convergence),
        sampled=_inlined(sampled),
        throughput=_inlined([throughput])[0] if throughput else None,
        searching=_inlined(searching),
        totals=_totals(last, run.scored()),
        palettes={"light": PALETTE, "dark": DARK_PALETTE},
        style=Markup(files("headwater.report").joinpath("style.css").read_text()),
    )
    drawn = [*convergence, *sampled, *([throughput] if throughput else []), *searching]
    drawings = {chart.name: chart.svg for chart in drawn}
    _write_figures(run.folder / "figures", drawings | _drawings_of(sections))
    path = run.folder / "report.html"
    with atomic(path) as partial:
        partial.write_text(html, encoding="utf-8")
    return path


def _template() -> Template:
    environment = Environment(
        loader=PackageLoader("headwater", "report"),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.globals |= {"quote": shlex.quote, "repr": repr}
    return environment.get_template("page.html")


# What the run amounts to


def _cards(findings: Findings, last: Mapping[str, object], samples: Samples | None) -> list[Card]:
    """The findings' key figures, then what was drawn and what it took."""
    cards = list(findings.cards)
    if samples:
        finite = samples.log_reward[np.isfinite(samples.log_reward)]
        if len(finite) and samples.is_logarithm:
            cards.append(Card("Mean log-reward", number(float(finite.mean())), "of the samples"))
        distinct = len(set(samples.objects))
        cards.append(Card("Distinct objects", number(distinct), f"of {number(len(samples.objects))} samples"))
    for name, label, note in (
        ("trajectories", "Trajectories", "drawn in training"),
        ("reward_calls", "Reward calls", "in training"),
    ):
        if np.isfinite(as_float(last.get(name))):
            cards.append(Card(label, number(as_float(last[name])), note))
    if np.isfinite(as_float(last.get("seconds"))):
        cards.append(Card("Training time", numbers.duration(as_float(last["seconds"])), "wall-clock"))
    return cards


def _verdict(findings: Findings, samples: Samples | None) -> Sequence[str]:
    """What came out, in a sentence or three that only say what was measured."""
    if findings.verdict or not samples:
        return findings.verdict
    distinct = number(len(set(samples.objects)))
    return [f"{number(len(samples.objects))} samples were drawn, {distinct} of them distinct."]


def _notices(
    run: Run, last: Mapping[str, object], evaluation: Mapping[str, object], samples: Samples | None
) -> list[tuple[str, str]]:
    """What is not there yet, with the command that brings it."""
    folder = shlex.quote(str(run.folder))
    if not last:
        return [("Nothing has been logged yet. Go on with", f"headwater resume {folder}")]
    missing = []
    if samples is None:
        missing.append(("There are no samples yet. Draw some with", f"headwater sample {folder}"))
    if not evaluation:
        missing.append(("The sampler has not been evaluated yet. Do so with", f"headwater evaluate {folder}"))
    return missing


def _failures(last: Mapping[str, object]) -> str | None:
    failed, calls = as_float(last.get("failed")), as_float(last.get("reward_calls"))
    if not failed > 0:
        return None
    share = f" of {number(calls)} ({100 * failed / calls:.2g}%)" if calls >= failed else ""
    return f"{number(failed)}{share} reward calls failed. The objects concerned were left out of training."


# Tables


def _totals(last: Mapping[str, object], scored: Mapping[str, int]) -> dict[str, str]:
    """What training came to in all, by name. scored: distinct objects by who first asked for their rewards."""
    counted = {
        "iterations": as_float(last.get("iteration")),
        "trajectories drawn": as_float(last.get("trajectories")),
        "reward calls": as_float(last.get("reward_calls")),
        "reward calls saved, the reward being known": as_float(last.get("reward_calls_saved")) or math.nan,
        "failed rewards": as_float(last.get("failed")),
        "distinct objects scored in training": sum(n for who, n in scored.items() if who not in UNTRAINED) or math.nan,
        "others scored to evaluate and to sample": sum(scored.get(who, 0) for who in UNTRAINED) or math.nan,
    }
    totals = {name: number(value) for name, value in counted.items() if np.isfinite(value)}
    seconds = as_float(last.get("seconds"))
    return totals | ({"training time": numbers.duration(seconds)} if np.isfinite(seconds) else {})


def _flat(settings: Mapping[str, object], prefix: str = "") -> dict[str, str]:
    """Nested settings by dotted name, as text."""
    flat: dict[str, str] = {}
    for name, value in settings.items():
        if isinstance(value, Mapping):
            flat |= _flat(value, f"{prefix}{name}.")
        else:
            items = value if isinstance(value, (list, tuple)) else [value]
            flat[prefix + name] = ", ".join(
                str(item).lower() if isinstance(item, bool) else str(item) for item in items
            )
    return flat


def _asked(settings: Mapping[str, object], defaults: Mapping[str, object] | None) -> dict[str, str]:
    """The settings to show first: those that differ from the defaults or, without defaults, the recipe's own."""
    if defaults is None:
        return _flat({name: value for name, value in settings.items() if not isinstance(value, Mapping)})
    usual = _flat(defaults)
    return {name: value for name, value in _flat(settings).items() if usual.get(name) != value}


def _evaluation_table(evaluation: Mapping[str, object], findings: Findings) -> list[tuple[str, str, str]]:
    """(label, value, meaning) of every single figure that no section shows; the domain's come first, in its order, then
    the glossary's."""
    order = {name: position for position, name in enumerate(dict.fromkeys([*findings.terms, *EVALUATION]))}
    rows = []
    for name in sorted(evaluation, key=lambda name: order.get(name, len(order))):
        value = evaluation[name]
        if isinstance(value, (list, Mapping)) or name in findings.shown:
            continue
        term = evaluation_term(name, findings.terms)
        rows.append((term.label, _cell(value), term.meaning))
    return rows


@dataclass(frozen=True)
class _Best:
    """The best distinct objects. columns: names of the columns beyond the fixed ones, and the CSS class of each."""

    columns: list[tuple[str, str]]
    rows: list[list[str]]


def _best_objects(samples: Samples) -> _Best:
    names = list(samples.extra)[:_MOST_EXTRA_COLUMNS]
    classes = ["number" if all(map(_is_number, samples.extra[name])) else "object" for name in names]
    times = Counter(samples.objects)
    first = {text: i for i, text in reversed(list(enumerate(samples.objects)))}
    log_reward = np.nan_to_num(samples.log_reward, nan=-np.inf)
    best = sorted(first.values(), key=lambda i: (-log_reward[i], i))[:_BEST]
    rows = []
    for i in best:
        cells = [numbers.reward(float(samples.log_reward[i])), f"{samples.log_prob[i]:.3f}".replace("-", "−")]
        extra = [_cell(samples.extra[name][i]) for name in names]
        rows.append([_clipped(samples.objects[i]), *cells, str(times[samples.objects[i]]), *extra])
    return _Best([(name.replace("_", " "), kind) for name, kind in zip(names, classes, strict=True)], rows)


def _is_number(value: object) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool)


def _cell(value: object) -> str:
    if _is_number(value):
        return number(as_float(value))
    return _clipped("" if value is None else str(value))


def _clipped(text: str) -> str:
    return text if len(text) <= _MOST_CHARACTERS else f"{text[:_MOST_CHARACTERS]} …"


@dataclass(frozen=True)
class _Provenance:
    """What the page says of where a run was made; empty where it is not known."""

    command: str
    started: str
    seed: str
    versions: dict[str, str]
    hardware: dict[str, str]

    @staticmethod
    def of(provenance: Mapping[str, object]) -> _Provenance:
        command, versions, hardware = (provenance.get(name) for name in ("command", "versions", "hardware"))
        return _Provenance(
            command=shlex.join(map(str, command)) if isinstance(command, list) else "",
            started=str(provenance.get("started", "")),
            seed=str(provenance.get("seed", "")),
            versions=_flat(versions) if isinstance(versions, Mapping) else {},
            hardware=_flat({name: value for name, value in hardware.items() if value is not None})
            if isinstance(hardware, Mapping)
            else {},
        )


# Figures in the page and in files


def _inlined(drawn: Sequence[charts.Chart]) -> list[charts.Chart]:
    return [replace(chart, svg=Markup(_themed(chart.svg))) for chart in drawn]


def _themed(html: str) -> str:
    """The same markup with the palette's colours inside its pictures left to the page, which has others in the dark."""

    def recolour(picture: re.Match[str]) -> str:
        drawn = picture.group(0)
        for name, colour in PALETTE.items():
            drawn = drawn.replace(colour, f"var(--{name})")
        return drawn

    return re.sub(r"<svg\b.*?</svg>", recolour, html, flags=re.DOTALL)


def _drawings_of(sections: Sequence[Section]) -> dict[str, str]:
    """The pictures in the sections that can stand alone as files, by file name."""
    drawings: dict[str, str] = {}
    for section in sections:
        stem = re.sub(r"[^a-z0-9]+", "_", unescape(section.title).lower()).strip("_") or "section"
        pictures = re.findall(r'<svg\b[^>]*xmlns="http://www.w3.org/2000/svg".*?</svg>', section.html, re.DOTALL)
        for i, picture in enumerate(pictures):
            drawings[f"{stem}_{i + 1}" if len(pictures) > 1 else stem] = picture
    return drawings


def _write_figures(folder: Path, drawings: Mapping[str, str]) -> None:
    folder.mkdir(exist_ok=True)
    for name, svg in drawings.items():
        with atomic(folder / f"{re.sub(r'[^A-Za-z0-9_-]+', '_', name)}.svg") as partial:
            partial.write_text(svg + "\n", encoding="utf-8")
