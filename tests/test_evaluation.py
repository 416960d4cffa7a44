"""Evaluation: exact figures against brute force, bounds on their sides, estimates near the truth."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from torch import Tensor

from headwater.environments.base import Environment, Objects
from headwater.environments.graph import TooManyStates
from headwater.environments.hypergrid import Hypergrid, HypergridReward
from headwater.environments.sequences import Sequences
from headwater.environments.sets import Sets
from headwater.evaluation import (
    ExactDistribution,
    best_and_different,
    best_distinct,
    bounds,
    correlation,
    diversity,
    log_prob_of_states,
)
from headwater.policies import EnvironmentPolicy, Policy, RelativePolicy
from helpers import every_trajectory, random_policy, seeded

ENVIRONMENTS: dict[str, Environment] = {
    "grid": Hypergrid(2, 3),
    "prepend-append": Sequences("AB", 3, 0, "prepend-append"),
    "sets": Sets(4, 2),
}
every_environment = pytest.mark.parametrize("environment", ENVIRONMENTS.values(), ids=ENVIRONMENTS.keys())
LETTERS = {"A": 0.0, "B": 1.0, "C": -0.5}


def flat(objects: Objects, condition: Tensor) -> Tensor:
    return torch.zeros(len(objects))


def letters(objects: Objects, condition: Tensor) -> Tensor:
    """A product over the letters, so that a policy that ignores what stands before can draw it exactly."""
    return torch.tensor([sum(LETTERS[letter] for letter in str(one)) for one in objects])


def exact_policy() -> EnvironmentPolicy:
    """Draws strings of three letters in exact proportion to `letters`."""
    policy = random_policy(Sequences("ABC", 3))
    with torch.no_grad():
        policy.heads.weight.zero_()
        policy.heads.bias[:3] = torch.tensor([LETTERS[letter] for letter in "ABC"])
    return policy


LETTERS_LOG_Z = 3 * math.log(sum(math.exp(value) for value in LETTERS.values()))


@every_environment
def test_exact_log_probs_are_the_sums_over_all_trajectories(environment: Environment) -> None:
    policy = random_policy(environment, condition_size=1)
    condition = torch.tensor([[0.7]])
    exact = ExactDistribution(environment, flat, condition)
    log_probs = exact.log_probs(policy)
    assert float(log_probs.exp().sum()) == pytest.approx(1, abs=1e-6)
    batch = every_trajectory(environment, condition)
    probability = batch.sum(policy.log_probs(batch).forward.detach().double()).exp()
    finals = policy.final_states(batch)
    brute = [float(probability[(finals == state).all(1)].sum()) for state in exact.states]
    torch.testing.assert_close(log_probs.exp(), torch.tensor(brute, dtype=torch.float64), rtol=1e-5, atol=1e-8)


def test_an_exact_sampler_has_no_distance_and_tight_bounds() -> None:
    policy, exact = exact_policy(), ExactDistribution(Sequences("ABC", 3), letters)
    assert exact.log_z == pytest.approx(LETTERS_LOG_Z, abs=1e-6)
    figures = exact.compare(policy)
    assert figures["total_variation"] == pytest.approx(0, abs=1e-6)
    assert figures["jensen_shannon"] == pytest.approx(0, abs=1e-9)
    figures = bounds(policy, letters, None, 200, seeded(0), exact)
    for name in ("elbo", "eubo", "log_z_estimate"):
        assert figures[name] == pytest.approx(LETTERS_LOG_Z, abs=1e-5)
    assert figures["log_z_interval"] == pytest.approx(0, abs=1e-5)
    assert figures["effective_sample_size"] == pytest.approx(1, abs=1e-5)


@every_environment
def test_distances_are_their_formulas(environment: Environment) -> None:
    def reward(objects: Objects, condition: Tensor) -> Tensor:
        return torch.randn(len(objects), generator=seeded(5))

    policy, exact = random_policy(environment), ExactDistribution(environment, reward)
    p, q = exact.log_probs(policy).exp().numpy(), exact.log_reward.softmax(0).numpy()
    middle = (p + q) / 2
    divergence = (p * np.log(p / middle)).sum() / 2 + (q * np.log(q / middle)).sum() / 2
    figures = exact.compare(policy)
    assert figures["total_variation"] == pytest.approx(float(np.abs(p - q).sum() / 2))
    assert figures["jensen_shannon"] == pytest.approx(float(divergence))
    assert figures["total_variation"] > 0.05


@pytest.mark.parametrize("backward", ["uniform", "learned"])
def test_log_z_lies_between_the_bounds_of_an_untrained_policy(backward: str) -> None:
    environment, reward = Hypergrid(2, 5), HypergridReward(5, r0=0.1)
    policy = random_policy(environment, backward, scale=0.2)  # type: ignore[arg-type]
    exact = ExactDistribution(environment, reward)
    figures = bounds(policy, reward, None, 4000, seeded(0), exact)
    assert figures["elbo"] < exact.log_z - 0.1
    assert figures["eubo"] > exact.log_z + 0.1
    assert 0 < figures["log_z_interval"] < 0.3
    assert abs(figures["log_z_estimate"] - exact.log_z) < 2.5 * figures["log_z_interval"]
    assert 0.01 < figures["effective_sample_size"] < 0.9
    from_own_draws = bounds(policy, reward, None, 4000, seeded(0))
    assert exact.log_z < from_own_draws["eubo"]


def test_effective_sample_size_is_kishs_formula() -> None:
    def one_or_three(objects: Objects, condition: Tensor) -> Tensor:
        return torch.tensor([math.log(3) if one == "B" else 0.0 for one in objects])

    policy = random_policy(Sequences("AB", 1), scale=0.0)  # draws A and B equally often
    figures = bounds(policy, one_or_three, None, 20_000, seeded(0))
    assert figures["effective_sample_size"] == pytest.approx((1 + 3) ** 2 / 2 / (1 + 9), abs=0.01)
    assert figures["log_z_estimate"] == pytest.approx(math.log(4), abs=0.02)


def test_draws_whose_reward_fails_are_left_out_of_the_bounds() -> None:
    def picky(objects: Objects, condition: Tensor) -> Tensor:
        return torch.tensor([math.nan if str(one)[0] == "A" else 0.0 for one in objects])

    figures = bounds(random_policy(Sequences("ABC", 3)), picky, None, 100, seeded(0))
    assert all(math.isfinite(value) for value in figures.values())
    with pytest.raises(ValueError, match="failed on 9 of 27"):
        ExactDistribution(Sequences("ABC", 3), picky)


@pytest.mark.parametrize("relative", [False, True])
def test_where_an_object_has_one_trajectory_its_log_probability_is_exact(relative: bool) -> None:
    environment = Sequences("ABC", 4, 1)
    policy: Policy = random_policy(environment)
    policy = RelativePolicy(policy) if relative else policy  # type: ignore[arg-type]
    exact = ExactDistribution(environment, letters)
    estimate = log_prob_of_states(policy, exact.states, torch.empty(len(exact.states), 0), 1, seeded(0))
    torch.testing.assert_close(estimate, exact.log_probs(policy), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("backward", ["uniform", "learned", "maximum-entropy"])
def test_many_walks_backward_come_close_to_the_log_probability_of_an_object(backward: str) -> None:
    environment = Hypergrid(2, 4)
    policy = random_policy(environment, backward, scale=0.2)  # type: ignore[arg-type]
    exact = ExactDistribution(environment, flat)
    nothing = torch.empty(len(exact.states), 0)
    truth = exact.log_probs(policy)
    estimates = [log_prob_of_states(policy, exact.states, nothing, walks, seeded(0)) for walks in (1, 1000)]
    errors = [float((estimate - truth).abs().max()) for estimate in estimates]
    assert errors[1] < 0.15 < errors[0]
    assert len(log_prob_of_states(policy, exact.states[:0], nothing[:0], 3)) == 0


def test_exact_draws_follow_the_target_and_come_to_their_sampling_floor() -> None:
    exact = ExactDistribution(Hypergrid(2, 8), HypergridReward(8))
    figures = exact.empirical_total_variation(exact.sample(20_000, seeded(0)))
    floor = figures["empirical_total_variation_floor"]
    assert figures["empirical_total_variation"] == pytest.approx(floor, rel=0.25)
    other = exact.empirical_total_variation(exact.states[:1].expand(1000, -1))
    assert other["empirical_total_variation"] == pytest.approx(1 - float(exact.probabilities[0]))


def test_the_sampling_floor_of_the_8_to_the_4_hypergrid_is_the_published_one() -> None:
    exact = ExactDistribution(Hypergrid(4, 8), HypergridReward(8))
    assert exact.log_z == pytest.approx(5.100452, abs=1e-5)
    figures = exact.empirical_total_variation(exact.sample(200_000, seeded(0)))
    assert figures["empirical_total_variation_floor"] == pytest.approx(0.022, abs=0.003)
    assert figures["empirical_total_variation"] == pytest.approx(0.022, abs=0.003)


def test_a_space_that_is_too_large_is_refused() -> None:
    with pytest.raises(TooManyStates, match="100"):
        ExactDistribution(Hypergrid(3, 10), HypergridReward(10), limit=100)


def test_correlations_are_known_values_ties_included() -> None:
    a, b = np.array([1.0, 2.0, 2.0, 4.0, 7.0]), np.array([2.0, 1.0, 3.0, 3.0, 9.0])
    figures = correlation(a, b)
    assert figures["pearson"] == pytest.approx(float(np.corrcoef(a, b)[0, 1]))
    ranks = np.array([1, 2.5, 2.5, 4, 5]), np.array([2, 1, 3.5, 3.5, 5])
    assert figures["spearman"] == pytest.approx(float(np.corrcoef(*ranks)[0, 1]))
    assert correlation(a, -(a**3))["spearman"] == pytest.approx(-1)
    assert correlation(a, 2 * a + 5) == pytest.approx({"pearson": 1, "spearman": 1})
    assert all(math.isnan(value) for value in correlation(a, np.ones(5)).values())


def test_the_best_distinct_objects_come_best_first_without_repeats() -> None:
    objects, log_reward = ["a", "b", "a", "c", "d"], np.array([3.0, 1.0, 3.0, 5.0, 2.0])
    assert best_distinct(log_reward, objects, 3) == [3, 0, 4]
    assert best_distinct(log_reward, objects, 10) == [3, 0, 4, 1]
    assert best_distinct(np.empty(0), [], 3) == []


def hamming(a: object, b: object) -> float:
    return sum(x != y for x, y in zip(str(a), str(b), strict=True))


def test_the_best_that_differ_keep_their_distance_from_every_better_one() -> None:
    objects, log_reward = ["AAAA", "AAAB", "BBAA", "BBBB", "AABB"], np.array([5.0, 4.0, 3.0, 2.0, 1.0])
    assert best_and_different(objects, log_reward, 5, hamming, 2) == [0, 2, 3, 4]
    assert best_and_different(objects, log_reward, 2, hamming, 2) == [0, 2]
    assert best_and_different(objects, log_reward, 5, hamming, 3) == [0, 3]
    assert best_and_different(objects, log_reward, 5, hamming, 2, pool=2) == [0]


def test_diversity_is_the_mean_distance_over_pairs() -> None:
    assert diversity(["AA", "AB", "BB"], hamming) == pytest.approx((1 + 2 + 1) / 3)
    assert math.isnan(diversity(["AA"], hamming))
