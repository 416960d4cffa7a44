"""What a rollout computed, as the start of learning: the numbers of a forward pass, never those of other weights."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import pytest
import torch
from torch import Tensor, nn

from headwater.environments.base import Environment
from headwater.environments.hypergrid import Hypergrid
from headwater.environments.sequences import Sequences
from headwater.environments.sets import Sets
from headwater.environments.slots import Slots
from headwater.objectives import Objective
from headwater.policies import EnvironmentPolicy, Exploration, Network, rollout
from headwater.policies.layers import Activations
from headwater.policies.native_network import MOST_ROWS
from headwater.trajectories import Trajectories
from helpers import random_policy, seeded

ENVIRONMENTS: dict[str, Environment] = {
    "grid": Hypergrid(3, 4),
    "append": Sequences("ACGU", 5),
    "prepend-append": Sequences("AB", 4, 0, "prepend-append"),
    "slots": Slots(3, 4),
    "sets": Sets(6, 3),
}


def drawn(policy: EnvironmentPolicy, count: int = 30, epsilon: float = 0.3) -> Trajectories:
    condition = torch.randn(count, policy.condition_size, generator=seeded(1))
    return policy.sample(condition, Exploration(epsilon), seeded(2))


def again(batch: Trajectories) -> Trajectories:
    """The same trajectories, as if they came from elsewhere."""
    return replace(batch, steps={name: tensor.clone() for name, tensor in batch.steps.items()})


def known(policy: EnvironmentPolicy, batch: Trajectories) -> Activations | None:
    embedded = policy.embed_condition(batch.condition) if policy.condition_size else None
    return policy._known_activations(batch, embedded)


def values_and_gradients(policy: EnvironmentPolicy, batch: Trajectories) -> list[Tensor]:
    said = policy.log_probs(batch)
    assert said.log_flow is not None
    parts = [said.forward, said.backward, said.log_flow, said.log_z]
    loss = sum((part * torch.randn(part.shape, generator=seeded(3))).sum() for part in parts)
    assert isinstance(loss, Tensor)
    policy.zero_grad()
    loss.backward()  # type: ignore[no-untyped-call]
    gradients = [torch.zeros_like(p) if p.grad is None else p.grad for p in policy.parameters()]
    return [part.detach() for part in [*parts, *gradients]]


def assert_same_learning(policy: EnvironmentPolicy, batch: Trajectories) -> None:
    for ours, reference in zip(
        values_and_gradients(policy, batch), values_and_gradients(policy, again(batch)), strict=True
    ):
        torch.testing.assert_close(ours, reference, rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("environment", ENVIRONMENTS.values(), ids=ENVIRONMENTS.keys())
@pytest.mark.parametrize("condition_size", [0, 2])
def test_learning_from_what_a_rollout_computed_is_learning_from_a_forward_pass(
    environment: Environment, condition_size: int
) -> None:
    policy = random_policy(environment, "learned", condition_size)
    batch = drawn(policy)
    assert known(policy, batch) is not None
    assert known(policy, again(batch)) is None
    assert_same_learning(policy, batch)
    assert_same_learning(policy, batch)  # what is known is still known after it was used


@pytest.mark.parametrize("width", [20, 100, 336])
@pytest.mark.parametrize("layers", [1, 3])
def test_it_is_so_at_every_width_and_depth(width: int, layers: int) -> None:
    torch.manual_seed(0)
    policy = EnvironmentPolicy(Sequences("ACGU", 5), Network(width=width, layers=layers), "learned")
    nn.init.normal_(policy.heads.weight, std=0.3)
    batch = drawn(policy)
    assert known(policy, batch) is not None
    assert_same_learning(policy, batch)


def test_a_state_that_many_trajectories_share_is_run_once() -> None:
    policy = random_policy(Sequences("AC", 4))
    batch = drawn(policy)
    activations = known(policy, batch)
    assert activations is not None
    assert activations.count == len(torch.unique(batch.steps["state"], dim=0)) < batch.n_steps


def adam(policy: EnvironmentPolicy) -> None:
    optimizer = torch.optim.Adam(policy.parameters(), lr=1e-3, fused=True)  # tells autograd of no change
    policy.log_probs(policy.sample(torch.randn(4, policy.condition_size))).forward.sum().backward()  # type: ignore[no-untyped-call]
    optimizer.step()


def one_bit(policy: EnvironmentPolicy) -> None:
    weight = policy.torso.hidden.data
    weight[0, 3, 5] = torch.nextafter(weight[0, 3, 5], torch.tensor(9.0))


def other_condition(policy: EnvironmentPolicy) -> None:
    assert isinstance(policy.embed_condition[-1], nn.Linear)
    policy.embed_condition[-1].bias.data[0] += 1


CHANGES: dict[str, Callable[[EnvironmentPolicy], object]] = {
    "step": adam,
    "load": lambda policy: policy.load_state_dict(random_policy(Hypergrid(3, 4), "learned", 2, seed=1).state_dict()),
    "bit": one_bit,
    "first layer": lambda policy: policy.torso.table.data.mul_(1.5),
    "other tensor": lambda policy: setattr(policy.torso, "bias", nn.Parameter(policy.torso.bias + 1)),
    "condition": other_condition,
}


@pytest.mark.parametrize("change", CHANGES.values(), ids=CHANGES.keys())
def test_what_other_weights_gave_is_not_used(change: Callable[[EnvironmentPolicy], object]) -> None:
    policy = random_policy(Hypergrid(3, 4), "learned", 2)
    batch = drawn(policy)
    last = policy._last_rollout
    change(policy)
    policy._last_rollout = last  # also where the change itself drew something
    assert known(policy, batch) is None
    assert_same_learning(policy, batch)


def test_what_the_rollout_of_another_batch_gave_is_not_used() -> None:
    policy = random_policy(Hypergrid(3, 4))
    batch = drawn(policy)
    half = batch.select(torch.arange(15))
    assert known(policy, half) is None
    assert known(policy, replace(batch, lengths=batch.lengths.flip(0))) is None
    assert known(policy, Trajectories.concatenate([batch, half])) is None
    batch.steps["state"][3] += 1
    assert known(policy, batch) is None
    before = drawn(policy)
    drawn(policy, 5)
    assert known(policy, before) is None


def test_a_head_changes_freely_since_what_is_known_lies_below_it() -> None:
    policy = random_policy(Hypergrid(3, 4))
    batch = drawn(policy)
    policy.heads.weight.data.mul_(2)
    assert known(policy, batch) is not None
    assert_same_learning(policy, batch)


def test_large_batches_and_very_long_walks_are_not_kept(monkeypatch: pytest.MonkeyPatch) -> None:
    policy = random_policy(Hypergrid(2, 100), scale=0.1)
    policy.heads.bias.data[2] = -9.0  # exit is rare: walks outgrow the room that they start with
    long = drawn(policy, 4, 0.0)
    activations = known(policy, long)
    assert long.n_steps > 64 * 4
    assert activations is not None
    assert_same_learning(policy, long)
    monkeypatch.setattr(rollout, "_MOST_KEPT", activations.layers.numel() // 4)
    same = drawn(policy, 4, 0.0)
    assert torch.equal(same.steps["state"], long.steps["state"])
    assert known(policy, same) is None
    assert known(policy, drawn(policy, MOST_ROWS + 1)) is None


def test_two_losses_of_one_batch_may_be_added() -> None:
    policy = random_policy(Sequences("ACGU", 5), "learned")
    batch = drawn(policy).with_log_reward(torch.zeros(30))
    first = Objective("tb")(policy.log_probs(batch), batch)
    second = Objective("db")(policy.log_probs(batch), batch)
    (first + second).backward()  # type: ignore[no-untyped-call]
    together = [p.grad for p in policy.parameters() if p.grad is not None]
    policy.zero_grad()
    for name in ("tb", "db"):
        Objective(name)(policy.log_probs(again(batch)), batch).backward()  # type: ignore[no-untyped-call, arg-type]
    for ours, reference in zip(together, [p.grad for p in policy.parameters() if p.grad is not None], strict=True):
        torch.testing.assert_close(ours, reference, rtol=1e-3, atol=1e-4)
