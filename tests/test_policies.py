"""The generic policy: backward policies, walks backward, conditions; and the relative policy on top of it."""

from __future__ import annotations

from dataclasses import replace
from typing import Literal

import pytest
import torch
from torch import Tensor

from headwater.environments.base import Environment
from headwater.environments.graph import enumerate_states
from headwater.environments.hypergrid import Hypergrid
from headwater.environments.sequences import Sequences
from headwater.environments.sets import Sets
from headwater.environments.slots import Slots
from headwater.objectives import Objective, trajectory_residual
from headwater.policies import EnvironmentPolicy, Exploration, Network, RelativePolicy
from headwater.policies.environment_policy import Backward
from headwater.trajectories import Trajectories
from helpers import every_trajectory, random_policy, seeded

ENVIRONMENTS: dict[str, Environment] = {
    "grid": Hypergrid(2, 3),
    "append": Sequences("AB", 3, 1),
    "prepend-append": Sequences("AB", 3, 0, "prepend-append"),
    "slots": Slots(2, 2),
    "sets": Sets(3, 2),
}
every_environment = pytest.mark.parametrize("environment", ENVIRONMENTS.values(), ids=ENVIRONMENTS.keys())
every_backward = pytest.mark.parametrize("backward", ["uniform", "learned", "maximum-entropy", "tlm"])


def empty(count: int) -> Tensor:
    return torch.empty(count, 0)


def object_numbers(policy: EnvironmentPolicy, batch: Trajectories) -> Tensor:
    """The number of each trajectory's object: int64 `[T]`."""
    return torch.unique(policy.final_states(batch), dim=0, return_inverse=True)[1]


def single_steps(environment: Environment) -> tuple[Trajectories, Tensor]:
    """Every step of the state graph, once, followed by a step out of the state that it leads to (as a batch whose
    trajectories need not begin at the initial state), and the number of the state that each step leads to."""
    graph = enumerate_states(environment)
    count = len(graph.source)
    state = torch.stack([graph.states[graph.source], graph.states[graph.target]], 1).flatten(0, 1)
    action = torch.stack([graph.action, torch.full_like(graph.action, environment.exit_action)], 1).flatten()
    nothing = torch.zeros(count)
    whole = torch.zeros(count, dtype=torch.int64)
    steps = {"state": state, "action": action}
    return Trajectories(steps, torch.full((count,), 2), empty(count), nothing, nothing, whole, whole), graph.target


@every_environment
@every_backward
def test_backward_probabilities_sum_to_one_over_the_parents(environment: Environment, backward: Backward) -> None:
    policy = random_policy(environment, backward)
    batch, target = single_steps(environment)
    probability = policy.log_probs(batch).backward.detach()[batch.starts].exp()
    total = torch.zeros(int(target.max()) + 1).index_add(0, target, probability)
    torch.testing.assert_close(total[1:], torch.ones(len(total) - 1))
    assert float(total[0]) == 0  # nothing leads to the initial state


@every_environment
def test_a_learned_backward_policy_is_not_uniform(environment: Environment) -> None:
    if environment.n_backward_actions == 1:
        return
    batch = every_trajectory(environment)
    learned = random_policy(environment, "learned").log_probs(batch).backward
    uniform = random_policy(environment, "uniform").log_probs(batch).backward
    assert float((learned - uniform).detach().abs().max()) > 0.1


@every_environment
@every_backward
def test_probabilities_sum_to_one_over_all_trajectories(environment: Environment, backward: Backward) -> None:
    policy = random_policy(environment, backward)
    batch = every_trajectory(environment)
    log_probs = policy.log_probs(batch)
    forward = batch.sum(log_probs.forward.detach()).exp()
    assert float(forward.sum()) == pytest.approx(1, abs=1e-5)
    number = object_numbers(policy, batch)
    to_object = torch.zeros(int(number.max()) + 1).index_add(0, number, batch.sum(log_probs.backward.detach()).exp())
    torch.testing.assert_close(to_object, torch.ones_like(to_object))


@every_environment
def test_maximum_entropy_makes_every_trajectory_to_an_object_equally_likely(environment: Environment) -> None:
    policy = random_policy(environment, "maximum-entropy")
    batch = every_trajectory(environment)
    probability = batch.sum(policy.log_probs(batch).backward).exp()
    number = object_numbers(policy, batch)
    torch.testing.assert_close(probability, 1 / torch.bincount(number)[number].float())


def test_maximum_entropy_needs_path_counts() -> None:
    class Uncounted(Hypergrid):
        def log_path_count(self, states: Tensor) -> None:  # type: ignore[override]
            return None

    with pytest.raises(ValueError, match=r"maximum-entropy.*Uncounted"):
        EnvironmentPolicy(Uncounted(2, 3), backward="maximum-entropy")
    with pytest.raises(ValueError, match="backward = 'random'"):
        EnvironmentPolicy(Hypergrid(2, 3), backward="random")  # type: ignore[arg-type]


