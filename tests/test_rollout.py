"""Rollouts: the native walk against the tensor walk, recorded log-probabilities, frequencies of what is drawn."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import pytest
import torch
from torch import Tensor

from headwater.environments.base import Environment
from headwater.environments.graph import enumerate_states
from headwater.environments.hypergrid import Hypergrid
from headwater.environments.sequences import Sequences
from headwater.environments.sets import Sets
from headwater.environments.slots import Slots
from headwater.evaluation import ExactDistribution
from headwater.policies import NO_EXPLORATION, EnvironmentPolicy, Exploration, Network
from headwater.policies.rollout import draw
from headwater.trajectories import Trajectories
from helpers import random_policy, same, seeded

ENVIRONMENTS: dict[str, Environment] = {
    "grid": Hypergrid(3, 4),
    "append": Sequences("ACGU", 5, 2),
    "append, masked": Sequences("ACG", 3, allowed=torch.tensor([[1, 1, 0], [1, 0, 1], [0, 1, 1]])),
    "prepend-append": Sequences("AB", 4, 0, "prepend-append"),
    "slots": Slots(3, 4),
    "sets": Sets(6, 3),
    "exact sets": Sets(5, 2, exact=True),
}
every_environment = pytest.mark.parametrize("environment", ENVIRONMENTS.values(), ids=ENVIRONMENTS.keys())
explorations = pytest.mark.parametrize(
    "exploration",
    [NO_EXPLORATION, Exploration(0.3), Exploration(0.0, 2.5), Exploration(0.2, 0.4), Exploration(1.0)],
    ids=["policy", "epsilon", "hot", "epsilon and cold", "uniform"],
)


@contextmanager
def in_tensors(environment: Environment) -> Iterator[None]:
    """Within, the environment walks by its tensor methods."""
    native, environment.native = environment.native, None
    try:
        yield
    finally:
        environment.native = native


def empty(count: int) -> Tensor:
    return torch.empty(count, 0)


def assert_same_walk(left: Trajectories, right: Trajectories) -> None:
    torch.testing.assert_close(left.log_behaviour, right.log_behaviour, rtol=1e-4, atol=1e-5)
    assert torch.equal(left.lengths, right.lengths)
    for name in left.steps:
        assert torch.equal(left.steps[name], right.steps[name]), name
    assert torch.equal(left.identity, right.identity)


@every_environment
@explorations
def test_the_native_walk_forward_is_the_tensor_walk(environment: Environment, exploration: Exploration) -> None:
    policy = random_policy(environment)
    assert environment.native is not None
    native = policy.sample(empty(200), exploration, seeded(1))
    with in_tensors(environment):
        tensor = policy.sample(empty(200), exploration, seeded(1))
    assert_same_walk(native, tensor)


@pytest.mark.parametrize("width", [128, 160, 256])
@pytest.mark.parametrize("layers", [1, 2, 3])
def test_the_native_network_is_the_network_at_every_width_and_depth(width: int, layers: int) -> None:
    environment = Hypergrid(3, 4)
    torch.manual_seed(0)
    policy = EnvironmentPolicy(environment, Network(width=width, layers=layers), "learned")
    torch.nn.init.normal_(policy.heads.weight, std=0.3)
    forward = policy.sample(empty(40), NO_EXPLORATION, seeded(1))  # few enough for the native network
    backward = policy.sample_to(policy.final_states(forward), empty(40), seeded(2))
    with in_tensors(environment):
        assert_same_walk(forward, policy.sample(empty(40), NO_EXPLORATION, seeded(1)))
        assert_same_walk(backward, policy.sample_to(policy.final_states(forward), empty(40), seeded(2)))


@every_environment
@pytest.mark.parametrize("backward", ["uniform", "learned", "maximum-entropy", "tlm"])
def test_the_native_walk_backward_is_the_tensor_walk(environment: Environment, backward: str) -> None:
    policy = random_policy(environment, backward)  # type: ignore[arg-type]
    states = policy.final_states(policy.sample(empty(200), Exploration(0.5), seeded(2)))
    native = policy.sample_to(states, empty(200), seeded(3))
    with in_tensors(environment):
        tensor = policy.sample_to(states, empty(200), seeded(3))
    assert_same_walk(native, tensor)


@every_environment
def test_a_walk_starts_at_the_initial_state_and_takes_legal_steps_to_exit(environment: Environment) -> None:
    policy = random_policy(environment)
    drawn = policy.sample(empty(100), Exploration(0.5), seeded(4))
    drawn.validate()
    check_walk(environment, drawn)


@every_environment
def test_a_walk_backward_is_a_legal_walk_to_the_same_states(environment: Environment) -> None:
    policy = random_policy(environment)
    graph = enumerate_states(environment)
    states = graph.states[graph.terminal]
    walked = policy.sample_to(states, empty(len(states)), seeded(5))
    walked.validate()
    check_walk(environment, walked)
    assert torch.equal(policy.final_states(walked), states)


def check_walk(environment: Environment, batch: Trajectories) -> None:
    states, actions = batch.steps["state"], batch.steps["action"]
    assert torch.equal(states[batch.starts], environment.initial(len(batch)))
    assert environment.forward_mask(states).gather(1, actions[:, None]).all()
    is_exit = actions == environment.exit_action
    assert torch.equal(is_exit.nonzero()[:, 0], batch.last)
    moved = environment.step(states[~is_exit], actions[~is_exit])
    assert torch.equal(moved, states.roll(-1, 0)[~is_exit])
    assert int(batch.lengths.max()) <= environment.max_steps


@every_environment
@explorations
def test_log_behaviour_is_the_log_probability_of_the_mixture_that_drew(
    environment: Environment, exploration: Exploration
) -> None:
    policy = random_policy(environment)
    drawn = policy.sample(empty(100), exploration, seeded(6))
    mixture = mixture_log_probs(policy, drawn, exploration)
    torch.testing.assert_close(drawn.log_behaviour, drawn.sum(mixture).float(), rtol=1e-4, atol=1e-4)


def mixture_log_probs(policy: EnvironmentPolicy, batch: Trajectories, exploration: Exploration) -> Tensor:
    """Of every step, from the policy's log-probabilities by the formula, in float64."""
    states, actions = batch.steps["state"], batch.steps["action"]
    mask = policy.environment.forward_mask(states)
    logits = policy.action_log_probs(states, torch.empty(1, 0)).detach().double()
    policy_share = (logits / exploration.temperature).masked_fill(~mask, -torch.inf).softmax(1)
    uniform_share = mask.double() / mask.sum(1, keepdim=True)
    mixture = (1 - exploration.epsilon) * policy_share + exploration.epsilon * uniform_share
    return mixture.gather(1, actions[:, None])[:, 0].log()


