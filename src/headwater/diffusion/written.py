"""Objects of a diffusion prior as people and files have them: in the units of the data, as text and as arrays."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

from headwater.runs import atomic


def text_of(objects: Tensor, alphabet: str) -> list[str]:
    """One line an object: its numbers; of tokens their characters, or their numbers where there is no alphabet."""
    if objects.is_floating_point():
        return [" ".join(f"{number:.6g}" for number in row) for row in objects.flatten(1).tolist()]
    if alphabet:  # a token that is still a mask cannot be: the last step reveals all
        return ["".join(alphabet[token] for token in row) for row in objects.tolist()]
    return [" ".join(map(str, row)) for row in objects.tolist()]


def numbers_of(text: Sequence[str], shape: Sequence[int], tokens: bool, alphabet: str) -> NDArray[np.generic]:
    """The inverse: `[N, *shape]` in the units of the data, float32; whole numbers of tokens."""
    if tokens and alphabet:
        return np.array([[alphabet.index(character) for character in one] for one in text])
    return np.array([one.split() for one in text]).astype(np.int64 if tokens else np.float32).reshape(-1, *shape)


def write_array(path: Path, values: NDArray[np.generic]) -> Path:
    """Write a .npy file, whole or not at all. Returns its path."""
    with atomic(path) as partial, partial.open("wb") as file:
        np.save(file, values, allow_pickle=False)
    return path
