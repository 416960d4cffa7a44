"""The BGe score against its definition, worked out in three other ways, and against what theory says of it."""

from __future__ import annotations

import itertools
import math

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from torch import Tensor

from headwater.environments import BGeReward, Dags
from headwater.environments.bge import climb
from headwater.environments.graph import enumerate_states

Array = NDArray[np.float64]


def measurements(rows: int, nodes: int, seed: int = 0) -> Array:
    """Correlated columns, with means that are not zero."""
    random = np.random.default_rng(seed)
    return random.normal(size=(rows, nodes)) @ random.normal(size=(nodes, nodes)) + random.normal(size=nodes)


def dags(nodes: int) -> Tensor:
    return torch.as_tensor(Dags(nodes).objects(enumerate_states(Dags(nodes)).states))


def complete(nodes: int) -> Tensor:
    return torch.ones(1, nodes, nodes).triu(1)


def log_multivariate_gamma(order: int, x: float) -> float:
    return 0.25 * order * (order - 1) * math.log(math.pi) + sum(math.lgamma(x - 0.5 * k) for k in range(order))


def log_marginal(data: Array, chosen: list[int], alpha_mu: float, alpha_w: float) -> float:
    """log p of some columns under the unrestricted Gaussian model: Kuipers et al. 2014, equation A.17, by determinants
    and multivariate gamma functions, with the sums over rows written out.
    """
    rows, nodes = data.shape
    size = len(chosen)
    if not size:
        return 0.0
    scale = alpha_mu * (alpha_w - nodes - 1) / (alpha_mu + 1)
    columns = data[:, chosen]
    mean = columns.mean(0)
    prior = scale * np.eye(size)
    posterior = prior + sum(np.outer(row - mean, row - mean) for row in columns)
    posterior = posterior + rows * alpha_mu / (rows + alpha_mu) * np.outer(mean, mean)
    before, after = alpha_w - nodes + size, alpha_w - nodes + size + rows
    return float(
        0.5 * size * math.log(alpha_mu / (rows + alpha_mu))
        - 0.5 * rows * size * math.log(math.pi)
        + log_multivariate_gamma(size, 0.5 * after)
        - log_multivariate_gamma(size, 0.5 * before)
        + 0.5 * before * np.linalg.slogdet(prior)[1]
        - 0.5 * after * np.linalg.slogdet(posterior)[1]
    )


@pytest.mark.parametrize(("rows", "nodes", "alpha_mu", "alpha_w"), [(7, 3, 1.0, None), (30, 4, 2.5, 9.0), (1, 2, 1, 4)])
def test_the_score_of_every_graph_is_the_ratio_of_normalisers(
    rows: int, nodes: int, alpha_mu: float, alpha_w: float | None
) -> None:
    data, graphs = measurements(rows, nodes), dags(nodes)
    weight = nodes + 2.0 if alpha_w is None else alpha_w
    expected = []
    for graph in graphs.numpy():
        parents = [np.flatnonzero(graph[:, node]).tolist() for node in range(nodes)]
        expected.append(
            sum(
                log_marginal(data, [*of_node, node], alpha_mu, weight) - log_marginal(data, of_node, alpha_mu, weight)
                for node, of_node in enumerate(parents)
            )
        )
    np.testing.assert_allclose(BGeReward(data, alpha_mu, alpha_w).log_score(graphs), expected, rtol=1e-11)


def test_the_score_is_the_integral_over_means_and_precisions() -> None:
    """Precision matrices are drawn from the Wishart prior; the mean is Gaussian, and integrated by hand."""
    nodes, rows, alpha_w, draws = 2, 3, 4.0, 400_000
    scale = (alpha_w - nodes - 1) / 2
    data, random = np.array([[0.3, -0.2], [1.0, 0.7], [-0.4, 0.1]]), np.random.default_rng(0)
    factors = np.zeros((draws, 2, 2))  # Bartlett's decomposition of Wishart(alpha_w, I / scale)
    factors[:, 0, 0] = np.sqrt(random.chisquare(alpha_w, draws))
    factors[:, 1, 1] = np.sqrt(random.chisquare(alpha_w - 1, draws))
    factors[:, 1, 0] = random.normal(size=draws)
    covariance = np.linalg.inv(factors @ factors.transpose(0, 2, 1) / scale)

    def estimate(chosen: list[int]) -> float:
        """Given the covariance S, the rows are jointly Gaussian: covariance (I + 1 1^T / alpha_mu) times S."""
        part = covariance[:, chosen][:, :, chosen]
        values = data[:, chosen]
        between = np.eye(rows) + np.ones((rows, rows))
        inner = values.T @ np.linalg.inv(between) @ values
        exponent = -0.5 * (np.linalg.inv(part) * inner).sum((1, 2))
        log_density = exponent - 0.5 * rows * np.linalg.slogdet(part)[1]
        log_density -= 0.5 * len(chosen) * (np.linalg.slogdet(between)[1] + rows * math.log(2 * math.pi))
        return float(np.log(np.exp(log_density).mean()))

    graphs = torch.tensor([[[0, 0], [0, 0]], [[0, 1], [0, 0]], [[0, 0], [1, 0]]])
    apart, joint = estimate([0]) + estimate([1]), estimate([0, 1])
    np.testing.assert_allclose(BGeReward(data).log_score(graphs), [apart, joint, joint], atol=0.01)


