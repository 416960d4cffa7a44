"""How the likelihood of a tree changes with its branch lengths, and the lengths that make it largest.

With what lies on both sides of an edge in the eigenvectors' basis, a pattern's likelihood is a sum of four exponentials
in the edge's length b, sum_k u_k v_k exp(lambda_k b) (Felsenstein 1981), from which both derivatives come at once. One
pass from the leaves to the root and one back give them for every edge.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from headwater.native import kept_njit
from headwater.phylogeny.felsenstein import Tips
from headwater.phylogeny.models import Process

Floats = NDArray[np.float64]

_CHUNK = 64
_SMALL = 1e-100
SHORTEST, LONGEST = 1e-8, 20.0
"""Between these `fit_lengths` keeps lengths, in substitutions per site."""


class Gradients(NamedTuple):
    """log-likelihood `[T]`; its first and second derivatives by each edge's length alone, `[T, n-1, 2]`. float64."""

    log_likelihood: Floats
    first: Floats
    second: Floats

    def __add__(self, other: object) -> Gradients:
        """Of two partitions together, whose edges have the same lengths."""
        if not isinstance(other, Gradients):
            return NotImplemented
        return Gradients(*(mine + theirs for mine, theirs in zip(self, other, strict=True)))


def log_likelihood_gradients(
    tips: Tips, process: Process, merges: NDArray[np.int32], lengths: NDArray[np.float64]
) -> Gradients:
    """The log-likelihood of whole trees `[T, n-1, 2]` with lengths `[T, n-1, 2]`, in float64, and its derivatives by
    them.

    The last merge's two edges are one: both have the derivative by its length.
    """
    if len(process.values) not in (1, len(merges)):
        raise ValueError(
            f"parameters of {len(process.values)} trees: must be one for all, or of the {len(merges)} trees"
        )
    merges = np.ascontiguousarray(merges, dtype=np.int32)
    lengths = np.ascontiguousarray(lengths, dtype=np.float64)
    return Gradients(*_gradients(tips.partials, tips.weights, tips.common, merges, lengths, *process[:6]))


def fit_lengths(
    partitions: Sequence[tuple[Tips, Process]],
    merges: NDArray[np.int32],
    lengths: NDArray[np.float64],
    prior_rate: float = 0.0,
    iterations: int = 40,
    tolerance: float = 1e-3,
) -> tuple[Floats, Floats]:
    """Branch lengths that maximise log likelihood - prior_rate * (sum of lengths): maximum likelihood with 0, else
    maximum a posteriori under an exponential prior of that rate.

    partitions: patterns and process of each, one for an alignment without. lengths: where to start, `[T, n-1, 2]`,
    above 0. Limited-memory BFGS (Nocedal 1980) in log length, all trees side by side, started from the curvature of
    each edge alone; ends when the expected gain of every tree is below `tolerance` nats. Returns the lengths `[T, n-1,
    2]`, the last merge's second 0, and the log-likelihoods `[T]` (without the prior).
    """
    count = len(merges)
    one_edge = np.ones((1, *lengths.shape[1:]))
    one_edge[:, -1, 1] = 0

    def evaluate(x: Floats) -> tuple[Floats, Floats, Floats, Floats]:
        """log-likelihood and value `[T]`; by x, the first derivative and the scale of a good step, `[T, E]`."""
        b = np.exp(x).reshape(lengths.shape) * one_edge
        parts = [log_likelihood_gradients(tips, process, merges, b) for tips, process in partitions]
        total = parts[0]
        for part in parts[1:]:
            total = total + part
        slope = b * (total.first - prior_rate)
        curvature = -(b * b * total.second + slope)
        # Where the logarithm's curvature says nothing (far too short or long), as for a Poisson count: slope itself.
        scale = np.where(curvature > 0.1 * abs(slope), curvature, np.maximum(abs(slope), 1e-3))
        value = total.log_likelihood - prior_rate * b.sum((1, 2))
        return total.log_likelihood, value, slope.reshape(count, -1), 1 / np.maximum(scale, 1e-3).reshape(count, -1)

    start = lengths.copy()
    start[:, -1, 0] += start[:, -1, 1]
    low, high = math.log(SHORTEST), math.log(LONGEST)
    x = np.log(np.clip(start, SHORTEST, LONGEST)).reshape(count, -1)
    likelihood, value, slope, scale = evaluate(x)
    history: list[tuple[Floats, Floats]] = []
    step = np.ones(count)
    for _ in range(iterations):
        held = ((x <= low) & (slope < 0)) | ((x >= high) & (slope > 0))
        free = np.where(held, 0, slope)
        direction = np.where(held, 0, _two_loop(free, scale, history))
        uphill = (direction * free).sum(1) > 0
        direction = np.where(uphill[:, None], direction, scale * free)
        gain = (direction * free).sum(1)
        if (gain < tolerance).all():
            break
        direction *= np.minimum(1, 3 / np.maximum(abs(direction).max(1), 1e-12))[:, None]
        trial = np.clip(x + step[:, None] * direction, low, high)
        new_likelihood, new_value, new_slope, new_scale = evaluate(trial)
        better = new_value >= value + 1e-4 * step * (direction * free).sum(1)
        moved = better[:, None]
        history = [*history[-7:], (np.where(moved, trial - x, 0), np.where(moved, slope - new_slope, 0))]
        x, slope, scale = (
            np.where(moved, trial, x), np.where(moved, new_slope, slope), np.where(moved, new_scale, scale)
        )  # fmt: skip
        value, likelihood = np.where(better, new_value, value), np.where(better, new_likelihood, likelihood)
        step = np.where(better, 1.0, step * 0.3)
    return np.exp(x).reshape(lengths.shape) * one_edge, likelihood


