"""A language model trained to its exact target: a small version of benchmarks/language_exact.py."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from language_exact import Benchmark, Exact, build_policy, measure, page

SMALL = Benchmark(longest=3, beta=0.5, iterations=300, batch_size=64, lag=100)


@pytest.fixture(autouse=True)
def _one_thread() -> None:
    torch.set_num_threads(1)


def test_every_string_is_enumerated_once_and_the_start_is_far_from_the_target() -> None:
    policy = build_policy(0, SMALL.longest, learns_log_z=False)
    exact = Exact(policy, SMALL.beta)
    assert len(exact.all) == len(exact.all.identity.unique()) == 1 + 5 + 25 + 125
    start = exact.compare(policy)
    assert abs(start["mass"] - 1) < 1e-5
    assert abs(float(exact.log_target.exp().sum()) - 1) < 1e-5
    assert start["total_variation"] > 0.5
    assert start["log_z_error"] > 0.5


@pytest.mark.parametrize(
    ("objective", "behaviour"),
    [
        ("vargrad", "on policy"),
        ("vargrad", "old policy"),
        ("vargrad", "uniform"),
        ("tb", "on policy"),
        ("tb", "uniform"),
    ],
)
def test_balance_reaches_the_exact_distribution_whoever_wrote(objective: str, behaviour: str) -> None:
    # A learned log Z takes longest from uniform tokens, how long is up to the starting model.
    slow = objective == "tb" and behaviour == "uniform"
    found = measure(objective, behaviour, 0, replace(SMALL, iterations=800) if slow else SMALL)
    assert float(str(found["total_variation"])) < 0.05
    assert float(str(found["log_z_error"])) < 0.05


def test_reinforce_with_the_divergence_as_drawn_reaches_it_on_policy_only() -> None:
    assert float(str(measure("rloo", "on policy", 0, SMALL)["total_variation"])) < 0.05
    short = replace(SMALL, iterations=100)  # it is far away by then, and stays
    assert float(str(measure("rloo", "uniform", 0, short)["total_variation"])) > 0.4
    assert float(str(measure("reward only", "uniform", 0, short)["total_variation"])) > 0.4


def test_the_page_has_a_row_for_every_pair() -> None:
    run = {"objective": "tb", "behaviour": "uniform", "strings": 156, "total_variation_at_start": 0.6, "seed": 0,
           "total_variation": 0.02, "log_z_error": 0.01, "cpu_seconds": 2.0}  # fmt: skip
    source = {"command": "c", "cpu": "p", "cores": 1, "date": "d", "versions": {"torch": "t"}, "commit": "0123456789ab"}
    text = page({"provenance": source, "runs": [run, {**run, "total_variation": 0.04, "seed": 1}]})
    assert "| tb | uniform | 0.030 ± 0.127 | 0.040 | 0.010 ± 0.000 | 2 |" in text
