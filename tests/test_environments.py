"""The general-purpose environments: the contract, exact counts by closed form, rewards by hand, and clear errors."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Iterable

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from headwater.environments import (
    CheckReport,
    Environment,
    Hypergrid,
    HypergridReward,
    Objects,
    Sequences,
    Sets,
    Slots,
    bit_sequences,
    check_environment,
)
from headwater.environments.graph import enumerate_states
from headwater.policies import EnvironmentPolicy
from headwater.policies.base import Exploration
from headwater.policies.rollout import Walk, walk_backward, walk_forward

ALLOWED = torch.tensor([[True, False, True], [False, True, False], [True, True, True]])

LARGE: list[Callable[[], Environment]] = [
    lambda: Hypergrid(4, 20),
    lambda: Sequences("ACGU", 40),
    lambda: Sequences("ACDEFGHIKLMNPQRSTVWY", 60, 0, "prepend-append"),
    lambda: Slots(50, 4),
    lambda: Sets(30, 15),
    lambda: Sets(30, 15, exact=True),
    lambda: bit_sequences(120, 8),
    lambda: bit_sequences(120, 8, "slots"),
]
SMALL: list[Callable[[], Environment]] = [
    lambda: Hypergrid(3, 4),
    lambda: Sequences(["AUG", "CCC", "GAU"], 4),
    lambda: Sequences("ab", 4, min_length=2),
    lambda: Sequences("abc", 3, allowed=ALLOWED),
    lambda: Sequences("ab", 5, 1, "prepend-append"),
    lambda: Slots(4, 3),
    lambda: Sets(["red", "green", "blue", "grey"], 3),
    lambda: Sets(6, 3, exact=True),
    lambda: bit_sequences(6, 2),
    lambda: bit_sequences(6, 2, "slots"),
]


def passes(environment: Environment) -> CheckReport:
    report = check_environment(environment)
    assert report.ok, str(report)
    return report


def counts(environment: Environment) -> tuple[int | None, int | None]:
    report = passes(environment)
    return report.n_objects, report.n_trajectories


def multinomial(parts: Iterable[int]) -> int:
    parts = list(parts)
    return math.factorial(sum(parts)) // math.prod(math.factorial(part) for part in parts)


@pytest.mark.parametrize("make", LARGE)
def test_a_large_environment_keeps_the_contract_on_random_walks(make: Callable[[], Environment]) -> None:
    assert passes(make()).n_states is None


@settings(max_examples=15, deadline=None)
@given(dimensions=st.integers(1, 3), side=st.integers(2, 5))
def test_a_hypergrid_has_a_multinomial_of_paths_to_each_cell(dimensions: int, side: int) -> None:
    cells = itertools.product(range(side), repeat=dimensions)
    assert counts(Hypergrid(dimensions, side)) == (side**dimensions, sum(multinomial(cell) for cell in cells))


@settings(max_examples=15, deadline=None)
@given(size=st.integers(1, 4), max_length=st.integers(1, 4), slack=st.integers(0, 4))
def test_appended_sequences_have_one_trajectory_each(size: int, max_length: int, slack: int) -> None:
    shortest = max(0, max_length - slack)
    n_strings = sum(size**length for length in range(shortest, max_length + 1))
    assert counts(Sequences("ACGU"[:size], max_length, shortest)) == (n_strings, n_strings)


@settings(max_examples=15, deadline=None)
@given(size=st.integers(1, 3), max_length=st.integers(1, 5), slack=st.integers(0, 5))
def test_sequences_grown_at_both_ends_have_a_power_of_two_of_trajectories(
    size: int, max_length: int, slack: int
) -> None:
    shortest = max(0, max_length - slack)
    lengths = range(shortest, max_length + 1)
    n_trajectories = sum(size**length * 2 ** max(length - 1, 0) for length in lengths)
    environment = Sequences("ACG"[:size], max_length, shortest, "prepend-append")
    assert counts(environment) == (sum(size**length for length in lengths), n_trajectories)


@settings(max_examples=15, deadline=None)
@given(st.lists(st.lists(st.booleans(), min_size=3, max_size=3).filter(any), min_size=1, max_size=4))
def test_allowed_symbols_multiply_over_the_places(rows: list[list[bool]]) -> None:
    n_strings = math.prod(sum(row) for row in rows)
    environment = Sequences("ACG", len(rows), allowed=torch.tensor(rows))
    assert counts(environment) == (n_strings, n_strings)


@settings(max_examples=10, deadline=None)
@given(length=st.integers(1, 4), symbols=st.integers(1, 3))
def test_slots_are_filled_in_every_order(length: int, symbols: int) -> None:
    n_objects = symbols**length
    assert counts(Slots(length, symbols)) == (n_objects, n_objects * math.factorial(length))


@settings(max_examples=15, deadline=None)
@given(items=st.integers(1, 7), size=st.integers(1, 7), exact=st.booleans())
def test_sets_are_built_in_every_order(items: int, size: int, exact: bool) -> None:
    size = min(size, items)
    sizes = [size] if exact else list(range(size + 1))
    n_trajectories = sum(math.comb(items, k) * math.factorial(k) for k in sizes)
    assert counts(Sets(items, size, exact)) == (sum(math.comb(items, k) for k in sizes), n_trajectories)


@pytest.mark.parametrize(("bits", "word"), [(4, 1), (6, 2), (6, 3), (3, 3)])
def test_bit_sequences_count_as_words(bits: int, word: int) -> None:
    words = bits // word
    assert counts(bit_sequences(bits, word)) == (2**bits, 2**bits)
    assert counts(bit_sequences(bits, word, "slots")) == (2**bits, 2**bits * math.factorial(words))


def test_sets_named_by_a_user_are_objects_of_those_names() -> None:
    environment = Sets(["red", "green", "blue"], 2)
    objects = environment.objects(torch.tensor([[0, 0, 0], [1, 0, 1]], dtype=torch.int32))
    assert list(objects) == [(), ("red", "blue")]
    assert environment.states([("blue", "red")]).tolist() == [[1, 0, 1]]


class IndependentSets(Sets):
    """Vertices of a graph, no two of them joined: a user's subclass that narrows what may be added and nothing else."""

    native = None

    def __init__(self, vertices: int, edges: list[tuple[int, int]]) -> None:
        super().__init__(vertices, vertices)
        self.native = None
        self.joined = torch.zeros(vertices, vertices, dtype=torch.int32)
        for a, b in edges:
            self.joined[a, b] = self.joined[b, a] = 1

    def forward_mask(self, states: Tensor) -> Tensor:
        mask = super().forward_mask(states)
        mask[:, :-1] &= (states[:, :, None] * self.joined.to(states.device)).sum(1) == 0
        return mask


