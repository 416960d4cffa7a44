"""Training to the exact distribution: every objective, backward policy, penalty, replay rule and kind of condition."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Literal

import pytest
import torch
from torch import Tensor

from headwater.conditions import Conditions, ConditionTable, InverseTemperature, NoCondition
from headwater.environments.base import Objects
from headwater.environments.hypergrid import Hypergrid, HypergridReward
from headwater.environments.sequences import Sequences
from headwater.evaluation import ExactDistribution
from headwater.objectives import Name, Objective, Penalty
from headwater.policies import EnvironmentPolicy, Network, Policy, RelativePolicy
from headwater.policies.environment_policy import Backward
from headwater.replay import ReplaySettings
from headwater.reward import Reward, TemperedReward
from headwater.training import ExplorationSettings, Trainer, Training
from helpers import random_policy, seeded

CLOSE = 0.05
SMALL = Training(iterations=300, batch_size=32, learning_rate=1e-2)


@pytest.fixture(autouse=True)
def _one_thread() -> None:
    torch.set_num_threads(1)
    torch.manual_seed(0)


def grid_policy(backward: Backward = "uniform", condition_size: int = 0) -> EnvironmentPolicy:
    return EnvironmentPolicy(Hypergrid(2, 6), Network(width=64), backward, condition_size)


def grid_reward() -> HypergridReward:
    return HypergridReward(6, r0=0.05)


def trained(
    policy: Policy,
    reward: Reward,
    objective: Objective,
    training: Training = SMALL,
    conditions: Conditions | None = None,
    exploration: ExplorationSettings | None = None,
    replay: ReplaySettings | None = None,
) -> Trainer:
    trainer = Trainer(policy, reward, conditions or NoCondition(), objective, training, exploration, replay)
    trainer.run(progress_bar=False)
    return trainer


def distance(policy: Policy, reward: Reward, condition: Tensor | None = None) -> float:
    environment = policy.environment
    assert isinstance(environment, (Hypergrid, Sequences))
    return ExactDistribution(environment, reward, condition).compare(policy)["total_variation"]


def test_an_untrained_policy_is_far_from_the_target() -> None:
    assert distance(grid_policy(), grid_reward()) > 0.4


@pytest.mark.parametrize("name", ["tb", "vargrad", "db", "mdb", "subtb", "fldb", "flsubtb"])
def test_every_objective_reaches_the_exact_distribution(name: Name) -> None:
    policy = grid_policy()
    trained(policy, grid_reward(), Objective(name), replace(SMALL, iterations=500))
    assert distance(policy, grid_reward()) < CLOSE


@pytest.mark.parametrize("backward", ["uniform", "learned", "maximum-entropy", "tlm"])
def test_every_backward_policy_reaches_the_exact_distribution(backward: Backward) -> None:
    policy = grid_policy(backward)
    trained(policy, grid_reward(), Objective("tb"))
    assert distance(policy, grid_reward()) < CLOSE
    exact = ExactDistribution(Hypergrid(2, 6), grid_reward())
    assert float(policy.log_z.detach()) == pytest.approx(exact.log_z, abs=0.1)


@pytest.mark.parametrize("penalty", ["huber", "log-cosh"])
def test_every_penalty_reaches_the_exact_distribution(penalty: Penalty) -> None:
    policy = grid_policy()
    trained(policy, grid_reward(), Objective("tb", penalty))
    assert distance(policy, grid_reward()) < CLOSE


def letter_reward(objects: Objects, condition: Tensor) -> Tensor:
    """Of strings over ABC: each B doubles, each C after an A triples."""
    values = [str(one).count("B") * math.log(2) + str(one).count("AC") * math.log(3) for one in objects]
    return torch.tensor(values, dtype=torch.float32)


@pytest.mark.parametrize("construction", ["append", "prepend-append"])
def test_strings_built_at_one_end_or_both_reach_the_exact_distribution(
    construction: Literal["append", "prepend-append"],
) -> None:
    policy = EnvironmentPolicy(Sequences("ABC", 4, 1, construction), Network(width=64))
    trained(policy, letter_reward, Objective("tb"), replace(SMALL, iterations=700))
    assert distance(policy, letter_reward) < CLOSE


def test_maximum_likelihood_of_target_draws_reaches_the_exact_distribution() -> None:
    policy = grid_policy()
    exact = ExactDistribution(Hypergrid(2, 6), grid_reward())
    optimizer = torch.optim.Adam(policy.parameters(), lr=1e-2)
    generator = seeded(0)
    for iteration in range(300):
        optimizer.param_groups[0]["lr"] = 1e-2 * (1 - iteration / 300)
        batch = policy.sample_to(exact.sample(128, generator), torch.empty(128, 0), generator)
        loss = Objective("mle")(policy.log_probs(batch), batch)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    assert exact.compare(policy)["total_variation"] < CLOSE


@pytest.mark.parametrize("name", ["tb", "vargrad"])
def test_relative_balance_learns_the_prior_times_the_reward(name: Name) -> None:
    prior = random_policy(Sequences("ABC", 3), scale=0.3)
    before = ExactDistribution(prior.environment, letter_reward).log_probs(prior)
    policy = RelativePolicy(prior)
    trained(policy, letter_reward, Objective(name))
    target = ExactDistribution(prior.environment, letter_reward)
    posterior = (before + target.log_reward).softmax(0)
    learned = target.log_probs(policy).exp()
    assert float((learned - posterior).abs().sum() / 2) < CLOSE
    assert float((learned - target.probabilities).abs().sum() / 2) > 2 * CLOSE  # the prior counts
    assert torch.equal(target.log_probs(policy.prior), before)  # and stays what it was


def cold_and_hot(policy: Policy, reward: Reward) -> tuple[list[list[float]], list[Tensor]]:
    """Total variation of what the policy draws at beta 0.5 and 2 from the target at either."""
    targets = [ExactDistribution(Hypergrid(2, 6), reward, torch.tensor([[beta]])) for beta in (0.5, 2.0)]
    learned = [target.log_probs(policy).exp() for target in targets]
    return [[float((p - t.probabilities).abs().sum() / 2) for t in targets] for p in learned], learned


@pytest.mark.parametrize("name", ["tb", "vargrad", "subtb"])
def test_one_policy_learns_every_temperature(name: Name) -> None:
    policy, reward = grid_policy(condition_size=1), TemperedReward(HypergridReward(6, r0=0.2))
    training = replace(SMALL, iterations=1200, learning_rate=5e-3, group_size=8)
    trained(policy, reward, Objective(name), training, InverseTemperature(0.5, 2.0))
    ((hot, hot_to_cold), (cold_to_hot, cold)), _ = cold_and_hot(policy, reward)
    assert max(hot, cold) < CLOSE
    assert min(hot_to_cold, cold_to_hot) > 0.2


def test_a_policy_that_ignores_its_temperature_would_be_found_out() -> None:
    policy, reward = grid_policy(condition_size=1), TemperedReward(HypergridReward(6, r0=0.2))
    with torch.no_grad():
        policy.embed_condition[2].weight.zero_()
    policy.embed_condition[2].weight.requires_grad_(False)
    trained(policy, reward, Objective("tb"), SMALL, InverseTemperature(0.5, 2.0))
    ((hot, _), (_, cold)), (at_hot, at_cold) = cold_and_hot(policy, reward)
    assert torch.allclose(at_hot, at_cold)
    assert max(hot, cold) > CLOSE * 1.5


def corner_reward(objects: Objects, condition: Tensor) -> Tensor:
    """The condition is one-hot over the four corners of a grid of side 5; the wanted one has reward 10, others 0.1."""
    corners = torch.tensor([[0, 0], [0, 4], [4, 0], [4, 4]])
    wanted = condition @ corners.float()
    found = (torch.as_tensor(objects) == wanted).all(1)
    return torch.where(found, math.log(10.0), math.log(0.1))


def test_one_policy_learns_every_row_of_a_condition_table() -> None:
    policy = EnvironmentPolicy(Hypergrid(2, 5), Network(width=64), condition_size=4)
    training = replace(SMALL, iterations=1200, learning_rate=5e-3)
    trained(policy, corner_reward, Objective("tb"), training, ConditionTable(torch.eye(4)))
    for row in torch.eye(4):
        assert distance(policy, corner_reward, row[None]) < CLOSE


@pytest.mark.parametrize("backward_walks", [False, True], ids=["remembered", "walked backward"])
@pytest.mark.parametrize("rule", ["recent", "uniform", "softmax", "rank", "stratified"])
def test_learning_from_replay_reaches_the_exact_distribution(
    rule: Literal["recent", "uniform", "softmax", "rank", "stratified"], backward_walks: bool
) -> None:
    policy = grid_policy("learned")
    training = replace(SMALL, batch_size=16, replayed=16, replay_backward=backward_walks)
    trainer = trained(policy, grid_reward(), Objective("tb"), training, replay=ReplaySettings(1000, rule))
    assert trainer.replay is not None
    assert len(trainer.replay) == 36
    assert distance(policy, grid_reward()) < CLOSE


def test_replay_walked_backward_serves_objectives_that_score_states_on_the_way() -> None:
    policy = grid_policy()
    training = replace(SMALL, batch_size=16, replayed=16, replay_backward=True, iterations=500)
    trained(policy, grid_reward(), Objective("fldb"), training)
    assert distance(policy, grid_reward()) < CLOSE


def test_searching_with_the_moving_average_reaches_the_exact_distribution() -> None:
    policy = grid_policy()
    trainer = trained(policy, grid_reward(), Objective("tb"), exploration=ExplorationSettings(average=0.95))
    assert trainer.sampler is not policy
    assert trainer.sampler.version == policy.version == SMALL.iterations
    assert distance(trainer.sampler, grid_reward()) < CLOSE
    assert distance(policy, grid_reward()) < CLOSE


def test_the_moving_average_is_the_average_of_the_weights() -> None:
    policy = grid_policy()
    trainer = Trainer(policy, grid_reward(), NoCondition(), Objective(), SMALL, ExplorationSettings(average=0.75))
    expected = [p.detach().clone() for p in policy.parameters()]
    for _ in range(5):
        trainer.update()
        expected = [0.75 * old + 0.25 * new.detach() for old, new in zip(expected, policy.parameters(), strict=True)]
    torch.testing.assert_close(list(trainer.sampler.parameters()), expected)


@pytest.mark.parametrize(("name", "iterations"), [("tb", 1000), ("db", 2000), ("subtb", 2000)])
def test_the_8_to_the_4_hypergrid_is_learnt(name: Name, iterations: int) -> None:
    policy = EnvironmentPolicy(Hypergrid(4, 8), Network(), "learned")
    training = Training(iterations=iterations, batch_size=64, learning_rate=3e-3)
    trained(policy, HypergridReward(8), Objective(name), training)
    exact = ExactDistribution(Hypergrid(4, 8), HypergridReward(8))
    assert exact.log_z == pytest.approx(5.100452, abs=1e-5)
    assert exact.compare(policy)["total_variation"] < 0.05
