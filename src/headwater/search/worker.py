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

from headwater.policies.base import Exploration
from headwater.search import frames
from headwater.search.searcher import Searcher, keepers
from headwater.search.weights import SharedWeights

_PR_SET_PDEATHSIG = 1


def live(searcher: Searcher, weights: SharedWeights, connection: socket.socket, seed: int, parent: int) -> None:
    """The whole life of a worker process, just forked from the learner, whose process is `parent`."""
    _settle(seed, parent)
    with contextlib.suppress(ConnectionError):  # the learner is gone: so is the work
        _search(searcher, weights, connection)
    for keeper in keepers(searcher.reward):
        keeper.flush()
    for stream in (sys.stdout, sys.stderr):
        with contextlib.suppress(OSError, ValueError):
            stream.flush()


def _search(searcher: Searcher, weights: SharedWeights, connection: socket.socket) -> None:
    parameters, generator, sequence = dict(searcher.drawing.state_dict()), torch.Generator(), 0
    known, ready = _evaluated(searcher), time.monotonic()
    while (received := frames.receive(connection)) is not None:
        lease, _ = received
        began = time.monotonic()
        searcher.policy.version = weights.read_into(parameters)
        generator.manual_seed(int(str(lease["seed"])))
        exploration = Exploration(float(str(lease["epsilon"])), float(str(lease["temperature"])))
        try:
            drawn = searcher.collect(int(str(lease["count"])), exploration, generator)
        except (Exception, SystemExit) as error:
            report = {"raised": type(error).__name__, "message": str(error), "traceback": traceback.format_exc()}
            return frames.send(connection, report)
        evaluated = _evaluated(searcher)
        header = {
            "sequence": sequence,
            "lease": lease["number"],
            "version": searcher.policy.version,
            "drawn": drawn.drawn,
            "failed": drawn.failed,
            "evaluated": evaluated - known,
            "idle": began - ready,
            "busy": time.monotonic() - began,
        }
        ready = time.monotonic()
        payload = save({name: tensor.contiguous() for name, tensor in drawn.trajectories.tensors().items()})
        frames.send(connection, header, payload)
        known, sequence = evaluated, sequence + 1


def _evaluated(searcher: Searcher) -> int:
    return int(getattr(searcher.reward, "evaluated", None) or 0)


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
