"""Edge probabilities as a report shows them: a network with an arrow an edge, and a matrix with a cell an edge."""

from __future__ import annotations

import math
from collections.abc import Sequence
from html import escape

import numpy as np
from numpy.typing import NDArray

from headwater.report import Section
from headwater.report.figures import PALETTE

_INK, _MUTED, _RULE, _EDGE, _TRUE = (PALETTE[role] for role in ("ink", "muted", "rule", "water", "clay"))
_FONT = "system-ui, 'Segoe UI', Helvetica, Arial, sans-serif"
_DRAWN = 0.1
"""Edges less probable than this are left out of the network."""
_MOST_IN_NETWORK = 20
_MOST_WITH_NUMBERS = 12
_LONGEST_NAME = 14

Matrix = NDArray[np.float64]


def edges_section(
    names: Sequence[str], learned: Matrix, exact: Matrix | None, truth: NDArray[np.bool_] | None
) -> Section:
    """Learned edge probabilities `[n, n]`, entry (i, j) for an edge from i to j, beside exact ones and the true graph,
    where they are known.
    """
    words = (
        "The probability of each edge, over all graphs that the sampler draws. Graphs that imply the same "
        "independences explain the data equally well, so an edge may be certain and its direction not."
    )
    if truth is not None:
        words += " Edges of the graph that the data were drawn from are marked in orange."
    learned_words = "Learned: from the row's variable to the column's."
    figures = [(matrix_svg(names, learned, truth, "Learned edge probabilities"), learned_words)]
    if exact is not None:
        exact_words = f"The exact posterior. The largest difference is {np.abs(learned - exact).max():.3f}."
        figures.append((matrix_svg(names, exact, truth, "Exact edge probabilities"), exact_words))
    if len(names) <= _MOST_IN_NETWORK:
        caption = f"Edges of probability {_DRAWN:g} and more; the wider, the more probable."
        figures.append((network_svg(names, learned, truth), caption))
    width = "half" if len(names) <= _MOST_WITH_NUMBERS else "wide"
    drawn = "".join(f'<figure class="{width}">{svg}<figcaption>{text}</figcaption></figure>' for svg, text in figures)
    return Section("Edges", f'<p>{words}</p><div class="figures">{drawn}</div>')


def matrix_svg(names: Sequence[str], values: Matrix, truth: NDArray[np.bool_] | None, title: str) -> str:
    """A cell an edge, from the row's node to the column's, the darker the more probable; true edges are framed."""
    count = len(names)
    cell = 40 if count <= _MOST_WITH_NUMBERS else 24
    margin = 14 + 7 * max(len(_short(name)) for name in names)
    body = []
    for i, name in enumerate(names):
        middle = margin + cell * (i + 0.5)
        body.append(_text(_short(name), margin - 8, middle + 4, anchor="end"))
        turned = f'transform="rotate(-45 {middle} {margin - 8})"' if margin > 36 else ""
        body.append(_text(_short(name), middle, margin - 8, anchor="start" if turned else "middle", more=turned))
        for j, other in enumerate(names):
            x, y, value = margin + cell * j, margin + cell * i, float(values[i, j])
            if i == j:
                continue
            box = f'x="{x + 1}" y="{y + 1}" width="{cell - 2}" height="{cell - 2}" rx="3"'
            tip = f"<title>{escape(name)} → {escape(other)}: {value:.3f}</title>"
            body.append(f'<rect {box} fill="{_RULE}" fill-opacity="0.35"/>')
            body.append(f'<rect {box} fill="{_EDGE}" fill-opacity="{min(max(value, 0.0), 1.0):.3f}">{tip}</rect>')
            if truth is not None and truth[i, j]:
                body.append(f'<rect {box} fill="none" stroke="{_TRUE}" stroke-width="2.5"/>')
            if count <= _MOST_WITH_NUMBERS:
                colour = "#ffffff" if value > 0.55 else _INK
                body.append(_text(f"{value:.2f}", x + cell / 2, y + cell / 2 + 4, colour=colour))
    side = margin + cell * count + (30 if margin > 36 else 6)
    return _svg(side, side, title, body)