def test_without_missing_edges_the_score_is_the_chain_of_predictive_t_densities() -> None:
    """Each row given those before it has a multivariate t density; no determinant of all rows is needed."""
    data = measurements(20, 3, seed=1)
    nodes, mu, weight, total = 3, 1.0, 5.0, 0.0
    mean, matrix = np.zeros(nodes), (weight - nodes - 1) / 2 * np.eye(nodes)
    for row in data:
        freedom = weight - nodes + 1
        shape = matrix * (mu + 1) / (mu * freedom)
        away = row - mean
        total += math.lgamma(0.5 * (freedom + nodes)) - math.lgamma(0.5 * freedom)
        total -= 0.5 * (nodes * math.log(freedom * math.pi) + np.linalg.slogdet(shape)[1])
        total -= 0.5 * (freedom + nodes) * math.log1p(away @ np.linalg.solve(shape, away) / freedom)
        matrix = matrix + mu / (mu + 1) * np.outer(away, away)
        mean, mu, weight = (mu * mean + row) / (mu + 1), mu + 1, weight + 1
    assert BGeReward(data).log_score(complete(3))[0] == pytest.approx(total, rel=1e-12)


def equivalence_class(graph: Tensor) -> tuple[frozenset[object], frozenset[object]]:
    """Skeleton and v-structures: two graphs that share them are Markov equivalent (Verma & Pearl 1990)."""
    nodes, edges = len(graph), [tuple(edge) for edge in graph.nonzero().tolist()]
    skeleton = frozenset(frozenset(edge) for edge in edges)
    colliders = frozenset(
        (frozenset((a, b)), child)
        for child in range(nodes)
        for a, b in itertools.combinations(range(nodes), 2)
        if (a, child) in edges and (b, child) in edges and frozenset((a, b)) not in skeleton
    )
    return skeleton, colliders


def test_markov_equivalent_graphs_score_alike_and_no_others_do() -> None:
    graphs = dags(4)
    scores = BGeReward(measurements(50, 4)).log_score(graphs)
    classes: dict[object, list[float]] = {}
    for graph, score in zip(graphs, scores.tolist(), strict=True):
        classes.setdefault(equivalence_class(graph), []).append(score)
    assert len(classes) == 185  # Gillispie & Perlman 2001
    assert max(max(members) - min(members) for members in classes.values()) < 1e-9
    distinct = np.sort([members[0] for members in classes.values()])
    assert np.diff(distinct).min() > 1e-4


def test_a_score_does_not_depend_on_the_graphs_beside_it() -> None:
    reward, graphs = BGeReward(measurements(40, 5)), dags(5)[::37]
    together = reward.log_score(graphs)
    alone = [reward.log_score(graph[None])[0] for graph in graphs]
    shuffled = torch.randperm(len(graphs), generator=torch.Generator().manual_seed(0))
    np.testing.assert_array_equal(together, alone)
    np.testing.assert_array_equal(together[shuffled], reward.log_score(graphs[shuffled]))


def test_an_edge_costs_its_penalty_and_the_reference_has_reward_one() -> None:
    data, graphs = measurements(40, 3), dags(3)
    plain, sparse = BGeReward(data), BGeReward(data, edge_penalty=1.5)
    np.testing.assert_allclose(plain.log_score(graphs) - sparse.log_score(graphs), 1.5 * graphs.sum((1, 2)).numpy())
    condition = torch.empty(len(graphs), 0)
    assert float(sparse(torch.zeros(1, 3, 3), condition)[0]) == 0.0
    anchored = BGeReward(data, edge_penalty=1.5, reference=graphs[7])(graphs, condition)
    assert anchored.dtype == torch.float32
    assert float(anchored[7]) == 0.0
    np.testing.assert_allclose(
        anchored.exp() / anchored.exp().sum(),
        np.exp(sparse.log_score(graphs)) / np.exp(sparse.log_score(graphs)).sum(),
        rtol=1e-4,
    )


def test_many_rows_leave_log_rewards_exact_near_the_reference() -> None:
    data = measurements(200_000, 4)
    scores = BGeReward(data).log_score(dags(4))
    best = int(scores.argmax())
    rewards = BGeReward(data, reference=dags(4)[best])(dags(4), torch.empty(543, 0)).double().numpy()
    near = scores > scores[best] - 50
    assert abs(scores[best]) > 1e5
    np.testing.assert_allclose(rewards[near], (scores - scores[best])[near], atol=1e-4)


def test_climbing_ends_where_no_edge_helps_and_keeps_to_the_rules() -> None:
    data = measurements(100, 6)
    for max_parents in (None, 1):
        environment, reward = Dags(6, max_parents), BGeReward(data)
        state = environment.states(climb(environment, reward)[None])  # raises for a graph against the rules
        legal = environment.forward_mask(state)[0, :-1].nonzero()[:, 0]
        more = environment.objects(environment.step(state.expand(len(legal), -1), legal))
        here = reward.log_score(torch.as_tensor(environment.objects(state)))[0]
        assert here > reward.log_score(torch.zeros(1, 6, 6))[0]
        assert (reward.log_score(torch.as_tensor(more)) <= here).all()


def test_what_no_score_can_have_is_refused() -> None:
    data = measurements(10, 3)
    for build, message in (
        (lambda: BGeReward(data[:, 0]), "rows, nodes"),
        (lambda: BGeReward(np.full((3, 3), np.nan)), "finite"),
        (lambda: BGeReward(data, alpha_mu=0), "alpha_mu = 0"),
        (lambda: BGeReward(data, alpha_w=4), "above the number of nodes plus one, 4"),
        (lambda: BGeReward(data, edge_penalty=math.inf), "edge_penalty"),
    ):
        with pytest.raises(ValueError, match=message):
            build()
