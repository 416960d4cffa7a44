"""Networks that predict, from a noisy state and its time, what a step of a chain needs to know: a residual multilayer
perceptron for vectors and small images, and a bidirectional transformer for strings of tokens. A larger image wants a
convolutional network: `diffusers_prior.py`.
"""

from __future__ import annotations

import copy
import math
from abc import abstractmethod
from collections.abc import Callable
from typing import TypeAlias

import torch
from torch import Tensor, nn
from torch.nn import functional

NetworkSetting: TypeAlias = "int | bool | list[int]"

_FREQUENCIES = 32
_HIGHEST_FREQUENCY = 1000.0
_LONGEST_PERIOD = 32.0
_LARGEST = 65_536
"""Of any size in a network's settings: they may come from a file."""


class Denoiser(nn.Module):
    """A prediction from states `[N, *shape]`, times `[N]` (1 at noise, near 0 at the data) and conditions `[N, C]`.

    condition: how many columns of the condition, the first, are looked at; a prior and the posterior made from it are
    both handed all columns.
    """

    condition: int = 0

    @abstractmethod
    def forward(self, state: Tensor, time: Tensor, condition: Tensor) -> Tensor:
        """`[N, *shape]`, the first of these axes twice as long with a learned variance; `[N, L, V]` for tokens."""

    def widened(self, columns: int) -> Denoiser:
        """A copy that looks at so many columns more, and says the same until it learns what is in them. Raises
        ValueError for a network that cannot."""
        if not columns:
            return copy.deepcopy(self)
        raise ValueError(f"{type(self).__name__} takes no condition that it was not made for: make a correction")

    def silence(self) -> None:
        """Fill the last layer with zeros: whatever the state, the prediction is 0 then. Raises ValueError where there
        is no such layer."""
        raise ValueError(f"{type(self).__name__} has no last layer to fill with zeros")


class Network(Denoiser):
    """A network of our own, which plain settings describe: `type(self)(**self.settings())` is another like it."""

    @abstractmethod
    def settings(self) -> dict[str, NetworkSetting]:
        """The arguments that it was built with."""

    def widened(self, columns: int) -> Denoiser:
        if not columns:
            return copy.deepcopy(self)
        more = type(self)(**self.settings() | {"condition": self.condition + columns})
        more.to(next(self.parameters()).device)
        weights = self.state_dict()
        for name, weight in more.state_dict().items():
            old = weights.get(name)
            if old is None or old.shape != weight.shape:  # what reads the condition, whose columns come last
                weight.zero_()
                if old is not None:
                    weight[:, : old.shape[1]] = old
            else:
                weight.copy_(old)
        return more


class ResidualMLP(Network):
    """A residual multilayer perceptron, told time and condition in every block.

    shape: of a state. condition: C. width: of its hidden layers. blocks: of two layers each. learned_variance: twice as
    many outputs. Raises ValueError naming a size that is out of range.

    A state goes in as its direction and the logarithm of its size, so that the large states of a variance-exploding
    chain are as easy as those of any other. octaves: also as sines and cosines of each coordinate, of so many periods:
    32 units, 16, 8 and so on. In few dimensions that is what lets it tell modes close together apart soon (Tancik et
    al. 2020, arXiv 2006.10739).
    """

    def __init__(
        self,
        shape: tuple[int, ...] | list[int],
        condition: int = 0,
        width: int = 256,
        blocks: int = 3,
        learned_variance: bool = False,
        octaves: int = 0,
    ) -> None:
        super().__init__()
        _require_sizes(condition=condition, width=width, blocks=blocks, shape=shape, octaves=octaves)
        self.shape, self.condition, self.learned_variance = tuple(shape), condition, bool(learned_variance)
        self.octaves = octaves
        size = math.prod(self.shape)
        self.enter = nn.Linear(size * (1 + 2 * octaves) + 1, width)
        self.time = nn.Linear(2 * _FREQUENCIES, width)
        self.read = nn.Linear(condition, width, bias=False) if condition else None
        self.shift = nn.Linear(width, blocks * width)
        self.norms = nn.ModuleList(nn.LayerNorm(width) for _ in range(blocks))
        self.first = nn.ModuleList(nn.Linear(width, width) for _ in range(blocks))
        self.second = nn.ModuleList(nn.Linear(width, width) for _ in range(blocks))
        self.last = nn.Linear(width, size * (2 if learned_variance else 1))

    def settings(self) -> dict[str, NetworkSetting]:
        return {
            "shape": list(self.shape),
            "condition": self.condition,
            "width": self.last.in_features,
            "blocks": len(self.first),
            "learned_variance": self.learned_variance,
            "octaves": self.octaves,
        }

    def forward(self, state: Tensor, time: Tensor, condition: Tensor) -> Tensor:
        flat = state.flatten(1)
        size = (1 + flat.square().mean(1, keepdim=True)).sqrt()
        angles = [flat * (2**octave * 2 * math.pi / _LONGEST_PERIOD) for octave in range(self.octaves)]
        waves = [wave for angle in angles for wave in (angle.sin(), angle.cos())]
        hidden = self.enter(torch.cat([flat / size, size.log(), *waves], 1))
        if self.read is None and not condition.shape[1]:  # there is nothing to tell but the time
            shift = of_times(lambda features: self.shift(functional.silu(self.time(features))), time)
        else:  # even if this network reads nothing: the same numbers, to the bit, as of its widened copy
            told = of_times(self.time, time)
            if self.read is not None:
                told = told + self.read(condition[:, : self.condition].to(told.dtype))
            shift = self.shift(functional.silu(told))
        shifts = shift.chunk(len(self.first), 1)
        for norm, first, second, shift in zip(self.norms, self.first, self.second, shifts, strict=True):
            hidden = hidden + second(functional.silu(first(norm(hidden)) + shift))
        said = self.last(functional.silu(hidden))
        return said.view(len(state), -1, *self.shape[1:])

    def silence(self) -> None:
        _silence(self.last)


