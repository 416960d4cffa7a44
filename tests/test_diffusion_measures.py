"""Measures of samples against closed forms and brute force; calibration of samplers that are right and wrong."""

from __future__ import annotations

import itertools
import math

import pytest
import torch
from torch import Tensor

from headwater.diffusion.calibration import calibration, chi_squared_per_degree, coverage
from headwater.diffusion.measures import (
    beside_floor,
    class_shares,
    effective_number,
    mean_discrepancy,
    modes_found,
    random_directions,
    sliced_wasserstein,
    total_variation,
    wasserstein,
)


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def normal(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=generator(seed), dtype=torch.float64)


def test_the_exact_distance_is_that_of_the_best_permutation() -> None:
    for seed in range(20):
        first, second = normal(6, 2, seed=seed), normal(6, 2, seed=seed + 100)
        costs = [
            float((first[list(order)] - second).square().sum(1).mean()) for order in itertools.permutations(range(6))
        ]
        assert abs(wasserstein(first, second) - math.sqrt(min(costs))) < 1e-9


def test_on_a_line_the_exact_distance_is_that_of_the_sorted_points() -> None:
    first, second = normal(200, 1), 2 * normal(200, 1, seed=1) + 1
    ordered = (first.sort(0).values - second.sort(0).values).square().mean().sqrt()
    assert abs(wasserstein(first, second) - float(ordered)) < 1e-9
    assert abs(sliced_wasserstein(first, second, torch.ones(1, 1)) - float(ordered)) < 1e-9


def test_a_shift_is_found_whole_by_the_largest_direction_and_shared_by_all() -> None:
    points, shift = normal(300, 3, 1), torch.tensor([3.0, 0.0, 0.0]).double().view(3, 1)
    directions = torch.cat((random_directions(4000, 3, generator()), torch.eye(3).double()[:1]))
    assert abs(wasserstein(points, points + shift) - 3) < 1e-9
    assert abs(sliced_wasserstein(points, points + shift, directions) - 3 / math.sqrt(3)) < 0.05
    assert abs(sliced_wasserstein(points, points + shift, directions, largest=True) - 3) < 1e-9


def test_the_discrepancy_is_unbiased_and_that_of_two_normals_where_there_is_one_kernel() -> None:
    same = [mean_discrepancy(normal(100, 2, seed=seed), normal(100, 2, seed=seed + 500)) for seed in range(40)]
    mean, spread = torch.tensor(same).mean(), torch.tensor(same).std()
    assert abs(float(mean)) < 4 * float(spread) / math.sqrt(40)
    first, second = normal(1500, 1), normal(1500, 1, seed=1) + 2
    width = float((second - second.T).abs()[~torch.eye(1500, dtype=torch.bool)].median())
    # E k(x, x') of normals of variance 1 at distance m, kernel width s: s / sqrt(s^2 + 2) exp(-m^2 / (2 (s^2 + 2)))
    spread = width**2 + 2
    expected = 2 * width / math.sqrt(spread) * (1 - math.exp(-4 / (2 * spread)))
    assert abs(mean_discrepancy(first, second, (1.0,)) - expected) < 0.03


def test_a_measure_stands_beside_what_exact_draws_show() -> None:
    draws = generator()
    directions = random_directions(20, 2, draws)

    def measure(points: Tensor, others: Tensor) -> float:
        return sliced_wasserstein(points, others, directions)

    def exact(count: int) -> Tensor:
        return torch.randn(count, 2, generator=draws)

    right = beside_floor(measure, exact(400), exact, 8)
    assert abs(right.value - right.floor) < 4 * right.floor_deviation
    wrong = beside_floor(measure, 1.5 * exact(400), exact, 8)
    assert wrong.value > wrong.floor + 4 * wrong.floor_deviation


def test_shares_of_classes_modes_found_and_how_many_are_alike() -> None:
    share, label = torch.tensor([0.4, 0.1, 0.3, 0.2]).double(), torch.tensor([2, 0, 2, 1])
    torch.testing.assert_close(class_shares(share, label, 4), torch.tensor([0.1, 0.2, 0.7, 0.0]).double())
    assert abs(total_variation(share, torch.full((4,), 0.25)) - 0.2) < 1e-7
    assert abs(effective_number(torch.tensor([0.25, 0.25, 0.0, 0.5])) - 2**1.5) < 1e-6
    expected = torch.tensor([0.4, 0.6, 0.0])
    assert modes_found(torch.tensor([0.05, 0.95, 0.0]), expected) == 1
    assert modes_found(torch.tensor([0.1, 0.7, 0.2]), expected) == 2
    assert modes_found(torch.tensor([0.5, 0.495, 0.005]), torch.tensor([0.5, 0.495, 0.005])) == 2


