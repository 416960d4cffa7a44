"""Thompson sampling by bootstrapped heads (Rector-Brooks et al. 2023, arXiv 2306.17693): K forward heads on the
sampler's torso, each of which sees part of the trajectories only. One head, chosen at random, draws a trajectory from
beginning to end, so search follows a guess to where it leads; where data are few the heads disagree and search wide.

The sampler keeps a head of its own, which learns from every trajectory, and is what is evaluated and drawn from after
training: it has seen all the data and no prior, and it is a plain policy, so nothing else needs to know of the
ensemble. Each exploring head adds to its logits a fixed random function of the state (a randomised prior, Osband et
al. 2018, arXiv 1806.03335), so that the heads differ where nothing has been learnt.
"""

from __future__ import annotations

import copy
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional

from headwater.objectives import Objective
from headwater.policies.base import Exploration, LogProbs
from headwater.policies.environment_policy import EnvironmentPolicy
from headwater.policies.layers import Linear
from headwater.policies.native_log_probs import NEVER
from headwater.search.explorer import Explorer
from headwater.trajectories import Trajectories, rows_of


@dataclass(frozen=True)
class ThompsonSettings:
    """Thompson sampling: bootstrapped heads that draw the trajectories."""

    heads: int = 0
    """Bootstrapped forward heads, K; 0 for none."""
    bootstrap: float = 0.5
    """Probability with which a head learns from a trajectory, above 0."""
    prior: float = 1.0
    """Standard deviation of the fixed random logits that are added to each head's."""

    def __post_init__(self) -> None:
        if self.heads < 0:
            raise ValueError(f"heads = {self.heads}: must not be negative")
        if not 0 < self.bootstrap <= 1:
            raise ValueError(f"bootstrap = {self.bootstrap}: must be above 0, at most 1")
        if not self.prior >= 0:
            raise ValueError(f"prior = {self.prior}: must not be negative")


class Heads(nn.Module):
    """K heads over a torso's hidden units, each the sum of a learnt layer and of a fixed random network."""

    def __init__(self, policy: EnvironmentPolicy, settings: ThompsonSettings) -> None:
        super().__init__()
        width = policy.heads.weight.shape[0]
        self.count, self.n_actions, self.scale = settings.heads, policy.environment.n_actions, settings.prior
        self.environment = policy.environment
        self.learnt = Linear(width, self.count * self.n_actions)
        self.prior_torso = copy.deepcopy(policy.torso).requires_grad_(False)
        self.prior = nn.Linear(width, self.count * self.n_actions, bias=False).requires_grad_(False)
        nn.init.normal_(self.prior.weight, std=width**-0.5)  # on normalised inputs, logits of unit variance

    def forward(self, hidden: Tensor, states: Tensor) -> Tensor:
        """hidden `[n, network width]` of `states` -> logits `[n, K, actions]`."""
        logits = self.learnt(hidden)
        if self.scale:
            with torch.no_grad():
                random = self.prior_torso(self.environment.features(states), None)
                prior = self.prior(functional.layer_norm(random, random.shape[1:]))
            logits = logits + self.scale * prior
        return logits.float().view(-1, self.count, self.n_actions)


class Thompson(Explorer):
    """Draws each trajectory with one of the heads; each head learns the sampler's objective on its bootstrap."""

    student: EnvironmentPolicy
    own: Heads

    def __init__(self, student: EnvironmentPolicy, settings: ThompsonSettings) -> None:
        super().__init__(student, Heads(student, settings))
        self.settings = settings

    def sample(self, condition: Tensor, exploration: Exploration, generator: torch.Generator) -> Trajectories:
        chosen = torch.randint(self.own.count, (len(condition),), generator=generator, device=generator.device)
        chosen = chosen.to(condition.device)

        def head(hidden: Tensor, states: Tensor, ids: Tensor) -> Tensor:
            return self.own(hidden, states)[torch.arange(len(ids), device=ids.device), chosen[ids]]

        return self.student.sample_from(None, condition, exploration, generator, head)

    def loss(
        self, objective: Objective, log_probs: LogProbs, batch: Trajectories, generator: torch.Generator
    ) -> Tensor:
        """The mean of `objective` over all pairs of a head and a trajectory that it learns from, in one packed batch.
        log Z, flows and P_B are the sampler's.
        """
        chance = torch.rand(self.own.count, len(batch), generator=generator, device=generator.device)
        chosen, trajectory = (chance < self.settings.bootstrap).to(batch.device).nonzero(as_tuple=True)
        if not len(chosen):
            return log_probs.log_z.new_zeros(())
        states, actions = batch.steps["state"], batch.steps["action"]
        mask = self.student.environment.forward_mask(states)[:, None]
        every = self.own(self.student.hidden(batch), states).masked_fill(~mask, NEVER).log_softmax(2)
        taken = every.gather(2, actions[:, None, None].expand(-1, self.own.count, 1))[:, :, 0]

        pairs = batch.select(trajectory)
        rows, owner = rows_of(batch.starts[trajectory], batch.lengths[trajectory]), chosen[pairs.index]
        of_heads = LogProbs(
            forward=taken[rows, owner],
            backward=log_probs.backward.detach()[rows],
            log_z=log_probs.log_z.detach()[trajectory],
            log_flow=None if log_probs.log_flow is None else log_probs.log_flow.detach()[rows],
            log_exit=every[rows, owner, self.student.environment.exit_action],
        )
        return objective(of_heads, pairs)
