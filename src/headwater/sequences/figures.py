"""RNA as the field draws it, each as one self-contained SVG element: duplexes, secondary structures and sequence
logos.

The letters of a logo are outlines, so that no font decides their size; all other text uses the reader's own sans-serif
font.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from html import escape
from itertools import pairwise, zip_longest
from statistics import median

import numpy as np
from matplotlib.font_manager import FontProperties
from matplotlib.path import Path as Outline
from matplotlib.textpath import TextPath
from numpy.typing import ArrayLike, NDArray

from headwater.report.figures import PALETTE
from headwater.sequences.data import BASES
from headwater.sequences.environment import pair_table
from headwater.sequences.reward import best_duplex, viennarna

BASE_COLOURS = {"A": "#00795a", "C": "#0072b2", "G": "#d08a00", "U": "#c44f00"}
"""The bases: the hues of Okabe and Ito, which colour-blind readers tell apart, darkened to stand out on white."""

_INK, _MUTED = PALETTE["ink"], PALETTE["muted"]
_FONT = "system-ui, 'Segoe UI', Helvetica, Arial, sans-serif"
_WOBBLES = {"GU", "UG"}
_RADIUS = 8.5
_STEP = 20.0
_FLANK = 14
"""Bases of each strand that are drawn on either side of a duplex; an ellipsis stands for the rest of a long target."""

Point = tuple[float, float]


def duplex_svg(design: str, target: str, name: str = "target") -> str:
    """The best duplex of a design with a target: antiparallel, bars for Watson-Crick pairs, dots for G-U wobbles, and
    its energy.

    design, target: RNA, 5' to 3'. name: what to call the target. Unpaired bases stand off the helix; the numbers are
    positions, counted from each strand's 5' end.
    """
    energy, pairs = best_duplex(target, design)
    columns = _align(pairs, len(target), len(design))
    upper = _Strand(target, [t for t, _ in columns], {t for t, _ in pairs}, height=62.0, outward=-1, ends=("5′", "3′"))
    lower = _Strand(design, [d for _, d in columns], {d for _, d in pairs}, height=106.0, outward=1, ends=("3′", "5′"))
    left = 46.0
    width = left * 2 + _STEP * (len(columns) - 1)
    body = [*upper.draw(left), *lower.draw(left)]
    for t, d in pairs:
        x = left + _STEP * columns.index((t, d))
        body.append(_bond(target[t - 1] + design[d - 1], (x, upper.height), (x, lower.height)))
    affinity = f"{energy:.1f} kcal/mol".replace("-", "−") if pairs else "no base pair"
    body.append(_text(name, 12, 20, anchor="start", size=13, weight=600))
    body.append(_text(affinity, width - 12, 20, anchor="end", size=13, weight=600))
    body.append(_text("design", 12, 141, anchor="start", colour=_MUTED))
    description = f"Design {design}, written 5' to 3', with {name}: {len(pairs)} base pairs, {affinity}."
    return _svg(width, 148, f"Duplex with {name}", description, body)


def structure_svg(sequence: str, structure: str, name: str = "RNA secondary structure") -> str:
    """A sequence in a dot-bracket structure, with ViennaRNA's layout: coloured bases, lines for pairs, dots for G-U
    wobbles.

    Raises ValueError if the structure is not valid or the lengths differ.
    """
    partners = pair_table(structure)
    if len(sequence) != len(structure):
        raise ValueError(f"sequence has {len(sequence)} bases, structure {len(structure)} positions")
    points = _layout(structure)
    margin = 34.0
    left, top = (min(values) - margin for values in zip(*points, strict=True))
    points = [(x - left, y - top) for x, y in points]
    width, height = (max(values) + margin for values in zip(*points, strict=True))
    body = [_line(points)]
    for i, j in enumerate(partners):
        if j > i:
            body.append(_bond(sequence[i] + sequence[j], points[i], points[j]))
    body += [_base(base, x, y) for base, (x, y) in zip(sequence, points, strict=True)]
    for index in range(len(points)):
        number = index + 1
        x, y = _outside(points, index)
        if index in (0, len(points) - 1):
            body.append(_text("5′" if index == 0 else "3′", x, y + 4, size=11, weight=600))
        elif number % 10 == 0:
            body.append(_text(str(number), x, y + 3.5, size=9.5, colour=_MUTED))
    description = f"{sequence} folded as {structure}, {sum(j > i for i, j in enumerate(partners))} base pairs."
    return _svg(width, height, name, description, body)


def logo_svg(sequences: Sequence[str], weights: ArrayLike | None = None, name: str = "Sequence logo") -> str:
    """The sequence logo of equally long RNAs: at each position, letters as high as their share of the information, in
    bits.

    weights: `[N]`, not negative, by default equal. Information is 2 - entropy - 3 / (2 N ln 2), the last a correction
    for few sequences (Schneider et al. 1986), with N = (sum w)^2 / sum w^2. Raises ValueError for no sequences,
    unequal lengths, letters other than A, C, G, U, or weights that do not fit.
    """
    heights, effective = _information(sequences, weights)
    step, left, top, unit = (26.0 if len(heights) <= 30 else 15.0), 46.0, 14.0, 62.0
    bottom = top + 2 * unit
    width = left + step * len(heights) + 14
    prefix = "logo-" + _digest(repr(heights.tolist()))
    body = ["<defs>", *(f'<path id="{prefix}-{base}" d="{_letter(base)}"/>' for base in BASES), "</defs>"]
    for bits in (0, 1, 2):
        y = bottom - bits * unit
        body.append(f'<path d="M{left - 5} {y}H{left}" stroke="{_MUTED}"/>')
        body.append(_text(str(bits), left - 10, y + 4, anchor="end", size=11, colour=_MUTED))
    body.append(f'<path d="M{left} {top}V{bottom}H{width - 14}" fill="none" stroke="{_MUTED}"/>')
    unit_label = _text("bits", 0, 0, colour=_MUTED)
    body.append(f'<g transform="translate(16 {(top + bottom) / 2}) rotate(-90)">{unit_label}</g>')
    for position, column in enumerate(heights):
        x, y = left + step * position + 1.5, bottom
        for letter in np.argsort(column, kind="stable"):
            height = float(column[letter]) * unit
            if height < 0.1:
                continue
            base = BASES[letter]
            place = f"translate({x:.1f} {y:.2f}) scale({step - 2:.1f} {height:.2f})"
            body.append(f'<use href="#{prefix}-{base}" fill="{BASE_COLOURS[base]}" transform="{place}"/>')
            y -= height
        if len(heights) <= 30 or position % 5 == 4 or position == 0:
            body.append(_text(str(position + 1), x + step / 2 - 1, bottom + 16, size=10, colour=_MUTED))
    body.append(_text("5′", left + 2, bottom + 31, anchor="start", size=11, weight=600))
    body.append(_text("3′", width - 16, bottom + 31, anchor="end", size=11, weight=600))
    consensus = "".join(BASES[int(column.argmax())] if column.max() > 0 else "N" for column in heights)
    description = (
        f"{len(sequences)} sequences, effectively {effective:.0f}; consensus {consensus}; {heights.sum():.1f} bits."
    )
    return _svg(width, bottom + 40, name, description, body)


@dataclass(frozen=True)
class _Strand:
    """One strand of a duplex: `positions` by column (1-based, 0 for a gap), at `height`, unpaired bases displaced
    `outward`.
    """

    sequence: str
    positions: list[int]
    paired: set[int]
    height: float
    outward: int
    ends: tuple[str, str]

    def draw(self, left: float) -> list[str]:
        places = {
            position: (left + _STEP * column, self.height + (0 if position in self.paired else 13 * self.outward))
            for column, position in enumerate(self.positions)
            if position
        }
        drawn = [_line(list(places.values()))]
        drawn += [_base(self.sequence[position - 1], x, y) for position, (x, y) in places.items()]
        for end, position, side in ((self.ends[0], next(iter(places)), -1), (self.ends[1], list(places)[-1], 1)):
            x, y = places[position]
            label = end if position in (1, len(self.sequence)) else (f"{end} …" if side < 0 else f"… {end}")
            drawn.append(_text(label, x + 14 * side, y + 4, anchor="end" if side < 0 else "start", size=11, weight=600))
        for position in {min(self.paired), max(self.paired)} if self.paired else ():
            x, y = places[position]
            drawn.append(_text(str(position), x, y + 16 * self.outward + 3, size=9, colour=_MUTED))
        return drawn


def _align(pairs: list[tuple[int, int]], target_length: int, design_length: int) -> list[tuple[int, int]]:
    """Columns (target position, design position) of the drawing, 1-based, 0 for a gap; the design runs 3' to 5'."""
    if not pairs:
        shown = range(1, min(target_length, design_length + 2 * _FLANK) + 1)
        return list(zip_longest(shown, range(design_length, 0, -1), fillvalue=0))
    (t, d), (last_t, last_d) = pairs[0], pairs[-1]
    before = [(t - k if t > k else 0, d + k if d + k <= design_length else 0) for k in range(_FLANK, 0, -1)]
    columns = [column for column in before if column != (0, 0)]
    for (t, d), (next_t, next_d) in pairwise(pairs):
        columns.append((t, d))
        columns += zip_longest(range(t + 1, next_t), range(d - 1, next_d, -1), fillvalue=0)
    columns.append((last_t, last_d))
    after = [(last_t + k if last_t + k <= target_length else 0, max(last_d - k, 0)) for k in range(1, _FLANK + 1)]
    return columns + [column for column in after if column != (0, 0)]


def _layout(structure: str) -> list[Point]:
    """ViennaRNA's RNApuzzler layout, in which no two parts overlap (Wiegreffe et al. 2019), scaled to the size of our
    bases.
    """
    rna = viennarna()
    previous, rna.cvar.rna_plot_type = rna.cvar.rna_plot_type, rna.PLOT_TYPE_PUZZLER
    try:
        found = rna.get_xy_coordinates(structure)
    finally:
        rna.cvar.rna_plot_type = previous
    points = [(found.get(i).X, found.get(i).Y) for i in range(len(structure))]
    scale = 1.1 * _STEP / median([math.dist(a, b) for a, b in pairwise(points)] or [1.0])
    return [(x * scale, y * scale) for x, y in points]


def _outside(points: list[Point], index: int) -> Point:
    """Where a label of one base goes: beside it, on the side that is least crowded."""
    x, y = points[index]
    others = points[:index] + points[index + 1 :]
    angles = np.linspace(0, 2 * math.pi, 24, endpoint=False).tolist()
    around = [(x + 19 * math.cos(angle), y + 19 * math.sin(angle)) for angle in angles]
    return min(around, key=lambda place: sum(max(math.dist(place, other), 1.0) ** -1.5 for other in others))


def _information(sequences: Sequence[str], weights: ArrayLike | None) -> tuple[NDArray[np.float64], float]:
    """Letter heights in bits `[length, 4]`, and the effective number of sequences."""
    if not sequences or not sequences[0] or len(set(map(len, sequences))) > 1:
        raise ValueError("a logo needs at least one sequence, and all of one length")
    w = np.ones(len(sequences)) if weights is None else np.asarray(weights, dtype=np.float64)
    if w.shape != (len(sequences),) or not np.isfinite(w).all() or w.min() < 0 or w.sum() == 0:
        raise ValueError(f"weights: must be {len(sequences)} finite numbers, none negative and not all 0")
    letters = np.array([list(sequence) for sequence in sequences])
    share = np.stack([((letters == base) * w[:, None]).sum(0) for base in BASES], axis=1) / w.sum()
    if not np.allclose(share.sum(1), 1):
        raise ValueError(f"a logo is drawn of the letters {', '.join(BASES)} only")
    effective = float(w.sum() ** 2 / (w**2).sum())
    entropy = -(share * np.log2(np.where(share > 0, share, 1))).sum(1)
    information = 2 - entropy - 3 / (2 * effective * math.log(2))
    return share * np.maximum(information, 0)[:, None], effective


@cache
def _letter(base: str) -> str:
    """The outline of a letter as SVG path data, stretched to the box x 0 .. 1, y -1 .. 0 (SVG's y points down)."""
    outline = TextPath((0, 0), base, size=100, prop=FontProperties(family="DejaVu Sans", weight="bold"))
    low, high = outline.vertices.min(0), outline.vertices.max(0)
    commands = {Outline.MOVETO: "M", Outline.LINETO: "L", Outline.CURVE3: "Q", Outline.CURVE4: "C"}
    parts = []
    for vertices, code in outline.iter_segments(curves=True):
        if code == Outline.CLOSEPOLY:
            parts.append("Z")
            continue
        unit = (vertices.reshape(-1, 2) - low) / (high - low)
        parts.append(commands[code] + " ".join(f"{x:.3f} {-y:.3f}" for x, y in unit))
    return "".join(parts)


def _base(base: str, x: float, y: float) -> str:
    colour = BASE_COLOURS.get(base, "#6b7078")
    letter = "#16181b" if base == "G" else "#ffffff"
    return (
        f'<circle cx="{x:.1f}" cy="{y:.1f}" r="{_RADIUS}" fill="{colour}"/>'
        f'<text x="{x:.1f}" y="{y + 3.9:.1f}" font-size="11" font-weight="700" fill="{letter}">{escape(base)}</text>'
    )


def _bond(pair: str, a: Point, b: Point) -> str:
    """A line between two bases, short of both; a dot for a wobble."""
    if pair in _WOBBLES:
        return f'<circle cx="{(a[0] + b[0]) / 2:.1f}" cy="{(a[1] + b[1]) / 2:.1f}" r="2.6" fill="{_INK}"/>'
    length = max(math.dist(a, b), 1e-9)
    cut = min((_RADIUS + 2.0) / length, 0.4)
    (x1, y1), (x2, y2) = ((p[0] + cut * (q[0] - p[0]), p[1] + cut * (q[1] - p[1])) for p, q in ((a, b), (b, a)))
    return f'<path d="M{x1:.1f} {y1:.1f}L{x2:.1f} {y2:.1f}" stroke="{_INK}" stroke-width="2"/>'


def _line(points: list[Point]) -> str:
    path = "L".join(f"{x:.1f} {y:.1f}" for x, y in points)
    style = f'fill="none" stroke="{_MUTED}" stroke-opacity="0.45" stroke-width="2.5" stroke-linejoin="round"'
    return f'<path d="M{path}" {style}/>'


def _text(
    text: str, x: float, y: float, *, anchor: str = "middle", size: float = 11, colour: str = _INK, weight: int = 400
) -> str:
    return (
        f'<text x="{x:.1f}" y="{y:.1f}" text-anchor="{anchor}" font-size="{size}" font-weight="{weight}" '
        f'fill="{colour}">{escape(text)}</text>'
    )


def _digest(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()[:10]


def _svg(width: float, height: float, title: str, description: str, body: Sequence[str]) -> str:
    content = "".join(body)
    identity = "rna-" + _digest(title + description + content)
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" width="{width:.0f}" height="{height:.0f}" '
        f'viewBox="0 0 {width:.0f} {height:.0f}" role="img" aria-labelledby="{identity}-title {identity}-description" '
        f'font-family="{_FONT}" text-anchor="middle">'
        f'<title id="{identity}-title">{escape(title)}</title>'
        f'<desc id="{identity}-description">{escape(description)}</desc>{content}</svg>'
    )