@every_environment
def test_without_exploration_log_behaviour_is_log_p_forward(environment: Environment) -> None:
    policy = random_policy(environment)
    drawn = policy.sample(empty(100), NO_EXPLORATION, seeded(7))
    forward = drawn.sum(policy.log_probs(drawn).forward.detach())
    torch.testing.assert_close(drawn.log_behaviour, forward, rtol=1e-4, atol=1e-4)


def test_epsilon_one_draws_uniform_legal_actions_whatever_the_policy() -> None:
    environment = Hypergrid(2, 3)
    policy = random_policy(environment, scale=5.0)
    drawn = policy.sample(empty(20_000), Exploration(1.0), seeded(8))
    states, actions = drawn.steps["state"], drawn.steps["action"]
    for state in enumerate_states(environment).states:
        mask = environment.forward_mask(state[None])[0]
        if mask.sum() == 1:
            continue
        here = actions[(states == state).all(1)]
        counts = torch.bincount(here, minlength=environment.n_actions).double()
        assert counts[~mask].sum() == 0
        assert chi_square(counts[mask], torch.ones(int(mask.sum())).double() / mask.sum()) < 20  # 2 degrees of freedom


def chi_square(counts: Tensor, probabilities: Tensor) -> float:
    expected = probabilities * counts.sum()
    return float(((counts - expected).square() / expected).sum())


