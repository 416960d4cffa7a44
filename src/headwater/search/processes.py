"""Searchers in worker processes of this machine, forked from the learner: any policy and any reward will do, closures
too. Weights reach them through shared memory, trajectories come back through a socket each.
"""

from __future__ import annotations

import contextlib
import copy
import os
import select
import signal
import socket
import sys
import time
import traceback
import warnings
import weakref
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, replace

import torch

from headwater.policies.base import NO_EXPLORATION
from headwater.replay import Replay
from headwater.reward import cache_of
from headwater.search import frames, worker
from headwater.search.asynchronous import AsynchronousSearch, Ended, Event
from headwater.search.base import SearchSettings
from headwater.search.explorer import Explorer
from headwater.search.ledger import Lease
from headwater.search.messages import event_of, header_of
from headwater.search.searcher import Searcher
from headwater.search.weights import SharedWeights

_PIECE = 1 << 20
_GRACE = 0.5  # seconds that workers have to end by themselves


def process_search(
    settings: SearchSettings, searcher: Searcher, replay: Replay | None, generator: torch.Generator
) -> AsynchronousSearch:
    """Asynchronous search in `settings.searchers` processes. Raises ValueError where there is no fork."""
    if not hasattr(os, "fork"):
        raise ValueError(f"searchers = {settings.searchers}: this system cannot fork; 0 searches inline")
    return AsynchronousSearch(searcher, replay, generator, settings, lambda: Processes(searcher))


@dataclass
class _Worker:
    """One process, seen from the learner. leases: how many it has that it did not answer."""

    pid: int
    connection: socket.socket
    inbox: frames.Inbox = field(default_factory=frames.Inbox)
    leases: int = 0

    def has_ended(self) -> bool:
        try:
            return os.waitid(os.P_PID, self.pid, os.WEXITED | os.WNOHANG | os.WNOWAIT) is not None
        except ChildProcessError:  # somebody else in this process has asked, and been told
            return True

    def end(self) -> int:
        """End it and all that its reward has started, if it has not ended by itself; returns its exit status."""
        self.connection.close()
        try:
            os.waitid(os.P_PID, self.pid, os.WEXITED | os.WNOHANG | os.WNOWAIT)
        except ChildProcessError:  # long gone: the number may be somebody else's by now
            return 0
        for kill in (os.killpg, os.kill):  # its group is not there yet in its first moments
            with contextlib.suppress(ProcessLookupError, PermissionError):
                kill(self.pid, signal.SIGKILL)
        return os.waitstatus_to_exitcode(os.waitpid(self.pid, 0)[1])


