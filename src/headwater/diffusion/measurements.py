"""Measurements and other arrays from files: .npy, .csv and, with Pillow, .png and .jpg. Sizes are limited, and nothing
in a file is run.
"""

from __future__ import annotations

import csv
import math
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import cast

import numpy as np
import torch
from torch import Tensor

from headwater.diffusion.operators import Mask, Operator

LARGEST_FILE = 2**28
"""Bytes of the largest file that is read."""
LARGEST_ARRAY = 2**26
"""Values of the largest array."""

_PICTURES = {".png": "PNG", ".jpg": "JPEG", ".jpeg": "JPEG"}


class MeasurementError(ValueError):
    """A file that cannot be read as numbers, or numbers that are no measurement; the message says which and why."""


def read_array(path: str | Path, value_range: tuple[float, float] = (-1.0, 1.0)) -> Tensor:
    """The array in a file, float32. Of complex numbers the real parts, above the imaginary ones: `[..., P]` becomes
    `[..., 2, P]`. A picture is `[channels, height, width]`, black and white at the ends of `value_range`.

    Raises MeasurementError naming the file; OSError where there is none.
    """
    path = Path(path)
    if (size := path.stat().st_size) > LARGEST_FILE:
        raise MeasurementError(f"{path}: {size:,} bytes; at most {LARGEST_FILE:,} are read")
    kind = path.suffix.lower()
    if kind == ".npy":
        values = _read_npy(path)
    elif kind == ".csv":
        values = _read_csv(path)
    elif kind in _PICTURES:
        low, high = value_range
        values = low + (high - low) * _read_picture(path, _PICTURES[kind])
    else:
        raise MeasurementError(f"{path}: {kind or 'no suffix'}; what can be read is .npy, .csv, .png and .jpg")
    if not values.size:
        raise MeasurementError(f"{path}: an empty array")
    if np.iscomplexobj(values):
        values = np.stack([values.real, values.imag], axis=max(0, values.ndim - 1))
    return torch.from_numpy(np.ascontiguousarray(values, dtype=np.float32))


def read_measurements(path: str | Path, operator: Operator, value_range: tuple[float, float] = (-1.0, 1.0)) -> Tensor:
    """The measurements in a file, K of them or only one: `[K, *operator.measured]`. For a mask the file may also hold
    whole objects, whose hidden values do not matter.

    Raises MeasurementError, naming the file and both shapes, where the array does not fit, or where a value that is
    measured is not finite.
    """
    array = read_array(path, value_range)
    if isinstance(operator, Mask) and (whole := _as_rows(array, operator.shape)) is not None:
        array = operator(whole)
    return fitting(array, operator, str(path))


def fitting(y: Tensor, operator: Operator, name: str = "the measurement") -> Tensor:
    """y as `[K, *operator.measured]`; axes of length one more or less do not matter. Raises MeasurementError, calling
    it `name`, where it does not fit or is not finite."""
    rows = _as_rows(y, operator.measured)
    if rows is None:
        raise MeasurementError(
            f"{name} has shape {tuple(y.shape)}, but {operator.title} measures shape {operator.measured} "
            f"of objects of shape {operator.shape}"
        )
    bad = (~rows.isfinite()).nonzero()
    if len(bad):
        raise MeasurementError(
            f"{name} has {len(bad)} values that are NaN or infinite, the first in measurement {int(bad[0, 0])} at "
            f"{tuple(bad[0, 1:].tolist())}"
        )
    return rows


def _as_rows(array: Tensor, shape: Sequence[int]) -> Tensor | None:
    """The array as `[K, *shape]`, or None where it is something else."""
    squeezed = tuple(size for size in array.shape if size != 1)
    wanted = tuple(size for size in shape if size != 1)
    several = squeezed[1:] == wanted and len(squeezed) == len(wanted) + 1
    return array.reshape(-1, *shape) if squeezed == wanted or several else None


def _read_npy(path: Path) -> np.ndarray:
    try:
        values = np.load(path, mmap_mode="r", allow_pickle=False)
    except (ValueError, EOFError, OSError) as error:
        raise MeasurementError(f"{path}: not an array of numbers: {error}") from error
    if not isinstance(values, np.ndarray) or values.dtype.kind not in "biufc":
        raise MeasurementError(f"{path}: not an array of numbers: {getattr(values, 'dtype', type(values).__name__)}")
    if values.size > LARGEST_ARRAY:
        raise MeasurementError(f"{path}: {values.size:,} values; at most {LARGEST_ARRAY:,} are read")
    return np.array(values)


def _read_csv(path: Path) -> np.ndarray:
    """Rows of numbers; a first line that holds none is a header."""
    rows: list[list[float]] = []
    try:
        with path.open(newline="", encoding="utf-8-sig") as file:
            for fields in (reader := csv.reader(file)):
                if not fields:
                    continue
                try:
                    row = [float(field) for field in fields]
                except ValueError as error:
                    if reader.line_num == 1:
                        continue
                    raise MeasurementError(f"{path}, line {reader.line_num}: {error}") from None
                if rows and len(row) != len(rows[0]):
                    raise MeasurementError(
                        f"{path}, line {reader.line_num}: {len(row)} numbers, the lines before have {len(rows[0])}"
                    )
                rows.append(row)
    except (UnicodeDecodeError, csv.Error) as error:
        raise MeasurementError(f"{path}: not a table of numbers: {error}") from error
    return np.array(rows)


def _read_picture(path: Path, kind: str) -> np.ndarray:
    """Channels first, from 0 to 1; grey pictures have one channel, all others red, green and blue."""
    try:
        from PIL import Image, UnidentifiedImageError
    except ImportError as error:
        raise MeasurementError(f"{path}: reading pictures needs Pillow: pip install pillow") from error
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", Image.DecompressionBombWarning)  # its size is limited below
            picture = Image.open(path, formats=[kind])
        if math.prod(picture.size) > LARGEST_ARRAY // 3:
            raise MeasurementError(f"{path}: {picture.size} pixels; at most {LARGEST_ARRAY // 3:,} are read")
        if picture.mode.startswith("I"):  # 16 bits of grey
            return cast("np.ndarray", np.asarray(picture, dtype=np.float64)[None] / 65535)
        grey = picture.mode in ("1", "L", "LA")
        values = np.asarray(picture.convert("L" if grey else "RGB"), dtype=np.float64) / 255
    except (UnidentifiedImageError, Image.DecompressionBombError, OSError, SyntaxError) as error:
        raise MeasurementError(f"{path}: not a {kind} picture: {error}") from error
    return values[None] if grey else values.transpose(2, 0, 1)
