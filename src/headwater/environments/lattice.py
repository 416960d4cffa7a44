"""Discrete energy models: n sites, each in one of q states, that interact in pairs. Ising and Potts models among them.

log R(x) = sum_ij J_ij s(x_i) . s(x_j) + sum_i h_i(x_i), over *ordered* pairs: with a symmetric J every bond counts
twice, which is x^T J x for spins of -1 and +1 (the convention of discrete energy-based GFlowNets, Zhang et al. 2022,
arXiv 2202.01361). A sampler of such a model draws x with its Boltzmann probability.
"""

from __future__ import annotations

import csv
import math
from pathlib import Path
from typing import Literal

import torch
from torch import Tensor

from headwater.environments.base import Environment, Objects
from headwater.environments.elimination import Elimination
from headwater.environments.rows import integer_rows
from headwater.environments.sequences import Sequences
from headwater.environments.slots import Slots

LARGEST_FILE = 20_000_000
"""Bytes of the largest file of couplings that is read."""
MOST_STATES = 10


class Sites(Sequences):
    """`length` sites set to one of `symbols` states in their order. Objects are the states, an integer tensor
    `[T, length]`.
    """

    def __init__(self, length: int, symbols: int) -> None:
        digits = len(str(symbols - 1))
        super().__init__([f"{state:0{digits}}" for state in range(symbols)], length)

    def objects(self, states: Tensor) -> Objects:
        return states

    def states(self, objects: Objects) -> Tensor:
        return integer_rows(objects, self.max_length, self.empty)


def sites(length: int, symbols: int, construction: Literal["append", "slots"] = "append") -> Environment:
    """The environment of `length` sites of `symbols` states, set one after another ("append") or in any order
    ("slots").
    """
    if construction not in ("append", "slots"):
        raise ValueError(f"construction = {construction!r}: must be 'append' or 'slots'")
    return Sites(length, symbols) if construction == "append" else Slots(length, symbols)


class PairwiseReward:
    """log R(x) = sum_ij J_ij s(x_i) . s(x_j) + sum_i h_i(x_i) of states `[T, n]`, each in 0 .. q - 1.

    couplings: J, `[n, n]`, symmetric; its diagonal adds a constant to spins of one length. states: q. With two, s is
    the spin -1 or +1 (Ising); with more, s(a) . s(b) is 1 where a = b and else 0 (Potts). fields: h, `[n, q]`, or none.
    Raises ValueError, naming what is wrong, for couplings or fields that fit no model.
    """

    def __init__(self, couplings: Tensor, states: int = 2, fields: Tensor | None = None) -> None:
        couplings = couplings.double()
        n = len(couplings)
        if couplings.ndim != 2 or not n or couplings.shape[1] != n:
            raise ValueError(f"couplings have shape {tuple(couplings.shape)}: must be a square matrix [n, n]")
        if not couplings.isfinite().all():
            raise ValueError("couplings: every one must be a finite number")
        if not torch.allclose(couplings, couplings.T, rtol=0, atol=1e-9):
            i, j = ((couplings - couplings.T).abs() > 1e-9).nonzero()[0].tolist()
            raise ValueError(
                f"couplings must be symmetric: row {i + 1}, column {j + 1} has {couplings[i, j]:g}, "
                f"row {j + 1}, column {i + 1} has {couplings[j, i]:g}"
            )
        if not 2 <= states <= MOST_STATES:
            raise ValueError(f"states = {states}: must lie between 2 and {MOST_STATES}")
        fields = torch.zeros(n, states, dtype=torch.float64) if fields is None else fields.double()
        if fields.shape != (n, states) or not fields.isfinite().all():
            raise ValueError(f"fields have shape {tuple(fields.shape)}: must be finite numbers [{n}, {states}]")
        self.couplings, self.fields, self.q = couplings, fields, states
        self.spins = torch.tensor([[-1.0], [1.0]]).double() if states == 2 else torch.eye(states).double()

    def __call__(self, objects: Objects, condition: Tensor) -> Tensor:
        """float32 `[T]`."""
        states = torch.as_tensor(objects).long()
        spins = self.spins[states]  # [T, n, k]
        energy = torch.einsum("tik,ij,tjk->t", spins, self.couplings, spins)
        return (energy + self.fields.gather(1, states.T).sum(0)).float()

    def elimination(self) -> Elimination:
        """The exact distribution, for log Z and draws. Raises TooWide where the sites hang together too closely."""
        product = self.spins @ self.spins.T
        fields = self.fields + self.couplings.diagonal()[:, None] * product.diagonal()
        bonds = self.couplings.triu(1).nonzero().tolist()
        return Elimination(fields, {(i, j): 2 * self.couplings[i, j] * product for i, j in bonds})


def torus(height: int, width: int) -> Tensor:
    """The bonds of a square lattice whose opposite edges meet: float64 `[n, n]`, n = height * width, site r * width + c
    in row r and column c. J is a coupling strength times it. Across two rows or columns a bond counts once, not once
    each way round.
    """
    if height < 1 or width < 1 or height * width < 2:
        raise ValueError(f"height = {height}, width = {width}: must be at least 1, and two sites in all")
    number = torch.arange(height * width).view(height, width)
    bonds = torch.zeros(height * width, height * width, dtype=torch.float64)
    for neighbour in (number.roll(-1, 0), number.roll(-1, 1)):
        bonds[number.flatten(), neighbour.flatten()] = 1
        bonds[neighbour.flatten(), number.flatten()] = 1
    return bonds.fill_diagonal_(0)


def read_couplings(path: str | Path) -> Tensor:
    """A square matrix of numbers from a CSV file without header, one row a line: float64 `[n, n]`.

    Raises ValueError naming the file, and line and column where there is one, if it is not that or larger than
    `LARGEST_FILE` bytes; OSError where there is no such file.
    """
    path = Path(path)
    if (size := path.stat().st_size) > LARGEST_FILE:
        raise ValueError(f"{path}: {size:,} bytes; at most {LARGEST_FILE:,} are read")
    rows: list[list[float]] = []
    try:
        with path.open(newline="", encoding="utf-8-sig") as file:
            reader = csv.reader(file)
            for row in reader:
                if row:
                    where = f"{path}, line {reader.line_num}"
                    rows.append([_number(text, f"{where}, column {place}") for place, text in enumerate(row, 1)])
                    if len(row) != len(rows[0]):
                        raise ValueError(f"{where}: {len(row)} numbers, the first line has {len(rows[0])}")
    except (UnicodeDecodeError, csv.Error) as error:
        raise ValueError(f"{path}: cannot be read as CSV: {error}") from error
    if not rows or len(rows) != len(rows[0]):
        raise ValueError(f"{path}: {len(rows)} lines of {len(rows[0]) if rows else 0} numbers; couplings are [n, n]")
    return torch.tensor(rows, dtype=torch.float64)


def _number(text: str, where: str) -> float:
    try:
        value = float(text)
    except ValueError:
        raise ValueError(f"{where}: {text!r} is not a number") from None
    if not math.isfinite(value):
        raise ValueError(f"{where}: {text!r} is not a finite number")
    return value
