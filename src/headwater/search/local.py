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

from dataclasses import dataclass, replace
from typing import Literal, get_args

import torch
from torch import Tensor

from headwater.policies.base import Exploration, Policy
from headwater.policies.environment_policy import EnvironmentPolicy
from headwater.reward import Reward
from headwater.trajectories import Trajectories, rows_of

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
            current, candidate, log_ratio = back_and_forth(policy, current, self.back, exploration, generator)
            candidate = candidate.with_log_reward(reward(policy.objects(candidate), candidate.condition))
            found.append(candidate)
            count -= len(candidate)
            current = self.moved(current, candidate, log_ratio, generator)
        return Trajectories.concatenate(found)

    def moved(
        self, current: Trajectories, candidate: Trajectories, log_ratio: Tensor, generator: torch.Generator
    ) -> Trajectories:
        """Where the chains at `current` (`[T]`, scored) go on from when `candidate` is proposed, `log_ratio` as
        `back_and_forth` gives it.
        """
        gain = (candidate.log_reward - current.log_reward).double()  # NaN, of a reward that failed, is never accepted
        if self.accept == "greedy":
            accepted = gain > 0
        else:
            uniform = torch.rand(len(current), generator=generator, device=generator.device).to(gain)
            accepted = uniform.log() < gain + log_ratio
        here = torch.arange(len(current), device=current.device)
        return Trajectories.concatenate([current, candidate]).select(torch.where(accepted, here + len(current), here))


def back_and_forth(
    policy: Policy,
    current: Trajectories,
    back: float,
    exploration: Exploration,
    generator: torch.Generator,
) -> tuple[Trajectories, Trajectories, Tensor]:
    """One proposal from each trajectory's object: the same objects along paths drawn anew, with their rewards; the
    candidates, not yet scored; and float64 `[T]`, what Metropolis-Hastings adds to the difference of log-rewards: -inf
    where the way back is impossible.
    """
    if not isinstance(policy, EnvironmentPolicy):
        return policy.back_and_forth(current, back, exploration, generator)
    walked = policy.sample_backward(current, generator)
    choices = _choices(policy, walked)
    limit = (back * choices).ceil().long()
    uniform = torch.rand(len(walked), generator=generator, device=generator.device).to(walked.device)
    kept = choices - 1 - (uniform * limit).long().clamp(max=limit - 1)
    middle = walked.steps["state"][walked.starts + kept]
    rest = policy.sample_from(middle, walked.condition, exploration, generator)
    candidate = _joined(walked, kept, rest)

    both = Trajectories.concatenate([walked, candidate])
    forward, backward = policy.explored_log_probs(both, exploration)
    is_after = torch.arange(both.n_steps, device=both.device) - both.starts[both.index] >= kept.repeat(2)[both.index]
    old, new = both.sum(torch.where(is_after, backward - forward, 0.0).double()).view(2, -1)
    choices_back = _choices(policy, candidate)
    limit_back = (back * choices_back).ceil()
    log_ratio = new - old + (limit / limit_back).double().log()
    log_ratio = log_ratio.masked_fill(choices_back - kept > limit_back, -torch.inf)
    return walked, replace(candidate, log_behaviour=both.sum(forward)[len(walked) :]), log_ratio


def _choices(policy: EnvironmentPolicy, batch: Trajectories) -> Tensor:
    """`[T]` int64, the steps of each trajectory without an exit that was the only action: to take that alone back would
    propose the same object again.
    """
    is_forced = policy.environment.forward_mask(policy.final_states(batch)).sum(1) == 1
    return (batch.lengths - is_forced.long()).clamp(min=1)


def _joined(walked: Trajectories, kept: Tensor, rest: Trajectories) -> Trajectories:
    """The first `kept` steps of each trajectory of `walked`, then those of `rest`."""
    first = rows_of(walked.starts, kept)
    owner = torch.repeat_interleave(kept, output_size=len(first))
    order = torch.cat([owner, rest.index]).argsort(stable=True)
    steps = {name: torch.cat([walked.steps[name][first], rest.steps[name]])[order] for name in rest.steps}
    return replace(rest, steps=steps, lengths=kept + rest.lengths)
