"""The recipe `phylogeny` against exact answers: all topologies counted through, all branch lengths integrated out."""

from __future__ import annotations

import math
from pathlib import Path

import numpy as np
import pytest

from headwater.phylogeny.recipe import PhylogenyRecipe
from headwater.phylogeny.tree_files import parse_trees
from headwater.settings import load_recipe
from phylogeny_recipe_helpers import BASES, evolved, fasta, train
from phylogeny_tree_helpers import DATA, needs_data


def unrooted(names):
    """Every binary tree, as nested pairs, rooted at the first name."""

    def grown(tree, name):
        yield (tree, name)
        if not isinstance(tree, str):
            yield from ((other, tree[1]) for other in grown(tree[0], name))
            yield from ((tree[0], other) for other in grown(tree[1], name))

    trees = [names[1]]
    for name in names[2:]:
        trees = [longer for tree in trees for longer in grown(tree, name)]
    return [(names[0], tree) for tree in trees]


def changes(tree, rows):
    """Fitch's length, sets of letters site by site; a gap is a fifth state."""
    total = 0

    def sets(node):
        nonlocal total
        if isinstance(node, str):
            return [{letter} for letter in rows[node]]
        joined = []
        for a, b in zip(*map(sets, node), strict=True):
            total += not a & b
            joined.append(a & b or a | b)
        return joined

    sets(tree)
    return total


PARSIMONY = (
    "--parsimony",
    "--gaps",
    "state",
    "--inverse-temperatures",
    0.25,
    0.25,
    "--training.evaluate-every",
    10_000,
)


def test_parsimony_at_temperature_4_is_the_distribution_over_all_105_trees_of_six_taxa(tmp_path: Path) -> None:
    rows = evolved(((("a", "b"), "c"), (("d", "e"), "f")), 60, 0.25, seed=3, gaps=0.05)
    scores = np.array([changes(tree, rows) for tree in unrooted(list(rows))])
    assert len(scores) == 105
    flags = ("--alignment", fasta(tmp_path / "six.fasta", rows), *PARSIMONY, "--constant", scores.min())
    run = train(tmp_path / "run", *flags, "--training.iterations", 700)
    found = run.evaluation()
    log_z = np.logaddexp.reduce((scores.min() - scores) / 4)
    assert found["log_z_exact"] == pytest.approx(log_z, abs=1e-5)
    assert found["total_variation"] < 0.08
    assert found["log_z_gap"] < 0.02
    assert found["samples_log_z"] == pytest.approx(log_z, abs=0.04)
    assert found["fewest_changes"] == scores.min()
    for more in range(5):
        there_are = (scores <= scores.min() + more).sum()
        assert found[f"distinct_trees_within_{more}"] <= found[f"trees_there_are_within_{more}"] == there_are
    assert found["trees_there_are_reached_beyond"] >= 0


@needs_data
@pytest.mark.parametrize(("taxa", "changes", "log_z"), [(6, 207, -50.22126), (7, 269, -64.70110)])
def test_butterflies_have_the_enumerated_normalising_constant(
    tmp_path: Path, taxa: int, changes: int, log_z: float
) -> None:
    """DS5 cut to evenly spaced taxa, against `exact/enumerate.py`."""
    from headwater.phylogeny.data import read_alignment

    whole = read_alignment(DATA / "DS5.nex")
    letters = {1: "A", 2: "C", 4: "G", 8: "T", 15: "N", 16: "-"}
    chosen = [round(i * (len(whole.taxa) - 1) / (taxa - 1)) for i in range(taxa)]
    rows = {whole.taxa[i]: "".join(letters[int(state)] for state in whole.states[i]) for i in chosen}
    recipe = PhylogenyRecipe(
        alignment=fasta(tmp_path / "cut.fasta", rows), parsimony=True, gaps="state", constant=changes,
        inverse_temperatures=(0.25, 0.25),
    )  # fmt: skip
    exact = recipe.exact_distribution()
    assert exact is not None
    assert len(exact.states) == math.prod(range(1, 2 * taxa - 4, 2))
    assert float(exact.log_reward.max()) == 0
    assert exact.log_z - changes / 4 == pytest.approx(log_z, abs=1e-4)


def by_quadrature(rows, nodes=14):
    """Topologies as frozen pairs with the first name, and the log marginal likelihood given each: JC69, lengths
    exponential of rate 10, by Gauss-Legendre in each of the five lengths' distribution functions.
    """
    x, w = np.polynomial.legendre.leggauss(nodes)
    u, w = (x + 1) / 2, w / 2
    decay = (1 - u) ** (4 / 30)  # exp(-4/3 b) at b = -log(1 - u) / 10
    same, other = 0.25 + 0.75 * decay, 0.25 - 0.25 * decay
    move = np.where(np.eye(4, dtype=bool), same[:, None, None], other[:, None, None])  # [node, 4, 4]
    weight = np.einsum("a,b,c,d,e->abcde", *[w] * 5)
    first, *others = rows
    found = {}
    for partner in others:
        pair, rest = (first, partner), [name for name in others if name != partner]
        log_likelihood = np.zeros((nodes,) * 5)
        for site in range(len(rows[first])):
            a, b, c, d = (move[:, :, BASES.index(rows[name][site])] for name in (*pair, *rest))  # [node, 4]
            left, right = np.einsum("ix,jx->ijx", a, b) / 4, np.einsum("ky,ly->kly", c, d)
            log_likelihood += np.log(np.einsum("ijx,mxy,kly->ijklm", left, move, right, optimize=True))
        found[frozenset(pair)] = float(np.log((weight * np.exp(log_likelihood - log_likelihood.max())).sum()))
        found[frozenset(pair)] += float(log_likelihood.max())
    return found


def pair_of_first(tree: str, names) -> frozenset[str]:
    """Who stands with the first name across the inner edge of a tree of four."""
    from headwater.phylogeny.summaries import split_frequencies

    members = set(split_frequencies(parse_trees(tree, tuple(names)).trees).members(0))
    return frozenset(set(names) - members)


def test_the_posterior_of_four_taxa_is_that_of_quadrature_over_all_branch_lengths(tmp_path: Path) -> None:
    rows = evolved((("a", "b"), ("c", "d")), 20, 0.2, seed=1)
    given = by_quadrature(rows)
    assert given == pytest.approx(by_quadrature(rows, nodes=12), abs=0.01)  # it has converged
    log_marginal = float(np.logaddexp.reduce(list(given.values()))) - math.log(3)
    posterior = {pair: math.exp(value - math.log(3) - log_marginal) for pair, value in given.items()}
    assert 0.02 < min(posterior.values()) < max(posterior.values()) < 0.98  # something to get wrong

    flags = ("--alignment", fasta(tmp_path / "four.fasta", rows), "--samples", 4000)
    run = train(tmp_path / "run", *flags, "--training.iterations", 250, "--training.evaluate-every", 1000)
    found, samples = run.evaluation(), run.samples()
    assert found["samples_log_marginal_likelihood"] == pytest.approx(log_marginal, abs=0.05)
    assert found["log_z_estimate"] == pytest.approx(log_marginal, abs=0.05)
    assert run.metrics()[-1]["log_z"] == pytest.approx(log_marginal, abs=0.1)
    recipe = load_recipe(run)
    assert isinstance(recipe, PhylogenyRecipe)
    weights = recipe.weighted(samples).weights
    drawn = dict.fromkeys(posterior, 0.0)
    for tree, weight in zip(samples.objects, weights, strict=True):
        drawn[pair_of_first(tree, rows)] += weight
    assert drawn == pytest.approx(posterior, abs=0.03)
