"""Layers at the speed that a CPU has: products of matrices, embeddings of tokens, softmax over short rows.

PyTorch multiplies float32 matrices on a CPU with MKL, which takes a slower path on processors that are not Intel's;
oneDNN, which is part of PyTorch too, does not. Its embedding bag sorts where adding up is enough, and its softmax over
a last dimension of a dozen entries takes several times as long as the operations that it is made of. Elsewhere, and as
the reference that tests compare with, these are the plain functions.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import cache
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional

from headwater.native import kept_njit
from headwater.policies.outer import fits, outer

_FEWEST_ROWS = 24
"""Below, a product is too small for its library to matter."""
_MANY_ROWS = 4096
"""From there on, a transposed product has a kernel of its own."""
_SHORT_ROW = 32
"""Softmax over rows of fewer entries than this is taken apart."""


class Linear(nn.Module):
    """x -> x @ weight + bias, with weight `[inputs, outputs]`: a row an input, as embedding tables have them too."""

    def __init__(self, inputs: int, outputs: int) -> None:
        super().__init__()
        bound = 1 / math.sqrt(inputs)
        self.weight = nn.Parameter(torch.empty(inputs, outputs).uniform_(-bound, bound))
        self.bias = nn.Parameter(torch.empty(outputs).uniform_(-bound, bound))

    def forward(self, x: Tensor) -> Tensor:
        return linear(x, self.weight, self.bias)


def linear(x: Tensor, weight: Tensor, bias: Tensor, relu: bool = False) -> Tensor:
    """x `[..., inputs]` @ weight `[inputs, outputs]` + bias `[outputs]`, and ReLU of it if asked for."""
    if x.numel() < _FEWEST_ROWS * x.shape[-1] or not is_on_cpu(x, weight) or not _has_onednn():
        y = torch.addmm(bias, x, weight) if x.ndim == 2 else x @ weight + bias
        return y.relu() if relu else y
    if not torch.is_grad_enabled():
        return _linear(x, weight, bias, relu)[2]
    return _OneDnnLinear.apply(x, weight, bias, relu)  # type: ignore[no-untyped-call]


@dataclass(frozen=True)
class Activations:
    """What the hidden layers of a perceptron gave for N inputs, ReLU applied: for learning to start from.

    layers: `[layers, rounded(R), width]`, zeros after the R rows that are in use. rows: `[N]` int64, the row of each
    input; equal inputs may share one. count: R.
    """

    layers: Tensor
    rows: Tensor
    count: int


def perceptron(
    tokens: Tensor,
    offsets: Tensor,
    table: Tensor,
    bias: Tensor,
    hidden: Tensor,
    hidden_bias: Tensor,
    condition: Tensor | None,
    head: Tensor | None = None,
    head_bias: Tensor | None = None,
    activations: Activations | None = None,
) -> Tensor:
    """Layers of linear maps and ReLU over tokens, int32 `[N, length]`, one-hot by position: `[N, width]`; with a head,
    a linear map after them: `[N, outputs]`.

    The first is the sum of the tokens' rows of `table` `[inputs, width]`, of `bias` and of `condition` `[N, width]` or
    None; a token's row is its number plus its place's of `offsets` `[length]`. hidden: the others, `[layers - 1, width,
    width]`, hidden_bias `[layers - 1, width]`. head: `[width, outputs]`, head_bias `[outputs]`. activations: what the
    layers are known to give for these tokens and this condition.
    """
    layers = table, bias, hidden, hidden_bias
    if len(tokens) and tokens.dtype == torch.int32 and is_on_cpu(*layers) and _has_onednn():
        inputs = tokens, offsets, *layers, condition, head, head_bias, activations
        return _Perceptron.apply(*inputs)  # type: ignore[no-untyped-call]
    x = functional.embedding_bag(tokens + offsets, table, mode="sum") + bias
    x = (x if condition is None else x + condition).relu()
    for weight, layer_bias in zip(hidden, hidden_bias, strict=True):
        x = torch.addmm(layer_bias, x, weight).relu()
    return x if head is None or head_bias is None else torch.addmm(head_bias, x, head)


def softmax(x: Tensor) -> Tensor:
    """Over the last dimension."""
    if x.device.type != "cpu" or x.shape[-1] >= _SHORT_ROW:
        return x.softmax(-1)
    return _ShortSoftmax.apply(x)  # type: ignore[no-untyped-call]


def is_on_cpu(*tensors: Tensor) -> bool:
    return all(tensor.device.type == "cpu" and tensor.dtype == torch.float32 for tensor in tensors)


def _multiply(x: Tensor, transposed: Tensor, bias: Tensor | None = None, then: str = "none") -> Tensor:
    """x `[..., k]` times the transpose of `transposed` `[n, k]`, by oneDNN."""
    return torch.ops.mkldnn._linear_pointwise(x, transposed, bias, then, [], "")


def _outer(x: Tensor, y: Tensor) -> Tensor:
    """The transpose of x `[rows, m]` times y `[rows, n]`; oneDNN is slow where the last dimension is the small one."""
    if len(x) >= _MANY_ROWS and fits(x, y):
        return outer(x, y)
    return _multiply(x.t(), y.t()) if x.shape[1] <= y.shape[1] else _multiply(y.t(), x.t()).t()


@cache
def _has_onednn() -> bool:
    """Whether this PyTorch has the product that we call, and it is right."""
    x, weight = torch.arange(12.0).view(4, 3), torch.arange(6.0).view(3, 2)
    try:
        return torch.allclose(_multiply(x, weight.t(), None, "relu"), x @ weight)
    except (AttributeError, RuntimeError, TypeError):
        return False


def rounded(count: int) -> int:
    """A number of rows that is not much larger and not much its own: oneDNN prepares itself anew for every number that
    it meets, which takes longer than the product.
    """
    unit = max(16, 1 << max(count.bit_length() - 6, 0))
    return -(-count // unit) * unit


def _with_spare_rows(x: Tensor) -> Tensor:
    """x `[N, ...]` with rows of zeros after it, up to the rounded number."""
    spare = rounded(len(x)) - len(x)
    return torch.cat([x, x.new_zeros(spare, x.shape[1])]) if spare else x


def _linear(x: Tensor, weight: Tensor, bias: Tensor, relu: bool) -> tuple[Tensor, Tensor, Tensor]:
    """x and the result as `[rows, ...]` with spare ones, and the result."""
    shape = x.shape
    x = _with_spare_rows(x.reshape(-1, shape[-1]))
    y = _multiply(x, weight.t(), bias, "relu" if relu else "none")
    if y.shape[0] == shape[0] and len(shape) == 2:
        return x, y, y
    return x, y, y[: shape.numel() // shape[-1]].view(*shape[:-1], -1)


class _OneDnnLinear(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor, relu: bool) -> Tensor:
        ctx.shape = x.shape
        x, y, result = _linear(x, weight, bias, relu)
        ctx.save_for_backward(x, weight, *([y] if relu else []))
        return result

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        x, weight, *result = ctx.saved_tensors
        by_x, by_weight, by_bias, _ = ctx.needs_input_grad
        gradient = _with_spare_rows(gradients[0].reshape(-1, weight.shape[1]))
        gradient = _relu_gradient(gradient, result[0]) if result else gradient
        return (
            _multiply(gradient, weight)[: ctx.shape.numel() // ctx.shape[-1]].view(ctx.shape) if by_x else None,
            _outer(x, gradient) if by_weight else None,
            gradient.sum(0) if by_bias else None,
            None,
        )


def _relu_gradient(gradient: Tensor, result: Tensor) -> Tensor:
    return torch.ops.aten.threshold_backward(gradient, result, 0)


class _Perceptron(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, tokens: Tensor, offsets: Tensor, table: Tensor, bias: Tensor, hidden: Tensor, hidden_bias: Tensor,
        condition: Tensor | None, head: Tensor | None, head_bias: Tensor | None, activations: Activations | None,
    ) -> Tensor:  # fmt: skip
        if activations is None:
            rows, layers = None, _run_layers(tokens, offsets, table, bias, hidden, hidden_bias, condition)
        else:
            rows, layers = activations.rows, list(activations.layers)
            ctx.count = activations.count
        ctx.save_for_backward(tokens, offsets, table, hidden, head, rows, *layers)
        output = layers[-1] if head is None else _multiply(layers[-1], head.t(), head_bias)
        return output[: len(tokens)] if rows is None else output.index_select(0, rows)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        tokens, offsets, table, hidden, head, rows, *layers = ctx.saved_tensors
        by_hidden, by_hidden_bias = [], hidden.new_empty(hidden.shape[:2])
        gradient, first = gradients[0], None
        if rows is None:
            gradient = _with_spare_rows(gradient)
        else:
            gradient = gradient.new_zeros(len(layers[0]), gradient.shape[1]).index_add_(0, rows, gradient)
            first = rows.new_empty(ctx.count)
            _first_of_rows(rows.numpy(), first.numpy())
        of_rows = tokens if first is None else tokens.index_select(0, first)
        by_head, by_head_bias = None, None
        if head is not None:
            by_head, by_head_bias = _outer(layers[-1], gradient), gradient.sum(0)
            gradient = _multiply(gradient, head)
        for i in reversed(range(len(hidden))):
            gradient = _relu_gradient(gradient, layers[i + 1])
            by_hidden.append(_outer(layers[i], gradient))
            torch.sum(gradient, 0, out=by_hidden_bias[i])
            gradient = _multiply(gradient, hidden[i])
        gradient = _relu_gradient(gradient, layers[0])[: len(of_rows)]
        by_table = torch.zeros_like(table)
        _scatter_rows(of_rows.contiguous().numpy(), offsets.numpy(), gradient.numpy(), by_table.numpy())
        by_condition = gradient if ctx.needs_input_grad[6] else None
        if by_condition is not None and first is not None:
            by_condition = gradient.new_zeros(len(tokens), gradient.shape[1]).index_copy_(0, first, gradient)
        by_layers = by_table, gradient.sum(0), _stacked(by_hidden[::-1], hidden), by_hidden_bias
        return None, None, *by_layers, by_condition, by_head, by_head_bias, None


def _run_layers(
    tokens: Tensor, offsets: Tensor, table: Tensor, bias: Tensor, hidden: Tensor, hidden_bias: Tensor,
    condition: Tensor | None,
) -> list[Tensor]:  # fmt: skip
    """What every hidden layer gives, `[rounded(N), width]` each."""
    count = len(tokens)
    x = bias.expand(rounded(count), -1).clone()
    if condition is not None:
        x[:count] += condition
    _add_rows(tokens.contiguous().numpy(), offsets.numpy(), table.detach().numpy(), x.numpy())
    layers = [x]
    for weight, layer_bias in zip(hidden.detach(), hidden_bias.detach(), strict=True):
        layers.append(_multiply(layers[-1], weight.t(), layer_bias, "relu"))
    return layers


@kept_njit()
def _first_of_rows(rows, out):  # type: ignore[no-untyped-def]
    """The first input of each row."""
    for i in range(rows.size - 1, -1, -1):
        out[rows[i]] = i


def _stacked(layers: list[Tensor], like: Tensor) -> Tensor:
    """`[len(layers), ...]`: a view of the only one, so that it is not copied."""
    if len(layers) == 1:
        return layers[0][None]
    return torch.stack(layers) if layers else torch.zeros_like(like)


@kept_njit()
def _add_rows(tokens, offsets, table, out):  # type: ignore[no-untyped-def]
    """Add the tokens' rows to the first ones of `out`, and ReLU."""
    for n in range(tokens.shape[0]):
        for place in range(tokens.shape[1]):
            row = tokens[n, place] + offsets[place]
            for k in range(out.shape[1]):
                out[n, k] += table[row, k]
        for k in range(out.shape[1]):
            out[n, k] = max(out[n, k], np.float32(0))


@kept_njit()
def _scatter_rows(tokens, offsets, gradient, out):  # type: ignore[no-untyped-def]
    for n in range(tokens.shape[0]):
        for place in range(tokens.shape[1]):
            row = tokens[n, place] + offsets[place]
            for k in range(out.shape[1]):
                out[row, k] += gradient[n, k]


class _ShortSoftmax(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        y = (x - x.amax(-1, keepdim=True)).exp_()
        y /= y.sum(-1, keepdim=True)
        ctx.save_for_backward(y)
        return y

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> Tensor:
        (y,) = ctx.saved_tensors
        product = gradients[0] * y
        return product.addcmul_(y, product.sum(-1, keepdim=True), value=-1)
