"""Rollouts of an environment, packed: finished trajectories leave the batch at once, so work follows the steps really
taken.

Two implementations of the same walk give the same trajectories from the same random numbers. On the CPU, where an
environment has `native` rules, mask, sample, record, move and compact are one native call a step. Everywhere else, and
as the readable reference that tests compare with, the walk is written in tensors. Actions are drawn by inverting the
cumulative distribution: one uniform number a row, whatever the number of actions. A step into a state whose only legal
action is exit finishes the trajectory without asking the network.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from typing import Any

import numpy as np
import torch
from numba import njit
from torch import Tensor

from headwater.environments.base import Environment, Native
from headwater.policies.base import Exploration

Logits = Callable[[Tensor, Tensor], Tensor]
"""(states `[n, width]`, trajectory numbers `[n]`) -> logits `[n, actions or more]`; columns past the actions are
ignored.
"""


@dataclass(frozen=True)
class Walk:
    """Packed trajectories in forward order, the last action of each being exit.

    states `[S, width]`, actions `[S]` int64, lengths `[T]` int64, log_prob `[T]` float32: of the walk as it was drawn.
    """

    states: Tensor
    actions: Tensor
    lengths: Tensor
    log_prob: Tensor


def walk_forward(
    environment: Environment,
    logits: Logits,
    count: int,
    exploration: Exploration,
    generator: torch.Generator,
    device: torch.device | str = "cpu",
    start: Tensor | None = None,
) -> Walk:
    """Draw `count` trajectories to exit, from the initial state or from unfinished states `start` `[count, width]`."""
    states = environment.initial(count).to(device) if start is None else start.clone().contiguous()
    walk = _native_forward if _is_native(environment, states) else _tensor_forward
    return walk(environment, logits, states, exploration, generator)


def walk_backward(environment: Environment, logits: Logits, states: Tensor, generator: torch.Generator) -> Walk:
    """Draw one trajectory to each of `states` (`[T, width]`) by walking back to the initial state; `logits` are over
    backward actions.
    """
    walk = _native_backward if _is_native(environment, states) else _tensor_backward
    return walk(environment, logits, states, generator)


def _is_native(environment: Environment, states: Tensor) -> bool:
    return environment.rules is not None and states.device.type == "cpu"


# The reference: tensors, any device.


def draw(logits: Tensor, mask: Tensor, uniform: Tensor, exploration: Exploration) -> tuple[Tensor, Tensor]:
    """Draw a legal action a row by inverse CDF: actions `[n]` int64 and their log-probabilities `[n]`."""
    probability = explored(logits, mask, exploration)
    cumulative = probability.cumsum(1)
    actions = (cumulative <= uniform[:, None] * cumulative[:, -1:]).sum(1)
    last_legal = mask.shape[1] - 1 - mask.flip(1).to(torch.int8).argmax(1)
    actions = torch.minimum(actions, last_legal)
    return actions, probability.gather(1, actions[:, None])[:, 0].log()


def explored(logits: Tensor, mask: Tensor, exploration: Exploration) -> Tensor:
    """Probability of every action under exploration, 0 where `mask` (bool) says illegal: all `[n, actions]`."""
    scaled = (logits / exploration.temperature).masked_fill(~mask, -torch.inf)
    legal = mask.to(logits.dtype)
    return (1 - exploration.epsilon) * scaled.softmax(1) + exploration.epsilon * legal / legal.sum(1, keepdim=True)


def _tensor_forward(
    environment: Environment, logits: Logits, states: Tensor, exploration: Exploration, generator: torch.Generator
) -> Walk:
    count, device, exit_action = states.shape[0], states.device, environment.exit_action
    ids = torch.arange(count, device=device)
    log_prob = torch.zeros(count, device=device)
    records = [(states[:0], ids[:0], ids[:0])]  # so that no trajectory at all still has steps of the right kind
    mask = environment.forward_mask(states)
    while ids.numel():
        uniform = _uniform(ids.numel(), generator, device)
        actions, drawn = draw(logits(states, ids)[:, : environment.n_actions].float(), mask, uniform, exploration)
        log_prob.index_add_(0, ids, drawn)
        records.append((states, actions, ids))
        going = actions != exit_action
        ids = ids[going]
        states = environment.step(states[going], actions[going])
        mask = environment.forward_mask(states)
        forced = mask[:, -1] & (mask.sum(1) == 1)
        records.append((states[forced], torch.full_like(ids[forced], exit_action), ids[forced]))
        states, ids, mask = states[~forced], ids[~forced], mask[~forced]
    return _packed(records, count, log_prob)


def _tensor_backward(environment: Environment, logits: Logits, states: Tensor, generator: torch.Generator) -> Walk:
    count, device = states.shape[0], states.device
    ids = torch.arange(count, device=device)
    log_prob = torch.zeros(count, device=device)
    records = [(states, torch.full_like(ids, environment.exit_action), ids)]
    while True:
        mask = environment.backward_mask(states)
        going = mask.any(1)
        states, ids, mask = states[going], ids[going], mask[going]
        if not ids.numel():
            return _packed(records[::-1], count, log_prob)
        uniform = _uniform(ids.numel(), generator, device)
        offered = logits(states, ids)[:, : environment.n_backward_actions].float()
        backward_actions, drawn = draw(offered, mask, uniform, Exploration())
        log_prob.index_add_(0, ids, drawn)
        actions = environment.forward_action(states, backward_actions)
        states = environment.backward_step(states, backward_actions)
        records.append((states, actions, ids))


def _uniform(count: int, generator: torch.Generator, device: torch.device) -> Tensor:
    """Random numbers from the run's generator, wherever that lives."""
    return torch.rand(count, generator=generator, device=generator.device).to(device)


