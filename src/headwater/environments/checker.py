"""The environment checker: does an environment keep the contract of `Environment`, and if not, where does it break?

Every call goes through `Watched`, which sees to what each single answer must be. The checks here compare answers with
each other, on states from random walks and, where the environment is small enough, on every state and step.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Hashable
from dataclasses import dataclass, field

import torch
from torch import Tensor

from headwater.environments.base import Dense, Environment, Tokens, identity
from headwater.environments.graph import StateGraph, TooManyStates, enumerate_states
from headwater.environments.invariance import devices_agree, rows_are_independent
from headwater.environments.native_rules import native_faults
from headwater.environments.watched import Broken, Evidence, Fault, Watched, first, repeated


@dataclass(frozen=True)
class CheckReport:
    """What the checker found. `print(report)` shows one line a check.

    checks: each check's title and its faults, or a string that says why it was not made. n_states, n_objects and
    n_trajectories (action sequences from the initial state to exit) are exact, or None where the environment was not
    enumerated.
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
        count = len(self.faults)
        lines = [f"{self.environment}: " + ("keeps the contract" if self.ok else f"{count} fault{'s' * (count > 1)}")]
        if self.n_states is not None:
            lines.append(
                f"  {self.n_states:,} states, {self.n_objects:,} objects, {self.n_trajectories:,} trajectories"
            )
        for title, found in self.checks.items():
            if isinstance(found, str):
                lines.append(f"  --     {title}: not checked, {found}")
            elif found:
                lines.extend(f"  FAULT  {title}: {fault}" for fault in found)
            else:
                lines.append(f"  ok     {title}")
        return "\n".join(lines + [f"  note   {note}" for note in self.notes])


def check_environment(environment: Environment, limit: int = 50_000, seed: int = 0, walks: int = 64) -> CheckReport:
    """Check `environment` against the contract. Whatever it does wrong is reported as a fault, never raised.

    An environment of at most `limit` states is enumerated, and its objects and trajectories are counted. Of a larger
    one, the states on `walks` random walks, drawn with `seed`, are checked.
    """
    name = type(environment).__name__
    faults = _attribute_faults(environment)
    checks: dict[str, list[Fault] | str] = {"attributes are set": faults}
    if faults:
        return CheckReport(name, checks)
    evidence = Evidence(Watched(environment), limit, seed, walks)
    for title, check in _CHECKS.items():
        checks[title] = _without_repeats(_safely(check, evidence), checks)
    if evidence.graph is None:
        return CheckReport(name, checks)
    into, ends = evidence.graph.path_counts(), evidence.graph.terminal.tolist()
    trajectories = sum(count for count, end in zip(into, ends, strict=True) if end)
    return CheckReport(name, checks, len(into), sum(ends), trajectories, _twin_notes(evidence.graph))


def _without_repeats(found: list[Fault] | str, checks: dict[str, list[Fault] | str]) -> list[Fault] | str:
    """One fault may stop many checks: it is told once."""
    if isinstance(found, str):
        return found
    told = {fault for earlier in checks.values() if not isinstance(earlier, str) for fault in earlier}
    new = [fault for fault in found if fault not in told]
    return new if new or not found else "a fault named above stands in the way"


def _safely(check: Callable[[Evidence], list[Fault] | str], evidence: Evidence) -> list[Fault] | str:
    try:
        return check(evidence)
    except Broken as broken:
        return [broken.fault]
    except Exception as error:  # nothing that an environment answers may stop the checker
        return [Fault("raises", f"{type(error).__name__}: {error}")]


def _attribute_faults(environment: Environment) -> list[Fault]:
    found = []
    for name in ("n_actions", "n_backward_actions", "width", "max_steps"):
        value = getattr(environment, name, None)
        if not isinstance(value, int) or value < 1:
            found.append(Fault("range", f"{name} = {value!r}: must be an integer of at least 1"))
    feature_type = getattr(environment, "feature_type", None)
    if not isinstance(feature_type, Dense | Tokens):
        found.append(Fault("dtype", f"feature_type = {feature_type!r}: must be Tokens or Dense"))
    return found