@every_environment
def test_objects_are_drawn_as_often_as_the_exact_distribution_says(environment: Environment) -> None:
    policy = random_policy(environment)
    exact = ExactDistribution(environment, lambda objects, condition: torch.zeros(len(condition)))
    probabilities = exact.log_probs(policy).exp()
    count = 20_000
    final = policy.final_states(policy.sample(empty(count), NO_EXPLORATION, seeded(9)))
    groups = torch.unique(torch.cat([exact.states, final]), dim=0, return_inverse=True)[1]
    n_objects = len(exact.states)
    counts = torch.bincount(groups[n_objects:], minlength=n_objects)[groups[:n_objects]].double()
    assert counts.sum() == count
    common = probabilities * count >= 5  # rare objects together are one bin
    counts = torch.cat([counts[common], counts[~common].sum()[None]])
    expected = torch.cat([probabilities[common], probabilities[~common].sum()[None]])
    counts, expected = counts[expected > 1e-9], expected[expected > 1e-9]
    freedom = len(counts) - 1
    assert chi_square(counts, expected) < freedom + 4.5 * (2 * freedom) ** 0.5 + 5


def test_a_step_into_a_state_that_must_exit_ends_without_asking_the_network() -> None:
    environment = Sequences("AB", 2)
    policy = random_policy(environment, torso="transformer")  # a native network cannot be watched
    asked: list[Tensor] = []
    policy.torso.register_forward_hook(lambda module, inputs, output: asked.append(inputs[0].clone()))
    policy.sample(empty(50), NO_EXPLORATION, seeded(10))
    seen = torch.cat(asked)
    assert (environment.lengths(seen) < 2).all()
    assert len(seen) == 100


@every_environment
def test_the_same_seed_gives_the_same_trajectories_and_another_seed_others(environment: Environment) -> None:
    policy = random_policy(environment)
    first = policy.sample(empty(50), Exploration(0.1), seeded(11))
    assert same(first, policy.sample(empty(50), Exploration(0.1), seeded(11)))
    assert not same(first, policy.sample(empty(50), Exploration(0.1), seeded(12)))


def test_no_trajectory_is_asked_for_and_none_is_drawn() -> None:
    environment = Hypergrid(2, 3)
    policy = random_policy(environment)
    for rules in (environment.native, None):
        environment.native = rules
        assert len(policy.sample(empty(0), NO_EXPLORATION, seeded(0))) == 0
        assert len(policy.sample_to(environment.initial(0), empty(0), seeded(0))) == 0


@pytest.mark.parametrize("uniform", [0.0, 0.25, 0.5, 0.999999, 1.0])
def test_a_draw_never_leaves_the_legal_actions(uniform: float) -> None:
    mask = torch.tensor([[False, True, False, True, False], [False, False, True, False, False]])
    logits = torch.tensor([[9.0, -200.0, 9.0, 3.0, 9.0], [1e4, 1e4, -1e4, 0.0, 0.0]])
    for epsilon in (0.0, 0.5, 1.0):
        actions, log_prob = draw(logits, mask, torch.full((2,), uniform), Exploration(epsilon))
        assert mask.gather(1, actions[:, None]).all()
        assert torch.isfinite(log_prob).all()


def test_more_steps_than_were_reserved_are_recorded() -> None:
    environment = Hypergrid(1, 100)  # 100 steps a trajectory, over six times the first reservation
    policy = random_policy(environment, scale=0.0)
    with torch.no_grad():
        policy.heads.bias[1] = -20.0  # never exits early
    drawn = policy.sample(empty(7), NO_EXPLORATION, seeded(13))
    assert drawn.lengths.tolist() == [100] * 7
    check_walk(environment, drawn)
    check_walk(environment, policy.sample_backward(drawn, seeded(14)))
