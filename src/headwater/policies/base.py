"""The Policy contract. Every domain meets the core here: a policy draws trajectories and says how likely given
trajectories are.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from headwater.environments.base import Environment, Objects
from headwater.trajectories import Trajectories


@dataclass(frozen=True)
class LogProbs:
    """What a policy says of a batch of T trajectories with S steps, differentiable in its parameters.

    forward:   `[S]`, log P_F of each step taken.
    backward:  `[S]`, log of the reference path measure: the backward policy's probability of undoing the step, or the
               reference model's or the prior's of taking it.
    log_z:     `[T]`, the policy's log-partition function at each trajectory's condition.
    log_flow:  `[S]`, log F of the state that each step leaves, or None where the policy has no flow head.
    log_exit:  `[S]`, log P_F(exit | state) of the state that each step leaves, or None where exit is no action.
    auxiliary: scalar, a loss of the policy's own that is added to the objective (such as TLM for its backward policy).
    """

    forward: Tensor
    backward: Tensor
    log_z: Tensor
    log_flow: Tensor | None = None
    log_exit: Tensor | None = None
    auxiliary: Tensor | None = None

    @staticmethod
    def concatenate(parts: Sequence[LogProbs]) -> LogProbs:
        """Of one batch, from what was said of its consecutive parts. Raises ValueError where there is an auxiliary
        loss, which may depend on the whole."""
        if any(part.auxiliary is not None for part in parts):
            raise ValueError("this policy has a loss of its own, which cannot be learned in parts: steps_at_once = 0")
        columns = {name: [getattr(part, name) for part in parts] for name in _TENSORS}
        return LogProbs(**{name: torch.cat(values) for name, values in columns.items() if values[0] is not None})

    def as_leaves(self) -> LogProbs:
        """The same numbers, as what a gradient is asked for."""
        leaves = {name: tensor.detach().requires_grad_() for name, tensor in self.tensors().items()}
        return LogProbs(**leaves)

    def split_gradients(self, parts: Sequence[Trajectories]) -> list[dict[str, Tensor]]:
        """The gradients at these leaves, by name, cut into those of consecutive parts of the batch."""
        cut = []
        for name, tensor in self.tensors().items():
            if tensor.grad is not None:
                rows = [len(part) if name == "log_z" else part.n_steps for part in parts]
                cut.append([(name, piece) for piece in torch.split(tensor.grad, rows)])
        return [dict(pieces) for pieces in zip(*cut, strict=True)]

    def backward_with(self, upstream: dict[str, Tensor]) -> None:
        """Carry gradients on from here to the parameters."""
        pairs = [(getattr(self, name), gradient) for name, gradient in upstream.items()]
        pairs = [(tensor, gradient) for tensor, gradient in pairs if tensor.requires_grad]
        torch.autograd.backward([tensor for tensor, _ in pairs], [gradient for _, gradient in pairs])

    def zeros_for(self, part: Trajectories) -> LogProbs:
        """Zeros in the shape of what would be said of another batch."""
        rows = {name: len(part) if name == "log_z" else part.n_steps for name in _TENSORS}
        return LogProbs(**{name: tensor.new_zeros(rows[name]) for name, tensor in self.tensors().items()})

    def tensors(self) -> dict[str, Tensor]:
        """What is there, by name, without the auxiliary loss."""
        return {name: getattr(self, name) for name in _TENSORS if getattr(self, name) is not None}


_TENSORS = ("forward", "backward", "log_z", "log_flow", "log_exit")


@dataclass(frozen=True)
class Exploration:
    """How sampling departs from the policy: with probability `epsilon` a uniform legal action, else the policy at
    `temperature`.
    """

    epsilon: float = 0.0
    temperature: float = 1.0

    def __post_init__(self) -> None:
        if not 0 <= self.epsilon <= 1:
            raise ValueError(f"epsilon = {self.epsilon}: must lie between 0 and 1")
        if not self.temperature > 0:
            raise ValueError(f"temperature = {self.temperature}: must be positive")


NO_EXPLORATION = Exploration()


class Policy(nn.Module):
    """Draws trajectories, and says how likely given trajectories are.

    `version` counts the updates that its weights have seen; `sample` writes it into what it draws.
    """

    version: int = 0
    is_relative: bool = False
    """Whether `LogProbs.backward` is what a prior says of the same path, and not how likely a walk back would take it:
    the ratio of both is then that of the path's probability to the prior's."""

    @abstractmethod
    def sample(self, condition: Tensor, exploration: Exploration, generator: torch.Generator) -> Trajectories:
        """Draw one trajectory for each row of `condition` (`[T, C]`; C = 0 for none), without gradient."""

    @abstractmethod
    def log_probs(self, trajectories: Trajectories) -> LogProbs:
        """Log-probabilities of given trajectories, with gradient. They may come from anywhere."""

    @abstractmethod
    def objects(self, trajectories: Trajectories) -> Objects:
        """The finished objects of the trajectories, as a reward takes them."""

    def sample_backward(self, trajectories: Trajectories, generator: torch.Generator) -> Trajectories:
        """New trajectories that end in the same objects, walked backward from them; `log_behaviour` is then the
        log-probability of that walk. Raises TypeError for a policy that cannot walk backward."""
        raise TypeError(f"{type(self).__name__} cannot walk backward from finished objects")

    def remembered(self, trajectories: Trajectories) -> Trajectories:
        """What a replay must keep of trajectories for `sample_backward` to walk back from them: everything, unless a
        policy can do with less."""
        return trajectories

    @property
    def walks_backward(self) -> bool:
        """Whether `sample_backward` is there to be used."""
        return type(self).sample_backward is not Policy.sample_backward

    def sample_to(self, states: Tensor, condition: Tensor, generator: torch.Generator | None = None) -> Trajectories:
        """Trajectories to given final states `[T, ...]`, not yet scored, to learn from in the place of new ones. Raises
        ValueError for a policy that has none."""
        raise ValueError(f"{type(self).__name__} cannot learn from given objects: it has no trajectories to them")

    def back_and_forth(
        self, current: Trajectories, back: float, exploration: Exploration, generator: torch.Generator
    ) -> tuple[Trajectories, Trajectories, Tensor]:
        """One proposal of local search from each trajectory: at most a share `back` of its last steps is taken back, at
        least one, and drawn anew as `exploration` says.

        Returns the trajectories as they were, or other paths to the same objects with their rewards; the candidates,
        not yet scored; and float64 `[T]`, what Metropolis-Hastings adds to the difference of log-rewards: -inf where
        the way back is impossible. Raises TypeError for a policy without local search."""
        raise TypeError(f"{type(self).__name__} has no local search")

    @property
    def searches_locally(self) -> bool:
        """Whether `back_and_forth` is there to be used."""
        return type(self).back_and_forth is not Policy.back_and_forth

    def published(self) -> dict[str, Tensor]:
        """What a searcher elsewhere must have the newest of, by name: the very tensors, to copy from and into."""
        return dict(self.state_dict())

    def measures(self, log_probs: LogProbs, batch: Trajectories) -> dict[str, float]:
        """Figures of this policy's own for the metrics, of a batch that it has just learned from."""
        return {}

    def after_update(self) -> None:
        """Called when the weights have changed, with `version` already counted."""

    def log_z_parameters(self) -> list[nn.Parameter]:
        """The parameters of the log-partition function, which learn at a rate of their own."""
        return []


class StatePolicy(Policy, ABC):
    """A policy over the states of a discrete environment, any of which it can be asked about by itself."""

    environment: Environment

    @abstractmethod
    def action_log_probs(self, states: Tensor, condition: Tensor) -> Tensor:
        """log P_F of every action in each of N states under one condition row `[1, C]`: `[N, n_actions]`, very low
        where illegal.
        """

    @abstractmethod
    def sample_to(self, states: Tensor, condition: Tensor, generator: torch.Generator | None = None) -> Trajectories:
        """Trajectories to given final `states` (`[T, width]`, as `environment.states(objects)` gives them), drawn by
        the backward policy.
        """
