"""Figures as SVG text: curves, histograms, scatter plots and heat maps in one visual style, for pages and for files.

Each function returns one `<svg>` element that stands alone as a file and can be placed in a page as it is: text stays
text, the same data give the same bytes, and ids carry a digest of the figure, so that figures on one page do not clash.
Matplotlib lays out and draws, through its object-oriented interface: nothing is shared with the caller's own plots.
"""

from __future__ import annotations

import hashlib
import io
import re
from collections.abc import Callable, Mapping, Sequence
from html import escape
from typing import Any

import matplotlib
import numpy as np
from matplotlib.axes import Axes
from matplotlib.backends.backend_svg import FigureCanvasSVG
from matplotlib.colors import LinearSegmentedColormap, Normalize
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, LogLocator, MaxNLocator
from numpy.typing import ArrayLike, NDArray

PALETTE = {
    "ink": "#1d2733",
    "muted": "#5d6b7a",
    "rule": "#d5dce3",
    "water": "#0a6c8e",
    "clay": "#c8590d",
    "moss": "#5b8a2b",
    "plum": "#8f4a94",
}
"""The colours of every figure by role; the last four, for data, stay apart under the common kinds of colour blindness.
A page may swap any of them for its own by this exact value, as the report does with `DARK_PALETTE`."""

DARK_PALETTE = {
    "ink": "#e6ebf0",
    "muted": "#9aa8b5",
    "rule": "#303c48",
    "water": "#4fb3d6",
    "clay": "#f08a45",
    "moss": "#9cc96a",
    "plum": "#cf97d3",
}
"""The same on a dark page."""

SERIES = (PALETTE["water"], PALETTE["clay"], PALETTE["moss"], PALETTE["plum"])
SMALL, MEDIUM = (3.5, 2.3), (5.2, 3.3)
"""Figure sizes in inches: one of several side by side, and half a page."""

_SEQUENTIAL = LinearSegmentedColormap.from_list(
    "headwater", ["#f4f8f6", "#cde5df", "#84c1c4", "#3b93ad", "#0a6c8e", "#124a70", "#142848"]
)
_DIVERGING = LinearSegmentedColormap.from_list(
    "headwater-difference", ["#7d3403", "#c8590d", "#eeb182", "#f7f6f3", "#8fc3d4", "#0a6c8e", "#0a3c58"]
)
_FONT = "system-ui, -apple-system, 'Segoe UI', Helvetica, Arial, sans-serif"
_STYLE: dict[Any, Any] = {
    "svg.fonttype": "none",
    "svg.hashsalt": "headwater",
    "font.family": ["DejaVu Sans"],  # ships with matplotlib and is wide: text laid out with it fits in any other font
    "font.size": 8.0,
    "text.color": PALETTE["ink"],
    "text.parse_math": False,  # labels are data: a dollar sign in one is a dollar sign
    "axes.edgecolor": PALETTE["muted"],
    "axes.labelcolor": PALETTE["ink"],
    "axes.labelsize": 8.0,
    "axes.linewidth": 0.6,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "axes.grid.axis": "y",
    "axes.axisbelow": True,
    "axes.titlesize": 8.5,
    "axes.formatter.useoffset": False,
    "grid.color": PALETTE["rule"],
    "grid.linewidth": 0.5,
    "xtick.color": PALETTE["muted"],
    "ytick.color": PALETTE["muted"],
    "xtick.major.width": 0.6,
    "ytick.major.width": 0.6,
    "xtick.major.size": 2.5,
    "ytick.major.size": 0.0,
    "xtick.minor.size": 0.0,
    "ytick.minor.size": 0.0,
    "legend.frameon": False,
    "legend.fontsize": 7.5,
    "legend.handlelength": 1.4,
    "legend.borderaxespad": 0.0,
    "lines.linewidth": 1.4,
    "lines.solid_capstyle": "round",
    "savefig.transparent": True,
    "figure.facecolor": "none",
    "axes.facecolor": "none",
}
_RASTER_DPI = 220
_STEPS = (1, 2, 2.5, 5, 10)
_MOST_POINTS_AS_SHAPES = 500
_MOST_RAW_POINTS = 800


