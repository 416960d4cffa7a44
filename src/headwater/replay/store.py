"""Where a replay keeps its entries: packed end to end in a ring, as in a batch of trajectories, with an index by key.

There is no Python object an entry, and adding costs time proportional to what is added, on average: holes are closed
only when room runs out.
"""

from __future__ import annotations

from functools import cached_property

import numpy as np
import torch
from numba import njit
from torch import Tensor

from headwater.replay.rules import Entries
from headwater.trajectories import Trajectories, rows_of


class Store:
    """Packed entries in the order in which they came, some of them dead.

    `rows` holds a line for each entry, appended at the end; a dead one stays until the lines run out and the live ones
    move together. `steps` is a ring: an entry's steps begin at `start`, counted from the first step ever stored, and
    lie at that number modulo the ring's size. So what the oldest entries leave is free at once; duplicates leave holes,
    closed when the ring is full.
    """

    def __init__(self, capacity: int) -> None:
        self.capacity = capacity
        self.steps: dict[str, Tensor] = {}
        self.rows: dict[str, Tensor] = {}
        self.alive = torch.empty(0, dtype=torch.bool)
        self.table = np.empty(0, dtype=np.int32)  # open addressing: the line that last had the key, or -1
        self.n_rows = 0
        self.end = 0  # where the next step goes, before the modulo
        self.live = torch.empty(0, dtype=torch.int64)
        self.recent = 0

    @cached_property
    def entries(self) -> Entries:
        log_reward, condition_key, version = (
            self.rows[name][self.live] for name in ("log_reward", "condition_key", "version")
        )
        return Entries(log_reward, condition_key, version, self.recent)

    def add(self, batch: Trajectories) -> None:
        flat = batch.tensors()
        steps = {name: tensor.detach() for name, tensor in flat.items() if name.startswith("steps.")}
        rows = {name: tensor.detach() for name, tensor in flat.items() if name not in steps}
        self._check(steps, rows)
        rows["condition_key"] = _condition_key(batch.condition)
        rows["key"] = _mix(rows["condition_key"] ^ batch.identity)
        first, last = self._make_room(steps, rows)
        rows["start"] = self.end + batch.starts
        for name, tensor in rows.items():
            self.rows[name][first:last] = tensor
        ring = next(iter(self.steps.values())).shape[0]
        places = torch.arange(self.end, self.end + batch.n_steps) % ring
        for name, tensor in steps.items():
            self.steps[name][places] = tensor
        self.end += batch.n_steps
        self.n_rows = last
        self.alive[first:last] = True
        _insert(self.table, self.rows["key"].numpy(), self.alive.numpy(), first, last)
        live = self.alive[:last].nonzero()[:, 0]
        excess = max(len(live) - self.capacity, 0)
        self.alive[live[:excess]] = False
        self.live = live[excess:]
        self.recent = int(self.alive[first:last].sum())
        self.__dict__.pop("entries", None)

    def gather(self, lines: Tensor) -> Trajectories:
        """The entries on these lines, `[K]`, as a batch."""
        rows = {name: self.rows[name][lines] for name in self.rows if name not in ("key", "condition_key", "start")}
        ring = next(iter(self.steps.values())).shape[0]
        places = rows_of(self.rows["start"][lines], rows["lengths"]) % ring
        return Trajectories.from_tensors(rows | {name: tensor[places] for name, tensor in self.steps.items()})

    def _check(self, steps: dict[str, Tensor], rows: dict[str, Tensor]) -> None:
        for name in ("lengths", "version", "identity"):
            if rows[name].dtype != torch.int64:
                raise ValueError(f"{name} is {rows[name].dtype}, expected torch.int64")
        unfit = rows["log_reward"].isfinite().logical_not().nonzero()[:, 0].tolist()
        if unfit:
            value = float(rows["log_reward"][unfit[0]])
            raise ValueError(
                f"log_reward of trajectory {unfit[0]} is {value}: a replay takes finite ones only; "
                "leave out the trajectories whose reward failed"
            )
        if not self.steps:
            return
        if steps.keys() != self.steps.keys():
            raise ValueError(f"cannot add {sorted(steps)} to a replay of {sorted(self.steps)}")
        for name, tensor in (steps | rows).items():
            here = self.steps[name] if name in steps else self.rows[name]
            if tensor.dtype != here.dtype or tensor.shape[1:] != here.shape[1:]:
                raise ValueError(
                    f"{name} has rows of {tuple(tensor.shape[1:])} {tensor.dtype}, "
                    f"the replay holds {tuple(here.shape[1:])} {here.dtype}"
                )

    def _make_room(self, steps: dict[str, Tensor], rows: dict[str, Tensor]) -> tuple[int, int]:
        """Room for these at the end; returns the lines that they go to."""
        if not self.steps:
            self.steps = {name: tensor[:0] for name, tensor in steps.items()}
            self.rows = {name: tensor[:0] for name, tensor in rows.items()} | {
                "start": torch.empty(0, dtype=torch.int64)
            }
        new_rows, new_steps = len(rows["lengths"]), len(next(iter(steps.values())))
        ring = len(next(iter(self.steps.values())))
        begin = int(self.rows["start"][self.live[0]]) if len(self.live) else self.end
        if self.end - begin + new_steps > ring:
            self._repack_steps(ring, begin, new_steps)
        if self.n_rows + new_rows > len(self.alive):
            self._repack_rows(new_rows)
        return self.n_rows, self.n_rows + new_rows

    def _repack_steps(self, ring: int, begin: int, new_steps: int) -> None:
        """Close the holes, in a larger ring if they were few."""
        starts, lengths = self.rows["start"][self.live], self.rows["lengths"][self.live]
        size = _size(ring, int(lengths.sum()) + new_steps)
        target = self.steps
        if size != ring:
            target = {name: tensor.new_empty((size, *tensor.shape[1:])) for name, tensor in self.steps.items()}
        # Steps only ever move towards `begin`, so in the same ring no step is overwritten before it has moved.
        new_starts = begin + lengths.cumsum(0) - lengths
        for first in range(0, len(starts), 65536):
            chunk = slice(first, first + 65536)
            source = rows_of(starts[chunk], lengths[chunk]) % ring
            destination = rows_of(new_starts[chunk], lengths[chunk]) % size
            for name, tensor in self.steps.items():
                target[name][destination] = tensor[source]
        self.steps = target
        self.rows["start"][self.live] = new_starts
        self.end = begin + int(lengths.sum())

    def _repack_rows(self, new_rows: int) -> None:
        """Move the live lines together, in larger tensors if few were dead, and index them again."""
        count = len(self.live)
        size = _size(len(self.alive), count + new_rows)
        for name, tensor in self.rows.items():
            kept = tensor[self.live]
            self.rows[name] = tensor.new_empty((size, *tensor.shape[1:])) if size != len(tensor) else tensor
            self.rows[name][:count] = kept
        self.alive = torch.arange(size) < count
        self.live = torch.arange(count)
        self.n_rows = count
        self.table = np.full(1 << (2 * size - 1).bit_length(), -1, dtype=np.int32)
        _insert(self.table, self.rows["key"].numpy(), self.alive.numpy(), 0, count)


