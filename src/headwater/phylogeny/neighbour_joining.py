"""Neighbour joining (Saitou & Nei 1987, in the form of Studier & Keppler 1988) on distances of aligned sequences."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from headwater.native import kept_njit
from headwater.phylogeny.data import Patterns
from headwater.phylogeny.trees import Floats, Ints, Trees

SHORTEST = 1e-6
"""Expected substitutions per site; estimates below it, negative ones included, are lifted to it."""
_MOST_DIFFERENT = 0.74
"""Share of differing sites above which the JC69 distance, infinite at 3/4, is held."""


def hamming_distances(patterns: Patterns) -> Floats:
    """Share of differing sites between taxa, float64 `[n, n]`, over the sites where both are one nucleotide (or, with
    gaps as a state, a gap); 3/4, as of unrelated sequences, where there is none.
    """
    masks, weights = patterns.masks, patterns.weights
    known = np.isin(masks, (1, 2, 4, 8, 16))
    compared = (known * weights) @ known.T.astype(np.float64)
    same = np.zeros_like(compared)
    for state in (1, 2, 4, 8, 16):
        here = masks == state
        same += (here * weights) @ here.T.astype(np.float64)
    return np.where(compared > 0, 1 - same / np.maximum(compared, 1), 0.75)


def jukes_cantor_distances(patterns: Patterns) -> Floats:
    """Expected substitutions per site between taxa under JC69, float64 `[n, n]` (Jukes & Cantor 1969)."""
    return -0.75 * np.log1p(-4 / 3 * np.minimum(hamming_distances(patterns), _MOST_DIFFERENT))


def neighbour_joining(taxa: tuple[str, ...], distances: Floats) -> Trees:
    """The neighbour-joining tree of distances `[n, n]`, a batch of one, with lengths of at least `SHORTEST`.

    Raises ValueError unless the distances are a finite symmetric matrix of the taxa.
    """
    distances = np.ascontiguousarray(distances, dtype=np.float64)
    if (
        distances.shape != (len(taxa),) * 2
        or not np.isfinite(distances).all()
        or not np.allclose(distances, distances.T)
    ):
        raise ValueError(
            f"distances of shape {distances.shape}: must be finite, symmetric and {len(taxa)} x {len(taxa)}"
        )
    merges, lengths = _join(distances)
    lengths = np.maximum(lengths, SHORTEST)
    lengths[-1, 1] = 0
    return Trees(tuple(taxa), merges[None], lengths[None])


@kept_njit()
def _join(distances: NDArray[np.float64]) -> tuple[Ints, Floats]:  # pragma: no cover - compiled
    n = len(distances)
    d = distances.copy()
    live = np.arange(n)  # rows of d in use
    node = np.arange(n)
    merges = np.zeros((n - 1, 2), dtype=np.int32)
    lengths = np.zeros((n - 1, 2))
    total = np.zeros(n)
    left = n
    for k in range(n - 2):
        for i in range(left):
            total[live[i]] = 0.0
            for j in range(left):
                total[live[i]] += d[live[i], live[j]]
        best, a, b = np.inf, 0, 1
        for i in range(left):
            for j in range(i + 1, left):
                q = (left - 2) * d[live[i], live[j]] - total[live[i]] - total[live[j]]
                if q < best - 1e-12:
                    best, a, b = q, i, j
        x, y = live[a], live[b]
        first = d[x, y] / 2 + (total[x] - total[y]) / (2 * (left - 2))
        merges[k, 0], merges[k, 1] = node[x], node[y]
        lengths[k, 0], lengths[k, 1] = first, d[x, y] - first
        for i in range(left):
            z = live[i]
            if z != x and z != y:
                d[x, z] = d[z, x] = (d[x, z] + d[y, z] - d[x, y]) / 2
        node[x] = n + k
        live[b] = live[left - 1]
        left -= 1
    x, y = live[0], live[1]
    merges[n - 2, 0], merges[n - 2, 1] = node[x], node[y]
    lengths[n - 2, 0] = d[x, y]
    return merges, lengths
