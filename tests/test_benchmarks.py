"""The benchmarks' driver, contenders' protocol and our own worker, without any peer."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

BENCHMARKS = Path(__file__).parents[1] / "benchmarks"
sys.path.insert(0, str(BENCHMARKS))

from contenders.protocol import Task  # noqa: E402
from contenders.weights import leaving_after, load_weights, saved, untrained, weights_of  # noqa: E402
from contest import OURS, Runtime, Timings, Worker, ratios  # noqa: E402
from headwater.environments.base import Tokens  # noqa: E402
from headwater.policies import EnvironmentPolicy, Network  # noqa: E402
from headwater.recipes.hypergrid import HypergridRecipe  # noqa: E402
from measurements import Bench, Exact, by_length  # noqa: E402
from speed_report import replace_parts, write_report  # noqa: E402

RUNTIME = Runtime(Path(sys.executable), "headwater_worker.py")
SMALL = Task(dimensions=2, side=6, learning_rate=0.0, log_z_learning_rate=0.0)


def test_a_worker_draws_at_the_length_it_is_given_keeps_it_at_rate_zero_and_is_compared(tmp_path: Path) -> None:
    bench = Bench({OURS: RUNTIME}, tmp_path, rounds=2, seconds=0.01, say=lambda text: None)
    short, long = by_length(bench, (2.0, 1e6), SMALL)
    assert short["contenders"][OURS]["mean_length"] < 2.5  # type: ignore[index]
    assert long["contenders"][OURS]["mean_length"] > 10.9  # type: ignore[index]  # of 11: exit is left to the corner
    assert long["contenders"][OURS]["memory"]["bytes"] > 2 * short["contenders"][OURS]["memory"]["bytes"]  # type: ignore[index]
    path = tmp_path / "results.json"
    facts = {"command": "", "date": "", "cpu": "", "cores": 1, "memory_bytes": 1, "system": "", "python": "",
             "versions": {}, "peers": {}, "commit": ""}  # fmt: skip
    path.write_text(json.dumps({"provenance": facts, "by_length": [[short, long]]}))
    write_report(path)
    assert "![" in (tmp_path / "speed.md").read_text()
    assert (tmp_path / "speed-length.svg").read_text().startswith("<svg")
    later = tmp_path / "later.json"
    source = facts | {"command": "a later command", "commit": "abc"}
    later.write_text(json.dumps({"provenance": source, "by_length": [[long, short]]}))
    replace_parts(path, later)
    write_report(path)
    assert json.loads(path.read_text())["by_length"] == [[long, short]]
    _, _, section = (tmp_path / "speed.md").read_text().partition("## Cost over")
    assert "    a later command\n" in section
    assert "ours at abc" in section


def test_a_worker_that_learns_comes_closer_to_the_exact_distribution(tmp_path: Path) -> None:
    task = Task(dimensions=2, side=6, iterations=200)
    exact = Exact(task, tmp_path)
    with Worker(RUNTIME, task, 1, tmp_path) as worker:
        before = exact.total_variation(worker)
        took = worker.ask(do="run", iterations=200)
        assert took["cpu"] > 0
        assert exact.total_variation(worker) < before / 2


def test_a_worker_that_dies_says_why(tmp_path: Path) -> None:
    with pytest.raises(RuntimeError, match="side = 1"):
        Worker(RUNTIME, Task(side=1), 1, tmp_path)


def test_weights_come_back_as_they_were_saved(tmp_path: Path) -> None:
    weights = untrained(2, 6)
    policy = HypergridRecipe(dimensions=2, side=6).problem().policy
    assert isinstance(policy, EnvironmentPolicy)
    with np.load(saved(weights, tmp_path / "weights.npz")) as file:
        load_weights(policy, dict(file))
    for name, array in weights_of(policy).items():
        np.testing.assert_array_equal(array, weights[name])
    load_weights(policy, leaving_after(2, 6, 4.0))
    here = torch.zeros(1, 2, dtype=torch.int32)
    assert policy.action_log_probs(here, torch.empty(1, 0)).exp()[0, -1].item() == pytest.approx(1 / 4)


def test_ratios_are_taken_round_by_round_theirs_over_ours() -> None:
    ours, theirs = Timings(1, [1.0, 10.0, 2.0], [1.0, 1.0, 1.0]), Timings(1, [2.0, 20.0, 6.0], [1.0, 2.0, 0.5])
    found = ratios({OURS: ours, "peer": theirs})
    assert found["peer"]["cpu"] == {"median": 2.0, "low": 2.0, "high": 3.0}
    assert found["peer"]["wall"] == {"median": 1.0, "low": 0.5, "high": 2.0}


def test_a_transformer_block_is_as_wide_as_it_is_told() -> None:
    tokens = Tokens(length=15, vocabulary=257)
    one, four = (Network("transformer", 64, 3, 8, feed_forward=width).build(tokens) for width in (1, 4))
    counts = [sum(parameter.numel() for parameter in torso.parameters()) for torso in (one, four)]
    assert counts[1] - counts[0] == 3 * 3 * 64 * (2 * 64 + 1)
    with pytest.raises(ValueError, match="feed_forward = 0"):
        Network("transformer", feed_forward=0)
