"""What the figures of a run mean, in plain words: labels and explanations that the report prints beside the numbers. A
domain brings the terms of its own (`Recipe.findings`).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass


@dataclass(frozen=True)
class Term:
    """How a figure is called in the report, and what it tells, in one line."""

    label: str
    meaning: str = ""


EVALUATION: dict[str, Term] = {
    "total_variation": Term(
        "Total variation (exact)",
        "Largest difference in the probability of any set of objects from the target; 0 is perfect, 1 disjoint.",
    ),
    "jensen_shannon": Term(
        "Jensen–Shannon divergence",
        "How well one can tell a draw of the sampler from a draw of the target, in nats; 0 is perfect, 0.693 the most.",
    ),
    "log_z": Term("log Z", "Logarithm of the sum of all rewards, as the sampler has learnt it."),
    "log_z_exact": Term("log Z, exact", "Logarithm of the sum of all rewards, computed exactly."),
    "log_z_estimate": Term("log Z, estimated", "Logarithm of the sum of all rewards, estimated from the sampler."),
    "log_z_gap": Term("log Z gap", "Estimated minus exact log Z; 0 is perfect."),
    "elbo": Term("ELBO", "A lower bound on log Z, from the sampler's draws; tight when the sampler is perfect."),
    "log_z_interval": Term("Its interval", "Half the width of the 95 % interval of the estimated log Z."),
    "eubo": Term(
        "EUBO",
        "An upper bound on log Z: from exact draws of the target where they can be had, else from the "
        "sampler's draws reweighted, which cannot show a mode that it misses.",
    ),
    "effective_sample_size": Term(
        "Effective sample size",
        "Share of importance-weighted trajectories that carries the weight; 1 is perfect, near 0 a few dominate.",
    ),
    "pearson": Term("Pearson correlation", "Of log-reward with log-probability, over distinct draws; 1 is perfect."),
    "spearman": Term("Spearman correlation", "The same of their ranks: are better objects likelier? 1 is perfect."),
    "pearson_with_random_objects": Term(
        "Pearson, random objects too", "The same with as many uniformly random objects beside the sampler's draws."
    ),
    "spearman_with_random_objects": Term("Spearman, random objects too", "The same of their ranks."),
    "modes": Term("Modes found", "Distinct regions of high reward that the samples reach."),
    "modes_total": Term("Modes in all", "Distinct regions of high reward that there are."),
    "samples": Term("Samples", "Objects drawn, repeats included."),
    "distinct_samples": Term("Distinct samples", "Different objects among them."),
    "empirical_total_variation": Term(
        "Total variation (empirical)",
        "The same distance measured on a finite number of draws; to be read against its floor, never against 0.",
    ),
    "empirical_total_variation_floor": Term(
        "Its sampling floor", "What a perfect sampler would score on average with as many draws."
    ),
    "mean_log_reward": Term("Mean log-reward", "Mean logarithm of the reward of the samples."),
    "top_100_mean_reward": Term("Mean reward of the top 100", "Over the 100 best distinct samples."),
    "top_100_mean_log_reward": Term("Mean log-reward of the top 100", "Over the 100 best distinct samples."),
    "top_100_diversity": Term("Diversity of the top 100", "Mean distance between pairs of them."),
    "baseline_top_100_mean_reward": Term(
        "Mean reward, random search", "Over the 100 best distinct objects of random search."
    ),
    "baseline_top_100_mean_log_reward": Term(
        "Mean log-reward, random search", "Over the 100 best distinct objects of random search."
    ),
    "baseline_calls": Term("Reward calls of random search", "How many random objects the baseline scored."),
}

METRICS: dict[str, Term] = {
    "loss": Term("Loss", "The objective, on the batches learnt from (log scale)."),
    "log_z": Term("log Z", "The learnt logarithm of the sum of all rewards."),
    "mean_log_reward": Term("Mean log-reward", "Of the trajectories as they were drawn."),
    "mean_reward": Term("Mean reward", "Of the trajectories as they were drawn, before it is divided by beta."),
    "mean_length": Term("Mean length", "Steps of the trajectories as they were drawn."),
    "gradient_norm": Term("Gradient norm", "Before clipping (log scale)."),
}


def evaluation_term(name: str, terms: Mapping[str, Term]) -> Term:
    """The term of a key of evaluation.json, one of a domain's `terms` or else the glossary's; an unknown key is called
    what it is called."""
    return terms.get(name) or EVALUATION.get(name) or Term(name.replace("_", " ").capitalize())
