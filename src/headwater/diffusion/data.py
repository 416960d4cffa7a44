"""Reads what a prior is learned from: images or points in an array file, points in a table, a folder of pictures, lines
of text as tokens. Nothing is unpickled, sizes are limited, and an error names the file and the row.
"""

from __future__ import annotations

import csv
import math
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from headwater.diffusion.priors import Units

LARGEST_BYTES = 8 * 2**30
"""Of all data, in memory."""
LARGEST_NUMBER = 1e6
"""In data, in its own units."""
_PIXELS = Units(127.5, 127.5)
"""Of bytes: an object is between -1 and 1."""
_PICTURES = {".png", ".jpg", ".jpeg"}


@dataclass(frozen=True)
class Data:
    """What a prior is learned from.

    objects: `[N, *shape]`, float32 in the prior's own numbers, or int64 tokens `[N, L]`. units: what these are in the
    units of the file. alphabet: the character of each token, where they were text.
    """

    objects: Tensor
    units: Units = field(default_factory=Units)
    alphabet: str = ""

    @property
    def is_tokens(self) -> bool:
        return not self.objects.is_floating_point()

    @property
    def shape(self) -> tuple[int, ...]:
        """Of one object."""
        return tuple(self.objects.shape[1:])

    @property
    def vocabulary(self) -> int:
        """How many different tokens there are."""
        return max(len(self.alphabet), int(self.objects.max()) + 1) if self.is_tokens else 0


def read_data(path: Path, tokens: bool = False, standardise: bool = False) -> Data:
    """What is in a file or a folder of pictures.

    .npy: `[N, d]` points, `[N, H, W]` or `[N, C, H, W]` (of bytes also `[N, H, W, C]`) images; with `tokens` whole
    numbers `[N, L]`. .csv: a point a line, perhaps under a header. .txt: with `tokens`, strings of one length, a line
    each. A folder: pictures of one size, in the order of their names. Bytes are pixels and become numbers from -1 to 1.
    standardise: subtract the mean of all numbers and divide by their deviation.

    Raises ValueError naming the file, the row and what is wrong with it.
    """
    if path.is_dir():
        values: NDArray[Any] = read_pictures(path)
    elif not path.is_file():
        raise ValueError(f"{path}: there is no such file or folder")
    elif path.stat().st_size > LARGEST_BYTES:
        raise ValueError(f"{path}: larger than {LARGEST_BYTES} bytes")
    elif path.suffix == ".txt":
        if not tokens:
            raise ValueError(f"{path}: lines of text are tokens: chain.kind = one-by-one or masked")
        return _read_text(path)
    elif path.suffix == ".csv":
        values = _read_csv(path)
    elif path.suffix == ".npy":
        values = _read_array(path)
    else:
        raise ValueError(f"{path}: must be .npy, .csv, .txt or a folder of pictures")
    if len(values) < 2:
        raise ValueError(
            f"{path}: {len(values)} objects; at least 2 are needed, one to learn from and one to measure on"
        )
    if tokens:
        return Data(_tokens(path, values))
    return _numbers(path, values, standardise)


def read_pictures(folder: Path) -> NDArray[np.uint8]:
    """Pictures of one size in a folder, grey or in colours, in the order of their names: bytes `[N, C, H, W]`."""
    from PIL import Image, UnidentifiedImageError

    files = sorted(file for file in folder.iterdir() if file.suffix.lower() in _PICTURES)
    if not files:
        raise ValueError(f"{folder}: no pictures (.png, .jpg) in it")
    read: list[NDArray[np.uint8]] = []
    mode = ""
    for file in files:
        try:
            with Image.open(file) as picture:
                if picture.width * picture.height * len(files) * 3 > LARGEST_BYTES:
                    raise ValueError(
                        f"{picture.width} x {picture.height} pixels are too many for {len(files)} pictures"
                    )
                if picture.mode in ("I", "F") or picture.mode.startswith("I;"):
                    raise ValueError(f"pixels of more than 8 bits ({picture.mode}); save them as an array, .npy")
                mode = mode or ("L" if picture.mode in ("1", "L", "LA") else "RGB")
                pixels = np.asarray(picture.convert(mode))
        except (OSError, ValueError, UnidentifiedImageError, Image.DecompressionBombError) as error:
            raise ValueError(f"{file}: {error}") from error
        pixels = pixels[None] if mode == "L" else pixels.transpose(2, 0, 1)
        if read and pixels.shape != read[0].shape:
            sizes = " x ".join(map(str, pixels.shape[1:])), " x ".join(map(str, read[0].shape[1:]))
            raise ValueError(f"{file}: {sizes[0]} pixels, but {files[0].name} has {sizes[1]}")
        read.append(pixels)
    return np.stack(read)


