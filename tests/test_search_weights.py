"""Weights and frames between processes: never torn, never half, whatever dies."""

from __future__ import annotations

import os
import signal
import socket
import time

import torch
from hypothesis import given, strategies

from headwater.search import frames
from headwater.search.weights import SharedWeights


def tensors(value: int) -> dict[str, torch.Tensor]:
    return {
        "weight": torch.full((300, 301), float(value)),
        "half": torch.full((5,), value % 100, dtype=torch.bfloat16),
        "count": torch.full((), value),
        "flag": torch.tensor([bool(value % 2)]),
        "nothing": torch.empty(0, 3),
    }


def test_every_type_comes_back_to_the_bit() -> None:
    shared = SharedWeights(tensors(0))
    read = tensors(-1)
    for version in (1, 2, 3):
        shared.publish(tensors(version), version)
        assert shared.read_into(read) == version
        assert all(read[name].equal(tensor) for name, tensor in tensors(version).items())


def test_a_reader_never_sees_half_of_one_version_and_half_of_another() -> None:
    shared = SharedWeights(tensors(0))
    shared.publish(tensors(1), 1)
    torn, forward = os.pipe()
    readers = []
    for _ in range(2):
        pid = os.fork()
        if pid == 0:
            torch.set_num_threads(1)
            read, last, seen, status = tensors(0), 0, 0, 0
            until = time.monotonic() + 1.5
            while time.monotonic() < until:
                version = shared.read_into(read)
                whole = all(read[name].equal(tensor) for name, tensor in tensors(version).items())
                status |= not whole or version < last
                seen += version > last
                last = version
            os.write(forward, f"{seen} ".encode())
            os._exit(int(status))
        readers.append(pid)
    version, until = 1, time.monotonic() + 1.5
    while time.monotonic() < until:
        version += 1
        shared.publish(tensors(version), version)
    assert [os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) for pid in readers] == [0, 0]
    assert min(map(int, os.read(torn, 100).split())) > 20  # they did read while it was written


def test_a_reader_killed_at_any_moment_blocks_nobody() -> None:
    shared = SharedWeights(tensors(0))
    shared.publish(tensors(1), 1)
    for version in range(2, 12):
        pid = os.fork()
        if pid == 0:
            read = tensors(0)
            while True:
                shared.read_into(read)
        time.sleep(0.005)
        os.kill(pid, signal.SIGKILL)
        os.waitpid(pid, 0)
        shared.publish(tensors(version), version)
        assert shared.read_into(tensors(0)) == version


@given(
    payloads=strategies.lists(strategies.binary(max_size=50), max_size=5),
    cuts=strategies.lists(strategies.integers(1, 40), min_size=1),
    lost=strategies.integers(0, 30),
)
def test_frames_come_whole_or_not_at_all_however_they_are_cut(
    payloads: list[bytes], cuts: list[int], lost: int
) -> None:
    left, right = socket.socketpair()
    with left, right:
        ends = [0]
        for number, payload in enumerate(payloads):
            frames.send(left, {"number": number}, payload)
            ends.append(ends[-1] + 12 + len(f'{{"number": {number}}}') + len(payload))
        sent = right.recv(1 << 16) if payloads else b""
    assert len(sent) == ends[-1]
    sent = sent[: max(len(sent) - lost, 0)]
    inbox, got, at = frames.Inbox(), [], 0
    while at < len(sent):
        size = cuts[at % len(cuts)]
        got += list(inbox.take(sent[at : at + size]))
        at += size
    whole = sum(end <= len(sent) for end in ends[1:])
    assert got == [({"number": number}, payload) for number, payload in enumerate(payloads[:whole])]
    assert inbox.is_partial == (len(sent) > ends[whole])


def test_a_receiver_takes_one_frame_and_leaves_the_next() -> None:
    left, right = socket.socketpair()
    with right:
        with left:
            frames.send(left, {"number": 1}, b"one")
            frames.send(left, {"number": 2})
        assert frames.receive(right) == ({"number": 1}, b"one")
        assert frames.receive(right) == ({"number": 2}, b"")
        assert frames.receive(right) is None
