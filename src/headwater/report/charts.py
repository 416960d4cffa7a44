"""The figures that every run has: how training went, its samples' rewards, how well probability follows reward."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from headwater.report.figures import histogram_figure, line_figure, scatter_figure
from headwater.report.glossary import METRICS, Term, evaluation_term
from headwater.report.numbers import as_float, number
from headwater.runs import Samples

Rows = Sequence[Mapping[str, object]]

_LOGARITHMIC = {"loss", "gradient_norm", "eval/total_variation", "eval/jensen_shannon"}
_BOUNDS = {"eval/elbo": "ELBO", "eval/eubo": "EUBO"}
_NOT_CURVES = {"eval/log_z_exact"} | _BOUNDS.keys()


@dataclass(frozen=True)
class Chart:
    """A figure with its words. name: its file's name without ending."""

    name: str
    title: str
    caption: str
    svg: str


def convergence_charts(rows: Rows, evaluation: Mapping[str, object], terms: Mapping[str, Term]) -> list[Chart]:
    """One small figure for each quantity that was logged, over the trajectories drawn. terms: the domain's."""
    charts = []
    exact = as_float(evaluation.get("log_z_exact"))
    evaluated = sorted({name for row in rows for name in row if name.startswith("eval/")} - _NOT_CURVES)
    for name in [*METRICS, *evaluated]:
        term = METRICS.get(name) or evaluation_term(name.removeprefix("eval/"), terms)
        curve = _curve(rows, name)
        if not np.isfinite(curve[1]).any():
            continue
        positive = bool((curve[1] > 0).any())
        svg = line_figure(
            {term.label: curve},
            x_label="trajectories drawn",
            title=f"{term.label} over training",
            log_y=name in _LOGARITHMIC and positive,
            smooth=not name.startswith("eval/"),
            reference=exact if name == "log_z" else None,
            reference_label="exact",
        )
        charts.append(Chart(name.replace("/", "_"), term.label, term.meaning, svg))
    bounds = {label: curve for name, label in _BOUNDS.items() if np.isfinite((curve := _curve(rows, name))[1]).any()}
    if bounds:
        title = "Bounds on log Z"
        svg = line_figure(
            bounds, x_label="trajectories drawn", title=title, reference=exact, reference_label="exact log Z"
        )
        charts.append(Chart("log_z_bounds", title, "Below from the sampler's draws, above from the target's.", svg))
    return charts


def throughput_chart(rows: Rows) -> Chart | None:
    """Trajectories per second between logged rows, over the time trained; None before there are two rows."""
    drawn, seconds = _column(rows, "trajectories"), _column(rows, "seconds")
    known = np.isfinite(drawn) & np.isfinite(seconds)
    drawn, seconds = drawn[known], seconds[known]
    passed = np.diff(seconds)
    if not (passed > 0).any():
        return None
    rate = np.diff(drawn)[passed > 0] / passed[passed > 0]
    svg = line_figure(
        {"trajectories per second": (seconds[1:][passed > 0], rate)},
        x_label="seconds of training",
        title="Trajectories per second over training",
        smooth=True,
        size=(5.2, 2.4),
    )
    caption = (
        f"Trajectories drawn and learnt from per second: {number(float(np.median(rate)))} in the median, "
        f"{number(float(drawn[-1] / seconds[-1]))} overall. Evaluation and checkpoints are not counted."
    )
    return Chart("throughput", "Trajectories per second", caption, svg)


def quality_by_time_chart(rows: Rows) -> Chart | None:
    """Exact total variation over the seconds trained; None where it was not measured."""
    measured = [row for row in rows if "eval/total_variation" in row and "seconds" in row]
    seconds, distance = _column(measured, "seconds"), _column(measured, "eval/total_variation")
    if not (np.isfinite(seconds) & (distance > 0)).any():
        return None
    svg = line_figure(
        {"total variation": (seconds, distance)},
        x_label="seconds of training",
        title="Total variation by time",
        log_y=True,
    )
    return Chart("total_variation_by_time", "Total variation by time", "Exact; evaluation is not counted.", svg)