@settings(max_examples=15, deadline=None)
@given(vertices=st.integers(1, 6), data=st.data())
def test_a_subclass_that_narrows_the_forward_mask_keeps_the_contract(vertices: int, data: st.DataObject) -> None:
    pairs = list(itertools.combinations(range(vertices), 2))
    edges = data.draw(st.lists(st.sampled_from(pairs), unique=True)) if pairs else []
    subsets = [set(c) for k in range(vertices + 1) for c in itertools.combinations(range(vertices), k)]
    independent = [chosen for chosen in subsets if not any({a, b} <= chosen for a, b in edges)]
    n_trajectories = sum(math.factorial(len(chosen)) for chosen in independent)
    assert counts(IndependentSets(vertices, edges)) == (len(independent), n_trajectories)


def logits_by_hash(actions: int) -> Callable[[Tensor, Tensor], Tensor]:
    """Some logits that depend on the state: any fixed function does."""
    return lambda states, ids: torch.sin(
        (states + 1).float().cumsum(1) @ torch.ones(states.shape[1], actions).cumsum(1)
    )


def both(environment: Environment, draw: Callable[[], Walk]) -> tuple[Walk, Walk]:
    """The same walk by native rules and by tensors."""
    native = draw()
    environment.native = None
    return native, draw()


def same(one: Walk, other: Walk) -> bool:
    exact = all(torch.equal(getattr(one, name), getattr(other, name)) for name in ("states", "actions", "lengths"))
    return exact and torch.allclose(one.log_prob, other.log_prob, atol=1e-4)


@pytest.mark.parametrize("make", SMALL)
def test_native_and_tensor_walks_are_the_same(make: Callable[[], Environment]) -> None:
    environment = make()
    assert environment.native is not None
    logits = logits_by_hash(environment.n_actions)
    exploration = Exploration(epsilon=0.1)
    native, tensors = both(
        environment,
        lambda: walk_forward(environment, logits, 200, exploration, torch.Generator().manual_seed(3)),
    )
    assert same(native, tensors)

    final = native.states[native.lengths.cumsum(0) - 1]
    environment = make()
    logits = logits_by_hash(environment.n_backward_actions)
    native, tensors = both(
        environment, lambda: walk_backward(environment, logits, final, torch.Generator().manual_seed(4))
    )
    assert same(native, tensors)
    starts = native.states[native.lengths.cumsum(0) - native.lengths]
    assert torch.equal(starts, environment.initial(200))