class TokenTransformer(Network):
    """A bidirectional transformer over strings of tokens, one of which may say that a token is masked.

    length: L. vocabulary: V, the logits of a token; token V is the mask. condition: C. width: of its states, a multiple
    of `heads`. blocks: of attention and a multilayer perceptron each. Raises ValueError naming a size out of range.
    """

    def __init__(
        self, length: int, vocabulary: int, condition: int = 0, width: int = 64, blocks: int = 2, heads: int = 4
    ) -> None:
        super().__init__()
        _require_sizes(
            condition=condition, width=width, blocks=blocks, length=length, vocabulary=vocabulary, heads=heads
        )
        if width % heads:
            raise ValueError(f"width = {width}: must be a multiple of heads = {heads}")
        self.condition, self.heads = condition, heads
        self.token = nn.Embedding(vocabulary + 1, width)
        self.position = nn.Parameter(torch.empty(length, width).normal_(std=0.02))
        self.time = nn.Linear(2 * _FREQUENCIES, width)
        self.read = nn.Linear(condition, width, bias=False) if condition else None
        self.blocks = nn.ModuleList(_Block(width, heads) for _ in range(blocks))
        self.norm = nn.LayerNorm(width)
        self.last = nn.Linear(width, vocabulary)

    def settings(self) -> dict[str, NetworkSetting]:
        return {
            "length": self.position.shape[0],
            "vocabulary": self.last.out_features,
            "condition": self.condition,
            "width": self.last.in_features,
            "blocks": len(self.blocks),
            "heads": self.heads,
        }

    def forward(self, state: Tensor, time: Tensor, condition: Tensor) -> Tensor:
        told = of_times(self.time, time)
        if self.read is not None:
            told = told + self.read(condition[:, : self.condition].to(told.dtype))
        hidden = self.token(state) + self.position + told[:, None]
        for block in self.blocks:
            hidden = block(hidden)
        return self.last(self.norm(hidden))

    def silence(self) -> None:
        _silence(self.last)


class _Block(nn.Module):
    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.norm, self.other_norm = nn.LayerNorm(width), nn.LayerNorm(width)
        self.attend, self.project = nn.Linear(width, 3 * width), nn.Linear(width, width)
        self.widen, self.narrow = nn.Linear(width, 4 * width), nn.Linear(4 * width, width)

    def forward(self, hidden: Tensor) -> Tensor:
        count, length, width = hidden.shape
        mixed = self.attend(self.norm(hidden)).view(count, length, 3, self.heads, width // self.heads)
        query, key, value = mixed.permute(2, 0, 3, 1, 4)
        attended = functional.scaled_dot_product_attention(query, key, value)
        hidden = hidden + self.project(attended.transpose(1, 2).reshape(count, length, width))
        return hidden + self.narrow(functional.gelu(self.widen(self.other_norm(hidden))))


def time_features(time: Tensor) -> Tensor:
    """Sines and cosines of times `[N]` at geometrically spaced frequencies: `[N, 2 * 32]`."""
    exponent = torch.arange(_FREQUENCIES, device=time.device) / (_FREQUENCIES - 1)
    angle = time.float()[:, None] * _HIGHEST_FREQUENCY**exponent
    return torch.cat([angle.sin(), angle.cos()], 1)


def of_times(function: Callable[[Tensor], Tensor], time: Tensor) -> Tensor:
    """What `function` makes of the features of each time, `[N]` to `[N, W]`.

    Chains have their times in common, so a processor asks it once for each that there is. Other devices ask it for all:
    how many there are is not known before the work that is under way there is done.
    """
    if time.device.type != "cpu":
        return function(time_features(time))
    times, which = torch.unique(time, return_inverse=True)
    return functional.embedding(which, function(time_features(times)))


def _silence(layer: nn.Linear | nn.Conv2d) -> None:
    nn.init.zeros_(layer.weight)
    if layer.bias is not None:
        nn.init.zeros_(layer.bias)


def _require_sizes(condition: int, shape: tuple[int, ...] | list[int] = (1,), octaves: int = 0, **sizes: int) -> None:
    """Raise ValueError naming the size that is no whole number, or out of range."""
    if not (isinstance(shape, (tuple, list)) and len(shape)):
        raise ValueError(f"shape = {shape!r}: must be whole numbers")
    named = {
        "condition": (condition, 0),
        "octaves": (octaves, 0),
        **{f"shape[{axis}]": (length, 1) for axis, length in enumerate(shape)},
    }
    for name, (value, least) in (named | {name: (value, 1) for name, value in sizes.items()}).items():
        most = {"blocks": 1000, "octaves": 32}.get(name, _LARGEST)
        if not isinstance(value, int) or isinstance(value, bool) or not least <= value <= most:
            raise ValueError(f"{name} = {value!r}: must be a whole number from {least} to {most}")
