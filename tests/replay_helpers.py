"""Trajectories and entries for the tests of the replay."""

from __future__ import annotations

import torch
from torch import Generator, Tensor

from headwater.replay import (
    Diverse,
    Entries,
    Mixture,
    PerCondition,
    Recent,
    Replay,
    RewardRank,
    RewardSoftmax,
    Rule,
    Stratified,
    Uniform,
    hamming,
)
from headwater.trajectories import Trajectories

REWARDS = [0.5, -1.0, 2.0, 2.0, -3.0, 0.0, 1.0, 1.5, -0.5, 0.2]


def batch_of(
    identity: list[int],
    condition: list[float] | None = None,
    log_reward: list[float] | None = None,
    lengths: list[int] | None = None,
    serial: int = 0,
) -> Trajectories:
    """Trajectories whose every other content follows from a serial number, so that a mix-up shows."""
    count = len(identity)
    length = torch.tensor(lengths or [1] * count)
    step = torch.arange(int(length.sum())) + 1000 * serial
    return Trajectories(
        steps={"states": step[:, None].int() * torch.tensor([1, -1], dtype=torch.int32), "actions": step},
        lengths=length,
        condition=torch.tensor(condition or [0.0] * count)[:, None],
        log_reward=torch.tensor(log_reward or [0.0] * count),
        log_behaviour=torch.arange(count) - 100.0 * serial,
        version=torch.full((count,), serial),
        identity=torch.tensor(identity),
    )


def actions(batch: Trajectories) -> Tensor:
    """The last action of each trajectory, in digits, so that objects lie at different distances."""
    return batch.steps["actions"][batch.last][:, None] // torch.tensor([1, 10, 100]) % 10


def assert_same(left: dict[str, Tensor], right: dict[str, Tensor]) -> None:
    assert left.keys() == right.keys()
    for name in left:
        assert left[name].dtype == right[name].dtype
        assert torch.equal(left[name], right[name]), name


def entries_of(log_reward: list[float], condition: list[int] | None = None, recent: int = 0) -> Entries:
    count = len(log_reward)
    return Entries(
        torch.tensor(log_reward), torch.tensor(condition or [0] * count), torch.zeros(count, dtype=torch.int64), recent
    )


RULES = [
    Recent(),
    Uniform(),
    RewardSoftmax(0.7),
    RewardRank(0.1),
    Stratified(),
    Mixture(0.3, RewardRank()),
    PerCondition(Mixture(0.3, Stratified()), 4),
]


EVERY_RULE = [
    *RULES,
    RewardSoftmax(1e-3),
    RewardRank(100.0),
    Stratified(0.3, 0.5),
    Diverse(Uniform(), 3, hamming, actions),
]


def filled(rule: Rule, capacity: int = 80) -> Replay:
    replay, generator = Replay(capacity, rule), Generator().manual_seed(5)
    for serial in range(6):
        rows = torch.randint(0, 60, (40,), generator=generator)
        replay.add(
            batch_of(
                rows.tolist(),
                (rows % 3).float().tolist(),
                torch.randn(40, generator=generator).tolist(),
                torch.randint(1, 6, (40,), generator=generator).tolist(),
                serial,
            )
        )
    return replay
