"""The report's pictures of trees, as SVG: the consensus, the most probable topologies, and where sampled trees lie.

Biopython lays trees out and draws them with matplotlib (extra `phylogeny`).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.colors import LinearSegmentedColormap
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, MaxNLocator
from matplotlib.transforms import ScaledTranslation
from numpy.typing import ArrayLike, NDArray

from headwater.phylogeny.summaries import Consensus, TopologyTable, consensus, robinson_foulds, topologies
from headwater.phylogeny.trees import Floats, Trees
from headwater.report.figures import MEDIUM, PALETTE, SERIES, custom_figure

_CERTAIN = 0.995
"""Support from here on is a dot, below it a number: most edges of most trees are certain."""
_NAME_SIZE = 7.0
_CHARACTER = 0.6 * _NAME_SIZE / 72
"""Inches; the mean width of a character."""
_COLUMNS = 3
_MOST_MAPPED = 1000
_MOST_AS_SHAPES = 500
_LONGEST_NAME = 30
_COLOURS = LinearSegmentedColormap.from_list("scores", ["#cde5df", "#3b93ad", "#0a6c8e", "#142848"])


def consensus_figure(tree: Consensus, *, title: str = "Consensus tree") -> str:
    """A consensus tree with support in per cent on its edges, a dot where it is certain, and a scale bar."""
    count = len(tree.taxa)
    drawn = _biopython_tree(tree)
    drawn.ladderize()
    width, height = 7.6, 0.17 * count + 0.7

    def draw(figure: Figure) -> None:
        axes = figure.subplots()
        places = _draw(axes, drawn, width)
        _mark_support(axes, places)
        _scale_bar(axes, count, drawn, tree.lengths is not None)

    return custom_figure(draw, title=title, size=(width, height))


def topologies_figure(table: TopologyTable, *, most: int = 9, title: str = "Most probable topologies") -> str:
    """The most probable topologies side by side with their probability; edges that the first has not are orange.

    A subtree that is the same in all of them is drawn as one leaf, named for its first taxon and the number of others.
    """
    count = min(most, len(table.trees))
    trees = [consensus(table.trees[k : k + 1]) for k in range(count)]
    clusters = [_clusters(tree) for tree in trees]
    common = frozenset.intersection(*map(frozenset, clusters))
    whole = [side for side in common if all(inner in common for inner in clusters[0] if inner <= side)]
    folded = [side for side in whole if not any(side < other for other in whole)] if count > 1 else []
    leaves = len(table.trees.taxa) - sum(len(side) - 1 for side in folded)
    rows = -(-count // _COLUMNS)
    width, height = 10.4, max(0.16 * leaves + 0.5, 1.1)

    def draw(figure: Figure) -> None:
        for k, axes in enumerate(np.atleast_1d(figure.subplots(rows, _COLUMNS)).reshape(-1)):
            if k >= count:
                axes.set_axis_off()
                continue
            plain = Consensus(trees[k].taxa, trees[k].children, trees[k].support)
            drawn = _biopython_tree(plain, folded, set(clusters[0]))
            _draw(axes, drawn, width / _COLUMNS)
            axes.set_title(f"{100 * table.probabilities[k]:.3g}%", loc="left", fontweight="bold")

    return custom_figure(draw, title=title, size=(width, height * rows))


def tree_space_figure(
    trees: Trees, values: ArrayLike, *, value_label: str, weights: ArrayLike | None = None, title: str = "Tree space"
) -> str:
    """A map of the sampled topologies (Hillis, Heath & St. John 2005, Systematic Biology 54): the nearer, the smaller
    the Robinson-Foulds distance, by classical multidimensional scaling weighted by probability.

    values: `[T]`, log-posterior or score of each tree; the colour of a topology is the mean. Its area is its share of
    the sample. Of more than 1000 topologies the most probable are drawn.
    """
    table = topologies(Trees(trees.taxa, trees.merges), weights)
    share = table.probabilities[:_MOST_MAPPED]
    w = np.ones(len(trees)) if weights is None else np.asarray(weights, dtype=np.float64)
    sums = np.bincount(table.index, w * np.asarray(values, dtype=np.float64), len(table.trees))
    mean = (sums / np.maximum(np.bincount(table.index, w, len(table.trees)), 1e-300))[:_MOST_MAPPED]
    places = _scaled(robinson_foulds(table.trees[:_MOST_MAPPED]).astype(np.float64), share)

    def draw(figure: Figure) -> None:
        axes = figure.subplots()
        order = np.argsort(-share)  # the small ones on top
        points = axes.scatter(
            places[order, 0],
            places[order, 1],
            s=np.maximum(700 * share[order], 6),
            c=mean[order],
            cmap=_COLOURS,
            alpha=0.85,
            linewidths=0,
            rasterized=len(order) > _MOST_AS_SHAPES,
        )
        axes.set_aspect("equal", adjustable="datalim")
        axes.grid(False)
        axes.margins(0.12)
        axes.set_xticks([])
        axes.set_yticks([])
        axes.set_xlabel("First axis")
        axes.set_ylabel("Second axis")
        bar = figure.colorbar(points, ax=axes, shrink=0.8, aspect=24, pad=0.03, label=value_label)
        bar.outline.set_visible(False)
        bar.locator = MaxNLocator(5)
        bar.update_ticks()

    return custom_figure(draw, title=title, size=MEDIUM)


def histogram_figure(
    values: Mapping[str, ArrayLike],
    *,
    x_label: str,
    title: str,
    weights: Mapping[str, ArrayLike] | None = None,
    size: tuple[float, float] = MEDIUM,
) -> str:
    """Histograms of scores by label, each as a share of its own weight: a bar a score where scores are whole numbers.

    weights: of some or all of the samples, by label.
    """
    samples = {label: np.asarray(numbers, dtype=np.float64).reshape(-1) for label, numbers in values.items()}
    edges = _bins(np.concatenate([*samples.values(), np.empty(0)]))

    def draw(figure: Figure) -> None:
        axes = figure.subplots()
        for (label, numbers), colour in zip(samples.items(), SERIES, strict=False):
            w = np.asarray((weights or {}).get(label, np.ones(len(numbers))), dtype=np.float64)
            share = np.histogram(numbers, edges, weights=w)[0] / max(w[np.isfinite(numbers)].sum(), 1e-300)
            axes.stairs(share, edges, fill=True, color=colour, alpha=0.22, linewidth=0)
            axes.stairs(share, edges, color=colour, linewidth=1.2, label=label)
        axes.set_xlabel(x_label)
        axes.set_ylim(bottom=0)
        axes.yaxis.set_major_locator(MaxNLocator(5))
        axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{100 * value:.3g}%"))
        axes.xaxis.set_major_locator(MaxNLocator(6, integer=bool(np.all(np.mod(edges, 1) == 0.5))))
        if len(samples) > 1:
            axes.legend(loc="lower right", bbox_to_anchor=(1.0, 1.01), ncols=len(samples))

    return custom_figure(draw, title=title, size=size)


def split_scatter(
    frequencies: Floats, *, ours: str = "Headwater", reference: str = "MrBayes", title: str = "Split frequencies"
) -> str:
    """Each split's frequency in two samples, `[S, 2]` as in `Comparison.splits`: ours upwards, the reference's to the
    right, on the line where they agree.
    """

    def draw(figure: Figure) -> None:
        axes = figure.subplots()
        axes.grid(True, axis="both")
        axes.plot([0, 1], [0, 1], color=PALETTE["clay"], linewidth=1.0)
        axes.scatter(
            frequencies[:, 1], frequencies[:, 0], s=14, color=PALETTE["water"], alpha=0.6, linewidths=0, clip_on=False
        )
        axes.set_xlim(0, 1)
        axes.set_ylim(0, 1)
        axes.set_aspect("equal")
        axes.set_xlabel(f"Frequency, {reference}")
        axes.set_ylabel(f"Frequency, {ours}")

    return custom_figure(draw, title=title, size=(5.2, 4.4))


def _clusters(tree: Consensus) -> list[frozenset[int]]:
    """The leaves below each inner node but the top."""
    count = len(tree.taxa)
    below: dict[int, frozenset[int]] = {}
    # A child stands after its parent, so the last come first.
    for i in range(len(tree.children) - 1, -1, -1):
        below[i] = frozenset().union(*(below[v - count] if v >= count else {v} for v in tree.children[i]))
    return [below[i] for i in range(1, len(tree.children))]


def _biopython_tree(
    tree: Consensus, folded: Sequence[frozenset[int]] = (), known: set[frozenset[int]] | None = None
) -> Any:
    """The tree as Biopython's: `folded` subtrees as leaves, and inner edges that are not `known` in another colour."""
    try:
        from Bio.Phylo.BaseTree import Clade, Tree
    except ImportError as error:
        raise ImportError(
            "trees are drawn with Biopython; install it with pip install 'headwater[phylogeny]'"
        ) from error
    count = len(tree.taxa)
    clusters = [frozenset(range(count)), *_clusters(tree)]

    def made(node: int) -> Any:
        length = 1.0 if tree.lengths is None else float(tree.lengths[node])
        if node < count:
            return Clade(branch_length=length, name=_short(tree.taxa[node]))
        side = clusters[node - count]
        if side in folded:
            return Clade(branch_length=length, name=f"{_short(tree.taxa[min(side)])} +{len(side) - 1}")
        clade = Clade(branch_length=length, clades=[made(child) for child in tree.children[node - count]])
        clade.confidence = float(tree.support[node - count]) if node > count else None
        if known is not None and node > count and side not in known:
            clade.color = PALETTE["clay"]
            clade.width = 1.8
            for child in clade.clades:
                child.color, child.width = child.color or PALETTE["ink"], child.width or 1.0
        return clade

    root = made(count)
    root.branch_length = 0.0
    root.color = PALETTE["ink"]
    return Tree(root=root, rooted=False)


