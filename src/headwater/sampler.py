"""A trained sampler: all the Python that one needs to draw from a run folder."""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor

from headwater.evaluation import log_prob_of_objects, log_ratios
from headwater.policies import NO_EXPLORATION
from headwater.recipes import Problem, Recipe
from headwater.runs import Run, Samples
from headwater.settings import load_recipe
from headwater.trajectories import Trajectories


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
        which, beside the trajectory drawn, each object's log-probability is estimated: R / p are then importance
        weights whose mean is an unbiased estimate of Z. Of a sampler relative to a prior p is the probability of the
        path that drew the object over its probability under the prior, with the same use. Objects whose reward fails
        are left out.
        """
        if count < 1:
            raise ValueError(f"count = {count}: must be at least 1")
        generator = torch.Generator().manual_seed(self.recipe.seed if seed is None else seed)
        policy, reward = self.problem.policy, self.problem.reward
        asked = self.recipe.asked(count) if condition is None else self.condition(condition).expand(count, -1)
        trajectories = policy.sample(asked, NO_EXPLORATION, generator)
        trajectories = trajectories.with_log_reward(reward(policy.objects(trajectories), asked))
        trajectories = trajectories.select(~trajectories.log_reward.isnan())
        log_prob = trajectories.log_behaviour.double()
        if policy.is_relative:
            log_prob = log_ratios(policy, trajectories)
        elif policy.walks_backward:
            log_prob = self._log_prob(trajectories, walks, generator)
        return Samples(
            objects=self.recipe.text(policy.objects(trajectories)),
            log_reward=trajectories.log_reward.double().cpu().numpy(),
            log_prob=log_prob.double().cpu().numpy(),
            extra=self.recipe.condition_columns(trajectories.condition),
            names=self.recipe.sample_names,
        )

    def _log_prob(self, trajectories: Trajectories, walks: int, generator: torch.Generator) -> Tensor:
        """Log of the mean of P_F / P_B over each object's own trajectory and `walks` walks back: float64 `[T]`."""
        walked = log_prob_of_objects(self.problem.policy, trajectories, walks, generator) + math.log(walks)
        return torch.logaddexp(walked, log_ratios(self.problem.policy, trajectories)) - math.log(walks + 1)

    def condition(self, condition: Sequence[float] | None = None) -> Tensor:
        """One condition row `[1, C]`: the given one, or the recipe's default."""
        size = self.problem.conditions.size
        if condition is None:
            default = self.recipe.default_condition()
            return torch.empty(1, 0) if default is None else default
        if len(condition) != size:
            raise ValueError(f"condition {list(condition)} has {len(condition)} numbers, this sampler takes {size}")
        return torch.tensor([list(condition)], dtype=torch.float32).reshape(1, size)
