"""The settings of exploration: how search departs from the policy, and who draws in its place."""

from __future__ import annotations

from dataclasses import dataclass, field

from headwater.policies.base import Exploration, Policy
from headwater.policies.environment_policy import EnvironmentPolicy
from headwater.search.explorer import Explorer
from headwater.search.local import LocalSearch
from headwater.search.teacher import Teacher, TeacherSettings
from headwater.search.thompson import Thompson, ThompsonSettings


@dataclass(frozen=True)
class ExplorationSettings:
    """How the search departs from the policy while training."""

    epsilon: float = 0.1
    """Probability of a uniform legal action in the place of the policy's, at the start."""
    epsilon_end: float = 0.0
    """The same, after the decay."""
    decay: float = 0.5
    """Share of the run over which epsilon falls linearly."""
    temperature: float = 1.0
    """Temperature of the policy that searches; above 1 flattens it."""
    average: float = 0.0
    """Search with an exponential moving average of the weights: its decay, such as 0.99; 0 searches with the weights
    themselves.
    """
    local_search: LocalSearch = field(default_factory=LocalSearch)
    """Back-and-forth local search from what was drawn."""
    thompson: ThompsonSettings = field(default_factory=ThompsonSettings)
    """Thompson sampling by bootstrapped heads."""
    teacher: TeacherSettings = field(default_factory=TeacherSettings)
    """The adaptive teacher."""

    def __post_init__(self) -> None:
        for name in ("epsilon", "epsilon_end", "decay"):
            if not 0 <= getattr(self, name) <= 1:
                raise ValueError(f"{name} = {getattr(self, name)}: must lie between 0 and 1")
        if not 0 <= self.average < 1:
            raise ValueError(f"average = {self.average}: must be at least 0 and below 1")
        if not self.temperature > 0:
            raise ValueError(f"temperature = {self.temperature}: must be positive")
        if self.thompson.heads and (self.teacher.share or self.average):
            other = "teacher.share" if self.teacher.share else "average"
            raise ValueError(f"thompson.heads = {self.thompson.heads}: must be 0 where {other} says who draws")

    def explorer(self, student: Policy) -> Explorer | None:
        """Who draws in the place of `student`; None for the student itself. Raises ValueError for a policy that cannot
        be searched in the way that is asked for."""
        if self.local_search.rounds and not student.searches_locally:
            raise ValueError(f"{type(student).__name__} has no local search: local_search.rounds must be 0")
        if not (self.thompson.heads or self.teacher.share):
            return None
        if not isinstance(student, EnvironmentPolicy):
            raise ValueError("Thompson sampling and the teacher need a policy over an environment")
        if self.thompson.heads:
            return Thompson(student, self.thompson)
        return Teacher(student, self.teacher) if self.teacher.share else None

    def at(self, progress: float) -> Exploration:
        """The exploration after `progress`, the share of the run that is done."""
        left = max(0.0, 1 - progress / self.decay) if self.decay else 0.0
        return Exploration(self.epsilon_end + (self.epsilon - self.epsilon_end) * left, self.temperature)
