"""Estimates of log Z from weights, against a pair of normals of which all is known.

Under q = N(m, 1) and a target exp(c) N(0, 1) the log-weight is c - m x + m^2 / 2 with x ~ q: its mean is c - m^2 / 2,
under the target c + m^2 / 2, and the effective sample size is N exp(-m^2).
"""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from headwater.diffusion.estimators import log_z_estimates, pareto_shape, resample, resampling_estimates

C, M = 3.0, 0.8


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def pieces(x: Tensor) -> tuple[Tensor, Tensor]:
    """log q - log p and log r at points x: the prior p is N(0, 1), and r = exp(c) throughout."""
    return -0.5 * (x - M).square() + 0.5 * x.square(), torch.full_like(x, C)


def test_bounds_enclose_log_z_where_they_should_and_the_estimate_meets_it() -> None:
    normal = torch.randn(2, 50_000, generator=generator())
    found = log_z_estimates(*pieces(normal[0] + M), target=pieces(normal[1]))
    assert abs(found.lower - (C - M**2 / 2)) < 4 * found.lower_error
    assert abs(found.upper - (C + M**2 / 2)) < 4 * found.upper_error
    assert abs(found.log_z - C) < 4 * found.log_z_error
    assert abs(found.lower_error - M / math.sqrt(50_000)) < 1e-4
    assert abs(found.log_z_error - math.sqrt(math.expm1(M**2) / 50_000)) < 1e-3
    assert abs(found.effective_sample_size / 50_000 - math.exp(-(M**2))) < 0.05
    assert found.pareto_k < 0.7
    assert found.figures()["log_z"] == found.log_z


def test_the_standard_error_is_that_of_repeated_estimates() -> None:
    runs = [log_z_estimates(*pieces(torch.randn(500, generator=generator(seed)) + M)) for seed in range(150)]
    spread = torch.tensor([run.log_z for run in runs]).std()
    said = torch.tensor([run.log_z_error for run in runs]).mean()
    assert 0.8 < float(spread / said) < 1.2


def test_a_balanced_sampler_has_all_three_at_log_z_without_error() -> None:
    ratio = torch.randn(100, generator=generator())
    found = log_z_estimates(ratio, ratio + 2.5, target=(ratio, ratio + 2.5))
    assert max(abs(value - 2.5) for value in (found.lower, found.log_z, found.upper)) < 1e-6
    assert abs(found.effective_sample_size - 100) < 1e-3
    assert found.log_z_error < 1e-6


def test_failed_rewards_are_left_out_and_zero_ones_count() -> None:
    ratio = torch.zeros(4)
    found = log_z_estimates(ratio, torch.tensor([0.0, math.nan, -math.inf, 0.0]))
    assert abs(found.log_z - math.log(2 / 3)) < 1e-12
    assert found.lower == -math.inf
    assert abs(found.effective_sample_size - 2) < 1e-9
    nowhere = resampling_estimates(torch.full((30,), -math.inf))
    assert nowhere.log_z == -math.inf
    assert math.isnan(nowhere.effective_sample_size)


@pytest.mark.parametrize("k", [0.2, 0.5, 1.0, 2.0])
def test_the_tails_shape_is_found(k: float) -> None:
    uniform = torch.rand(20_000, generator=generator(), dtype=torch.float64)
    assert abs(pareto_shape(-k * uniform.log()) - k) < 0.15


def test_weights_without_a_tail_have_no_shape_to_worry_about() -> None:
    assert pareto_shape(torch.rand(2000, generator=generator()).log()) < 0
    assert math.isnan(pareto_shape(torch.zeros(1000)))
    assert math.isnan(pareto_shape(torch.randn(10)))


def test_resampled_draws_of_the_prior_follow_the_posterior() -> None:
    x = torch.randn(100_000, generator=generator(), dtype=torch.float64)
    log_r = -0.5 * (x - 1).square() / 0.5  # posterior: N(2 / 3, 1 / 3)
    found = resampling_estimates(log_r)
    assert abs(found.log_z - (0.5 * math.log(1 / 3) - 1 / 3)) < 4 * found.log_z_error
    assert found.lower < found.log_z
    chosen = x[resample(log_r, 50_000, generator())]
    assert abs(float(chosen.mean()) - 2 / 3) < 0.01
    assert abs(float(chosen.var()) - 1 / 3) < 0.01


def test_resampling_is_even_and_leaves_out_what_failed() -> None:
    chosen = resample(torch.tensor([math.nan, 0.0, math.log(3), -math.inf]), 400, generator())
    counts = torch.bincount(chosen, minlength=4).tolist()
    assert counts[0] == counts[3] == 0
    assert abs(counts[1] - 100) <= 1
    assert not bool((chosen.sort().values == chosen).all())


@pytest.mark.parametrize(
    ("call", "said"),
    [
        (lambda: log_z_estimates(torch.zeros(3), torch.zeros(2)), r"log_ratio: shapes \(3,\) and \(2,\)"),
        (lambda: log_z_estimates(torch.tensor([0.0, math.inf]), torch.zeros(2)), "log_ratio: 1 of 2 are not finite"),
        (lambda: log_z_estimates(torch.zeros(2), torch.full((2,), math.nan)), "failed on all 2"),
        (lambda: log_z_estimates(torch.zeros(2), torch.zeros(2), (torch.zeros(2), torch.zeros(1))), "target: shapes"),
        (lambda: resample(torch.full((5,), -math.inf), 2, generator()), "on all 5 draws"),
    ],
)
def test_what_cannot_be_estimated_from_is_an_error_that_says_why(call: object, said: str) -> None:
    with pytest.raises(ValueError, match=said):
        call()  # type: ignore[operator]
