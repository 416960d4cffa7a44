"""What TensorBoard reads: one file of events for each process that trained the run, beside metrics.jsonl.

Rows are written at once and by the caller itself: no queue and no thread that a full disk, a kill or a fork could catch
half way.
"""

from __future__ import annotations

import os
import struct
import time
from collections.abc import Mapping
from pathlib import Path

from tensorboardX.proto.event_pb2 import Event, SessionLog
from tensorboardX.proto.summary_pb2 import Summary
from tensorboardX.record_writer import masked_crc32c

from headwater.runs import writing


class Events:
    """A new event file in `folder`. `done`: the iteration that the run goes on from; what earlier files say of later
    ones is hidden, since this one says it again."""

    def __init__(self, folder: Path, done: int) -> None:
        self._path = folder / f"events.out.tfevents.{time.time_ns()}.{os.getpid()}"
        with writing(self._path):
            folder.mkdir(exist_ok=True)
            self._file = self._path.open("ab", buffering=0)
        self._write(Event(file_version="brain.Event:2"))
        self._write(Event(step=done + 1, session_log=SessionLog(status=SessionLog.START)))

    def write(self, metrics: Mapping[str, float]) -> None:
        """One row of metrics, with its iteration."""
        values = [Summary.Value(tag=name, simple_value=value) for name, value in metrics.items()]
        self._write(Event(step=int(metrics["iteration"]), summary=Summary(value=values)))

    def close(self) -> None:
        self._file.close()

    def _write(self, event: Event) -> None:
        """Append a TFRecord: length, its checksum, the message, its checksum."""
        event.wall_time = time.time()
        message = event.SerializeToString()
        length = struct.pack("<Q", len(message))
        checksums = [struct.pack("<I", masked_crc32c(part)) for part in (length, message)]
        with writing(self._path):
            self._file.write(length + checksums[0] + message + checksums[1])
