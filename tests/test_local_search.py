"""Back-and-forth local search: what it proposes, what its chain leaves invariant, what reaches the learner."""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import contextmanager

import pytest
import torch
from torch import Tensor

from headwater.conditions import NoCondition
from headwater.environments.base import Environment, Objects
from headwater.environments.hypergrid import Hypergrid, HypergridReward
from headwater.environments.sequences import Sequences
from headwater.environments.sets import Sets
from headwater.environments.slots import Slots
from headwater.evaluation import ExactDistribution
from headwater.policies import NO_EXPLORATION, EnvironmentPolicy, Exploration
from headwater.reward import Reward
from headwater.search import InlineSearch, LocalSearch, Searcher
from headwater.trajectories import Trajectories, rows_of
from helpers import random_policy, same, seeded

ENVIRONMENTS: dict[str, Environment] = {
    "grid": Hypergrid(2, 4),
    "prepend-append": Sequences("AB", 3, 0, "prepend-append"),
    "slots": Slots(3, 3),
    "sets": Sets(5, 3),
}
every_environment = pytest.mark.parametrize("environment", ENVIRONMENTS.values(), ids=ENVIRONMENTS.keys())
EXPLORING = Exploration(0.2, 1.5)


@pytest.fixture(autouse=True)
def _one_thread() -> None:
    torch.set_num_threads(1)


def uneven_reward(objects: Objects, condition: Tensor) -> Tensor:
    """Between e^-1 and e, by a hash of what the object looks like."""
    rows = objects.tolist() if isinstance(objects, Tensor) else objects
    return torch.tensor([math.sin(sum((i + 2) * ord(c) for i, c in enumerate(str(row)))) for row in rows])


def drawn_from(policy: EnvironmentPolicy, count: int, exploration: Exploration = NO_EXPLORATION) -> Trajectories:
    batch = policy.sample(torch.empty(count, 0), exploration, seeded(1))
    return batch.with_log_reward(uneven_reward(policy.objects(batch), batch.condition))


@contextmanager
def in_tensors(environment: Environment) -> Iterator[None]:
    native, environment.native = environment.native, None
    try:
        yield
    finally:
        environment.native = native


@every_environment
def test_a_candidate_keeps_the_first_steps_of_a_path_to_the_old_object_and_is_a_legal_trajectory(
    environment: Environment,
) -> None:
    policy = random_policy(environment)
    current = drawn_from(policy, 200)
    walked, candidate, _ = policy.back_and_forth(current, 0.5, EXPLORING, seeded(2))
    candidate.validate()
    assert torch.equal(walked.identity, current.identity)
    states, actions = candidate.steps["state"], candidate.steps["action"]
    assert torch.equal(states[candidate.starts], environment.initial(200))
    assert environment.forward_mask(states).gather(1, actions[:, None]).all()
    is_exit = actions == environment.exit_action
    assert torch.equal(is_exit.nonzero()[:, 0], candidate.last)
    assert torch.equal(environment.step(states[~is_exit], actions[~is_exit]), states.roll(-1, 0)[~is_exit])
    old, new = (batch.steps["action"] for batch in (walked, candidate))
    kept = (walked.lengths - (walked.lengths / 2).ceil().long() - 1).clamp(min=0)  # a forced exit besides half of all
    assert int(kept.max()) > 0
    assert torch.equal(old[rows_of(walked.starts, kept)], new[rows_of(candidate.starts, kept)])
    assert (candidate.identity != walked.identity).float().mean() > 0.2


@every_environment
def test_native_and_tensor_walks_propose_the_same(environment: Environment) -> None:
    policy = random_policy(environment)
    current = drawn_from(policy, 200)
    _, native, ratio = policy.back_and_forth(current, 0.7, EXPLORING, seeded(3))
    with in_tensors(environment):
        _, tensor, ratio_of_tensor = policy.back_and_forth(current, 0.7, EXPLORING, seeded(3))
    assert same(native, tensor)
    torch.testing.assert_close(ratio, ratio_of_tensor)