def _short(name: str) -> str:
    return name if len(name) <= _LONGEST_NAME else f"{name[: _LONGEST_NAME - 1]}…"


def _draw(axes: Axes, tree: Any, width: float) -> list[tuple[float, float, float, float | None]]:
    """Draw a tree into axes `width` inches wide: (x, y, edge length, support) of each inner node below the top."""
    from Bio import Phylo

    Phylo.draw(tree, axes=axes, do_show=False, show_confidence=False, label_func=lambda clade: clade.name or "")
    apart = ScaledTranslation(2.5 / 72, 0, axes.figure.dpi_scale_trans)
    for text in axes.texts:
        text.set(text=text.get_text().strip(), size=_NAME_SIZE, color=PALETTE["ink"])
        text.set_transform(text.get_transform() + apart)
    axes.set_axis_off()
    leaves, depths = tree.get_terminals(), tree.depths()
    inches = width - 0.3
    reach = max(depths[leaf] / (1 - min((len(leaf.name) + 2) * _CHARACTER / inches, 0.8)) for leaf in leaves)
    axes.set_xlim(-0.01 * reach, reach)
    axes.set_ylim(len(leaves) + 0.6, 0.4)
    heights = {leaf: float(i) for i, leaf in enumerate(leaves, start=1)}
    found = []
    for clade in tree.get_nonterminals(order="postorder"):
        heights[clade] = (heights[clade.clades[0]] + heights[clade.clades[-1]]) / 2
        if clade is not tree.root:
            found.append((depths[clade], heights[clade], clade.branch_length, clade.confidence))
    return found