def line_figure(
    curves: Mapping[str, tuple[ArrayLike, ArrayLike]],
    *,
    x_label: str,
    title: str,
    log_y: bool = False,
    smooth: bool = False,
    reference: float | None = None,
    reference_label: str = "",
    size: tuple[float, float] = SMALL,
) -> str:
    """Curves `(x, y)` by label over a common x axis, as SVG; points that are not finite are gaps.

    log_y: logarithmic y axis; values that are not positive are gaps. smooth: a centred moving mean (of the logarithm
    where the axis is logarithmic) over the raw curve, which stays visible behind. reference: a horizontal line at a
    known value. A legend appears when there is more than one thing to tell apart.
    """
    with matplotlib.rc_context(_STYLE):
        figure, axes = _blank(size)
        for (label, (x, y)), colour in zip(curves.items(), _cycle(len(curves)), strict=True):
            _curve(axes, _array(x), _array(y), label, colour, log_y, smooth)
        if reference is not None and not np.isfinite(reference):
            reference = None
        if reference is not None:
            axes.axhline(reference, color=PALETTE["ink"], linewidth=0.9, linestyle=(0, (4, 3)), label=reference_label)
        if log_y:
            _logarithmic(axes)
        else:
            axes.yaxis.set_major_locator(MaxNLocator(5, steps=_STEPS))
            if max(np.abs(axes.get_ylim())) >= 10_000:
                axes.yaxis.set_major_formatter(FuncFormatter(_short_number))
        axes.xaxis.set_major_locator(MaxNLocator(5, steps=_STEPS))
        axes.xaxis.set_major_formatter(FuncFormatter(_short_number))
        axes.set_xlabel(x_label)
        axes.margins(x=0.02)
        if len(curves) + (reference is not None and bool(reference_label)) > 1:
            _legend(axes)
        return _svg(figure, title)


def histogram_figure(
    values: Mapping[str, ArrayLike],
    *,
    x_label: str,
    title: str,
    size: tuple[float, float] = MEDIUM,
) -> str:
    """Histograms by label over common bins, each as a share of its own finite values, as SVG."""
    finite = {label: _finite(_array(numbers)) for label, numbers in values.items()}
    everything = np.concatenate([*finite.values(), np.empty(0)])
    with matplotlib.rc_context(_STYLE):
        figure, axes = _blank(size)
        edges = _bin_edges(everything)
        for (label, numbers), colour in zip(finite.items(), _cycle(len(finite)), strict=True):
            share = np.histogram(numbers, edges)[0] / max(len(numbers), 1)
            axes.stairs(share, edges, fill=True, color=colour, alpha=0.22, linewidth=0)
            axes.stairs(share, edges, color=colour, linewidth=1.2, label=label)
        axes.set_xlabel(x_label)
        axes.yaxis.set_major_locator(MaxNLocator(5, steps=_STEPS))
        axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{100 * value:.3g}%"))
        axes.set_ylim(bottom=0)
        if len(finite) > 1:
            _legend(axes)
        return _svg(figure, title)


def scatter_figure(
    x: ArrayLike,
    y: ArrayLike,
    *,
    x_label: str,
    y_label: str,
    title: str,
    line: tuple[float, float] | None = None,
    line_label: str = "",
    size: tuple[float, float] = MEDIUM,
) -> str:
    """Points `(x, y)`, both `[N]`, as SVG; pairs that are not finite are left out. Many points become one picture.

    line: the (slope, intercept) of a straight line to compare with, named `line_label`.
    """
    x, y = _array(x), _array(y)
    kept = np.isfinite(x) & np.isfinite(y)
    x, y = x[kept], y[kept]
    with matplotlib.rc_context(_STYLE):
        figure, axes = _blank(size)
        axes.grid(True, axis="both")
        axes.scatter(
            x,
            y,
            s=9,
            color=PALETTE["water"],
            alpha=float(np.clip(30 / np.sqrt(max(len(x), 1)), 0.15, 0.7)),
            linewidths=0,
            rasterized=len(x) > _MOST_POINTS_AS_SHAPES,
        )
        if line is not None and len(x):
            ends = np.array([x.min(), x.max()])
            limits = axes.get_ylim()
            axes.plot(ends, line[0] * ends + line[1], color=PALETTE["clay"], linewidth=1.1, label=line_label)
            axes.set_ylim(limits)
            _legend(axes)
        axes.set_xlabel(x_label)
        axes.set_ylabel(y_label)
        axes.xaxis.set_major_locator(MaxNLocator(6, steps=_STEPS))
        axes.yaxis.set_major_locator(MaxNLocator(6, steps=_STEPS))
        return _svg(figure, title)