@every_environment
def test_walks_from_given_states_are_the_same_native_and_in_tensors(environment: Environment) -> None:
    policy = random_policy(environment)
    whole = policy.sample(torch.empty(200, 0), EXPLORING, seeded(4))
    middle = whole.steps["state"][whole.starts + whole.lengths // 2 - 1]
    before = middle.clone()
    native = policy.sample_from(middle, whole.condition, EXPLORING, seeded(5))
    with in_tensors(environment):
        tensor = policy.sample_from(middle, whole.condition, EXPLORING, seeded(5))
    torch.testing.assert_close(native.log_behaviour, tensor.log_behaviour, rtol=1e-4, atol=1e-5)
    assert torch.equal(native.lengths, tensor.lengths)
    assert torch.equal(native.steps["action"], tensor.steps["action"])
    assert torch.equal(native.steps["state"][native.starts], before)
    assert torch.equal(middle, before)


def test_log_behaviour_of_a_candidate_is_that_of_the_exploring_forward_policy() -> None:
    policy = random_policy(Hypergrid(2, 4))
    _, candidate, _ = policy.back_and_forth(drawn_from(policy, 100), 0.5, EXPLORING, seeded(6))
    states, actions = candidate.steps["state"], candidate.steps["action"]
    mask = policy.environment.forward_mask(states)
    logits = policy.action_log_probs(states, torch.empty(1, 0)).detach().double()
    mixture = 0.8 * (logits / 1.5).masked_fill(~mask, -torch.inf).softmax(1) + 0.2 * mask / mask.sum(1, keepdim=True)
    expected = candidate.sum(mixture.gather(1, actions[:, None])[:, 0].log())
    torch.testing.assert_close(candidate.log_behaviour.double(), expected, rtol=1e-4, atol=1e-4)


def after_rounds(policy: EnvironmentPolicy, start: Tensor, rounds: int, exploration: Exploration) -> Tensor:
    """Final states of the chains that start at final states `start`."""
    search, generator = LocalSearch(1, back=0.6), seeded(7)
    current = policy.sample_to(start, torch.empty(len(start), 0), generator)
    current = current.with_log_reward(uneven_reward(policy.objects(current), current.condition))
    for _ in range(rounds):
        walked, candidate, log_ratio = policy.back_and_forth(current, search.back, exploration, generator)
        candidate = candidate.with_log_reward(uneven_reward(policy.objects(candidate), candidate.condition))
        current = search.moved(walked, candidate, log_ratio, generator)
    return policy.final_states(current)


@every_environment
@pytest.mark.parametrize("exploration", [NO_EXPLORATION, EXPLORING], ids=["policy", "exploring"])
def test_the_chain_of_any_policy_leaves_the_target_invariant(
    environment: Environment, exploration: Exploration
) -> None:
    policy = random_policy(environment)
    exact = ExactDistribution(environment, uneven_reward)
    start = exact.sample(20_000, seeded(8))
    final = after_rounds(policy, start, 4, exploration)
    assert (final != start).any(1).float().mean() > 0.4  # the chains do move
    figures = exact.empirical_total_variation(final)
    assert figures["empirical_total_variation"] < 1.7 * figures["empirical_total_variation_floor"]


@every_environment
def test_the_chain_converges_to_the_target_from_one_object(environment: Environment) -> None:
    policy = random_policy(environment, scale=0.2)
    exact = ExactDistribution(environment, uneven_reward)
    start = exact.states[exact.log_reward.argmin()][None].expand(2_000, -1)
    figures = exact.empirical_total_variation(after_rounds(policy, start, 50, NO_EXPLORATION))
    assert figures["empirical_total_variation"] < 1.7 * figures["empirical_total_variation_floor"]


def test_greedy_chains_never_move_to_a_worse_object_and_learn_from_all_candidates() -> None:
    policy = random_policy(Hypergrid(2, 6))
    start = drawn_from(policy, 300)
    search = LocalSearch(6, accept="greedy")
    found = search.candidates(policy, uneven_reward, start, 1800, NO_EXPLORATION, seeded(9))
    assert len(found) == 1800
    rounds = torch.stack([part.log_reward for part in found.split([300] * 6)])
    best = torch.cat([start.log_reward[None], rounds]).cummax(0).values
    assert (rounds[1:] < best[1:-1]).any()  # rejected ones are there too
    proposals_from_best = rounds[-1].mean()
    assert proposals_from_best > start.log_reward.mean() + 0.2


def grid_search(local: LocalSearch, reward: Reward | None = None, step_rewards: bool = False) -> InlineSearch:
    policy, reward = random_policy(Hypergrid(2, 6)), reward or HypergridReward(6)
    searcher = Searcher(policy, reward, NoCondition(), step_rewards=step_rewards, local=local)
    return InlineSearch(searcher, None, seeded(10))


@pytest.mark.parametrize(("count", "rounds"), [(16, 0), (16, 3), (10, 3), (1, 2), (5, 10)])
def test_an_iteration_has_as_many_trajectories_with_local_search_as_without(count: int, rounds: int) -> None:
    search = grid_search(LocalSearch(rounds))
    batch = search.collect(count, NO_EXPLORATION)
    assert len(batch) == search.drawn == count
    assert torch.isfinite(batch.log_reward).all()
    assert torch.equal(batch.log_reward, HypergridReward(6)(search.searcher.policy.objects(batch), batch.condition))


def test_candidates_whose_reward_fails_are_counted_and_no_chain_goes_on_from_them() -> None:
    bad = (3, 3)

    def reward(objects: Objects, condition: Tensor) -> Tensor:
        log_reward = HypergridReward(6)(objects, condition)
        return log_reward.masked_fill((torch.as_tensor(objects) >= torch.tensor(bad)).all(1), torch.nan)

    search = grid_search(LocalSearch(3), reward)
    batch = search.collect(400, Exploration(1.0))
    assert search.failed > 0
    assert len(batch) == search.drawn - search.failed
    assert not batch.log_reward.isnan().any()
    always = grid_search(LocalSearch(3), lambda objects, condition: torch.full((len(condition),), torch.nan))
    assert len(always.collect(8, NO_EXPLORATION)) == 0
    assert always.drawn == always.failed == 2


def test_candidates_carry_the_rewards_of_states_on_the_way_where_the_objective_asks() -> None:
    batch = grid_search(LocalSearch(3), step_rewards=True).collect(40, NO_EXPLORATION)
    expected = HypergridReward(6)(batch.steps["state"], batch.condition[batch.index])
    assert torch.equal(batch.steps["log_reward"], expected)


@pytest.mark.parametrize(("field", "value"), [("rounds", -1), ("back", 0.0), ("back", 1.1), ("accept", "always")])
def test_an_illegal_setting_is_named(field: str, value: object) -> None:
    with pytest.raises(ValueError, match=f"{field} = "):
        LocalSearch(**{field: value})  # type: ignore[arg-type]
