"""Back-and-forth local search (LS-GFN, Kim et al. 2024, arXiv 2310.02710): take the last steps of a trajectory back,
take others in their place, and go on from the result if it is accepted.

One round is one step of a Markov chain over objects x. A path to x is drawn by the backward policy, a number of its
last steps is dropped, and the forward policy, as it explores, finishes what is left. Metropolis-Hastings acceptance
makes R(x) / Z the invariant distribution of that chain, whatever the two policies are: with s the state in the middle
and n the number of cuts that are possible,

    log a = log R(x') - log R(x) + log P_B(s <- x') - log P_F(s -> x') - log P_B(s <- x) + log P_F(s -> x) + log n / n'

where P_F is the policy that drew, exploration included. The last term, not in the paper, is for objects of unlike
lengths.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, get_args

import torch
from torch import Tensor

from headwater.policies.base import Exploration, Policy
from headwater.reward import Reward
from headwater.trajectories import Trajectories

Accept = Literal["metropolis-hastings", "greedy"]


@dataclass(frozen=True)
class LocalSearch:
    """Back-and-forth local search from what was drawn: part of the trajectories of an iteration come from it."""

    rounds: int = 0
    """Rounds from each object: of rounds + 1 trajectories one is drawn from the start. 0 for no local search."""
    back: float = 0.5
    """Largest share of a trajectory's steps that a round takes back, above 0."""
    accept: Accept = "metropolis-hastings"
    """When a chain moves: metropolis-hastings, or greedy, to better rewards only. All candidates are learnt from."""

    def __post_init__(self) -> None:
        if self.rounds < 0:
            raise ValueError(f"rounds = {self.rounds}: must not be negative")
        if not 0 < self.back <= 1:
            raise ValueError(f"back = {self.back}: must be above 0, at most 1")
        if self.accept not in get_args(Accept):
            raise ValueError(f"accept = {self.accept!r}: must be one of {', '.join(get_args(Accept))}")

    def chains(self, count: int) -> int:
        """How many of `count` trajectories are drawn from the start."""
        return -(-count // (self.rounds + 1))

    def candidates(
        self,
        policy: Policy,
        reward: Reward,
        start: Trajectories,
        count: int,
        exploration: Exploration,
        generator: torch.Generator,
    ) -> Trajectories:
        """What the chains from the objects of `start` (scored) propose, accepted or not: at most `count` trajectories,
        scored, NaN where the reward failed. `log_behaviour` is the log-probability of the whole trajectory under the
        forward policy as it explores, as if that had drawn all of it.
        """
        found: list[Trajectories] = []
        current = start
        for _ in range(self.rounds):
            current = current.select(torch.arange(min(len(current), count), device=current.device))
            if found and not len(current):
                break
            current, candidate, log_ratio = policy.back_and_forth(current, self.back, exploration, generator)
            candidate = candidate.with_log_reward(reward(policy.objects(candidate), candidate.condition))
            found.append(candidate)
            count -= len(candidate)
            current = self.moved(current, candidate, log_ratio, generator)
        return Trajectories.concatenate(found)

    def moved(
        self, current: Trajectories, candidate: Trajectories, log_ratio: Tensor, generator: torch.Generator
    ) -> Trajectories:
        """Where the chains at `current` (`[T]`, scored) go on from when `candidate` is proposed, `log_ratio` as
        `Policy.back_and_forth` gives it.
        """
        gain = (candidate.log_reward - current.log_reward).double()  # NaN, of a reward that failed, is never accepted
        if self.accept == "greedy":
            accepted = gain > 0
        else:
            uniform = torch.rand(len(current), generator=generator, device=generator.device).to(gain)
            accepted = uniform.log() < gain + log_ratio
        here = torch.arange(len(current), device=current.device)
        return Trajectories.concatenate([current, candidate]).select(torch.where(accepted, here + len(current), here))
