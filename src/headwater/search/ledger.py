"""The books of asynchronous search: which leases are out, which deliveries were applied, how stale what came back is.

Nothing here draws, waits or knows what a process is: searchers are numbers, and the time of day is handed in. A lease
is leave to draw one batch. At most `ahead` of them are out, waiting for the learner or in its hand, so searchers cannot
run away from a learner that is slow; a searcher that is late or dead holds back nobody but itself. The pacing follows
the remarks on dropping against pacing in Bartoldson et al. 2025 (TBA, arXiv 2503.18929) and its successors.
"""

from __future__ import annotations

from collections import deque
from dataclasses import dataclass, field, replace
from enum import Enum, auto

import torch
from torch import Tensor

from headwater.policies.base import Exploration

LEASES_EACH = 2
"""Most leases that one searcher holds: while it works on one, the next is already there."""


@dataclass(frozen=True)
class Lease:
    """Leave to draw one batch.

    number: of the lease, the same when it is issued again. count, exploration: what to draw. seed: of the draws;
    another one each time that the lease is issued, so that a second try is a fair new draw.
    """

    number: int
    count: int
    exploration: Exploration
    seed: int


class Verdict(Enum):
    """What to do with a delivery."""

    FRESH = auto()
    """Keep it, and hand it to the learner in its turn."""
    SURPLUS = auto()
    """Keep it, but do not hand it out: another searcher has this lease by now."""
    DUPLICATE = auto()
    """Drop it: it was applied before."""


@dataclass
class _Account:
    """One searcher: the leases it holds, oldest first; when it last showed life; which deliveries were applied."""

    heard: float = 0.0
    leases: dict[int, Lease] = field(default_factory=dict)
    applied_below: int = 0
    applied_beyond: set[int] = field(default_factory=set)

    def apply(self, sequence: int) -> bool:
        """Whether `sequence` is new; it is not from now on."""
        if sequence < self.applied_below or sequence in self.applied_beyond:
            return False
        self.applied_beyond.add(sequence)
        while self.applied_below in self.applied_beyond:
            self.applied_beyond.remove(self.applied_below)
            self.applied_below += 1
        return True


class Ledger:
    """Leases out and settled, deliveries applied once, staleness within its bound.

    ahead: most leases that are out, waiting for the learner or in its hand; it may be changed. staleness: most updates
    that a batch may be behind when the learner gets it. seed: the first of the leases' seeds.

    version: updates that the published weights have seen. waiting: batches delivered, not handed out yet. late:
    batches that were too stale to be handed out. surplus: batches that came for a lease that another searcher had.
    """

    def __init__(self, ahead: int, staleness: int, seed: int) -> None:
        self.ahead, self.staleness, self.seed = ahead, staleness, seed
        self.version = self.waiting = self.late = self.surplus = 0
        self._in_hand = False
        self._next_searcher = self._next_lease = self._issued = 0
        self._working: dict[int, _Account] = {}
        self._left: dict[int, _Account] = {}
        self._returned: deque[Lease] = deque()

    @property
    def searchers(self) -> list[int]:
        """The searchers that are there, by number."""
        return list(self._working)

    @property
    def out(self) -> int:
        """Leases that searchers hold."""
        return sum(len(account.leases) for account in self._working.values())

    def holds(self, searcher: int) -> int:
        """How many leases this searcher holds."""
        return len(self._working[searcher].leases)

    def join(self) -> int:
        """A new searcher; returns its number, which no other ever had."""
        searcher = self._next_searcher
        self._next_searcher += 1
        self._working[searcher] = _Account()
        return searcher

    def leave(self, searcher: int) -> None:
        """This searcher is gone; its leases go to others."""
        account = self._working.pop(searcher)
        self._returned.extend(account.leases.values())
        account.leases.clear()
        self._left[searcher] = account

    def issue(self, count: int, exploration: Exploration, now: float) -> tuple[int, Lease] | None:
        """A lease, and the searcher that is to have it; None while enough is under way."""
        free = [searcher for searcher in self._working if self.holds(searcher) < LEASES_EACH]
        if not free or self.out + self.waiting + self._in_hand >= self.ahead:
            return None
        seed = self.seed + self._issued
        self._issued += 1
        if self._returned:
            lease = replace(self._returned.popleft(), seed=seed)
        else:
            lease = Lease(self._next_lease, count, exploration, seed)
            self._next_lease += 1
        searcher = min(free, key=self.holds)
        account = self._working[searcher]
        if not account.leases:
            account.heard = now
        account.leases[lease.number] = lease
        return searcher, lease

    def deliver(self, searcher: int, sequence: int, lease: int, now: float) -> Verdict:
        """A searcher's delivery number `sequence` is there, for `lease`; it may have been there before, or be from one
        that was given up.
        """
        account = self._working.get(searcher) or self._left[searcher]
        if not account.apply(sequence):
            return Verdict.DUPLICATE
        account.heard = now
        given_back = [waiting for waiting in self._returned if waiting.number == lease]
        if account.leases.pop(lease, None) is None:
            if not given_back:
                self.surplus += 1
                return Verdict.SURPLUS
            self._returned.remove(given_back[0])
        self.waiting += 1
        return Verdict.FRESH

    def overdue(self, now: float, timeout: float) -> list[int]:
        """The searchers that have held a lease for `timeout` seconds without a sign of life."""
        return [n for n, account in self._working.items() if account.leases and now - account.heard > timeout]

    def hand_out(self, version: int) -> bool:
        """The learner is to have the next batch that waits, drawn with `version`: whether it is fresh enough."""
        self.waiting -= 1
        if self.version - version > self.staleness:
            self.late += 1
            return False
        self._in_hand = True
        return True

    def learnt(self) -> None:
        """The learner is done with the batch in its hand."""
        self._in_hand = False

    def publish(self, version: int) -> None:
        """Weights of this version are published, so the learner is done with its batch too."""
        self.version = version
        self.learnt()

    def state(self) -> Tensor:
        """What a resumed run must know: no searcher, lease or seed comes up twice. int64 `[8]`."""
        return torch.tensor(
            [
                self.version, self.late, self.surplus, self.seed, self._next_searcher, self._next_lease, self._issued,
                self.waiting,
            ]
        )  # fmt: skip

    def load_state(self, state: Tensor) -> None:
        """Go on with the books of `state`, nobody working yet. Raises ValueError if it is no such state."""
        if state.shape != (8,):
            raise ValueError(f"the state of a ledger has shape {tuple(state.shape)}, expected (8,)")
        self.version, self.late, self.surplus, self.seed, searcher, lease, issued, self.waiting = map(
            int, state.tolist()
        )
        self._next_searcher, self._next_lease, self._issued = searcher, lease, issued
        self._in_hand = False
        self._working, self._left, self._returned = {}, {}, deque()
