"""How different designs are, by edit distance: two designs that are one shifted against the other bind the same site,
and an edit distance of 2 says so where the Hamming distance calls them strangers.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numba import njit
from numpy.typing import ArrayLike, NDArray


def edit_distances(sequence: str, others: Sequence[str]) -> NDArray[np.int64]:
    """Fewest insertions, deletions and substitutions from `sequence` to each of `others` (Levenshtein): `[N]`."""
    first = _codes(sequence)
    return np.array([_edit_distance(first, _codes(other)) for other in others], dtype=np.int64)


def distinct(sequences: Sequence[str], log_reward: ArrayLike, count: int, min_distance: int) -> list[int]:
    """Indices of at most `count` designs, best first, each at least `min_distance` edits from every better one chosen.

    Greedy: the best design, then the best of those far enough from it, and so on. log_reward: `[N]`; designs whose
    reward is NaN or -inf are never chosen. Raises ValueError if the lengths differ, or if count or min_distance is
    below 1.
    """
    scores = np.asarray(log_reward, dtype=np.float64)
    if scores.shape != (len(sequences),):
        raise ValueError(f"log_reward has shape {scores.shape}, expected ({len(sequences)},)")
    if count < 1 or min_distance < 1:
        raise ValueError(f"count = {count}, min_distance = {min_distance}: both must be at least 1")
    order = [int(index) for index in np.argsort(-scores, kind="stable") if scores[index] > -np.inf]
    chosen: list[int] = []
    for index in order:
        if len(chosen) == count:
            break
        if not chosen or edit_distances(sequences[index], [sequences[i] for i in chosen]).min() >= min_distance:
            chosen.append(index)
    return chosen


def mean_pairwise_distance(sequences: Sequence[str]) -> float:
    """Mean edit distance over all pairs, the diversity of Jain et al. 2022 (arXiv 2203.04115). Raises ValueError for
    fewer than 2.
    """
    if len(sequences) < 2:
        raise ValueError(f"{len(sequences)} sequences have no pairwise distance; give at least 2")
    lengths = np.array([len(sequence) for sequence in sequences], dtype=np.int64)
    return float(_mean_distance(_codes("".join(sequences)), lengths.cumsum() - lengths, lengths))


def _codes(sequence: str) -> NDArray[np.uint32]:
    return np.frombuffer(sequence.encode("utf-32-le"), dtype=np.uint32)


@njit(nogil=True)
def _edit_distance(a, b):  # type: ignore[no-untyped-def]
    row = np.arange(b.size + 1)
    for i in range(a.size):
        diagonal, row[0] = row[0], i + 1
        for j in range(b.size):
            substituted = diagonal + (a[i] != b[j])
            diagonal = row[j + 1]
            row[j + 1] = min(substituted, diagonal + 1, row[j] + 1)
    return row[b.size]


@njit(nogil=True)
def _mean_distance(codes, starts, lengths):  # type: ignore[no-untyped-def]
    total = 0
    for i in range(lengths.size):
        a = codes[starts[i] : starts[i] + lengths[i]]
        for j in range(i):
            total += _edit_distance(a, codes[starts[j] : starts[j] + lengths[j]])
    return total / (lengths.size * (lengths.size - 1) / 2)
