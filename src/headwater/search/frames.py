"""What crosses a socket between the learner and a searching process: frames of a JSON header and safetensors bytes.

Nothing is pickled. A frame is whole or it is not there: what a process sent before it was killed in mid-frame never
becomes a message.
"""

from __future__ import annotations

import json
import socket
import struct
from collections.abc import Iterator, Mapping

_SIZES = struct.Struct("<IQ")  # bytes of header and payload


def send(connection: socket.socket, header: Mapping[str, object], payload: bytes = b"") -> None:
    """Send one frame, waiting while the other side does not read. Raises OSError if nobody is there any more."""
    text = json.dumps(header).encode()
    connection.sendall(_SIZES.pack(len(text), len(payload)) + text)
    if payload:
        connection.sendall(payload)


def receive(connection: socket.socket) -> tuple[dict[str, object], bytes] | None:
    """Wait for one frame; None when the other side is gone."""
    inbox = Inbox()
    while True:
        # No more than is missing, so that the next frame stays in the socket.
        data = connection.recv(min(inbox.missing, 1 << 20))
        if not data:
            return None
        for frame in inbox.take(data):
            return frame


class Inbox:
    """Puts together the frames of one connection from pieces, however they were cut."""

    def __init__(self) -> None:
        self._data = bytearray()

    @property
    def missing(self) -> int:
        """Bytes that the frame which has begun still lacks, as far as is known: never more than it does."""
        return self._size() - len(self._data)

    @property
    def is_partial(self) -> bool:
        """Whether a frame has begun that is not complete."""
        return bool(self._data)

    def take(self, data: bytes) -> Iterator[tuple[dict[str, object], bytes]]:
        """Add a piece; yields the frames that it completes."""
        self._data += data
        while len(self._data) >= (size := self._size()) > _SIZES.size:
            header_size, _ = _SIZES.unpack_from(self._data)
            end = _SIZES.size + header_size
            header, payload = json.loads(self._data[_SIZES.size : end]), bytes(self._data[end:size])
            del self._data[:size]
            yield header, payload

    def _size(self) -> int:
        if len(self._data) < _SIZES.size:
            return _SIZES.size
        return _SIZES.size + sum(_SIZES.unpack_from(self._data))
