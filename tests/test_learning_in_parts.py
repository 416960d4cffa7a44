"""Learning from a batch in parts: the gradient is that of the whole, in any order, and memory does not grow."""

from __future__ import annotations

from functools import cache

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from headwater.conditions import ConditionTable
from headwater.environments.base import Objects
from headwater.language.generation import Sampling
from headwater.language.policy import LanguagePolicy
from headwater.objectives import Name, Objective
from headwater.policies.base import NO_EXPLORATION
from headwater.training import ExplorationSettings, Sharpness, Trainer, Training
from headwater.trajectories import Trajectories
from helpers import seeded
from language_helpers import build_model, build_policy

NAMES: tuple[Name, ...] = ("vargrad", "tb", "rloo", "grpo")


@pytest.fixture(autouse=True)
def _one_thread() -> None:
    torch.set_num_threads(1)


@cache
def shaken_policy() -> LanguagePolicy:
    """In float64, away from its reference, with a log Z that is not zero."""
    policy = build_policy(build_model(), [[5], [6, 7, 8], [9, 10]], Sampling(max_new_tokens=6), learns_log_z=True)
    policy.double()
    with torch.no_grad():
        for parameter in policy.parameters():
            if parameter.requires_grad:
                parameter.add_(0.1 * torch.randn(parameter.shape, generator=seeded(1)).double())
    return policy


@cache
def scored_batch(count: int = 18) -> Trajectories:
    condition = (torch.arange(count) % 3).float()[:, None]
    batch = build_policy(build_model(), [[5], [6, 7, 8], [9, 10]], Sampling(max_new_tokens=6)).sample(
        condition, NO_EXPLORATION, seeded(2)
    )
    return batch.with_log_reward(torch.randn(count, generator=seeded(3)))


def no_reward(objects: Objects, condition: Tensor) -> Tensor:
    raise AssertionError("nothing is drawn here")


def gradient(name: Name, batch: Trajectories, limit: int) -> tuple[float, Tensor]:
    policy = shaken_policy()
    trainer = Trainer(
        policy, no_reward, ConditionTable(torch.zeros(1, 1)), Objective(name), Training(steps_at_once=limit),
        ExplorationSettings(epsilon=0), sharpness=Sharpness(0.5),
    )  # fmt: skip
    policy.zero_grad(set_to_none=True)
    loss, total, said = trainer._learn(batch, 0.5)
    assert total == loss  # nobody else learns
    assert len(said.forward) == batch.n_steps
    found = [parameter.grad for parameter in policy.parameters() if parameter.grad is not None]
    return loss, torch.cat([one.flatten() for one in found])


@cache
def whole(name: Name) -> tuple[float, Tensor]:
    return gradient(name, scored_batch(), 0)


@pytest.mark.parametrize("name", NAMES)
@settings(max_examples=12, deadline=None)
@given(order=st.permutations(range(18)), limit=st.integers(1, 80))
def test_any_order_and_any_split_give_the_gradient_of_the_whole_batch(name: Name, order: list[int], limit: int) -> None:
    loss, expected = whole(name)
    assert expected.norm() > 1e-3
    found_loss, found = gradient(name, scored_batch().select(torch.tensor(order)), limit)
    assert found_loss == pytest.approx(loss, rel=1e-4, abs=1e-6)
    assert (found - expected).norm() < 2e-5 * expected.norm()


def saved_at_once(count: int, limit: int) -> int:
    """The most numbers that are kept for the way back at any one time."""
    alive = [0, 0]

    class Kept:
        def __init__(self, tensor: Tensor) -> None:
            self.tensor, self.size = tensor, tensor.numel()
            alive[0] += self.size
            alive[1] = max(alive)

        def __del__(self) -> None:
            alive[0] -= self.size

    with torch.autograd.graph.saved_tensors_hooks(Kept, lambda kept: kept.tensor):
        gradient("vargrad", scored_batch(count), limit)
    return alive[1]


def test_memory_in_parts_does_not_grow_with_the_batch() -> None:
    few, many = scored_batch(60).n_steps, scored_batch(600).n_steps
    assert many > 8 * few
    assert saved_at_once(600, 0) > 6 * saved_at_once(60, 0)
    assert saved_at_once(600, 60) < 1.3 * saved_at_once(60, 60)


def test_a_policy_with_a_loss_of_its_own_is_refused_in_parts() -> None:
    from headwater.policies.base import LogProbs

    part = LogProbs(torch.zeros(1), torch.zeros(1), torch.zeros(1), auxiliary=torch.zeros(()))
    with pytest.raises(ValueError, match="steps_at_once = 0"):
        LogProbs.concatenate([part, part])
