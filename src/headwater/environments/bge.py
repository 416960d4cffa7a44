"""The BGe score: how well a Gaussian Bayesian network explains continuous data, its parameters integrated out.

Geiger & Heckerman 1994 and 2002, with the corrections of Kuipers, Moffa & Heckerman 2014 (arXiv 1402.6863): a
normal-Wishart prior with mean 0 and T = t I, t = alpha_mu (alpha_w - n - 1) / (alpha_mu + 1). The score is a sum over
nodes, each term a ratio of two multivariate-t normalisers, and equal for Markov-equivalent graphs.
"""

from __future__ import annotations

import math

import numpy as np
import torch
from numba import njit
from numpy.typing import ArrayLike, NDArray
from torch import Tensor

from headwater.environments.base import Objects
from headwater.environments.dags import Dags


class BGeReward:
    """log R(G) = log p(data | G) + log p(G), less the same of one `reference` graph.

    data: `[N, n]`, a row an observation. alpha_mu > 0 and alpha_w > n + 1 (n + 2 if not given): the weights of the
    prior's mean and of its covariance. edge_penalty: log p(G) is minus this for every edge; 0 for a uniform prior.
    reference: the adjacency matrix `[n, n]` whose log-reward is to be 0, the graph without edges if not given. The
    constant changes no posterior; with a good graph there, log-rewards are small numbers that single precision holds.
    Objects are adjacency matrices `[T, n, n]`.
    """

    def __init__(
        self,
        data: ArrayLike,
        alpha_mu: float = 1.0,
        alpha_w: float | None = None,
        edge_penalty: float = 0.0,
        reference: Tensor | None = None,
    ) -> None:
        values = np.asarray(data, dtype=np.float64)
        if values.ndim != 2 or not values.size or not np.isfinite(values).all():
            raise ValueError(f"data of shape {values.shape}: must be a table [rows, nodes] of finite numbers")
        rows, nodes = values.shape
        alpha_w = nodes + 2.0 if alpha_w is None else alpha_w
        if not 0 < alpha_mu < math.inf:
            raise ValueError(f"alpha_mu = {alpha_mu}: must be above 0")
        if not nodes + 1 < alpha_w < math.inf:
            raise ValueError(f"alpha_w = {alpha_w}: must be above the number of nodes plus one, {nodes + 1}")
        if not math.isfinite(edge_penalty):
            raise ValueError(f"edge_penalty = {edge_penalty}: must be a finite number")
        self.edge_penalty = edge_penalty
        mean = values.mean(0)
        scale = alpha_mu * (alpha_w - nodes - 1) / (alpha_mu + 1)
        scatter = (values - mean).T @ (values - mean)
        self._posterior = (
            scale * np.eye(nodes) + scatter + rows * alpha_mu / (rows + alpha_mu) * np.outer(mean, mean)
        )  # the matrix R of Kuipers et al.
        self._freedom = rows + alpha_w - nodes
        self._constants = _constants(rows, nodes, alpha_mu, alpha_w, scale)
        self._offset = 0.0
        self._offset = float(self.log_score(torch.zeros(1, nodes, nodes) if reference is None else reference[None])[0])

    def log_score(self, graphs: Tensor) -> NDArray[np.float64]:
        """log p(data | G) + log p(G), p(G) not normalised, of acyclic graphs `[T, n, n]`: float64 `[T]`."""
        edges = np.ascontiguousarray(graphs.cpu().numpy() > 0)
        return _scores(edges, self._posterior, self._constants - self.edge_penalty * np.arange(len(self._constants)),
                       self._freedom)  # fmt: skip

    def __call__(self, objects: Objects, condition: Tensor) -> Tensor:
        score = self.log_score(torch.as_tensor(objects)) - self._offset
        return torch.from_numpy(score).to(condition.device, torch.float32)


def climb(environment: Dags, reward: BGeReward) -> Tensor:
    """A good graph: from none on, the edge that raises the score most, until no edge does. int32 `[n, n]`."""
    state = environment.initial(1)
    best = reward.log_score(_matrices(environment, state))[0]
    while True:
        actions = environment.forward_mask(state)[0, : environment.exit_action].nonzero()[:, 0]
        graphs = environment.step(state.expand(len(actions), -1), actions)
        scores = reward.log_score(_matrices(environment, graphs))
        if scores.max(initial=best) <= best:
            return _matrices(environment, state)[0]
        best, state = scores.max(), graphs[scores.argmax()][None]


def _matrices(environment: Dags, states: Tensor) -> Tensor:
    return torch.as_tensor(environment.objects(states))


def _constants(rows: int, nodes: int, alpha_mu: float, alpha_w: float, scale: float) -> NDArray[np.float64]:
    """What a node's term holds besides determinants, by its number of parents: `[n]`."""
    freedom = alpha_w - nodes
    return np.array(
        [
            0.5 * math.log(alpha_mu / (rows + alpha_mu))
            - 0.5 * rows * math.log(math.pi)
            + math.lgamma(0.5 * (rows + freedom + parents + 1))
            - math.lgamma(0.5 * (freedom + parents + 1))
            + 0.5 * (freedom + 2 * parents + 1) * math.log(scale)
            for parents in range(nodes)
        ]
    )


@njit(nogil=True)
def _scores(graphs, posterior, constants, freedom):  # type: ignore[no-untyped-def]
    """The score of each graph. A node whose parents are those of the graph before keeps its term: along a trajectory,
    where a graph has one edge more than the last, one term is computed a step.
    """
    n = posterior.shape[0]
    terms = np.empty(n)
    scores = np.zeros(len(graphs))
    for g in range(len(graphs)):
        for node in range(n):
            same = g > 0
            for parent in range(n):
                same = same and graphs[g, parent, node] == graphs[g - 1, parent, node]
            if not same:
                terms[node] = _term(graphs[g], node, posterior, constants, freedom)
            scores[g] += terms[node]
    return scores


@njit(nogil=True)
def _term(graph, node, posterior, constants, freedom):  # type: ignore[no-untyped-def]
    """A node's term. With R_P the parents' block of the posterior matrix and v = det R_(P and node) / det R_P, the
    last squared pivot of Cholesky's factor, it is c_p - (log det R_P + (N + alpha_w - n + p + 1) log v) / 2.
    """
    family = np.empty(posterior.shape[0], np.int64)
    p = 0
    for parent in range(posterior.shape[0]):
        if graph[parent, node]:
            family[p] = parent
            p += 1
    family[p] = node
    factor = np.empty((p + 1, p + 1))
    log_determinant = 0.0
    for row in range(p + 1):
        for column in range(row + 1):
            value = posterior[family[row], family[column]]
            for k in range(column):
                value -= factor[row, k] * factor[column, k]
            if column < row:
                factor[row, column] = value / factor[column, column]
            elif row < p:
                factor[row, row] = math.sqrt(value)
                log_determinant += math.log(value)
            else:
                return constants[p] - 0.5 * (log_determinant + (freedom + p + 1) * math.log(value))
    return 0.0
