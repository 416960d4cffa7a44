"""What the report of a prior draws: samples beside data, as images, as points, as text or as histograms."""

from __future__ import annotations

import base64
import io
from collections.abc import Sequence
from html import escape

import numpy as np
from matplotlib.figure import Figure
from numpy.typing import NDArray
from torch import Tensor

from headwater.diffusion.data import Data
from headwater.report import Section
from headwater.report.figures import MEDIUM, SERIES, custom_figure, histogram_figure

_MOST_IMAGES, _MOST_POINTS, _MOST_LINES = 64, 1000, 24
_LEAST_PIXELS = 360
"""Width of a grid of images on the page, at least: small pixels are shown as squares."""


def samples_beside_data(samples: NDArray[np.generic], held_out: Tensor, data: Data, text: Sequence[str]) -> Section:
    """samples: `[N, *shape]` in the units of the data. held_out: `[M, *shape]`, data in the prior's own numbers. text:
    the samples as text."""
    title = "Samples beside data"
    if data.is_tokens:
        known = held_out[:_MOST_LINES].tolist()
        lines = ["".join(data.alphabet[t] for t in row) if data.alphabet else " ".join(map(str, row)) for row in known]
        columns = (("Samples", text[:_MOST_LINES]), ("Data, held out", lines))
        cells = "".join(f"<td><pre>{escape(chr(10).join(shown))}</pre></td>" for _, shown in columns)
        heads = "".join(f"<th>{name}</th>" for name, _ in columns)
        return Section(title, f'<div class="scroll"><table><tr>{heads}</tr><tr>{cells}</tr></table></div>')
    real = data.units.of_data(held_out).numpy()
    if is_image(data.shape):
        low, high = float(real.min()), float(real.max())
        figures = "".join(
            half_a_page(
                name, f'<img alt="{name}" style="image-rendering: pixelated" src="{image_grid(some, low, high)}">'
            )
            for name, some in (("Samples", samples[:_MOST_IMAGES]), ("Data, held out", real[:_MOST_IMAGES]))
        )
        return Section(title, f'<div class="figures">{figures}</div>')
    flat, known_flat = samples.reshape(len(samples), -1).astype(float), real.reshape(len(real), -1)
    if flat.shape[1] == 1:
        values = {"samples": flat[:, 0], "data": known_flat[:, 0]}
        return Section(title, half_a_page(title, histogram_figure(values, x_label="value", title=title)))

    def draw(figure: Figure) -> None:
        axes = figure.subplots()
        for points, label, colour in ((known_flat, "data", SERIES[1]), (flat, "samples", SERIES[0])):
            shown = points[:_MOST_POINTS]
            axes.scatter(shown[:, 0], shown[:, 1], s=7, alpha=0.4, color=colour, label=label, linewidths=0)
        axes.set_xlabel("first coordinate")
        axes.set_ylabel("second coordinate")
        axes.legend(loc="lower right", bbox_to_anchor=(1.0, 1.01), ncols=2)

    caption = "The first two coordinates." if flat.shape[1] > 2 else ""
    return Section(title, half_a_page(title, custom_figure(draw, title=title, size=MEDIUM), caption))


def is_image(shape: Sequence[int]) -> bool:
    """Whether objects of this shape can be drawn as grey or coloured pictures."""
    return len(shape) == 3 and shape[0] in (1, 3)


def image_grid(images: NDArray[np.generic], low: float, high: float) -> str:
    """As `png_of`, the address of a picture that holds itself."""
    return "data:image/png;base64," + base64.b64encode(png_of(images, low, high)).decode()


def png_of(images: NDArray[np.generic], low: float, high: float) -> bytes:
    """Images `[N, C, H, W]` with C = 1 or 3 in a square grid, black at `low` and white at `high`, as a PNG file."""
    from PIL import Image

    count, channels, height, width = images.shape
    columns = int(np.ceil(np.sqrt(count)))
    rows = -(-count // columns)
    grid = np.full((rows * (height + 1) - 1, columns * (width + 1) - 1, channels), 255, dtype=np.uint8)
    scaled = (images.astype(np.float64) - low) / max(high - low, 1e-12)
    pixels = (255 * scaled.clip(0, 1)).round().astype(np.uint8).transpose(0, 2, 3, 1)
    for place, one in enumerate(pixels):
        top, left = (place // columns) * (height + 1), (place % columns) * (width + 1)
        grid[top : top + height, left : left + width] = one
    zoom = max(1, -(-_LEAST_PIXELS // grid.shape[1]))
    grid = grid.repeat(zoom, 0).repeat(zoom, 1)
    buffer = io.BytesIO()
    Image.fromarray(grid[..., 0] if channels == 1 else grid).save(buffer, format="PNG", optimize=True)
    return buffer.getvalue()


def half_a_page(title: str, drawn: str, caption: str = "") -> str:
    """Half a page wide, under a title of its own."""
    said = f"<figcaption>{escape(caption)}</figcaption>" if caption else ""
    return f'<figure class="chart half"><h3>{escape(title)}</h3>{drawn}{said}</figure>'