def _two_loop(slope: Floats, scale: Floats, history: list[tuple[Floats, Floats]]) -> Floats:
    """The quasi-Newton direction of each tree `[T, E]`; pairs that do not curve downwards are passed over."""
    direction = slope.copy()
    kept = []
    for moved, change in reversed(history):
        curve = (moved * change).sum(1)
        inverse = np.where(curve > 1e-10, 1 / np.maximum(curve, 1e-10), 0)
        share = inverse * (moved * direction).sum(1)
        direction -= share[:, None] * change
        kept.append((moved, change, inverse, share))
    direction *= scale
    for moved, change, inverse, share in reversed(kept):
        direction += (share - inverse * (change * direction).sum(1))[:, None] * moved
    return direction


@kept_njit()
def _gradients(leaves, weights, common, merges, lengths, left, values, right, rates, frequencies, invariant):  # type: ignore[no-untyped-def]
    n, _, patterns = leaves.shape
    categories = rates.shape[1]
    # By node, category and eigenvector or state: what lies below in the basis of right, the same seen from the
    # near end of the edge above, and what lies outside.
    below = np.empty((2 * n - 1, categories, 4, _CHUNK))
    seen = np.empty((2 * n - 1, categories, 4, _CHUNK))
    outside = np.empty((2 * n - 1, categories, 4, _CHUNK))
    here, there = np.empty((categories, 4, _CHUNK)), np.empty((categories, 4, _CHUNK))
    log_likelihood = np.zeros(len(merges))
    first, second = np.zeros(lengths.shape), np.zeros(lengths.shape)
    shares, shrinks, sites = np.empty(_CHUNK), np.empty(_CHUNK), np.empty((3, _CHUNK))
    along, back = np.empty((4, 4)), np.empty((4, 4))
    for start in range(0, patterns, _CHUNK):
        chunk = min(_CHUNK, patterns - start)
        here[:], there[:] = 1, 1
        for t in range(len(merges)):
            b = t if len(values) > 1 else 0
            backwards, turned = left[b].T.copy(), right[b].T.copy()
            shrinks[:] = 0
            for leaf in range(n):
                for c in range(categories):
                    for i in range(4):
                        here[c, i, :chunk] = leaves[leaf, i, start : start + chunk]
                    _product(right[b], here[c], below[leaf, c])
            for k in range(n - 1):
                for child in range(2):
                    node = merges[t, k, child]
                    for c in range(categories):
                        _decayed(left[b], values[b], lengths[t, k, child] * rates[b, c], along)
                        _product(along, below[node, c], seen[node, c])
                _times(seen[merges[t, k, 0]], seen[merges[t, k, 1]], here)
                _enlarge(here, shrinks, sites[0])
                if k < n - 2:
                    for c in range(categories):
                        _product(right[b], here[c], below[n + k, c])
            for w in range(_CHUNK):
                shares[w] = 0
            for w in range(chunk):
                site = 0.0
                for c in range(categories):
                    for i in range(4):
                        site += frequencies[b, i] * here[c, i, w]
                log = math.log(site / categories) + shrinks[w] * math.log(_SMALL) if site > 0 else -np.inf
                total = log + math.log1p(-invariant[b])
                if invariant[b] > 0 and common[start + w]:
                    states = 0.0
                    for i in range(4):
                        if common[start + w] >> i & 1:
                            states += frequencies[b, i]
                    constant = math.log(invariant[b] * states)
                    total = max(total, constant) + math.log1p(math.exp(-abs(total - constant)))
                shares[w] = math.exp(log + math.log1p(-invariant[b]) - total)
                if weights[start + w] > 0:
                    log_likelihood[t] += weights[start + w] * total
            for c in range(categories):
                for i in range(4):
                    outside[2 * n - 2, c, i, :] = frequencies[b, i]
            for k in range(n - 2, -1, -1):
                for child in range(2):
                    node, other = merges[t, k, child], merges[t, k, 1 - child]
                    _times(outside[n + k], seen[other], there)
                    _enlarge(there, sites[1], sites[0])  # only ratios matter from here on
                    for c in range(categories):
                        _product(backwards, there[c], here[c])
                        if node >= n:
                            _decayed(turned, values[b], lengths[t, k, child] * rates[b, c], back)
                            _product(back, here[c], outside[node, c])
                    slope, curve = _derivatives(here, below[node], values[b], rates[b], lengths[t, k, child], shares,
                                                weights[start : start + chunk], sites)  # fmt: skip
                    first[t, k, child] += slope
                    second[t, k, child] += curve
    return log_likelihood, first, second


