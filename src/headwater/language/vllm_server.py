"""Requests to a vLLM server: JSON over HTTP with a limit on every size and time. The server runs in an environment of
its own, since what vLLM pins is often at odds with what the learner needs. The standard library is enough for it.
"""

from __future__ import annotations

import contextlib
import http.client
import json
import math
import socket
import threading
import time
from dataclasses import dataclass, field
from urllib.parse import urlsplit

_LONGEST_DELAY = 30.0  # seconds between two attempts, whatever the server asks for
_CONNECTING = 30.0  # seconds
_EXCERPT = 300  # characters of an answer in an error


class ServerError(RuntimeError):
    """The server refused a request, or answered what its protocol does not allow."""


class ServerUnavailable(ServerError):
    """The server cannot be reached, fails, or takes too long: asking later, or another one, may help."""


@dataclass(frozen=True)
class Server:
    """A vLLM server at `url`, such as http://localhost:8000 (without /v1)."""

    url: str
    timeout: float = 600.0
    """Seconds for one request, from the connection to the last byte of the answer. It is not asked again after them."""
    attempts: int = 5
    """How often one request is made while the connection fails or the status is 429 or 5xx."""
    backoff: float = 0.5
    """Seconds before the second attempt; twice as long before each one after it."""
    most_bytes: int = 1 << 28
    """The longest answer that is read."""
    key: str | None = field(default=None, repr=False)
    """What the server was given as --api-key. It protects the paths under /v1 alone."""

    def __post_init__(self) -> None:
        object.__setattr__(self, "url", self.url.rstrip("/"))
        parts = urlsplit(self.url)
        if parts.scheme not in ("http", "https") or not parts.hostname or parts.query or parts.fragment:
            raise ValueError(f"url = {self.url!r}: must be like http://host:8000")
        if not 0 < self.timeout < math.inf:
            raise ValueError(f"timeout = {self.timeout}: must be positive seconds")
        if self.attempts < 1 or self.most_bytes < 1 or not 0 <= self.backoff < math.inf:
            raise ValueError(
                f"attempts = {self.attempts}, most_bytes = {self.most_bytes}, backoff = {self.backoff}: attempts and "
                f"most_bytes must be at least 1, backoff at least 0"
            )

    def get(self, path: str) -> object:
        """What the JSON of the answer says; None for an empty one. Raises ServerError."""
        return self._ask("GET", path, None, self.attempts)

    def post(self, path: str, body: dict[str, object] | None = None, *, once: bool = False) -> object:
        """Likewise. once: for a request that must not be repeated, since it moves the server from state to state."""
        return self._ask("POST", path, {} if body is None else body, 1 if once else self.attempts)

    def _ask(self, method: str, path: str, body: dict[str, object] | None, attempts: int) -> object:
        url, problem, delay = self.url + path, "", 0.0
        payload = None if body is None else json.dumps(body, allow_nan=False).encode()
        for attempt in range(attempts):
            time.sleep(min(delay, _LONGEST_DELAY))
            delay = self.backoff * 2**attempt
            try:
                status, asked_delay, data = self._exchange(method, path, payload)
            except _Late as error:
                raise ServerUnavailable(f"{url}: no whole answer within {self.timeout:g} s") from error
            except (OSError, http.client.HTTPException) as error:
                problem = f"{type(error).__name__}: {error}"
                continue
            if 200 <= status < 300:
                return self._parse(url, data)
            problem = f"status {status}: {_excerpt(data)}"
            if status != 429 and status < 500:
                raise ServerError(f"{url}: {problem}")
            delay = max(delay, asked_delay)
        times = "once" if attempts == 1 else f"{attempts} times"
        raise ServerUnavailable(f"{url}: asked {times}, at last {problem}")

    def _exchange(self, method: str, path: str, payload: bytes | None) -> tuple[int, float, bytes]:
        """Status, the seconds that the server asks to be left alone, and body."""
        parts, deadline = urlsplit(self.url), time.monotonic() + self.timeout
        kind = http.client.HTTPSConnection if parts.scheme == "https" else http.client.HTTPConnection
        connection = kind(str(parts.hostname), parts.port, timeout=min(self.timeout, _CONNECTING))
        headers = {"Content-Type": "application/json"} | ({"Authorization": f"Bearer {self.key}"} if self.key else {})
        watchdog: threading.Timer | None = None
        try:
            connection.connect()
            connection.sock.settimeout(self.timeout)
            # A socket's own time limit starts anew with each byte; this one does not.
            watchdog = threading.Timer(self.timeout, _hang_up, (connection.sock,))
            watchdog.daemon = True
            watchdog.start()
            connection.request(method, parts.path + path, payload, headers)
            with connection.getresponse() as response:
                data = response.read(self.most_bytes + 1)
                if len(data) > self.most_bytes:
                    raise ServerError(f"{self.url}{path}: the answer is longer than {self.most_bytes} bytes")
                if response.length:  # announced and not sent, which read(size) does not mind
                    raise http.client.IncompleteRead(data, response.length)
                return response.status, _seconds(response.getheader("Retry-After")), data
        except (OSError, http.client.HTTPException) as error:
            if time.monotonic() >= deadline:
                raise _Late from error
            raise
        finally:
            if watchdog is not None:
                watchdog.cancel()
            connection.close()

    def _parse(self, url: str, data: bytes) -> object:
        if not data.strip():
            return None
        try:
            return json.loads(data, parse_constant=_no_number)
        except (ValueError, RecursionError) as error:
            raise ServerError(f"{url}: the answer is no JSON ({error}): {_excerpt(data)}") from error


class _Late(Exception):
    """The time for a request is over."""


def _hang_up(connected: socket.socket) -> None:
    with contextlib.suppress(OSError):
        socket.socket.shutdown(connected, socket.SHUT_RDWR)  # not ssl's, which forgets its state under the reader


def _seconds(header: str | None) -> float:
    try:
        seconds = float(header or 0)
    except ValueError:  # a date
        return 0.0
    return seconds if 0 <= seconds < math.inf else 0.0


def _no_number(text: str) -> float:
    raise ValueError(f"{text} is no number of JSON")


def _excerpt(data: bytes) -> str:
    text = data[:_EXCERPT].decode("utf-8", "replace")
    return repr(text) + ("..." if len(data) > _EXCERPT else "")
