"""One search: draw with a policy, score with a reward. It keeps nothing and knows no replay, so it runs in the
learner's process or in any other just the same.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Protocol, cast

import torch
from torch import Tensor

from headwater.conditions import Conditions
from headwater.objectives import STEP_REWARD
from headwater.policies.base import Exploration, Policy
from headwater.policies.environment_policy import EnvironmentPolicy
from headwater.reward import Reward
from headwater.trajectories import Trajectories


@dataclass(frozen=True)
class Drawn:
    """What one search came to.

    trajectories: those that the reward could score; an infinite log-reward is the loss's to refuse.
    drawn, failed: how many were drawn, and how many of them were dropped since their reward failed.
    """

    trajectories: Trajectories
    drawn: int
    failed: int


@dataclass
class Searcher:
    """Draws with `policy` and scores with `reward`.

    group_size: how many trajectories share one condition. step_rewards: also score every state on the way, for the
    objectives that ask for it. given: final states `[N, width]` of objects to walk back from, in the place of drawing
    new ones. origin: who searches, for a reward that keeps a table of what it has scored.
    """

    policy: Policy
    reward: Reward
    conditions: Conditions
    group_size: int = 1
    step_rewards: bool = False
    given: Tensor | None = None
    origin: str = "inline"

    @property
    def drawing(self) -> Policy:
        """What draws: all that a searcher in another process must have the newest weights of."""
        return self.policy

    @property
    def device(self) -> torch.device:
        """Where the policy's weights are."""
        return next((parameter.device for parameter in self.policy.parameters()), torch.device("cpu"))

    def collect(self, count: int, exploration: Exploration, generator: torch.Generator) -> Drawn:
        """Draw and score `count` trajectories; every random number comes from `generator`."""
        sign(self.reward, self.origin, self.policy.version)
        scored = self.score(self.draw(count, exploration, generator))
        return Drawn(scored, count, count - len(scored))

    def draw(self, count: int, exploration: Exploration, generator: torch.Generator) -> Trajectories:
        """`count` trajectories, not yet scored."""
        condition = self.conditions.draw(count, self.group_size, generator)
        if self.given is None:
            return self.drawing.sample(condition, exploration, generator)
        if not isinstance(self.policy, EnvironmentPolicy):
            raise ValueError("learning from given objects needs a policy over an environment")
        chosen = torch.randint(len(self.given), (count,), generator=generator)
        return self.policy.sample_to(self.given[chosen], condition, generator)

    def score(self, drawn: Trajectories) -> Trajectories:
        """Give the trajectories their log-rewards and drop those whose reward failed."""
        scored = drawn.with_log_reward(self.reward(self.policy.objects(drawn), drawn.condition))
        failed = scored.log_reward.isnan()
        if failed.any():
            scored = scored.select(~failed)
        return self.with_step_rewards(scored) if self.step_rewards else scored

    def with_step_rewards(self, batch: Trajectories) -> Trajectories:
        """Score every state on the way, as if it were finished there; trajectories where one fails are dropped."""
        if not isinstance(self.policy, EnvironmentPolicy):
            raise ValueError("rewards of states on the way need a policy over an environment")
        objects = self.policy.environment.objects(batch.steps["state"])
        step_reward = self.reward(objects, batch.condition[batch.index])
        scored = replace(batch, steps={**batch.steps, STEP_REWARD: step_reward})
        failed = batch.sum(step_reward.isnan().int()) > 0
        return scored.select(~failed) if failed.any() else scored


class Keeper(Protocol):
    """What keeps a table of the objects that were scored, with who asked and after how many updates."""

    origin: str
    iteration: int

    def flush(self) -> None:
        """Write down what is not yet written."""


def keepers(reward: Reward) -> Iterator[Keeper]:
    """What keeps scored objects in a reward, or in any reward that it wraps."""
    layer: object = reward
    while layer is not None:
        for each in (layer, getattr(layer, "table", None)):
            if hasattr(each, "origin") and hasattr(each, "iteration") and hasattr(each, "flush"):
                yield cast("Keeper", each)
        layer = getattr(layer, "reward", None) or getattr(layer, "_reward", None)


def sign(reward: Reward, origin: str, iteration: int) -> None:
    """Tell whatever keeps scored objects who asks, and after how many updates."""
    for keeper in keepers(reward):
        keeper.origin, keeper.iteration = origin, iteration
