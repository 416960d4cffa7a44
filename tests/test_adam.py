"""A step of Adam without bookkeeping is PyTorch's step, to the last bit."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from headwater.adam import adam_step, clear_gradients
from helpers import seeded


def gradients(parameters: list[nn.Parameter], step: int) -> list[Tensor | None]:
    """Random ones; the last parameter learns from the third step on, and then from every second one."""
    drawn: list[Tensor | None] = [torch.randn(p.shape, generator=seeded(step)) for p in parameters]
    return [*drawn[:-1], drawn[-1] if step >= 2 and step % 2 == 0 else None]


def test_the_same_gradients_give_the_same_weights_and_state_as_pytorchs_own_step() -> None:
    ours, theirs = ([nn.Parameter(torch.ones(shape)) for shape in ((300, 7), (5,), ())] for _ in range(2))
    groups = [[{"params": each[:2], "lr": 1e-2}, {"params": each[2:], "lr": 0.1}] for each in (ours, theirs)]
    fast, plain = (torch.optim.Adam(group, fused=True) for group in groups)
    for step in range(8):
        for parameters, optimizer in ((ours, fast), (theirs, plain)):
            clear_gradients(optimizer)
            assert all(parameter.grad is None for parameter in parameters)
            for parameter, gradient in zip(parameters, gradients(parameters, step), strict=True):
                parameter.grad = gradient
            for group in optimizer.param_groups:
                group["lr"] *= 0.9
        adam_step(fast)
        plain.step()
    for left, right in zip(ours, theirs, strict=True):
        assert torch.equal(left, right)
        assert not torch.equal(left, torch.ones_like(left))
        for name, value in plain.state[right].items():
            assert torch.equal(fast.state[left][name], value), name
