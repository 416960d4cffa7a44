"""A tree's neighbours are those that one pruning and regrafting makes, each with its length; a search through them
finds every tree near the optimum.
"""

from __future__ import annotations

import numpy as np
import pytest
import torch

from headwater.phylogeny.moves import UNIFORMS, propose
from headwater.phylogeny.near_optimal import near_optimal, neighbours
from headwater.phylogeny.reward import ParsimonyReward
from headwater.phylogeny.walks import tables_of
from helpers import seeded
from phylogeny_helpers import patterns, random_merges
from test_phylogeny_moves import all_trees

ANY = 10**6


def reward(n: int, planes: int = 4, sites: int = 80) -> ParsimonyReward:
    masks, weights = patterns(n, sites)
    if planes == 5:
        masks[np.random.default_rng(1).random(masks.shape) < 0.1] = 16
    return ParsimonyReward(masks, weights, planes)


def tree(n: int) -> torch.Tensor:
    return tables_of(random_merges(1, n))[0][0]


@pytest.mark.parametrize(("n", "planes"), [(4, 4), (5, 5), (7, 4), (12, 5), (23, 4)])
def test_a_tree_has_as_many_neighbours_as_allen_and_steel_say_each_with_its_length(n: int, planes: int) -> None:
    asked, table = reward(n, planes, sites=700), tree(n)
    tables, changes = neighbours(asked.sites.leaves, table.numpy(), ANY)
    assert len(tables) == len(np.unique(tables, axis=0)) == 2 * (n - 3) * (2 * n - 7)
    assert not (tables == table.numpy()).all(1).any()
    assert (changes + asked.sites.constant == asked.changes(torch.from_numpy(tables)).numpy()).all()
    own = int(asked.changes(table[None]))
    few, fewer = neighbours(asked.sites.leaves, table.numpy(), 5)
    assert {row.tobytes() for row in few} == {
        row.tobytes() for row in tables[changes + asked.sites.constant <= own + 5]
    }
    assert len(few) == len(fewer)


def test_the_moves_of_chains_lead_to_neighbours() -> None:
    table, asked = tree(9), reward(9)
    there = {row.tobytes() for row in neighbours(asked.sites.leaves, table.numpy(), ANY)[0]}
    uniform = torch.rand(2000, UNIFORMS, dtype=torch.float64, generator=seeded(0))
    proposed, _, _ = propose(table.expand(2000, -1).contiguous(), None, uniform)
    elsewhere = proposed[(proposed != table).any(1)]
    assert len(elsewhere) > 1000
    assert all(row.numpy().tobytes() in there for row in elsewhere)


@pytest.mark.parametrize("more", [0, 3, 12])
def test_a_search_finds_every_tree_near_the_optimum(more: int) -> None:
    asked, trees = reward(7, 5), all_trees(7)
    changes = asked.changes(trees)
    wanted = trees[changes <= changes.min() + more]
    found = near_optimal(asked.sites.leaves, trees[changes.argmax()][None], more, most=1000)
    assert found.beyond == 8
    assert {tuple(row) for row in found.tables.tolist()} == {tuple(row) for row in wanted.tolist()}
    assert torch.equal(found.changes + asked.sites.constant, asked.changes(found.tables))
    assert torch.equal(found.changes, found.changes.sort().values)


def test_a_search_goes_down_from_where_it_starts_and_says_how_far_it_went() -> None:
    asked, trees = reward(7), all_trees(7)
    changes = asked.changes(trees)
    start = trees[changes.argmax()][None]
    found = near_optimal(asked.sites.leaves, start, 2, most=1000)
    assert int(found.changes[0]) + asked.sites.constant == int(changes.min())
    assert near_optimal(asked.sites.leaves, start, 2, most=2).beyond == -1
    # a search that is cut short further out still has all that there are nearer
    best = trees[changes.argmin()][None]
    close = near_optimal(asked.sites.leaves, best, 2, most=12)
    assert close.beyond in (0, 2, 4)
    assert len(close.tables) == len(found.tables)
