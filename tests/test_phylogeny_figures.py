"""The pictures of trees: every taxon is named, support and differences stand where they belong."""

import re
import sys
import xml.etree.ElementTree as ElementTree

import numpy as np
import pytest

from headwater.phylogeny.figures import (
    _bins,
    _scaled,
    consensus_figure,
    histogram_figure,
    split_scatter,
    topologies_figure,
    tree_space_figure,
)
from headwater.phylogeny.summaries import consensus, topologies
from headwater.phylogeny.tree_files import parse_trees
from headwater.phylogeny.trees import Trees
from headwater.report.figures import PALETTE
from phylogeny_tree_helpers import names, peaked, random_trees

pytest.importorskip("Bio.Phylo")


def texts(svg):
    root = ElementTree.fromstring(svg)
    return [text for element in root.iter("{http://www.w3.org/2000/svg}text") if (text := "".join(element.itertext()))]


def strokes(svg, colour):
    """How many lines have a colour; matplotlib draws one path an edge."""
    return len(re.findall(rf"stroke: {colour}", svg))


@pytest.mark.parametrize("n", [4, 27, 64])
def test_the_consensus_names_every_taxon_and_shows_support_and_scale(n):
    trees, weights = peaked(n, 60)
    tree = consensus(trees, weights)
    svg = consensus_figure(tree)
    assert set(trees.taxa) <= set(texts(svg))
    shown = sorted(text for text in texts(svg) if re.fullmatch(r"\d\d", text))
    assert shown == sorted(f"{100 * value:.0f}" for value in tree.support[1:] if value < 0.995)
    assert any("substitutions per site" in text for text in texts(svg))
    assert svg == consensus_figure(tree)
    without = consensus(Trees(trees.taxa, trees.merges), weights)
    assert not any("substitutions" in text for text in texts(consensus_figure(without)))


def test_names_are_escaped_and_no_formula():
    taxa = ("a<b>&c", "$x^2$", 'O\'Brien "x"', "y" * 60)
    svg = consensus_figure(consensus(random_trees(taxa, 1)))
    assert {"a<b>&c", "$x^2$", 'O\'Brien "x"', "y" * 29 + "…"} <= set(texts(svg))


def test_the_topologies_show_their_share_and_only_what_differs_from_the_first():
    trees = parse_trees(
        "((((a,b),c),d),(e,f),(g,h));((((a,c),b),d),(e,f),(g,h));((((a,b),c),(e,f)),d,(g,h));", list("habcdefg")
    ).trees
    svg = topologies_figure(topologies(trees, [0.6, 0.3, 0.1]))
    assert [text for text in texts(svg) if text.endswith("%")] == ["60%", "30%", "10%"]
    # Common to all three: (e, f) below h; (a, b), c and d move, so they stay apart.
    assert texts(svg).count("e +1") == 3
    assert "f" not in texts(svg)
    assert all(texts(svg).count(name) == 3 for name in "habcdg")
    # Only the first: nothing of it is new, and nothing is folded away.
    alone = topologies_figure(topologies(trees[:1]))
    assert strokes(alone, PALETTE["clay"]) == 0
    assert set("habcdefg") <= set(texts(alone))
    two = topologies_figure(topologies(trees[:2], [2, 1]))
    assert strokes(two, PALETTE["clay"]) == 2  # one new edge, {a, c}: its line and the one across its children
    assert texts(topologies_figure(topologies(trees, [0.6, 0.3, 0.1]), most=2)).count("h") == 2


def test_without_biopython_the_error_names_the_extra(monkeypatch):
    tree = consensus(random_trees(names(5), 1))
    monkeypatch.setitem(sys.modules, "Bio.Phylo.BaseTree", None)
    with pytest.raises(ImportError, match=r"pip install 'headwater\[phylogeny\]'"):
        consensus_figure(tree)


def test_scaling_gives_back_the_distances_of_points_in_a_plane_whatever_their_weights():
    rng = np.random.default_rng(0)
    points = rng.normal(size=(30, 2))
    distances = np.linalg.norm(points[:, None] - points[None], axis=2)
    weights = rng.uniform(0.1, 1, 30)
    places = _scaled(distances, weights)
    assert np.allclose(weights @ places, 0)
    assert np.allclose(np.linalg.norm(places[:, None] - places[None], axis=2), distances)
    assert _scaled(np.zeros((1, 1)), np.ones(1)).tolist() == [[0, 0]]


def test_tree_space_draws_a_point_for_each_topology():
    trees, weights = peaked(12, 200)
    svg = tree_space_figure(trees, np.arange(200.0), value_label="Log posterior", weights=weights)
    assert "Log posterior" in texts(svg)
    assert svg.count("opacity: 0.85") == len(topologies(trees, weights).trees)
    tree_space_figure(trees[:1], [1.0], value_label="Score")


def test_whole_scores_have_a_bar_each_and_weights_count():
    assert _bins(np.array([3.0, 5, 4, 5])).tolist() == [2.5, 3.5, 4.5, 5.5]
    assert len(_bins(np.linspace(0, 1, 100))) == 16
    scores = {"ours": [1, 1, 2], "theirs": [1, 2, 2]}
    svg = histogram_figure(scores, x_label="Parsimony score", title="Scores")
    assert {"ours", "theirs", "Parsimony score"} <= set(texts(svg))
    weighted = histogram_figure({"ours": [1, 2]}, x_label="x", title="x", weights={"ours": [2, 1]})
    assert (
        weighted.split("<path")[1:] == histogram_figure({"ours": [1, 1, 2]}, x_label="x", title="x").split("<path")[1:]
    )


def test_the_scatter_of_splits_has_a_point_each_between_0_and_1():
    svg = split_scatter(np.array([[0.0, 0.1], [0.5, 0.4], [1.0, 1.0]]))
    assert {"Frequency, MrBayes", "Frequency, Headwater", "0.0", "1.0"} <= set(texts(svg))
