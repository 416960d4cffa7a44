"""The Reward contract, and rewards from a user's function, from a table, behind a cache, and raised to a power.

A reward maps finished objects and their conditions to log R(x | c). An object on which it fails gets NaN and the run
goes on; a value that no reward can have (negative, NaN, infinite) ends it with an error that names the object.
"""

from __future__ import annotations

import csv
import logging
import math
import sys
import time
from collections import OrderedDict
from collections.abc import Callable, Hashable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

import pyarrow.parquet
import torch
from torch import Tensor

from headwater.environments.base import Objects
from headwater.objects import ObjectTable
from headwater.reward_worker import Failure, RewardError, RewardFunction, Worker, call_function, load_function

__all__ = [
    "CACHE_CAPACITY",
    "CachedReward",
    "FunctionReward",
    "Reward",
    "RewardError",
    "TableReward",
    "TemperedReward",
    "cache_of",
]

_log = logging.getLogger(__name__)

# A function that fails on every object of this many batches in a row, of this many objects together, is broken. One
# without the other is not enough: behind a cache a batch may be a single object.
_HOPELESS_BATCHES = 3
_HOPELESS_OBJECTS = 30
_MOST_REPORTS = 100

CACHE_CAPACITY = 1_000_000
"""Objects whose rewards a process remembers."""


class Reward(Protocol):
    """How good finished objects are, on a logarithmic scale."""

    def __call__(self, objects: Objects, condition: Tensor) -> Tensor:
        """log R(x | c) of T objects: float32 `[T]`, NaN where the reward failed. `condition` is `[T, C]`."""
        ...


class FunctionReward:
    """A Python function from a list of objects to their rewards R >= 0 (not logarithms); it sees no condition.

    function: the function, or "module:function", looked for in the current directory too. Objects that an environment
        holds as a tensor reach it as tuples of numbers.
    timeout:  seconds that one call may take; None for no limit. With a limit the function runs in one worker process,
        killed when the time is over, and must be importable by name; each object of the batch is then tried alone.
    floor:    R below it counts as this, so that log R is finite.

    A call raises RewardError if a reward is negative, NaN or infinite, if there are not as many as objects, or if
    batch after batch fails on every object. `failed` counts the objects on which the function failed.
    """

    def __init__(self, function: RewardFunction | str, timeout: float | None = None, floor: float = 1e-12) -> None:
        if timeout is not None and not 0 < timeout < math.inf:
            raise ValueError(f"timeout is {timeout!r}, must be above 0 seconds, or None")
        _require_floor(floor)
        self.floor = floor
        self.failed = 0
        self._worker: Worker | None = None
        if timeout is not None:
            self._worker = Worker(function if isinstance(function, str) else _importable_name(function), timeout)
        else:
            self._function = load_function(function) if isinstance(function, str) else function
        self._reported: set[str] = set()
        self._last_failure = Failure()
        self._hopeless_batches = 0
        self._hopeless_objects = 0

    def __call__(self, objects: Objects, condition: Tensor) -> Tensor:
        values = self._evaluate(_as_list(objects)) if len(objects) else []
        failed = sum(map(math.isnan, values))
        self.failed += failed
        if failed < len(values):
            self._hopeless_batches = self._hopeless_objects = 0
        elif failed:
            self._hopeless_batches += 1
            self._hopeless_objects += failed
            if self._hopeless_batches >= _HOPELESS_BATCHES and self._hopeless_objects >= _HOPELESS_OBJECTS:
                raise RewardError(
                    f"the reward function failed on each of the last {self._hopeless_objects} objects, "
                    f"in {self._hopeless_batches} batches; the last time: {self._last_failure}"
                ) from self._last_failure
        return torch.tensor(values, dtype=torch.float32, device=condition.device)

    def close(self) -> None:
        """End the worker process, if there is one; a later call starts another."""
        if self._worker is not None:
            self._worker.close()

    def _evaluate(self, objects: list[object]) -> list[float]:
        """log R of each object, NaN where the function failed on it alone."""
        try:
            rewards = self._worker.call(objects) if self._worker else call_function(self._function, objects)
        except Failure as failure:
            if len(objects) > 1:
                return [value for one in objects for value in self._evaluate([one])]
            self._report(objects[0], failure)
            return [math.nan]
        if len(rewards) != len(objects):
            raise RewardError(f"the reward function returned {len(rewards)} rewards for {len(objects)} objects")
        for one, reward in zip(objects, rewards, strict=True):
            if not 0 <= reward < math.inf:
                raise RewardError(f"the reward of {one!r} is {reward}, must be a finite number, at least 0")
        return [math.log(max(reward, self.floor)) for reward in rewards]

    def _report(self, one: object, failure: Failure) -> None:
        self._last_failure = failure
        if str(failure) not in self._reported and len(self._reported) < _MOST_REPORTS:
            self._reported.add(str(failure))
            _log.warning("the reward failed on %r (%s); it is left out, like others that fail so", one, failure)


