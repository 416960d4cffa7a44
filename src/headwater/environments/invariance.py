"""Does the answer to a state depend on the rest of the batch, on the call, or on the device?"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from headwater.environments.base import Objects
from headwater.environments.watched import Evidence, Fault, first

_MOST, _ALONE = 300, 16
"""States that are asked about, at most, and how many of them also one by one."""


@dataclass(frozen=True)
class _Question:
    """A method and rows to ask it about: the answer to a row must not depend on the other rows, nor on the device."""

    name: str
    ask: Callable[..., Tensor]
    rows: tuple[Tensor, ...]


def _questions(evidence: Evidence) -> list[_Question]:
    environment = evidence.environment

    def objects_and_back(states: Tensor) -> Tensor:
        objects: Objects = environment.objects(states)
        return environment.states(objects.cpu() if isinstance(objects, Tensor) else objects)

    states = (evidence.some(evidence.states, _MOST),)
    chosen = evidence.some(torch.arange(len(evidence.forward[1])), _MOST)
    forward = tuple(rows[chosen] for rows in evidence.forward)
    chosen = evidence.some(torch.arange(len(evidence.backward[1])), _MOST)
    backward = tuple(rows[chosen] for rows in evidence.backward)
    questions = [
        _Question("forward_mask", environment.forward_mask, states),
        _Question("backward_mask", environment.backward_mask, states),
        _Question("features", environment.features, states),
        _Question("step", environment.step, forward),
        _Question("backward_action", environment.backward_action, forward),
        _Question("backward_step", environment.backward_step, backward),
        _Question("forward_action", environment.forward_action, backward),
        _Question("objects", objects_and_back, (evidence.some(evidence.final, _MOST),)),
    ]
    if environment.log_path_count(states[0]) is not None:
        questions.append(_Question("log_path_count", environment.counted, states))
    return questions


def rows_are_independent(evidence: Evidence) -> list[Fault]:
    found = []
    for question in _questions(evidence):
        answer = question.ask(*question.rows)
        question.ask(*(rows[:0] for rows in question.rows))  # a rollout asks about no rows when all have finished
        order = torch.randperm(len(answer), generator=evidence.generator)
        shuffled = torch.empty_like(answer)
        shuffled[order] = question.ask(*(rows[order] for rows in question.rows))
        differs = _differs(answer, shuffled)
        for i in range(min(len(answer), _ALONE)):
            alone = question.ask(*(rows[i : i + 1] for rows in question.rows))
            differs[i : i + 1] |= _differs(answer[i : i + 1], alone)
        message = f"{question.name} of a state changes with the other rows or their order, or from call to call"
        found += first("batch", message, differs, question.rows[0])
    return found


def devices_agree(evidence: Evidence) -> list[Fault] | str:
    if not torch.cuda.is_available():
        return "there is no CUDA device"
    found = []
    for question in _questions(evidence):
        here, there = question.ask(*question.rows), question.ask(*(rows.cuda() for rows in question.rows))
        found += first("device", f"{question.name} differs on CUDA", _differs(here, there.cpu()), question.rows[0])
    return found


def _differs(one: Tensor, other: Tensor) -> Tensor:
    """Which rows differ: bool `[N]`. Real numbers may differ by rounding."""
    equal = torch.isclose(one, other, rtol=1e-4, atol=1e-5) if one.is_floating_point() else one == other
    return ~equal.reshape(len(one), math.prod(one.shape[1:])).all(1)
