"""The adaptive teacher (Kim et al. 2025, arXiv 2410.01432): a second policy that learns to draw what the student does
not yet know, and draws a share of the trajectories that both learn from.

With delta = log R + log P_B - log Z - log P_F of the student's trajectory, positive where the student draws too rarely,
the teacher balances

    log R_T = log(epsilon + (1 + C [delta > 0]) delta^2) + alpha log R,        C = 19, epsilon = 1e-3
"""

from __future__ import annotations

import copy
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from headwater.objectives import Objective, path_log_ratio, trajectory_residual
from headwater.policies.base import Exploration, LogProbs
from headwater.policies.environment_policy import EnvironmentPolicy
from headwater.search.explorer import Explorer
from headwater.trajectories import Trajectories

UNDERSAMPLED = 19.0
"""C: how much more an object weighs that the student draws too rarely."""
SMALLEST = 1e-3
"""epsilon: the reward that is left where the student knows all."""


@dataclass(frozen=True)
class TeacherSettings:
    """A second policy that draws what the sampler does not yet know."""

    share: float = 0.0
    """Share of the fresh trajectories that the teacher draws; 0 for no teacher."""
    alpha: float = 0.0
    """Exponent of the reward in the teacher's: above 0 it prefers what is good among what is not known."""

    def __post_init__(self) -> None:
        if not 0 <= self.share <= 1:
            raise ValueError(f"share = {self.share}: must lie between 0 and 1")
        if not self.alpha >= 0:
            raise ValueError(f"alpha = {self.alpha}: must not be negative")


class Teacher(Explorer):
    """Each trajectory is the teacher's with probability `share`, the student's otherwise."""

    student: EnvironmentPolicy
    own: EnvironmentPolicy

    def __init__(self, student: EnvironmentPolicy, settings: TeacherSettings) -> None:
        teacher = copy.deepcopy(student).requires_grad_(True)
        with torch.no_grad():
            teacher.log_z.zero_()
        super().__init__(student, teacher)
        self.settings = settings

    def log_z_parameters(self) -> list[nn.Parameter]:
        return self.own.log_z_parameters()

    def sample(self, condition: Tensor, exploration: Exploration, generator: torch.Generator) -> Trajectories:
        self.own.version = self.student.version
        uniform = torch.rand(len(condition), generator=generator, device=generator.device).to(condition.device)
        taught = uniform < self.settings.share
        drawn = Trajectories.concatenate(
            [policy.sample(condition[rows], exploration, generator)
             for policy, rows in ((self.own, taught), (self.student, ~taught))]
        )  # fmt: skip
        return drawn.select(taught.logical_not().to(torch.int8).argsort(stable=True).argsort())

    def loss(
        self, objective: Objective, log_probs: LogProbs, batch: Trajectories, generator: torch.Generator
    ) -> Tensor:
        """Trajectory balance of the teacher with its own reward."""
        with torch.no_grad():
            delta = batch.log_reward - path_log_ratio(log_probs, batch) - objective.log_z(log_probs, batch)
            lesson = batch.with_log_reward(teacher_log_reward(delta, batch.log_reward, self.settings.alpha))
        return trajectory_residual(self.own.log_probs(batch), lesson).square().mean()


def teacher_log_reward(delta: Tensor, log_reward: Tensor, alpha: float) -> Tensor:
    """log R_T, `[T]`, of the student's residuals `delta` and log-rewards, both `[T]`."""
    weight = torch.where(delta > 0, 1 + UNDERSAMPLED, 1.0)
    surprise = (SMALLEST + weight * delta.square()).log()
    return surprise + alpha * log_reward if alpha else surprise
