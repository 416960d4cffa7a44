"""What the report of a posterior draws: the measurement, samples, their mean and deviation, residuals and coverage, and
samplers without training beside them.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from html import escape
from pathlib import Path

import numpy as np
import torch
from matplotlib.figure import Figure
from numpy.typing import NDArray
from torch import Tensor

from headwater.diffusion.likelihood_settings import LikelihoodSettings
from headwater.diffusion.operators import Mask, Operator
from headwater.diffusion.pictures import half_a_page, image_grid, is_image
from headwater.report import Card, Findings, Section, Term
from headwater.report.figures import MEDIUM, PALETTE, SERIES, custom_figure
from headwater.report.findings import line
from headwater.report.numbers import as_float, number

_TERMS = {
    "elbo": Term("log Z, lower bound", "Mean log-weight of the sampler's own chains; tight for a perfect sampler."),
    "elbo_error": Term("Its standard error"),
    "log_z_estimate": Term("log Z, reweighted", "Log of the mean weight: right where the sampler misses nothing."),
    "log_z_interval": Term("Its interval", "Half the width of the 95 % interval."),
    "eubo": Term(
        "log Z, upper bound",
        "Mean log-weight of chains walked back from draws of the posterior, as far as they are that.",
    ),
    "eubo_error": Term("Its standard error"),
    "eubo_from": Term("Draws for the upper bound", "By which sampler."),
    "effective_sample_size": Term("Effective sample size", "Share of the draws that carries the weight; 1 is perfect."),
    "pareto_k": Term("Pareto k of the weights", "Above 0.7 neither the reweighted log Z nor its interval holds."),
    "chi_squared": Term("Squared residual over noise", "A measured value, of the draws."),
    "chi_squared_reweighted": Term("The same, reweighted", "Of the draws by their weights: a perfect sampler's."),
    "coverage_of_90": Term("Coverage of 90 % intervals", "Share of the truth's values in the central 90 % of draws."),
    "error_of_mean": Term("Error of the mean", "Root mean square from the truth, in the units of the data."),
    "posterior_deviation": Term("Deviation of the draws", "Root mean square over values; to compare with that error."),
    "measurements": Term("Simulated measurements", "That were not learned from; the figures below are over them."),
    "coverage_largest": Term(
        "Largest error of coverage",
        "Of balls around random draws, over all levels (TARP); to be read against its mean.",
    ),
    "coverage_largest_expected": Term("Its mean", "For a perfect sampler, with so many measurements."),
    "mean_gap": Term("Gap of log Z", "Reweighted less lower bound, in nats, mean over measurements; 0 is perfect."),
    "mean_effective_sample_size": Term("Mean effective sample size", "Share of draws, mean over measurements."),
    "sliced_wasserstein_floor": Term("Sliced Wasserstein floor", "Between two sets of 256 of the reweighted draws."),
    "resampling_reward_calls": Term("Draws of the prior, resampled", "As many as training asked for, up to 50,000."),
    "resampling_log_z": Term("Their log Z", "Log of the prior's mean reward."),
    "resampling_effective_draws": Term("Their effective number", "Draws of the posterior that they are worth."),
    "resampling_is_enough": Term("Is that enough?", "Whether resampling does as well as the sampler here."),
}

_SHOWN = 36


@dataclass(frozen=True)
class Seen:
    """What was measured, `[1, *operator.measured]`, all in the units of the data."""

    operator: Operator
    y: Tensor
    likelihood: LikelihoodSettings


_HIDDEN = (190, 214, 226)
"""Colour of what a mask hides."""
_LEVELS = np.linspace(0.02, 0.98, 49)


def findings_of(figures: Mapping[str, object]) -> Findings:
    """Bounds, how far to trust them, and whether training was worth it."""
    return Findings(
        headline=[
            *line(
                figures, "log Z: {:.3f} reweighted; {:.3f} from below, {:.3f} from above",
                "log_z_estimate", "elbo", "eubo",
            ),
            *line(
                figures, "effective sample size: {:.3f} of a draw; Pareto k of the weights: {:.2f}",
                "effective_sample_size", "pareto_k",
            ),
            *line(
                figures, "importance resampling of {:,} draws of the prior: {:.1f} effective draws, log Z {:.3f}",
                "resampling_reward_calls", "resampling_effective_draws", "resampling_log_z",
            ),
            *line(
                figures, "over {:,} measurements: effective sample size {:.3f}, largest error of coverage {:.3f}; of a "
                "perfect sampler {:.3f}",
                "measurements", "mean_effective_sample_size", "coverage_largest", "coverage_largest_expected",
            ),
            *line(figures, "90 % intervals hold {:.3f} of the truth's values", "coverage_of_90"),
        ],
        verdict=_verdict(figures),
        cards=[
            Card(label, number(as_float(figures[name])), note)
            for name, label, note in (
                ("log_z_estimate", "log Z", _between(figures)),
                ("effective_sample_size", "Effective sample size", "of a draw; 1 is perfect"),
                ("chi_squared", "Squared residual", "over noise, a measured value"),
                ("coverage_of_90", "Coverage", "of 90 % intervals"),
                ("coverage_largest", "Error of coverage", _beside(figures)),
            )
            if name in figures and math.isfinite(as_float(figures[name]))
        ],
        terms=_TERMS,
    )  # fmt: skip


def _between(figures: Mapping[str, object]) -> str:
    low, high = as_float(figures.get("elbo")), as_float(figures.get("eubo"))
    return f"bounds {low:.2f} and {high:.2f}" if math.isfinite(low) and math.isfinite(high) else "estimated"


def _beside(figures: Mapping[str, object]) -> str:
    return f"largest; {as_float(figures.get('coverage_largest_expected')):.3f} for a perfect sampler"


def _verdict(figures: Mapping[str, object]) -> list[str]:
    share = as_float(figures.get("effective_sample_size"))
    if not math.isfinite(share):
        return []
    said = [
        f"The sampler's draws are worth {number(100 * share)} % of as many exact ones of the posterior, and log Z is "
        f"{as_float(figures.get('log_z_estimate')):.2f} ± {as_float(figures.get('log_z_interval')):.2f}."
    ]
    if as_float(figures.get("pareto_k")) > 0.7:
        said.append(
            "The weights have a heavy tail (Pareto k above 0.7): neither figure is to be trusted, train for longer."
        )
    calls, effective = (as_float(figures.get(f"resampling_{name}")) for name in ("reward_calls", "effective_draws"))
    if math.isfinite(effective):
        resampled = f"Plain importance resampling of {number(calls)} draws of the prior"
        said.append(
            f"{resampled} does as well here, with {number(effective)} effective draws: this problem needs no training."
            if figures.get("resampling_is_enough")
            else f"{resampled} comes to {number(effective)} effective draws."
        )
    return said


def report_sections(
    folder: Path,
    evaluation: Mapping[str, object],
    seen: Seen | None,
    truth: Tensor | None,
    values: NDArray[np.generic],
    text: Sequence[str],
) -> list[Section]:
    """values: the samples, `[N, *shape]` in the units of the data. text: the same as text."""
    sections = [_objects(folder, evaluation, seen, truth, values, text)]
    figures = [_residuals(seen, values), _coverage(truth, values)]
    if any(figures):
        sections.append(Section("Residuals and coverage", f'<div class="figures">{"".join(figures)}</div>'))
    table = _others(evaluation)
    return sections + ([Section("Samplers without training", table)] if table else [])


def _objects(
    folder: Path,
    evaluation: Mapping[str, object],
    seen: Seen | None,
    truth: Tensor | None,
    values: NDArray[np.generic],
    text: Sequence[str],
) -> Section:
    title, shape = "The posterior", values.shape[1:]
    if values.dtype.kind in "iu":
        lines = "\n".join(escape(one) for one in text[:_SHOWN])
        return Section(title, f"<pre>{lines}</pre>")
    numbers = values.astype(np.float64)
    if is_image(shape):
        return Section(
            title, f'<div class="figures">{"".join(_images(folder, evaluation, seen, truth, numbers))}</div>'
        )
    flat = numbers.reshape(len(numbers), -1)
    known = None if truth is None else truth.numpy().reshape(-1)
    draw = _points if flat.shape[1] == 2 else _profile
    return Section(
        title, half_a_page(title, custom_figure(lambda figure: draw(figure, flat, known), title=title, size=MEDIUM))
    )


def _images(
    folder: Path,
    evaluation: Mapping[str, object],
    seen: Seen | None,
    truth: Tensor | None,
    values: NDArray[np.float64],
) -> list[str]:
    low, high = (float(value) for value in np.quantile(values, [0.001, 0.999]))
    deviation = values.std(0)
    figures = []
    picture = None if seen is None else _measurement_image(seen, values.shape[1:], low, high)
    if seen is not None and picture is not None:
        hides = isinstance(seen.operator, Mask)
        figures.append(_image("Measurement", picture, "What is hidden is blue." if hides else ""))
    if truth is not None:
        figures.append(_image("Truth", image_grid(truth.numpy()[None], low, high)))
    figures += [
        _image("Mean of the samples", image_grid(values.mean(0)[None], low, high)),
        _image(
            "Deviation of the samples", image_grid(deviation[None], 0.0, float(deviation.max())),
            f"White is {number(float(deviation.max()))}, black is 0.",
        ),
        _image("Samples", image_grid(values[:_SHOWN], low, high)),
    ]  # fmt: skip
    for name in _drawn(evaluation):
        path = folder / f"baseline-{name}.npy"
        if path.is_file():
            figures.append(_image(f"By {name}", image_grid(np.load(path, allow_pickle=False)[:_SHOWN], low, high)))
    return figures


def _measurement_image(seen: Seen, shape: tuple[int, ...], low: float, high: float) -> str | None:
    """What was measured as a picture, if it is one; None otherwise."""
    operator, y = seen.operator, seen.y
    if isinstance(operator, Mask):
        known = torch.zeros(math.prod(shape), dtype=torch.bool)
        known[operator.seen] = True
        whole = torch.zeros(math.prod(shape))
        whole[operator.seen] = y.flatten().cpu()
        scaled = ((whole.view(shape) - low) / max(high - low, 1e-12)).clamp(0, 1).expand(3, -1, -1)
        blue = torch.tensor(_HIDDEN).view(3, 1, 1) / 255
        return image_grid(torch.where(known.view(shape).expand(3, -1, -1), scaled, blue).numpy()[None], 0.0, 1.0)
    if len(operator.measured) == 3 and operator.measured[0] in (1, 3):
        return image_grid(y.cpu().numpy(), float(y.min()), float(y.max()))
    return None


def _image(title: str, address: str, caption: str = "") -> str:
    image = f'<img alt="{escape(title)}" style="image-rendering: pixelated" src="{address}">'
    return half_a_page(title, image, caption)


def _points(figure: Figure, flat: NDArray[np.float64], known: NDArray[np.float64] | None) -> None:
    axes = figure.subplots()
    axes.scatter(flat[:1000, 0], flat[:1000, 1], s=7, alpha=0.4, color=SERIES[0], label="samples", linewidths=0)
    if known is not None:
        axes.scatter(known[0], known[1], s=40, marker="x", color=SERIES[1], label="truth")
    axes.set_xlabel("first value")
    axes.set_ylabel("second value")
    axes.legend(loc="lower right", bbox_to_anchor=(1.0, 1.01), ncols=2)


def _profile(figure: Figure, flat: NDArray[np.float64], known: NDArray[np.float64] | None) -> None:
    axes, place = figure.subplots(), np.arange(flat.shape[1])
    low, high = np.quantile(flat, [0.05, 0.95], axis=0)
    axes.fill_between(place, low, high, color=SERIES[0], alpha=0.25, linewidth=0, label="90 % of samples")
    axes.plot(place, flat.mean(0), color=SERIES[0], linewidth=1.2, label="their mean")
    if known is not None:
        axes.plot(place, known, ".", color=SERIES[1], markersize=4, label="truth")
    axes.set_xlabel("number of the value")
    axes.legend(loc="lower right", bbox_to_anchor=(1.0, 1.01), ncols=3)


def _residuals(seen: Seen | None, values: NDArray[np.generic]) -> str:
    if seen is None or seen.likelihood.name != "gaussian":
        return ""
    objects = torch.from_numpy(values[:500].astype(np.float32))
    with torch.no_grad():
        away = ((seen.y - seen.operator(objects)) / seen.likelihood.noise).flatten().numpy()
    edges = np.linspace(-4, 4, 41)
    title = "Residuals over noise"

    def draw(figure: Figure) -> None:
        axes = figure.subplots()
        share = np.histogram(away.clip(-4, 4), edges, density=True)[0]
        axes.stairs(share, edges, fill=True, color=SERIES[0], alpha=0.3, linewidth=0, label="samples")
        place = (edges[1:] + edges[:-1]) / 2
        axes.plot(
            place, np.exp(-(place**2) / 2) / math.sqrt(2 * math.pi), color=PALETTE["clay"], linewidth=1.2,
            label="the noise itself",
        )  # fmt: skip
        axes.set_xlabel("(y − A(x)) / deviation of the noise")
        axes.legend(loc="lower right", bbox_to_anchor=(1.0, 1.01), ncols=2)

    caption = "Of every measured value and sample. Narrower than the noise where samples follow the noise of y itself."
    return half_a_page(title, custom_figure(draw, title=title, size=MEDIUM), caption)


def _coverage(truth: Tensor | None, values: NDArray[np.generic]) -> str:
    if truth is None:
        return ""
    rank = (values.reshape(len(values), -1) < truth.numpy().reshape(1, -1)).mean(0)
    held = [float((np.abs(rank - 0.5) <= level / 2).mean()) for level in _LEVELS]
    title = "Coverage of the truth"

    def draw(figure: Figure) -> None:
        axes = figure.subplots()
        axes.plot(_LEVELS, _LEVELS, color=PALETTE["clay"], linewidth=1.0, label="calibrated")
        axes.plot(_LEVELS, held, color=SERIES[0], label="samples")
        axes.set_xlabel("central interval")
        axes.set_ylabel("share of values inside")
        axes.legend(loc="lower right", bbox_to_anchor=(1.0, 1.01), ncols=2)

    caption = "Over the values of one object, which are not independent: a guide, not a test."
    return half_a_page(title, custom_figure(draw, title=title, size=MEDIUM), caption)


def _drawn(evaluation: Mapping[str, object]) -> list[str]:
    """The baselines that drew anything."""
    rows = evaluation.get("baselines")
    return [str(one["name"]) for one in rows if "problem" not in one] if isinstance(rows, list) else []


def _others(evaluation: Mapping[str, object]) -> str:
    rows = evaluation.get("baselines")
    if not isinstance(rows, list) or not rows:
        return ""
    columns = {
        "draws": "Draws", "reward_calls": "Reward calls", "log_z": "log Z", "effective_draws": "Effective draws",
        "mean_log_reward": "Mean log-reward", "sliced_wasserstein": "Distance",
    }  # fmt: skip
    head = "".join(f'<th class="number">{name}</th>' for name in columns.values())
    body = ""
    for one in rows:
        if "problem" in one:
            cells = f'<td colspan="{len(columns)}">not possible here: {escape(str(one["problem"]))}</td>'
        else:
            shown = [number(as_float(one.get(name))) if one.get(name) is not None else "" for name in columns]
            cells = "".join(f'<td class="number">{cell}</td>' for cell in shown)
        body += f'<tr><th scope="row">{escape(str(one["name"]))}</th>{cells}</tr>'
    floor = number(as_float(evaluation.get("sliced_wasserstein_floor")))
    note = (
        "At the reward calls of training, up to 50,000 of them. Distance: sliced Wasserstein, from as many "
        f"reweighted draws of the trained sampler; its floor, between two sets of these, is {floor}. Resampling and "
        "twisted SMC are right in the limit of many draws, the others are biased."
    )
    table = f"<table><thead><tr><th>Sampler</th>{head}</tr></thead><tbody>{body}</tbody></table>"
    return f'<p>{note}</p><div class="scroll">{table}</div>'