def _packed(records: list[tuple[Tensor, Tensor, Tensor]], count: int, log_prob: Tensor) -> Walk:
    states, actions, ids = (torch.cat(column) for column in zip(*records, strict=True))
    order = torch.argsort(ids, stable=True)  # records are in time order, so each trajectory's steps stay in order
    return Walk(states[order], actions[order], torch.bincount(ids, minlength=count), log_prob)


# The same walk, one native call a step.


class _Record:
    """Growing arrays that a walk writes its steps into, in the order in which they are taken."""

    def __init__(self, count: int, width: int, dtype: Any) -> None:
        capacity = 16 * count
        self.states = np.empty((capacity, width), dtype)
        self.actions = np.empty(capacity, np.int64)
        self.ids = np.empty(capacity, np.int64)
        self.filled = 0

    def reserve(self, more: int) -> None:
        if self.filled + more > len(self.ids):
            capacity = 2 * len(self.ids) + more
            self.states = np.resize(self.states, (capacity, self.states.shape[1]))
            self.actions = np.resize(self.actions, capacity)
            self.ids = np.resize(self.ids, capacity)

    def pack(self, count: int, log_prob: np.ndarray, backward: bool) -> Walk:
        states = np.empty((self.filled, self.states.shape[1]), self.states.dtype)
        actions = np.empty(self.filled, np.int64)
        lengths = np.zeros(count, np.int64)
        _pack(self.states, self.actions, self.ids, self.filled, backward, states, actions, lengths)
        return Walk(*(torch.from_numpy(array) for array in (states, actions, lengths, log_prob)))


def _native_forward(
    environment: Environment, logits: Logits, states: Tensor, exploration: Exploration, generator: torch.Generator
) -> Walk:
    native = _rules(environment)
    advance, _ = _compiled(native.forward_mask, native.step, native.backward_mask, native.backward_step)
    live = count = states.shape[0]
    ids = torch.arange(count)
    live_states, live_ids = states.numpy(), ids.numpy()
    record = _Record(count, environment.width, live_states.dtype)
    log_prob = np.zeros(count, np.float32)
    while live:
        offered = logits(states[:live], ids[:live]).numpy()
        uniform = torch.rand(live, generator=generator).numpy()
        record.reserve(2 * live)
        live, record.filled = advance(
            live_states, live_ids, live, offered, uniform, environment.n_actions, exploration.epsilon,
            1.0 / exploration.temperature, native.constants, record.states, record.actions, record.ids, record.filled,
            log_prob,
        )  # fmt: skip
    return record.pack(count, log_prob, backward=False)


