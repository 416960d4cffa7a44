"""The settings of training: how long and how fast to learn, and how sharp a target."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal


@dataclass(frozen=True)
class Training:
    """How long and how fast to learn."""

    iterations: int = 5000
    """Gradient steps."""
    batch_size: int = 16
    """Fresh trajectories an iteration."""
    replayed: int = 0
    """Trajectories an iteration drawn from the replay besides the fresh ones."""
    warm_up: int = 0
    """Trajectories drawn and scored for the replay before the first update, with epsilon = 1: at random, or where there
    is a prior, by it."""
    replay_backward: bool = False
    """Walk a new path back from each replayed object, in the place of the remembered one."""
    only_replayed: bool = False
    """Learn from the replay alone: what is fresh gets there first."""
    group_size: int = 1
    """Fresh trajectories that share one condition; at least 2 for vargrad under conditions."""
    learning_rate: float = 1e-3
    """Adam's rate for the networks."""
    log_z_learning_rate: float = 0.1
    """Adam's rate for log Z."""
    schedule: Literal["constant", "linear", "cosine"] = "linear"
    """How the rates fall from their start to zero."""
    clip_gradient: float = 10.0
    """Largest norm of a gradient; 0 for no limit."""
    steps_at_once: int = 0
    """Steps of trajectories whose activations are held at once; a larger batch is learned from in parts, with the same
    gradient. 0 for no limit."""
    log_every: int = 50
    """Iterations between logged metrics."""
    evaluate_every: int = 1000
    """Iterations between evaluations."""
    checkpoint_every: int = 1000
    """Iterations between checkpoints."""

    def __post_init__(self) -> None:
        for name in ("iterations", "batch_size", "group_size", "log_every", "evaluate_every", "checkpoint_every"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} = {getattr(self, name)}: must be at least 1")
        for name in ("replayed", "warm_up", "clip_gradient", "log_z_learning_rate", "steps_at_once"):
            if getattr(self, name) < 0:
                raise ValueError(f"{name} = {getattr(self, name)}: must not be negative")
        if self.only_replayed and not self.replayed:
            raise ValueError("only_replayed: replayed = 0 leaves nothing to learn from; set it to a batch's size")
        if self.warm_up and not self.replayed:
            raise ValueError(f"warm_up = {self.warm_up}: fills the replay, which replayed = 0 leaves unused")
        if not self.learning_rate > 0:
            raise ValueError(f"learning_rate = {self.learning_rate}: must be positive")

    def rate(self, progress: float) -> float:
        """The factor on the learning rates after `progress`, the share of the run that is done."""
        if self.schedule == "linear":
            return 1 - progress
        return 0.5 * (1 + math.cos(math.pi * progress)) if self.schedule == "cosine" else 1.0


@dataclass(frozen=True)
class Sharpness:
    """The beta of the target P_B exp(r / beta), where the reward says r and P_B is a reference such as a language model
    to start from; it may change as the run goes on. At small beta the target is sharp, around the largest rewards; at
    large beta it stays near the reference, since beta is the weight of the divergence from it beside the mean reward.
    """

    beta: float = 1.0
    """At the start."""
    beta_end: float | None = None
    """At the end of the fall; the same as at the start if not given."""
    until: float = 1.0
    """Share of the run over which beta falls, or rises, linearly."""
    per_staleness: float = 0.0
    """Beta is larger by this share of itself for each update that the batch is behind, on average."""

    def __post_init__(self) -> None:
        for name in ("beta", "beta_end"):
            value = getattr(self, name)
            if value is not None and not 0 < value < math.inf:
                raise ValueError(f"{name} = {value}: must be positive")
        if not 0 < self.until <= 1:
            raise ValueError(f"until = {self.until}: must be above 0 and at most 1")
        if not 0 <= self.per_staleness < math.inf:
            raise ValueError(f"per_staleness = {self.per_staleness}: must not be negative")

    def at(self, progress: float, staleness: float = 0.0) -> float:
        """After `progress`, the share of the run that is done, for a batch so many updates behind."""
        end = self.beta if self.beta_end is None else self.beta_end
        beta = self.beta + (end - self.beta) * min(progress / self.until, 1.0)
        return beta * (1 + self.per_staleness * staleness)
