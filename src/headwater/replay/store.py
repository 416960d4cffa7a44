"""Where a replay keeps its entries: their rows in slots, their steps in pages, and three sorted indexes of the slots.

By age, by reward and by key, an index changes only where entries come and go: adding costs time in proportion to what
is added, and a rule finds the entry at any position of an order without looking at the others. There is no Python
object an entry, and nothing waits while much is moved.
"""

from __future__ import annotations

from functools import cached_property

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from headwater.replay.entries import Entries
from headwater.replay.pages import Pages
from headwater.replay.sorted_keys import SortedKeys, reserve
from headwater.trajectories import Trajectories

_LOW = np.int64(0xFFFF_FFFF)  # the lower half of an index's key
_AGES = 2**31  # of an int32


class Store:
    """Up to `capacity` entries, and of one condition up to `per_condition` (0 for no limit); raises ValueError where
    their indexes cannot have room.

    An index's key has a slot or an age in its lower half, below what it sorts by: age and slot; falling log-reward and
    age; the upper half of the entry's key and slot. Ages count the entries ever added.
    """

    def __init__(self, capacity: int, per_condition: int = 0) -> None:
        self.capacity, self.per_condition = capacity, per_condition
        try:
            if capacity >= 2**31:
                raise MemoryError
            self.by_age, self.by_reward, self.by_key = (SortedKeys(capacity) for _ in range(3))
            self.key = reserve(capacity)
            self.age, self.first_page, self.free = (reserve(capacity, dtype=torch.int32) for _ in range(3))
        except (MemoryError, RuntimeError) as error:
            raise ValueError(f"capacity is {capacity}, must be what memory has room for") from error
        self.rows: dict[str, Tensor] = {}
        self.pages: Pages | None = None
        self.count = 0
        self.n_free = 0  # slots given back; they are the first of `free`
        self.n_slots = 0  # slots ever used
        self.next_age = 0
        self.recent = 0
        self.entries: Entries = StoredEntries(self)

    @property
    def nbytes(self) -> int:
        """Bytes of memory ever touched."""
        rows = sum(tensor[:1].nbytes for tensor in self.rows.values())
        slots = self.n_slots * (rows + sum(array[:1].nbytes for array in (self.key, self.age, self.first_page)))
        indexes = sum(index.nbytes for index in (self.by_age, self.by_reward, self.by_key))
        return slots + indexes + (self.pages.nbytes if self.pages else 0)

    @property
    def slots(self) -> NDArray[np.int64]:
        """The slots of all entries, oldest first."""
        return self.slots_at(np.arange(self.count))

    def slots_at(self, indices: NDArray[np.int64]) -> NDArray[np.int64]:
        """The slots of these entries, counted oldest first."""
        return self.by_age.at(indices) & _LOW

    def add(self, batch: Trajectories, recent: int | None = None) -> None:
        """Remember these; `recent` of the newest entries count as the most recent batch, these by default."""
        flat = {name: tensor.detach() for name, tensor in batch.tensors().items()}
        steps = {name: tensor for name, tensor in flat.items() if name.startswith("steps.")}
        rows = {name: tensor for name, tensor in flat.items() if name not in steps}
        self._check(steps, rows)
        if self.pages is None:
            self.pages = Pages(steps, batch.n_steps / len(batch))
            self.rows = {name: tensor.new_empty((self.capacity, *tensor.shape[1:])) for name, tensor in rows.items()}
        key = entry_key(batch)
        newest = len(key) - 1 - np.unique(key[::-1], return_index=True)[1]  # the last of each key
        newest, conditions = np.sort(newest), condition_key(batch.condition).numpy()
        if self.per_condition:
            newest = newest[_newer_alike(conditions[newest]) < self.per_condition]
        newest = newest[-self.capacity :]
        if len(newest) < len(batch):
            chosen = batch.select(torch.from_numpy(newest)).tensors()
            steps, rows = ({name: chosen[name].detach() for name in part} for part in (steps, rows))
        slots = self._known(key[newest])
        known = slots[slots >= 0]
        crowded = self._crowded(conditions[newest], known)
        self._evict(self.count + len(slots) - len(known) - self.capacity, known, crowded)
        self._put(steps, rows, key[newest], slots)
        self.recent = len(newest) if recent is None else min(recent, self.count)
        self.entries = StoredEntries(self)

    def gather(self, slots: NDArray[np.int64]) -> Trajectories:
        """The entries in these slots, `[K]`, as a batch."""
        assert self.pages is not None
        chosen = torch.from_numpy(slots)
        rows = {name: tensor[chosen] for name, tensor in self.rows.items()}
        return Trajectories.from_tensors(rows | self.pages.read(self.first_page[slots], rows["lengths"].numpy()))

    def _known(self, key: NDArray[np.int64]) -> NDArray[np.int64]:
        """The slot of the entry that has each of these keys, or -1."""
        slots = np.full(len(key), -1)
        asked = np.arange(len(key))
        position = self.by_key.below(_joined(key >> 32, 0))
        while True:  # more than once only where two keys have the same upper half
            there = position < self.count
            asked, position = asked[there], position[there]
            found = self.by_key.at(position)
            alike = found >> 32 == key[asked] >> 32
            if not alike.any():
                return slots
            asked, position, slot = asked[alike], position[alike] + 1, found[alike] & _LOW
            same = self.key[slot] == key[asked]
            slots[asked[same]] = slot[same]
            asked, position = asked[~same], position[~same]

    def _crowded(self, arriving: NDArray[np.int64], known: NDArray[np.int64]) -> NDArray[np.int64]:
        """The slots of the oldest entries of each condition that would have too many of them with those that arrive;
        entries in the slots `known` do not count, they leave in any case.
        """
        if not self.per_condition or not self.count:
            return known[:0]
        slots = self.slots
        slots = slots[~np.isin(slots, known)]
        there = condition_key(self.rows["condition"][torch.from_numpy(slots)]).numpy()
        alike = np.isin(there, arriving)
        slots, there = slots[alike], there[alike]
        newer = _newer_alike(np.concatenate([there, arriving]))[: len(there)]
        return slots[newer >= self.per_condition]

    def _evict(self, excess: int, known: NDArray[np.int64], crowded: NDArray[np.int64]) -> None:
        """Take out the entries in the slots `known`, which stay theirs, and those in `crowded`; if those are fewer than
        `excess`, then of the others the oldest.
        """
        staying = np.concatenate([known, crowded])
        excess = max(excess - len(crowded), 0)
        oldest = self.slots_at(np.arange(min(excess + len(staying), self.count))) if excess else known[:0]
        evicted = np.concatenate([crowded, oldest[~np.isin(oldest, staying)][:excess]])
        leaving = np.concatenate([known, evicted])
        if not len(leaving):
            return
        assert self.pages is not None
        self.by_age.remove(_joined(self.age[leaving], leaving))
        self.by_reward.remove(self._reward_key(leaving))
        self.by_key.remove(_joined(self.key[evicted] >> 32, evicted))
        self.pages.free(self.first_page[leaving], self.rows["lengths"].numpy()[leaving])
        self.free[self.n_free : self.n_free + len(evicted)] = evicted
        self.n_free += len(evicted)
        self.count -= len(leaving)

    def _put(
        self, steps: dict[str, Tensor], rows: dict[str, Tensor], key: NDArray[np.int64], slots: NDArray[np.int64]
    ) -> None:
        """Store entries in these slots, new ones where a slot is -1; there is room, and no entry has their keys."""
        assert self.pages is not None
        new = np.flatnonzero(slots < 0)
        reused = min(len(new), self.n_free)
        self.n_free -= reused
        slots[new[:reused]] = self.free[self.n_free : self.n_free + reused]
        slots[new[reused:]] = np.arange(self.n_slots, self.n_slots + len(new) - reused)
        self.n_slots += len(new) - reused
        self.by_key.add(_joined(key[new] >> 32, slots[new]))
        if self.next_age + len(slots) > _AGES:
            self._renumber()
        for name, tensor in rows.items():
            self.rows[name][torch.from_numpy(slots)] = tensor
        self.first_page[slots] = self.pages.write(steps, rows["lengths"].numpy())
        self.key[slots] = key
        self.age[slots] = np.arange(self.next_age, self.next_age + len(slots))
        self.next_age += len(slots)
        self.count += len(slots)
        self.by_age.add(_joined(self.age[slots], slots))
        self.by_reward.add(self._reward_key(slots))

    def _renumber(self) -> None:
        """Count ages from 0 again: once in 2^31 entries."""
        slots = self.slots
        self.age[slots] = np.arange(self.count)
        self.next_age = self.count
        self.by_age, self.by_reward = SortedKeys(self.capacity), SortedKeys(self.capacity)
        self.by_age.add(_joined(self.age[slots], slots))
        self.by_reward.add(self._reward_key(slots))

    def _reward_key(self, slots: NDArray[np.int64]) -> NDArray[np.int64]:
        return _joined(_falling(self.rows["log_reward"].numpy()[slots]), self.age[slots])

    def _check(self, steps: dict[str, Tensor], rows: dict[str, Tensor]) -> None:
        for name in ("lengths", "version", "identity"):
            if rows[name].dtype != torch.int64:
                raise ValueError(f"{name} is {rows[name].dtype}, expected torch.int64")
        if rows["log_reward"].dtype != torch.float32:
            raise ValueError(f"log_reward is {rows['log_reward'].dtype}, expected torch.float32")
        unfit = rows["log_reward"].isfinite().logical_not().nonzero()[:, 0].tolist()
        if unfit:
            value = float(rows["log_reward"][unfit[0]])
            raise ValueError(
                f"log_reward of trajectory {unfit[0]} is {value}: a replay takes finite ones only; "
                "leave out the trajectories whose reward failed"
            )
        if self.pages is None:
            return
        if steps.keys() != self.pages.like.keys():
            raise ValueError(f"cannot add {sorted(steps)} to a replay of {sorted(self.pages.like)}")
        for name, tensor in (steps | rows).items():
            here = self.pages.like[name] if name in steps else self.rows[name]
            if tensor.dtype != here.dtype or tensor.shape[1:] != here.shape[1:]:
                raise ValueError(
                    f"{name} has rows of {tuple(tensor.shape[1:])} {tensor.dtype}, "
                    f"the replay holds {tuple(here.shape[1:])} {here.dtype}"
                )


