"""Asynchronous search: searchers draw and score without pause while the learner learns; everything goes to the replay.

The learner gets one fresh batch for each update, whoever drew it. So the updates per fresh trajectory are those of
inline search, a slow reward does not tempt the learner to run away on its replay, and searchers that are ahead wait for
leases. What runs the searchers is a `Runtime`: processes of this machine, or anything else that keeps its contract.
"""

from __future__ import annotations

import logging
import time
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass
from typing import Protocol, TypeAlias

import torch
from torch import Tensor

from headwater.policies.base import Exploration
from headwater.replay import Replay
from headwater.search.base import Search, SearchError, SearchSettings
from headwater.search.ledger import LEASES_EACH, Lease, Ledger, Verdict
from headwater.search.searcher import Calls, Drawn, Searcher
from headwater.trajectories import Trajectories

_log = logging.getLogger(__name__)

_DEATHS_EACH = 3  # searchers that end one after the other, for each that there should be, with nothing delivered
_WORTH_STALENESS = 0.05  # share of a batch's search time that an update must take for searchers not to wait for it
_MEMORY = 0.9  # of the mean times of an update and of waiting
_WATCH = 0.5  # seconds between two looks at who is overdue
_DRAIN_LIMIT = 10.0  # seconds that a delivery which has begun may take to arrive whole


@dataclass(frozen=True)
class Delivery:
    """What a searcher has drawn for a lease.

    sequence: the searcher's own count of its deliveries. version: of the policy that drew. calls: what its reward was
    asked for since the last delivery, or None where it does not count. busy, idle: seconds since then.
    """

    searcher: int
    sequence: int
    lease: int
    version: int
    drawn: Drawn
    calls: Calls | None
    busy: float
    idle: float


@dataclass(frozen=True)
class Ended:
    """A searcher is no more: why, and what it was doing."""

    searcher: int
    reason: str


@dataclass(frozen=True)
class Raised:
    """Drawing or scoring raised an error that ends the run, as it would inline."""

    searcher: int
    error: Exception


Event: TypeAlias = Delivery | Ended | Raised


class Runtime(Protocol):
    """Runs searchers somewhere. None of its methods waits for a searcher, except `wait`."""

    def start(self, searcher: int, place: int) -> None:
        """Bring the searcher of this number to life, in one of the places 0, 1, ..."""

    def lease(self, searcher: int, lease: Lease) -> None:
        """Let it draw this batch; nothing happens if it is no more."""

    def publish(self, version: int) -> None:
        """Let the searchers have the weights that the searching policy has now."""

    def wait(self, seconds: float) -> list[Event]:
        """What has happened since the last call; waits up to `seconds` for something to happen."""

    def is_receiving(self) -> bool:
        """Whether a delivery has begun to arrive that is not there as a whole."""

    def stop(self, searcher: int) -> None:
        """End this searcher at once, whatever it does; no event follows."""

    def close(self) -> None:
        """End all."""


@dataclass
class _Window:
    """Sums since metrics were last asked for."""

    began: float
    trajectories: int = 0
    updates: int = 0
    stalenesses: int = 0
    stalest: int = 0
    learner_idle: float = 0.0
    busy: float = 0.0
    idle: float = 0.0


