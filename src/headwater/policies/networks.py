"""Torsos: from an environment's features to one hidden vector a state. A condition enters as an embedding that is
added in.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor, nn

from headwater.environments.base import Dense, Tokens
from headwater.policies.attention import attention
from headwater.policies.layers import Activations, Linear, linear, perceptron


@dataclass(frozen=True)
class Network:
    """The network over an environment's states."""

    torso: Literal["mlp", "transformer"] = "mlp"
    """mlp, or transformer, which needs an environment whose features are tokens."""
    width: int = 256
    """Hidden units."""
    layers: int = 2
    """Hidden layers, or transformer blocks."""
    heads: int = 8
    """Attention heads of the transformer, a divisor of the width."""
    feed_forward: int = 4
    """Hidden units of the transformer's feed-forward layers, as a multiple of the width."""

    def __post_init__(self) -> None:
        if self.torso not in ("mlp", "transformer"):
            raise ValueError(f"torso = {self.torso!r}: must be 'mlp' or 'transformer'")
        if self.width < 1 or self.layers < 1:
            raise ValueError(f"width = {self.width}, layers = {self.layers}: must be at least 1")
        if self.feed_forward < 1:
            raise ValueError(f"feed_forward = {self.feed_forward}: must be at least 1")
        if self.torso == "transformer" and (self.heads < 1 or self.width % self.heads):
            raise ValueError(f"heads = {self.heads}: must divide width = {self.width}")

    def build(self, features: Tokens | Dense) -> MLP | Transformer:
        if self.torso == "mlp":
            return MLP(features, self.width, self.layers)
        if not isinstance(features, Tokens):
            raise ValueError("torso = 'transformer' needs an environment whose features are tokens; use torso = 'mlp'")
        return Transformer(features, self.width, self.layers, self.heads, self.feed_forward)


class MLP(nn.Module):
    """Hidden layers with ReLU. Tokens enter one-hot by position, as a sum of embedding rows.

    table: `[inputs, width]`, the first layer. hidden: `[layers - 1, width, width]`, the others, inputs before outputs.
    """

    def __init__(self, features: Tokens | Dense, width: int, layers: int) -> None:
        super().__init__()
        self.offsets: Tensor
        self.is_tokens = isinstance(features, Tokens)
        size = features.length * features.vocabulary if isinstance(features, Tokens) else features.size
        first, others = Linear(size, width), [Linear(width, width) for _ in range(layers - 1)]
        self.table, self.bias = first.weight, first.bias
        self.hidden = nn.Parameter(_stacked([layer.weight for layer in others], (width, width)))
        self.hidden_bias = nn.Parameter(_stacked([layer.bias for layer in others], (width,)))
        offsets = (
            torch.arange(features.length) * features.vocabulary if isinstance(features, Tokens) else torch.empty(0)
        )
        self.register_buffer("offsets", offsets.to(torch.int32), persistent=False)

    def forward(
        self,
        features: Tensor,
        condition: Tensor | None,
        head: Linear | None = None,
        activations: Activations | None = None,
    ) -> Tensor:
        """features as the environment gives them, condition `[N, width]` or None -> `[N, width]`, or `head` of it.

        activations: what the hidden layers are known to give for these features and this condition.
        """
        if self.is_tokens:
            layers = self.table, self.bias, self.hidden, self.hidden_bias
            weight, bias = (head.weight, head.bias) if head else (None, None)
            return perceptron(features, self.offsets, *layers, condition, weight, bias, activations)
        x = linear(features, self.table, self.bias)
        x = (x if condition is None else x + condition).relu()
        for weight, bias in zip(self.hidden, self.hidden_bias, strict=True):
            x = linear(x, weight, bias, relu=True)
        return head(x) if head else x


class Transformer(nn.Module):
    """Pre-norm transformer blocks over the tokens, then the mean over positions."""

    def __init__(self, features: Tokens, width: int, layers: int, heads: int, feed_forward: int = 4) -> None:
        super().__init__()
        self.embedding = nn.Embedding(features.vocabulary, width)
        self.position = nn.Parameter(torch.randn(features.length, width) * 0.02)
        self.blocks = nn.ModuleList(_Block(width, heads, feed_forward * width) for _ in range(layers))
        self.norm = nn.LayerNorm(width)

    def forward(
        self,
        features: Tensor,
        condition: Tensor | None,
        head: Linear | None = None,
        activations: Activations | None = None,
    ) -> Tensor:
        """tokens `[N, length]`, condition `[N, width]` or None -> `[N, width]`, or `head` of it; `activations` are a
        perceptron's.
        """
        x = self.embedding(features) + self.position
        if condition is not None:
            x = x + condition[:, None]
        for block in self.blocks:
            x = block(x)
        x = self.norm(x.mean(1))
        return head(x) if head else x


class _Block(nn.Module):
    def __init__(self, width: int, heads: int, hidden: int) -> None:
        super().__init__()
        self.heads = heads
        self.attention_norm, self.feed_forward_norm = nn.LayerNorm(width), nn.LayerNorm(width)
        self.query_key_value, self.project = Linear(width, 3 * width), Linear(width, width)
        self.up, self.down = Linear(width, hidden), Linear(hidden, width)

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.project(attention(self.query_key_value(self.attention_norm(x)), self.heads))
        return x + self.down(linear(self.feed_forward_norm(x), self.up.weight, self.up.bias, relu=True))


def _stacked(tensors: list[Tensor], shape: tuple[int, ...]) -> Tensor:
    """`[len(tensors), *shape]`, also of none."""
    return torch.stack([tensor.detach() for tensor in tensors]) if tensors else torch.empty(0, *shape)
