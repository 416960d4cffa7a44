"""Bit sequences with hidden modes (Malkin et al. 2022, arXiv 2201.13259): n bits in words of k, rewarded near 60 modes.

Three published rewards go by the same name and differ; each is here under its library's. The modes depend on the random
generator of whoever draws them, so only results on the same mode set compare.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import Literal

import torch
from torch import Tensor

from headwater.environments.base import Environment, Objects
from headwater.environments.rows import integer_rows
from headwater.environments.sequences import Sequences
from headwater.environments.slots import Slots

MODE_BLOCKS = ("00000000", "11111111", "11110000", "00001111", "00111100")
FOUND_WITHIN = 30
"""A mode counts as found by an object within this Hamming distance, for n = 120."""

_PUBLISHED_STRENGTH = {"gfnx": 3.0, "gflownet-rl": 2.0, "torchgfn": 1.0}


class AppendedBits(Sequences):
    """Bit sequences built word by word, left to right. Objects are bits, uint8 `[T, n]`."""

    def __init__(self, bits: int, word: int) -> None:
        super().__init__([format(value, f"0{word}b") for value in range(2**word)], _words(bits, word))
        self.word = word

    def objects(self, states: Tensor) -> Objects:
        return _to_bits(states, self.word)

    def states(self, objects: Objects) -> Tensor:
        return _to_words(objects, self.max_length, self.word)


class SlottedBits(Slots):
    """Bit sequences built by placing words in any order. Objects are bits, uint8 `[T, n]`."""

    def __init__(self, bits: int, word: int) -> None:
        super().__init__(_words(bits, word), 2**word)
        self.word = word

    def objects(self, states: Tensor) -> Objects:
        return _to_bits(states, self.word)

    def states(self, objects: Objects) -> Tensor:
        return _to_words(objects, self.length, self.word)


def bit_sequences(bits: int = 120, word: int = 8, construction: Literal["append", "slots"] = "append") -> Environment:
    """The environment of n = `bits` bits in words of k = `word`, autoregressive ("append") or in any order
    ("slots").
    """
    if construction not in ("append", "slots"):
        raise ValueError(f"construction = {construction!r}: must be 'append' or 'slots'")
    return AppendedBits(bits, word) if construction == "append" else SlottedBits(bits, word)


def hidden_modes(bits: int = 120, count: int = 60, seed: int = 0) -> Tensor:
    """`count` modes, each of `bits` / 8 blocks drawn from `MODE_BLOCKS`: uint8 `[count, bits]`; short ones repeat."""
    if bits < 8 or bits % 8:
        raise ValueError(f"bits = {bits}: must be a multiple of 8, the length of a mode's block")
    blocks = torch.tensor([[int(bit) for bit in block] for block in MODE_BLOCKS], dtype=torch.uint8)
    generator = torch.Generator().manual_seed(seed)
    return blocks[torch.randint(len(blocks), (count, bits // 8), generator=generator)].flatten(1)


def flipped_modes(modes: Tensor, seed: int = 0) -> Tensor:
    """The test set: each mode with 0, 1, ... n - 1 randomly chosen bits flipped, uint8 `[count * n, n]` (7,200 for
    60 modes, n = 120).
    """
    count, bits = modes.shape
    generator = torch.Generator().manual_seed(seed)
    rank = torch.rand(count, bits, bits, generator=generator).argsort(-1)
    flips = rank < torch.arange(bits)[None, :, None]
    return (modes[:, None].bool() ^ flips).flatten(0, 1).to(torch.uint8)


def mode_distances(objects: Tensor, modes: Tensor) -> Tensor:
    """Hamming distance of each object `[T, n]` to each mode `[M, n]`: int64 `[T, M]`."""
    a, b = objects.float(), modes.to(objects.device).float()
    return (a.sum(1)[:, None] + b.sum(1)[None] - 2 * a @ b.T).round().long()


def modes_found(objects: Tensor, modes: Tensor, within: int = FOUND_WITHIN) -> int:
    """How many different modes have an object within the Hamming distance `within`."""
    return int((mode_distances(objects, torch.unique(modes, dim=0)) <= within).any(0).sum())


@dataclass(frozen=True)
class BitReward:
    """R(x) from d, the Hamming distance of x to the closest mode.

    form "gfnx": exp(-beta d / n), beta 3. "gflownet-rl": exp(-beta d), beta 2, not divided by n. "torchgfn": exp(-d /
    temperature), temperature 1. strength is that beta or temperature; None for the published one. modes: uint8 `[M,
    n]`.
    """

    modes: Tensor = field(default_factory=hidden_modes)
    form: Literal["gfnx", "gflownet-rl", "torchgfn"] = "gfnx"
    strength: float | None = None

    def __post_init__(self) -> None:
        if self.form not in _PUBLISHED_STRENGTH:
            raise ValueError(f"form = {self.form!r}: must be one of {', '.join(_PUBLISHED_STRENGTH)}")
        if self.strength is not None and not 0 < self.strength < math.inf:
            raise ValueError(f"strength = {self.strength}: must be positive and finite")

    def __call__(self, objects: Objects, condition: Tensor) -> Tensor:
        """Log-reward of bits `[T, n]`: float32 `[T]`."""
        closest = mode_distances(torch.as_tensor(objects), self.modes).amin(1).float()
        strength = _PUBLISHED_STRENGTH[self.form] if self.strength is None else self.strength
        if self.form == "gfnx":
            return -strength * closest / self.modes.shape[1]
        return -strength * closest if self.form == "gflownet-rl" else -closest / strength


def _words(bits: int, word: int) -> int:
    if word < 1 or word > 16:
        raise ValueError(f"word = {word}: must lie between 1 and 16")
    if bits < word or bits % word:
        raise ValueError(f"bits = {bits}: must be a multiple of word = {word}")
    return bits // word


def _to_bits(states: Tensor, word: int) -> Tensor:
    """Words `[T, length]` to their bits, the highest first: uint8 `[T, length * word]`. An empty slot has no bits:
    it reads as 0.
    """
    places = torch.arange(word - 1, -1, -1, device=states.device)
    return ((states.long()[:, :, None] >> places) & 1).flatten(1).to(torch.uint8)


def _to_words(objects: Objects, length: int, word: int) -> Tensor:
    bits = integer_rows(objects, length * word, 2).long()
    return (bits.view(-1, length, word) << torch.arange(word - 1, -1, -1)).sum(2).to(torch.int32)
