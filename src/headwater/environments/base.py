"""The Environment contract: discrete objects built step by step, batched, forward and backward symmetric.

A state is a row of integers, and a batch of states one tensor `[N, width]`. Forward actions are numbered from 0 to
`n_actions - 1`; the last one is always *exit*, which finishes the object that the state describes. Backward actions are
numbered from 0 to `n_backward_actions - 1`: each undoes one forward action (exit needs none). An environment is a set
of pure functions on batches of states: it holds no episode, so one instance serves any number of trajectories, threads
and devices.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TypeAlias

import numpy as np
import torch
from torch import Tensor

from headwater.native import kept_njit

Objects: TypeAlias = Tensor | Sequence[object]
"""T finished objects: a tensor `[T, ...]` or a sequence of T Python objects (strings, tuples)."""


@dataclass(frozen=True)
class Tokens:
    """Features that are `length` symbols out of `vocabulary`: integers `[N, length]`, each in `0 .. vocabulary - 1`."""

    length: int
    vocabulary: int


@dataclass(frozen=True)
class Dense:
    """Features that are `size` real numbers: float32 `[N, size]`."""

    size: int


@dataclass(frozen=True)
class Native:
    """The same rules as the environment's methods, for one state row, compiled with `numba.njit`.

    They let a rollout on the CPU do mask, sample, record, move and compact in one native call a step. Each function
    takes the environment's `constants` (int64 array) last or before the output, and must agree with the tensor methods:
    the checker compares.

    forward_mask(state, constants, out):  write the legality of each action, exit included, into the bool array `out`.
    step(state, action, constants):       apply a forward action other than exit, in place.
    backward_mask(state, constants, out): write the legality of each backward action into the bool array `out`.
    backward_step(state, backward_action, constants) -> action: undo in place; return the forward action that redoes it.
    owner: the class whose tensor methods these are.
    """

    forward_mask: Callable[..., None]
    step: Callable[..., None]
    backward_mask: Callable[..., None]
    backward_step: Callable[..., int]
    constants: np.ndarray
    owner: type[Environment]


_RULES = ("forward_mask", "step", "backward_mask", "backward_step", "forward_action")


class Environment(ABC):
    """A discrete space of objects and the steps that build them. See the guide "Your own environment".

    Subclasses set `n_actions` (exit, the last, included), `n_backward_actions`, `width` (integers in a state),
    `max_steps` (the most steps that a trajectory can take, exit included) and `feature_type` (what `features` returns),
    and implement the methods below. Invalid actions are never passed to `step`; the masks say which are valid.
    """

    n_actions: int
    n_backward_actions: int
    width: int
    max_steps: int
    feature_type: Tokens | Dense
    native: Native | None = None

    @property
    def rules(self) -> Native | None:
        """The native rules; None where there are none, or a subclass has overridden a method that they stand for."""
        if self.native is None:
            return None
        current = all(getattr(type(self), name) is getattr(self.native.owner, name) for name in _RULES)
        return self.native if current else None

    @property
    def exit_action(self) -> int:
        return self.n_actions - 1

    @abstractmethod
    def initial(self, count: int) -> Tensor:
        """`count` copies of the initial state: int32 `[count, width]`, on the CPU."""

    @abstractmethod
    def forward_mask(self, states: Tensor) -> Tensor:
        """Which actions are legal in each state: bool `[N, n_actions]`; at least one in every state that can be
        reached.
        """

    @abstractmethod
    def backward_mask(self, states: Tensor) -> Tensor:
        """Which backward actions are legal in each state: bool `[N, n_backward_actions]`; none in the initial state
        only.
        """

    @abstractmethod
    def step(self, states: Tensor, actions: Tensor) -> Tensor:
        """The states that `actions` (`[N]`, legal, not exit) lead to, as a new tensor."""

    @abstractmethod
    def backward_step(self, states: Tensor, backward_actions: Tensor) -> Tensor:
        """The states that legal `backward_actions` (`[N]`) lead back to, as a new tensor."""

    @abstractmethod
    def backward_action(self, states: Tensor, actions: Tensor) -> Tensor:
        """The backward action that undoes `actions` taken in `states`, in the state that they lead to: int64 `[N]`.
        For exit the value is ignored but must be a valid index."""

    @abstractmethod
    def forward_action(self, states: Tensor, backward_actions: Tensor) -> Tensor:
        """The action that leads from `backward_step(states, backward_actions)` to `states`: int64 `[N]`."""

    def features(self, states: Tensor) -> Tensor:
        """What a network sees of each state, as `feature_type` says: the state itself, as tokens, unless overridden.
        A rollout on the CPU is fastest where it is not.
        """
        return states

    @abstractmethod
    def objects(self, states: Tensor) -> Objects:
        """The finished objects that exit makes of `states`, as a reward and a person see them."""

    @abstractmethod
    def states(self, objects: Objects) -> Tensor:
        """The inverse of `objects`: int32 `[N, width]`. Raises ValueError naming an object that cannot be built."""

    def log_path_count(self, states: Tensor) -> Tensor | None:
        """Log of the number of action sequences from the initial state to each state: float64 `[N]`, or None where no
        closed form is known. The maximum-entropy backward policy follows from it (Mohammadpour et al. 2024)."""
        return None


def identity(states: Tensor) -> Tensor:
    """A 64-bit hash of each state row: int64 `[N]`. Equal rows have equal hashes on every device and in every
    process.
    """
    if states.device.type == "cpu" and states.dtype == torch.int32:
        hashes = torch.empty(states.shape[0], dtype=torch.int64)
        _hash_rows(states.detach().contiguous().numpy(), hashes.numpy())
        return hashes
    value = torch.full((states.shape[0],), _SEED, dtype=torch.int64, device=states.device)
    for column in states.to(torch.int64).unbind(1):
        value = (value ^ column) * _FACTOR  # int64 arithmetic wraps around: a multiplicative hash
        value = value ^ ((value >> 29) & 0x7_FFFF_FFFF)  # a logical shift: the arithmetic one would lose a bit a round
    return value


_SEED, _FACTOR = 0x51_7C_C1_B7_27_22_0A_95, 0x2545F4914F6CDD1D


@kept_njit()
def _hash_rows(states, out):  # type: ignore[no-untyped-def]
    for i in range(states.shape[0]):
        value = np.int64(_SEED)
        for k in range(states.shape[1]):
            value = (value ^ np.int64(states[i, k])) * np.int64(_FACTOR)
            value = value ^ ((value >> 29) & np.int64(0x7_FFFF_FFFF))
        out[i] = value