@every_environment
@every_backward
def test_a_walk_backward_keeps_object_reward_and_condition_and_knows_its_probability(
    environment: Environment, backward: Backward
) -> None:
    policy = random_policy(environment, backward, condition_size=2)
    condition = torch.randn(64, 2, generator=seeded(0))
    drawn = policy.sample(condition, Exploration(0.5), seeded(1)).with_log_reward(torch.randn(64, generator=seeded(2)))
    walked = policy.sample_backward(drawn, seeded(3))
    for name in ("identity", "log_reward", "condition"):
        assert torch.equal(getattr(walked, name), getattr(drawn, name))
    assert torch.equal(policy.final_states(walked), policy.final_states(drawn))
    expected = walked.sum(policy.log_probs(walked).backward.detach())
    torch.testing.assert_close(walked.log_behaviour, expected, rtol=1e-4, atol=1e-5)


def test_walks_backward_are_drawn_as_often_as_the_backward_policy_says() -> None:
    environment = Hypergrid(2, 3)
    for backward in ("uniform", "learned", "maximum-entropy"):
        policy = random_policy(environment, backward)  # type: ignore[arg-type]
        corner = torch.full((6000, 2), 2, dtype=torch.int32)
        walked = policy.sample_to(corner, empty(6000), seeded(4))
        paths = torch.unique(walked.steps["action"].view(6000, 5), dim=0, return_inverse=True)[1]
        assert int(paths.max()) == 5  # the six paths to the far corner
        share = torch.bincount(paths) / 6000
        expected = torch.zeros(6).index_copy(0, paths, walked.log_behaviour.exp())
        torch.testing.assert_close(share, expected, rtol=0, atol=0.025)


