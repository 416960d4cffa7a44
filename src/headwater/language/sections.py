"""The language sections of a report: pass@k and completions before and after, what was learnt at what divergence, and
how old and how good what was learnt from is.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from html import escape
from itertools import pairwise
from typing import TYPE_CHECKING

import numpy as np
from matplotlib.figure import Figure
from numpy.typing import NDArray

from headwater.language.findings import START, term
from headwater.report import Section
from headwater.report.figures import MEDIUM, PALETTE, SERIES, SMALL, custom_figure, line_figure
from headwater.report.numbers import as_float, number
from headwater.runs import Run

if TYPE_CHECKING:
    from headwater.language.recipe import LanguageRecipe

Rows = Sequence[Mapping[str, object]]

_MOST_CHARACTERS = 700
"""Of a prompt or a completion on the page."""
_STALENESS = "staleness/from_"
_COMPARED = (
    "mean_reward", "win_rate", "distinct_completions", "distinct_right_completions", "embedding_distance", "divergence",
    "entropy_per_token", "start_perplexity", "mean_length", "truncated", "failed_completions",
)  # fmt: skip


def sections(recipe: LanguageRecipe, run: Run) -> list[Section]:
    """What there is of each at this stage of the run; the files of the run alone are read."""
    rows, evaluation = run.metrics(), run.evaluation()
    made = [
        _answers(evaluation),
        _samples(run.read_json("completions.json")),
        _learning(rows, evaluation),
        _divergence(rows),
        _learnt_from(rows),
    ]
    return [section for section in made if section is not None]


def _answers(evaluation: Mapping[str, object]) -> Section | None:
    """Before and after, beside each other."""
    if START + "mean_reward" not in evaluation:
        return None
    prompts, each = (number(as_float(evaluation.get(name))) for name in ("prompts", "completions_per_prompt"))
    names = dict.fromkeys(["pass_at_1", f"pass_at_{each}", *_COMPARED])
    lines = "".join(
        f'<tr><th scope="row">{escape(term(name).label)}</th>'
        f'<td class="number">{_value(evaluation, START + name)}</td><td class="number">{_value(evaluation, name)}</td>'
        f'<td class="meaning">{escape(term(name).meaning)}</td></tr>'
        for name in names
        if name in evaluation
    )
    return Section(
        "Answers before and after",
        f"<p>{each} completions of each of {prompts} test prompts, by the starting model and by the trained one. The "
        "target is the starting model times exp(reward / beta): a good sampler raises the reward and keeps "
        'right answers different.</p><div class="scroll"><table><thead><tr><th>Figure</th>'
        '<th class="number">Before</th>'
        f'<th class="number">After</th><th>What it says</th></tr></thead><tbody>{lines}</tbody></table></div>'
        + _pass_at_k(evaluation),
    )


def _value(evaluation: Mapping[str, object], name: str) -> str:
    value, error = as_float(evaluation.get(name)), as_float(evaluation.get(f"{name}_error"))
    if not np.isfinite(value):
        return "–"
    return number(value) + (f" ± {number(error)}" if np.isfinite(error) else "")


def _pass_at_k(evaluation: Mapping[str, object]) -> str:
    curves = {
        label: (np.arange(1, len(values) + 1), np.array(values, dtype=np.float64))
        for label, name in (("before", START + "pass_at_k"), ("after", "pass_at_k"))
        if isinstance(values := evaluation.get(name), list) and len(values) > 1
    }
    if not curves:
        return ""
    drawn = line_figure(
        curves, x_label="k completions of a prompt", title="pass@k before and after training", size=MEDIUM
    )
    caption = (
        "Probability that one of k completions is right, estimated without bias from all that were drawn. It hardly "
        "rises with k where a model says one thing only."
    )
    return f'<div class="figures" style="margin-top: 1.6rem">{_chart("pass@k", drawn, caption)}</div>'


def _samples(shown: Mapping[str, object]) -> Section | None:
    """Prompts with some of their completions. Everything quoted is escaped."""
    prompts = shown.get("prompts")
    if not isinstance(prompts, list) or not prompts:
        return None
    verdicts = bool(shown.get("verdicts"))
    rows = []
    for entry in prompts:
        answer = f"<p>Answer: <code>{_quoted(entry['answer'])}</code></p>" if entry.get("answer") is not None else ""
        cells = "".join(
            f"<td>{''.join(_completion(one, verdicts) for one in entry.get(when, []))}</td>"
            for when in ("before", "after")
        )
        rows.append(f"<tr><td><pre>{_quoted(entry['prompt'])}</pre>{answer}</td>{cells}</tr>")
    right = f'<span style="color: {PALETTE["moss"]}">✓ right</span>, ' if verdicts else ""
    said = (
        f"<p>The first different completions of some test prompts; {right}with the reward, how many of the completions "
        "are this one, and whether the length limit or a stop text cut it off.</p>"
    )
    table = (
        '<div class="scroll"><table style="table-layout: fixed; min-width: 48rem"><thead><tr><th>Prompt</th>'
        f"<th>Before</th><th>After</th></tr></thead><tbody>{''.join(rows)}</tbody></table></div>"
    )
    return Section("Completions before and after", said + table)


def _completion(one: Mapping[str, object], verdicts: bool) -> str:
    reward = as_float(one.get("reward"))
    notes = [f"reward {number(reward)}" if np.isfinite(reward) else "reward failed"]
    if verdicts and np.isfinite(reward):
        notes = ["✓ right" if reward >= 1 else "not right"]
    times = as_float(one.get("times"))
    notes += [f"{number(times)} times"] if times > 1 else []
    notes += [] if one.get("finished") else ["cut off"]
    colour = PALETTE["moss"] if verdicts and reward >= 1 else PALETTE["muted"]
    said = f'<div style="color: {colour}; font-size: 0.83rem">{", ".join(notes)}</div>'
    return f'<pre style="margin-bottom: 0.2rem">{_quoted(one.get("text"))}</pre>{said}'


def _quoted(text: object) -> str:
    """Escaped, cut to what a page has room for, and without control characters, which no page may hold."""
    whole = re.sub(r"[\x00-\x08\x0b-\x1f\x7f-\x9f]", "\N{REPLACEMENT CHARACTER}", str(text))
    return escape(whole if len(whole) <= _MOST_CHARACTERS else f"{whole[:_MOST_CHARACTERS]} …")


def _learning(rows: Rows, evaluation: Mapping[str, object]) -> Section | None:
    """The test prompts' reward over updates, and over time."""
    name, label = ("eval/pass_at_1", "pass@1") if _has(rows, "eval/pass_at_1") else ("eval/mean_reward", "mean reward")
    if not _has(rows, name):
        return None
    start = as_float(evaluation.get(START + name.removeprefix("eval/")))
    drawn = [
        _figure(
            f"{label[0].upper()}{label[1:]} by {unit}" if label != "pass@1" else f"pass@1 by {unit}",
            {"test prompts": _curve(rows, name, x), "fresh completions": _curve(rows, "mean_reward", x)},
            x_label, caption, start,
        )
        for x, unit, x_label, caption in (
            ("iteration", "update", "updates", "One completion each of up to 100 test prompts; and what search drew."),
            ("seconds", "time", "seconds of training", "The same by wall-clock time; evaluation is not counted."),
        )
    ]  # fmt: skip
    return Section("What was learnt", f'<div class="figures">{"".join(drawn)}</div>')


