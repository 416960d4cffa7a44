"""Benchmarks that look at trained runs: near-optimal trees drawn of those that there are; marginal likelihoods."""

from __future__ import annotations

import argparse
import json
import math
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

from headwater import jobs
from headwater.phylogeny.recipe import PhylogenyRecipe
from phylogeny_recipe_helpers import evolved, fasta, train
from test_phylogeny_moves import all_trees

sys.path.insert(0, str(Path(__file__).parents[1] / "benchmarks"))

import phylogeny_evidence
import phylogeny_parsimony
import phylogeny_parsimony_report

SHORT = ("--training.iterations", 8, "--training.batch-size", 8, "--chains.warm_up", 20)
SIX = ((("a", "b"), "c"), (("d", "e"), "f"))


@pytest.fixture(autouse=True)
def only_training(monkeypatch: pytest.MonkeyPatch) -> None:
    """What the command does after it has trained, other tests look at."""
    for name in ("sample", "evaluate", "report"):
        monkeypatch.setattr(jobs, name, lambda *_: None)


def options(**values: int) -> argparse.Namespace:
    return argparse.Namespace(**{"most": 1000, "samples": 400, "seed": 1} | values)


def test_a_run_is_held_against_all_near_optimal_trees_there_are(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = fasta(tmp_path / "six.fasta", evolved(SIX, 60, 0.05, seed=3))
    run = train(tmp_path / "run", "--alignment", path, "--parsimony", "--gaps", "state", *SHORT)
    monkeypatch.setattr(phylogeny_parsimony, "found", lambda *_: None)  # as where PHYLIP is not installed
    row = phylogeny_parsimony.measured(run.folder, options())

    reward = PhylogenyRecipe(alignment=path, parsimony=True, gaps="state").base_reward
    lengths = reward.changes(all_trees(6)).numpy()  # type: ignore[union-attr]
    within = [int((lengths <= lengths.min() + more).sum()) for more in range(5)]
    assert row["exist"]["within"] == within  # type: ignore[index]
    exact = np.logaddexp.reduce((reward.constant - lengths) / 0.25)  # type: ignore[union-attr]
    assert row["exact_log_z"] == pytest.approx(exact, abs=1e-3)
    sampler, cold = row["sampler"], row["temperatures"]["0.25"]  # type: ignore[index]
    assert sampler["unknown"] == 0
    assert all(0 < drawn <= all_there for drawn, all_there in zip(sampler["within"], within, strict=True))
    assert all(drawn <= all_there for drawn, all_there in zip(row["chains"]["within"], within, strict=True))  # type: ignore[index]
    assert cold["log_z"] == pytest.approx(exact, abs=4 * cold["interval"] + 0.1)
    apart = cold["total_variation"]
    assert 0 < apart["floor"] < apart["drawn"] < 1  # hardly trained
    assert apart["weighted"] < apart["drawn"]  # and the weights know it

    results = tmp_path / "parsimony.json"
    results.write_text(json.dumps({"six": row}))
    page = phylogeny_parsimony_report.write_report(results).read_text()
    assert "| six | 6 |" in page
    assert " / ".join(map(str, within)) in page


def test_total_variation_of_perfect_draws_is_at_its_floor(tmp_path: Path) -> None:
    path = fasta(tmp_path / "six.fasta", evolved(SIX, 12, 0.05, seed=3))
    recipe = PhylogenyRecipe(alignment=path, parsimony=True, constant=0.0)
    near, row = phylogeny_parsimony.all_near(recipe, most=1000)
    probability = torch.tensor(np.exp(-near.changes / 4.0 - near.log_z(4.0)))
    assert float(probability.sum()) == pytest.approx(1)
    count = 4000
    drawn = torch.multinomial(probability, count, True, generator=torch.Generator().manual_seed(0))
    apart = phylogeny_parsimony.distance(near, near.trees.tables[drawn], torch.ones(count).double(), 4.0)
    assert apart["drawn"] == apart["weighted"] == pytest.approx(apart["floor"], rel=0.3)
    weights = probability[torch.arange(len(probability))]  # each tree once, weighted with what it is worth
    assert phylogeny_parsimony.distance(near, near.trees.tables, weights, 4.0)["weighted"] == pytest.approx(0, abs=1e-9)
    assert row["beyond"] == 8
    assert near.met(near.trees.tables[:3]) == {
        table.numpy().tobytes(): int(length) for table, length in zip(near.trees.tables[:3], near.changes, strict=False)
    }


def test_marginal_likelihoods_stand_beside_what_training_cost(tmp_path: Path) -> None:
    path = fasta(tmp_path / "five.fasta", evolved(((("a", "b"), "c"), ("d", "e")), 40, 0.1, seed=1))
    run = train(tmp_path / "five", "--alignment", path, *SHORT)
    row = phylogeny_evidence.measured(run.folder, samples=200, seed=1)
    assert row["iterations"] == 8
    assert row["training_cpu"] > 0
    assert math.isfinite(row["log_marginal_likelihood"])
    assert abs(row["log_marginal_likelihood"] - row["guess"]) < 5
    row["known"] = {"exact": (-100.0, 0.5)}
    page = phylogeny_evidence.page({"five": row})
    assert f"| {row['log_marginal_likelihood']:.2f} +- {row['interval']:.2f} |" in page
    assert "| -100.00 (0.5) |" in page
    with pytest.raises(SystemExit, match="not a run over trees by parsimony"):
        phylogeny_parsimony.measured(run.folder, options())