class TableReward:
    """Rewards y >= 0 of listed objects, from a CSV file (comma or tab, with a header) or a Parquet file.

    R = max(y^exponent * scale, floor), with the scale that makes the largest `scale_maximum_to` (None: scale 1): power,
    scale, then clip. An object that the table lacks counts as if listed with y = `default`; with None it raises
    RewardError. Building it raises RewardError, naming file, line and column, for a table that makes no sense.
    """

    def __init__(
        self,
        path: str | Path,
        object_column: str = "sequence",
        reward_column: str = "reward",
        default: float | None = None,
        exponent: float = 1.0,
        scale_maximum_to: float | None = None,
        floor: float = 1e-12,
    ) -> None:
        _require_floor(floor)
        for name, value in (("exponent", exponent), ("scale_maximum_to", scale_maximum_to)):
            if value is not None and not 0 < value < math.inf:
                raise ValueError(f"{name} is {value!r}, must be above 0")
        if default is not None and not 0 <= default < math.inf:
            raise ValueError(f"default is {default!r}, must be at least 0, or None")
        self.path = Path(path)
        table = _read_table(self.path, object_column, reward_column)
        self.objects: list[object] = list(table)
        self._row = {one: row for row, one in enumerate(table)}
        self._default = default
        power = torch.tensor([*table.values(), default or 0.0], dtype=torch.float64) ** exponent
        if scale_maximum_to is not None:
            largest = power[:-1].max()
            if largest == 0:
                raise RewardError(f"{path}: every {reward_column} is 0, no factor makes that {scale_maximum_to}")
            power = power * (scale_maximum_to / largest)
        self._log_reward = power.clamp(min=floor).log()

    def log_reward(self) -> Tensor:
        """log R of `objects`, in their order: float64 `[N]`."""
        return self._log_reward[:-1]

    def __call__(self, objects: Objects, condition: Tensor) -> Tensor:
        listed = _as_list(objects)
        rows = [self._row.get(one, -1) for one in listed]
        if self._default is None and -1 in rows:
            raise RewardError(f"{self.path}: no reward for {listed[rows.index(-1)]!r}; give a default, or list it")
        return self._log_reward[torch.tensor(rows, dtype=torch.int64)].to(condition.device, torch.float32)


