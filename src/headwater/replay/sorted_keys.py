"""A sorted set of integers that changes a little at a time: blocks of keys in order, as in the leaves of a B-tree.

Adding, removing, the key at a position and the position of a key each cost one search and at most one moved block, at
any size, so that nothing ever has to be sorted or built anew. Which keys it holds is all that its answers depend on.
"""

from __future__ import annotations

import numpy as np
import torch
from numpy.typing import NDArray

from headwater.native import kept_njit

_BLOCK = 128  # keys: 1 KiB, short to shift, and few enough blocks to count through
_MERGE = 3 * _BLOCK // 4  # neighbours that together hold no more become one
_USED, _SPARE, _EVER = 0, 1, 2  # the sizes: blocks in use, blocks given back, blocks ever used


class SortedKeys:
    """Distinct int64 keys, at most `capacity` of them, in rising order.

    Room is reserved at once and touched as it fills, which costs nothing before: the operating system hands out zero
    pages late. Two neighbouring blocks hold more than `_MERGE` keys together, which bounds how many there can be.
    """

    def __init__(self, capacity: int) -> None:
        blocks = 2 * capacity // _MERGE + 4
        keys, spare = reserve(blocks, _BLOCK), reserve(blocks)
        # By place in the order of blocks: which block it is, how many keys it holds, and the lowest of them.
        block, count, low = reserve(blocks), reserve(blocks), reserve(blocks)
        self._arrays = (keys, block, count, low, spare, np.zeros(3, np.int64))

    def __len__(self) -> int:
        _, _, count, _, _, sizes = self._arrays
        return int(count[: sizes[_USED]].sum())

    @property
    def nbytes(self) -> int:
        """Bytes of memory ever touched."""
        keys, block, count, low, spare, sizes = self._arrays
        return int(sizes[_EVER]) * sum(array[:1].nbytes for array in (keys, block, count, low, spare))

    def add(self, keys: NDArray[np.int64]) -> None:
        """Add `keys`, none of which may be there already."""
        _add(*self._arrays, np.sort(keys))  # in order, neighbours find their block at hand

    def remove(self, keys: NDArray[np.int64]) -> None:
        """Remove `keys`, each of which must be there."""
        _remove(*self._arrays, np.sort(keys))

    def at(self, positions: NDArray[np.int64]) -> NDArray[np.int64]:
        """The keys at these positions of the rising order, each from 0 to the number of keys less 1."""
        return _at(*self._arrays, positions)

    def below(self, keys: NDArray[np.int64]) -> NDArray[np.int64]:
        """How many keys are lower than each of `keys`: the position of a key that is there."""
        return _below(*self._arrays, keys)


def reserve(*shape: int, dtype: torch.dtype = torch.int64) -> np.ndarray:
    """An array of any content whose memory is taken as it is written to.

    From torch: numpy asks the system for huge pages, and to find one can take it milliseconds.
    """
    return torch.empty(shape, dtype=dtype).numpy()


@kept_njit()
def _place(low, used, key):  # type: ignore[no-untyped-def]
    """The place of the block where `key` belongs: the last whose lowest key is not above it, or the first."""
    first, last = 0, used
    while first < last:
        middle = (first + last) // 2
        if low[middle] <= key:
            first = middle + 1
        else:
            last = middle
    return max(first - 1, 0)


@kept_njit()
def _within(row, count, key):  # type: ignore[no-untyped-def]
    """How many of the first `count` keys of `row` are lower than `key`."""
    first, last = 0, count
    while first < last:
        middle = (first + last) // 2
        if row[middle] < key:
            first = middle + 1
        else:
            last = middle
    return first


@kept_njit()
def _open(block, count, low, spare, sizes, place):  # type: ignore[no-untyped-def]
    """Make room for a block at `place`, empty."""
    for i in range(sizes[_USED], place, -1):
        block[i], count[i], low[i] = block[i - 1], count[i - 1], low[i - 1]
    sizes[_USED] += 1
    if sizes[_SPARE]:
        sizes[_SPARE] -= 1
        block[place] = spare[sizes[_SPARE]]
    else:
        block[place] = sizes[_EVER]
        sizes[_EVER] += 1
    count[place] = 0


