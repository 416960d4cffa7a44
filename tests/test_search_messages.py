"""What a searcher elsewhere answers is what was drawn there, to the bit; and its errors are what they were."""

from __future__ import annotations

import json

import pytest
import torch

from headwater.conditions import NoCondition
from headwater.environments.base import Objects
from headwater.environments.hypergrid import Hypergrid, HypergridReward
from headwater.policies import Exploration
from headwater.reward import CachedReward, Reward, RewardError
from headwater.search import Searcher, SearchError
from headwater.search.asynchronous import Delivery, Raised
from headwater.search.ledger import Lease
from headwater.search.messages import Answers, event_of, header_of
from headwater.search.searcher import Calls
from helpers import random_policy, same, seeded

LEASE = Lease(3, 8, Exploration(0.25, 1.5), 2**62 - 1)


def searcher_of(reward: Reward | None = None) -> Searcher:
    return Searcher(random_policy(Hypergrid(2, 6)), reward or CachedReward(HypergridReward(6)), NoCondition())


def answered(answers: Answers, lease: Lease = LEASE, version: int = 7) -> Delivery | Raised:
    """By way of text, as a socket carries it."""
    header, payload = answers.answer(json.loads(json.dumps(header_of(lease))), lambda: version)
    return event_of(5, json.loads(json.dumps(header)), payload, "search actor")


def test_a_delivery_says_all_that_was_drawn_and_what_it_took() -> None:
    here = searcher_of()
    here.policy.version = 7
    expected = here.collect(8, LEASE.exploration, seeded(LEASE.seed))
    answers = Answers(searcher_of())
    first = answered(answers)
    second = answered(answers, Lease(4, 8, LEASE.exploration, LEASE.seed))
    assert isinstance(first, Delivery)
    assert isinstance(second, Delivery)
    assert same(first.drawn.trajectories, expected.trajectories)
    assert (first.drawn.drawn, first.drawn.failed) == (8, 0)
    assert (first.searcher, first.sequence, first.lease, first.version) == (5, 0, 3, 7)
    assert (second.sequence, second.lease) == (1, 4)
    assert first.calls == here.calls
    assert second.calls == Calls(8, 0)  # the same objects again, and since the first delivery alone
    assert first.busy > 0
    assert second.idle >= 0


@pytest.mark.parametrize(
    ("error", "kind", "said"),
    [(RewardError("the oracle is gone"), RewardError, r"^the oracle is gone\n"),
     (ValueError("no such object"), ValueError, r"^no such object\n"),
     (ZeroDivisionError("by nothing"), SearchError, r"^a search actor failed: ZeroDivisionError: by nothing"),
     (SystemExit(3), SearchError, r"^a search actor failed: SystemExit: 3")],
)  # fmt: skip
def test_what_a_reward_raises_is_told_as_it_was(error: BaseException, kind: type[Exception], said: str) -> None:
    def broken(objects: Objects, condition: torch.Tensor) -> torch.Tensor:
        raise error

    event = answered(Answers(searcher_of(broken)))
    assert isinstance(event, Raised)
    with pytest.raises(kind, match=said):
        raise event.error
    where = [str(event.error), *getattr(event.error, "__notes__", [])]
    assert any("in broken" in text for text in where)  # the traceback