@kept_njit()
def _decayed(matrix, values, length, out):  # type: ignore[no-untyped-def]
    """Columns times exp(values length)."""
    for k in range(4):
        decay = math.exp(values[k] * length)
        for i in range(4):
            out[i, k] = matrix[i, k] * decay


@kept_njit(fastmath=True)
def _product(matrix, x, out):  # type: ignore[no-untyped-def]
    """out[i, w] = sum_k matrix[i, k] x[k, w]."""
    for i in range(4):
        m0, m1, m2, m3 = matrix[i, 0], matrix[i, 1], matrix[i, 2], matrix[i, 3]
        for w in range(_CHUNK):
            out[i, w] = m0 * x[0, w] + m1 * x[1, w] + m2 * x[2, w] + m3 * x[3, w]


@kept_njit()
def _times(x, y, out):  # type: ignore[no-untyped-def]
    for c in range(len(x)):
        for i in range(4):
            for w in range(_CHUNK):
                out[c, i, w] = x[c, i, w] * y[c, i, w]


@kept_njit(fastmath=True)
def _enlarge(x, shrinks, whole):  # type: ignore[no-untyped-def]
    """Where all of a pattern's numbers are tiny, divide them by _SMALL, and count it. whole: room, `[_CHUNK]`."""
    whole[:] = 0
    for c in range(len(x)):
        for w in range(_CHUNK):
            whole[w] += x[c, 0, w] + x[c, 1, w] + x[c, 2, w] + x[c, 3, w]
    tiny = 0.0
    for w in range(_CHUNK):
        tiny += 1.0 if whole[w] < _SMALL else 0.0
    if tiny:
        for w in range(_CHUNK):
            if whole[w] < _SMALL:
                shrinks[w] += 1
                x[:, :, w] /= _SMALL


@kept_njit(fastmath=True)
def _derivatives(outer, inner, values, rates, length, shares, weights, sites):  # type: ignore[no-untyped-def]
    """Of a chunk's weighted log-likelihoods by one edge's length. shares: how much of each pattern's likelihood
    is that of sites that change. sites: room, `[3, _CHUNK]`."""
    sites[:] = 0
    for c in range(len(rates)):
        s0, s1, s2, s3 = values[0] * rates[c], values[1] * rates[c], values[2] * rates[c], values[3] * rates[c]
        e0, e1, e2, e3 = math.exp(s0 * length), math.exp(s1 * length), math.exp(s2 * length), math.exp(s3 * length)
        for w in range(_CHUNK):
            t0, t1 = e0 * outer[c, 0, w] * inner[c, 0, w], e1 * outer[c, 1, w] * inner[c, 1, w]
            t2, t3 = e2 * outer[c, 2, w] * inner[c, 2, w], e3 * outer[c, 3, w] * inner[c, 3, w]
            sites[0, w] += t0 + t1 + t2 + t3
            sites[1, w] += s0 * t0 + s1 * t1 + s2 * t2 + s3 * t3
            sites[2, w] += s0 * s0 * t0 + s1 * s1 * t1 + s2 * s2 * t2 + s3 * s3 * t3
    first, second = 0.0, 0.0
    for w in range(len(weights)):
        share = np.divide(shares[w], sites[0, w])  # as / is, but for a test of its own for 0, at which LLVM gives up
        slope = share * sites[1, w]
        first += weights[w] * slope
        second += weights[w] * (share * sites[2, w] - slope * slope)
    return first, second
