"""The recipe `dags`: Bayesian network structure learning, the posterior over directed acyclic graphs given a table of
measurements (Deleu et al. 2022, arXiv 2202.13903), up to five variables beside the exact posterior.
"""

from __future__ import annotations

import csv
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path
from typing import ClassVar

import numpy as np
import torch
from numpy.typing import ArrayLike, NDArray
from torch import Tensor

from headwater import evaluation
from headwater.environments.base import Objects
from headwater.environments.bge import BGeReward, climb
from headwater.environments.dags import MOST_NODES, Dags, graph_text, structural_hamming_distance, text_graphs
from headwater.evaluation import ExactDistribution
from headwater.policies import Policy
from headwater.policies.environment_policy import Backward
from headwater.recipes.base import EnvironmentRecipe
from headwater.recipes.dags_data import FEWEST_ROWS, Dataset, linear_gaussian_network, read_table
from headwater.replay import ReplaySettings
from headwater.report import Findings, Section, Term
from headwater.reward import Reward
from headwater.runs import Run, Samples, atomic
from headwater.training import ExplorationSettings, Training

_MOST_ENUMERATED = 6
"""Nodes beyond which there are too many graphs even with one parent each."""

_TERMS = {
    "expected_edges": Term("Edges expected", "Mean number of edges of the sampled graphs."),
    "expected_distance_to_truth": Term(
        "Distance to the true graph", "Mean structural Hamming distance of the sampled graphs to it."
    ),
    "edge_area_under_curve": Term(
        "Area under the curve, edges",
        "Probability that an edge of the true graph has a higher marginal than one that is not; 0.5 is chance.",
    ),
    "edge_marginal_correlation": Term(
        "Correlation of edge marginals", "Of the samples' with the exact posterior's; 1 is perfect."
    ),
}


