"""What a learner and a searcher elsewhere say to each other, in plain data: a lease goes there, a batch or an error
comes back.

Whatever carries them, a socket of this machine or a cluster, a message is a header that JSON can say, and the tensors
of a batch as safetensors.
"""

from __future__ import annotations

import time
import traceback
from collections.abc import Callable, Mapping

import torch
from safetensors.torch import load, save

from headwater.objects import ObjectTable, ObjectTableError
from headwater.policies.base import Exploration
from headwater.reward import RewardError, cache_of
from headwater.search.asynchronous import Delivery, Raised
from headwater.search.base import SearchError
from headwater.search.ledger import Lease
from headwater.search.searcher import Calls, Drawn, Searcher
from headwater.trajectories import Trajectories

Header = Mapping[str, object]
_ERRORS = {kind.__name__: kind for kind in (RewardError, ValueError, SearchError, ObjectTableError)}


def header_of(lease: Lease) -> dict[str, object]:
    """The lease, to be sent."""
    return {
        "number": lease.number,
        "count": lease.count,
        "epsilon": lease.exploration.epsilon,
        "temperature": lease.exploration.temperature,
        "seed": lease.seed,
    }


class Answers:
    """The searching side: draws and scores what leases ask for, one after the other, and words the answers."""

    def __init__(self, searcher: Searcher) -> None:
        self.searcher, self._sequence = searcher, 0
        self._known, self._ready = searcher.calls, time.monotonic()
        self._generator = torch.Generator()

    @property
    def table(self) -> ObjectTable | None:
        """Where the objects that are scored here are kept."""
        cache = cache_of(self.searcher.reward)
        return None if cache is None else cache.table

    def answer(self, lease: Header, renew: Callable[[], int]) -> tuple[dict[str, object], bytes]:
        """One batch, or what was raised at it. renew: takes the newest weights, and returns their version."""
        began, searcher = time.monotonic(), self.searcher
        searcher.policy.version = renew()
        self._generator.manual_seed(int(str(lease["seed"])))
        exploration = Exploration(float(str(lease["epsilon"])), float(str(lease["temperature"])))
        try:
            drawn = searcher.collect(int(str(lease["count"])), exploration, self._generator)
            if self.table is not None:
                self.table.flush()  # whatever the learner knows of is safe on disk, and known to the other searchers
        except (Exception, SystemExit) as error:
            return {"raised": type(error).__name__, "message": str(error), "traceback": traceback.format_exc()}, b""
        calls = searcher.calls
        new = None if calls is None or self._known is None else calls - self._known
        header: dict[str, object] = {
            "sequence": self._sequence,
            "lease": lease["number"],
            "version": searcher.policy.version,
            "drawn": drawn.drawn,
            "failed": drawn.failed,
            "failures": dict(drawn.failures),
            "requested": None if new is None else new.requested,
            "evaluated": None if new is None else new.evaluated,
            "idle": began - self._ready,
            "busy": time.monotonic() - began,
        }
        self._known, self._sequence, self._ready = calls, self._sequence + 1, time.monotonic()
        tensors = drawn.trajectories.tensors()
        return header, save({name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()})


def event_of(searcher: int, header: Header, payload: bytes, what: str) -> Delivery | Raised:
    """The learning side: what the answer of a searcher says. what: how such a searcher is called."""
    if "raised" in header:
        return Raised(searcher, _error(str(header["raised"]), str(header["message"]), str(header["traceback"]), what))
    number = {name: int(str(header[name])) for name in ("sequence", "lease", "version", "drawn", "failed")}
    trajectories, failures = Trajectories.from_tensors(load(payload)), _counts(header["failures"])
    return Delivery(
        searcher=searcher,
        sequence=number["sequence"],
        lease=number["lease"],
        version=number["version"],
        drawn=Drawn(trajectories, number["drawn"], number["failed"], failures),
        calls=_calls(header["requested"], header["evaluated"]),
        busy=float(str(header["busy"])),
        idle=float(str(header["idle"])),
    )


def _counts(told: object) -> dict[str, int]:
    return {str(kind): int(str(count)) for kind, count in told.items()} if isinstance(told, dict) else {}


def _calls(requested: object, evaluated: object) -> Calls | None:
    return None if requested is None else Calls(int(str(requested)), int(str(evaluated)))


def _error(name: str, message: str, text: str, what: str) -> Exception:
    """The searcher's error again: one of the reward says what it says inline, any other shows where it happened."""
    if name in _ERRORS:
        error = _ERRORS[name](message)
        error.add_note(f"in a {what}:\n{text}")
        return error
    return SearchError(f"a {what} failed: {name}: {message}\n{text}")
