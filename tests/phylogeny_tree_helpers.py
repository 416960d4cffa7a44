"""What several tests of phylogeny need: trees at random, what an unrooted tree is, and where the real data lie."""

import os
from pathlib import Path

import numpy as np
import pytest

from headwater.phylogeny.trees import Trees

DATA = Path(os.environ.get("HEADWATER_PHYLO_DATA", Path(__file__).parents[2] / "shared" / "data" / "phylo"))
needs_data = pytest.mark.skipif(not DATA.is_dir(), reason=f"no phylogeny data in {DATA}; set HEADWATER_PHYLO_DATA")


def random_trees(taxa, count, seed=0):
    """Trees whose merges join two of the forest's trees drawn at random."""
    rng = np.random.default_rng(seed)
    n = len(taxa)
    merges = np.empty((count, n - 1, 2), dtype=np.int32)
    for tree in merges:
        forest = list(range(n))
        for k in range(n - 1):
            tree[k] = [forest.pop(rng.integers(len(forest))) for _ in range(2)]
            forest.append(n + k)
    lengths = rng.exponential(0.1, (count, n - 1, 2))
    lengths[:, -1, 1] = 0
    return Trees(tuple(taxa), merges, lengths)


def names(n):
    return tuple(f"taxon_{i}" for i in range(n))


def edges(trees, t):
    """Each edge's leaves on the side without leaf 0, with its length: what an unrooted tree is."""
    n = len(trees.taxa)
    below = [frozenset([i]) for i in range(n)] + [frozenset()] * (n - 1)
    found = {}
    for k in range(n - 1):
        for side in range(2):
            child = trees.merges[t, k, side]
            below[n + k] |= below[child]
            key = frozenset(range(n)) - below[child] if 0 in below[child] else below[child]
            found[key] = found.get(key, 0.0) + (0.0 if trees.lengths is None else float(trees.lengths[t, k, side]))
    return found


def peaked(n, count, seed=0):
    """A sample of few topologies that share most splits, each many times, with weights, as a posterior has them."""
    rng = np.random.default_rng(seed)
    base = random_trees(names(n), 1, seed).merges
    variants = [base[0]]
    for _ in range(11):  # two leaves of the tree before change places, or of the first
        number = np.arange(2 * n - 1, dtype=np.int32)
        pair = rng.choice(n, 2, replace=False)
        number[pair] = number[pair[::-1]]
        variants.append(number[variants[rng.integers(0, 2) * -1]])
    likely = np.arange(12, 0, -1.0) ** 2
    chosen = rng.choice(12, count, p=likely / likely.sum())
    lengths = rng.exponential(0.1, (count, n - 1, 2))
    lengths[:, -1, 1] = 0
    return Trees(names(n), np.stack(variants)[chosen], lengths), rng.exponential(size=count)