def heat_maps(
    learned: NDArray[np.floating],
    true: NDArray[np.floating],
    *,
    title: str,
    axis_labels: tuple[str, str] = ("first axis", "second axis"),
) -> str:
    """Two distributions on a grid, each `[A, B]`, side by side on one colour scale, and their difference, as SVG.

    The first axis runs rightwards, the second upwards. Raises ValueError unless both are matrices of one shape. A space
    of more axes is to be summed over the others first.
    """
    learned, true = _array(learned), _array(true)
    if learned.ndim != 2 or learned.shape != true.shape:
        raise ValueError(f"learned has shape {learned.shape} and true {true.shape}: both must be one shape [A, B]")
    difference = learned - true
    top = float(np.nanmax([*_finite(learned), *_finite(true), 0.0])) or 1.0
    reach = float(np.max(np.abs(_finite(difference)), initial=0.0)) or 1.0
    panels = [
        ("Learned", learned, _SEQUENTIAL, Normalize(0, top)),
        ("True", true, _SEQUENTIAL, Normalize(0, top)),
        ("Learned − true", difference, _DIVERGING, Normalize(-reach, reach)),
    ]
    with matplotlib.rc_context(_STYLE | {"axes.grid": False, "xtick.major.size": 0.0, "axes.linewidth": 0.4}):
        height = 0.75 + 2.35 * min(max(learned.shape[1] / learned.shape[0], 0.25), 2.0)
        figure = Figure(figsize=(10.4, height), layout="compressed")
        grid = figure.subplots(1, 3)
        for axes, (name, values, colours, scale) in zip(grid, panels, strict=True):
            image = axes.imshow(
                values.T, cmap=colours, norm=scale, origin="lower", interpolation="nearest", aspect="equal"
            )
            axes.spines[["top", "right"]].set_visible(True)
            axes.set_title(name, loc="left", fontweight="bold")
            axes.set_xlabel(axis_labels[0])
            axes.xaxis.set_major_locator(MaxNLocator(6, steps=_STEPS, integer=True))
            axes.yaxis.set_major_locator(MaxNLocator(6, steps=_STEPS, integer=True))
            bar = figure.colorbar(image, ax=axes, shrink=0.82, aspect=24, pad=0.03)
            bar.outline.set_visible(False)
            bar.locator = MaxNLocator(5, steps=_STEPS)
            bar.formatter = FuncFormatter(_short_number)
            bar.update_ticks()
        grid[0].set_ylabel(axis_labels[1])
        return _svg(figure, title)


def custom_figure(draw: Callable[[Figure], None], *, title: str, size: tuple[float, float] = MEDIUM) -> str:
    """A figure that a domain draws itself, in the style of all others, as SVG. size: inches."""
    with matplotlib.rc_context(_STYLE):
        figure = Figure(figsize=size, layout="constrained")
        draw(figure)
        return _svg(figure, title)


def _blank(size: tuple[float, float]) -> tuple[Figure, Axes]:
    figure = Figure(figsize=size, layout="constrained")
    return figure, figure.subplots()