class CachedReward:
    """Asks `reward` for each distinct object once: what it said is remembered here, the last `capacity` objects, failed
    ones included, and once there is a table (`keep_in`) on disk too, where other processes and later ones find it.

    capacity 0 looks nothing up, for a reward that is computed in no time; the table still gets every object. Otherwise
    the reward must not depend on the condition: put what does outside, as in `TemperedReward(CachedReward(...))`.

    requested: objects asked for so far.
    evaluated: those of them that went to `reward`.
    failed:    those of these that it failed on.
    table:     where they are kept; None for nowhere.
    paid:      objects that went to `reward` with what it said, for who takes them from this list; None for nobody.
    """

    def __init__(self, reward: Reward, capacity: int = CACHE_CAPACITY) -> None:
        if capacity < 0:
            raise ValueError(f"capacity is {capacity}, must be at least 0")
        self.capacity = capacity
        self.requested = self.evaluated = self.failed = 0
        self.table: ObjectTable | None = None
        self.paid: list[tuple[Objects, list[float]]] | None = None
        self._reward = reward
        self._text: Callable[[Objects], Sequence[str]] = list
        self._known: OrderedDict[Hashable, float] = OrderedDict()
        self._repeated: set[str] = set()

    def __getstate__(self) -> dict[str, object]:
        """A copy that is sent elsewhere keeps no table."""
        return self.__dict__ | {"table": None, "_text": list}

    def keep_in(
        self, table: ObjectTable, text: Callable[[Objects], Sequence[str]], resumed_at: int = sys.maxsize
    ) -> None:
        """Look objects up in `table` and record them there from now on.

        text: objects as text, different ones as different text. resumed_at: the iteration that a resumed run goes on
        from. What its first life paid for after that counts as evaluated when it comes up again, once.
        """
        self.table, self._text = table, text
        self._repeated = set(table.trained_on_from(resumed_at)) if self.capacity else set()

    def record(self, paid: Sequence[tuple[Objects, Sequence[float]]], origin: str, iteration: int) -> None:
        """Put into the table, if there is one, what a copy elsewhere has `paid` for."""
        if self.table is not None:
            self.table.origin, self.table.iteration = origin, iteration
            for objects, values in paid:
                self.table.record(self._text(objects), values)

    def count_repeated(self) -> None:
        """Count at once what `keep_in` would have counted when it came up again: for copies of this cache in other
        processes, each of which would count it.
        """
        self.requested += len(self._repeated)
        self.evaluated += len(self._repeated)
        self._repeated = set()

    def __call__(self, objects: Objects, condition: Tensor) -> Tensor:
        self.requested += len(objects)
        if not self.capacity:
            return self._pay(objects, condition, [] if self.table is None else self._text(objects))
        keys = _keys(objects)
        first_of = {key: place for place, key in reversed(list(enumerate(keys)))}
        new = sorted(place for key, place in first_of.items() if key not in self._known)
        if new:
            found = self._find(_chosen(objects, new), condition)
            self._known.update((keys[place], value) for place, value in zip(new, found, strict=True))
        values = [self._known[key] for key in keys]
        for key in first_of:
            self._known.move_to_end(key)
        while len(self._known) > self.capacity:
            self._known.popitem(last=False)
        return torch.tensor(values, dtype=torch.float32, device=condition.device)

    def _find(self, objects: Objects, condition: Tensor) -> list[float]:
        """log R of distinct objects, from the table where it has them."""
        if self.table is None:
            return self._pay(objects, condition.new_empty(len(objects), 0), []).tolist()
        texts = self._text(objects)
        known = self.table.lookup(texts)
        again = self._repeated.intersection(known)
        self.evaluated += len(again)
        self._repeated -= again
        missing = [place for place, text in enumerate(texts) if text not in known]
        if missing:
            unknown = [texts[place] for place in missing]
            paid = self._pay(_chosen(objects, missing), condition.new_empty(len(missing), 0), unknown)
            known.update(zip(unknown, paid.tolist(), strict=True))
        return [known[text] for text in texts]

    def _pay(self, objects: Objects, condition: Tensor, texts: Sequence[str]) -> Tensor:
        """Ask the reward itself, and record its answers under `texts`."""
        began = time.perf_counter()
        log_reward = self._reward(objects, condition)
        seconds = time.perf_counter() - began
        values: list[float] = log_reward.tolist()
        self.evaluated += len(values)
        self.failed += sum(map(math.isnan, values))
        if self.table is not None:
            self.table.record(texts, values, seconds)
        if self.paid is not None:
            self.paid.append((objects, values))
        return log_reward


@dataclass(frozen=True)
class TemperedReward:
    """log R(x | c) = c[column] * log R(x): the condition holds the inverse temperature of the reward."""

    reward: Reward
    column: int = 0

    def __call__(self, objects: Objects, condition: Tensor) -> Tensor:
        if not 0 <= self.column < condition.shape[1]:
            raise ValueError(f"column is {self.column}, the condition has {condition.shape[1]} columns")
        return condition[:, self.column].float() * self.reward(objects, condition)


def cache_of(reward: Reward) -> CachedReward | None:
    """The cache in a reward, beneath what depends on the condition; None where there is none."""
    found: object = reward
    while not (found is None or isinstance(found, CachedReward)):
        found = getattr(found, "reward", None)
    return found


def _chosen(objects: Objects, places: list[int]) -> Objects:
    return objects[torch.tensor(places)] if isinstance(objects, Tensor) else [objects[place] for place in places]