def _divergence(rows: Rows) -> Section | None:
    """How far the policy has gone from where it started, and how much is left to chance."""
    drawn = [
        _figure(title, {"learnt from": _curve(rows, name, "iteration")}, "updates", caption)
        for name, title, caption in (
            ("divergence", "Divergence", "log π − log π_ref a completion, in the mean over the batches learnt from."),
            ("entropy_per_token", "Surprise a token", "−log π of a token of these batches, in the mean: what is old "
             "and unlikely now counts too. Of the policy's own draws it is the entropy."),
            ("beta", "Beta", "The weight of the divergence: small beta, sharp target."),
        )
        if _has(rows, name) and (name != "beta" or len(np.unique(_curve(rows, name, "iteration")[1])) > 1)
    ]  # fmt: skip
    return Section("Divergence and entropy", f'<div class="figures">{"".join(drawn)}</div>') if drawn else None


def _learnt_from(rows: Rows) -> Section | None:
    """Staleness of what was learnt from, and what the replay holds."""
    drawn = []
    bins = _staleness_bins(rows)
    if bins:
        title = "Staleness of what was learnt from"
        caption = "Updates by which the policy that wrote a completion was behind, over all logged batches."
        drawn.append(
            _chart(title, custom_figure(lambda figure: _bars(figure, bins), title=title, size=MEDIUM), caption)
        )
    if _has(rows, "staleness_mean"):
        curves = {label: _curve(rows, f"staleness_{label}", "iteration") for label in ("mean", "max")}
        drawn.append(_figure("Staleness by update", curves, "updates", "Of the completions of one batch.", size=MEDIUM))
    held = [
        ("replay/entries", "Completions remembered", "In the replay, of all prompts."),
        ("replay/conditions", "Prompts remembered", "That the replay has completions of."),
        ("replay/positive", "Share with a reward above 0", "Of the completions remembered."),
        ("replay/mean_age", "Age of what is remembered", "Updates since a completion was written, in the mean."),
    ]
    small = [
        _figure(title, {title: _curve(rows, name, "iteration")}, "updates", caption)
        for name, title, caption in held
        if _has(rows, name)
    ]
    drawn += small
    return Section("What was learnt from", f'<div class="figures">{"".join(drawn)}</div>') if drawn else None