class StoredEntries(Entries):
    """What a rule sees of a store, until the next entry is added: orders by its indexes, columns only if asked for."""

    def __init__(self, store: Store) -> None:
        self._store = store
        self.recent = store.recent

    def __len__(self) -> int:
        return self._store.count

    @cached_property
    def log_reward(self) -> Tensor:  # type: ignore[override]
        return self._column("log_reward")

    @cached_property
    def condition_key(self) -> Tensor:  # type: ignore[override]
        return condition_key(self._column("condition"))

    @cached_property
    def version(self) -> Tensor:  # type: ignore[override]
        return self._column("version")

    def ranked(self, positions: Tensor) -> Tensor:
        age = self._store.by_reward.at(positions.numpy()) & _LOW
        return torch.from_numpy(self._store.by_age.below(age << 32))

    def ranked_log_reward(self, positions: Tensor) -> Tensor:
        falling = (self._store.by_reward.at(positions.numpy()) >> 32).astype(np.int32)
        return torch.from_numpy(_rising(~falling).view(np.float32))

    def n_above(self, log_reward: Tensor) -> Tensor:
        return torch.from_numpy(self._store.by_reward.below(_joined(_falling(log_reward.numpy()), 0)))

    def trajectories(self, indices: Tensor) -> Trajectories:
        return self._store.gather(self._store.slots_at(indices.numpy()))

    def _column(self, name: str) -> Tensor:
        return self._store.rows[name][torch.from_numpy(self._store.slots)]


