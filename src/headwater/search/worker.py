"""The searching side: what a worker process does with its life. It waits for a lease, takes the newest weights, draws,
scores and delivers, until the learner is gone.
"""

from __future__ import annotations

import contextlib
import ctypes
import gc
import os
import random
import signal
import socket
import sys
import time
import traceback

import numpy as np
import torch
from safetensors.torch import save

from headwater.objects import ObjectTable, ObjectTableError
from headwater.policies.base import Exploration
from headwater.reward import cache_of
from headwater.search import frames
from headwater.search.searcher import Searcher
from headwater.search.weights import SharedWeights

_PR_SET_PDEATHSIG = 1


def live(searcher: Searcher, weights: SharedWeights, connection: socket.socket, seed: int, parent: int) -> None:
    """The whole life of a worker process, just forked from the learner, whose process is `parent`."""
    _settle(seed, parent)
    with contextlib.suppress(ConnectionError):  # the learner is gone: so is the work
        _search(searcher, weights, connection)
    if (table := _table(searcher)) is not None:
        with contextlib.suppress(ObjectTableError):  # the learner was told, or can be told nothing any more
            table.close()
    for stream in (sys.stdout, sys.stderr):
        with contextlib.suppress(OSError, ValueError):
            stream.flush()


def _search(searcher: Searcher, weights: SharedWeights, connection: socket.socket) -> None:
    parameters, generator, sequence = searcher.drawing.published(), torch.Generator(), 0
    known, ready, table = searcher.calls, time.monotonic(), _table(searcher)
    while (received := frames.receive(connection)) is not None:
        lease, _ = received
        began = time.monotonic()
        searcher.policy.version = weights.read_into(parameters)
        generator.manual_seed(int(str(lease["seed"])))
        exploration = Exploration(float(str(lease["epsilon"])), float(str(lease["temperature"])))
        try:
            drawn = searcher.collect(int(str(lease["count"])), exploration, generator)
            if table is not None:
                table.flush()  # whatever the learner knows of is safe on disk, and known to the other workers
        except (Exception, SystemExit) as error:
            report = {"raised": type(error).__name__, "message": str(error), "traceback": traceback.format_exc()}
            return frames.send(connection, report)
        calls = searcher.calls
        new = None if calls is None or known is None else calls - known
        header = {
            "sequence": sequence,
            "lease": lease["number"],
            "version": searcher.policy.version,
            "drawn": drawn.drawn,
            "failed": drawn.failed,
            "failures": dict(drawn.failures),
            "requested": None if new is None else new.requested,
            "evaluated": None if new is None else new.evaluated,
            "idle": began - ready,
            "busy": time.monotonic() - began,
        }
        ready = time.monotonic()
        payload = save({name: tensor.contiguous() for name, tensor in drawn.trajectories.tensors().items()})
        frames.send(connection, header, payload)
        known, sequence = calls, sequence + 1


def _table(searcher: Searcher) -> ObjectTable | None:
    cache = cache_of(searcher.reward)
    return None if cache is None else cache.table


def _settle(seed: int, parent: int) -> None:
    """Make the copy of the learner that a fork is into a process of its own."""
    torch.set_num_threads(1)
    os.setsid()  # Ctrl-C at the terminal is for the learner; and a worker is ended with all that its reward started
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    if sys.platform == "linux":  # elsewhere it ends when it next reads or writes
        ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
    if os.getppid() != parent:
        os._exit(1)
    os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
    gc.freeze()  # what the learner left behind is its own to clean up
    random.seed(seed)
    np.random.seed(seed % 2**32)  # noqa: NPY002 (for rewards that draw from it)
    torch.manual_seed(seed)