class AsynchronousSearch(Search):
    """Searchers in `settings.searchers` places, run by what `runtime` makes when the first batch is asked for."""

    def __init__(
        self,
        searcher: Searcher,
        replay: Replay | None,
        generator: torch.Generator,
        settings: SearchSettings,
        runtime: Callable[[], Runtime],
    ) -> None:
        super().__init__(searcher, replay)
        self.settings = settings
        seed = int(torch.randint(2**62, (), generator=generator))
        self.ledger = Ledger(min(settings.searchers, settings.staleness + 1), settings.staleness, seed)
        self.restarts = 0
        self._make_runtime = runtime
        self._runtime: Runtime | None = None
        self._places: dict[int, int] = {}
        self._fresh: deque[Trajectories] = deque()
        self._troubles: deque[Ended | Raised] = deque()
        self._calls = Calls(0, 0)
        self._deaths_in_a_row = 0
        self._wanted: tuple[int, Exploration] | None = None
        self._learning = self._waiting = 0.0
        self._handed_out: float | None = None
        self._window = _Window(time.monotonic())

    @property
    def calls(self) -> Calls | None:
        here = super().calls
        return None if here is None else here + self._calls

    def collect(self, count: int, exploration: Exploration) -> Trajectories:
        """One batch that a searcher has drawn, waiting for it if none is there. Raises SearchError when searcher after
        searcher ends without having delivered anything, and what their reward raises.
        """
        self._wanted = count, exploration
        self.ledger.learnt()
        self._start()
        began = time.monotonic()
        self._listen(0)
        while (fresh := self._next_fresh()) is None:
            self._issue()
            self._listen(_WATCH)
        self._pace(began, time.monotonic())
        self._window.updates += 1
        return fresh.to(self.searcher.device)

    def publish(self) -> None:
        version = self.searcher.policy.version
        self.ledger.publish(version)
        if self._runtime is not None:
            self._runtime.publish(version)
            self._issue()

    def metrics(self) -> dict[str, float]:
        """Since the last call: staleness in updates, rates by wall-clock time, shares of time spent waiting; and counts
        from the start of the run.
        """
        window, now = self._window, time.monotonic()
        self._window = _Window(now)
        passed = max(now - window.began, 1e-9)
        figures = {
            "search/trajectories_per_second": window.trajectories / passed,
            "search/updates_per_second": window.updates / passed,
            "search/learner_idle": window.learner_idle / passed,
            "search/restarts": float(self.restarts),
            "search/late": float(self.ledger.late),
        }
        if window.updates:
            figures |= {
                "search/staleness_mean": window.stalenesses / window.updates,
                "search/staleness_max": float(window.stalest),
            }
        if window.busy + window.idle > 0:
            figures["search/worker_idle"] = window.idle / (window.busy + window.idle)
        return figures

    def state(self) -> dict[str, Tensor]:
        """Take in what has been delivered, and what is being delivered; then the ledger and the waiting batches."""
        deadline = time.monotonic() + _DRAIN_LIMIT
        while self._runtime is not None:
            self._take_in(self._runtime.wait(0.05 if self._runtime.is_receiving() else 0))
            if not self._runtime.is_receiving() or time.monotonic() > deadline:
                break
        tensors = {"ledger": self.ledger.state(), "counts": torch.tensor([self.restarts])}
        filled = [batch for batch in self._fresh if len(batch)]
        if filled:
            tensors["sizes"] = torch.tensor([len(batch) for batch in filled])
            tensors |= Trajectories.concatenate(filled).tensors()
        return tensors

    def load_state(self, tensors: dict[str, Tensor]) -> None:
        self.close()
        self._fresh.clear()
        if "ledger" not in tensors:  # the run searched inline until now
            return
        self.ledger.load_state(tensors["ledger"])
        self.restarts = int(tensors["counts"][0])
        if "sizes" in tensors:
            kept = {name: tensor for name, tensor in tensors.items() if name not in ("ledger", "counts", "sizes")}
            self._fresh.extend(Trajectories.from_tensors(kept).split(tensors["sizes"].tolist()))
        self.ledger.waiting = len(self._fresh)

    def close(self) -> None:
        if self._runtime is None:
            return
        try:
            self.state()
        finally:
            self._runtime.close()
            self._runtime = None
            for searcher in self.ledger.searchers:
                self.ledger.leave(searcher)
            self._places.clear()
            self._troubles.clear()

    def _start(self) -> None:
        if self._runtime is None:
            self._runtime = self._make_runtime()
            self._deaths_in_a_row = 0
            self._window = _Window(time.monotonic())
            version = self.searcher.policy.version
            self.ledger.publish(version)
            self._runtime.publish(version)
            for place in range(self.settings.searchers):
                self._join(place)
        self._issue()

    def _join(self, place: int) -> None:
        assert self._runtime is not None
        searcher = self.ledger.join()
        self._places[searcher] = place
        self._runtime.start(searcher, place)

    def _issue(self) -> None:
        assert self._runtime is not None
        if self._wanted is None:
            return
        while (issued := self.ledger.issue(*self._wanted, time.monotonic())) is not None:
            self._runtime.lease(*issued)

    def _pace(self, began: float, now: float) -> None:
        """Choose how far ahead searchers may be: the learner waited from `began` to `now`.

        With one lease each, a searcher that has delivered waits until the learner has learnt from it: the least
        staleness there is. Where an update takes a good part of the time that drawing and scoring a batch take, that
        would cost speed, so each gets a second lease to go on with.
        """
        self._window.learner_idle += now - began
        if self._handed_out is not None:
            self._learning = _MEMORY * self._learning + (1 - _MEMORY) * (began - self._handed_out)
            self._waiting = _MEMORY * self._waiting + (1 - _MEMORY) * (now - began)
        self._handed_out = now
        places = self.settings.searchers
        searching = places * (self._learning + self._waiting)  # each of them delivers once in as many updates
        each = LEASES_EACH if self._learning > _WORTH_STALENESS * searching else 1
        self.ledger.ahead = min(each * places, self.settings.staleness + 1)

    def _next_fresh(self) -> Trajectories | None:
        while self._fresh:
            batch = self._fresh.popleft()
            drawn_with = int(batch.version[0]) if len(batch) else self.ledger.version
            if self.ledger.hand_out(drawn_with):
                staleness = self.ledger.version - drawn_with
                self._window.stalenesses += staleness
                self._window.stalest = max(self._window.stalest, staleness)
                return batch
        return None

    def _listen(self, seconds: float) -> None:
        """Take in what has happened, wait a while for something to happen, and see to those that are in trouble."""
        assert self._runtime is not None
        self._take_in(self._runtime.wait(0 if self._fresh or self._troubles else seconds))
        while self._troubles:
            trouble = self._troubles.popleft()
            if isinstance(trouble, Raised):
                raise trouble.error
            self._replace(trouble)
        for searcher in self.ledger.overdue(time.monotonic(), self.settings.timeout):
            self._runtime.stop(searcher)
            limit = f"no batch within {self.settings.timeout:g} s (search.timeout)"
            self._replace(Ended(searcher, f"was ended, for it hung: {limit}"))

    def _take_in(self, events: list[Event]) -> None:
        """Apply what was delivered; troubles wait until the learner asks for its next batch."""
        for event in events:
            if isinstance(event, Delivery):
                self._apply(event)
            else:
                self._troubles.append(event)

    def _apply(self, delivery: Delivery) -> None:
        verdict = self.ledger.deliver(delivery.searcher, delivery.sequence, delivery.lease, time.monotonic())
        if verdict is Verdict.DUPLICATE:
            return
        self._remember(delivery.drawn)
        self._deaths_in_a_row = 0
        self._calls += delivery.calls or Calls(0, 0)
        self._window.trajectories += delivery.drawn.drawn
        self._window.busy += delivery.busy
        self._window.idle += delivery.idle
        if verdict is Verdict.FRESH:
            self._fresh.append(delivery.drawn.trajectories)

    def _replace(self, ended: Ended) -> None:
        """Let another searcher take the place of one that ended. Raises SearchError if that has not helped so far."""
        if ended.searcher not in self._places:  # told twice
            return
        place = self._places.pop(ended.searcher)
        self.ledger.leave(ended.searcher)
        self.restarts += 1
        self._deaths_in_a_row += 1
        if self._deaths_in_a_row >= _DEATHS_EACH * self.settings.searchers:
            raise SearchError(
                f"search worker {place} {ended.reason}; {self._deaths_in_a_row} have ended in a row without a batch "
                "delivered, so the run stops here"
            )
        _log.warning("search worker %d %s; another takes its place and its work", place, ended.reason)
        self._join(place)
        self._issue()
