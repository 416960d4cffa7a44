"""State graphs: every state and step once, parents before children, path counts by closed form, faults named."""

from __future__ import annotations

import math
import time

import numpy as np
import pytest
import torch
from torch import Tensor

from headwater.environments import graph as graph_module
from headwater.environments.base import Environment
from headwater.environments.graph import StateGraph, TooManyStates, enumerate_states
from headwater.environments.hypergrid import Hypergrid
from headwater.environments.sequences import Sequences
from headwater.environments.sets import Sets
from headwater.environments.slots import Slots

ENVIRONMENTS: dict[str, Environment] = {
    "grid": Hypergrid(3, 4),
    "append": Sequences("ACGU", 4, 2),
    "prepend-append": Sequences("AB", 4, 0, "prepend-append"),
    "slots": Slots(3, 4),
    "sets": Sets(6, 3),
}
every_environment = pytest.mark.parametrize("environment", ENVIRONMENTS.values(), ids=ENVIRONMENTS.keys())


class Rungs(Hypergrid):
    """A line of `side` cells on which a step goes from any cell to any other that `arrows` names; only the last exits.
    What exactly a backward step does is of no concern to enumeration."""

    def __init__(self, side: int, arrows: list[tuple[int, int]]) -> None:
        super().__init__(1, side)
        self.native, self.n_actions = None, side + 1
        self.legal = torch.zeros(side, side + 1, dtype=torch.bool)
        for source, target in arrows:
            self.legal[source, target] = True
        self.legal[-1, -1] = True

    def forward_mask(self, states: Tensor) -> Tensor:
        return self.legal[states[:, 0].long()]

    def step(self, states: Tensor, actions: Tensor) -> Tensor:
        return actions.to(states.dtype)[:, None]


def naive(environment: Environment) -> tuple[set[tuple[int, ...]], set[tuple[tuple[int, ...], int, tuple[int, ...]]]]:
    """States and steps, one state at a time."""
    todo, seen, steps = [tuple(environment.initial(1)[0].tolist())], set(), set()
    while todo:
        state = todo.pop()
        if state in seen:
            continue
        seen.add(state)
        row = torch.tensor([state], dtype=torch.int32)
        for action in environment.forward_mask(row)[0, :-1].nonzero()[:, 0]:
            child = tuple(environment.step(row, action[None])[0].tolist())
            steps.add((state, int(action), child))
            todo.append(child)
    return seen, steps


@every_environment
def test_every_state_and_every_step_is_listed_once(environment: Environment) -> None:
    graph = enumerate_states(environment)
    states = [tuple(state) for state in graph.states.tolist()]
    steps = [
        (states[source], action, states[target])
        for source, action, target in zip(
            graph.source.tolist(), graph.action.tolist(), graph.target.tolist(), strict=True
        )
    ]
    expected_states, expected_steps = naive(environment)
    assert len(states) == len(expected_states)
    assert set(states) == expected_states
    assert len(steps) == len(expected_steps)
    assert set(steps) == expected_steps
    assert torch.equal(graph.terminal, environment.forward_mask(graph.states)[:, environment.exit_action])
    assert torch.equal(graph.states[:1], environment.initial(1))
    assert graph.states.dtype == torch.int32


@every_environment
def test_parents_come_before_children_and_levels_are_a_sweep(environment: Environment) -> None:
    check_order(enumerate_states(environment))


def test_a_state_that_short_and_long_paths_reach_waits_for_the_longest() -> None:
    graph = enumerate_states(Rungs(5, [(0, 4), (0, 3), (3, 1), (1, 2), (2, 4), (3, 4)]))
    assert graph.states[:, 0].tolist() == [0, 3, 1, 2, 4]
    assert graph.path_counts() == [1, 1, 1, 1, 3]
    check_order(graph)


def check_order(graph: StateGraph) -> None:
    assert (graph.source < graph.target).all()
    assert torch.equal(torch.cat(graph.levels).sort()[0], torch.arange(len(graph.source)))
    complete = torch.bincount(graph.target, minlength=len(graph)) == 0
    for edges in graph.levels:
        assert complete[graph.source[edges]].all()
        targets = graph.target[edges].unique()
        assert torch.isin(graph.target, targets).sum() == len(edges)
        complete[targets] = True
    assert complete.all()


