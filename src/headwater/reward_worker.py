"""A user's reward function, found by name and called here or in a worker process that can be killed when it hangs.

Both ends of the pipe are in this file. Messages are JSON behind their length, never pickles, so nothing but plain data
crosses. The file imports the standard library alone: a worker starts in milliseconds.
"""

from __future__ import annotations

import contextlib
import importlib
import json
import os
import queue
import selectors
import signal
import struct
import subprocess
import sys
import threading
import time
import weakref
from collections.abc import Callable, Iterable
from typing import IO, TypeAlias

RewardFunction: TypeAlias = Callable[[list[object]], Iterable[float]]

_START_LIMIT = 300.0  # seconds for the imports of the user's module, which may be large


class RewardError(ValueError):
    """The reward as a whole is unusable: it cannot be found, or it does not return what a reward must."""


class Failure(Exception):
    """One call of the function came to nothing: it raised, took too long, or ended its process."""


def load_function(name: str, what: str = "reward function") -> RewardFunction:
    """The function "module:function", also from the current directory; raises RewardError saying what is missing.
    what: the function, in the words of that error."""
    module_name, colon, function_name = name.partition(":")
    if not (module_name and colon and function_name):
        raise RewardError(f"{what} {name!r} must be written as 'module:function'")
    if os.getcwd() not in sys.path:
        sys.path.insert(0, os.getcwd())
    importlib.invalidate_caches()
    try:
        module = importlib.import_module(module_name)
    except ModuleNotFoundError as error:
        if error.name is None or not f"{module_name}.".startswith(f"{error.name}."):
            raise RewardError(f"{what} {name!r}: module {module_name} needs {error.name}: {error}") from error
        raise RewardError(
            f"{what} {name!r}: there is no module {error.name}, neither installed nor in {os.getcwd()}"
        ) from error
    except Exception as error:
        raise RewardError(f"{what} {name!r}: importing {module_name} raised {type(error).__name__}: {error}") from error
    function = getattr(module, function_name, None)
    if not callable(function):
        offered = sorted(
            key
            for key, value in vars(module).items()
            if not key.startswith("_") and callable(value) and getattr(value, "__module__", None) == module.__name__
        )
        raise RewardError(
            f"{what} {name!r}: module {module_name} has no function {function_name}; "
            f"it has {', '.join(offered) or 'no functions'}"
        )
    return function


def call_function(function: RewardFunction, objects: list[object]) -> list[float]:
    """The function's rewards as numbers. Raises Failure if it raised, RewardError if it returned something else."""
    try:
        returned = function(objects)
    except Exception as error:
        raise Failure(f"{type(error).__name__}: {error}") from error
    try:
        return [float(value) for value in returned]
    except (TypeError, ValueError) as error:
        text = repr(returned)
        raise RewardError(
            "the reward function must return one number for each object of the list; "
            f"it returned {text if len(text) <= 200 else text[:200] + '...'}"
        ) from error


class Worker:
    """The function in a process of its own, killed when a call takes longer than `timeout` seconds, then started anew.
    After a fork each side has one: the child starts its own at its first call.

    Raises RewardError when built if the function cannot be loaded.
    """

    def __init__(self, function: str, timeout: float) -> None:
        self._function = function
        self._timeout = timeout
        self._process: subprocess.Popen[bytes] | None = None
        self._start()

    def __getstate__(self) -> dict[str, object]:
        """A copy that is sent elsewhere starts a process of its own, at its first call."""
        return {"_function": self._function, "_timeout": self._timeout, "_process": None, "_owner": None}

    def call(self, objects: list[object]) -> list[float]:
        """As `call_function`; Failure also if the call took too long or ended the process."""
        message = {"objects": _encode(objects)}
        if self._owner != os.getpid():
            self.close()
        if self._process is None:
            self._start()
        reply = self._exchange(message, self._timeout)
        if "failure" in reply:
            raise Failure(str(reply["failure"]))
        values = reply.get("values")
        if not isinstance(values, list) or not all(isinstance(value, float) for value in values):
            raise RewardError(str(reply.get("error", "the worker process sent something that is no answer")))
        return values

    def close(self) -> None:
        """End the process; the next call starts another."""
        if self._process is not None and self._owner != os.getpid():  # of the process that this one was forked from
            self._kill.detach()
        elif self._process is not None:
            self._kill()
        self._process = None

    def _start(self) -> None:
        # -P keeps the folder of this file, full of modules with common names, off the path of the user's imports.
        command = [sys.executable, "-P", os.path.abspath(__file__)]
        self._process = subprocess.Popen(
            command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, bufsize=0, start_new_session=True
        )
        self._owner = os.getpid()
        self._kill = weakref.finalize(self, _kill, self._process)
        try:
            reply = self._exchange({"function": self._function, "path": sys.path}, _START_LIMIT)
        except Failure as failure:
            raise RewardError(f"reward function {self._function!r}: loading it failed: {failure}") from failure
        if "error" in reply:
            self.close()
            raise RewardError(str(reply["error"]))

    def _exchange(self, message: dict[str, object], limit: float) -> dict[str, object]:
        process = self._process
        assert process is not None
        assert process.stdin is not None
        assert process.stdout is not None
        try:
            _send(process.stdin, message)
            deadline = time.monotonic() + limit
            (length,) = _LENGTH.unpack(_read(process.stdout, _LENGTH.size, deadline))
            reply = json.loads(_read(process.stdout, length, deadline))
        except TimeoutError:
            self.close()
            raise Failure(f"no answer within {limit:g} s") from None
        except (EOFError, BrokenPipeError):
            with contextlib.suppress(subprocess.TimeoutExpired):
                process.wait(1.0)
            status = process.returncode
            self.close()
            raise Failure(f"its process ended with status {status}") from None
        except BaseException:  # an interrupted exchange leaves half an answer in the pipe
            self.close()
            raise
        return reply if isinstance(reply, dict) else {}