@kept_njit()
def _close(block, count, low, spare, sizes, place):  # type: ignore[no-untyped-def]
    """Take the block at `place` out of the order."""
    spare[sizes[_SPARE]] = block[place]
    sizes[_SPARE] += 1
    sizes[_USED] -= 1
    for i in range(place, sizes[_USED]):
        block[i], count[i], low[i] = block[i + 1], count[i + 1], low[i + 1]


@kept_njit()
def _merge(keys, block, count, low, spare, sizes, place):  # type: ignore[no-untyped-def]
    """Make one of the blocks at `place` and after it, if both are there and hold few keys."""
    if place < 0 or place + 1 >= sizes[_USED] or count[place] + count[place + 1] > _MERGE:
        return
    row, after = keys[block[place]], keys[block[place + 1]]
    for i in range(count[place + 1]):
        row[count[place] + i] = after[i]
    count[place] += count[place + 1]
    low[place] = row[0]
    _close(block, count, low, spare, sizes, place + 1)


@kept_njit()
def _split(keys, block, count, low, spare, sizes, place):  # type: ignore[no-untyped-def]
    """Halve the full block at `place`."""
    _open(block, count, low, spare, sizes, place + 1)
    row, after = keys[block[place]], keys[block[place + 1]]
    half = _BLOCK // 2
    for i in range(half):
        after[i] = row[half + i]
    count[place] = count[place + 1] = half
    low[place + 1] = after[0]
    _merge(keys, block, count, low, spare, sizes, place + 1)
    _merge(keys, block, count, low, spare, sizes, place - 1)


@kept_njit()
def _add(keys, block, count, low, spare, sizes, new):  # type: ignore[no-untyped-def]
    for key in new:
        place = _place(low, sizes[_USED], key)
        if sizes[_USED] == 0:
            _open(block, count, low, spare, sizes, 0)
        elif count[place] == _BLOCK:
            if place == sizes[_USED] - 1 and keys[block[place], _BLOCK - 1] < key:
                place += 1  # what only ever grows at its end stays full
                _open(block, count, low, spare, sizes, place)
            else:
                _split(keys, block, count, low, spare, sizes, place)
                place = _place(low, sizes[_USED], key)
        row = keys[block[place]]
        position = _within(row, count[place], key)
        for i in range(count[place], position, -1):
            row[i] = row[i - 1]
        row[position] = key
        count[place] += 1
        low[place] = row[0]


@kept_njit()
def _remove(keys, block, count, low, spare, sizes, old):  # type: ignore[no-untyped-def]
    for key in old:
        place = _place(low, sizes[_USED], key)
        row = keys[block[place]]
        count[place] -= 1
        for i in range(_within(row, count[place] + 1, key), count[place]):
            row[i] = row[i + 1]
        low[place] = row[0]
        if count[place] == 0:
            _close(block, count, low, spare, sizes, place)
        else:
            _merge(keys, block, count, low, spare, sizes, place)
            _merge(keys, block, count, low, spare, sizes, place - 1)


@kept_njit()
def _at(keys, block, count, low, spare, sizes, positions):  # type: ignore[no-untyped-def]
    ends = np.cumsum(count[: sizes[_USED]])
    found = np.empty(positions.size, np.int64)
    for i in range(positions.size):
        place = np.searchsorted(ends, positions[i], side="right")
        found[i] = keys[block[place], positions[i] - (ends[place] - count[place])]
    return found


@kept_njit()
def _below(keys, block, count, low, spare, sizes, wanted):  # type: ignore[no-untyped-def]
    ends = np.cumsum(count[: sizes[_USED]])
    found = np.zeros(wanted.size, np.int64)
    for i in range(wanted.size if sizes[_USED] else 0):
        place = _place(low, sizes[_USED], wanted[i])
        found[i] = ends[place] - count[place] + _within(keys[block[place]], count[place], wanted[i])
    return found
