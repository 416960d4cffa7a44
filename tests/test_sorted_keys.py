"""The sorted set that a replay's indexes are, against a plain sorted list."""

from __future__ import annotations

import bisect

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from headwater.replay import sorted_keys
from headwater.replay.sorted_keys import SortedKeys

KEYS = st.integers(-(2**63), 2**63 - 1) | st.integers(-40, 40)


def assert_like(index: SortedKeys, model: list[int]) -> None:
    assert len(index) == len(model)
    assert index.at(np.arange(len(model))).tolist() == model
    asked = [-(2**63), 2**63 - 1, *model[::7], *(key + 1 for key in model[::5] if key < 2**63 - 1)]
    assert index.below(np.array(asked)).tolist() == [bisect.bisect_left(model, key) for key in asked]


@settings(max_examples=60, deadline=None)
@given(st.lists(st.tuples(st.lists(KEYS, max_size=20), st.lists(st.integers(0, 10**6), max_size=20)), max_size=12))
def test_it_holds_what_a_sorted_list_would(rounds: list[tuple[list[int], list[int]]]) -> None:
    index, model = SortedKeys(400), []
    for new, old in rounds:
        fresh = list(dict.fromkeys(key for key in new if key not in model))
        index.add(np.array(fresh, np.int64))
        model = sorted(model + fresh)
        leaving = list({model[place % len(model)] for place in old}) if model else []
        index.remove(np.array(leaving, np.int64))
        model = [key for key in model if key not in leaving]
        assert_like(index, model)


@pytest.mark.parametrize("order", ["random", "rising", "falling", "middle out"])
def test_blocks_split_and_merge_within_what_was_reserved(order: str) -> None:
    """Filled to capacity, thinned everywhere, emptied from one end and filled again, many blocks at a time."""
    capacity, generator = 30 * sorted_keys._BLOCK, np.random.default_rng(3)
    keys = np.unique(generator.integers(-(2**62), 2**62, capacity))
    for _ in range(3):
        index = SortedKeys(capacity)
        arranged = {
            "random": generator.permutation(keys),
            "rising": keys,
            "falling": keys[::-1],
            "middle out": keys[np.argsort(np.abs(np.arange(len(keys)) - len(keys) // 2))],
        }[order]
        for chunk in np.array_split(arranged, 97):
            index.add(chunk)
        assert_like(index, keys.tolist())
        thinned = keys[::9]
        for chunk in np.array_split(np.setdiff1d(generator.permutation(keys), thinned), 41):
            index.remove(chunk)
        assert_like(index, thinned.tolist())
        index.remove(thinned[: len(thinned) // 2])
        model = np.union1d(thinned[len(thinned) // 2 :], keys[: len(keys) // 2])
        index.add(np.setdiff1d(model, thinned[len(thinned) // 2 :]))
        assert_like(index, model.tolist())
        _, _, count, _, _, sizes = index._arrays
        used = int(sizes[sorted_keys._USED])
        assert (count[: used - 1] + count[1:used] > sorted_keys._MERGE).all()
        index.remove(model)
        assert_like(index, [])


def test_keys_that_come_in_order_fill_their_blocks() -> None:
    index = SortedKeys(10_000)
    for first in range(0, 10_000, 250):
        index.add(np.arange(first, first + 250))
    assert index.nbytes < 1.1 * 10_000 * 8 + 4096
