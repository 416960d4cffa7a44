"""How a contender is told what to do: one JSON line in, one JSON line out.

Each library runs in a process and a Python of its own, builds its task once, and then waits; so one of them works at a
time, all live through the same minutes, and a ratio is taken between neighbours in time. This module needs nothing but
NumPy, since the peers' environments have nothing else in common.
"""

from __future__ import annotations

import json
import os
import resource
import sys
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from typing import Any, TextIO

import numpy as np
from numpy.typing import NDArray


@dataclass(frozen=True)
class Task:
    """What to train, the same for every contender."""

    environment: str = "hypergrid"
    """hypergrid, bits (120 bits in words of 8, placed in any order), sequences (8 letters of 4, appended) or trees
    (over the taxa of an alignment)."""
    objective: str = "tb"
    dimensions: int = 4
    side: int = 20
    batch_size: int = 16
    learning_rate: float = 1e-3
    """0 keeps the weights, and with them the lengths, where they are."""
    log_z_learning_rate: float = 0.1
    epsilon: float = 0.0
    """Share of uniform actions at the start; it falls linearly to `epsilon_end` over `epsilon_iterations`."""
    epsilon_end: float = 0.0
    epsilon_iterations: int = 1
    iterations: int = 1_000_000
    """Iterations of the whole run, for schedules that end with it."""
    seed: int = 0
    settings: dict[str, Any] = field(default_factory=dict)
    """What one contender alone understands, such as {"logging": true}."""

    def to_json(self) -> str:
        return json.dumps(asdict(self))


@dataclass
class Contender:
    """A library with its task built and ready to train. `update(n)` returns when n iterations are done.

    load takes the weights of a multilayer perceptron by name (`weight_0` `[inputs, width]`, `bias_0`, `weight_1`, ...,
    `forward_weight` `[width, actions]`, `forward_bias`, `backward_weight`, `backward_bias`). lengths draws that many
    trajectories and returns their numbers of steps. logits gives the forward policy's at states `[N, width]`, exit
    last. bytes_a_trajectory: what one drawn trajectory takes in memory.
    """

    update: Callable[[int], None]
    parameters: int
    lengths: Callable[[int], NDArray[np.int64]]
    bytes_a_trajectory: Callable[[], dict[str, float]]
    load: Callable[[dict[str, NDArray[np.float32]]], None] | None = None
    logits: Callable[[NDArray[np.int64]], NDArray[np.float32]] | None = None
    about: dict[str, object] = field(default_factory=dict)


def prepare() -> tuple[Task, TextIO]:
    """The task from the command line, and where to answer; see `begin`."""
    task, answers = begin()
    return Task(**task), answers


def begin() -> tuple[dict[str, Any], TextIO]:
    """The fields of the task from the command line, and where to answer. To be called before any library is imported:
    it binds the process to its cores, and sends whatever libraries print to stderr.
    """
    request = json.loads(sys.argv[1])
    if hasattr(os, "sched_setaffinity"):
        os.sched_setaffinity(0, request["cores"])
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)
    return request["task"], answers


def serve(contender: Contender, answers: TextIO, started: float) -> None:
    """Answer requests until stdin closes.

    {"do": "run", "iterations": n}   wall and CPU seconds (all threads of this process) of n iterations
    {"do": "load", "weights": path}  take weights from an .npz file
    {"do": "lengths", "count": n}    mean and longest of n drawn trajectories
    {"do": "logits", "states": path, "to": path}  NumPy arrays in files
    {"do": "memory"}                 bytes of a trajectory; peak resident bytes of the process
    """

    def answer(**values: object) -> None:
        print(json.dumps(values), file=answers, flush=True)

    ready = {"parameters": contender.parameters, "start_seconds": time.perf_counter() - started}
    answer(**ready, **contender.about)
    for line in sys.stdin:
        request = json.loads(line)
        if request["do"] == "run":
            wall, cpu = time.perf_counter(), time.process_time()
            contender.update(request["iterations"])
            answer(wall=time.perf_counter() - wall, cpu=time.process_time() - cpu)
        elif request["do"] == "load":
            assert contender.load is not None
            with np.load(request["weights"]) as file:
                contender.load(dict(file))
            answer()
        elif request["do"] == "lengths":
            lengths = contender.lengths(request["count"])
            answer(mean=float(np.mean(lengths)), longest=int(np.max(lengths)))
        elif request["do"] == "logits":
            assert contender.logits is not None
            np.save(request["to"], contender.logits(np.load(request["states"])))
            answer()
        elif request["do"] == "memory":
            unit = 1 if sys.platform == "darwin" else 1024
            peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit
            answer(**contender.bytes_a_trajectory(), peak_resident_bytes=peak)