def _mark_support(axes: Axes, places: Sequence[tuple[float, float, float, float | None]]) -> None:
    for x, y, _, support in places:
        if support is None:
            continue
        if support >= _CERTAIN:
            axes.plot([x], [y], marker="o", markersize=2.6, color=PALETTE["water"], zorder=3)
        else:
            axes.annotate(
                f"{100 * support:.0f}",
                (x, y),
                xytext=(-1.5, 1.2),
                textcoords="offset points",
                ha="right",
                fontsize=6,
                color=PALETTE["water"],
            )


def _scale_bar(axes: Axes, count: int, tree: Any, with_lengths: bool) -> None:
    y = count + 1.6
    axes.set_ylim(y + 0.8, 0.4)
    low, high = axes.get_xlim()
    start = 0.0
    note = "dots: support of 99.5% or more"
    if with_lengths and high > 0:
        size = 10 ** np.floor(np.log10(high / 5))
        size *= max(step for step in (1, 2, 5) if step * size <= high / 5)
        axes.plot([0, size], [y, y], color=PALETTE["muted"], linewidth=1.4, solid_capstyle="butt")
        note = f"{size:g} substitutions per site   ·   {note}"
        start = size + 0.01 * (high - low)
    axes.text(start, y, note, fontsize=6.5, color=PALETTE["muted"], va="center")


def _bins(values: Floats) -> NDArray[np.float64]:
    finite = values[np.isfinite(values)]
    if not len(finite):
        return np.array([0.0, 1.0])
    low, high = float(finite.min()), float(finite.max())
    if (np.mod(finite, 1) == 0).all():
        step = max(1, int(np.ceil((high - low + 1) / 60)))
        return np.arange(low - 0.5, high + step + 0.5, step)
    return np.linspace(low, high, int(np.clip(1.5 * np.sqrt(len(finite)), 12, 60)) + 1)


def _scaled(distances: Floats, weights: Floats) -> Floats:
    """Classical multidimensional scaling of distances `[K, K]` into two dimensions, points counting by weight."""
    w = weights / weights.sum()
    squared = distances**2
    row = squared @ w
    inner = -(squared - row[:, None] - row[None, :] + w @ row) / 2
    root = np.sqrt(np.maximum(w, 1e-12))
    values, vectors = np.linalg.eigh(inner * root[:, None] * root[None, :])
    places = vectors[:, ::-1][:, :2] * np.sqrt(np.maximum(values[::-1][:2], 0)) / root[:, None]
    if places.shape[1] < 2:
        places = np.pad(places, ((0, 0), (0, 2 - places.shape[1])))
    # The sign of an axis is arbitrary: the most probable tree lies to the left and below.
    return places * np.where(places[:1] > 0, -1.0, 1.0)
