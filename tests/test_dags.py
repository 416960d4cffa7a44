"""Directed acyclic graphs: how many there are, that none has a cycle, text and objects there and back, clear errors."""

from __future__ import annotations

import itertools
import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from headwater.environments import Dags, check_environment
from headwater.environments.dags import (
    graph_text,
    node_names,
    reachable,
    structural_hamming_distance,
    text_graphs,
)
from headwater.environments.graph import enumerate_states
from headwater.policies.base import Exploration
from helpers import random_policy, seeded


def is_acyclic(graph: Tensor) -> bool:
    """Kahn's algorithm: take away nodes without parents until none is left."""
    left = set(range(len(graph)))
    while left:
        free = [node for node in left if not any(graph[parent, node] for parent in left)]
        if not free:
            return False
        left -= set(free)
    return True


def every_graph(nodes: int) -> list[Tensor]:
    """All directed graphs without loops, cyclic ones too."""
    pairs = [(i, j) for i in range(nodes) for j in range(nodes) if i != j]
    graphs = []
    for edges in itertools.product((0, 1), repeat=len(pairs)):
        graph = torch.zeros(nodes, nodes, dtype=torch.int32)
        for (i, j), edge in zip(pairs, edges, strict=True):
            graph[i, j] = edge
        graphs.append(graph)
    return graphs


@pytest.mark.parametrize(("nodes", "count"), [(1, 1), (2, 3), (3, 25), (4, 543), (5, 29281)])
def test_there_are_as_many_dags_as_robinson_counted(nodes: int, count: int) -> None:
    assert len(enumerate_states(Dags(nodes))) == count


@pytest.mark.parametrize(("nodes", "max_parents"), [(1, None), (3, None), (4, None), (4, 2), (5, 1)])
def test_a_small_space_of_dags_keeps_the_contract_on_every_state(nodes: int, max_parents: int | None) -> None:
    report = check_environment(Dags(nodes, max_parents))
    assert report.ok, str(report)
    assert report.n_states == report.n_objects


@pytest.mark.parametrize(("nodes", "max_parents", "walks"), [(12, None, 16), (20, 3, 2)])
def test_a_large_space_of_dags_keeps_the_contract_on_random_walks(
    nodes: int, max_parents: int | None, walks: int
) -> None:
    report = check_environment(Dags(nodes, max_parents), limit=500, walks=walks)
    assert report.ok, str(report)


@pytest.mark.parametrize("nodes", [2, 3, 4, 5])
def test_with_one_parent_each_the_graphs_are_rooted_forests(nodes: int) -> None:
    assert len(enumerate_states(Dags(nodes, max_parents=1))) == (nodes + 1) ** (nodes - 1)  # Cayley's formula


def test_the_states_are_the_acyclic_graphs_and_no_others() -> None:
    reached = {tuple(state) for state in enumerate_states(Dags(3)).states.tolist()}
    assert reached == {tuple(graph.flatten().tolist()) for graph in every_graph(3) if is_acyclic(graph)}


def test_nodes_reach_each_other_along_chains_of_any_length() -> None:
    for nodes in range(1, 13):
        chain = torch.diag(torch.ones(nodes - 1, dtype=torch.int32), 1)[None]
        assert torch.equal(reachable(chain)[0], torch.ones(nodes, nodes).triu() > 0)


@pytest.mark.parametrize(("nodes", "max_parents"), [(12, None), (20, None), (20, 2), (62, 3)])
def test_large_graphs_stay_acyclic_on_the_way_forward_and_back(nodes: int, max_parents: int | None) -> None:
    environment = Dags(nodes, max_parents)
    policy = random_policy(environment)
    torch.nn.init.constant_(policy.heads.bias[environment.exit_action : environment.exit_action + 1], -8.0)
    forward = policy.sample(torch.empty(4, 0), Exploration(epsilon=0.5), seeded(0))
    backward = policy.sample_backward(forward, seeded(1))
    assert int(forward.lengths.max()) > nodes
    assert torch.equal(policy.final_states(backward), policy.final_states(forward))
    for walked in (forward, backward):
        graphs = walked.steps["state"].view(-1, nodes, nodes)
        assert int(graphs[walked.starts].sum()) == 0
        assert int(graphs.sum(1).max()) <= (max_parents or nodes)
        assert all(is_acyclic(graph) for graph in graphs[walked.last].numpy())
        edges = graphs.sum((1, 2))  # one more a step, so that whatever came before is acyclic as well
        inner = torch.ones(walked.n_steps, dtype=torch.bool)
        inner[walked.last] = False
        assert bool((edges.roll(-1) - edges == 1)[inner].all())


