"""Search in the learner's own process: draw, score, remember, one batch at a time."""

from __future__ import annotations

from dataclasses import dataclass, field, replace

import torch
from torch import Tensor

from headwater.conditions import Conditions
from headwater.environments.base import Objects
from headwater.objectives import STEP_REWARD
from headwater.policies.base import Exploration, Policy
from headwater.policies.environment_policy import EnvironmentPolicy
from headwater.replay import Replay
from headwater.reward import Reward, cache_of
from headwater.search.explorer import Explorer
from headwater.search.local import LocalSearch
from headwater.trajectories import Trajectories


@dataclass
class InlineSearch:
    """Draws with `policy`, scores with `reward`, and adds what was scored to `replay`.

    group_size: how many trajectories share one condition. step_rewards: also score every state on the way, for the
    objectives that ask for it. given: final states `[N, width]` of objects to walk back from, in the place of drawing
    new ones. origin: who asked, in the table of scored objects. explorer: draws in the place of `policy`. local: local
    search from what was drawn. failed, drawn: trajectories so far whose reward failed, and all of them.
    """

    policy: Policy
    reward: Reward
    conditions: Conditions
    replay: Replay | None
    generator: torch.Generator
    group_size: int = 1
    step_rewards: bool = False
    given: Tensor | None = None
    explorer: Explorer | None = None
    local: LocalSearch = field(default_factory=LocalSearch)
    origin: str = "inline"
    failed: int = 0
    drawn: int = 0

    def collect(self, count: int, exploration: Exploration) -> Trajectories:
        """Draw `count` trajectories; the scored ones are returned and remembered, those whose reward failed are
        dropped.
        """
        chains = self.local.chains(count)  # all of them without local search
        scored = self.score(self.draw(chains, exploration))
        self.drawn += chains
        self.failed += chains - len(scored)
        if count > chains and len(scored):
            scored = Trajectories.concatenate([scored, self._searched(scored, count - chains, exploration)])
        if self.replay is not None:
            self.replay.add(scored.select(scored.log_reward.isfinite()))  # an infinite one is the loss's to refuse
        return scored

    def draw(self, count: int, exploration: Exploration) -> Trajectories:
        """`count` trajectories, not yet scored."""
        condition = self.conditions.draw(count, self.group_size, self.generator)
        if self.given is None:
            return (self.explorer or self.policy).sample(condition, exploration, self.generator)
        if not isinstance(self.policy, EnvironmentPolicy):
            raise ValueError("learning from given objects needs a policy over an environment")
        chosen = torch.randint(len(self.given), (count,), generator=self.generator)
        return self.policy.sample_to(self.given[chosen], condition, self.generator)

    def score(self, drawn: Trajectories) -> Trajectories:
        """Give the trajectories their log-rewards and drop those whose reward failed."""
        origin = self.origin if self.given is None else "given"
        return self._kept(drawn.with_log_reward(self._ask(self.policy.objects(drawn), drawn.condition, origin)))

    def _searched(self, scored: Trajectories, count: int, exploration: Exploration) -> Trajectories:
        """What local search finds around trajectories that were scored."""
        if not isinstance(self.policy, EnvironmentPolicy):
            raise ValueError("local search needs a policy over an environment")

        def reward(objects: Objects, condition: Tensor) -> Tensor:
            return self._ask(objects, condition, f"{self.origin}, local search")

        found = self.local.candidates(self.policy, reward, scored, count, exploration, self.generator)
        kept = self._kept(found)
        self.drawn += len(found)
        self.failed += len(found) - len(kept)
        return kept

    def _kept(self, scored: Trajectories) -> Trajectories:
        """Drop the trajectories whose reward failed, and score the states on the way where that is asked for."""
        failed = scored.log_reward.isnan()
        if failed.any():
            scored = scored.select(~failed)
        return self.with_step_rewards(scored) if self.step_rewards else scored

    def with_step_rewards(self, batch: Trajectories) -> Trajectories:
        """Score every state on the way, as if it were finished there; trajectories where one fails are dropped."""
        if not isinstance(self.policy, EnvironmentPolicy):
            raise ValueError("rewards of states on the way need a policy over an environment")
        objects = self.policy.environment.objects(batch.steps["state"])
        step_reward = self._ask(objects, batch.condition[batch.index], f"{self.origin}, on the way")
        scored = replace(batch, steps={**batch.steps, STEP_REWARD: step_reward})
        failed = batch.sum(step_reward.isnan().int()) > 0
        return scored.select(~failed) if failed.any() else scored

    def _ask(self, objects: Objects, condition: Tensor, origin: str) -> Tensor:
        """The reward, which writes down when it was asked and by whom."""
        cache = cache_of(self.reward)
        if cache is not None and cache.table is not None:
            cache.table.origin, cache.table.iteration = origin, self.policy.version
        return self.reward(objects, condition)
