"""Small alignments, policies with random weights and all trajectories over few leaves, for tests of phylogeny."""

from __future__ import annotations

from typing import Literal

import numpy as np
import torch
from torch import Tensor

from headwater.phylogeny.environment import Forests
from headwater.phylogeny.evidence import Evidence, LikelihoodEvidence, ParsimonyEvidence
from headwater.phylogeny.models import SubstitutionModel, process
from headwater.phylogeny.network import ForestNetwork, Lengths
from headwater.phylogeny.policy import TreePolicy
from headwater.trajectories import Trajectories
from helpers import seeded

Kind = Literal["parsimony", "likelihood"]


def patterns(n: int, sites: int = 80, seed: int = 0) -> tuple[np.ndarray, np.ndarray]:
    """Masks `[n, sites]` of leaves that each differ from some earlier one at a tenth of the sites; weights."""
    random = np.random.default_rng(seed)
    states = random.integers(4, size=(n, sites))
    for leaf in range(1, n):
        states[leaf] = states[random.integers(leaf)]
        changed = random.random(sites) < 0.1
        states[leaf, changed] = random.integers(4, size=changed.sum())
    masks = (1 << states).astype(np.uint8)
    masks[random.random(masks.shape) < 0.05] = 15
    return masks, random.integers(1, 4, size=sites).astype(np.float64)


def evidence(kind: Kind, n: int) -> Evidence:
    masks, weights = patterns(n)
    if kind == "parsimony":
        return ParsimonyEvidence(masks, weights)
    half = masks.shape[1] // 2
    models = (
        process(SubstitutionModel()),
        process(SubstitutionModel("HKY85", 4), frequencies=np.array([0.4, 0.3, 0.2, 0.1])),
    )
    parts = [(np.ascontiguousarray(masks[:, part]), weights[part]) for part in (slice(half), slice(half, None))]
    return LikelihoodEvidence([(*part, model) for part, model in zip(parts, models, strict=True)])


def random_tree_policy(
    kind: Kind, n: int, backward: Literal["uniform", "learned"] = "uniform", condition_size: int = 0,
    lengths: Lengths = "mixture", seed: int = 0,
) -> TreePolicy:  # fmt: skip
    """A policy whose pair score, zero at first, is not: no choice of its is uniform."""
    network = ForestNetwork(width=16, heads=2, pair_width=16, layers=1, lengths=lengths, bins=20)
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        policy = TreePolicy(evidence(kind, n), network, backward, condition_size)
        torch.nn.init.normal_(policy.score.out, std=0.3)
    return policy


def every_tree_trajectory(n: int) -> Tensor:
    """Merges `[T, n-1, 2]` of all trajectories over n leaves."""

    def walk(roots: list[int], done: list[tuple[int, int]]) -> list[list[tuple[int, int]]]:
        if len(roots) == 1:
            return [done]
        found = []
        for i in range(len(roots)):
            for j in range(i + 1, len(roots)):
                after = [*roots[:i], n + len(done), *roots[i + 1 : j], *roots[j + 1 :]]
                found += walk(after, [*done, (roots[i], roots[j])])
        return found

    return torch.tensor(walk(list(range(n)), []), dtype=torch.int32)


def trajectories(merges: Tensor, condition: Tensor | None = None) -> Trajectories:
    """Of trees without lengths; all under one condition row."""
    count, steps, _ = merges.shape
    asked = torch.empty(1, 0) if condition is None else condition
    return Trajectories(
        steps={"merge": merges.flatten(0, 1), "length": torch.zeros(count * steps, 2)},
        lengths=torch.full((count,), steps),
        condition=asked.expand(count, -1),
        log_reward=torch.full((count,), torch.nan),
        log_behaviour=torch.full((count,), torch.nan),
        version=torch.zeros(count, dtype=torch.int64),
        identity=torch.arange(count),
    )


def states_on_the_way(environment: Forests, merges: Tensor) -> tuple[Tensor, Tensor]:
    """The states that trajectories pass, from the initial to the finished one, int32 `[T, n, width]`, by the
    environment's own steps; and its actions, int64 `[T, n-1]`.
    """
    count, steps, _ = merges.shape
    n = steps + 1
    smallest = torch.arange(2 * n - 1).repeat(count, 1)
    states, actions = [environment.initial(count)], []
    for t in range(steps):
        a, b = smallest.gather(1, merges[:, t].long()).unbind(1)
        smallest[:, n + t] = a
        actions.append(a * (2 * n - a - 1) // 2 + b - a - 1)
        states.append(environment.step(states[-1], actions[-1]))
    return torch.stack(states, 1), torch.stack(actions, 1)


def random_merges(count: int, n: int, seed: int = 0) -> Tensor:
    """Merges `[count, n-1, 2]` of two trees at random each."""
    generator, merges = seeded(seed), torch.empty(count, n - 1, 2, dtype=torch.int32)
    for t in range(count):
        roots = list(range(n))
        for k in range(n - 1):
            i, j = sorted(torch.randperm(len(roots), generator=generator)[:2].tolist())
            merges[t, k] = torch.tensor([roots[i], roots[j]])
            roots[i] = n + k
            del roots[j]
    return merges
