"""Do an environment's native rules say what its tensor methods say, and write only where they may?

Each rule is asked about rows that lie within a margin of marked memory. The first few rows go through the rule's
Python source, where an index that is far too large raises an error in place of a crash.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TypeAlias

import numpy as np
import torch
from numba.core.dispatcher import Dispatcher
from numpy.typing import NDArray
from torch import Tensor

from headwater.environments.base import Environment, Native
from headwater.environments.watched import Broken, Fault

Rule: TypeAlias = Callable[..., object]
_MARGIN, _MARK = 64, -7_777_777
_IN_PYTHON, _MOST = 8, 2_000


def native_faults(
    environment: Environment,
    native: Native,
    states: Tensor,
    forward: tuple[Tensor, Tensor],
    backward: tuple[Tensor, Tensor],
) -> list[Fault]:
    """The first disagreement of each rule, on `states`, legal `forward` and `backward` pairs of states and actions."""
    masks = (
        ("forward_mask", native.forward_mask, environment.forward_mask(states[:_MOST])),
        ("backward_mask", native.backward_mask, environment.backward_mask(states[:_MOST])),
    )
    (origins, actions), (ends, undo) = (tuple(rows[:_MOST] for rows in pairs) for pairs in (forward, backward))
    parents, redo = environment.backward_step(ends, undo), environment.forward_action(ends, undo)
    steps = (
        ("step", native.step, origins, actions, environment.step(origins, actions), torch.full_like(actions, -1)),
        ("backward_step", native.backward_step, ends, undo, parents, redo),
    )
    before = native.constants.copy()
    found = [fault for name, rule, mask in masks for fault in _mask_faults(name, rule, native, states[:_MOST], mask)]
    found += [fault for name, rule, *rows in steps for fault in _step_faults(name, rule, native, *rows)]
    if not np.array_equal(before, native.constants):
        found.append(Fault("native", "a native rule changes the constants"))
    return found


def _versions(name: str, rule: Rule, row: int) -> list[Rule]:
    if not isinstance(rule, Dispatcher):
        raise Broken(Fault("native", f"native {name} is not compiled by numba.njit"))
    return [rule.py_func, rule] if row < _IN_PYTHON else [rule]


def _mask_faults(name: str, rule: Rule, native: Native, states: Tensor, expected: Tensor) -> list[Fault]:
    for i, (state, mask) in enumerate(zip(states.numpy(), expected.numpy(), strict=True)):
        for version in _versions(name, rule, i):
            for mark in (False, True):  # an entry that is not written shows in one of the two
                memory, row = _within_margin(state, _MARK)
                out_memory, out = _within_margin(np.full_like(mask, mark), mark)
                _run(name, version, state, row, native.constants, out)
                if not _intact(memory, _MARK) or not _intact(out_memory, mark) or not np.array_equal(row, state):
                    return [_fault(f"native {name} writes outside its output", state)]
                if not np.array_equal(out, mask):
                    action = int(np.flatnonzero(out != mask)[0])
                    return [_fault(f"native {name} differs from the tensor method on action {action}", state)]
    return []


def _step_faults(
    name: str, rule: Rule, native: Native, states: Tensor, actions: Tensor, expected: Tensor, redo: Tensor
) -> list[Fault]:
    """`redo` is what the rule must return, -1 for nothing."""
    table = zip(states.numpy(), actions.tolist(), expected.numpy(), redo.tolist(), strict=True)
    for i, (state, action, target, forward_action) in enumerate(table):
        for version in _versions(name, rule, i):
            memory, row = _within_margin(state, _MARK)
            answer = _run(name, version, state, row, action, native.constants)
            if not _intact(memory, _MARK):
                return [_fault(f"native {name} writes outside the state", state)]
            if not np.array_equal(row, target):
                return [_fault(f"native {name} of action {action} leads elsewhere than the tensor method", state)]
            if forward_action >= 0 and answer != forward_action:
                return [
                    _fault(f"native {name} of action {action} returns {answer}, forward_action {forward_action}", state)
                ]
    return []


def _run(name: str, rule: Rule, state: NDArray[np.int32], *inputs: object) -> object:
    try:
        return rule(*inputs)
    except Exception as error:
        raise Broken(_fault(f"native {name} raises {type(error).__name__}: {error}", state)) from error


def _within_margin(row: np.ndarray, mark: int) -> tuple[np.ndarray, np.ndarray]:
    """Memory filled with `mark` on both sides of a copy of `row`, and the view of that copy."""
    memory = np.full(len(row) + 2 * _MARGIN, mark, row.dtype)
    memory[_MARGIN:-_MARGIN] = row
    return memory, memory[_MARGIN:-_MARGIN]


def _intact(memory: np.ndarray, mark: int) -> bool:
    return bool((memory[:_MARGIN] == mark).all() and (memory[-_MARGIN:] == mark).all())


def _fault(message: str, state: NDArray[np.int32]) -> Fault:
    return Fault("native", message, tuple(state.tolist()))
