"""Every object that a run ever scored, in a SQLite table: one row an object, with its log-reward, the iteration at
which it was first scored and who asked. Any number of processes share the table, and any SQLite tool can query it.

What a process scored is safe from its own end as soon as it is committed (https://www.sqlite.org/wal.html): at once
where the reward was slow, and a few times a second where it costs nothing.
"""

from __future__ import annotations

import contextlib
import math
import os
import sqlite3
import time
import weakref
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TypeAlias

Row: TypeAlias = "tuple[str, float | None, int, str]"
"""object, log_reward (None: failed), iteration, origin."""

WORTH_A_COMMIT = 0.05
"""Seconds of reward time that the end of a process may cost."""
EVALUATION, SAMPLE = "evaluation", "sample"
UNTRAINED = (EVALUATION, SAMPLE)
"""The origins that are no part of training."""
_AT_LEAST_EVERY = 1.0  # seconds after which even cheap rewards are committed, with the next ones
_LOCK_LIMIT = 60.0  # seconds to wait for another process that writes
_PIECE = 500  # texts of one query: some builds of SQLite take no more than 999 parameters
_APPLICATION = 0x48445752  # "HDWR": marks the file as ours
_CACHE = -65536  # KiB of pages that are kept in memory: keys come in random order

_SCHEMA = """
create table objects (
    object text primary key,     -- as the run's samples write it
    log_reward real,             -- log R(x), null where the reward failed: such an object is asked for again
    iteration integer not null,  -- updates that the policy had seen when the object was first scored
    origin text not null         -- who asked: inline, worker 0, given, evaluation, sample, ...
) without rowid
"""
_ADD = """
insert into objects values (?, ?, ?, ?) on conflict (object) do update
set log_reward = excluded.log_reward, iteration = excluded.iteration, origin = excluded.origin
where objects.log_reward is null and excluded.log_reward is not null
"""


class ObjectTableError(RuntimeError):
    """The table cannot be read or written: the disk is full, the file is broken, or another process keeps it locked."""


