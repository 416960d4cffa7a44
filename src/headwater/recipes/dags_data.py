"""Data for structure learning: a user's table of measurements, or draws from a random linear-Gaussian network whose
true graph is known.
"""

from __future__ import annotations

import csv
import math
from array import array
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from headwater.environments.dags import MOST_NODES, node_names

LARGEST_FILE = 100_000_000
"""Bytes of a table that is read."""
FEWEST_ROWS = 10
"""Rows below which a table says next to nothing about which variables depend on each other."""
_LARGEST_VALUE = 1e100


class DataError(ValueError):
    """A table that cannot be used; the message names file, line and column."""


@dataclass(frozen=True)
class Dataset:
    """names: one word a variable. values: `[rows, variables]`. truth: the adjacency matrix of the graph that the values
    were drawn from, int32 `[variables, variables]`; None where it is not known.
    """

    names: tuple[str, ...]
    values: NDArray[np.float64]
    truth: Tensor | None = None

    def standardized(self) -> Dataset:
        """The same with mean 0 and standard deviation 1 in every column."""
        values = (self.values - self.values.mean(0)) / self.values.std(0)
        return Dataset(self.names, values, self.truth)


def read_table(path: str | Path) -> Dataset:
    """A CSV file, comma or tab between fields, the variables' names in its first line, a number in every other field.

    A blank in a name becomes an underscore. Raises DataError naming file, line and column: for a nameless or repeated
    column, text or a missing value, an infinite one, lines of different length, a column without variation, fewer
    than `FEWEST_ROWS` rows, 1 or more than `MOST_NODES` columns, more than `LARGEST_FILE` bytes, or what is no text.
    """
    path = Path(path)
    if (size := path.stat().st_size) > LARGEST_FILE:
        raise DataError(f"{path}: {size:,} bytes; at most {LARGEST_FILE:,} are read")
    try:
        names, values = _read(path)
    except (UnicodeDecodeError, csv.Error, IsADirectoryError) as error:
        raise DataError(f"{path}: cannot be read as a table: {error}") from error
    if len(values) < FEWEST_ROWS:
        raise DataError(f"{path}: {len(values)} rows of data; at least {FEWEST_ROWS} are needed")
    for column, name in enumerate(names):
        if (largest := np.abs(values[:, column]).max()) > _LARGEST_VALUE:
            raise DataError(f"{path}, column {name!r}: {largest:g} is too large to be squared; use another unit")
        if np.ptp(values[:, column]) < 1 / _LARGEST_VALUE:
            raise DataError(f"{path}, column {name!r}: every value is {values[0, column]:g}; leave it out")
    return Dataset(names, values)


def linear_gaussian_network(nodes: int, rows: int, seed: int) -> Dataset:
    """Draws from a random network: each edge of a random order with the same probability, so that a node has one parent
    on average; weights from N(0, 1); noise of variance 0.1 at every node (the setting of Deleu et al. 2022).
    """
    random = np.random.default_rng(seed)
    order = random.permutation(nodes)
    before = np.triu(random.random((nodes, nodes)) < min(1.0, 2 / max(nodes - 1, 1)), k=1)
    edges = np.zeros((nodes, nodes), dtype=bool)
    edges[np.ix_(order, order)] = before
    weights = edges * random.normal(size=(nodes, nodes))
    values = math.sqrt(0.1) * random.normal(size=(rows, nodes))
    for node in order:
        values[:, node] += values @ weights[:, node]
    return Dataset(node_names(nodes), values, torch.from_numpy(edges.astype(np.int32)))


def _read(path: Path) -> tuple[tuple[str, ...], NDArray[np.float64]]:
    with path.open(newline="", encoding="utf-8-sig") as file:
        first_line = file.readline()
        file.seek(0)
        reader = csv.reader(file, delimiter="\t" if first_line.count("\t") > first_line.count(",") else ",")
        names = _names(path, next(reader, []))
        values = array("d")
        for row in reader:
            if not row:
                continue
            if len(row) != len(names):
                raise DataError(f"{path}, line {reader.line_num}: {len(row)} fields, the header has {len(names)}")
            for name, field in zip(names, row, strict=True):
                values.append(_number(field, f"{path}, line {reader.line_num}, column {name!r}"))
    return names, np.frombuffer(values).reshape(-1, len(names)) if values else np.empty((0, len(names)))


def _names(path: Path, header: list[str]) -> tuple[str, ...]:
    names = tuple("_".join(name.split()) for name in header)
    if not 2 <= len(names) <= MOST_NODES:
        raise DataError(f"{path}, line 1: {len(names)} columns; from 2 to {MOST_NODES} are possible")
    if all(_is_number(name) for name in names):
        raise DataError(f"{path}, line 1: numbers where the names of the variables should stand")
    for column, name in enumerate(names, 1):
        if not name:
            raise DataError(f"{path}, line 1: column {column} has no name")
        if "->" in name:
            raise DataError(f"{path}, line 1, column {name!r}: '->' stands for an edge; choose another name")
        if names.index(name) != column - 1:
            raise DataError(f"{path}, line 1, column {name!r}: there are two columns of this name")
    return names


def _number(field: str, where: str) -> float:
    if not field.strip():
        raise DataError(f"{where}: a value is missing; fill it in or leave the row out")
    if not _is_number(field):
        raise DataError(f"{where}: {field!r} is not a number")
    if not math.isfinite(value := float(field)):
        raise DataError(f"{where}: {field!r} is not a finite number; fill it in or leave the row out")
    return value


def _is_number(field: str) -> bool:
    try:
        float(field)
    except ValueError:
        return False
    return True
