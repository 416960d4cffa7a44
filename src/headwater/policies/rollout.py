"""Rollouts of an environment, packed: finished trajectories leave the batch at once, so work follows the steps really
taken.

Two implementations of the same walk give the same trajectories from the same random numbers. On the CPU, where an
environment has `native` rules, mask, sample, record, move and compact are one native call a step; where the network can
run natively too, so is all that is left of the walk once few trajectories are. Everywhere else, and as the readable
reference that tests compare with, the walk is written in tensors. Actions are drawn by inverting the cumulative
distribution: one uniform number a row, whatever the number of actions. A step into a state whose only legal action is
exit finishes the trajectory without asking the network.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from headwater.environments.base import Environment, Native
from headwater.policies.base import Exploration
from headwater.policies.layers import Activations, rounded
from headwater.policies.native_network import MOST_ROWS, NativeNetwork
from headwater.policies.native_walk import kernels, pack, run_rest

Logits = Callable[[Tensor, Tensor], Tensor]
"""(states `[n, width]`, trajectory numbers `[n]`) -> logits `[n, actions or more]`; columns past the actions are
ignored.
"""

_MOST_KEPT = 1 << 24
"""Numbers of hidden layers that are kept of one rollout, 64 MiB."""


@dataclass(frozen=True)
class Walk:
    """Packed trajectories in forward order, the last action of each being exit.

    states `[S, width]`, actions `[S]` int64, lengths `[T]` int64, log_prob `[T]` float32: of the walk as it was drawn.
    activations: what the network's hidden layers gave, where it ran natively from start to end.
    """

    states: Tensor
    actions: Tensor
    lengths: Tensor
    log_prob: Tensor
    activations: Activations | None = None


def walk_forward(
    environment: Environment,
    logits: Logits,
    count: int,
    exploration: Exploration,
    generator: torch.Generator,
    device: torch.device | str = "cpu",
    network: NativeNetwork | None = None,
    start: Tensor | None = None,
) -> Walk:
    """Draw `count` trajectories to exit, from the initial state or from unfinished states `start` `[count, width]`.
    network: what `logits` does, natively; its first outputs are those of the actions.
    """
    states = environment.initial(count).to(device) if start is None else start.clone().contiguous()
    if _is_native(environment, states):
        return _native_forward(environment, logits, states, exploration, generator, network)
    return _tensor_forward(environment, logits, states, exploration, generator)


def walk_backward(
    environment: Environment,
    logits: Logits,
    states: Tensor,
    generator: torch.Generator,
    network: NativeNetwork | None = None,
) -> Walk:
    """Draw one trajectory to each of `states` (`[T, width]`) by walking back to the initial state; `logits` are over
    backward actions. network: what `logits` does, natively; the outputs of the backward actions follow those of the
    actions.
    """
    if _is_native(environment, states):
        return _native_backward(environment, logits, states, generator, network)
    return _tensor_backward(environment, logits, states, generator)


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
    uniforms = _Uniforms(count, generator)
    records = [(states[:0], ids[:0], ids[:0])]  # so that no trajectory at all still has steps of the right kind
    mask = environment.forward_mask(states)
    while ids.numel():
        uniform = uniforms.take(ids.numel()).to(device)
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
    uniforms = _Uniforms(count, generator)
    records = [(states, torch.full_like(ids, environment.exit_action), ids)]
    while True:
        mask = environment.backward_mask(states)
        going = mask.any(1)
        states, ids, mask = states[going], ids[going], mask[going]
        if not ids.numel():
            return _packed(records[::-1], count, log_prob)
        uniform = uniforms.take(ids.numel()).to(device)
        offered = logits(states, ids)[:, : environment.n_backward_actions].float()
        backward_actions, drawn = draw(offered, mask, uniform, Exploration())
        log_prob.index_add_(0, ids, drawn)
        actions = environment.forward_action(states, backward_actions)
        states = environment.backward_step(states, backward_actions)
        records.append((states, actions, ids))


class _Uniforms:
    """A stream of uniform random numbers from the run's generator, wherever that lives, drawn many at a time."""

    def __init__(self, count: int, generator: torch.Generator) -> None:
        self.at_once = 64 * count
        self.generator = generator
        self.numbers = torch.empty(0)

    def at_least(self, count: int) -> Tensor:
        """The next numbers, `count` of them or more, without taking them."""
        while len(self.numbers) < count:
            new = torch.rand(self.at_once, generator=self.generator, device=self.generator.device)
            self.numbers = torch.cat([self.numbers.to(new.device), new])
        return self.numbers

    def take(self, count: int) -> Tensor:
        taken = self.at_least(count)[:count]
        self.numbers = self.numbers[count:]
        return taken


def _packed(records: list[tuple[Tensor, Tensor, Tensor]], count: int, log_prob: Tensor) -> Walk:
    states, actions, ids = (torch.cat(column) for column in zip(*records, strict=True))
    order = torch.argsort(ids, stable=True)  # records are in time order, so each trajectory's steps stay in order
    return Walk(states[order], actions[order], torch.bincount(ids, minlength=count), log_prob)


# The same walk, one native call a step.


