"""Log-probabilities of the steps of trajectories from a network's outputs, in one native call and one for the gradient.

It does what `EnvironmentPolicy` writes in tensors: masks, log-softmax, and the choice of what was taken. For a small
batch these are some forty operations on next to nothing.
"""

from __future__ import annotations

from functools import cache
from typing import Any

import numpy as np
import torch
from numba import njit
from torch import Tensor

from headwater.environments.base import Environment, Native
from headwater.native import kept_njit

MOST_ACTIONS = 256
"""Beyond, PyTorch's vectorised exponential is worth more than saved calls."""
NEVER = -1e9
"""The log-probability of what is illegal: finite, so that no gradient is NaN."""


def step_log_probs(
    environment: Environment, output: Tensor, states: Tensor, actions: Tensor, learned: bool
) -> tuple[Tensor, Tensor, Tensor]:
    """Of S packed steps with their states `[S, width]` and actions `[S]`, from outputs `[S, actions + backward actions
    if learned + 1]`: log P_F of each, log P_B of undoing it (0 for exit), and log P_F of exit there; each `[S]`.

    learned: the backward policy is in the outputs; else it is uniform.
    """
    assert environment.rules is not None
    undo = environment.backward_action(states, actions)
    sizes = environment.n_actions, environment.n_backward_actions
    return _StepLogProbs.apply(  # type: ignore[no-untyped-call]
        output, states, actions, undo, environment.rules, *sizes, learned
    )


class _StepLogProbs(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, output: Tensor, states: Tensor, actions: Tensor, undo: Tensor, rules: Native, n_actions: int,
        n_backward_actions: int, learned: bool,
    ) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
        taken, backward, log_exit = (torch.empty(len(actions)) for _ in range(3))
        probabilities = torch.empty(output.shape)
        arrays = [tensor.detach().contiguous().numpy() for tensor in (output, states, actions, undo)]
        results = [tensor.numpy() for tensor in (probabilities, taken, backward, log_exit)]
        kernel = _compiled(rules.forward_mask, rules.backward_mask)
        kernel(*arrays, rules.constants, n_actions, n_backward_actions, learned, *results)
        ctx.save_for_backward(probabilities, actions, undo)
        ctx.rule = n_actions, learned
        if not learned:
            ctx.mark_non_differentiable(backward)
        return taken, backward, log_exit

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        arrays = [tensor.detach().contiguous().numpy() for tensor in (*ctx.saved_tensors, *gradients)]
        by_output = torch.empty(ctx.saved_tensors[0].shape)
        _gradient(*arrays, *ctx.rule, by_output.numpy())
        return by_output, *(None for _ in range(7))


@kept_njit()
def _softmax(row, mask, first, out):  # type: ignore[no-untyped-def]
    """Softmax over the legal ones of the outputs from `first` on into the same places of `out`, 0 for the others;
    returns the log of their summed exponentials.
    """
    highest = np.float32(-np.inf)
    for a in range(mask.size):
        if mask[a]:
            highest = max(highest, row[first + a])
    total = np.float32(0)
    for a in range(mask.size):
        out[first + a] = np.exp(row[first + a] - highest) if mask[a] else np.float32(0)
        total += out[first + a]
    for a in range(mask.size):
        out[first + a] /= total
    return highest + np.log(total)


@cache
def _compiled(forward_mask: Any, backward_mask: Any) -> Any:
    """The kernel for one environment's rules."""

    @njit(nogil=True)
    def forward(  # type: ignore[no-untyped-def]
        output, states, actions, undo, constants, n_actions, n_backward, learned,
        probabilities, taken, backward, log_exit,
    ):  # fmt: skip
        mask, backward_legal = np.empty(n_actions, np.bool_), np.empty(n_backward, np.bool_)
        exit_action = n_actions - 1
        for s in range(actions.size):
            forward_mask(states[s], constants, mask)
            log_sum = _softmax(output[s], mask, 0, probabilities[s])
            taken[s] = output[s, actions[s]] - log_sum
            log_exit[s] = output[s, exit_action] - log_sum if mask[exit_action] else NEVER
            backward[s] = 0
            if actions[s] == exit_action:
                continue
            backward_mask(states[s + 1], constants, backward_legal)
            if learned:
                log_sum = _softmax(output[s + 1], backward_legal, n_actions, probabilities[s + 1])
                backward[s] = output[s + 1, n_actions + undo[s]] - log_sum
            else:
                backward[s] = -np.log(max(backward_legal.sum(), 1))

    return forward


@kept_njit()
def _gradient(  # type: ignore[no-untyped-def]
    probabilities, actions, undo, by_taken, by_backward, by_exit, n_actions, learned, out
):
    exit_action = n_actions - 1
    out[:] = 0
    for s in range(actions.size):
        through_exit = by_exit[s] if probabilities[s, exit_action] > 0 else np.float32(0)
        for a in range(n_actions):
            out[s, a] = -(by_taken[s] + through_exit) * probabilities[s, a]
        out[s, actions[s]] += by_taken[s]
        out[s, exit_action] += through_exit
        if learned and actions[s] != exit_action:
            for b in range(n_actions, out.shape[1] - 1):
                out[s + 1, b] = -by_backward[s] * probabilities[s + 1, b]
            out[s + 1, n_actions + undo[s]] += by_backward[s]
