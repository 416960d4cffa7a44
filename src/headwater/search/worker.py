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

import numpy as np
import torch

from headwater.objects import ObjectTableError
from headwater.search import frames
from headwater.search.messages import Answers
from headwater.search.searcher import Searcher
from headwater.search.weights import SharedWeights

_PR_SET_PDEATHSIG = 1


def live(searcher: Searcher, weights: SharedWeights, connection: socket.socket, seed: int, parent: int) -> None:
    """The whole life of a worker process, just forked from the learner, whose process is `parent`."""
    _settle(seed, parent)
    answers = Answers(searcher)
    with contextlib.suppress(ConnectionError):  # the learner is gone: so is the work
        _search(answers, weights, connection)
    if answers.table is not None:
        with contextlib.suppress(ObjectTableError):  # the learner was told, or can be told nothing any more
            answers.table.close()
    for stream in (sys.stdout, sys.stderr):
        with contextlib.suppress(OSError, ValueError):
            stream.flush()


def _search(answers: Answers, weights: SharedWeights, connection: socket.socket) -> None:
    parameters = answers.searcher.drawing.published()
    while (received := frames.receive(connection)) is not None:
        header, payload = answers.answer(received[0], lambda: weights.read_into(parameters))
        frames.send(connection, header, payload)
        if "raised" in header:
            return


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