def search_charts(rows: Rows) -> list[Chart]:
    """How searching and learning kept up with each other, over the time trained; empty for a run that searched inline.

    Each figure is of the time between two logged rows.
    """
    rows = [row for row in rows if "search/updates_per_second" in row]
    if not rows:
        return []
    seconds = _column(rows, "seconds")
    restarts, late = (number(as_float(rows[-1].get(f"search/{name}", 0))) for name in ("restarts", "late"))

    def chart(name: str, title: str, caption: str, **curves: str) -> Chart:
        drawn = {label.replace("_", " "): (seconds, _column(rows, f"search/{key}")) for label, key in curves.items()}
        return Chart(name, title, caption, line_figure(drawn, x_label="seconds of training", title=title))

    return [
        chart(
            "search_throughput", "Trajectories per second", "As the searchers delivered them, by wall-clock time.",
            trajectories="trajectories_per_second",
        ),
        chart(
            "learner_throughput", "Updates per second", "As the learner made them, by wall-clock time.",
            updates="updates_per_second",
        ),
        chart(
            "search_idle", "Share of time idle",
            "The learner waits for fresh trajectories, or the searchers wait for the learner: more searchers help in "
            f"the first case only. Searchers that had to be replaced: {restarts}.",
            learner="learner_idle", searchers="worker_idle",
        ),
        chart(
            "staleness", "Staleness of fresh batches",
            f"Updates by which the policy that drew them was behind. Batches too stale to be handed out: {late}.",
            mean="staleness_mean", largest="staleness_max",
        ),
    ]  # fmt: skip


def reward_chart(samples: Samples, baseline: Sequence[object]) -> Chart | None:
    """The histogram of the samples' log-rewards, with random search's if there is one; None without a finite value."""
    values = {"sampler": samples.log_reward}
    if not np.isfinite(samples.log_reward).any():
        return None
    caption = f"{number(len(samples.objects))} draws from the sampler, repeats included."
    if baseline:
        values["random search"] = np.array([as_float(value) for value in baseline])
        caption += f" Random search: {number(len(baseline))} objects drawn blindly and scored."
    without = int(np.sum(~np.isfinite(samples.log_reward)))
    if without:
        caption += f" {number(without)} draws without a finite log-reward are left out."
    score = "log-reward" if samples.is_logarithm else "reward"
    svg = histogram_figure(values, x_label=score, title=f"Distribution of the {score}s of samples")
    return Chart("reward_distribution", "Rewards of the samples", caption, svg)


def calibration_chart(samples: Samples, log_z: float) -> Chart | None:
    """log-probability under the sampler against log-reward, an object a point; None with fewer than three points."""
    first = np.unique(np.array(samples.objects, dtype=object).astype(str), return_index=True)[1]
    log_reward, log_prob = samples.log_reward[first], samples.log_prob[first]
    known = np.isfinite(log_reward) & np.isfinite(log_prob)
    log_reward, log_prob = log_reward[known], log_prob[known]
    if len(log_reward) < 3:
        return None
    line = (1.0, -log_z) if np.isfinite(log_z) else None
    svg = scatter_figure(
        log_reward,
        log_prob,
        x_label="log-reward",
        y_label="log-probability under the sampler",
        title="Log-probability under the sampler against log-reward",
        line=line,
        line_label="log R − log Z",
    )
    caption = f"Each of the {number(len(log_reward))} distinct objects drawn. "
    if np.ptp(log_reward) > 0 and np.ptp(log_prob) > 0:
        caption += f"Pearson {pearson(log_reward, log_prob):.3f}, Spearman {spearman(log_reward, log_prob):.3f}. "
    if line is not None:
        caption += "A perfect sampler's points lie on the line."
    return Chart("calibration", "Probability follows reward", caption.strip(), svg)


def pearson(x: NDArray[np.float64], y: NDArray[np.float64]) -> float:
    """Linear correlation of `x` and `y`, both `[N]` and not constant."""
    x, y = x - x.mean(), y - y.mean()
    return float((x * y).sum() / np.sqrt((x * x).sum() * (y * y).sum()))


def spearman(x: NDArray[np.float64], y: NDArray[np.float64]) -> float:
    """Correlation of the ranks of `x` and `y`, equal values sharing their mean rank."""
    return pearson(_ranks(x), _ranks(y))


def _ranks(values: NDArray[np.float64]) -> NDArray[np.float64]:
    _, group, count = np.unique(values, return_inverse=True, return_counts=True)
    last = count.cumsum()
    return (last - (count - 1) / 2)[group]


def _curve(rows: Rows, name: str) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """`(x, y)` of one metric where it was logged; x is the trajectories drawn, or else the iteration."""
    with_it = [row for row in rows if name in row]
    x = [as_float(row.get("trajectories", row.get("iteration"))) for row in with_it]
    known = np.isfinite(x)
    return np.array(x)[known], _column(with_it, name)[known]


def _column(rows: Rows, name: str) -> NDArray[np.float64]:
    return np.array([as_float(row.get(name)) for row in rows], dtype=np.float64)
