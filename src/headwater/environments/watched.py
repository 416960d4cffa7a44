"""An environment under watch, and the evidence that is gathered on it.

Here every answer of an environment is checked by itself; the checker compares answers with each other.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from typing import Literal, TypeAlias

import torch
from torch import Tensor

from headwater.environments.base import Dense, Environment, Objects, identity
from headwater.environments.graph import StateGraph

_MOST_STATES = 2_000
_MOST_STEPS = 20_000

Kind: TypeAlias = Literal[
    "raises",
    "shape",
    "dtype",
    "range",
    "impure",
    "initial",
    "dead end",
    "max_steps",
    "cycle",
    "inverse",
    "masks",
    "reachable",
    "batch",
    "device",
    "objects",
    "distinct",
    "native",
    "paths",
]
"""What a fault is about; the guide "Your own environment" explains each."""


@dataclass(frozen=True)
class Fault:
    """One breach of the contract, with a state that shows it (None where no single state does)."""

    kind: Kind
    message: str
    state: tuple[int, ...] | None = None

    def __str__(self) -> str:
        return f"{self.kind}: {self.message}" + (f", at state {list(self.state)}" if self.state is not None else "")


def first(kind: Kind, message: str, bad: Tensor, states: Tensor) -> list[Fault]:
    """A fault that shows the first of the `bad` rows (bool `[N]`) of `states`, or none where no row is bad."""
    if not bad.any():
        return []
    return [Fault(kind, message, tuple(states[bad][0].tolist()))]


class Broken(Exception):
    """A call broke the contract; the check that made it cannot go on."""

    def __init__(self, fault: Fault) -> None:
        super().__init__(str(fault))
        self.fault = fault


class Watched(Environment):
    """The environment, each call checked by itself: that it does not raise, the shape and type of its answer, its
    inputs left alone.

    Raises Broken with the fault. Methods get copies of their inputs: one that writes into them is noted in `impure`
    and harms no check.
    """

    def __init__(self, environment: Environment) -> None:
        self.inner, self.native = environment, environment.rules
        self.impure: list[Fault] = []
        for name in ("n_actions", "n_backward_actions", "width", "max_steps", "feature_type"):
            setattr(self, name, getattr(environment, name))

    def initial(self, count: int) -> Tensor:
        states = self._rows("initial", self._call("initial", count), count, self.width, torch.int32)
        if not states.is_contiguous():
            raise Broken(Fault("shape", "initial: rows share memory or are not contiguous; a rollout writes into them"))
        return states

    def forward_mask(self, states: Tensor) -> Tensor:
        mask = self._call("forward_mask", states)
        return self._rows("forward_mask", mask, len(states), self.n_actions, torch.bool)

    def backward_mask(self, states: Tensor) -> Tensor:
        mask = self._call("backward_mask", states)
        return self._rows("backward_mask", mask, len(states), self.n_backward_actions, torch.bool)

    def step(self, states: Tensor, actions: Tensor) -> Tensor:
        return self._rows("step", self._call("step", states, actions), len(states), self.width, torch.int32)

    def backward_step(self, states: Tensor, backward_actions: Tensor) -> Tensor:
        parents = self._call("backward_step", states, backward_actions)
        return self._rows("backward_step", parents, len(states), self.width, torch.int32)

    def backward_action(self, states: Tensor, actions: Tensor) -> Tensor:
        backward_actions = self._call("backward_action", states, actions)
        return self._numbers("backward_action", backward_actions, states, self.n_backward_actions)

    def forward_action(self, states: Tensor, backward_actions: Tensor) -> Tensor:
        actions = self._call("forward_action", states, backward_actions)
        return self._numbers("forward_action", actions, states, self.n_actions - 1)

    def features(self, states: Tensor) -> Tensor:
        features, expected = self._call("features", states), self.feature_type
        if isinstance(expected, Dense):
            self._rows("features", features, len(states), expected.size, torch.float32)
            self._no_bad("features are not finite", ~features.isfinite(), states)
        else:
            self._rows("features", features, len(states), expected.length, torch.int32, torch.int64, torch.uint8)
            message = f"features have tokens outside 0 .. {expected.vocabulary - 1}"
            self._no_bad(message, (features < 0) | (features >= expected.vocabulary), states)
        return features

    def objects(self, states: Tensor) -> Objects:
        objects: Objects = self._call("objects", states)
        if len(objects) != len(states):
            raise Broken(Fault("shape", f"objects: {len(objects)} objects of {len(states)} states"))
        return objects

    def states(self, objects: Objects) -> Tensor:
        return self._rows("states", self._call("states", objects), len(objects), self.width, torch.int32)

    def log_path_count(self, states: Tensor) -> Tensor | None:
        counts = self._call("log_path_count", states)
        return counts if counts is None else self._rows("log_path_count", counts, len(states), None, torch.float64)

    def counted(self, states: Tensor) -> Tensor:
        """`log_path_count` of an environment that has one."""
        counts = self.log_path_count(states)
        if counts is None:
            raise Broken(Fault("batch", "log_path_count is None for some states and not for others"))
        return counts

    def _call(self, name: str, *inputs: Objects | int):  # type: ignore[no-untyped-def]
        copies = [value.clone() if isinstance(value, Tensor) else value for value in inputs]
        try:
            answer = getattr(self.inner, name)(*copies)
        except Exception as error:
            raise Broken(Fault("raises", f"{name}: {type(error).__name__}: {error}")) from error
        for value, copy in zip(inputs, copies, strict=True):
            if isinstance(value, Tensor) and isinstance(copy, Tensor) and not torch.equal(value, copy):
                fault = Fault("impure", f"{name} changes its input in place")
                self.impure.extend([fault] if fault not in self.impure else [])
        return answer

    @staticmethod
    def _rows(name: str, answer: object, count: int, width: int | None, *dtypes: torch.dtype) -> Tensor:
        """`answer`, if it is a tensor `[count, width]` (`[count]` where width is None) of one of `dtypes`."""
        if not isinstance(answer, Tensor):
            raise Broken(Fault("dtype", f"{name} returns {type(answer).__name__}, expected a tensor"))
        if answer.dtype not in dtypes:
            raise Broken(Fault("dtype", f"{name} returns {answer.dtype}, expected {dtypes[0]}"))
        if answer.shape != ((count,) if width is None else (count, width)):
            expected = "[N]" if width is None else f"[N, {width}]"
            raise Broken(Fault("shape", f"{name} returns {list(answer.shape)} for N = {count}, expected {expected}"))
        return answer

    def _numbers(self, name: str, answer: object, states: Tensor, end: int) -> Tensor:
        numbers = self._rows(name, answer, len(states), None, torch.int64)
        self._no_bad(f"{name} is outside 0 .. {end - 1}", (numbers < 0) | (numbers >= end), states)
        return numbers

    @staticmethod
    def _no_bad(message: str, bad: Tensor, states: Tensor) -> None:
        for fault in first("range", message, bad if bad.ndim == 1 else bad.any(1), states):
            raise Broken(fault)


class Evidence:
    """What the checks look at.

    Each part is made when a check first asks for it, and raises Broken if the environment breaks on it. `visited` and
    `graph` are filled by the first checks.
    """

    def __init__(self, environment: Watched, limit: int, seed: int, walks: int) -> None:
        self.environment, self.limit, self.walks = environment, limit, walks
        self.generator = torch.Generator().manual_seed(seed)
        self.visited: list[Tensor] = []
        self.graph: StateGraph | None = None

    @cached_property
    def states(self) -> Tensor:
        """Distinct states that can be reached, the initial state first."""
        states = torch.cat([self.environment.initial(1), *self.visited])
        if self.graph is not None:
            states = torch.cat([states, self.some(self.graph.states, _MOST_STATES)])
        return states[~repeated(states)]

    @cached_property
    def forward(self) -> tuple[Tensor, Tensor]:
        """States and legal actions, exit excepted."""
        return self._pairs(self.environment.forward_mask(self.states)[:, :-1])

    @cached_property
    def backward(self) -> tuple[Tensor, Tensor]:
        """States and legal backward actions."""
        return self._pairs(self.environment.backward_mask(self.states))

    @cached_property
    def final(self) -> Tensor:
        """States that may exit, all of them where the environment is enumerated."""
        if self.graph is not None:
            return self.graph.states[self.graph.terminal]
        return self.states[self.environment.forward_mask(self.states)[:, -1]]

    def some(self, rows: Tensor, most: int) -> Tensor:
        """At most `most` rows, drawn without replacement."""
        return rows if len(rows) <= most else rows[torch.randperm(len(rows), generator=self.generator)[:most]]

    def _pairs(self, mask: Tensor) -> tuple[Tensor, Tensor]:
        pairs = self.some(mask.nonzero(), _MOST_STEPS)
        return self.states[pairs[:, 0]], pairs[:, 1]


def repeated(rows: Tensor) -> Tensor:
    """Which rows are equal to an earlier one: bool `[N]`."""
    hashes = identity(rows)
    order = hashes.argsort(stable=True)
    repeated = torch.zeros(len(rows), dtype=torch.bool)
    repeated[order[1:]] = hashes[order[1:]] == hashes[order[:-1]]
    return repeated