def posterior_draws(count: int, size: int, width: float, shift: float = 0.0) -> tuple[Tensor, Tensor, Tensor]:
    """Truths x ~ N(0, 1) in two dimensions, y = x + noise, and draws around the posterior's mean y / 2 whose deviation
    is `width` times the right one. Returns truths, draws, and points between the posterior and the origin."""
    truth = normal(count, 2)
    y = truth + normal(count, 2, seed=1)
    draws = (y / 2 + shift)[:, None] + width * math.sqrt(0.5) * normal(count, size, 2, seed=2)
    return truth, draws, y / 2 + normal(count, 2, seed=3)


def test_coverage_of_a_right_sampler_is_the_level_and_of_a_narrow_one_is_less() -> None:
    truth, draws, reference = posterior_draws(1000, 99, 1.0)
    right = coverage(truth, draws, reference, generator())
    assert right.largest < 2 * right.largest_expected
    assert bool(((right.coverage - right.level).abs() <= 4 * right.deviation + 1e-12).all())
    for width, shift in ((0.5, 0.0), (2.0, 0.0), (1.0, 0.7)):
        truth, draws, reference = posterior_draws(1000, 99, width, shift)
        assert coverage(truth, draws, reference, generator()).largest > 2.5 * right.largest_expected


def test_a_sampler_that_ignores_the_measurement_is_seen_around_points_that_depend_on_it_only() -> None:
    truth, _, reference = posterior_draws(1000, 1, 1.0)
    of_prior = normal(1000, 99, 2, seed=5)
    blind = coverage(truth, of_prior, normal(1000, 2, seed=6), generator())
    assert blind.largest < 2 * blind.largest_expected
    assert coverage(truth, of_prior, reference, generator()).largest > 4 * blind.largest_expected


def test_the_largest_difference_to_expect_is_its_mean_over_right_samplers() -> None:
    found = []
    for seed in range(200):
        values = normal(60, 11, seed=seed)
        found.append(coverage(values[:, :1], values[:, 1:, None], torch.zeros(60, 1), generator(seed)))
    mean = sum(each.largest for each in found) / 200
    assert abs(mean / found[0].largest_expected - 1) < 0.1


def test_ranks_are_uniform_for_a_right_sampler_only() -> None:
    truth, draws, _ = posterior_draws(1000, 99, 1.0)
    right = calibration(truth, draws, generator())
    assert right.rank.shape == (1000, 2)
    assert int(right.rank.min()) >= 0
    assert int(right.rank.max()) <= 99
    assert float(right.p_value.min()) > 0.01
    for width, shift in ((0.6, 0.0), (1.0, 0.3)):
        truth, draws, _ = posterior_draws(1000, 99, width, shift)
        assert float(calibration(truth, draws, generator()).p_value.max()) < 1e-4


def test_p_values_of_right_samplers_are_uniform_with_ties_too() -> None:
    below = 0
    for seed in range(200):
        values = (2 * normal(200, 20, seed=seed)).round()  # many alike
        below += float(calibration(values[:, :1], values[:, 1:, None], generator(seed)).p_value[0]) < 0.2
    assert 22 <= below <= 60


def test_chi_squared_is_1_on_average_over_measurements_of_truths_from_the_prior() -> None:
    truth, draws, _ = posterior_draws(2000, 1, 1.0)
    y = truth + normal(2000, 2, seed=1)
    values = chi_squared_per_degree(draws[:, 0], lambda x: x, y, 1.0)
    assert abs(float(values.mean()) - 1) < 0.06
    assert abs(float(chi_squared_per_degree(torch.ones(3, 2), lambda x: 2 * x, torch.zeros(2), 4.0)[0]) - 0.25) < 1e-6


@pytest.mark.parametrize(
    ("call", "said"),
    [
        (lambda: wasserstein(torch.ones(3, 2), torch.ones(4, 2)), r"points \(3, 2\) and \(4, 2\)"),
        (lambda: wasserstein(torch.ones(5000, 1), torch.ones(5000, 1)), "at most 4000"),
        (lambda: sliced_wasserstein(torch.ones(3, 2), torch.ones(3, 2), torch.ones(1, 3)), "directions have 3"),
        (lambda: mean_discrepancy(torch.ones(1, 2), torch.ones(3, 2)), "two of each"),
        (lambda: total_variation(torch.ones(2), torch.ones(3)), "must be of as many"),
        (lambda: beside_floor(wasserstein, torch.ones(2, 1), torch.ones, 1), "repeats = 1"),
        (lambda: coverage(torch.ones(3, 2), torch.ones(4, 5, 2), torch.ones(3, 2), generator()), "draws have shape"),
        (lambda: coverage(torch.ones(3, 2), torch.ones(3, 5, 2), torch.ones(3), generator()), "reference has shape"),
        (lambda: calibration(torch.ones(3, 2), torch.ones(3, 5, 2), generator()), "bins = 10: .* divide 6"),
        (lambda: chi_squared_per_degree(torch.ones(2), lambda x: x, torch.ones(1), 0.0), "deviation = 0"),
    ],
)
def test_shapes_that_do_not_fit_are_named(call: object, said: str) -> None:
    with pytest.raises(ValueError, match=said):
        call()  # type: ignore[operator]