def _curve(
    axes: Axes, x: NDArray[np.float64], y: NDArray[np.float64], label: str, colour: str, log_y: bool, smooth: bool
) -> None:
    y = np.where(np.isfinite(y) & ((y > 0) | (not log_y)), y, np.nan)
    if not smooth or len(y) < 20:
        axes.plot(x, y, color=colour, label=label, marker="o" if len(y) < 40 else "", markersize=2.6)
        return
    axes.plot(*_thinned(x, y), color=colour, alpha=0.28, linewidth=0.6)
    mean = _moving_mean(np.log(y) if log_y else y, window=max(5, len(y) // 30))
    kept = np.unique(np.linspace(0, len(y) - 1, _MOST_RAW_POINTS // 2).astype(int))
    axes.plot(x[kept], (np.exp(mean) if log_y else mean)[kept], color=colour, label=label)


def _moving_mean(y: NDArray[np.float64], window: int) -> NDArray[np.float64]:
    """The mean of the finite values within `window` points of each point, NaN where there is none."""
    kernel = np.hanning(window + 2)[1:-1]
    seen = np.isfinite(y)
    total = np.convolve(np.where(seen, y, 0.0), kernel, mode="full")
    weight = np.convolve(seen.astype(float), kernel, mode="full")
    start = (len(kernel) - 1) // 2
    total, weight = total[start : start + len(y)], weight[start : start + len(y)]
    return np.divide(total, weight, out=np.full(len(y), np.nan), where=weight > 1e-12)


def _thinned(x: NDArray[np.float64], y: NDArray[np.float64]) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """At most `_MOST_RAW_POINTS` of the points: lowest and highest of each stretch, so that no spike is lost."""
    if len(y) <= _MOST_RAW_POINTS:
        return x, y
    kept: list[int] = []
    for stretch in np.array_split(np.arange(len(y)), _MOST_RAW_POINTS // 2):
        values = y[stretch]
        if np.isfinite(values).any():
            kept += sorted({int(stretch[np.nanargmin(values)]), int(stretch[np.nanargmax(values)])})
        else:
            kept.append(int(stretch[0]))
    return x[kept], y[kept]


def _logarithmic(axes: Axes) -> None:
    axes.set_yscale("log")
    low, high = axes.get_ylim()
    narrow = high / low < 50
    axes.yaxis.set_major_locator(LogLocator(subs=(1.0, 2.0, 5.0) if narrow else (1.0,), numticks=6))
    axes.yaxis.set_major_formatter(FuncFormatter(_short_number if narrow else _power_of_ten))
    axes.yaxis.set_minor_formatter(FuncFormatter(lambda value, _: ""))


def _power_of_ten(value: float, _position: int | None = None) -> str:
    digits = f"{round(np.log10(value))}".translate(str.maketrans("-0123456789", "⁻⁰¹²³⁴⁵⁶⁷⁸⁹"))
    return f"10{digits}"


def _short_number(value: float, _position: int | None = None) -> str:
    for size, unit in ((1e9, "G"), (1e6, "M"), (1e3, "k")):
        if abs(value) >= size:
            return f"{value / size:.4g}{unit}".replace("-", "−")
    return f"{value:.3g}".replace("-", "−")


def _bin_edges(values: NDArray[np.float64]) -> NDArray[np.float64]:
    if not len(values):
        return np.array([0.0, 1.0])
    low, high = float(values.min()), float(values.max())
    if low == high:
        return np.linspace(low - 0.5, high + 0.5, 12)
    return np.linspace(low, high, int(np.clip(np.sqrt(len(values)) * 1.5, 12, 60)) + 1)


def _legend(axes: Axes) -> None:
    columns = len(axes.get_legend_handles_labels()[1])
    axes.legend(loc="lower right", bbox_to_anchor=(1.0, 1.01), ncols=columns, columnspacing=1.2, handletextpad=0.5)


def _cycle(count: int) -> Sequence[str]:
    return [SERIES[i % len(SERIES)] for i in range(count)]


def _array(values: ArrayLike) -> NDArray[np.float64]:
    return np.asarray(values, dtype=np.float64)


def _finite(values: NDArray[np.float64]) -> NDArray[np.float64]:
    return values[np.isfinite(values)]


def _svg(figure: Figure, title: str) -> str:
    """The figure as one `<svg>` element, labelled with its title: small, deterministic, its ids its own."""
    FigureCanvasSVG(figure)
    buffer = io.StringIO()
    nothing = dict.fromkeys(("Date", "Creator", "Format", "Type"))
    figure.savefig(buffer, format="svg", dpi=_RASTER_DPI, metadata=nothing)
    drawn = buffer.getvalue()
    drawn = drawn[drawn.index("<svg") :].strip()
    drawn = re.sub(r"<!--.*?-->\s*|<metadata>.*?</metadata>\s*", "", drawn, flags=re.DOTALL)
    drawn = re.sub(
        r"\s*<style.*?</style>", "", drawn, flags=re.DOTALL
    )  # in a page it would rule over every other picture
    drawn = re.sub(r' (?:d|x|y|points|transform)="[^"]*"', _to_two_decimals, drawn)
    drawn = drawn.replace("'DejaVu Sans'", _FONT)
    used = set(re.findall(r'(?:url\(|href=")#([^")]+)', drawn))
    drawn = re.sub(r' id="([^"]+)"', lambda found: found.group(0) if found.group(1) in used else "", drawn)
    prefix = "f" + hashlib.sha256(drawn.encode()).hexdigest()[:10] + "-"
    drawn = re.sub(r'( id="|url\(#|href="#)', rf"\g<1>{prefix}", drawn)
    label = f'role="img" aria-label="{escape(title)}" style="stroke-linejoin: round; stroke-linecap: butt"'
    return drawn.replace("<svg ", f"<svg {label} ", 1)


def _to_two_decimals(attribute: re.Match[str]) -> str:
    return re.sub(r"(\.\d\d)\d+", r"\1", " ".join(attribute.group(0).split(" "))).replace("\n", "")
