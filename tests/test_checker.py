"""Each kind of fault is shown by an environment that has it: a good one with one method broken."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import numpy as np
import pytest
import torch
from numba import njit
from torch import Tensor

from headwater.environments import (
    Dense,
    Environment,
    Hypergrid,
    Objects,
    Sequences,
    Sets,
    Slots,
    check_environment,
)


class Grid(Hypergrid):
    """Nine cells, by tensors alone."""

    def __init__(self, native: bool = False) -> None:
        super().__init__(dimensions=2, side=3)
        self.native = self.native if native else None


class RaisingFeatures(Grid):
    def features(self, states: Tensor) -> Tensor:
        raise RuntimeError("no network today")


class RaisingInitial(Grid):
    def initial(self, count: int) -> Tensor:
        raise KeyError("start")


class RaisingOnNoRows(Grid):
    def forward_mask(self, states: Tensor) -> Tensor:
        states.max()
        return super().forward_mask(states)


class WideMask(Grid):
    def backward_mask(self, states: Tensor) -> Tensor:
        return torch.cat([states > 0, states > 0], 1)


class SharedRows(Grid):
    def initial(self, count: int) -> Tensor:
        return torch.zeros(1, 2, dtype=torch.int32).expand(count, 2)


class LostObjects(Grid):
    def objects(self, states: Tensor) -> Objects:
        return [tuple(row) for row in states.tolist()][:3]


class IntegerMask(Grid):
    def forward_mask(self, states: Tensor) -> Tensor:
        return super().forward_mask(states).int()


class LongStates(Grid):
    def step(self, states: Tensor, actions: Tensor) -> Tensor:
        return super().step(states, actions).long()


class ListFeatures(Grid):
    def features(self, states: Tensor) -> Tensor:
        return states.tolist()  # type: ignore[return-value]


class TokensTooLarge(Grid):
    def features(self, states: Tensor) -> Tensor:
        return states + 1


class InfiniteFeatures(Grid):
    def __init__(self) -> None:
        super().__init__()
        self.feature_type = Dense(2)

    def features(self, states: Tensor) -> Tensor:
        return 1 / states.float()


class ExitHasNoIndex(Grid):
    def backward_action(self, states: Tensor, actions: Tensor) -> Tensor:
        return actions


class NoMaxSteps(Grid):
    def __init__(self) -> None:
        super().__init__()
        del self.max_steps


class StepsInPlace(Grid):
    def step(self, states: Tensor, actions: Tensor) -> Tensor:
        return states.scatter_add_(1, actions[:, None], torch.ones_like(states))


class NoWayBack(Grid):
    def backward_mask(self, states: Tensor) -> Tensor:
        return (states > 0) & (states.sum(1, keepdim=True) != 2)


class BackFromTheStart(Grid):
    def backward_mask(self, states: Tensor) -> Tensor:
        return (states > 0) | (states.sum(1, keepdim=True) == 0)


class TwoStarts(Grid):
    def initial(self, count: int) -> Tensor:
        return (torch.arange(count, dtype=torch.int32) % 2)[:, None].repeat(1, 2)


class NoLegalAction(Grid):
    def forward_mask(self, states: Tensor) -> Tensor:
        return super().forward_mask(states) & (states != 2).any(1, keepdim=True)


class Blocked(Sets):
    """Exactly two of three items, but item 0 goes with none: whoever takes it first never ends."""

    def __init__(self) -> None:
        super().__init__(items=3, size=2, exact=True)
        self.native = None

    def forward_mask(self, states: Tensor) -> Tensor:
        mask = super().forward_mask(states)
        mask[:, 0] &= states.sum(1) == 0
        mask[:, 1:3] &= states[:, :1] == 0
        return mask


class TooShort(Grid):
    def __init__(self) -> None:
        super().__init__()
        self.max_steps = 4


class Toggle(Sets):
    """An item may be taken out by the action that adds it."""

    def __init__(self, items: int = 3) -> None:
        super().__init__(items=items, size=items)
        self.native = None

    def forward_mask(self, states: Tensor) -> Tensor:
        return torch.ones(states.shape[0], self.n_actions, dtype=torch.bool)

    def step(self, states: Tensor, actions: Tensor) -> Tensor:
        return states.scatter(1, actions[:, None], 1 - states.gather(1, actions[:, None]))


class StepsBackElsewhere(Grid):
    def backward_step(self, states: Tensor, backward_actions: Tensor) -> Tensor:
        return super().backward_step(states, backward_actions).flip(1)


class RedoesAnother(Slots):
    def __init__(self) -> None:
        super().__init__(length=2, symbols=2)
        self.native = None

    def forward_action(self, states: Tensor, backward_actions: Tensor) -> Tensor:
        return backward_actions * self.symbols


class UndoesAnother(Sequences):
    """The last symbol is dropped whichever end the action added to."""

    def __init__(self) -> None:
        super().__init__(alphabet="ab", max_length=3, construction="prepend-append")
        self.native = None

    def backward_action(self, states: Tensor, actions: Tensor) -> Tensor:
        return torch.zeros_like(actions)


class NotUndone(Grid):
    def backward_mask(self, states: Tensor) -> Tensor:
        return torch.stack([states[:, 0] > 0, (states[:, 1] > 0) & (states[:, 0] == 0)], 1)


class NotRedone(Grid):
    """The second axis is only walked after the first is done with, but may be walked back at any time."""

    def forward_mask(self, states: Tensor) -> Tensor:
        mask = super().forward_mask(states)
        mask[:, 0] &= states[:, 1] == 0
        return mask


class UndoneTwice(Grid):
    """Backward actions 2 and 3 do what 0 and 1 do."""

    def __init__(self) -> None:
        super().__init__()
        self.n_backward_actions = 4

    def backward_mask(self, states: Tensor) -> Tensor:
        return (states > 0).repeat(1, 2)

    def backward_step(self, states: Tensor, backward_actions: Tensor) -> Tensor:
        return super().backward_step(states, backward_actions % 2)

    def forward_action(self, states: Tensor, backward_actions: Tensor) -> Tensor:
        return backward_actions % 2


class SkipsOnTheWayBack(Grid):
    """Two steps back at once: an odd coordinate never gets to zero."""

    def backward_mask(self, states: Tensor) -> Tensor:
        return states > 1

    def backward_step(self, states: Tensor, backward_actions: Tensor) -> Tensor:
        return states.scatter_add(1, backward_actions[:, None], torch.full_like(states, -2))


class BatchNormalised(Grid):
    def __init__(self) -> None:
        super().__init__()
        self.feature_type = Dense(2)

    def features(self, states: Tensor) -> Tensor:
        return states.float() - (states.float().mean(0) if len(states) else 0)


class Forgetful(Grid):
    """Answers differ from call to call."""

    def __init__(self) -> None:
        super().__init__()
        self.feature_type = Dense(2)

    def features(self, states: Tensor) -> Tensor:
        return torch.rand(states.shape)


class LosesCount(Hypergrid):
    """Rows past the thirtieth are answered otherwise: no row by itself shows it."""

    def __init__(self) -> None:
        super().__init__(dimensions=2, side=8)
        self.native = None

    def features(self, states: Tensor) -> Tensor:
        return states * (torch.arange(len(states)) < 30)[:, None]


class WrongInverse(Grid):
    def states(self, objects: Objects) -> Tensor:
        return super().states(objects).flip(1)


class SameObject(Grid):
    def objects(self, states: Tensor) -> Objects:
        return [tuple(sorted(row)) for row in states.tolist()]


class WrongCount(Grid):
    def log_path_count(self, states: Tensor) -> Tensor:
        return super().log_path_count(states) + 0.01


class SingleCount(Grid):
    def log_path_count(self, states: Tensor) -> Tensor:
        return super().log_path_count(states).float()


def with_native(**rules: Callable[..., object] | np.ndarray) -> Environment:
    environment = Grid(native=True)
    assert environment.native is not None
    environment.native = replace(environment.native, **rules)  # type: ignore[arg-type]
    return environment


@njit
def no_exit(state, constants, out):  # type: ignore[no-untyped-def]
    for d in range(state.size):
        out[d] = state[d] < constants[0] - 1
    out[state.size] = False


@njit
def leaves_exit_out(state, constants, out):  # type: ignore[no-untyped-def]
    for d in range(state.size):
        out[d] = state[d] < constants[0] - 1


@njit
def put(array, index, value):  # type: ignore[no-untyped-def]
    array[index] = value  # compiled code does not check the index


@njit
def one_too_many(state, constants, out):  # type: ignore[no-untyped-def]
    for d in range(state.size + 1):
        put(out, d, d < state.size and state[d] > 0)


@njit
def far_outside(state, constants, out):  # type: ignore[no-untyped-def]
    out[100_000_000] = True


@njit
def masks_and_moves(state, constants, out):  # type: ignore[no-untyped-def]
    for d in range(state.size):
        out[d] = state[d] > 0
    state[0] = 0


@njit
def steps_beyond(state, action, constants):  # type: ignore[no-untyped-def]
    state[action] += 1
    put(state, -3, 5)


@njit
def steps_by_two(state, action, constants):  # type: ignore[no-untyped-def]
    state[action] += 2


@njit
def returns_nothing_new(state, backward_action, constants):  # type: ignore[no-untyped-def]
    state[backward_action] -= 1
    return 0


@njit
def counts_calls(state, action, constants):  # type: ignore[no-untyped-def]
    state[action] += 1
    constants[0] += 1


def in_python(state: np.ndarray, action: int, constants: np.ndarray) -> None:
    state[action] += 1


FAULTS: list[tuple[Callable[[], Environment], str, str]] = [
    (RaisingFeatures, "raises", "features: RuntimeError: no network today"),
    (RaisingInitial, "raises", "initial: KeyError"),
    (RaisingOnNoRows, "raises", "forward_mask"),
    (WideMask, "shape", "backward_mask returns [9, 4] for N = 9, expected [N, 2]"),
    (SharedRows, "shape", "initial: rows share memory"),
    (LostObjects, "shape", "objects: 3 objects of 9 states"),
    (IntegerMask, "dtype", "forward_mask returns torch.int32, expected torch.bool"),
    (LongStates, "dtype", "step returns torch.int64, expected torch.int32"),
    (ListFeatures, "dtype", "features returns list, expected a tensor"),
    (SingleCount, "dtype", "log_path_count returns torch.float32"),
    (TokensTooLarge, "range", "tokens outside 0 .. 2"),
    (InfiniteFeatures, "range", "features are not finite"),
    (ExitHasNoIndex, "range", "backward_action is outside 0 .. 1"),
    (NoMaxSteps, "range", "max_steps = None"),
    (StepsInPlace, "impure", "step changes its input"),
    (NoWayBack, "initial", "other than the initial one has no legal backward action"),
    (BackFromTheStart, "initial", "the initial state has a legal backward action"),
    (TwoStarts, "initial", "the rows of initial(3) differ"),
    (NoLegalAction, "dead end", "no action is legal"),
    (Blocked, "dead end", "no way leads from here to exit"),
    (TooShort, "max_steps", "a walk takes more than max_steps = 4 steps"),
    (TooShort, "max_steps", "the longest trajectory takes 5 steps"),
    (Toggle, "cycle", "cycle"),
    (lambda: Toggle(items=40), "cycle", "a walk comes back to a state that it left"),
    (StepsBackElsewhere, "inverse", "leads elsewhere"),
    (RedoesAnother, "inverse", "forward_action is not the action that was undone"),
    (UndoesAnother, "inverse", "backward_action is not the one that was redone"),
    (NotUndone, "masks", "its undoing is not legal"),
    (NotUndone, "masks", "a step into this state has no backward action"),
    (NotRedone, "masks", "its redoing is not legal"),
    (NotRedone, "masks", "undoes no step of the graph"),
    (UndoneTwice, "masks", "two backward actions of this state undo the same step"),
    (SkipsOnTheWayBack, "reachable", "ends elsewhere"),
    (BatchNormalised, "batch", "features"),
    (Forgetful, "batch", "features"),
    (LosesCount, "batch", "features"),
    (WrongInverse, "objects", "is another state"),
    (SameObject, "distinct", "the same object"),
    (WrongCount, "paths", "log_path_count"),
    (lambda: with_native(forward_mask=no_exit), "native", "forward_mask differs from the tensor method on action 2"),
    (lambda: with_native(forward_mask=leaves_exit_out), "native", "forward_mask differs"),
    (lambda: with_native(backward_mask=one_too_many), "native", "backward_mask writes outside its output"),
    (lambda: with_native(backward_mask=far_outside), "native", "backward_mask raises IndexError"),
    (lambda: with_native(backward_mask=masks_and_moves), "native", "backward_mask writes outside its output"),
    (lambda: with_native(step=steps_beyond), "native", "step writes outside the state"),
    (lambda: with_native(step=steps_by_two), "native", "step of action"),
    (lambda: with_native(backward_step=returns_nothing_new), "native", "backward_step of action 1 returns 0"),
    (lambda: with_native(step=counts_calls), "native", "changes the constants"),
    (lambda: with_native(step=in_python), "native", "step is not compiled by numba.njit"),
]


@pytest.mark.parametrize(("broken", "kind", "message"), FAULTS)
def test_a_broken_environment_is_caught(broken: Callable[[], Environment], kind: str, message: str) -> None:
    report = check_environment(broken())
    assert not report.ok
    assert any(fault.kind == kind and message in fault.message for fault in report.faults), str(report)


def test_every_fault_says_at_which_state_it_shows() -> None:
    report = check_environment(NotUndone())
    fault = next(fault for fault in report.faults if "its undoing is not legal" in fault.message)
    assert fault.state is not None
    state = torch.tensor([fault.state], dtype=torch.int32)
    assert fault.state[0] > 0 or fault.state[1] > 0  # on the first axis alone everything can be undone
    assert NotUndone().forward_mask(state)[0, :2].any()
    assert str(list(fault.state)) in str(report)


def test_a_fault_is_told_once_and_the_checks_that_it_stops_are_named() -> None:
    report = check_environment(RaisingInitial())
    assert [fault.kind for fault in report.faults] == ["raises"]
    assert "  --     there is no cycle: not checked, a fault named above stands in the way" in str(report).splitlines()
    assert report.n_states is None


def test_a_fault_that_walks_can_show_is_found_without_enumeration() -> None:
    for broken, kind in ((StepsBackElsewhere, "inverse"), (NotUndone, "masks"), (SkipsOnTheWayBack, "reachable")):
        report = check_environment(broken(), limit=3)
        assert report.n_states is None
        assert kind in {fault.kind for fault in report.faults}


def test_a_step_that_writes_into_its_input_is_told_apart_from_what_it_computes() -> None:
    assert {fault.kind for fault in check_environment(StepsInPlace()).faults} == {"impure"}


def test_the_checker_leaves_the_environment_as_it_was() -> None:
    environment = Grid(native=True)
    native = environment.native
    assert native is not None
    before = native.constants.copy()
    assert check_environment(environment).ok
    assert environment.native is native
    assert np.array_equal(native.constants, before)


def test_the_report_of_a_good_environment_reads_well() -> None:
    report = check_environment(Grid(native=True))
    lines = str(report).splitlines()
    assert lines[0] == "Grid: keeps the contract"
    assert lines[1] == "  9 states, 9 objects, 19 trajectories"
    assert "  ok     a step forward is undone" in lines
    assert "  ok     native rules agree" in lines
    assert not any("FAULT" in line for line in lines)


def test_the_report_of_a_broken_environment_names_check_and_fault() -> None:
    lines = str(check_environment(TokensTooLarge())).splitlines()
    assert lines[0] == "TokensTooLarge: 1 fault"
    (line,) = (line for line in lines if "FAULT" in line)
    title, fault = "rows do not depend on each other", "range: features have tokens outside 0 .. 2"
    assert line.startswith(f"  FAULT  {title}: {fault}, at state [")


def test_two_actions_to_the_same_child_are_a_note_and_no_fault() -> None:
    report = check_environment(Sequences("ab", 3, min_length=0, construction="prepend-append"))
    assert report.ok
    assert report.notes == ["4 steps have a twin: another action from the same state to the same state"]


def test_a_method_that_differs_on_the_other_device_is_caught(monkeypatch: pytest.MonkeyPatch) -> None:
    class Elsewhere(Tensor):
        """Stands in for a tensor on a CUDA device."""

    class Drifting(Grid):
        def features(self, states: Tensor) -> Tensor:
            return states * 0 if isinstance(states, Elsewhere) else states

    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(Tensor, "cuda", lambda tensor: tensor.as_subclass(Elsewhere))
    assert [fault.kind for fault in check_environment(Drifting()).faults] == ["device"]


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("environment", [Hypergrid(2, 4), Sequences("ACGU", 3), Slots(3, 2), Sets(5, 2)])
def test_good_environments_give_the_same_on_cuda(environment: Environment) -> None:
    report = check_environment(environment)
    assert report.ok, str(report)
    assert report.checks["CUDA gives the same"] == []
