"""From a sampler's draws to what phylogeneticists publish: weighted trees, marginal likelihood, support, tables."""

from __future__ import annotations

import csv
import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from headwater.phylogeny.summaries import consensus, split_frequencies, topologies
from headwater.phylogeny.trees import Trees
from headwater.phylogeny.walks import tables_of, walks_to
from headwater.runs import Samples, atomic

Floats = NDArray[np.float64]


@dataclass(frozen=True)
class WeightedTrees:
    """Independent draws with importance weights R(x) / p(x), which make them draws from the posterior itself.

    weights: float64 `[T]`, sum 1, the largest cut down to sqrt(T) times their mean (truncated importance sampling,
    Ionides 2008), so that no single draw decides. log_z: log of the mean of the weights uncut, an unbiased estimate of
    the normalising constant: the marginal likelihood. interval: half the width of its 95 % interval, in nats.
    effective: effective sample size, as a share of T.
    """

    trees: Trees
    weights: Floats
    log_z: float
    interval: float
    effective: float

    @staticmethod
    def of(trees: Trees, samples: Samples) -> WeightedTrees:
        """`samples` are the draws that `trees` were read from."""
        log_weight = samples.log_reward - samples.log_prob
        count, largest = len(log_weight), float(log_weight.max())
        weight = np.exp(log_weight - largest)
        mean = float(weight.mean())
        cut = np.minimum(weight, mean * math.sqrt(count))
        return WeightedTrees(
            trees,
            cut / cut.sum(),
            largest + math.log(mean),
            1.96 * float(weight.std()) / mean / math.sqrt(count),
            float(weight.sum() ** 2 / (weight**2).sum()) / count,
        )


def trees_of(tables: Tensor, above: Tensor | None, taxa: tuple[str, ...]) -> Trees:
    """The trees of tables and lengths, as `walks.tables_of` gives them."""
    no_choice = torch.zeros(len(tables), tables.shape[1] // 2, dtype=torch.float64)
    merges, lengths = walks_to(tables, above, no_choice)
    return Trees(taxa, merges.numpy(), None if above is None else lengths.double().numpy())


def tables_from(trees: Trees) -> tuple[Tensor, Tensor | None]:
    """The inverse: tables and, where the trees have lengths, those above their nodes."""
    lengths = None if trees.lengths is None else torch.from_numpy(trees.lengths).float()
    tables, above = tables_of(torch.from_numpy(np.ascontiguousarray(trees.merges)), lengths)
    return tables, None if lengths is None else above


def annotated(newick: Sequence[str], names: Sequence[str], values: Floats) -> list[str]:
    """Trees with named numbers `[T, names]` in a comment at the root of each: [&kappa=4.1,...], as in BEAST."""
    return [
        tree[:-1] + "[&" + ",".join(f"{name}={value:.7g}" for name, value in zip(names, row, strict=True)) + "];"
        for tree, row in zip(newick, values.tolist(), strict=True)
    ]


def numbers_at_root(trees: Sequence[str], names: Sequence[str]) -> Floats:
    """The numbers of these names in the comments at trees' roots: float64 `[T, names]`. Raises ValueError naming a tree
    that lacks one.
    """
    found = np.empty((len(trees), len(names)))
    for row, tree in enumerate(trees if names else []):
        comment = tree.rpartition("[&")[2].partition("]")[0]
        given = dict(pair.split("=", 1) for pair in comment.split(",") if "=" in pair)
        if missing := [name for name in names if name not in given]:
            raise ValueError(f"tree {row + 1}, {tree[:80]}: no {', '.join(missing)} in a comment at the root")
        found[row] = [float(given[name]) for name in names]
    return found


def write_summaries(folder: Path, found: WeightedTrees, score: Floats, score_name: str) -> list[Path]:
    """samples.trees (NEXUS, with weights), consensus.nwk (majority rule, with support), splits.tsv, topologies.trees
    and topologies.tsv (the most probable first), best_trees.tsv (the best score first). score: float64 `[T]`.
    """
    trees, weights = found.trees, found.weights
    names = ("samples.trees", "consensus.nwk", "splits.tsv", "topologies.trees", "topologies.tsv", "best_trees.tsv")
    paths = [folder / name for name in names]
    with atomic(paths[0]) as partial:
        trees.write_nexus(partial, weights)
    with atomic(paths[1]) as partial:
        partial.write_text(consensus(trees, weights).newick() + "\n", encoding="utf-8")
    splits = split_frequencies(trees, weights)
    lengths = np.full(len(splits.splits), math.nan) if splits.lengths is None else splits.lengths
    _table(
        paths[2],
        ["frequency", "mean_length", "taxa"],
        [
            [f"{splits.frequencies[i]:.6f}", f"{lengths[i]:.6g}", " ".join(splits.members(i))]
            for i in range(len(splits.splits))
        ],
    )
    table = topologies(trees, weights)
    with atomic(paths[3]) as partial:
        table.trees.write_nexus(partial, table.probabilities)
    newick = table.trees.newick()
    rows = zip(table.probabilities, table.cumulative, newick, strict=True)
    _table(paths[4], ["probability", "cumulative", "tree"], [[f"{p:.6g}", f"{c:.6f}", tree] for p, c, tree in rows])
    best = _best(table.index, score)
    text = trees[best].newick()
    _table(paths[5], [score_name, "tree"], [[f"{score[i]:.4f}", tree] for i, tree in zip(best, text, strict=True)])
    return paths


def _best(topology: NDArray[np.int64], score: Floats, most: int = 1000) -> NDArray[np.int64]:
    """The best tree of each topology, best first."""
    order = np.argsort(-score, kind="stable")
    _, first = np.unique(topology[order], return_index=True)
    return order[np.sort(first)][:most]


def _table(path: Path, header: list[str], rows: list[list[str]]) -> None:
    with atomic(path) as partial, partial.open("w", newline="", encoding="utf-8") as file:
        writer = csv.writer(file, delimiter="\t", lineterminator="\n")
        writer.writerow(header)
        writer.writerows(rows)
