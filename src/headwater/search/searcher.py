"""One search: draw with a policy, score with a reward. It keeps nothing and knows no replay, so it runs in the
learner's process or in any other just the same.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor

from headwater.conditions import Conditions
from headwater.environments.base import Objects
from headwater.objectives import STEP_REWARD
from headwater.policies.base import Exploration, Policy
from headwater.policies.environment_policy import EnvironmentPolicy
from headwater.reward import Reward, cache_of
from headwater.search.explorer import Explorer
from headwater.search.local import LocalSearch
from headwater.trajectories import Trajectories


@dataclass(frozen=True)
class Drawn:
    """What one search came to.

    trajectories: those that the reward could score; an infinite log-reward is the loss's to refuse.
    drawn, failed: how many were drawn, and how many of them were dropped since their reward failed.
    failures: how often the reward failed meanwhile, by kind, where it tells kinds.
    """

    trajectories: Trajectories
    drawn: int
    failed: int
    failures: Mapping[str, int] = field(default_factory=dict)


@dataclass(frozen=True)
class Calls:
    """Objects whose rewards were asked for, and those of them that had to be evaluated, since nobody knew them."""

    requested: int
    evaluated: int

    def __add__(self, other: Calls) -> Calls:
        return Calls(self.requested + other.requested, self.evaluated + other.evaluated)

    def __sub__(self, other: Calls) -> Calls:
        return Calls(self.requested - other.requested, self.evaluated - other.evaluated)


@dataclass
class Searcher:
    """Draws with `policy` and scores with `reward`.

    group_size: how many trajectories share one condition. step_rewards: also score every state on the way, for the
    objectives that ask for it. given: final states `[N, ...]` of objects for the policy to walk back from, in the place
    of drawing new ones. explorer: draws in the place of `policy`, which is its student. local: local search from what
    was drawn. origin: who asks, in the table of scored objects.
    """

    policy: Policy
    reward: Reward
    conditions: Conditions
    group_size: int = 1
    step_rewards: bool = False
    given: Tensor | None = None
    explorer: Explorer | None = None
    local: LocalSearch = field(default_factory=LocalSearch)
    origin: str = "inline"

    @property
    def drawing(self) -> Policy:
        """What draws: all that a searcher in another process must have the newest weights of."""
        return self.explorer or self.policy

    @property
    def device(self) -> torch.device:
        """Where the policy's weights are."""
        return next((parameter.device for parameter in self.policy.parameters()), torch.device("cpu"))

    @property
    def calls(self) -> Calls | None:
        """What the reward was asked for in this process; None where it does not count."""
        cache = cache_of(self.reward)
        return None if cache is None else Calls(cache.requested, cache.evaluated)

    def collect(self, count: int, exploration: Exploration, generator: torch.Generator) -> Drawn:
        """Draw and score `count` trajectories; every random number comes from `generator`."""
        before = self._failures()
        drawn = self._collect(count, exploration, generator)
        return replace(drawn, failures=dict(self._failures() - before))

    def _failures(self) -> Counter[str]:
        """How often the reward has failed in this process, by kind; empty where it does not tell kinds."""
        return Counter(getattr(self.reward, "failures", {}))

    def _collect(self, count: int, exploration: Exploration, generator: torch.Generator) -> Drawn:
        chains = self.local.chains(count)  # all of them without local search
        scored = self.score(self.draw(chains, exploration, generator))
        drawn = Drawn(scored, chains, chains - len(scored))
        if count == chains or not len(scored):
            return drawn
        around = self._search_around(scored, count - chains, exploration, generator)
        both = Trajectories.concatenate([scored, around.trajectories])
        return Drawn(both, chains + around.drawn, drawn.failed + around.failed)

    def draw(self, count: int, exploration: Exploration, generator: torch.Generator) -> Trajectories:
        """`count` trajectories, not yet scored."""
        condition = self.conditions.draw(count, self.group_size, generator)
        if self.given is None:
            return self.drawing.sample(condition, exploration, generator)
        chosen = torch.randint(len(self.given), (count,), generator=generator)
        return self.policy.sample_to(self.given[chosen], condition, generator)

    def score(self, drawn: Trajectories) -> Trajectories:
        """Give the trajectories their log-rewards and drop those whose reward failed."""
        origin = self.origin if self.given is None else "given"
        return self._kept(drawn.with_log_reward(self._ask(self.policy.objects(drawn), drawn.condition, origin)))

    def _search_around(
        self, scored: Trajectories, count: int, exploration: Exploration, generator: torch.Generator
    ) -> Drawn:
        """What local search finds around trajectories that were scored."""

        def reward(objects: Objects, condition: Tensor) -> Tensor:
            return self._ask(objects, condition, f"{self.origin}, local search")

        found = self.local.candidates(self.policy, reward, scored, count, exploration, generator)
        kept = self._kept(found)
        return Drawn(kept, len(found), len(found) - len(kept))

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
