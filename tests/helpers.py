"""What several test files need: policies with random weights, and log-probabilities by brute force."""

from __future__ import annotations

import torch
from torch import Tensor

from headwater.environments.base import Environment
from headwater.environments.graph import enumerate_states
from headwater.policies import EnvironmentPolicy, Network
from headwater.policies.environment_policy import Backward
from headwater.trajectories import Trajectories


def seeded(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def random_policy(
    environment: Environment,
    backward: Backward = "learned",
    condition_size: int = 0,
    torso: str = "mlp",
    seed: int = 0,
    scale: float = 0.5,
) -> EnvironmentPolicy:
    """A policy whose heads, zero at first, hold random numbers: nothing that it says is uniform."""
    network = Network(torso=torso, width=32, heads=4)  # type: ignore[arg-type]
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        policy = EnvironmentPolicy(environment, network, backward, condition_size)
        torch.nn.init.normal_(policy.heads.weight, std=scale)
        torch.nn.init.normal_(policy.heads.bias, std=scale)
    return policy


def every_trajectory(environment: Environment, condition: Tensor | None = None) -> Trajectories:
    """All trajectories of a small environment, by walking every path of its state graph; log-rewards are NaN."""
    graph = enumerate_states(environment, 1000)
    steps_from: dict[int, list[tuple[int, int]]] = {}
    for source, target, action in zip(graph.source.tolist(), graph.target.tolist(), graph.action.tolist(), strict=True):
        steps_from.setdefault(source, []).append((target, action))
    paths: list[list[tuple[int, int]]] = []

    def walk(state: int, path: list[tuple[int, int]]) -> None:
        if graph.terminal[state]:
            paths.append([*path, (state, environment.exit_action)])
        for target, action in steps_from.get(state, []):
            walk(target, [*path, (state, action)])

    walk(0, [])
    rows = torch.tensor([step for path in paths for step in path])
    count = len(paths)
    asked = torch.empty(1, 0) if condition is None else condition
    final = torch.tensor([path[-1][0] for path in paths])
    return Trajectories(
        steps={"state": graph.states[rows[:, 0]], "action": rows[:, 1]},
        lengths=torch.tensor([len(path) for path in paths]),
        condition=asked.expand(count, -1),
        log_reward=torch.full((count,), torch.nan),
        log_behaviour=torch.zeros(count),
        version=torch.zeros(count, dtype=torch.int64),
        identity=final,
    )


def same(left: Trajectories, right: Trajectories) -> bool:
    """Whether two batches are equal to the last bit, NaN equal to NaN."""
    a, b = left.tensors(), right.tensors()
    return a.keys() == b.keys() and all(
        a[name].dtype == b[name].dtype
        and a[name].shape == b[name].shape
        and torch.equal(a[name].nan_to_num(12345.0), b[name].nan_to_num(12345.0))
        for name in a
    )