BAD_ARGUMENTS: list[tuple[Callable[[], object], str]] = [
    (lambda: Hypergrid(dimensions=0), "dimensions = 0: must be at least 1"),
    (lambda: Hypergrid(side=1), "side = 1: must be at least 2"),
    (lambda: HypergridReward(8, family="hard"), "family = 'hard': must be 'original' or 'deceptive'"),
    (lambda: HypergridReward(8, r0=0.0), "r0 must be positive"),
    (lambda: Sequences("", 3), "alphabet"),
    (lambda: Sequences("AA", 3), "alphabet"),
    (lambda: Sequences(["A", "CG"], 3), "alphabet"),
    (lambda: Sequences([""], 3), "alphabet"),
    (lambda: Sequences("AC", 0), "max_length = 0: must be at least 1"),
    (lambda: Sequences("AC", 3, 4), "min_length = 4: must lie between 0 and max_length = 3"),
    (lambda: Sequences("AC", 3, -1), "min_length = -1"),
    (lambda: Sequences("AC", 3, construction="both"), "construction = 'both'"),  # type: ignore[arg-type]
    (lambda: Sequences("ACG", 3, construction="prepend-append", allowed=ALLOWED), "construction = 'append' only"),
    (lambda: Sequences("ACG", 2, allowed=ALLOWED), r"allowed must be \[2, 3\]"),
    (lambda: Sequences("ACG", 3, allowed=ALLOWED & False), "a legal symbol in every place"),
    (lambda: Slots(0, 2), "length = 0"),
    (lambda: Slots(2, 0), "symbols = 0"),
    (lambda: Sets(0, 1), "at least one"),
    (lambda: Sets(["a", "a"], 1), "all different"),
    (lambda: Sets(3, 0), "size = 0: must lie between 1 and the number of items, 3"),
    (lambda: Sets(3, 4), "size = 4"),
    (lambda: bit_sequences(10, 4), "bits = 10: must be a multiple of word = 4"),
    (lambda: bit_sequences(8, 0), "word = 0: must lie between 1 and 16"),
    (lambda: bit_sequences(8, 4, "both"), "construction = 'both'"),  # type: ignore[arg-type]
]