def _read_array(path: Path) -> NDArray[Any]:
    try:
        values = np.load(path, allow_pickle=False, mmap_mode="r")
    except (OSError, ValueError, EOFError) as error:
        raise ValueError(f"{path}: cannot be read as an array of numbers: {error}") from error
    if not isinstance(values, np.ndarray) or values.dtype.kind not in "biuf":
        raise ValueError(f"{path}: must be one array of real numbers")
    if not 2 <= values.ndim <= 4 or 0 in values.shape[1:]:
        raise ValueError(f"{path}: shape {values.shape}, must be [N, d], [N, H, W] or [N, C, H, W]")
    if 4 * values.size > LARGEST_BYTES:
        raise ValueError(f"{path}: shape {values.shape} is more than {LARGEST_BYTES} bytes in memory")
    values = np.asarray(values)
    if values.ndim == 4 and values.dtype == np.uint8 and values.shape[3] in (1, 3) and values.shape[1] not in (1, 3):
        values = values.transpose(0, 3, 1, 2)
    return values


def _read_csv(path: Path) -> NDArray[np.float32]:
    rows: list[list[float]] = []
    try:
        with path.open(newline="", encoding="utf-8-sig") as file:
            reader = csv.reader(file)
            for number, cells in enumerate(reader):
                if not cells:
                    continue
                try:
                    row = [float(cell) for cell in cells]
                except ValueError:
                    if number == 0:  # a header
                        continue
                    raise ValueError(f"{path}, line {reader.line_num}: {cells!r} are not all numbers") from None
                if rows and len(row) != len(rows[0]):
                    raise ValueError(
                        f"{path}, line {reader.line_num}: {len(row)} numbers, the first has {len(rows[0])}"
                    )
                if not all(map(math.isfinite, row)):
                    raise ValueError(f"{path}, line {reader.line_num}: {cells!r} are not all finite")
                rows.append(row)
    except (UnicodeDecodeError, csv.Error) as error:
        raise ValueError(f"{path}: cannot be read as a table: {error}") from error
    return np.array(rows, dtype=np.float32)


def _read_text(path: Path) -> Data:
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
    except UnicodeDecodeError as error:
        raise ValueError(f"{path}: not text in UTF-8: {error}") from error
    strings = [(number, line) for number, line in enumerate(lines, 1) if line]
    if len(strings) < 2:
        raise ValueError(f"{path}: {len(strings)} lines; at least 2 are needed")
    length = len(strings[0][1])
    for number, line in strings:
        if len(line) != length:
            raise ValueError(f"{path}, line {number}: {len(line)} characters, the first line has {length}")
    alphabet = "".join(sorted({character for _, line in strings for character in line}))
    token = {character: number for number, character in enumerate(alphabet)}
    return Data(torch.tensor([[token[character] for character in line] for _, line in strings]), alphabet=alphabet)


def _tokens(path: Path, values: NDArray[Any]) -> Tensor:
    if values.ndim != 2 or values.dtype.kind not in "biu":
        raise ValueError(f"{path}: {values.dtype} of shape {values.shape}; tokens are whole numbers [N, L]")
    wrong = np.flatnonzero(np.any((values < 0) | (values >= 65_536), axis=1))
    if len(wrong):
        raise ValueError(f"{path}, row {wrong[0]}: tokens must be from 0 to 65535")
    return torch.from_numpy(values.astype(np.int64))


def _numbers(path: Path, values: NDArray[Any], standardise: bool) -> Data:
    if values.ndim == 3:
        values = values[:, None]
    read = torch.from_numpy(np.array(values, dtype=np.float32, order="C"))
    flat = read.flatten(1)
    for what, bad in (
        ("a number that is not finite", ~flat.isfinite().all(1)),
        (f"a number beyond {LARGEST_NUMBER:g}; scale the data", (flat.abs() > LARGEST_NUMBER).any(1)),
    ):
        if bad.any():
            raise ValueError(f"{path}, row {int(bad.nonzero()[0])}: {what}")
    units = Units()
    if standardise:
        spread = float(read.std())
        if not spread > 0:
            raise ValueError(f"{path}: all numbers are equal, and cannot be standardised")
        units = Units(float(read.mean()), spread)
    elif values.dtype == np.uint8:
        units = _PIXELS
    return Data(units.of_objects(read), units)