def _staleness_bins(rows: Rows) -> list[tuple[str, float]]:
    """(label, share) of the ranges of staleness, over all rows that have them."""
    names = sorted({name for row in rows for name in row if name.startswith(_STALENESS)}, key=_lower_end)
    shares = {name: np.array([as_float(row[name]) for row in rows if name in row]) for name in names}
    ends = [_lower_end(name) for name in names]
    labels = [str(low) if high == low + 1 else f"{low}–{high - 1}" for low, high in pairwise(ends)]
    labels += [f"{low}+" for low in ends[-1:]]
    return [(label, float(np.nanmean(shares[name]))) for label, name in zip(labels, names, strict=True)]


def _lower_end(name: str) -> int:
    return int(name.removeprefix(_STALENESS))


def _bars(figure: Figure, bins: Sequence[tuple[str, float]]) -> None:
    axes = figure.subplots()
    axes.bar([label for label, _ in bins], [100 * share for _, share in bins], color=SERIES[0], alpha=0.75)
    axes.set_xlabel("updates behind")
    axes.set_ylabel("% of completions")


def _figure(
    title: str,
    curves: Mapping[str, tuple[NDArray[np.float64], NDArray[np.float64]]],
    x_label: str,
    caption: str,
    reference: float = float("nan"),
    size: tuple[float, float] = SMALL,
) -> str:
    known = {label: (x, y) for label, (x, y) in curves.items() if np.isfinite(y).any()}
    drawn = line_figure(known, x_label=x_label, title=title, reference=reference, reference_label="start", size=size)
    return _chart(title, drawn, caption)


def _chart(title: str, svg: str, caption: str) -> str:
    return (
        f'<figure class="chart half"><h3>{escape(title)}</h3>{svg}<figcaption>{escape(caption)}</figcaption></figure>'
    )


def _curve(rows: Rows, name: str, x: str) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    with_it = [row for row in rows if name in row and x in row]
    return np.array([as_float(row[x]) for row in with_it]), np.array([as_float(row[name]) for row in with_it])


def _has(rows: Rows, name: str) -> bool:
    return any(np.isfinite(as_float(row.get(name))) for row in rows)
