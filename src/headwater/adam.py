"""A step of PyTorch's fused Adam (Kingma & Ba 2015, arXiv 1412.6980) without its bookkeeping.

`Adam.step` asks anew each time about devices, types, hooks and options; for a small network that takes longer than the
step. Here is what is left when the answers are known. State and checkpoints are the optimizer's own.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn


def clear_gradients(optimizer: torch.optim.Optimizer) -> None:
    """What `zero_grad` does."""
    for group in optimizer.param_groups:
        for parameter in group["params"]:
            parameter.grad = None


@torch.no_grad()
def adam_step(optimizer: torch.optim.Adam) -> None:
    """What `step` does for an Adam that was built with fused=True, the parameters of each group on one device."""
    learning = [[p for p in group["params"] if p.grad is not None] for group in optimizer.param_groups]
    if not all(parameter in optimizer.state for parameters in learning for parameter in parameters):
        optimizer.step()  # which makes their state
        return
    for group, parameters in zip(optimizer.param_groups, learning, strict=True):
        if not parameters:
            continue
        states = [optimizer.state[parameter] for parameter in parameters]
        steps, means, squares = ([state[name] for state in states] for name in ("step", "exp_avg", "exp_avg_sq"))
        torch._foreach_add_(steps, 1)
        torch._fused_adam_(
            parameters, [parameter.grad for parameter in parameters], means, squares, [], steps,
            lr=group["lr"], beta1=group["betas"][0], beta2=group["betas"][1], weight_decay=group["weight_decay"],
            eps=group["eps"], amsgrad=False, maximize=False,
        )  # fmt: skip


def clip_gradient(module: nn.Module, limit: float) -> float:
    """Scale the gradient of a module down to a norm of at most `limit`, 0 for no limit; returns its norm before."""
    gradients = [parameter.grad for parameter in module.parameters() if parameter.grad is not None]
    if not gradients:  # of heads whose bootstrap left them nothing to learn from
        return 0.0
    norm = torch.stack(torch._foreach_norm(gradients)).norm().item()
    if limit and norm > limit and math.isfinite(norm):
        torch._foreach_mul_(gradients, limit / norm)
    return norm


def state_of(optimizer: torch.optim.Optimizer) -> dict[str, Tensor]:
    """What it remembers of each parameter, as tensors by name."""
    return {
        f"{parameter}.{name}": value
        for parameter, values in optimizer.state_dict()["state"].items()
        for name, value in values.items()
    }


def load_state(optimizer: torch.optim.Optimizer, tensors: dict[str, Tensor]) -> None:
    """Let it remember what `state_of` gave; its rates stay."""
    whole = optimizer.state_dict()
    whole["state"] = {}
    for key, value in tensors.items():
        parameter, name = key.split(".")
        whole["state"].setdefault(int(parameter), {})[name] = value
    optimizer.load_state_dict(whole)