def _newer_alike(keys: NDArray[np.int64]) -> NDArray[np.int64]:
    """How many later ones have the same key: `[n]`."""
    order = np.argsort(keys[::-1], kind="stable")
    ordered = keys[::-1][order]
    first = np.flatnonzero(np.r_[True, ordered[1:] != ordered[:-1]]) if len(keys) else order
    rank = np.empty(len(keys), dtype=np.int64)
    rank[order] = np.arange(len(keys)) - np.repeat(first, np.diff(np.r_[first, len(keys)]))
    return rank[::-1]


def entry_key(batch: Trajectories) -> NDArray[np.int64]:
    """One number for each pair of (identity, condition)."""
    return _mix(condition_key(batch.condition) ^ batch.identity).numpy()


def condition_key(condition: Tensor) -> Tensor:
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


def _joined(upper: np.ndarray, lower: np.ndarray | int) -> NDArray[np.int64]:
    """One int64 of two halves, the lower from 0 to 2^32 - 1."""
    return (upper.astype(np.int64) << 32) | lower


def _falling(log_reward: NDArray[np.float32]) -> NDArray[np.int64]:
    """Integers of 32 bits that fall as a float32 rises, the same for both zeros."""
    return ~_rising((log_reward + np.float32(0)).view(np.int32)).astype(np.int64)


def _rising(bits: NDArray[np.int32]) -> NDArray[np.int32]:
    """The bits of a float32 as an integer that rises with it; the function is its own inverse."""
    return bits ^ ((bits >> 31) & np.int32(0x7FFFFFFF))