class Processes:
    """The `Runtime` of worker processes."""

    def __init__(self, searcher: Searcher) -> None:
        self._parameters = searcher.drawing.published()
        if searcher.device.type != "cpu":
            searcher = on_cpu(searcher)
        self._searcher = searcher
        self._weights = SharedWeights(self._parameters)
        self._workers: dict[int, _Worker] = {}
        self._end_all = weakref.finalize(self, _end_all, self._workers, os.getpid())
        # One draw here compiles the native code that every worker then has from the start.
        generator = torch.Generator().manual_seed(0)
        drawn = searcher.draw(1, NO_EXPLORATION, generator)
        if searcher.local.rounds:
            searcher.policy.sample_backward(drawn, generator)
        cache = cache_of(searcher.reward)
        if cache is not None:
            cache.count_repeated()  # here, once: each worker would for itself

    def start(self, searcher: int, place: int) -> None:
        ours, theirs = socket.socketpair()
        sys.stdout.flush(), sys.stderr.flush()  # or the child would write what is still in them again
        parent, seed = os.getpid(), torch.initial_seed() + 1 + searcher
        with warnings.catch_warnings():
            # Threads that the learner has are not there in the child, which uses none of theirs.
            warnings.simplefilter("ignore", DeprecationWarning)
            pid = os.fork()
        if pid == 0:
            status = 1
            try:
                for other in [ours, *(each.connection for each in self._workers.values())]:
                    other.close()  # a learner that ends must be the last to hold its end
                searching = replace(self._searcher, origin=f"worker {place}")
                worker.live(searching, self._weights, theirs, seed, parent)
                status = 0
            except BaseException:
                traceback.print_exc()
            finally:
                os._exit(status)
        theirs.close()
        self._workers[searcher] = _Worker(pid, ours)

    def lease(self, searcher: int, lease: Lease) -> None:
        there = self._workers.get(searcher)
        if there is None:
            return
        there.leases += 1
        with contextlib.suppress(OSError):  # that it has ended is for `wait` to find out
            frames.send(there.connection, header_of(lease))

    def publish(self, version: int) -> None:
        self._weights.publish(self._parameters, version)

    def wait(self, seconds: float) -> list[Event]:
        poll = select.poll()
        by_descriptor = {each.connection.fileno(): searcher for searcher, each in self._workers.items()}
        for descriptor in by_descriptor:
            poll.register(descriptor, select.POLLIN)
        ready = {by_descriptor[descriptor] for descriptor, _ in poll.poll(seconds * 1000)}
        events: list[Event] = []
        for searcher, there in list(self._workers.items()):
            # A process may have ended and its socket be open still, in the hands of one that its reward has started.
            ended = there.has_ended()
            if searcher not in ready and not ended:
                continue
            for piece in _pieces(there.connection):
                ended |= not piece
                events += [self._event(searcher, *frame) for frame in there.inbox.take(piece)]
            if ended:
                del self._workers[searcher]
                events.append(Ended(searcher, _reason(there)))
        return events

    def is_receiving(self) -> bool:
        return any(each.inbox.is_partial for each in self._workers.values())

    def stop(self, searcher: int) -> None:
        self._workers.pop(searcher).end()

    def close(self) -> None:
        self._end_all()

    def _event(self, searcher: int, header: Mapping[str, object], payload: bytes) -> Event:
        event = event_of(searcher, header, payload, "search worker")
        self._workers[searcher].leases -= 1
        return event


def on_cpu(searcher: Searcher) -> Searcher:
    """The same with a copy of the weights."""
    drawing = copy.deepcopy(searcher.drawing).to("cpu")
    if isinstance(drawing, Explorer):
        return replace(searcher, policy=drawing.student, explorer=drawing)
    return replace(searcher, policy=drawing)


def _end_all(workers: dict[int, _Worker], owner: int) -> None:
    """Let the workers find that the learner is gone, which lets those that are not busy for long end in order; then end
    the others.
    """
    if os.getpid() != owner:  # a fork has a copy of this, and no say in it
        return
    for each in workers.values():
        each.connection.close()
    deadline = time.monotonic() + _GRACE
    while time.monotonic() < deadline and not all(each.has_ended() for each in workers.values()):
        time.sleep(0.005)
    while workers:
        workers.popitem()[1].end()


def _pieces(connection: socket.socket) -> Iterator[bytes]:
    """What has come, as far as it is there; an empty piece where the other side is gone."""
    while True:
        try:
            piece = connection.recv(_PIECE, socket.MSG_DONTWAIT)
        except BlockingIOError:
            return
        except OSError:
            piece = b""
        yield piece
        if not piece:
            return


def _reason(there: _Worker) -> str:
    """How a worker has ended, and at what."""
    doing = "while it was waiting for work"
    if there.inbox.is_partial:
        doing = "while it was delivering a batch"
    elif there.leases:
        doing = "while it was drawing or scoring a batch"
    status = there.end()
    if status >= 0:
        return f"ended with status {status} {doing}"
    named = {int(each): each.name for each in signal.Signals}
    name = named.get(-status, f"signal {-status}")
    hint = " (as the system does when memory runs out)" if name == "SIGKILL" else ""
    return f"was killed by {name}{hint} {doing}"
