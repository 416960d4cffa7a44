"""Moves on trees leave the target that they are accepted for as it is; neighbour joining finds an additive tree; walks
and tables say the same tree; the environment keeps its contract.
"""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import Tensor

from headwater.environments.checker import check_environment
from headwater.environments.graph import enumerate_states
from headwater.phylogeny.environment import Forests
from headwater.phylogeny.moves import UNIFORMS, propose
from headwater.phylogeny.walks import merges_of, tables_of, walks_to
from helpers import seeded
from phylogeny_helpers import every_tree_trajectory, random_merges, states_on_the_way

RATE = 10.0


def all_trees(n: int) -> Tensor:
    graph = enumerate_states(Forests(n))
    return graph.states[graph.terminal]


def has_edge(tables: Tensor) -> Tensor:
    """Nodes `[T, 2n-1]` with an edge above them: not the root and the node beside leaf 0."""
    n = tables.shape[1] // 2 + 1
    mask = torch.ones(len(tables), 2 * n - 1, dtype=torch.bool)
    mask[:, n] = False
    mask[torch.arange(len(tables)), tables[:, 1].long()] = False
    return mask


def chi_square(tables: Tensor, trees: Tensor) -> float:
    """Of counts of trees against equal ones, over its degrees of freedom."""
    number = {tuple(row): i for i, row in enumerate(trees.tolist())}
    counts = torch.bincount(torch.tensor([number[tuple(row)] for row in tables.tolist()]), minlength=len(trees))
    expected = len(tables) / len(trees)
    return float(((counts - expected) ** 2 / expected).sum() / (len(trees) - 1))


