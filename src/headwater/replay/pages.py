"""Room for the steps of trajectories that come and go: small pages, chained, as a file system chains its blocks.

What a trajectory leaves is taken by the next ones, whatever their lengths, so that nothing is ever moved; room grows by
slabs, each as large as all before it, of which the operating system gives only what is written to.
"""

from __future__ import annotations

import math

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from headwater.native import kept_njit
from headwater.replay.sorted_keys import reserve

_FIRST = 1 << 10  # pages of the first slab; of slab i > 0, 2^(i - 1) times as many
_SLABS = 21  # up to 2^30 pages
_USED, _FREED, _FREE = 0, 1, 2  # the sizes: pages ever used, pages given back, the first of these (they are chained)


class Pages:
    """The per-step tensors of entries, by name, in pages of a few steps.

    A page costs its trajectory 4 bytes for the next one and, on average, half a page left empty: its size makes the two
    together least for trajectories of `mean_length`, but a page of less than 96 bytes would be slow to follow.
    """

    def __init__(self, steps: dict[str, Tensor], mean_length: float) -> None:
        self.like = {name: tensor[:0].clone() for name, tensor in steps.items()}
        step_bytes = max(sum(_step_bytes(tensor) for tensor in steps.values()), 1)
        self.page = max(1, round(min(mean_length, max((8 * mean_length / step_bytes) ** 0.5, 96 / step_bytes))))
        self._slabs = {
            name: (np.empty((0, self.page * _step_bytes(tensor)), np.uint8),) * _SLABS for name, tensor in steps.items()
        }
        self._next = (np.empty(0, np.int32),) * _SLABS
        self._sizes = np.zeros(3, np.int64)
        self._n_slabs = 0

    @property
    def nbytes(self) -> int:
        """Bytes of memory ever touched."""
        return int(self._sizes[_USED]) * (4 + sum(slabs[0].shape[1] for slabs in self._slabs.values()))

    def write(self, steps: dict[str, Tensor], lengths: NDArray[np.int64]) -> NDArray[np.int32]:
        """Store packed steps; returns the first page of each trajectory, its address from now on."""
        pages = -(-lengths // self.page)
        self._reserve(int(pages.sum()))
        first = np.empty(len(lengths), np.int32)
        _take(self._next, self._sizes, pages, first)
        for name, tensor in steps.items():
            _copy(self._slabs[name], self._next, self.page, first, lengths, _as_bytes(tensor.contiguous()), True)
        return first

    def read(self, first: NDArray[np.int32], lengths: NDArray[np.int64]) -> dict[str, Tensor]:
        """The steps of the trajectories that begin on these pages, packed."""
        steps = {name: like.new_empty((int(lengths.sum()), *like.shape[1:])) for name, like in self.like.items()}
        for name, tensor in steps.items():
            _copy(self._slabs[name], self._next, self.page, first, lengths, _as_bytes(tensor), False)
        return steps

    def free(self, first: NDArray[np.int32], lengths: NDArray[np.int64]) -> None:
        """Give back the pages of these trajectories."""
        _give_back(self._next, self._sizes, -(-lengths // self.page), first)

    def _reserve(self, pages: int) -> None:
        needed = int(self._sizes[_USED]) + max(pages - int(self._sizes[_FREED]), 0)
        while _FIRST << self._n_slabs >> 1 < needed if self._n_slabs else needed:
            size = _FIRST << max(self._n_slabs - 1, 0)
            for name, slabs in self._slabs.items():
                self._slabs[name] = self._with_slab(slabs, reserve(size, slabs[0].shape[1], dtype=torch.uint8))
            self._next = self._with_slab(self._next, reserve(size, dtype=torch.int32))
            self._n_slabs += 1

    def _with_slab(self, slabs: tuple[np.ndarray, ...], new: np.ndarray) -> tuple[np.ndarray, ...]:
        return (*slabs[: self._n_slabs], new, *slabs[self._n_slabs + 1 :])


def _step_bytes(tensor: Tensor) -> int:
    return tensor.element_size() * math.prod(tensor.shape[1:])


def _as_bytes(tensor: Tensor) -> NDArray[np.uint8]:
    return tensor.reshape(-1).view(torch.uint8).numpy()


@kept_njit()
def _find(page):  # type: ignore[no-untyped-def]
    """The slab of a page, and its number there."""
    if page < _FIRST:
        return 0, page
    slab = 1
    while page >= _FIRST << slab:
        slab += 1
    return slab, page - (_FIRST << (slab - 1))


@kept_njit()
def _take(following, sizes, counts, first):  # type: ignore[no-untyped-def]
    """Chain `counts[i]` free pages for each i; `first` takes the first of each chain."""
    for i in range(counts.size):
        slab, place = 0, -1
        for _ in range(counts[i]):
            if sizes[_FREED]:
                page = sizes[_FREE]
                free_slab, free_place = _find(page)
                sizes[_FREE] = following[free_slab][free_place]
                sizes[_FREED] -= 1
            else:
                page = sizes[_USED]
                sizes[_USED] += 1
            if place < 0:
                first[i] = page
            else:
                following[slab][place] = page
            slab, place = _find(page)


@kept_njit()
def _give_back(following, sizes, counts, first):  # type: ignore[no-untyped-def]
    """Put each chain, `counts[i]` pages from `first[i]` on, before the free ones."""
    for i in range(counts.size):
        slab, place = _find(first[i])
        for _ in range(counts[i] - 1):
            slab, place = _find(following[slab][place])
        following[slab][place] = sizes[_FREE]
        sizes[_FREE] = first[i]
        sizes[_FREED] += counts[i]


@kept_njit()
def _copy(slabs, following, page, first, lengths, packed, write):  # type: ignore[no-untyped-def]
    """Copy the bytes of each trajectory from `packed` to its pages, or from its pages to `packed`."""
    step_bytes = slabs[0].shape[1] // page
    done = 0
    for i in range(first.size):
        left = lengths[i] * step_bytes
        address = first[i]
        while left > 0:
            slab, place = _find(address)
            row = slabs[slab][place]
            here = min(left, row.size)
            if write:
                for j in range(here):
                    row[j] = packed[done + j]
            else:
                for j in range(here):
                    packed[done + j] = row[j]
            done += here
            left -= here
            if left > 0:
                address = following[slab][place]
