"""Weights in memory that processes share: one publishes versions, any number read the newest, and nobody ever waits.

A sequence lock over two slots. There is no lock that a process killed at any moment could keep: the publisher writes
the slot that does not hold the newest version, and a reader that finds the publisher to have come round to its slot
meanwhile reads again.
"""

from __future__ import annotations

import mmap
from collections.abc import Mapping

import numpy as np
import torch
from torch import Tensor

_ALIGNMENT = 64
_BEGUN, _DONE = 0, 1


class SharedWeights:
    """Room for tensors like `tensors`, by name, each in its own type. Made before a fork, shared by both sides."""

    def __init__(self, tensors: Mapping[str, Tensor]) -> None:
        offsets, size = [], 0
        for tensor in tensors.values():
            offsets.append(size)
            size += -(-tensor.numel() * tensor.element_size() // _ALIGNMENT) * _ALIGNMENT
        self._memory = mmap.mmap(-1, _ALIGNMENT + 2 * max(size, _ALIGNMENT))
        # How many publications were begun and how many were done, then the version in each slot: aligned eight bytes
        # each, which no reader sees half written.
        self._counters = np.frombuffer(self._memory, dtype=np.int64, count=4)
        self._slots = [
            {
                name: self._view(tensor, _ALIGNMENT + slot * size + offset)
                for (name, tensor), offset in zip(tensors.items(), offsets, strict=True)
            }
            for slot in (0, 1)
        ]

    def publish(self, tensors: Mapping[str, Tensor], version: int) -> None:
        """Make these the newest. Only one process may publish."""
        count = int(self._counters[_DONE]) + 1
        self._counters[_BEGUN] = count
        slot = count % 2
        for name, target in self._slots[slot].items():
            target.copy_(tensors[name].detach())
        self._counters[2 + slot] = version
        self._counters[_DONE] = count

    def read_into(self, tensors: Mapping[str, Tensor]) -> int:
        """Copy the newest weights into `tensors`; returns their version. Something must have been published."""
        while True:
            count = int(self._counters[_DONE])
            slot = count % 2
            with torch.no_grad():
                for name, source in self._slots[slot].items():
                    tensors[name].copy_(source)
            version = int(self._counters[2 + slot])
            if self._counters[_BEGUN] <= count + 1:  # the publisher is in the other slot, at most
                return version

    def _view(self, like: Tensor, offset: int) -> Tensor:
        if not like.numel():
            return like.new_empty(like.shape, device="cpu")
        return torch.frombuffer(self._memory, dtype=like.dtype, count=like.numel(), offset=offset).view(like.shape)