def _walks_forward(evidence: Evidence) -> list[Fault]:
    """Random walks end within max_steps. Every other one puts off exit as long as it can, so as to see long
    trajectories."""
    environment, faults = evidence.environment, []
    states, ids = environment.initial(evidence.walks), torch.arange(evidence.walks)
    passed = []
    for _ in range(environment.max_steps):
        evidence.visited.append(states)
        passed.append(torch.cat([ids[:, None].int(), states], 1))
        mask = environment.forward_mask(states)
        stuck = ~mask.any(1)
        faults += first("dead end", "no action is legal, not even exit", stuck, states)
        states, ids, mask = states[~stuck], ids[~stuck], mask[~stuck]
        mask[:, -1] &= (ids % 2 == 0) | ~mask[:, :-1].any(1)
        if not len(states):
            break
        actions = torch.multinomial(mask.float(), 1, generator=evidence.generator)[:, 0]
        going = actions != environment.exit_action
        states, ids = environment.step(states[going], actions[going]), ids[going]
    endless = torch.ones(len(states), dtype=torch.bool)
    faults += first("max_steps", f"a walk takes more than max_steps = {environment.max_steps} steps", endless, states)
    steps = torch.cat(passed)
    return faults + first("cycle", "a walk comes back to a state that it left", repeated(steps), steps[:, 1:])


def _no_cycles(evidence: Evidence) -> list[Fault] | str:
    try:
        evidence.graph = enumerate_states(evidence.environment, evidence.limit)
    except TooManyStates:
        return f"more than {evidence.limit:,} states, too many to enumerate"
    except ValueError as error:  # the environment's own errors arrive as Broken
        return [Fault("cycle", str(error))]
    longest = len(evidence.graph.levels) + 1
    if longest > evidence.environment.max_steps:
        return [
            Fault(
                "max_steps",
                f"the longest trajectory takes {longest} steps, max_steps = {evidence.environment.max_steps}",
            )
        ]
    return []


def _exit_is_in_reach(evidence: Evidence) -> list[Fault] | str:
    """Sweep the graph from its end: a state is good if it may exit or has a step to a good state."""
    graph = evidence.graph
    if graph is None:
        return "the environment is not enumerated"
    good = graph.terminal.clone()
    for edges in reversed(graph.levels):
        good[graph.source[edges[good[graph.target[edges]]]]] = True
    return first("dead end", "no way leads from here to exit", ~good, graph.states)


def _one_start(evidence: Evidence) -> list[Fault]:
    environment, states = evidence.environment, evidence.states
    start = environment.initial(3)
    is_start = (states == start[0]).all(1)
    may_go_back = environment.backward_mask(states).any(1)
    return [
        *first("initial", "the rows of initial(3) differ", (start != start[0]).any(1), start),
        *first("initial", "the initial state has a legal backward action", is_start & may_go_back, states),
        *first(
            "initial",
            "a state other than the initial one has no legal backward action",
            ~is_start & ~may_go_back,
            states,
        ),
    ]


def _walks_backward(evidence: Evidence) -> list[Fault]:
    environment = evidence.environment
    states = evidence.some(evidence.final, evidence.walks)
    origins = states
    start = environment.initial(1)[0]
    for _ in range(environment.max_steps):
        mask = environment.backward_mask(states)
        at_end = ~mask.any(1)
        lost = at_end & (states != start).any(1)
        if lost.any():
            return first(
                "reachable", "a walk backward from here ends elsewhere than in the initial state", lost, origins
            )
        states, origins, mask = states[~at_end], origins[~at_end], mask[~at_end]
        if not len(states):
            return []
        chosen = torch.multinomial(mask.float(), 1, generator=evidence.generator)[:, 0]
        states = environment.backward_step(states, chosen)
    endless = torch.ones(len(states), dtype=torch.bool)
    return first("reachable", "a walk backward from here does not end within max_steps", endless, origins)


def _forward_then_back(evidence: Evidence) -> list[Fault]:
    """A step, and the backward action that is said to undo it."""
    environment, (states, actions) = evidence.environment, evidence.forward
    children = environment.step(states, actions)
    undo = environment.backward_action(states, actions)
    exits = torch.full((len(evidence.final),), environment.exit_action)
    environment.backward_action(evidence.final, exits)  # whatever it says of exit must be a valid index
    legal = environment.backward_mask(children).gather(1, undo[:, None])[:, 0]
    found = first("masks", "a legal action leads from here to where its undoing is not legal", ~legal, states)
    states, actions, children, undo = states[legal], actions[legal], children[legal], undo[legal]
    returned = environment.backward_step(children, undo)
    found += first(
        "inverse", "step, then backward_step by backward_action, leads elsewhere", (returned != states).any(1), states
    )
    redone = environment.forward_action(children, undo)
    return found + first("inverse", "forward_action is not the action that was undone", redone != actions, children)