def _as_list(objects: Objects) -> list[object]:
    """The objects as Python values; rows of a tensor as tuples."""
    return [_frozen(one) for one in objects.tolist()] if isinstance(objects, Tensor) else list(objects)


def _frozen(value: object) -> object:
    return tuple(map(_frozen, value)) if isinstance(value, list) else value


def _keys(objects: Objects) -> list[Hashable]:
    if not isinstance(objects, Tensor):
        return [_frozen(one) for one in objects]
    rows = objects.detach().cpu().contiguous().flatten(1) if objects.dim() > 1 else objects.detach().cpu()[:, None]
    return [row.tobytes() for row in rows.numpy()]


def _importable_name(function: RewardFunction) -> str:
    """ "module:function" of a function that another process can import; raises ValueError if it cannot be."""
    module, name = getattr(function, "__module__", None), getattr(function, "__qualname__", None)
    if module and module != "__main__" and getattr(sys.modules.get(module), str(name), None) is function:
        return f"{module}:{name}"
    raise ValueError(
        f"function is {function!r}: with a timeout it runs in another process, so it must be defined at the top level "
        "of a module that can be imported, not in the main script, in another function or as a lambda"
    )


def _require_floor(floor: float) -> None:
    if not 0 < floor < math.inf:
        raise ValueError(f"floor is {floor!r}, must be above 0")


def _read_table(path: Path, object_column: str, reward_column: str) -> dict[Hashable, float]:
    """The rewards by object, in the order of the file."""
    with path.open("rb") as file:
        is_parquet = file.read(4) == b"PAR1"
    try:
        columns, lines = _read_parquet(path) if is_parquet else _read_csv(path)
    except (UnicodeDecodeError, csv.Error, pyarrow.ArrowException) as error:
        raise RewardError(f"{path}: cannot be read as a table: {error}") from error
    for name in (object_column, reward_column):
        if name not in columns:
            raise RewardError(f"{path}: no column {name!r}; the columns are {', '.join(map(repr, columns))}")
    rewards: dict[Hashable, float] = {}
    first_line: dict[Hashable, int] = {}
    unit = "row" if is_parquet else "line"
    for line, one, text in zip(lines, columns[object_column], columns[reward_column], strict=True):
        place = f"{path}, {unit} {line}, column {reward_column!r}"
        try:
            value = float(text)  # type: ignore[arg-type]
        except (TypeError, ValueError):
            raise RewardError(f"{place}: {text!r} is not a number") from None
        if not 0 <= value < math.inf:
            raise RewardError(f"{place}: the reward of {one!r} is {value}, must be a finite number, at least 0")
        if rewards.setdefault(one, value) != value:
            raise RewardError(
                f"{place}: the reward of {one!r} is {value}, but {rewards[one]} in {unit} {first_line[one]}"
            )
        first_line.setdefault(one, line)
    if not rewards:
        raise RewardError(f"{path}: the table is empty")
    return rewards


def _read_parquet(path: Path) -> tuple[dict[str, list[Hashable]], range]:
    table = pyarrow.parquet.read_table(path)
    return table.to_pydict(), range(1, table.num_rows + 1)


def _read_csv(path: Path) -> tuple[dict[str, list[Hashable]], list[int]]:
    """The columns by name (the first of a name), and the line of the file that each row ends on."""
    with path.open(newline="", encoding="utf-8-sig") as file:
        header_line = file.readline()
        file.seek(0)
        delimiter = "\t" if header_line.count("\t") > header_line.count(",") else ","
        reader = csv.reader(file, delimiter=delimiter)
        header = [name.strip() for name in next(reader, [])]
        rows, lines = [], []
        for row in reader:
            if not row:
                continue
            if len(row) != len(header):
                raise RewardError(f"{path}, line {reader.line_num}: {len(row)} fields, the header has {len(header)}")
            rows.append(row)
            lines.append(reader.line_num)
    columns = zip(*rows, strict=True) if rows else ([] for _ in header)
    named: dict[str, list[Hashable]] = {}
    for name, column in zip(header, columns, strict=True):
        named.setdefault(name, [value.strip() for value in column])
    return named, lines