def network_svg(names: Sequence[str], values: Matrix, truth: NDArray[np.bool_] | None) -> str:
    """The nodes on a circle and an arrow an edge; the arrows of opposite edges bend apart."""
    count = len(names)
    radius, node = 90.0 + 7 * count, 20.0
    centre = radius + 60
    angles = [2 * math.pi * i / count - math.pi / 2 for i in range(count)]
    places = [(centre + radius * math.cos(angle), centre + radius * math.sin(angle)) for angle in angles]
    body = []
    for i, j in np.argwhere((values >= _DRAWN) & ~np.eye(count, dtype=bool)).tolist():
        colour = _TRUE if truth is not None and truth[i, j] else _EDGE
        tip = f"{escape(names[i])} → {escape(names[j])}: {values[i, j]:.3f}"
        body.append(_arrow(places[i], places[j], node, float(values[i, j]), colour, tip))
    for name, (x, y) in zip(names, places, strict=True):
        body.append(f'<circle cx="{x:.1f}" cy="{y:.1f}" r="{node}" fill="{_RULE}" stroke="{_MUTED}"/>')
        short = len(name) <= 4
        away = 0.0 if short else (node + 12) * (1 if y > centre else -1)
        body.append(_text(_short(name), x, y + 4 + away, size=12, weight=600))
    return _svg(2 * centre, 2 * centre, "Network of the probable edges", body)


def _arrow(
    start: tuple[float, float], end: tuple[float, float], gap: float, value: float, colour: str, tip: str
) -> str:
    """A curve from one circle to another, bent to the left of its direction, with a head."""
    (x1, y1), (x2, y2) = start, end
    length = math.hypot(x2 - x1, y2 - y1)
    bend = 0.12
    mid_x, mid_y = (x1 + x2) / 2 + bend * (y2 - y1), (y1 + y2) / 2 - bend * (x2 - x1)

    def towards(x: float, y: float, distance: float) -> tuple[float, float]:
        reach = math.hypot(mid_x - x, mid_y - y) or length
        return x + (mid_x - x) * distance / reach, y + (mid_y - y) * distance / reach

    width, head = 1 + 3 * value, 7 + 4 * value
    (from_x, from_y), (tip_x, tip_y), (neck_x, neck_y) = (
        towards(x1, y1, gap),
        towards(x2, y2, gap + 2),
        towards(x2, y2, gap + head),
    )
    side_x, side_y = (tip_y - neck_y) * 0.5, (neck_x - tip_x) * 0.5
    corners = [(tip_x, tip_y), (neck_x + side_x, neck_y + side_y), (neck_x - side_x, neck_y - side_y)]
    points = " ".join(f"{x:.1f},{y:.1f}" for x, y in corners)
    curve = f"M{from_x:.1f} {from_y:.1f}Q{mid_x:.1f} {mid_y:.1f} {neck_x:.1f} {neck_y:.1f}"
    return (
        f'<g opacity="{0.25 + 0.75 * value:.2f}"><title>{tip}</title>'
        f'<path d="{curve}" fill="none" stroke="{colour}" stroke-width="{width:.1f}"/>'
        f'<polygon points="{points}" fill="{colour}"/></g>'
    )


def _short(name: str) -> str:
    return name if len(name) <= _LONGEST_NAME else f"{name[: _LONGEST_NAME - 1]}…"


def _text(
    text: str, x: float, y: float, *, anchor: str = "middle", size: float = 11, colour: str = _INK, weight: int = 400,
    more: str = "",
) -> str:  # fmt: skip
    return (
        f'<text x="{x:.1f}" y="{y:.1f}" text-anchor="{anchor}" font-size="{size}" font-weight="{weight}" '
        f'fill="{colour}" {more}>{escape(text)}</text>'
    )


def _svg(width: float, height: float, title: str, body: Sequence[str]) -> str:
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width:.0f} {height:.0f}" role="img" '
        f'aria-label="{escape(title)}" font-family="{_FONT}">{"".join(body)}</svg>'
    )