def _back_then_forward(evidence: Evidence) -> list[Fault]:
    """A backward step, and the action that is said to redo it."""
    environment, (states, undo) = evidence.environment, evidence.backward
    parents = environment.backward_step(states, undo)
    actions = environment.forward_action(states, undo)
    legal = environment.forward_mask(parents).gather(1, actions[:, None])[:, 0]
    found = first("masks", "a legal backward action leads from here to where its redoing is not legal", ~legal, states)
    states, undo, parents, actions = states[legal], undo[legal], parents[legal], actions[legal]
    returned = environment.step(parents, actions)
    found += first(
        "inverse", "backward_step, then step by forward_action, leads elsewhere", (returned != states).any(1), states
    )
    undone = environment.backward_action(parents, actions)
    return found + first("inverse", "backward_action is not the one that was redone", undone != undo, states)


def _steps_match(evidence: Evidence) -> list[Fault] | str:
    """On the whole graph: every step forward is undone by one backward action, every backward action undoes one
    step."""
    environment, graph = evidence.environment, evidence.graph
    if graph is None:
        return "the environment is not enumerated"
    row, undo = environment.backward_mask(graph.states).nonzero(as_tuple=True)
    children = graph.states[row]
    actions = environment.forward_action(children, undo)
    back = torch.cat([environment.backward_step(children, undo), children, actions[:, None].int()], 1)
    onward = torch.cat([graph.states[graph.source], graph.states[graph.target], graph.action[:, None].int()], 1)
    missing, unknown = ~torch.isin(identity(onward), identity(back)), ~torch.isin(identity(back), identity(onward))
    return [
        *first("masks", "a step into this state has no backward action", missing, graph.states[graph.target]),
        *first("masks", "a backward action of this state undoes no step of the graph", unknown, children),
        *first("masks", "two backward actions of this state undo the same step", repeated(back), children),
    ]


def _objects_and_back(evidence: Evidence) -> list[Fault]:
    environment, final = evidence.environment, evidence.final
    objects = environment.objects(final)
    values = [_value(value) for value in objects]
    row_of = {value: row for row, value in enumerate(values)}
    twice = torch.tensor([row_of[value] != row for row, value in enumerate(values)], dtype=torch.bool)
    found = first("distinct", "another final state makes the same object as this one", twice, final)
    differs = (environment.states(objects) != final).any(1)
    return found + first("objects", "states(objects(...)) of this state is another state", differs, final)


def _value(value: object) -> Hashable:
    """An object as something that can be compared and hashed: tensors by their entries."""
    if isinstance(value, Tensor):
        return tuple(value.flatten().tolist())
    return value if isinstance(value, Hashable) else repr(value)


def _path_counts(evidence: Evidence) -> list[Fault] | str:
    graph = evidence.graph
    if graph is None:
        return "the environment is not enumerated"
    stated = evidence.environment.log_path_count(graph.states)
    if stated is None:
        return "the environment states no log_path_count"
    exact = torch.tensor([math.log(count) for count in graph.path_counts()], dtype=torch.float64)
    wrong = ~torch.isclose(stated, exact, rtol=1e-9, atol=1e-6)
    return first(
        "paths", "log_path_count is not the log of the number of action sequences to this state", wrong, graph.states
    )


def _inputs_are_kept(evidence: Evidence) -> list[Fault]:
    return evidence.environment.impure


def _twin_notes(graph: StateGraph) -> list[str]:
    twins = int(repeated(torch.stack([graph.source, graph.target], 1)).sum())
    return [f"{twins:,} steps have a twin: another action from the same state to the same state"] if twins else []


def _native_agrees(evidence: Evidence) -> list[Fault] | str:
    environment = evidence.environment
    if environment.native is None:
        return "the environment has no native rules"
    return native_faults(environment, environment.native, evidence.states, evidence.forward, evidence.backward)


_CHECKS: dict[str, Callable[[Evidence], list[Fault] | str]] = {
    "walks forward end at exit": _walks_forward,
    "there is no cycle": _no_cycles,
    "exit is in reach of every state": _exit_is_in_reach,
    "the initial state alone has no way back": _one_start,
    "walks backward end at the initial state": _walks_backward,
    "a step forward is undone": _forward_then_back,
    "a step backward is redone": _back_then_forward,
    "steps forward and backward match one to one": _steps_match,
    "objects and final states match": _objects_and_back,
    "rows do not depend on each other": rows_are_independent,
    "CUDA gives the same": devices_agree,
    "log_path_count is exact": _path_counts,
    "native rules agree": _native_agrees,
    "inputs are left as they were": _inputs_are_kept,
}