_LENGTH = struct.Struct("<Q")


def _send(stream: IO[bytes], message: dict[str, object]) -> None:
    payload = json.dumps(message).encode()
    data = memoryview(_LENGTH.pack(len(payload)) + payload)
    while data:
        data = data[stream.write(data) :]
    stream.flush()


def _read(stream: IO[bytes], length: int, deadline: float) -> bytes:
    """`length` bytes. Raises TimeoutError at the deadline (a time of the monotonic clock), EOFError at the end."""
    data = bytearray()
    with selectors.DefaultSelector() as selector:
        selector.register(stream, selectors.EVENT_READ)
        while len(data) < length:
            if not selector.select(max(deadline - time.monotonic(), 0)):
                raise TimeoutError
            piece = os.read(stream.fileno(), min(length - len(data), 1 << 20))
            if not piece:
                raise EOFError
            data += piece
    return bytes(data)


def _kill(process: subprocess.Popen[bytes]) -> None:
    """End the process and all that the user's function started in it."""
    with contextlib.suppress(ProcessLookupError, PermissionError):
        os.killpg(process.pid, signal.SIGKILL)
    process.wait()
    for stream in (process.stdin, process.stdout):
        if stream is not None:
            stream.close()


def _encode(value: object) -> object:
    """JSON has no tuples: a tuple travels as an object with one key."""
    if isinstance(value, tuple):
        return {"tuple": [_encode(each) for each in value]}
    if isinstance(value, list):
        return [_encode(each) for each in value]
    if value is None or isinstance(value, str | int | float):
        return value
    raise RewardError(
        f"a reward with a timeout runs in another process, to which only strings, numbers, lists and tuples can be "
        f"sent, not a {type(value).__name__}: {value!r}"
    )


def _decode(value: object) -> object:
    if isinstance(value, dict):
        return tuple(_decode(each) for each in value["tuple"])
    if isinstance(value, list):
        return [_decode(each) for each in value]
    return value


def _listen(requests: IO[bytes], inbox: queue.SimpleQueue[list[object]]) -> None:
    """Take requests as they come, and end the process with the one that sends them, even while the function hangs."""
    while len(head := requests.read(_LENGTH.size)) == _LENGTH.size:
        inbox.put(_decode(json.loads(requests.read(*_LENGTH.unpack(head)))["objects"]))  # type: ignore[arg-type]
    os._exit(0)


def _answer(function: RewardFunction, objects: list[object]) -> dict[str, object]:
    try:
        return {"values": call_function(function, objects)}
    except Failure as failure:
        return {"failure": str(failure)}
    except RewardError as error:
        return {"error": str(error)}


def _serve() -> None:
    # What the user's function prints must not end up among the answers: it goes to the standard error.
    requests, replies = os.fdopen(os.dup(0), "rb"), os.fdopen(os.dup(1), "wb")
    os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
    os.dup2(2, 1)
    hello = json.loads(requests.read(*_LENGTH.unpack(requests.read(_LENGTH.size))))
    sys.path[:] = hello["path"]
    try:
        function = load_function(hello["function"])
    except RewardError as error:
        _send(replies, {"error": str(error)})
        return
    _send(replies, {})
    inbox: queue.SimpleQueue[list[object]] = queue.SimpleQueue()
    threading.Thread(target=_listen, args=(requests, inbox), daemon=True).start()
    while True:
        _send(replies, _answer(function, inbox.get()))


if __name__ == "__main__":
    _serve()