@dataclass(frozen=True)
class DagsRecipe(EnvironmentRecipe):
    """Give a table of numbers (--data cells.csv), a column a variable, a row an observation. Without one, the data are
    drawn from a random network, whose true graph the report compares with.

    log R is the graph's log posterior probability, up to a constant: it is 0 for the graph that a greedy search finds.
    """

    summary: ClassVar[str] = "Bayesian networks: which directed acyclic graphs explain your table of measurements (CSV)"
    caches_reward: ClassVar[bool] = False

    data: Path | None = None
    """CSV file with a header of names and numbers below."""
    nodes: int = 5
    """Variables of the random network, where no data are given."""
    rows: int = 100
    """Observations drawn from the random network."""
    data_seed: int = 1
    """Seed of the random network and of its data."""
    standardize: bool = True
    """Give every variable mean 0 and standard deviation 1 first: the score's prior expects values of that size."""
    max_parents: int | None = None
    """Most parents of a variable; any number if not given."""
    edge_penalty: float = 0.0
    """Subtracted from log R for every edge: the prior's dislike of edges."""
    alpha_mu: float = 1.0
    """Weight of the prior on the mean, in observations."""
    alpha_w: float | None = None
    """Weight of the prior on the covariance, in observations; the number of variables plus 2 if not given."""
    backward: Backward = "learned"
    """The backward policy."""
    training: Training = field(
        default_factory=lambda: Training(
            iterations=5000, batch_size=32, replayed=32, replay_backward=True, learning_rate=5e-3
        )
    )
    """How long and how fast to learn."""
    exploration: ExplorationSettings = field(default_factory=lambda: ExplorationSettings(epsilon=0.3, decay=0.7))
    """How the search departs from the policy."""
    replay: ReplaySettings = field(default_factory=lambda: ReplaySettings(rule="softmax"))
    """What is remembered: by the softmax of log-rewards, a draw is one from the posterior over the graphs met."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if not 2 <= self.nodes <= MOST_NODES:
            raise ValueError(f"nodes = {self.nodes}: must be 2 to {MOST_NODES}")
        if self.rows < FEWEST_ROWS:
            raise ValueError(f"rows = {self.rows}: must be at least {FEWEST_ROWS}")
        self.base_reward()

    @cached_property
    def dataset(self) -> Dataset:
        """The data as the score sees them."""
        data = linear_gaussian_network(self.nodes, self.rows, self.data_seed)
        if self.data is not None:
            data = read_table(self.data)
        return data.standardized() if self.standardize else data

    def environment(self) -> Dags:
        return Dags(self.dataset.names, self.max_parents)

    def base_reward(self) -> Reward:
        return self._score

    @cached_property
    def _score(self) -> BGeReward:
        settings = (self.dataset.values, self.alpha_mu, self.alpha_w, self.edge_penalty)
        return BGeReward(*settings, reference=climb(self.environment(), BGeReward(*settings)))

    def exact_distribution(self) -> ExactDistribution | None:
        return None if len(self.dataset.names) > _MOST_ENUMERATED else super().exact_distribution()

    def objects(self, lines: Sequence[str]) -> Objects:
        return text_graphs(lines, self.dataset.names)

    def text(self, objects: Objects) -> list[str]:
        return graph_text(torch.as_tensor(objects), self.dataset.names)

    def distance(self, a: str, b: str) -> float:
        return structural_hamming_distance(a, b)

    def columns(self, objects: Sequence[str]) -> dict[str, list[object]]:
        """Each graph's number of edges, its log posterior probability before normalisation, and how far it is from the
        true graph, where that is known."""
        graphs = text_graphs(objects, self.dataset.names)
        columns: dict[str, list[object]] = {
            "edges": graphs.sum((1, 2)).tolist(),
            "log_score": self._score.log_score(graphs).round(3).tolist(),
        }
        if (truth := self._true_graph) is not None:
            columns["distance_to_truth"] = [structural_hamming_distance(line, truth) for line in objects]
        return columns

    def measures(self, samples: Samples) -> dict[str, float]:
        """How the samples' edges agree with the exact posterior, and with the true graph, where there is one."""
        marginals = self._marginals(samples)
        figures = {"expected_edges": float(marginals.sum())}
        if (truth := self._true_graph) is not None:
            distances = [structural_hamming_distance(line, truth) for line in samples.objects]
            figures["expected_distance_to_truth"] = float(np.mean(distances))
            is_true = _off_diagonal(self._truth) > 0
            figures["edge_area_under_curve"] = area_under_curve(_off_diagonal(marginals), is_true)
        if (exact := self.exact_distribution()) is not None:
            target = edge_marginals(exact.states, exact.probabilities)
            agreement = evaluation.correlation(_off_diagonal(target), _off_diagonal(marginals))
            figures["edge_marginal_correlation"] = agreement["pearson"]
        return figures

    def findings(self, figures: Mapping[str, object]) -> Findings:
        return replace(super().findings(figures), terms=_TERMS)

    def write_samples(self, run: Run, samples: Samples) -> list[Path]:
        """edge_marginals.csv: how probable each edge is, by the samples and exactly where that can be had."""
        columns: dict[str, NDArray[np.float64]] = {"probability": self._marginals(samples)}
        if (exact := self.exact_distribution()) is not None:
            columns["exact"] = edge_marginals(exact.states, exact.probabilities)
        if self.dataset.truth is not None:
            columns["in_true_graph"] = self._truth.astype(int)
        names, path = self.dataset.names, run.folder / "edge_marginals.csv"
        with atomic(path) as partial, partial.open("w", newline="", encoding="utf-8") as file:
            writer = csv.writer(file)
            writer.writerow(["from", "to", *columns])
            for i, parent in enumerate(names):
                for j, child in enumerate(names):
                    if i != j:
                        writer.writerow([parent, child, *(f"{column[i, j]:.6g}" for column in columns.values())])
        return [path]

    def sections(self, run: Run, policy: Policy) -> list[Section]:
        """How probable each edge is, as a network and as a matrix, beside the exact posterior where there is one."""
        from headwater.recipes.dags_figures import edges_section

        samples, exact = run.samples(), self.exact_distribution()
        target = None
        if exact is not None:
            learned = edge_marginals(exact.states, exact.log_probs(policy).exp())
            target = edge_marginals(exact.states, exact.probabilities)
        elif samples is not None:
            learned = self._marginals(samples)
        else:
            return []
        truth = None if self.dataset.truth is None else self._truth
        return [edges_section(self.dataset.names, learned, target, truth)]

    @property
    def _truth(self) -> NDArray[np.bool_]:
        assert self.dataset.truth is not None
        return self.dataset.truth.numpy() > 0

    @property
    def _true_graph(self) -> str | None:
        truth = self.dataset.truth
        return None if truth is None else graph_text(truth[None], self.dataset.names)[0]

    def _marginals(self, samples: Samples) -> NDArray[np.float64]:
        graphs = text_graphs(samples.objects, self.dataset.names)
        return edge_marginals(graphs.flatten(1), torch.full((len(graphs),), 1 / len(graphs), dtype=torch.float64))


def edge_marginals(states: Tensor, probabilities: Tensor) -> NDArray[np.float64]:
    """The probability of every edge i -> j under a distribution over graphs, given as states `[N, n * n]`: `[n, n]`."""
    nodes = round(states.shape[1] ** 0.5)
    return (probabilities @ states.double()).view(nodes, nodes).numpy()


def area_under_curve(score: NDArray[np.float64], positive: NDArray[np.bool_]) -> float:
    """The probability that a positive scores above a negative, ties counting half; NaN without both kinds. Both
    `[N]`."""
    above = score[positive][:, None] - score[~positive][None]
    return float(np.where(above == 0, 0.5, above > 0).mean()) if above.size else float("nan")


def _off_diagonal(matrix: ArrayLike) -> NDArray[np.float64]:
    values = np.asarray(matrix, dtype=np.float64)
    return values[~np.eye(len(values), dtype=bool)]