@pytest.mark.parametrize(("make", "message"), BAD_ARGUMENTS)
def test_a_bad_argument_is_named_with_what_is_legal(make: Callable[[], object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        make()


UNBUILDABLE: list[tuple[Environment, Objects, str]] = [
    (Hypergrid(2, 4), [(1, 2), (0, 4)], r"\(0, 4\) has an entry outside 0 .. 3"),
    (Hypergrid(2, 4), [(-1, 0)], r"\(-1, 0\) has an entry"),
    (Hypergrid(2, 4), [(2**32, 0)], r"\(4294967296, 0\) has an entry"),
    (Hypergrid(2, 4), [(0.5, 0)], "must be 2 integers, got float64"),
    (Hypergrid(3, 4), [(1, 2), (0, 1), (2, 2)], r"must be 3 integers, got int64 of shape \(3, 2\)"),
    (Hypergrid(3, 4), [(1, 2, 3), (0, 1)], "must be 3 integers: they differ in length"),
    (Sequences("ACGU", 4), ["ACGU", "ACGT"], "'ACGT' is no sequence"),
    (Sequences("ACGU", 4), ["ACG"], "'ACG' is no sequence of 4 to 4 symbols"),
    (Sequences("ACGU", 4, 2), ["ACGUA"], "'ACGUA' is no sequence of 2 to 4 symbols"),
    (Sequences(["AUG", "CCC"], 2), ["AUGCC"], "'AUGCC'"),
    (Sequences("abc", 3, allowed=ALLOWED), ["bba"], "'bba' has a symbol in a place where it is not allowed"),
    (Slots(3, 2), [(0, 1, 2)], r"\(0, 1, 2\) has an entry outside 0 .. 1"),
    (Slots(3, 2), [(0, 1)], "must be 3 integers"),
    (Sets(4, 2), [(0, 4)], r"\(0, 4\) is no set of at most 2"),
    (Sets(4, 2), [(0, 1, 2)], r"\(0, 1, 2\) is no set of at most 2"),
    (Sets(4, 2), [(1, 1)], r"\(1, 1\)"),
    (Sets(4, 2, exact=True), [(1,)], r"\(1,\) is no set of exactly 2"),
    (bit_sequences(4, 2), [[0, 1, 2, 0]], r"\(0, 1, 2, 0\) has an entry outside 0 .. 1"),
    (bit_sequences(4, 2, "slots"), [[0, 1, 0]], "must be 4 integers"),
]


@pytest.mark.parametrize(("environment", "objects", "message"), UNBUILDABLE)
def test_an_object_that_cannot_be_built_is_refused(environment: Environment, objects: Objects, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        environment.states(objects)


def log_rewards(environment: Hypergrid, reward: HypergridReward) -> Tensor:
    cells = enumerate_states(environment).states
    return reward(cells, torch.zeros(len(cells), 0))


@pytest.mark.parametrize(
    ("dimensions", "side", "rewards", "log_z"),
    [
        (4, 20, (1e-3, 0.5, 2.0), 8.643297),
        (4, 8, (1e-3, 0.5, 2.0), 5.100452),
        (4, 20, (1e-4, 1.0, 3.0), 9.285819),
        (2, 20, (1e-3, 0.5, 2.0), 4.411585),
        (2, 64, (0.1, 0.5, 2.0), 7.098045),
    ],
)
def test_the_published_grids_have_their_exact_log_z(
    dimensions: int, side: int, rewards: tuple[float, float, float], log_z: float
) -> None:
    log_reward = log_rewards(Hypergrid(dimensions, side), HypergridReward(side, *rewards))
    assert float(log_reward.double().logsumexp(0)) == pytest.approx(log_z, abs=2e-6)


@pytest.mark.parametrize(("side", "band"), [(11, set()), (16, {2, 13}), (21, {3, 17}), (31, {4, 5, 25, 26})])
def test_the_band_is_decided_in_integers(side: int, band: set[int]) -> None:
    """0.3 < |x / (H - 1) - 1/2| < 0.4 is strict: for a cell on the very edge, rounding would decide."""
    log_reward = log_rewards(Hypergrid(1, side), HypergridReward(side, r0=1.0, r1=0.0, r2=1.0))
    assert set((log_reward > 0).nonzero()[:, 0].tolist()) == band


def test_the_original_reward_by_hand() -> None:
    # |x / 7 - 1/2| is .5, .357, .214, .071 for x = 0 .. 3, and mirrored: the ring is {0, 1, 6, 7}, the band {1, 6}.
    cells = torch.tensor([[0, 0], [1, 6], [1, 7], [0, 3], [3, 3]])
    log_reward = HypergridReward(8, 0.01, 0.5, 2.0)(cells, torch.zeros(5, 0))
    assert log_reward.exp().tolist() == pytest.approx([0.51, 2.51, 0.51, 0.01, 0.01])
    assert log_reward.dtype == torch.float32


def test_the_deceptive_reward_by_hand() -> None:
    # |x / 7 - 1/2| > 0.1 for all x but 3 and 4: a cell keeps r1 only if some axis is at 3 or 4; the band is {1, 6}.
    cells = torch.tensor([[3, 4], [0, 3], [1, 3], [0, 0], [1, 6], [2, 5]])
    log_reward = HypergridReward(8, 1e-5, 0.1, 2.0, family="deceptive")(cells, torch.zeros(6, 0))
    lure, moat, mode = 0.10001, 1e-5, 2.00001
    assert log_reward.exp().tolist() == pytest.approx([lure, lure, lure, moat, mode, moat], rel=1e-4)


def test_a_subclass_that_changes_a_rule_is_walked_by_its_own_rule() -> None:
    class NoFirstItem(Sets):
        def forward_mask(self, states: torch.Tensor) -> torch.Tensor:
            mask = super().forward_mask(states)
            mask[:, 0] = False
            return mask

    environment = NoFirstItem(4, 2)
    assert Sets(4, 2).rules is not None
    assert environment.rules is None
    policy = EnvironmentPolicy(environment)
    drawn = policy.objects(policy.sample(torch.empty(200, 0)))
    assert all(0 not in items for items in drawn)  # type: ignore[operator]
    assert check_environment(environment).ok