def _native_backward(environment: Environment, logits: Logits, states: Tensor, generator: torch.Generator) -> Walk:
    native = _rules(environment)
    _, retreat = _compiled(native.forward_mask, native.step, native.backward_mask, native.backward_step)
    count = states.shape[0]
    states, ids = states.clone().contiguous(), torch.arange(count)
    live_states, live_ids = states.numpy(), ids.numpy()
    record = _Record(count, environment.width, live_states.dtype)
    record.states[:count], record.actions[:count], record.ids[:count] = live_states, environment.exit_action, live_ids
    record.filled = count
    log_prob = np.zeros(count, np.float32)
    going = environment.backward_mask(states).any(1)
    live = int(going.sum())
    live_states[:live], live_ids[:live] = live_states[going.numpy()], live_ids[going.numpy()]
    while live:
        offered = logits(states[:live], ids[:live]).numpy()
        uniform = torch.rand(live, generator=generator).numpy()
        record.reserve(live)
        live, record.filled = retreat(
            live_states, live_ids, live, offered, uniform, environment.n_backward_actions,
            native.constants, record.states, record.actions, record.ids, record.filled, log_prob,
        )  # fmt: skip
    return record.pack(count, log_prob, backward=True)


def _rules(environment: Environment) -> Native:
    assert environment.rules is not None
    return environment.rules


@njit(nogil=True)
def _draw(logits, mask, n_actions, uniform, epsilon, inverse_temperature):  # type: ignore[no-untyped-def]
    """One legal action by inverse CDF, and its probability."""
    highest, n_legal = -np.inf, 0
    for a in range(n_actions):
        if mask[a]:
            n_legal += 1
            highest = max(highest, logits[a] * inverse_temperature)
    total = 0.0
    for a in range(n_actions):
        if mask[a]:
            total += np.exp(logits[a] * inverse_temperature - highest)
    cumulative, action, probability = 0.0, -1, 0.0
    for a in range(n_actions):
        if mask[a]:
            action = a
            probability = (1 - epsilon) * np.exp(logits[a] * inverse_temperature - highest) / total + epsilon / n_legal
            cumulative += probability
            if cumulative > uniform:
                break
    return action, probability


@cache
def _compiled(forward_mask: Any, step: Any, backward_mask: Any, backward_step: Any) -> tuple[Any, Any]:
    """The two kernels for one environment's rules, compiled at their first call."""

    @njit(nogil=True)
    def advance(  # type: ignore[no-untyped-def]
        states, ids, live, logits, uniform, n_actions, epsilon, inverse_temperature,
        constants, out_states, out_actions, out_ids, filled, log_prob,
    ):  # fmt: skip
        exit_action = n_actions - 1
        mask = np.empty(n_actions, np.bool_)
        kept = 0
        for i in range(live):
            forward_mask(states[i], constants, mask)
            action, probability = _draw(logits[i], mask, n_actions, uniform[i], epsilon, inverse_temperature)
            log_prob[ids[i]] += np.log(probability)
            out_states[filled], out_actions[filled], out_ids[filled] = states[i], action, ids[i]
            filled += 1
            if action == exit_action:
                continue
            step(states[i], action, constants)
            forward_mask(states[i], constants, mask)
            only_exit = mask[exit_action]
            for a in range(exit_action):
                only_exit = only_exit and not mask[a]
            if only_exit:
                out_states[filled], out_actions[filled], out_ids[filled] = states[i], exit_action, ids[i]
                filled += 1
            else:
                states[kept], ids[kept] = states[i], ids[i]
                kept += 1
        return kept, filled

    @njit(nogil=True)
    def retreat(  # type: ignore[no-untyped-def]
        states, ids, live, logits, uniform, n_actions, constants, out_states, out_actions, out_ids, filled, log_prob
    ):
        mask = np.empty(n_actions, np.bool_)
        kept = 0
        for i in range(live):
            backward_mask(states[i], constants, mask)
            backward_action, probability = _draw(logits[i], mask, n_actions, uniform[i], 0.0, 1.0)
            log_prob[ids[i]] += np.log(probability)
            out_actions[filled] = backward_step(states[i], backward_action, constants)
            out_states[filled], out_ids[filled] = states[i], ids[i]
            filled += 1
            backward_mask(states[i], constants, mask)
            if mask.any():
                states[kept], ids[kept] = states[i], ids[i]
                kept += 1
        return kept, filled

    return advance, retreat


@njit(nogil=True)
def _pack(states, actions, ids, filled, backward, out_states, out_actions, lengths):  # type: ignore[no-untyped-def]
    """Move time-ordered steps to trajectory order; a walk backward was recorded in reverse."""
    for i in range(filled):
        lengths[ids[i]] += 1
    position = np.empty_like(lengths)
    start = 0
    for t in range(lengths.size):
        position[t] = start
        start += lengths[t]
        if backward:
            position[t] = start - 1
    for i in range(filled):
        row = position[ids[i]]
        out_states[row], out_actions[row] = states[i], actions[i]
        position[ids[i]] += -1 if backward else 1
