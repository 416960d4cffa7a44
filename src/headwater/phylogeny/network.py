"""The network over forests: attention among the trees, a score for every pair, densities of branch lengths.

Every node is embedded once, whatever number of forests it stands in; the first layer of the pair score is a sum of one
term a tree, so that nothing of the network's width is built for every pair.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal, get_args

import torch
from torch import Tensor, nn

from headwater.phylogeny.lengths import BinnedLengths, LengthDensity, MixtureLengths
from headwater.phylogeny.pair_score import pair_scores
from headwater.phylogeny.pairs import PAIR_FEATURES
from headwater.policies.attention import attention_in_blocks
from headwater.policies.layers import Linear, linear

Lengths = Literal["mixture", "binned"]


@dataclass(frozen=True)
class ForestNetwork:
    """The network over the trees of a forest."""

    width: int = 64
    """Numbers that stand for a tree."""
    layers: int = 2
    """Layers of attention among the trees."""
    heads: int = 8
    """Attention heads, a divisor of the width."""
    feed_forward: int = 2
    """Hidden units of the feed-forward layers, as a multiple of the width."""
    pair_width: int = 64
    """Hidden units of the pair score."""
    lengths: Lengths = "mixture"
    """Branch lengths from a mixture of log-normal densities, or from bins, uniform in each."""
    components: int = 4
    """Densities in the mixture."""
    bins: int = 100
    """Bins, evenly wide in log length."""

    def __post_init__(self) -> None:
        for name in ("width", "layers", "heads", "feed_forward", "pair_width", "components"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} = {getattr(self, name)}: must be at least 1")
        if self.width % self.heads:
            raise ValueError(f"heads = {self.heads}: must divide width = {self.width}")
        if self.bins < 2:
            raise ValueError(f"bins = {self.bins}: must be at least 2")
        if self.lengths not in get_args(Lengths):
            raise ValueError(f"lengths = {self.lengths!r}: must be one of {', '.join(get_args(Lengths))}")

    def density(self, sites: float) -> LengthDensity:
        """Of branch lengths, for an alignment of so many sites."""
        return MixtureLengths(self.components, sites) if self.lengths == "mixture" else BinnedLengths(self.bins)


class ForestEncoder(nn.Module):
    """Attention among the trees of each forest; forests of many sizes at once.

    Trees of all forests lie end to end, `[rows, width]`, in blocks of M forests of k trees each: `blocks` lists
    (M, k). Rows after these stand for nothing, and make a number of rows that products of matrices like.
    """

    def __init__(self, settings: ForestNetwork) -> None:
        super().__init__()
        self.layers = nn.ModuleList(_Layer(settings) for _ in range(settings.layers))
        self.norm = nn.LayerNorm(settings.width)

    def forward(self, x: Tensor, blocks: Sequence[tuple[int, int]]) -> Tensor:
        for layer in self.layers:
            x = layer(x, blocks)
        return self.norm(x)


class _Layer(nn.Module):
    def __init__(self, settings: ForestNetwork) -> None:
        super().__init__()
        width = settings.width
        self.heads = settings.heads
        self.attention_norm, self.feed_forward_norm = nn.LayerNorm(width), nn.LayerNorm(width)
        self.query_key_value, self.project = Linear(width, 3 * width), Linear(width, width)
        self.up, self.down = Linear(width, settings.feed_forward * width), Linear(settings.feed_forward * width, width)

    def forward(self, x: Tensor, blocks: Sequence[tuple[int, int]]) -> Tensor:
        packed = self.query_key_value(self.attention_norm(x))
        x = x + self.project(attention_in_blocks(packed, self.heads, blocks))
        return x + self.down(linear(self.feed_forward_norm(x), self.up.weight, self.up.bias, relu=True))


class PairScore(nn.Module):
    """A logit for every pair of trees in a forest, the same whichever comes first."""

    def __init__(self, settings: ForestNetwork) -> None:
        super().__init__()
        self.of_tree = Linear(settings.width, settings.pair_width)
        self.of_pair = nn.Parameter(torch.randn(PAIR_FEATURES, settings.pair_width) * PAIR_FEATURES**-0.5)
        self.out = nn.Parameter(torch.zeros(settings.pair_width))

    def forward(self, x: Tensor, features: Tensor, blocks: Sequence[tuple[int, int]]) -> Tensor:
        """x: `[trees, width]`; features: `[pairs, PAIR_FEATURES]` of all blocks, end to end -> logits `[pairs]`."""
        return pair_scores(self.of_tree(x), features, self.of_pair, self.out, blocks)


class LengthHead(nn.Module):
    """What a density of branch lengths takes, from the two trees that are merged and guesses at the lengths."""

    def __init__(self, settings: ForestNetwork, outputs: int) -> None:
        super().__init__()
        self.up, self.down = Linear(2 * settings.width + 5, 2 * settings.width), Linear(2 * settings.width, outputs)
        with torch.no_grad():
            self.down.weight.mul_(0.1)

    def forward(self, own: Tensor, other: Tensor, guesses: Tensor, other_length: Tensor | None = None) -> Tensor:
        """own, other: `[N, width]`, the tree under the edge and the one that it merges with. guesses: `[N, 2]`, of the
        lengths above each. other_length: `[N]`, the length above the other where that is drawn -> `[N, outputs]`.
        """
        logs = torch.cat([guesses, guesses.sum(1, keepdim=True)], 1).log()
        known = torch.zeros(len(own), 2)
        if other_length is not None:
            known = torch.stack([other_length.log() - logs[:, 1], torch.ones(len(own))], 1)
        x = torch.cat([own, other, (logs + 4.0) / 2.0, known], dim=1)
        return self.down(linear(x, self.up.weight, self.up.bias, relu=True))