def test_native_and_tensor_rules_agree_up_to_the_largest_graph() -> None:
    environment = Dags(62)
    states = environment.initial(3)
    for seed in range(200):
        mask = environment.forward_mask(states)
        for state, legal in zip(states.numpy(), mask.numpy(), strict=True):
            out = np.empty_like(legal)
            environment.native.forward_mask(state, environment.native.constants, out)
            assert np.array_equal(out, legal)
        actions = torch.multinomial(mask[:, : environment.exit_action].float(), 1, generator=seeded(seed))
        states = environment.step(states, actions[:, 0])
    assert bool(reachable(environment.objects(states))[:, 61].any())
    assert int(states.sum()) == 600


@settings(max_examples=30, deadline=None)
@given(nodes=st.integers(1, 7), seed=st.integers(0, 100))
def test_graphs_go_into_text_and_states_and_back(nodes: int, seed: int) -> None:
    environment = Dags(nodes)
    policy = random_policy(environment)
    states = policy.final_states(policy.sample(torch.empty(5, 0), Exploration(epsilon=1.0), seeded(seed)))
    graphs = torch.as_tensor(environment.objects(states))
    assert graphs.shape == (5, nodes, nodes)
    assert torch.equal(text_graphs(graph_text(graphs, environment.names), environment.names), graphs)
    assert torch.equal(environment.states(graphs), states)
    assert torch.equal(environment.states(graphs.tolist()), states)


def test_a_graph_reads_as_its_edges() -> None:
    names = ["age", "dose", "response"]
    graphs = torch.tensor([[[0, 0, 1], [0, 0, 1], [0, 0, 0]], [[0] * 3] * 3])
    assert graph_text(graphs, names) == ["age->response dose->response", "no edges"]
    assert node_names(3) == ("A", "B", "C")
    assert node_names(27)[-1] == "X27"
    for wrong in ("age->height", "age", "age-response"):
        with pytest.raises(ValueError, match=f"{wrong}.*age, dose, response"):
            text_graphs([wrong], names)


@pytest.mark.parametrize(
    ("a", "b", "distance"),
    [("A->B", "A->B", 0), ("A->B", "B->A", 1), ("A->B", "no edges", 1), ("A->B B->C", "C->B A->C", 3)],
)
def test_the_structural_hamming_distance_counts_pairs_of_nodes(a: str, b: str, distance: int) -> None:
    assert structural_hamming_distance(a, b) == structural_hamming_distance(b, a) == distance


def test_what_cannot_be_built_is_refused_by_name() -> None:
    environment = Dags(["x", "y", "z"], max_parents=1)
    matrix = torch.zeros(1, 3, 3, dtype=torch.int32)
    cycle, crowded, loop = matrix.clone(), matrix.clone(), matrix.clone()
    cycle[0, [0, 1, 2], [1, 2, 0]] = 1
    crowded[0, [0, 1], 2] = 1
    loop[0, 1, 1] = 1
    for graph, message in (
        (cycle, "x->y y->z z->x.*cycle"),
        (crowded, "x->z y->z.*over 1 parents"),
        (loop, "y->y.*cycle"),
        (matrix + 2, "outside 0 .. 1"),
        (matrix[:, :2], "one adjacency matrix each"),
        (matrix + 0.5, "float"),
        ([[[0, 1], [0]]], "3 x 3"),
    ):
        with pytest.raises(ValueError, match=message):
            environment.states(graph)
    assert environment.states(matrix[:0]).shape == (0, 9)


def test_settings_out_of_range_are_refused() -> None:
    for nodes, max_parents, message in (
        (0, None, "1 to 62"),
        (63, None, "1 to 62"),
        (["a", "a"], None, "differ"),
        (3, 0, "max_parents = 0"),
    ):
        with pytest.raises(ValueError, match=message):
            Dags(nodes, max_parents)


def test_max_steps_is_the_length_of_the_longest_trajectory() -> None:
    for nodes, max_parents in ((4, None), (4, 2), (5, 1)):
        environment = Dags(nodes, max_parents)
        edges = enumerate_states(environment).states.sum(1)
        assert int(edges.max()) + 1 == environment.max_steps
    assert Dags(20).max_steps == math.comb(20, 2) + 1
