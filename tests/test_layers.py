"""Fast layers and native log-probabilities against the plain functions that they stand for, values and gradients."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor
from torch.nn import functional

from headwater.environments.base import Environment, identity
from headwater.environments.hypergrid import Hypergrid
from headwater.environments.sequences import Sequences
from headwater.environments.sets import Sets
from headwater.environments.slots import Slots
from headwater.policies import EnvironmentPolicy, Exploration, Network
from headwater.policies.layers import Linear, linear, perceptron, softmax
from headwater.policies.native_network import native_network
from headwater.policies.outer import fits, outer
from headwater.trajectories import Trajectories
from helpers import random_policy, seeded


def same_with_gradients(
    fast: Callable[..., Tensor], plain: Callable[..., Tensor], inputs: list[Tensor], tolerance: float = 1e-4
) -> None:
    """Both give the same values, and under the same random weights the same gradient by every input."""
    results = []
    for function in (fast, plain):
        leaves = [tensor.clone().requires_grad_(tensor.is_floating_point()) for tensor in inputs]
        value = function(*leaves)
        weights = torch.randn(value.shape, generator=seeded(1))
        (value * weights).sum().backward()  # type: ignore[no-untyped-call]
        results.append([value.detach(), *(gradient_of(leaf) for leaf in leaves if leaf.requires_grad)])
    for ours, reference in zip(*results, strict=True):
        torch.testing.assert_close(ours, reference, rtol=tolerance, atol=tolerance)


def gradient_of(leaf: Tensor) -> Tensor:
    return torch.zeros_like(leaf) if leaf.grad is None else leaf.grad


@pytest.mark.parametrize("shape", [(1, 5), (40, 5), (300, 64), (7, 15, 32), (0, 6)])
@pytest.mark.parametrize("outputs", [3, 64, 200])
@pytest.mark.parametrize("relu", [False, True])
def test_a_linear_map_and_its_gradients_are_the_plain_ones(shape: tuple[int, ...], outputs: int, relu: bool) -> None:
    inputs = [torch.randn(s, generator=seeded(0)) for s in (shape, (shape[-1], outputs), (outputs,))]

    def plain(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
        y = functional.linear(x, weight.T, bias)
        return y.relu() if relu else y

    same_with_gradients(lambda x, weight, bias: linear(x, weight, bias, relu), plain, inputs)


@pytest.mark.parametrize("layers", [1, 2, 4])
@pytest.mark.parametrize("conditional", [False, True])
@pytest.mark.parametrize("count", [0, 1, 100])
def test_a_perceptron_over_tokens_is_one_over_one_hot_vectors(layers: int, conditional: bool, count: int) -> None:
    length, vocabulary, width = 3, 5, 32
    tokens = torch.randint(vocabulary, (count, length), generator=seeded(2)).to(torch.int32)
    shapes = [(length * vocabulary, width), (width,), (layers - 1, width, width), (layers - 1, width)]
    inputs = [torch.randn(shape, generator=seeded(3)) * 0.3 for shape in [*shapes, *[(count, width)] * conditional]]
    offsets = (torch.arange(length) * vocabulary).to(torch.int32)

    def fast(*weights: Tensor) -> Tensor:
        table, bias, hidden, hidden_bias, *condition = weights
        return perceptron(tokens, offsets, table, bias, hidden, hidden_bias, condition[0] if condition else None)

    def plain(*weights: Tensor) -> Tensor:
        table, bias, hidden, hidden_bias, *condition = weights
        x = functional.one_hot(tokens.long(), vocabulary).flatten(1).float() @ table + bias
        x = (x + condition[0] if condition else x).relu()
        for weight, layer_bias in zip(hidden, hidden_bias, strict=True):
            x = (x @ weight + layer_bias).relu()
        return x

    same_with_gradients(fast, plain, inputs)


@pytest.mark.parametrize("length", [1, 15, 31, 32, 50])
def test_softmax_over_short_and_long_rows_is_softmax(length: int) -> None:
    x = 30 * torch.randn(4, 2, length, generator=seeded(4))
    same_with_gradients(softmax, lambda x: x.softmax(-1), [x], 1e-5)


def test_softmax_of_large_numbers_does_not_overflow() -> None:
    assert softmax(torch.tensor([[1e4, 1e4 - 1.0, -1e4]])).tolist() == [pytest.approx([0.7310586, 0.2689414, 0.0])]


ENVIRONMENTS = [
    Hypergrid(3, 4),
    Sequences("ACGU", 5, 2),
    Sequences("AB", 4, 0, "prepend-append"),
    Slots(3, 4),
    Sets(6, 3),
]


@pytest.mark.parametrize("environment", ENVIRONMENTS, ids=lambda environment: type(environment).__name__)
@pytest.mark.parametrize("backward", ["uniform", "learned", "tlm"])
def test_native_log_probabilities_and_gradients_are_those_in_tensors(environment: Environment, backward: str) -> None:
    policy = random_policy(environment, backward)  # type: ignore[arg-type]
    batch = policy.sample(torch.empty(50, 0), Exploration(0.5), seeded(5))

    def everything(policy: EnvironmentPolicy, batch: Trajectories) -> list[Tensor]:
        said = policy.log_probs(batch)
        assert said.log_flow is not None
        assert said.log_exit is not None
        legal = policy.environment.forward_mask(batch.steps["state"])[:, -1]
        parts = [said.forward, said.backward, said.log_flow, said.log_exit[legal]]
        loss = sum((part * torch.randn(part.shape, generator=seeded(6))).sum() for part in parts)
        loss = loss if said.auxiliary is None else loss + said.auxiliary
        assert isinstance(loss, Tensor)
        policy.zero_grad()
        loss.backward()  # type: ignore[no-untyped-call]
        gradients = [p.grad for p in policy.parameters() if p.grad is not None]
        return [part.detach() for part in [*parts, *gradients]]

    native = everything(policy, batch)
    rules, environment.native = environment.native, None
    try:
        tensors = everything(policy, batch)
    finally:
        environment.native = rules
    assert len(native) == len(tensors) > 8
    for ours, reference in zip(native, tensors, strict=True):
        torch.testing.assert_close(ours, reference, rtol=1e-3, atol=1e-4)


def test_a_native_network_is_for_perceptrons_over_states_of_moderate_width() -> None:
    assert native_network(*parts(Network("mlp", 64)), None) is not None
    assert native_network(*parts(Network("mlp", 1024)), None) is None
    assert native_network(*parts(Network("transformer", 64)), None) is None


def parts(network: Network) -> tuple[object, Linear]:
    policy = EnvironmentPolicy(Slots(3, 4), network)
    return policy.torso, policy.heads


def test_the_hash_of_a_row_does_not_depend_on_how_it_is_computed() -> None:
    rows = torch.randint(-5, 1000, (200, 7), generator=seeded(7))
    assert torch.equal(identity(rows.to(torch.int32)), identity(rows))


@pytest.mark.parametrize(("rows", "m", "n"), [(0, 4, 64), (1, 8, 64), (300, 64, 192), (5000, 128, 64)])
def test_transposed_products_are_those_of_plain_operations(rows: int, m: int, n: int) -> None:
    x, y = torch.randn(m, rows, generator=seeded(0)).t(), torch.randn(rows, n, generator=seeded(1))
    assert fits(x, y)
    torch.testing.assert_close(outer(x, y).double(), x.double().t() @ y.double(), rtol=1e-4, atol=1e-3)
    assert not fits(x[:, :3], y)
    assert not fits(x, y[:, :63])


@pytest.mark.parametrize("columns", [64, 60])
def test_the_gradient_of_many_rows_is_that_of_plain_operations(columns: int) -> None:
    x, weight = torch.randn(5000, 32, generator=seeded(0)), torch.randn(32, columns, generator=seeded(1))
    bias, seen = torch.randn(columns, generator=seeded(2)), torch.randn(5000, columns, generator=seeded(3))
    inputs = [one.requires_grad_() for one in (x, weight, bias)]
    ours = torch.autograd.grad(linear(x, weight, bias), inputs, seen)
    theirs = torch.autograd.grad(torch.addmm(bias, x, weight), inputs, seen)
    for native, plain in zip(ours, theirs, strict=True):
        torch.testing.assert_close(native, plain, rtol=1e-4, atol=1e-2)
    with torch.no_grad():
        assert torch.equal(linear(x, weight, bias), linear(x.detach(), weight, bias))
