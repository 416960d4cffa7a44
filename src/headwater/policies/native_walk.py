"""The native half of a rollout: kernels that advance packed trajectories by an environment's own rules, compiled once
for each environment. `rollout` holds what calls them, and the same walk in tensors.
"""

from __future__ import annotations

from functools import cache
from typing import Any

import numpy as np
from numba import njit

from headwater.native import kept_njit
from headwater.policies.native_network import MOST_ROWS, hidden_of_rows, outputs_of_rows

NOT_RUN = -1
"""In the place of a state's row, where no action was to be drawn and so the network was not run."""


@kept_njit()
def _draw(logits, mask, n_actions, uniform, epsilon, inverse_temperature, weights):  # type: ignore[no-untyped-def]
    """One legal action by inverse CDF, and its probability; `weights` is room for `[n_actions]`."""
    highest, n_legal = -np.inf, 0
    for a in range(n_actions):
        if mask[a]:
            n_legal += 1
            highest = max(highest, logits[a] * inverse_temperature)
    total = 0.0
    for a in range(n_actions):
        if mask[a]:
            weights[a] = np.exp(np.float32(logits[a] * inverse_temperature - highest))
            total += weights[a]
    cumulative, action, probability = 0.0, -1, 0.0
    for a in range(n_actions):
        if mask[a]:
            action = a
            probability = (1 - epsilon) * weights[a] / total + epsilon / n_legal
            cumulative += probability
            if cumulative > uniform:
                break
    return action, probability


@cache
def kernels(forward_mask: Any, step: Any, backward_mask: Any, backward_step: Any) -> tuple[Any, Any, Any, Any]:
    """The kernels for one environment's rules, compiled at their first call: a step forward, all steps forward with a
    native network, and the same two backward. Those of all steps stop early where random numbers or room run out, and
    say how many numbers they took.
    """

    @njit(nogil=True)
    def advance(  # type: ignore[no-untyped-def]
        states, ids, live, logits, uniform, n_actions, epsilon, inverse_temperature, constants,
        out_states, out_actions, out_ids, filled, log_prob,
    ):  # fmt: skip
        exit_action = n_actions - 1
        mask, weights = np.empty(n_actions, np.bool_), np.empty(n_actions, np.float32)
        kept = 0
        for i in range(live):
            forward_mask(states[i], constants, mask)
            action, probability = _draw(logits[i], mask, n_actions, uniform[i], epsilon, inverse_temperature, weights)
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
    def finish(  # type: ignore[no-untyped-def]
        states, ids, live, uniform, n_actions, epsilon, inverse_temperature, constants,
        out_states, out_actions, out_ids, filled, log_prob, network, layers, out_rows, computed, kept,
    ):  # fmt: skip
        logits, rows = np.empty((live, n_actions), np.float32), np.empty(live, np.int64)
        taken = 0
        while live and taken + live <= uniform.size and filled + 2 * live <= out_ids.size:
            next_row = hidden_of_rows(network, states, ids, live, computed, layers, rows)
            outputs_of_rows(network, layers, rows, live, 0, logits)
            going, start = live, filled
            live, filled = advance(
                states, ids, live, logits, uniform[taken:], n_actions, epsilon, inverse_temperature, constants,
                out_states, out_actions, out_ids, filled, log_prob,
            )  # fmt: skip
            taken += going
            if kept:
                computed, drawn = next_row, 0
                for i in range(start, filled):
                    forced = i > start and out_ids[i] == out_ids[i - 1]
                    out_rows[i] = NOT_RUN if forced else rows[drawn]
                    drawn += not forced
        return live, filled, taken, computed

    @njit(nogil=True)
    def retreat(  # type: ignore[no-untyped-def]
        states, ids, live, logits, uniform, n_actions, constants, out_states, out_actions, out_ids, filled, log_prob
    ):
        mask, weights = np.empty(n_actions, np.bool_), np.empty(n_actions, np.float32)
        kept = 0
        for i in range(live):
            backward_mask(states[i], constants, mask)
            backward_action, probability = _draw(logits[i], mask, n_actions, uniform[i], 0.0, 1.0, weights)
            log_prob[ids[i]] += np.log(probability)
            out_actions[filled] = backward_step(states[i], backward_action, constants)
            out_states[filled], out_ids[filled] = states[i], ids[i]
            filled += 1
            backward_mask(states[i], constants, mask)
            if mask.any():
                states[kept], ids[kept] = states[i], ids[i]
                kept += 1
        return kept, filled

    @njit(nogil=True)
    def return_(  # type: ignore[no-untyped-def]
        states, ids, live, uniform, n_actions, constants, out_states, out_actions, out_ids, filled, log_prob, network,
        layers, first,
    ):  # fmt: skip
        logits, rows = np.empty((live, n_actions), np.float32), np.empty(live, np.int64)
        taken = 0
        while live and taken + live <= uniform.size and filled + live <= out_ids.size:
            hidden_of_rows(network, states, ids, live, 0, layers, rows)
            outputs_of_rows(network, layers, rows, live, first, logits)
            going = live
            live, filled = retreat(
                states, ids, live, logits, uniform[taken:], n_actions, constants,
                out_states, out_actions, out_ids, filled, log_prob,
            )  # fmt: skip
            taken += going
        return live, filled, taken

    return advance, finish, retreat, return_


@kept_njit()
def run_rest(network, layers, rows, computed, states, ids, filled):  # type: ignore[no-untyped-def]
    """Run the network on the recorded states that it was not asked about, a few at a time; returns the first row of
    `layers` that is left free.
    """
    width = states.shape[1]
    some, some_ids = np.empty((MOST_ROWS, width), states.dtype), np.empty(MOST_ROWS, np.int64)
    places, some_rows = np.empty(MOST_ROWS, np.int64), np.empty(MOST_ROWS, np.int64)
    count = 0
    for i in range(filled):
        if rows[i] == NOT_RUN:
            some[count], some_ids[count], places[count] = states[i], ids[i], i
            count += 1
        if count and (count == MOST_ROWS or i == filled - 1):
            computed = hidden_of_rows(network, some, some_ids, count, computed, layers, some_rows)
            for k in range(count):
                rows[places[k]] = some_rows[k]
            count = 0
    return computed


@kept_njit()
def pack(  # type: ignore[no-untyped-def]
    states, actions, ids, rows, filled, backward, out_states, out_actions, out_rows, lengths
):
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
        out_states[row], out_actions[row], out_rows[row] = states[i], actions[i], rows[i]
        position[ids[i]] += -1 if backward else 1