@pytest.mark.parametrize(("dimensions", "side"), [(1, 9), (2, 5), (4, 4)])
def test_path_counts_are_multinomials_and_so_are_their_logs(dimensions: int, side: int) -> None:
    graph = enumerate_states(Hypergrid(dimensions, side))
    counts = graph.path_counts()
    for state, count in zip(graph.states.tolist(), counts, strict=True):
        assert count == math.factorial(sum(state)) // math.prod(math.factorial(k) for k in state)
    log_counts = graph.log_path_sums(torch.zeros(len(graph.source)))
    torch.testing.assert_close(log_counts, torch.tensor(counts, dtype=torch.float64).log())


def test_path_counts_are_exact_beyond_64_bits() -> None:
    graph = enumerate_states(Hypergrid(2, 41))
    assert graph.path_counts()[-1] == math.comb(80, 40) > 2**64


def test_log_path_sums_keep_what_would_underflow_and_paths_of_weight_zero() -> None:
    graph = enumerate_states(Hypergrid(2, 30))
    steep = graph.log_path_sums(torch.full((len(graph.source),), -100.0))
    lengths = graph.states.sum(1).double()
    expected = Hypergrid(2, 30).log_path_count(graph.states) - 100 * lengths
    torch.testing.assert_close(steep, expected)
    assert float(steep.min()) < math.log(5e-324)
    blocked = graph.log_path_sums(torch.where(graph.action == 0, -torch.inf, 0.0))
    on_the_axis = graph.states[:, 0] == 0
    assert (blocked[on_the_axis] == 0).all()
    assert (blocked[~on_the_axis] == -torch.inf).all()


def test_chunks_change_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    whole = enumerate_states(Hypergrid(3, 5))
    monkeypatch.setattr(graph_module, "_CHUNK", 7)
    cut = enumerate_states(Hypergrid(3, 5))
    for name in ("states", "source", "target", "action", "terminal"):
        assert torch.equal(getattr(whole, name), getattr(cut, name))


def test_states_of_equal_hash_stay_apart(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(graph_module, "identity", lambda states: torch.zeros(len(states), dtype=torch.int64))
    graph = enumerate_states(Hypergrid(2, 6))
    assert len(graph) == 36
    assert torch.equal(graph.rows(graph.states.flip(0)), torch.arange(35, -1, -1))


def test_rows_finds_each_state_and_names_one_that_is_not_there() -> None:
    graph = enumerate_states(Hypergrid(2, 5))
    order = torch.tensor([7, 0, 24, 7])
    assert torch.equal(graph.rows(graph.states[order]), order)
    assert graph.rows(graph.states[:0]).shape == (0,)
    with pytest.raises(ValueError, match=r"\(5, 1\)"):
        graph.rows(torch.tensor([[0, 1], [5, 1]]))


def test_an_environment_without_steps_is_one_state() -> None:
    graph = enumerate_states(Rungs(1 + 1, []))
    assert (len(graph), len(graph.source), graph.levels, graph.path_counts()) == (1, 0, [], [1])
    assert graph.log_path_sums(torch.empty(0)).tolist() == [0.0]


def test_the_limit_is_kept_to_the_state_and_named() -> None:
    assert len(enumerate_states(Hypergrid(2, 10), limit=100)) == 100
    with pytest.raises(TooManyStates, match="more than 99 states"):
        enumerate_states(Hypergrid(2, 10), limit=99)
    with pytest.raises(ValueError, match="more than 1000 states"):
        enumerate_states(Sequences("ACGU", 40), limit=1000)


@pytest.mark.parametrize(
    ("arrows", "on_cycle"),
    [
        ([(0, 1), (1, 2), (2, 3), (3, 1), (3, 4), (4, 5)], {1, 2, 3}),
        ([(0, 1), (1, 0), (1, 5)], {0, 1}),
        ([(0, 1), (1, 1), (1, 5)], {1}),
        ([(0, 0)], {0}),
    ],
)
def test_a_cycle_is_refused_and_a_state_on_it_named(arrows: list[tuple[int, int]], on_cycle: set[int]) -> None:
    with pytest.raises(ValueError, match="cycle") as error:
        enumerate_states(Rungs(6, arrows))
    named = str(error.value).split("(")[1].split(",")[0]
    assert int(named) in on_cycle


def test_a_hundred_and_sixty_thousand_states_take_seconds() -> None:
    enumerate_states(Hypergrid(2, 2))  # compiles
    began = time.perf_counter()
    graph = enumerate_states(Hypergrid(4, 20))
    counts = graph.path_counts()
    assert time.perf_counter() - began < 10  # about 0.2 on one quiet core
    assert len(graph) == 20**4
    assert len(graph.source) == 4 * 19 * 20**3
    assert len(np.unique(graph.states.numpy(), axis=0)) == 20**4
    assert counts[-1] == math.factorial(76) // math.factorial(19) ** 4
