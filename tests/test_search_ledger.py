"""The books of asynchronous search by themselves: any order of deliveries, repeats, deaths and late answers."""

from __future__ import annotations

from collections import Counter

import pytest
from hypothesis import settings, strategies
from hypothesis.stateful import Bundle, RuleBasedStateMachine, consumes, invariant, multiple, rule

from headwater.policies.base import NO_EXPLORATION
from headwater.search.ledger import LEASES_EACH, Lease, Ledger, Verdict

AHEAD, STALENESS = 5, 1


class Anything(RuleBasedStateMachine):
    """Searchers come, go, answer late, twice, out of order or never; the learner takes batches and publishes."""

    answers = Bundle("answers")
    delivered = Bundle("delivered")

    def __init__(self) -> None:
        super().__init__()
        self.ledger = Ledger(AHEAD, STALENESS, seed=100)
        self.now = 0.0
        self.sequences: Counter[int] = Counter()
        self.unsettled: set[int] = set()
        self.settled: set[int] = set()
        self.known: set[tuple[int, int]] = set()
        self.seeds: set[int] = set()
        self.orphaned: set[int] = set()
        self.queue: list[int] = []
        self.fresh = self.handed = self.late = self.surplus = 0
        self.in_hand = False

    @rule()
    def join(self) -> None:
        if len(self.ledger.searchers) < 4:
            self.ledger.join()

    @rule(data=strategies.data())
    def leave(self, data: strategies.DataObject) -> None:
        if self.ledger.searchers:
            searcher = data.draw(strategies.sampled_from(self.ledger.searchers))
            self.orphaned |= set(self.ledger._working[searcher].leases)
            self.ledger.leave(searcher)

    @rule(target=answers)
    def issue(self) -> object:
        issued = self.ledger.issue(16, NO_EXPLORATION, self.now)
        if issued is None:
            return multiple()
        searcher, lease = issued
        assert lease.number not in self.settled
        assert lease.seed not in self.seeds  # a second try is another draw
        if lease.number in self.unsettled:
            assert lease.number in self.orphaned
            self.orphaned.remove(lease.number)
        else:
            assert not self.orphaned  # what the dead left behind goes first
        self.unsettled.add(lease.number)
        self.seeds.add(lease.seed)
        self.sequences[searcher] += 1
        return searcher, self.sequences[searcher] - 1, lease.number, self.ledger.version

    @rule(target=delivered, answer=consumes(answers))
    def deliver(self, answer: tuple[int, int, int, int]) -> tuple[int, int, int, int]:
        searcher, sequence, lease, version = answer
        verdict = self.ledger.deliver(searcher, sequence, lease, self.now)
        assert verdict is not Verdict.DUPLICATE
        assert (searcher, sequence) not in self.known
        self.known.add((searcher, sequence))
        if verdict is Verdict.FRESH:
            assert lease not in self.settled
            self.settled.add(lease)
            self.unsettled.remove(lease)
            self.orphaned.discard(lease)
            self.queue.append(version)
            self.fresh += 1
        else:
            self.surplus += 1
        return answer

    @rule(answer=delivered)
    def deliver_again(self, answer: tuple[int, int, int, int]) -> None:
        searcher, sequence, lease, _ = answer
        before = self.ledger.state()
        assert self.ledger.deliver(searcher, sequence, lease, self.now) is Verdict.DUPLICATE
        assert self.ledger.state().equal(before)

    @rule()
    def hand_out(self) -> None:
        if not self.queue or self.in_hand:
            return
        version = self.queue.pop(0)
        if self.ledger.hand_out(version):
            assert self.ledger.version - version <= STALENESS
            self.handed += 1
            self.in_hand = True
        else:
            assert self.ledger.version - version > STALENESS
            self.late += 1

    @rule()
    def publish(self) -> None:
        if self.in_hand:
            self.ledger.publish(self.ledger.version + 1)
            self.in_hand = False

    @invariant()
    def never_too_far_ahead(self) -> None:
        assert self.ledger.out + self.ledger.waiting + self.in_hand <= AHEAD
        assert all(self.ledger.holds(searcher) <= LEASES_EACH for searcher in self.ledger.searchers)

    @invariant()
    def every_batch_is_accounted_for(self) -> None:
        assert self.ledger.waiting == len(self.queue) == self.fresh - self.handed - self.late
        assert (self.ledger.late, self.ledger.surplus) == (self.late, self.surplus)

    @invariant()
    def no_lease_is_lost(self) -> None:
        held = {number for searcher in self.ledger.searchers for number in self.ledger._working[searcher].leases}
        assert held | self.orphaned == self.unsettled
        assert not held & self.orphaned


TestAnything = Anything.TestCase
TestAnything.settings = settings(max_examples=60, stateful_step_count=60, deadline=None)


def issued(ledger: Ledger, now: float = 0.0) -> tuple[int, Lease]:
    made = ledger.issue(16, NO_EXPLORATION, now)
    assert made is not None
    return made


@pytest.mark.parametrize("staleness", [0, 1, 5])
@pytest.mark.parametrize("searchers", [1, 3])
def test_searchers_that_answer_in_order_are_never_too_stale(staleness: int, searchers: int) -> None:
    ledger = Ledger(staleness + 1, staleness, 0)
    for _ in range(searchers):
        ledger.join()
    out: list[tuple[int, int, int]] = []
    sequences: Counter[int] = Counter()
    stalest = 0
    for version in range(50):
        while (made := ledger.issue(16, NO_EXPLORATION, 0.0)) is not None:
            out.append((made[0], made[1].number, ledger.version))  # drawn at once, delivered as late as can be
        searcher, lease, drawn = out.pop(0)
        assert ledger.deliver(searcher, sequences[searcher], lease, 0.0) is Verdict.FRESH
        sequences[searcher] += 1
        assert ledger.hand_out(drawn)
        stalest = max(stalest, ledger.version - drawn)
        ledger.publish(version + 1)
    assert stalest == min(staleness, LEASES_EACH * searchers - 1)
    assert ledger.late == 0


def test_only_a_searcher_that_shows_no_life_is_overdue() -> None:
    ledger = Ledger(10, 10, 0)
    first, second = ledger.join(), ledger.join()
    assert {issued(ledger, now=0.0)[0], issued(ledger, now=4.0)[0]} == {first, second}
    issued(ledger, now=5.0)  # the first one's second lease waits behind its first
    assert ledger.overdue(9.9, 10.0) == []
    assert ledger.overdue(10.1, 10.0) == [first]
    ledger.deliver(first, 0, 0, 10.2)
    assert ledger.overdue(14.1, 10.0) == [second]
    ledger.deliver(first, 1, 2, 11.0)
    assert first not in ledger.overdue(1000.0, 10.0)  # it holds nothing: it waits for us


def test_a_ledger_taken_up_again_repeats_no_number() -> None:
    ledger = Ledger(10, 10, 7)
    ledger.join()
    searcher, lease = issued(ledger)
    issued(ledger)
    ledger.publish(12)
    ledger.deliver(searcher, 0, lease.number, 0.0)
    again = Ledger(10, 10, 99)
    again.load_state(ledger.state())
    assert (again.version, again.waiting, again.searchers, again.out) == (12, 1, [], 0)
    assert again.join() == searcher + 1
    fresh = issued(again)[1]
    assert (fresh.number, fresh.seed) == (2, 9)
    with pytest.raises(ValueError, match="state of a ledger"):
        again.load_state(ledger.state()[:3])
