"""The likelihood of trees by pruning (Felsenstein 1981): of whole trees, and one merge at a time.

A node's partial likelihoods are float32 planes of patterns, `[C, 4, P]`: one a rate category and state, so that
arithmetic runs along patterns. A data set in partitions is several `Tips`, each with its process: likelihoods add.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from headwater.phylogeny import pruning
from headwater.phylogeny.models import Process, edge_factors
from headwater.policies.registers import LANES

Floats = NDArray[np.float64]


class Tips(NamedTuple):
    """Patterns of the leaves, as many as fill whole registers: those added are missing cells of weight 0.

    partials: float32 `[n, 4, P]`, 1 for each state that a cell may be. weights: float64 `[P]`. common: uint8 `[P]`, the
    states that all leaves may share, which a site that never changes can have.
    """

    partials: NDArray[np.float32]
    weights: Floats
    common: NDArray[np.uint8]


def tips(masks: NDArray[np.uint8], weights: NDArray[np.float64]) -> Tips:
    """Leaves' partial likelihoods: masks uint8 `[n, P]` of bits 1, 2, 4, 8 for A, C, G, T (15 where nothing is known),
    weights `[P]`. A gap must be 15: a likelihood knows no fifth state.
    """
    if masks.ndim != 2 or masks.dtype != np.uint8 or weights.shape != masks.shape[1:]:
        raise ValueError(f"masks {masks.dtype} {masks.shape}, weights {weights.shape}: must be uint8 [n, P] and [P]")
    if masks.size and not 0 < int(masks.min()) <= int(masks.max()) < 16:
        raise ValueError(f"masks from {masks.min()} to {masks.max()}: must be from 1 to 15, 15 for a gap")
    missing = -masks.shape[1] % LANES or (0 if masks.shape[1] else LANES)
    padded = np.pad(masks, ((0, 0), (0, missing)), constant_values=15)
    bits = padded[:, None] >> np.arange(4, dtype=np.uint8)[:, None] & 1
    common = np.bitwise_and.reduce(padded, axis=0)
    return Tips(bits.astype(np.float32), np.pad(weights.astype(np.float64), (0, missing)), common)


def partition_tips(
    masks: NDArray[np.uint8], weights: NDArray[np.float64], partition: NDArray[np.int64]
) -> tuple[Tips, ...]:
    """`tips` of each partition, 0 on: partition `[P]` says which one a pattern belongs to."""
    parts = [partition == part for part in range(int(partition.max(initial=-1)) + 1)]
    return tuple(tips(masks[:, part], weights[part]) for part in parts)


def log_likelihoods(
    tips: Tips, process: Process, merges: NDArray[np.int32], lengths: NDArray[np.float64]
) -> NDArray[np.float64]:
    """log p(patterns | tree, lengths) of whole trees `[T, n-1, 2]` with lengths `[T, n-1, 2]`: float64 `[T]`.

    Trees are unrooted: the lengths of the last merge's two edges count as their sum. A data set in partitions has the
    sum of each one's. Takes 64 bytes of memory an edge and rate category; 8 an edge for JC69 without categories.
    """
    count, steps, _ = merges.shape
    edges = edge_factors(process, lengths.reshape(count, -1))
    edges = edges.reshape(count, steps, 2, *edges.shape[2:])
    merges = np.ascontiguousarray(merges, dtype=np.int32)
    kernel = pruning.closed_form_trees if process.closed_form else pruning.trees
    return kernel(tips.partials, tips.weights, tips.common, merges, edges, process.frequencies, process.invariant)


def join(
    tips: Tips,
    process: Process,
    tables: NDArray[np.float32],
    left: NDArray[np.int32],
    right: NDArray[np.int32],
    lengths: NDArray[np.float64],
    step: int,
    site_logs: NDArray[np.float64] | None = None,
) -> NDArray[np.float64]:
    """Join nodes `left[t]` and `right[t]` of every trajectory, by edges of `lengths` `[T, 2]`, into node n + step.

    tables: float32 `[T, n-1, C, 4, P]`, contiguous; row `step` is written, normalised at every pattern: the mean over
    categories of the sum over states of frequency times partial likelihood is 1. Returns the weighted sum over
    patterns of the logarithm of what was taken out, float64 `[T]`: these sum to a finished tree's log-likelihood (the
    last merge has one edge, of which the other's length is 0). site_logs: float64 `[T, P]` to which each pattern's
    logarithm is added: `invariant_correction` needs them, nothing else.
    """
    left, right = np.ascontiguousarray(left, dtype=np.int32), np.ascontiguousarray(right, dtype=np.int32)
    edges = edge_factors(process, lengths)
    logs = np.zeros((0, 0)) if site_logs is None else site_logs
    kernel = pruning.closed_form_join if process.closed_form else pruning.join
    return kernel(tips.partials, tables, left, right, edges, process.frequencies, step, tips.weights, logs)


def invariant_correction(tips: Tips, process: Process, site_logs: NDArray[np.float64]) -> NDArray[np.float64]:
    """What sites that never change add to the sum of a finished tree's `join`s, float64 `[T]`: log of (1 - p) L + p I
    over L, where L is a pattern's likelihood at the sites that change, exp(site_logs) `[T, P]`, and I the frequency of
    the states that all leaves share.
    """
    share = process.invariant[:, None]
    total = np.log1p(-share)[:, 0] * tips.weights.sum()
    possible = tips.common > 0
    states = (tips.common[possible, None] >> np.arange(4, dtype=np.uint8) & 1) @ process.frequencies.T  # [P', B]
    with np.errstate(divide="ignore"):
        ratio = np.log(share * states.T) - np.log1p(-share) - site_logs[:, possible]
    return total + np.logaddexp(0, ratio) @ tips.weights[possible]


def reference_log_likelihoods(
    masks: NDArray[np.uint8],
    weights: NDArray[np.float64],
    process: Process,
    matrices: NDArray[np.float64],
    merges: NDArray[np.int32],
) -> NDArray[np.float64]:
    """`log_likelihoods` in float64, a merge at a time: matrices `[T, n-1, 2, C, 4, 4]`."""
    leaves = (masks[:, None, None] >> np.arange(4, dtype=np.uint8)[:, None] & 1).astype(np.float64)  # [n, 1, 4, P]
    result = np.zeros(len(merges))
    for t, tree in enumerate(merges):
        b = t if len(process.frequencies) > 1 else 0
        nodes, log_scale = list(leaves), np.zeros(masks.shape[1])
        for k, (left, right) in enumerate(tree):
            node = (matrices[t, k, 0] @ nodes[left]) * (matrices[t, k, 1] @ nodes[right])
            scale = node.max((0, 1))
            log_scale += np.log(scale)
            nodes.append(node / scale)
        likelihood = np.exp(log_scale) * (process.frequencies[b] @ nodes[-1]).mean(0)
        common = np.bitwise_and.reduce(masks, axis=0)[:, None] >> np.arange(4) & 1
        share = process.invariant[b]
        result[t] = weights @ np.log((1 - share) * likelihood + share * (common @ process.frequencies[b]))
    return result