class _Record:
    """Growing arrays that a walk writes its steps into, in the order in which they are taken.

    layers: what the network's hidden layers give; if `kept`, a row for every state that differs from others of its
    step, else room for one step. rows: the row of every recorded state.
    """

    def __init__(self, count: int, width: int, dtype: Any, network: NativeNetwork | None, kept: bool) -> None:
        capacity = 64 * count
        self.states = np.empty((capacity, width), dtype)
        self.actions, self.ids, self.rows = (np.empty(capacity, np.int64) for _ in range(3))
        self.filled = self.computed = 0
        self.network, self.kept = network, kept and network is not None
        self.layers = torch.empty(0)
        if network is not None:
            self._reserve_layers(rounded(capacity), network)

    @property
    def arrays(self) -> tuple[np.ndarray, np.ndarray, np.ndarray, int]:
        return self.states, self.actions, self.ids, self.filled

    @property
    def network_arrays(self) -> tuple[NativeNetwork | None, np.ndarray, np.ndarray, int]:
        return self.network, self.layers.numpy(), self.rows, self.computed

    def reserve(self, more: int) -> None:
        if self.filled + more > len(self.ids):
            capacity = 2 * len(self.ids) + more
            self.states = np.resize(self.states, (capacity, self.states.shape[1]))
            resized = [np.resize(array, capacity) for array in (self.actions, self.ids, self.rows)]
            self.actions, self.ids, self.rows = resized
            if self.network is not None and self.kept:
                self._reserve_layers(rounded(capacity), self.network)

    def _reserve_layers(self, capacity: int, network: NativeNetwork) -> None:
        """Room for so many rows if they are kept; where that would be too much, they are not."""
        self.kept = self.kept and capacity * network.units <= _MOST_KEPT
        before, self.layers = self.layers, network.room(capacity if self.kept else MOST_ROWS)
        self.computed = self.computed if self.kept else 0
        if self.computed:
            self.layers[:, : self.computed] = before[:, : self.computed]

    def run_rest(self) -> None:
        """Run the network on the states where there was no action to draw, so that all of them have a row."""
        if self.kept:
            self.computed = run_rest(*self.network_arrays, self.states, self.ids, self.filled)

    def pack(self, count: int, log_prob: np.ndarray, backward: bool) -> Walk:
        states = np.empty((self.filled, self.states.shape[1]), self.states.dtype)
        actions, rows = np.empty(self.filled, np.int64), np.empty(self.filled, np.int64)
        lengths = np.zeros(count, np.int64)
        recorded = self.states, self.actions, self.ids, self.rows, self.filled
        pack(*recorded, backward, states, actions, rows, lengths)
        activations = None
        if self.kept:
            layers = self.layers[:, : rounded(self.computed)]
            layers[:, self.computed :] = 0
            activations = Activations(layers, torch.from_numpy(rows), self.computed)
        packed, taken, counts, total = (torch.from_numpy(array) for array in (states, actions, lengths, log_prob))
        return Walk(packed, taken, counts, total, activations)


def _native_forward(
    environment: Environment,
    logits: Logits,
    states: Tensor,
    exploration: Exploration,
    generator: torch.Generator,
    network: NativeNetwork | None,
) -> Walk:
    native = _rules(environment)
    advance, finish, _, _ = kernels(native.forward_mask, native.step, native.backward_mask, native.backward_step)
    live = count = states.shape[0]
    ids = torch.arange(count)
    uniforms = _Uniforms(count, generator)
    record = _Record(count, environment.width, states.numpy().dtype, network, kept=count <= MOST_ROWS)
    log_prob = np.zeros(count, np.float32)
    walking = states.numpy(), ids.numpy()
    rule = environment.n_actions, exploration.epsilon, 1.0 / exploration.temperature, native.constants
    while live:
        uniform = uniforms.at_least(live).numpy()
        record.reserve(2 * live)
        if network is not None and live <= MOST_ROWS:
            left, record.filled, taken, record.computed = finish(
                *walking, live, uniform, *rule, *record.arrays, log_prob, *record.network_arrays, record.kept
            )
        else:
            offered = logits(states[:live], ids[:live]).numpy()
            left, record.filled = advance(*walking, live, offered, uniform, *rule, *record.arrays, log_prob)
            taken = live
        uniforms.take(taken)
        live = left
    record.run_rest()
    return record.pack(count, log_prob, backward=False)


def _native_backward(
    environment: Environment,
    logits: Logits,
    states: Tensor,
    generator: torch.Generator,
    network: NativeNetwork | None,
) -> Walk:
    native = _rules(environment)
    _, _, retreat, return_ = kernels(native.forward_mask, native.step, native.backward_mask, native.backward_step)
    count = states.shape[0]
    going = environment.backward_mask(states).any(1)
    live = int(going.sum())
    ids = torch.arange(count)
    uniforms = _Uniforms(count, generator)
    record = _Record(count, environment.width, states.numpy().dtype, network, kept=False)
    record.states[:count], record.actions[:count], record.ids[:count] = states, environment.exit_action, ids
    record.filled = count
    log_prob = np.zeros(count, np.float32)
    states, ids = states[going], ids[going]
    walking = states.numpy(), ids.numpy()
    rule = environment.n_backward_actions, native.constants
    while live:
        uniform = uniforms.at_least(live).numpy()
        record.reserve(live)
        if network is not None and live <= MOST_ROWS:
            first = environment.n_actions
            left, record.filled, taken = return_(
                *walking, live, uniform, *rule, *record.arrays, log_prob, network, record.layers.numpy(), first
            )
        else:
            offered = logits(states[:live], ids[:live]).numpy()
            left, record.filled = retreat(*walking, live, offered, uniform, *rule, *record.arrays, log_prob)
            taken = live
        uniforms.take(taken)
        live = left
    return record.pack(count, log_prob, backward=True)


def _rules(environment: Environment) -> Native:
    assert environment.rules is not None
    return environment.rules
