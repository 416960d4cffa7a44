"""A trained sampler: all the Python that one needs to draw from a run folder."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor

from headwater.evaluation import log_prob_of_objects
from headwater.policies import NO_EXPLORATION
from headwater.recipes import Problem, Recipe
from headwater.runs import Run, Samples
from headwater.settings import load_recipe


class Sampler:
    """Draws objects from a trained policy.

    >>> from headwater import Sampler
    >>> Sampler.load("runs/rna").sample(1000).objects  # doctest: +SKIP
    """

    def __init__(self, recipe: Recipe, problem: Problem) -> None:
        self.recipe, self.problem = recipe, problem

    @staticmethod
    def load(folder: str | Path) -> Sampler:
        """Load the newest checkpoint of a run. Raises FileNotFoundError or ValueError naming what is missing or
        broken.
        """
        run = Run.open(Path(folder))
        recipe = load_recipe(run)
        checkpoint = run.latest_checkpoint()
        if checkpoint is None:
            raise FileNotFoundError(f"{folder} has no checkpoint yet; go on with: headwater resume {folder}")
        problem = recipe.problem()
        weights = checkpoint.tensors.get("average", checkpoint.tensors["policy"])
        try:
            problem.policy.load_state_dict(weights)
        except RuntimeError as error:
            raise ValueError(f"{folder}: the checkpoint does not fit the settings: {error}") from error
        problem.policy.version = int(str(checkpoint.state.get("version", 0)))
        problem.policy.requires_grad_(False)
        return Sampler(recipe, problem)

    def sample(
        self, count: int, condition: Sequence[float] | None = None, seed: int | None = None, walks: int = 10
    ) -> Samples:
        """Draw `count` objects, with repeats, in proportion to their reward.

        condition: C numbers, for a conditional sampler. seed: for the same draws again. walks: backward walks with
        which each object's log-probability is estimated. Objects whose reward fails are left out.
        """
        if count < 1:
            raise ValueError(f"count = {count}: must be at least 1")
        generator = torch.Generator().manual_seed(self.recipe.seed if seed is None else seed)
        row = self.condition(condition)
        policy, reward = self.problem.policy, self.problem.reward
        asked = row.expand(count, -1)
        trajectories = policy.sample(asked, NO_EXPLORATION, generator)
        trajectories = trajectories.with_log_reward(reward(policy.objects(trajectories), asked))
        trajectories = trajectories.select(~trajectories.log_reward.isnan())
        if policy.walks_backward:
            log_prob = log_prob_of_objects(policy, trajectories, walks, generator)
        else:
            log_prob = trajectories.log_behaviour
        return Samples(
            objects=self.recipe.text(policy.objects(trajectories)),
            log_reward=trajectories.log_reward.double().numpy(),
            log_prob=log_prob.double().numpy(),
        )

    def condition(self, condition: Sequence[float] | None = None) -> Tensor:
        """One condition row `[1, C]`: the given one, or the recipe's default."""
        size = self.problem.conditions.size
        if condition is None:
            default = self.recipe.default_condition()
            return torch.empty(1, 0) if default is None else default
        if len(condition) != size:
            raise ValueError(f"condition {list(condition)} has {len(condition)} numbers, this sampler takes {size}")
        return torch.tensor([list(condition)], dtype=torch.float32).reshape(1, size)
