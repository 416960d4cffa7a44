"""Asynchronous search over a runtime driven by hand: what is remembered, handed out, counted and given up."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable
from types import SimpleNamespace

import pytest

from headwater.conditions import NoCondition
from headwater.environments.hypergrid import Hypergrid, HypergridReward
from headwater.policies import Exploration
from headwater.replay import Replay, Uniform
from headwater.search import Searcher, SearchError, SearchSettings
from headwater.search.asynchronous import AsynchronousSearch, Delivery, Ended, Event, Raised
from headwater.search.ledger import Lease
from headwater.trajectories import Trajectories
from helpers import random_policy, same, seeded

COUNT = 4
Answer = Callable[["Hand", int, Lease], list[Event]]


class Hand:
    """A runtime in this thread: what each lease comes to is for `answer` to say, when the learner listens."""

    def __init__(self, searcher: Searcher, answer: Answer) -> None:
        self.searcher, self.answer = searcher, answer
        self.started: list[tuple[int, int]] = []
        self.stopped: list[int] = []
        self.leases: list[tuple[int, Lease]] = []
        self.sequences: dict[int, int] = {}
        self.published: list[int] = []
        self.closed = 0

    def start(self, searcher: int, place: int) -> None:
        self.started.append((searcher, place))

    def lease(self, searcher: int, lease: Lease) -> None:
        self.leases.append((searcher, lease))

    def publish(self, version: int) -> None:
        self.published.append(version)

    def wait(self, seconds: float) -> list[Event]:
        if seconds and not self.leases:
            raise TimeoutError("the learner waits, and nobody has anything to do")
        events = [event for searcher, lease in self.leases for event in self.answer(self, searcher, lease)]
        self.leases = []
        return events

    def is_receiving(self) -> bool:
        return False

    def stop(self, searcher: int) -> None:
        self.stopped.append(searcher)

    def close(self) -> None:
        self.closed += 1

    def deliver(self, searcher: int, lease: Lease, version: int | None = None) -> Delivery:
        sequence = self.sequences[searcher] = self.sequences.get(searcher, -1) + 1
        policy = self.searcher.policy
        newest, policy.version = policy.version, policy.version if version is None else version
        drawn = self.searcher.collect(lease.count, lease.exploration, seeded(lease.seed))
        policy.version = newest
        return Delivery(searcher, sequence, lease.number, policy.version, drawn, None, busy=3.0, idle=1.0)


def prompt(hand: Hand, searcher: int, lease: Lease) -> list[Event]:
    return [hand.deliver(searcher, lease)]


def make(
    answer: Answer, searchers: int = 2, staleness: int = 20, timeout: float = 600.0
) -> tuple[AsynchronousSearch, list[Hand]]:
    searcher = Searcher(random_policy(Hypergrid(2, 6)), HypergridReward(6), NoCondition())
    hands: list[Hand] = []

    def runtime() -> Hand:
        hands.append(Hand(searcher, answer))
        return hands[-1]

    settings = SearchSettings(searchers=searchers, staleness=staleness, timeout=timeout)
    return AsynchronousSearch(searcher, Replay(10_000, Uniform()), seeded(0), settings, runtime), hands


def learn(search: AsynchronousSearch) -> Trajectories:
    batch = search.collect(COUNT, Exploration(0.1))
    search.searcher.policy.version += 1
    search.publish()
    return batch


def test_each_update_gets_one_batch_and_everything_drawn_is_counted_and_remembered() -> None:
    search, hands = make(prompt)
    batches = [learn(search) for _ in range(10)]
    assert all(len(batch) == COUNT for batch in batches)
    assert all(not same(a, b) for i, a in enumerate(batches) for b in batches[:i])
    assert search.drawn == COUNT * (10 + search.ledger.waiting)
    assert hands[0].published == list(range(11))
    assert search.replay is not None
    objects = {int(identity) for batch in batches for identity in batch.identity}
    assert objects <= set(search.replay.state()["identity"].tolist())


def test_no_more_leases_are_out_than_the_staleness_allows() -> None:
    search, hands = make(lambda hand, searcher, lease: [], searchers=3, staleness=2)
    with pytest.raises(TimeoutError):
        search.collect(COUNT, Exploration())
    assert sum(search.ledger.holds(searcher) for searcher in search.ledger.searchers) == 3
    assert len(hands[0].started) == 3


@pytest.mark.parametrize("slow", ["search", "learner"])
def test_searchers_are_two_batches_ahead_only_of_a_learner_that_they_would_have_to_wait_for(
    slow: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    clock = [0.0]
    monkeypatch.setattr("headwater.search.asynchronous.time", SimpleNamespace(monotonic=lambda: clock[0]))

    def answer(hand: Hand, searcher: int, lease: Lease) -> list[Event]:
        clock[0] += 1.0
        return [hand.deliver(searcher, lease)]

    search, _ = make(answer, searchers=3)
    for _ in range(30):
        batch = learn(search)
        clock[0] += 0.1 if slow == "search" else 1.0
    assert search.ledger.ahead == (3 if slow == "search" else 6)
    staleness = search.ledger.version - 1 - int(batch.version[0])
    assert staleness <= 2 if slow == "search" else 2 < staleness <= 5


def test_a_delivery_that_comes_twice_is_applied_once() -> None:
    search, _ = make(lambda hand, searcher, lease: [hand.deliver(searcher, lease)] * 3)
    for _ in range(5):
        learn(search)
    assert search.drawn == COUNT * (5 + search.ledger.waiting)
    assert search.ledger.waiting <= 4


def test_a_batch_that_is_too_stale_goes_to_the_replay_and_not_to_the_learner() -> None:
    def one_late(hand: Hand, searcher: int, lease: Lease) -> list[Event]:
        return [hand.deliver(searcher, lease, version=2 if lease.number == 9 else None)]

    search, _ = make(one_late, searchers=1, staleness=3)
    staleness = []
    for _ in range(15):
        batch = learn(search)
        staleness.append(search.ledger.version - 1 - int(batch.version[0]))
    assert max(staleness) <= 3
    assert search.ledger.late == 1
    assert search.drawn == COUNT * (15 + 1 + search.ledger.waiting)
    assert search.metrics()["search/late"] == 1


def test_a_searcher_that_never_answers_holds_back_nobody_and_is_replaced(caplog: pytest.LogCaptureFixture) -> None:
    def first_hangs(hand: Hand, searcher: int, lease: Lease) -> list[Event]:
        return [] if searcher == 0 else [hand.deliver(searcher, lease)]

    search, hands = make(first_hangs, timeout=0.3)
    for _ in range(10):
        learn(search)
    assert hands[0].stopped == []
    time.sleep(0.35)
    with caplog.at_level(logging.WARNING):
        for _ in range(10):
            learn(search)
    assert hands[0].stopped == [0]
    assert (2, 0) in hands[0].started  # another, in the same place
    assert "search worker 0 was ended, for it hung: no batch within 0.3 s (search.timeout)" in caplog.text
    assert search.metrics()["search/restarts"] == 1
    assert search.ledger.out + search.ledger.waiting <= 4  # what it held went to others


def test_the_lease_of_a_dead_searcher_is_drawn_again_by_another_seed() -> None:
    issued: list[Lease] = []

    def first_dies(hand: Hand, searcher: int, lease: Lease) -> list[Event]:
        issued.append(lease)
        return [Ended(0, "died")] if len(issued) == 1 else [hand.deliver(searcher, lease)] if searcher else []

    search, _ = make(first_dies, searchers=1)
    learn(search)
    again = [lease for lease in issued if lease.number == issued[0].number]
    assert len(again) == 2
    assert again[0].seed != again[1].seed


def test_searchers_that_end_one_after_the_other_stop_the_run_with_the_last_reason() -> None:
    search, hands = make(lambda hand, searcher, lease: [Ended(searcher, "was killed by SIGSEGV")])
    with pytest.raises(SearchError, match=r"search worker \d was killed by SIGSEGV; 6 have ended in a row"):
        search.collect(COUNT, Exploration())
    search.close()
    assert hands[0].closed == 1


def test_deaths_between_deliveries_do_not_stop_a_run() -> None:
    def dies_after_two(hand: Hand, searcher: int, lease: Lease) -> list[Event]:
        return [Ended(searcher, "died")] if hand.sequences.get(searcher) == 1 else [hand.deliver(searcher, lease)]

    search, _ = make(dies_after_two)
    for _ in range(40):
        learn(search)
    assert search.restarts > 6


def test_an_error_of_the_reward_ends_the_run() -> None:
    search, _ = make(lambda hand, searcher, lease: [Raised(searcher, ValueError("the reward of 'ACGT' is -1"))])
    with pytest.raises(ValueError, match="'ACGT' is -1"):
        search.collect(COUNT, Exploration())


def test_what_was_delivered_but_not_learnt_from_is_in_the_state() -> None:
    search, _ = make(prompt)
    for _ in range(5):
        learn(search)
    search.publish()
    state = search.state()
    waiting = search.ledger.waiting
    assert waiting > 0
    again, hands = make(lambda hand, searcher, lease: [])
    again.load_state(state)
    again.searcher.policy.version = search.searcher.policy.version
    theirs = [again.collect(COUNT, Exploration()) for _ in range(waiting)]
    ours = [search.collect(COUNT, Exploration()) for _ in range(waiting)]
    assert all(same(a, b) for a, b in zip(theirs, ours, strict=True))
    assert {searcher for searcher, _ in hands[0].started}.isdisjoint({0, 1})
    assert min(lease.number for _, lease in hands[0].leases or [(0, Lease(99, 1, Exploration(), 0))]) >= 5


def test_metrics_are_of_the_time_since_the_last_ones() -> None:
    search, _ = make(prompt, searchers=1, staleness=1)
    for _ in range(20):
        learn(search)
    figures = search.metrics()
    assert figures["search/staleness_max"] <= 1
    assert figures["search/worker_idle"] == 0.25
    assert figures["search/trajectories_per_second"] >= figures["search/updates_per_second"] * COUNT
    assert "search/staleness_mean" not in search.metrics()  # nothing has happened since
