"""The Explorer contract: a policy that searches in the sampler's place, and learns beside it what to search for."""

from __future__ import annotations

from abc import abstractmethod

import torch
from torch import Tensor, nn

from headwater.environments.base import Objects
from headwater.objectives import Objective
from headwater.policies.base import LogProbs, Policy
from headwater.trajectories import Trajectories


class Explorer(Policy):
    """Draws trajectories for `student`, the policy that is to become the sampler and remains what is evaluated.

    own: what an explorer learns besides the student. All of it is in a run's checkpoint, apart from the student.
    `log_behaviour` of what it draws is under the member (the head, the teacher, the student) that drew it.
    """

    def __init__(self, student: Policy, own: nn.Module) -> None:
        super().__init__()
        self.student, self.own = student, own

    @property
    def learns(self) -> bool:
        """Whether it has weights of its own to learn, and is not a way to search alone."""
        return any(parameter.requires_grad for parameter in self.own.parameters())

    @abstractmethod
    def loss(
        self, objective: Objective, log_probs: LogProbs, batch: Trajectories, generator: torch.Generator
    ) -> Tensor:
        """What the explorer learns from a batch that the student, whose `log_probs` are given, learns from by
        `objective`: a scalar, without gradient in the student's heads and log Z.
        """

    def log_probs(self, trajectories: Trajectories) -> LogProbs:
        return self.student.log_probs(trajectories)

    def objects(self, trajectories: Trajectories) -> Objects:
        return self.student.objects(trajectories)

    def sample_backward(self, trajectories: Trajectories, generator: torch.Generator) -> Trajectories:
        return self.student.sample_backward(trajectories, generator)