class ObjectTable:
    """The table in the file `path`, made if it is not there. Not to be shared between threads; processes share it.

    iteration, origin: what is written beside the objects recorded from now on. The connection is closed before this
    process forks, and each side opens its own when it next needs one.

    Raises ValueError if the file is something else, ObjectTableError (anywhere) if it cannot be read or written.
    """

    def __init__(self, path: Path, origin: str = "", iteration: int = 0) -> None:
        self.path = path
        self.origin, self.iteration = origin, iteration
        self._connection: sqlite3.Connection | None = None
        self._pending: dict[str, Row] = {}
        self._pending_seconds = 0.0
        self._pending_since = 0.0
        _open_tables.add(self)
        with self._explained():
            self._connect()

    def lookup(self, texts: Sequence[str]) -> dict[str, float]:
        """The log-rewards of those objects that have one. One that failed counts as unknown."""
        wanted = [text for text in texts if text not in self._pending]
        known: dict[str, float] = {}
        with self._explained():
            for first in range(0, len(wanted), _PIECE):
                piece = wanted[first : first + _PIECE]
                marks = ",".join("?" * len(piece))
                query = f"select object, log_reward from objects where object in ({marks}) and log_reward is not null"
                known.update(self._connect().execute(query, piece))
        if len(wanted) < len(texts):
            for text in texts:
                value = self._pending[text][1] if text in self._pending else None
                if value is not None:
                    known[text] = value
        return known

    def record(self, texts: Sequence[str], log_rewards: Sequence[float], seconds: float = math.inf) -> None:
        """Keep what was scored. The first log-reward of an object stays; one that is not finite counts as failed, and
        gives way to a later one.

        seconds: what the rewards took. They are committed once the uncommitted ones are worth WORTH_A_COMMIT.
        """
        if not self._pending:
            self._pending_since = time.monotonic()
        iteration, origin = self.iteration, self.origin
        for text, value in zip(texts, log_rewards, strict=True):
            if self._pending.get(text, _NEVER)[1] is None:
                self._pending[text] = (text, value if math.isfinite(value) else None, iteration, origin)
        self._pending_seconds += seconds
        if self._pending_seconds >= WORTH_A_COMMIT or time.monotonic() - self._pending_since >= _AT_LEAST_EVERY:
            self.flush()

    def flush(self) -> None:
        """Commit all that was recorded."""
        if not self._pending:
            return
        with self._explained():
            connection = self._connect()
            with _transaction(connection):
                connection.executemany(_ADD, self._pending.values())
        self._pending.clear()
        self._pending_seconds = 0.0

    def counts(self) -> dict[str, int]:
        """How many objects there are of each origin."""
        self.flush()
        with self._explained():
            return dict(self._connect().execute("select origin, count(*) from objects group by origin order by origin"))

    def best(self, count: int | None = None) -> list[Row]:
        """The rows of highest log-reward, best first, failed objects last."""
        self.flush()
        query = "select object, log_reward, iteration, origin from objects order by log_reward desc, object limit ?"
        with self._explained():
            return self._connect().execute(query, (-1 if count is None else count,)).fetchall()

    def trained_on_from(self, iteration: int) -> list[str]:
        """The objects whose rewards training was the first to need, at this iteration or later."""
        self.flush()
        query = "select object from objects where iteration >= ? and log_reward is not null and origin not in (?, ?)"
        with self._explained():
            return [text for (text,) in self._connect().execute(query, (iteration, *UNTRAINED))]

    def close(self) -> None:
        """Commit, and close the file; a later call opens it again."""
        try:
            self.flush()
        finally:
            self._disconnect()

    def _connect(self) -> sqlite3.Connection:
        if self._connection is None:
            # A fork may be asked for by another thread, which then closes the connection.
            connection = sqlite3.connect(self.path, timeout=_LOCK_LIMIT, isolation_level=None, check_same_thread=False)
            try:
                self._prepare(connection)
            except BaseException:
                connection.close()
                raise
            self._connection = connection
        return self._connection

    def _prepare(self, connection: sqlite3.Connection) -> None:
        """Make the table in a new file, or see that the file is one of ours."""
        if not connection.execute("pragma schema_version").fetchone()[0]:
            with _transaction(connection):
                if not connection.execute("select count(*) from sqlite_master").fetchone()[0]:
                    connection.execute(f"pragma application_id = {_APPLICATION}")
                    connection.execute(_SCHEMA)
        if connection.execute("pragma application_id").fetchone()[0] != _APPLICATION:
            raise ValueError(f"{self.path}: a database, but no table of scored objects; move it out of the way")
        if connection.execute("pragma journal_mode").fetchone()[0] != "wal":
            connection.execute("pragma journal_mode = wal")
        connection.execute("pragma synchronous = normal")
        connection.execute(f"pragma cache_size = {_CACHE}")

    def _disconnect(self) -> None:
        if self._connection is not None:
            self._connection.close()
            self._connection = None

    @contextmanager
    def _explained(self) -> Iterator[None]:
        try:
            yield
        except sqlite3.OperationalError as error:  # full disk, no permission, locked for too long
            raise ObjectTableError(f"{self.path}: {error}") from error
        except sqlite3.DatabaseError as error:
            raise ValueError(f"{self.path}: not a readable table of scored objects ({error}); move it away") from error


_NEVER: Row = ("", None, 0, "")
_open_tables: weakref.WeakSet[ObjectTable] = weakref.WeakSet()


@contextmanager
def _transaction(connection: sqlite3.Connection) -> Iterator[None]:
    """Write all or nothing. The lock is taken at once, so that waiting for it cannot fail later on."""
    connection.execute("begin immediate")
    try:
        yield
        connection.execute("commit")
    except BaseException:
        with contextlib.suppress(sqlite3.OperationalError):  # a full disk has rolled it back already
            connection.execute("rollback")
        raise


def _before_fork() -> None:
    """SQLite connections do not survive a fork (https://www.sqlite.org/howtocorrupt.html)."""
    for table in list(_open_tables):
        table.close()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(before=_before_fork)
