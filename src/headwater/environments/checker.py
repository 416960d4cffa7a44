"""The environment checker: does an environment keep the contract of `Environment`, and if not, where does it break?

Every call goes through `_Watched`, which sees to what each single answer must be: its shape, its type, inputs left alone. The checks
below it compare answers with each other, on states from random walks and, where the environment is small enough, on all of them.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Hashable, Iterable
from dataclasses import dataclass, field
from typing import Literal, TypeAlias

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from headwater.environments.base import Dense, Environment, Objects, Tokens, identity
from headwater.environments.graph import CyclicGraph, StateGraph, TooManyStates, enumerate_states

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

_MOST_STATES, _MOST_PAIRS, _MOST_SLOW = 2_000, 20_000, 200
_GUARD = 64


@dataclass(frozen=True)
class Fault:
    """One breach of the contract, with a state that shows it (None where no single state does)."""

    kind: Kind
    message: str
    state: tuple[int, ...] | None = None

    def __str__(self) -> str:
        return f"{self.kind}: {self.message}" + (f", at state {list(self.state)}" if self.state is not None else "")


@dataclass(frozen=True)
class CheckReport:
    """What the checker found. `print(report)` shows one line a check.

    checks: each check's title and its faults, or a string that says why it was not made. n_states, n_objects and n_trajectories (action
    sequences from the initial state to exit) are exact, or None where the environment was not enumerated.
    """

    environment: str
    checks: dict[str, list[Fault] | str]
    n_states: int | None = None
    n_objects: int | None = None
    n_trajectories: int | None = None
    notes: list[str] = field(default_factory=list)

    @property
    def faults(self) -> list[Fault]:
        return [fault for found in self.checks.values() if not isinstance(found, str) for fault in found]

    @property
    def ok(self) -> bool:
        return not self.faults

    def __str__(self) -> str:
        verdict = "keeps the contract" if self.ok else f"{len(self.faults)} fault{'s' if len(self.faults) > 1 else ''}"
        lines = [f"{self.environment}: {verdict}"]
        if self.n_states is not None:
            lines.append(f"  {self.n_states:,} states, {self.n_objects:,} objects, {self.n_trajectories:,} trajectories")
        for title, found in self.checks.items():
            if isinstance(found, str):
                lines.append(f"  skip   {title}: {found}")
            elif not found:
                lines.append(f"  ok     {title}")
            lines.extend(f"  FAULT  {title}: {fault}" for fault in found if isinstance(fault, Fault))
        return "\n".join(lines + [f"  note   {note}" for note in self.notes])


def check_environment(environment: Environment, limit: int = 50_000, seed: int = 0, walks: int = 64) -> CheckReport:
    """Check `environment` against the contract, whatever it does: faults are reported, never raised.

    An environment of at most `limit` states is enumerated, and its objects and trajectories counted. A larger one is checked on
    `walks` random walks, drawn with `seed`.
    """
    name = type(environment).__name__
    watched = _Watched(environment)
    checks: dict[str, list[Fault] | str] = {}
    checks["the attributes fit together"] = _guard(lambda: _attributes(environment))
    if checks["the attributes fit together"]:
        return CheckReport(name, checks)
    walk = _Walks(watched, walks, torch.Generator().manual_seed(seed))
    checks["walks forward end in time"] = _guard(walk.draw)
    graph = _Enumeration(watched, limit)
    checks["there are no cycles"] = _guard(graph.build)
    subject = _Subject.of(watched, walk, graph.graph, seed)
    for title, check in _CHECKS.items():
        checks[title] = _guard(lambda check=check: check(subject))  # type: ignore[misc]
    checks["inputs are left as they were"] = watched.impure
    checks = _without_repeats(checks)
    if graph.graph is None:
        return CheckReport(name, checks)
    into = graph.graph.path_counts()
    terminal = graph.graph.terminal.tolist()
    trajectories = sum(count for count, ends in zip(into, terminal, strict=True) if ends)
    return CheckReport(name, checks, len(into), sum(terminal), trajectories, _twin_steps(graph.graph))


class _Broken(Exception):
    """A call broke the contract; the check that made it cannot go on."""

    def __init__(self, fault: Fault) -> None:
        super().__init__(str(fault))
        self.fault = fault


class _Watched(Environment):
    """The environment, each call checked by itself. Methods get copies, so one that writes into them harms no check."""

    def __init__(self, environment: Environment) -> None:
        self.inner, self.native = environment, environment.native
        self.impure: list[Fault] = []

    def adopt(self) -> None:
        """Take over the attributes, once they are known to be good."""
        for name in ("n_actions", "n_backward_actions", "width", "max_steps", "feature_type"):
            setattr(self, name, getattr(self.inner, name))

    def initial(self, count: int) -> Tensor:
        states = self._rows("initial", self._call("initial", count), count, self.width, torch.int32)
        if not states.is_contiguous():
            raise _Broken(Fault("shape", "initial: rows share memory or are not contiguous; a rollout writes into them"))
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
            raise _Broken(Fault("shape", f"objects: {len(objects)} objects of {len(states)} states"))
        return objects

    def states(self, objects: Objects) -> Tensor:
        return self._rows("states", self._call("states", objects), len(objects), self.width, torch.int32)

    def log_path_count(self, states: Tensor) -> Tensor | None:
        counts = self._call("log_path_count", states)
        return counts if counts is None else self._rows("log_path_count", counts, len(states), None, torch.float64)

    def _call(self, name: str, *inputs: Objects | int):  # type: ignore[no-untyped-def]
        copies = [value.clone() if isinstance(value, Tensor) else value for value in inputs]
        try:
            answer = getattr(self.inner, name)(*copies)
        except Exception as error:
            raise _Broken(Fault("raises", f"{name}: {type(error).__name__}: {error}")) from error
        for value, copy in zip(inputs, copies, strict=True):
            if isinstance(value, Tensor) and isinstance(copy, Tensor) and not torch.equal(value, copy):
                self.impure.append(Fault("impure", f"{name} changes its input in place"))
        return answer

    @staticmethod
    def _rows(name: str, answer: object, count: int, width: int | None, *dtypes: torch.dtype) -> Tensor:
        """`answer`, if it is a tensor `[count, width]` (`[count]` where width is None) of one of `dtypes`."""
        if not isinstance(answer, Tensor):
            raise _Broken(Fault("dtype", f"{name} returns {type(answer).__name__}, expected a tensor"))
        if answer.dtype not in dtypes:
            raise _Broken(Fault("dtype", f"{name} returns {answer.dtype}, expected {dtypes[0]}"))
        if answer.shape != ((count,) if width is None else (count, width)):
            expected = "[N]" if width is None else f"[N, {width}]"
            raise _Broken(Fault("shape", f"{name} returns {list(answer.shape)} for N = {count}, expected {expected}"))
        return answer

    def _numbers(self, name: str, answer: object, states: Tensor, end: int) -> Tensor:
        numbers = self._rows(name, answer, len(states), None, torch.int64)
        self._no_bad(f"{name} is outside 0 .. {end - 1}", (numbers < 0) | (numbers >= end), states)
        return numbers

    @staticmethod
    def _no_bad(message: str, bad: Tensor, states: Tensor) -> None:
        for fault in _first("range", message, bad.reshape(len(states), -1).any(1), states):
            raise _Broken(fault)


def _attributes(environment: Environment) -> list[Fault]:
    found = []
    for name in ("n_actions", "n_backward_actions", "width", "max_steps"):
        value = getattr(environment, name)
        if not isinstance(value, int) or value < 1:
            found.append(Fault("range", f"{name} = {value!r}: must be an integer of at least 1"))
    if not isinstance(environment.feature_type, Tokens | Dense):
        found.append(Fault("dtype", f"feature_type = {environment.feature_type!r}: must be Tokens or Dense"))
    return found


class _Walks:
    """Random walks from the initial state. Every other one puts exit off as long as it can, so as to see long trajectories."""

    def __init__(self, environment: _Watched, count: int, generator: torch.Generator) -> None:
        self.environment, self.count, self.generator = environment, count, generator
        self.visited: list[Tensor] = []

    def draw(self) -> list[Fault]:
        self.environment.adopt()
        environment, exit_action = self.environment, self.environment.n_actions - 1
        states, ids = environment.initial(self.count), torch.arange(self.count)
        seen, faults = [], []
        for _ in range(environment.max_steps):
            self.visited.append(states)
            seen.append(torch.cat([ids[:, None].int(), states], 1))
            mask = environment.forward_mask(states)
            stuck = ~mask.any(1)
            faults += _first("dead end", "no action is legal", stuck, states)
            states, ids, mask = states[~stuck], ids[~stuck], mask[~stuck]
            if not len(states):
                break
            mask[:, exit_action] &= (ids % 2 == 0) | ~mask[:, :exit_action].any(1)
            actions = torch.multinomial(mask.float(), 1, generator=self.generator)[:, 0]
            going = actions != exit_action
            ids = ids[going]
            states = environment.step(states[going], actions[going])
        message = f"a walk does not end within max_steps = {environment.max_steps} steps, exit included"
        faults += _first("max_steps", message, torch.ones(len(states), dtype=torch.bool), states)
        steps = torch.cat(seen)
        return faults + _first("cycle", "a walk comes back to a state", _repeats(identity(steps)), steps[:, 1:])


class _Enumeration:
    """The state graph, where it is small enough and has no cycle."""

    def __init__(self, environment: _Watched, limit: int) -> None:
        self.environment, self.limit = environment, limit
        self.graph: StateGraph | None = None

    def build(self) -> list[Fault] | str:
        try:
            self.graph = enumerate_states(self.environment, self.limit)
        except TooManyStates:
            return f"more than {self.limit:,} states; only walks were checked"
        except CyclicGraph as error:
            return [Fault("cycle", "a state can be reached from itself", tuple(error.state))]
        return []


@dataclass(frozen=True)
class _Subject:
    """What the checks look at: the watched environment, distinct states, legal steps from them and back from them, the whole graph.

    forward: states and legal actions other than exit; backward: states and legal backward actions; final: states that may exit.
    """

    environment: _Watched
    states: Tensor
    forward: tuple[Tensor, Tensor]
    backward: tuple[Tensor, Tensor]
    final: Tensor
    graph: StateGraph | None
    generator: torch.Generator

    @staticmethod
    def of(environment: _Watched, walks: _Walks, graph: StateGraph | None, seed: int) -> _Subject | Fault:
        generator = torch.Generator().manual_seed(seed)
        try:
            states = torch.cat([environment.initial(1), *walks.visited])
            if graph is not None:
                states = torch.cat([states, _some(graph.states, _MOST_STATES, generator)])
            states = states[~_repeats(identity(states))]
            mask = environment.forward_mask(states)
            forward = _some(mask[:, :-1].nonzero(), _MOST_PAIRS, generator)
            backward = _some(environment.backward_mask(states).nonzero(), _MOST_PAIRS, generator)
        except _Broken as broken:
            return broken.fault
        return _Subject(
            environment=environment,
            states=states,
            forward=(states[forward[:, 0]], forward[:, 1]),
            backward=(states[backward[:, 0]], backward[:, 1]),
            final=states[mask[:, -1]],
            graph=graph,
            generator=generator,
        )