def _gradient(policy: EnvironmentPolicy, loss: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Of the forward, the backward and the flow rows of the heads."""
    policy.zero_grad()
    loss.backward(retain_graph=True)  # type: ignore[no-untyped-call]
    assert policy.heads.weight.grad is not None
    forward, backward, flow = policy.heads.weight.grad.split(policy.sizes, dim=1)
    return forward.clone(), backward.clone(), flow.clone()


def test_balance_reaches_the_backward_head_of_tlm_by_its_likelihood_alone() -> None:
    policy = random_policy(Hypergrid(2, 4), "tlm")
    batch = policy.sample(empty(32), generator=seeded(0)).with_log_reward(torch.randn(32, generator=seeded(1)))
    log_probs = policy.log_probs(batch)
    assert log_probs.auxiliary is not None
    balance = _gradient(policy, Objective("tb")(replace(log_probs, auxiliary=None), batch))
    likelihood = _gradient(policy, log_probs.auxiliary)
    both = _gradient(policy, Objective("tb")(log_probs, batch))
    assert balance[0].abs().sum() > 0
    assert balance[1].abs().sum() == 0
    assert likelihood[0].abs().sum() == 0
    assert likelihood[1].abs().sum() > 0
    torch.testing.assert_close(both[1], likelihood[1])
    backward = -batch.sum(random_policy(Hypergrid(2, 4), "learned").log_probs(batch).backward).mean()
    torch.testing.assert_close(log_probs.auxiliary, backward)  # the same heads, so the same likelihood


def test_balance_reaches_a_learned_backward_head() -> None:
    policy = random_policy(Hypergrid(2, 4), "learned")
    batch = policy.sample(empty(32), generator=seeded(0)).with_log_reward(torch.randn(32, generator=seeded(1)))
    log_probs = policy.log_probs(batch)
    assert log_probs.auxiliary is None
    assert _gradient(policy, Objective("tb")(log_probs, batch))[1].abs().sum() > 0


@every_environment
def test_log_exit_is_the_probability_of_exit_in_each_state(environment: Environment) -> None:
    policy = random_policy(environment)
    batch = every_trajectory(environment)
    log_probs = policy.log_probs(batch)
    assert log_probs.log_exit is not None
    expected = policy.action_log_probs(batch.steps["state"], torch.empty(1, 0))[:, -1]
    torch.testing.assert_close(log_probs.log_exit, expected)
    torch.testing.assert_close(log_probs.log_exit[batch.last], log_probs.forward[batch.last])


@pytest.mark.parametrize("torso", ["mlp", "transformer"])
@pytest.mark.parametrize("condition_size", [0, 2])
def test_what_a_policy_says_of_a_trajectory_does_not_depend_on_its_batch(torso: str, condition_size: int) -> None:
    policy = random_policy(Sequences("ABC", 4, 1), "learned", condition_size, torso)
    condition = torch.randn(20, condition_size, generator=seeded(0))
    batch = policy.sample(condition, Exploration(0.5), seeded(1))
    together = policy.log_probs(batch)
    order = torch.randperm(20, generator=seeded(2))
    for part in (batch.select(order), *batch.split([1, 12, 7])):
        alone = policy.log_probs(part)
        where = torch.cat([(batch.condition == row).all(1).nonzero()[:, 0] for row in part.condition])
        where = where if condition_size else _positions(batch, part)
        rows = batch.select(where)
        assert torch.equal(rows.steps["state"], part.steps["state"])
        index = torch.cat([torch.arange(int(batch.starts[i]), int(batch.last[i]) + 1) for i in where.tolist()])
        for name in ("forward", "backward", "log_flow", "log_exit"):
            torch.testing.assert_close(getattr(alone, name), getattr(together, name)[index], rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(alone.log_z, together.log_z[where])


def _positions(batch: Trajectories, part: Trajectories) -> Tensor:
    """For each trajectory of `part`, one of `batch` that has the same object (append: so the same steps)."""
    return torch.stack([(batch.identity == value).nonzero()[0, 0] for value in part.identity])


@pytest.mark.parametrize("torso", ["mlp", "transformer"])
def test_a_condition_changes_what_a_policy_says(torso: str) -> None:
    policy = random_policy(Sequences("ABC", 4, 1), "learned", 1, torso)
    batch = policy.sample(torch.zeros(8, 1), generator=seeded(0))
    other = replace(batch, condition=torch.ones(8, 1))
    here, there = policy.log_probs(batch), policy.log_probs(other)
    for name in ("forward", "log_flow", "log_z"):
        assert not torch.allclose(getattr(here, name), getattr(there, name))
    drawn = [policy.sample(torch.full((500, 1), value), generator=seeded(1)).identity for value in (0.0, 3.0)]
    assert not torch.equal(*drawn)


@pytest.mark.parametrize("condition", [torch.zeros(4), torch.zeros(4, 1), torch.zeros(4, 3), torch.zeros(4, 2, 1)])
def test_a_condition_of_the_wrong_shape_is_refused(condition: Tensor) -> None:
    policy = random_policy(Hypergrid(2, 3), condition_size=2)
    with pytest.raises(ValueError, match=r"condition has shape .*expected \[T, 2\]"):
        policy.sample(condition)
    with pytest.raises(ValueError, match="condition has shape"):
        policy.sample_to(torch.zeros(4, 2, dtype=torch.int32), condition)
    with pytest.raises(ValueError, match="condition has shape"):
        policy.action_log_probs(torch.zeros(4, 2, dtype=torch.int32), condition)


def test_a_sample_carries_the_version_of_its_policy() -> None:
    policy = random_policy(Hypergrid(2, 3))
    policy.version = 7
    assert policy.sample(empty(3)).version.tolist() == [7, 7, 7]
    relative = RelativePolicy(policy)
    relative.version = 9
    assert relative.sample(empty(2)).version.tolist() == [9, 9]


@pytest.mark.parametrize("torso", ["mlp", "transformer"])
def test_a_new_policy_is_uniform_over_legal_actions(torso: Literal["mlp", "transformer"]) -> None:
    environment = Sets(4, 2)
    policy = EnvironmentPolicy(environment, Network(torso=torso, width=16, heads=2), "learned")
    graph = enumerate_states(environment)
    mask = environment.forward_mask(graph.states)
    probability = policy.action_log_probs(graph.states, torch.empty(1, 0)).exp()
    torch.testing.assert_close(probability, mask / mask.sum(1, keepdim=True))


@pytest.mark.parametrize("condition_size", [0, 2])
def test_a_relative_policy_starts_with_minus_log_r_as_its_residual(condition_size: int) -> None:
    prior = random_policy(Sequences("ABC", 4, 1), condition_size=condition_size)
    with torch.no_grad():
        prior.log_z.fill_(3.0)
    policy = RelativePolicy(prior)
    batch = policy.sample(torch.randn(32, condition_size, generator=seeded(0)), generator=seeded(1))
    batch = batch.with_log_reward(torch.randn(32, generator=seeded(2)))
    residual = trajectory_residual(policy.log_probs(batch), batch)
    torch.testing.assert_close(residual.detach(), -batch.log_reward, rtol=1e-5, atol=1e-5)


def test_learning_moves_the_posterior_and_never_the_prior() -> None:
    policy = RelativePolicy(random_policy(Sequences("ABC", 3)))
    batch = policy.sample(empty(16), generator=seeded(0)).with_log_reward(torch.randn(16, generator=seeded(1)))
    Objective("tb")(policy.log_probs(batch), batch).backward()  # type: ignore[no-untyped-call]
    assert all(p.grad is None and not p.requires_grad for p in policy.prior.parameters())
    assert policy.posterior.heads.weight.grad is not None
    assert policy.posterior.heads.weight.grad.abs().sum() > 0
    assert [id(p) for p in policy.log_z_parameters()] == [id(policy.posterior.log_z)]


def test_an_illegal_network_is_named() -> None:
    with pytest.raises(ValueError, match="torso = 'lstm'"):
        Network(torso="lstm")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match=r"heads = 3.*width = 64"):
        Network(torso="transformer", width=64, heads=3)
    with pytest.raises(ValueError, match="layers = 0"):
        Network(layers=0)