def _size(allocated: int, needed: int) -> int:
    """What is allocated, if an eighth of it stays free, so that the next repacking is far off; else a quarter more."""
    return allocated if allocated >= needed + needed // 8 else needed + needed // 4


def _condition_key(condition: Tensor) -> Tensor:
    value = torch.zeros(condition.shape[0], dtype=torch.int64)
    for column in (condition.double() + 0.0).view(torch.int64).unbind(1):  # + 0.0 makes one of both zeros
        value = _mix(value ^ column)
    return value


def _mix(value: Tensor) -> Tensor:
    """A bijection of int64 that spreads every bit."""
    for shift in (31, 29, 32):
        # An arithmetic shift would send x and ~x to the same value: clear the copies of the sign.
        value = (value ^ ((value >> shift) & ((1 << (64 - shift)) - 1))) * 0x2545F4914F6CDD1D  # wraps around
    return value


@njit(nogil=True)
def _insert(table, keys, alive, first, last):  # type: ignore[no-untyped-def]
    """Enter the lines `first .. last` by key; a line that has the same key as a later one dies."""
    for row in range(first, last):
        place = (keys[row] >> 20) & (len(table) - 1)  # a product spreads upwards: its lowest bits are its worst
        while table[place] >= 0 and keys[table[place]] != keys[row]:
            place = (place + 1) & (len(table) - 1)
        if table[place] >= 0:
            alive[table[place]] = False
        table[place] = row