def moved(tables: Tensor, above: Tensor, steps: int, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """By Metropolis-Hastings, for equally probable topologies and exponential lengths."""
    environment = Forests(tables.shape[1] // 2 + 1)
    for _ in range(steps):
        uniform = torch.rand(len(tables), UNIFORMS + 1, dtype=torch.float64, generator=generator)
        new_tables, new_above, ratio = propose(tables, above, uniform[:, 1:].contiguous())
        assert new_above is not None
        assert environment.states(new_tables) is new_tables
        assert torch.equal(new_above > 0, has_edge(new_tables))
        gain = -RATE * (new_above.double().sum(1) - above.double().sum(1)) + ratio
        accepted = (uniform[:, 0].log() < gain)[:, None]
        tables, above = torch.where(accepted, new_tables, tables), torch.where(accepted, new_above, above)
    return tables, above


@pytest.mark.parametrize("n", [4, 6])
def test_chains_of_moves_leave_uniform_topologies_and_exponential_lengths_as_they_are(n: int) -> None:
    trees, generator, count = all_trees(n), seeded(0), 12000
    tables = trees[torch.randint(len(trees), (count,), generator=generator)]
    above = torch.empty(count, 2 * n - 1).exponential_(RATE, generator=generator) * has_edge(tables)
    before = tables
    tables, above = moved(tables, above, 40, generator)
    assert (tables != before).any(1).float().mean() > 0.5
    assert chi_square(tables, trees) < 1 + 4 * (2 / (len(trees) - 1)) ** 0.5
    lengths = above[has_edge(tables)].sort().values
    expected = 1 - (-RATE * lengths).exp()
    uniform = (torch.arange(len(lengths)) + 0.5) / len(lengths)
    assert (expected - uniform).abs().max() < 1.63 / len(lengths) ** 0.5  # Kolmogorov's bound at 1 in 100
    # an edge's length says nothing of the topology: the edge above leaf 0 by the tree
    number = {tuple(row): i for i, row in enumerate(trees.tolist())}
    which = torch.tensor([number[tuple(row)] for row in tables.tolist()])
    mean = torch.zeros(len(trees)).index_add(0, which, above[:, 0]) / torch.bincount(which, minlength=len(trees))
    assert (mean - 1 / RATE).abs().max() < 5 / RATE / (count / len(trees)) ** 0.5


def test_moves_of_trees_without_lengths_reach_all_topologies_equally() -> None:
    trees = all_trees(6)
    tables = trees[:1].repeat(12000, 1)
    generator = seeded(1)
    for _ in range(40):
        uniform = torch.rand(len(tables), UNIFORMS, dtype=torch.float64, generator=generator)
        after, above, ratio = propose(tables, None, uniform)
        assert above is None
        assert ((ratio == 0) | (ratio == -torch.inf)).all()
        tables = torch.where((ratio == 0)[:, None], after, tables)
    assert chi_square(tables, trees) < 1 + 4 * (2 / (len(trees) - 1)) ** 0.5


def path_lengths(merges: Tensor, lengths: Tensor) -> np.ndarray:
    """Distances of leaves along one tree: float64 `[n, n]`."""
    n = len(merges) + 1
    below, away = [{leaf: 0.0} for leaf in range(n)], np.zeros((n, n))
    for (a, b), (x, y) in zip(merges.tolist(), lengths.double().tolist(), strict=True):
        left = {leaf: distance + x for leaf, distance in below[a].items()}
        right = {leaf: distance + y for leaf, distance in below[b].items()}
        for i, first in left.items():
            for j, second in right.items():
                away[i, j] = away[j, i] = first + second
        below.append(left | right)
    return away


def test_tables_do_not_depend_on_root_and_order_and_keep_path_lengths() -> None:
    n = 9
    merges = random_merges(30, n, seed=3)
    lengths = torch.rand(30, n - 1, 2, generator=seeded(4))
    lengths[:, -1, 1] = 0.0
    tables, above = tables_of(merges, lengths)
    assert Forests(n).states(tables) is tables
    walked, walked_lengths = walks_to(tables, above, torch.rand(30, n - 1, dtype=torch.float64, generator=seeded(5)))
    assert (walked != merges).any(2).any(1).all()
    again, again_above = tables_of(walked, walked_lengths)
    assert torch.equal(again, tables)
    torch.testing.assert_close(again_above, above)
    for old, new in zip(zip(merges, lengths, strict=True), zip(walked, walked_lengths, strict=True), strict=True):
        np.testing.assert_allclose(path_lengths(*new), path_lengths(*old), rtol=1e-5)


def test_merges_of_a_table_make_it_again() -> None:
    environment, merges = Forests(5), every_tree_trajectory(5)
    states, _ = states_on_the_way(environment, merges)
    assert torch.equal(states[:, -1], tables_of(merges)[0])
    for made in range(4):
        found, roots, smallest = merges_of(states[:, made], made)
        again = environment.initial(len(found))
        lowest = torch.arange(9).repeat(len(found), 1)
        for k in range(made):
            a, b = lowest.gather(1, found[:, k].long()).unbind(1)
            lowest[:, 5 + k] = a
            again = environment.step(again, a * (9 - a) // 2 + b - a - 1)
        assert torch.equal(again, states[:, made])
        assert torch.equal(lowest.gather(1, roots), smallest)
        assert (smallest.diff(dim=1) > 0).all()


@pytest.mark.parametrize("n", [3, 4, 5, 6])
def test_the_environment_keeps_its_contract_and_has_all_topologies(n: int) -> None:
    report = check_environment(Forests(n))
    assert report.ok, str(report)
    assert report.n_objects == [1, 3, 15, 105][n - 3]
    assert report.n_trajectories == [3, 18, 180, 2700][n - 3]


def test_what_is_no_tree_is_refused() -> None:
    trees = all_trees(5)
    assert Forests(5).states(trees) is trees
    for column, value in ((0, 1), (1, 0), (3, 9), (2, -1)):
        bad = trees.clone()
        bad[4, column] = value
        with pytest.raises(ValueError, match="object 4"):
            Forests(5).states(bad)
    with pytest.raises(ValueError, match="at least three"):
        Forests(2)
