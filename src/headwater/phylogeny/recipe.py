"""The recipe `phylogeny`: trees over the taxa of an alignment, in proportion to their posterior probability or to their
parsimony.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import cached_property, lru_cache
from pathlib import Path
from typing import ClassVar, Literal

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from headwater.conditions import Conditions, InverseTemperature, NoCondition
from headwater.environments.base import Objects
from headwater.environments.graph import TooManyStates
from headwater.evaluation import ExactDistribution
from headwater.objectives import Objective
from headwater.phylogeny.chains import ChainSettings, TreeChains
from headwater.phylogeny.data import Alignment, Patterns, primates, read_alignment
from headwater.phylogeny.evidence import Evidence, LikelihoodEvidence, ParsimonyEvidence
from headwater.phylogeny.guesses import Guess, climb, guess
from headwater.phylogeny.near_optimal import near_optimal
from headwater.phylogeny.network import ForestNetwork
from headwater.phylogeny.parameters import ParameterDensity
from headwater.phylogeny.policy import TreeBackward, TreePolicy
from headwater.phylogeny.posterior import (
    WeightedTrees,
    annotated,
    numbers_at_root,
    tables_from,
    trees_of,
    write_summaries,
)
from headwater.phylogeny.reward import ParsimonyReward, PosteriorReward
from headwater.phylogeny.settings import ModelSettings
from headwater.phylogeny.summaries import Comparison, compare, splits, topologies
from headwater.phylogeny.tree_files import TreeSample, parse_trees, read_trees
from headwater.phylogeny.trees import Trees
from headwater.policies import Policy
from headwater.recipes.base import ENUMERATION_LIMIT, Problem, Recipe
from headwater.report import Section
from headwater.reward import CachedReward, Reward, TemperedReward
from headwater.runs import Run, Samples
from headwater.search.explorer import Explorer
from headwater.training import ExplorationSettings, Training

_OBJECTIVES = ("tb", "vargrad", "db", "subtb")
_MOST_ENUMERATED = 7  # taxa: 17,557 forests
_NEAR, _MOST_NEAR = 4, 20_000  # changes from the optimum that are nearly optimal; trees that a search for them meets


@dataclass(frozen=True)
class PhylogenyRecipe(Recipe):
    """Phylogenetic trees from aligned DNA.

    The posterior over unrooted trees and branch lengths (the default), with its marginal likelihood: --alignment
    primates.nex. Or maximum parsimony at a range of temperatures: --parsimony. Without --alignment: 12 primates, 898
    sites of mitochondrial DNA (Hayasaka, Gojobori & Horai 1988).
    """

    summary: ClassVar[str] = "trees from aligned DNA: the Bayesian posterior or maximum parsimony (extra: phylogeny)"
    least_distance: ClassVar[float] = 2
    baseline_calls: ClassVar[int] = 2000

    alignment: Path | None = None
    """Aligned DNA: FASTA, PHYLIP or NEXUS."""
    parsimony: bool = False
    """Ask for few changes, exp((constant - changes) / T), in the place of the posterior."""
    gaps: Literal["missing", "state"] = "missing"
    """For parsimony: a gap says nothing, or is a fifth state. To a likelihood it says nothing."""
    constant: float | None = None
    """It only shifts log Z. Of parsimony, if not given, the length of the best tree of a short climb; of a posterior
    over a range of temperatures, a first guess at the log marginal likelihood."""
    inverse_temperatures: tuple[float, float] | None = None
    """Learn R^beta for every beta = 1 / T in this range with one sampler, and sample at the largest. For parsimony 0.25
    to 4 if not given."""
    model: ModelSettings = field(default_factory=ModelSettings)
    """The substitution model of every partition."""
    branch_rate: float = 10.0
    """Rate of the exponential prior of branch lengths: their prior mean is its inverse."""
    reference: Path | None = None
    """Trees to compare with, such as a MrBayes .t file, in the report and the evaluation."""
    reference_burn_in: float = 0.25
    """Share of the reference's trees, from the first, that is left out."""
    network: ForestNetwork = field(default_factory=ForestNetwork)
    """The network over the trees of a forest."""
    backward: TreeBackward = "uniform"
    """The backward policy."""
    chains: ChainSettings = field(default_factory=ChainSettings)
    """Local search from neighbour-joining trees, which the policy learns from besides its own draws."""
    objective: Objective = field(default_factory=lambda: Objective(penalty="huber"))
    """What to balance."""
    training: Training = field(
        default_factory=lambda: Training(
            iterations=2000, batch_size=64, learning_rate=2e-3, log_z_learning_rate=0.2, schedule="cosine"
        )
    )
    """How long and how fast to learn."""
    exploration: ExplorationSettings = field(default_factory=lambda: ExplorationSettings(epsilon=0.02))
    """How the search departs from the policy."""
    keep_objects: bool = False
    """Keep every object ever scored; trees with branch lengths hardly ever repeat."""

    def __post_init__(self) -> None:
        if self.objective.name not in _OBJECTIVES:
            raise ValueError(f"objective.name = {self.objective.name!r}: over trees, one of {', '.join(_OBJECTIVES)}")
        if self.objective.name == "vargrad" and self.temperatures is not None:
            raise ValueError(
                "objective.name = 'vargrad' compares trees of one temperature; over a range choose another"
            )
        search = self.exploration
        if search.local_search.rounds or search.thompson.heads or search.teacher.share:
            raise ValueError("exploration: over trees neither local_search, thompson nor teacher, but chains")
        if not 0 <= self.reference_burn_in < 1:
            raise ValueError(f"reference_burn_in = {self.reference_burn_in}: must be at least 0 and below 1")
        if self.keep_objects and not self.parsimony:
            raise ValueError(
                "keep_objects: trees with branch lengths are never the same, so it goes with parsimony only"
            )
        if self.gaps == "state" and not self.parsimony:
            raise ValueError("gaps = 'state' is for parsimony: the likelihood's four states know no gap")
        if not 0 < self.branch_rate < math.inf:
            raise ValueError(f"branch_rate = {self.branch_rate}: must be positive")
        if self.inverse_temperatures is not None:
            InverseTemperature(*self.inverse_temperatures)

        _ = self.evidence, self.reference_trees  # what is wrong with a file shows at once

    # The problem

    @cached_property
    def data(self) -> Alignment:
        return primates() if self.alignment is None else read_alignment(self.alignment)

    @cached_property
    def patterns(self) -> Patterns:
        return self.data.patterns(self.gaps)

    @cached_property
    def evidence(self) -> Evidence:
        found = self.patterns
        if self.parsimony:
            return ParsimonyEvidence(found.masks, found.weights, self._planes)
        parts = [(masks, weights, self.model.process(masks, weights)) for masks, weights in self._by_partition]
        return LikelihoodEvidence(parts, [self.model.free] * len(parts) if self.model.sampled else [])

    @cached_property
    def base_reward(self) -> ParsimonyReward | PosteriorReward:
        """At inverse temperature 1."""
        if isinstance(self.evidence, LikelihoodEvidence):
            # over a range of temperatures log Z is learned from zero on, so what is known of it is taken away
            known = self.guess.log_marginal if self.temperatures and self.constant is None else self.constant
            return PosteriorReward(self.evidence, self.branch_rate, known or 0.0)
        reward = ParsimonyReward(self.patterns.masks, self.patterns.weights, self._planes)
        reward.constant = float(reward.changes(climb(self.evidence))[0]) if self.constant is None else self.constant
        return reward

    @property
    def temperatures(self) -> tuple[float, float] | None:
        """The range of inverse temperatures that is learned."""
        if self.inverse_temperatures is None and self.parsimony:
            return (0.25, 4.0)
        return self.inverse_temperatures

    def problem(self) -> Problem:
        conditions: Conditions = NoCondition()
        reward: Reward = CachedReward(self.base_reward) if self.keep_objects else self.base_reward
        if self.temperatures is not None:
            conditions, reward = InverseTemperature(*self.temperatures), TemperedReward(reward)
        density = None
        if self.model.sampled and not self.parsimony:
            density = ParameterDensity(self.guess.coordinates, self.guess.factor)
        policy = TreePolicy(self.evidence, self.network, self.backward, conditions.size, density)
        if self.temperatures is None:
            with torch.no_grad():
                policy.log_z.fill_(self.guess.log_marginal)
        return Problem(policy, reward, conditions, self._explorer(reward, conditions))

    def _explorer(self, reward: Reward, conditions: Conditions) -> Callable[[Policy], Explorer] | None:
        if not self.chains.share:
            return None

        def explorer(student: Policy) -> Explorer:
            assert isinstance(student, TreePolicy)
            return TreeChains(student, reward, conditions, self.chains)

        return explorer

    def default_condition(self) -> Tensor | None:
        return None if self.temperatures is None else torch.tensor([[self.temperatures[1]]])

    def exact_distribution(self) -> ExactDistribution | None:
        if not self.parsimony or len(self.data.taxa) > _MOST_ENUMERATED:
            return None
        problem = self.problem()
        assert isinstance(problem.policy, TreePolicy)
        try:
            environment = problem.policy.environment
            return ExactDistribution(environment, problem.reward, self.default_condition(), ENUMERATION_LIMIT)
        except TooManyStates:
            return None

    @property
    def _by_partition(self) -> list[tuple[NDArray[np.uint8], NDArray[np.float64]]]:
        """Masks and weights of each."""
        found = self.patterns
        insides = [found.partition == index for index in range(len(self.data.partitions))]
        return [(np.ascontiguousarray(found.masks[:, inside]), found.weights[inside]) for inside in insides]

    @property
    def _planes(self) -> int:
        return 5 if self.gaps == "state" else 4

    @cached_property
    def guess(self) -> Guess:
        """Where the posterior's sampler starts."""
        assert isinstance(self.evidence, LikelihoodEvidence)
        starts = [self.model.start(masks, weights) for masks, weights in self._by_partition]
        return guess(self.evidence, self.branch_rate, torch.cat(starts) if self.model.sampled else torch.empty(0))

    # Its objects

    def text(self, objects: Objects) -> list[str]:
        """Newick, unrooted, equal trees as equal text; at its root sampled model parameters, [&kappa=4.1,...]."""
        values = torch.as_tensor(objects)
        newick = self._trees(values).newick()
        if not self.parameters:
            return newick
        return annotated(newick, self.parameters, self._numbers(values[:, -self.evidence.parameters :]))

    def distance(self, a: str, b: str) -> float:
        """Robinson and Foulds'."""
        return float(len(_splits(a, self.data.taxa) ^ _splits(b, self.data.taxa)))

    def columns(self, objects: Sequence[str]) -> dict[str, list[object]]:
        """Changes; or log-likelihood, the sum of all branch lengths, and sampled model parameters."""
        values = self._objects(self._parsed(objects))
        numbers = numbers_at_root(objects, self.parameters)
        if self.parameters:
            values = torch.cat([values, self._coordinates(numbers)], 1)
        if isinstance(self.base_reward, ParsimonyReward):
            return {"changes": self.base_reward.changes(values).tolist()}
        log_likelihood = self.base_reward.log_likelihood(values)
        n = len(self.data.taxa)
        lengths = values[:, 2 * (n - 1) : 2 * (n - 1) + 2 * n - 1].double().sum(1)
        return {
            "log_likelihood": log_likelihood.double().numpy().round(4).tolist(),
            "tree_length": lengths.numpy().round(6).tolist(),
            **{name: numbers[:, place].tolist() for place, name in enumerate(self.parameters)},
        }

    def measures(self, samples: Samples) -> dict[str, float]:
        """Marginal likelihood, diversity of topologies, near-optimal trees, agreement with the reference."""
        found = self.weighted(samples)
        table = topologies(found.trees, found.weights)
        name = "log_z" if self.temperatures else "log_marginal_likelihood"
        figures = {
            f"samples_{name}": found.log_z,
            f"samples_{name}_interval": found.interval,
            "samples_effective_size": found.effective,
            "distinct_topologies": len(table.trees),
            "topologies_for_95_percent": table.credible(),
            "most_probable_topology": float(table.probabilities[0]),
            "simpson_index": table.simpson,
        }
        if isinstance(self.base_reward, ParsimonyReward):
            tables = self._objects(table.trees)
            changes = self.base_reward.changes(tables)
            figures["fewest_changes"] = fewest = float(changes.min())
            best = tables[changes <= fewest + _NEAR]
            near = near_optimal(self.base_reward.sites.leaves, best, _NEAR, _MOST_NEAR)
            there = near.changes + self.base_reward.sites.constant
            for more in range(_NEAR + 1):
                figures[f"distinct_trees_within_{more}"] = float((changes <= fewest + more).sum())
                figures[f"trees_there_are_within_{more}"] = float((there <= fewest + more).sum())
            figures["trees_there_are_reached_beyond"] = float(near.beyond)
        if (comparison := self.comparison(found)) is not None:
            figures |= {
                "split_deviation": comparison.split_deviation,
                "largest_split_deviation": comparison.largest_deviation,
                "topology_total_variation": comparison.topology_distance,
                "split_correlation": comparison.split_correlation,
                "topology_correlation": comparison.topology_correlation,
                "reference_covered": comparison.covered,
            }
        return figures

    def weighted(self, samples: Samples) -> WeightedTrees:
        """The samples as weighted trees."""
        return WeightedTrees.of(self._parsed(samples.objects), samples)

    def comparison(self, found: WeightedTrees) -> Comparison | None:
        """With the reference, where there is one."""
        if self.reference_trees is None:
            return None
        return compare(found.trees, self.reference_trees.trees, found.weights, self.reference_trees.weights)

    def write_samples(self, run: Run, samples: Samples) -> list[Path]:
        """Tree files, consensus and tables: see `posterior.write_summaries`."""
        return write_summaries(run.folder, self.weighted(samples), *self.score(samples))

    def sections(self, run: Run, policy: Policy) -> list[Section]:
        """The consensus, the topologies, agreement with the reference, and what all that is good for."""
        from headwater.phylogeny import sections

        samples = run.samples()
        if samples is None:
            return []
        found = self.weighted(samples)
        what, name = ("log Z", "changes") if self.parsimony else ("log marginal likelihood", "log-likelihood")
        values = np.array(samples.extra["changes" if self.parsimony else "log_likelihood"], dtype=np.float64)
        parts = [sections.consensus_section(found, what), sections.topologies_section(found, values, name)]
        if (comparison := self.comparison(found)) is not None:
            assert self.reference is not None
            parts.append(sections.agreement_section(comparison, self.reference.name))
        if self.parameters:
            columns = np.array([samples.extra[name] for name in self.parameters], dtype=np.float64)
            parts.append(sections.parameters_section(self.parameters, columns.T, found.weights))
        return [*parts, sections.honesty_section(self.parsimony, self.chains.share)]

    def score(self, samples: Samples) -> tuple[NDArray[np.float64], str]:
        """What a person looks at, more being better: changes below zero, or the log posterior; and its name."""
        if self.parsimony:
            return -np.array(samples.extra["changes"], dtype=np.float64), "minus_changes"
        return samples.log_reward, "log_posterior"

    @cached_property
    def reference_trees(self) -> TreeSample | None:
        if self.reference is None:
            return None
        return read_trees(self.reference, self.data.taxa, self.reference_burn_in)

    def _trees(self, objects: Tensor) -> Trees:
        width = 2 * (len(self.data.taxa) - 1)
        above = None if self.parsimony else objects[:, width : 2 * width + 1]
        return trees_of(objects[:, :width].int(), above, self.data.taxa)

    @cached_property
    def parameters(self) -> list[str]:
        """Names of the sampled model parameters; of more than one partition, each with its partition's number."""
        if not isinstance(self.evidence, LikelihoodEvidence):
            return []
        free = self.evidence.free
        return [f"{name}.{k + 1}" if len(free) > 1 else name for k, of in enumerate(free) for name in of.names]

    def _numbers(self, coordinates: Tensor) -> NDArray[np.float64]:
        """Values of `parameters` at coordinates `[T, p]`."""
        free = self.model.free
        parts = torch.split(coordinates, free.size, dim=1)
        return torch.cat([free.numbers(part) for part in parts], 1).numpy()

    def _coordinates(self, numbers: NDArray[np.float64]) -> Tensor:
        free = self.model.free
        parts = torch.split(torch.from_numpy(numbers), len(free.names), dim=1)
        return torch.cat([free.coordinates_of(part) for part in parts], 1)

    def _objects(self, trees: Trees) -> Tensor:
        tables, above = tables_from(trees)
        return tables if above is None or self.parsimony else torch.cat([tables.float(), above], 1)

    def _parsed(self, objects: Sequence[str]) -> Trees:
        return parse_trees("\n".join(objects), self.data.taxa).trees


@lru_cache(maxsize=20_000)
def _splits(newick: str, taxa: tuple[str, ...]) -> frozenset[bytes]:
    found, _, _ = splits(parse_trees(newick, taxa).trees)
    return frozenset(row.tobytes() for row in found[0])
