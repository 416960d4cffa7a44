"""How DNA changes along a branch: JC69, K80, HKY85 and GTR, with rates that differ between sites (+G, +I).

A reversible rate matrix Q = S diag(pi), S symmetric, scaled to one expected substitution a site and unit of length;
exp(Q b) by the eigenvalues of the symmetric diag(pi)^(1/2) S diag(pi)^(1/2). Rates of sites: the means of equally
probable parts of a Gamma distribution of mean 1 (Yang 1994), and a share of sites that never change.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal, NamedTuple, get_args

import numpy as np
import torch
from numpy.typing import ArrayLike, NDArray

from headwater.native import kept_njit

Name = Literal["JC69", "K80", "HKY85", "GTR"]
Floats = NDArray[np.float64]

_PAIRS = ((0, 1), (0, 2), (0, 3), (1, 2), (1, 3), (2, 3))
"""Which states the six exchangeabilities are between: AC AG AT CG CT GT."""


@dataclass(frozen=True)
class SubstitutionModel:
    """gamma_categories: 1 for equal rates. invariant: whether a share of the sites never changes.

    JC69: Jukes & Cantor 1969; K80: Kimura 1980; HKY85: Hasegawa, Kishino & Yano 1985; GTR: Tavare 1986.
    """

    name: Name = "JC69"
    gamma_categories: int = 1
    invariant: bool = False

    def __post_init__(self) -> None:
        if self.name not in get_args(Name):
            raise ValueError(f"name = {self.name!r}: must be one of {', '.join(get_args(Name))}")
        if not 1 <= self.gamma_categories <= 64:
            raise ValueError(f"gamma_categories = {self.gamma_categories}: must be from 1 to 64")

    @property
    def has_kappa(self) -> bool:
        """Whether transitions have a rate of their own."""
        return self.name in ("K80", "HKY85")

    @property
    def has_frequencies(self) -> bool:
        """Whether the states differ in frequency."""
        return self.name in ("HKY85", "GTR")

    def __str__(self) -> str:
        gamma = f"+G{self.gamma_categories}" if self.gamma_categories > 1 else ""
        return self.name + gamma + ("+I" if self.invariant else "")


class Process(NamedTuple):
    """A model with its parameters, decomposed: B sets of parameters, one for all trees or one a tree.

    P(b) = left exp(values b rate) right, left `[B, 4, 4]`, values `[B, 4]`, right `[B, 4, 4]`; rates `[B, C]` of
    equally probable categories; frequencies `[B, 4]`; invariant `[B]`, the share of sites that never change.
    closed_form: JC69 with one category, for which exp(-4/3 b rate) says all. All float64.
    """

    left: Floats
    values: Floats
    right: Floats
    rates: Floats
    frequencies: Floats
    invariant: Floats
    closed_form: bool

    def select(self, trees: NDArray[np.int64]) -> Process:
        """The parameters of some of the trees, numbers `[K]`; those of all where there is one set for all."""
        if len(self.values) == 1:
            return self
        left, values, right, rates, frequencies, invariant, closed_form = self
        return Process(
            left[trees], values[trees], right[trees], rates[trees], frequencies[trees], invariant[trees], closed_form
        )


def process(
    model: SubstitutionModel,
    kappa: ArrayLike = 1.0,
    frequencies: ArrayLike = (0.25, 0.25, 0.25, 0.25),
    exchangeabilities: ArrayLike = (1.0, 1.0, 1.0, 1.0, 1.0, 1.0),
    alpha: ArrayLike = 1.0,
    invariant: ArrayLike = 0.0,
    rate: ArrayLike = 1.0,
) -> Process:
    """The model with these parameters; those that it does not have are not looked at.

    Each is one for all trees, or has a first dimension of B: kappa `[B]`, the ratio of the rates of transitions and
    transversions; frequencies `[B, 4]` of A, C, G, T, which sum to 1; exchangeabilities `[B, 6]` AC AG AT CG CT GT;
    alpha `[B]`, the shape of the Gamma distribution; invariant `[B]`, the share of sites that never change; rate
    `[B]`, by which all lengths are multiplied (of a partition, whose lengths are linked to others').
    """
    pi = _parameter("frequencies", frequencies, (4,), model.has_frequencies, 0.25)
    if (abs(pi.sum(-1) - 1) > 1e-6).any():
        raise ValueError(f"frequencies = {frequencies!r}: must sum to 1")
    pi = pi / pi.sum(-1, keepdims=True)
    ratio = _parameter("kappa", kappa, (), model.has_kappa, 1.0)
    exchange = _parameter("exchangeabilities", exchangeabilities, (6,), model.name == "GTR", 1.0)
    shape = _parameter("alpha", alpha, (), model.gamma_categories > 1, 1.0)
    share = _parameter("invariant", invariant, (), model.invariant, 0.0, lowest=-1.0)
    if (share < 0).any() or (share >= 1).any():
        raise ValueError(f"invariant = {invariant!r}: must be at least 0 and below 1")
    speed = _parameter("rate", rate, (), True, 1.0)
    sizes = {len(array) for array in (pi, ratio, exchange, shape, share, speed)} - {1}
    if len(sizes) > 1:
        raise ValueError(f"parameters of {sorted(sizes)} trees: must be of one number of trees, or one for all")
    sets = max(sizes, default=1)
    exchange = np.where(np.array([0, 1, 0, 0, 1, 0], dtype=bool), exchange * ratio[:, None], exchange)
    rates = gamma_rates(shape, model.gamma_categories) * (speed / (1 - share))[:, None]
    left, values, right = _decompose(exchange, pi)
    closed_form = model.name == "JC69" and model.gamma_categories == 1

    def spread(array: Floats) -> Floats:
        return np.ascontiguousarray(np.broadcast_to(array, (sets, *array.shape[1:])))

    return Process(spread(left), spread(values), spread(right), spread(rates), spread(pi), spread(share), closed_form)


def transition_matrices(process: Process, lengths: ArrayLike) -> Floats:
    """Probabilities of the state at the far end (column) given the near one (row): lengths `[T, E]`, float64
    `[T, E, C, 4, 4]`.
    """
    return _matrices(process, _of_trees(process, lengths), np.float64)


def edge_factors(process: Process, lengths: ArrayLike) -> NDArray[np.float32]:
    """What the likelihood's kernels take of the edges: lengths `[T, E]`, float32 `[T, E, C, 4, 4]`, the transition
    matrices; or `[T, E, 2]` in closed form, exp(-4/3 b) and (1 - exp(-4/3 b)) / 4.
    """
    lengths = _of_trees(process, lengths)
    if not process.closed_form:
        return _matrices(process, lengths, np.float32)
    exponent = -4 / 3 * lengths * process.rates
    return np.stack((np.exp(exponent), -0.25 * np.expm1(exponent)), -1).astype(np.float32)


def gamma_rates(alpha: ArrayLike, categories: int) -> Floats:
    """Means of the equally probable parts of Gamma distributions of shape alpha `[B]` and mean 1, `[B, categories]`
    (Yang 1994, equation 10).
    """
    shape = np.asarray(alpha, dtype=np.float64).reshape(-1, 1)
    if categories == 1:
        return np.ones((len(shape), 1))
    a = torch.from_numpy(shape)
    share = torch.arange(1, categories, dtype=torch.float64) / categories
    # The quantiles by halving log x, between where the lower tail x^a / Gamma(a + 1) vanishes and a far upper tail.
    low = (torch.log(share) + torch.lgamma(a + 1)) / a - 2
    high = torch.log(a + 10 * torch.sqrt(a) + 20) + torch.zeros_like(low)
    for _ in range(80):
        middle = (low + high) / 2
        below = torch.special.gammainc(a, torch.exp(middle)) < share
        low, high = torch.where(below, middle, low), torch.where(below, high, middle)
    part = torch.special.gammainc(a + 1, torch.exp(low)).numpy()
    edges = np.concatenate((np.zeros_like(shape), part, np.ones_like(shape)), axis=1)
    means = np.diff(edges, axis=1) * categories
    return means / means.mean(1, keepdims=True)


def empirical_frequencies(masks: NDArray[np.uint8], weights: NDArray[np.float64]) -> Floats:
    """Shares of A, C, G, T in alignment patterns `[n, P]` with their counts `[P]`: float64 `[4]`.

    A cell that may be several states counts for each in part, in proportion to the frequencies themselves (the usual
    iteration); a missing cell counts for nothing.
    """
    counted = (masks & 15 != 15) & (masks & 15 != 0)
    sets, inverse = np.unique(masks[counted] & 15, return_inverse=True)
    counts = np.bincount(inverse, np.broadcast_to(weights, masks.shape)[counted], len(sets))
    if not counts.sum():
        raise ValueError("masks: no cell is known")
    members = (sets[:, None] >> np.arange(4, dtype=np.uint8) & 1).astype(np.float64)
    pi = np.full(4, 0.25)
    for _ in range(100):
        shares = members * pi
        pi = counts @ (shares / shares.sum(1, keepdims=True)) / counts.sum()
    return pi


def _parameter(
    name: str, given: ArrayLike, shape: tuple[int, ...], used: bool, otherwise: float, lowest: float = 0.0
) -> Floats:
    """float64 `[B, *shape]`, finite and above `lowest`."""
    if not used:
        return np.full((1, *shape), otherwise)
    values = np.asarray(given, dtype=np.float64)
    if values.ndim == len(shape):
        values = values[None]
    if values.shape[1:] != shape or values.ndim != len(shape) + 1 or not len(values):
        raise ValueError(f"{name} of shape {np.shape(given)}: must be {list(shape)}, or that for every tree")
    if not np.isfinite(values).all() or (values <= lowest).any():
        raise ValueError(f"{name} = {given!r}: must be finite and above {max(lowest, 0.0):g}")
    return values


def _decompose(exchange: Floats, pi: Floats) -> tuple[Floats, Floats, Floats]:
    sets = max(len(exchange), len(pi))
    symmetric = np.zeros((sets, 4, 4))
    root = np.sqrt(pi)
    for pair, (i, j) in enumerate(_PAIRS):
        symmetric[:, i, j] = symmetric[:, j, i] = exchange[:, pair] * root[:, i] * root[:, j]
    # Rows of Q sum to 0: the diagonal of Q, which the symmetric form shares, is minus the rates to other states.
    leaving = np.einsum("bij,bj->bi", symmetric, root) / root
    symmetric[:, range(4), range(4)] = -leaving
    mean = (leaving * pi).sum(-1)
    values, vectors = np.linalg.eigh(symmetric / mean[:, None, None])
    values[:, -1] = 0  # exactly
    return vectors / root[:, :, None], values, vectors.transpose(0, 2, 1) * root[:, None, :]


def _of_trees(process: Process, lengths: ArrayLike) -> Floats:
    lengths, sets = np.asarray(lengths, dtype=np.float64), len(process.values)
    if lengths.ndim != 2 or sets not in (1, len(lengths)):
        raise ValueError(f"lengths of shape {lengths.shape}: must be [T, E], and T is {sets if sets > 1 else 'free'}")
    return lengths


def _matrices(process: Process, lengths: Floats, kind: type[np.floating]) -> np.ndarray:
    out = np.empty((*lengths.shape, process.rates.shape[1], 4, 4), dtype=kind)
    _fill_matrices(process.left, process.values, process.right, process.rates, lengths, out)
    return out


@kept_njit()
def _fill_matrices(left, values, right, rates, lengths, out):  # type: ignore[no-untyped-def]
    decay = np.empty(4)
    for t in range(lengths.shape[0]):
        b = t if len(values) > 1 else 0
        for e in range(lengths.shape[1]):
            for c in range(rates.shape[1]):
                for k in range(4):
                    decay[k] = math.expm1(values[b, k] * lengths[t, e] * rates[b, c])
                for i in range(4):
                    for j in range(4):
                        total = 1.0 if i == j else 0.0  # and the rest without it: a short edge's keep their digits
                        for k in range(4):
                            total += left[b, i, k] * decay[k] * right[b, k, j]
                        out[t, e, c, i, j] = max(total, 0.0)
