"""The phylogeny sections of a report: the consensus, topologies, tree space, scores, agreement with another sample."""

from __future__ import annotations

from html import escape

import numpy as np
from numpy.typing import NDArray

from headwater.phylogeny.figures import (
    consensus_figure,
    histogram_figure,
    split_scatter,
    topologies_figure,
    tree_space_figure,
)
from headwater.phylogeny.posterior import WeightedTrees
from headwater.phylogeny.summaries import Comparison, consensus, topologies
from headwater.report import Section
from headwater.report.numbers import number

_LISTED = 10

Floats = NDArray[np.float64]


def consensus_section(found: WeightedTrees, what: str) -> Section:
    """The majority-rule consensus, and the normalising constant `what` (such as "log marginal likelihood")."""
    words = (
        f"<p>The majority-rule consensus of {len(found.trees):,} independent draws, each weighted by what is left "
        f"between sampler and target: an effective {found.effective:.0%} of them. There is no burn-in and no "
        f"autocorrelation. The {what}, from the same weights, is <b>{found.log_z:,.3f} ± {found.interval:.3f}</b>.</p>"
    )
    figure = consensus_figure(consensus(found.trees, found.weights))
    return Section("Consensus tree", f'{words}<figure class="wide">{figure}</figure>')


def topologies_section(found: WeightedTrees, score: Floats, score_name: str) -> Section:
    """The most probable topologies, a map of all, and how the score is spread."""
    table = topologies(found.trees, found.weights)
    best = np.full(len(table.trees), -np.inf)
    np.maximum.at(best, table.index, score)
    rows = "".join(
        f"<tr><td>{k + 1}</td><td>{table.probabilities[k]:.4f}</td><td>{table.cumulative[k]:.4f}</td>"
        f"<td>{best[k]:,.2f}</td></tr>"
        for k in range(min(_LISTED, len(table.trees)))
    )
    words = (
        f"<p>{len(table.trees):,} distinct topologies were drawn; {table.credible():,} hold 95% of the probability. "
        f"Two draws differ in topology with probability {table.simpson:.3f} (Simpson's index).</p>"
        f"<table><thead><tr><th></th><th>probability</th><th>cumulative</th><th>best {escape(score_name)}</th></tr>"
        f"</thead><tbody>{rows}</tbody></table>"
    )
    map_ = tree_space_figure(found.trees, score, value_label=score_name, weights=found.weights)
    spread = histogram_figure(
        {"draws": score},
        x_label=score_name,
        title=f"{score_name.capitalize()} of the draws",
        weights={"draws": found.weights},
    )
    html = f'{words}<figure class="wide">{topologies_figure(table)}</figure><div class="figures">'
    small = "".join(f'<figure class="half">{figure}</figure>' for figure in (map_, spread))
    return Section("Topologies", f"{html}{small}</div>")


def agreement_section(comparison: Comparison, reference: str) -> Section:
    """How far the sample is from the reference's."""
    words = (
        f"<p>Against {escape(reference)}: average standard deviation of split frequencies "
        f"<b>{comparison.split_deviation:.4f}</b> (largest {comparison.largest_deviation:.4f}; over splits of 0.1 or "
        f"more in either, as MrBayes computes it), total variation between topologies "
        f"{comparison.topology_distance:.4f}, correlation of split "
        f"frequencies {comparison.split_correlation:.4f} and of topology probabilities "
        f"{comparison.topology_correlation:.4f}. Of the reference's probability, {comparison.covered:.1%} is on "
        "topologies that were drawn here.</p>"
    )
    figure = f'<figure class="half">{split_scatter(comparison.splits)}</figure>'
    return Section("Agreement with the reference", words + figure)


def parameters_section(names: list[str], values: Floats, weights: Floats) -> Section:
    """Posterior mean and 95 % interval of sampled model parameters: values `[T, names]`, weights `[T]` of sum 1."""
    order = np.argsort(values, axis=0)
    ordered, cumulative = np.take_along_axis(values, order, 0), weights[order].cumsum(0)
    low, high = (
        np.take_along_axis(ordered, (cumulative < share * cumulative[-1]).sum(0)[None], 0)[0]
        for share in (0.025, 0.975)
    )
    rows = "".join(
        f"<tr><td>{escape(name)}</td><td>{number(mean)}</td><td>{number(a)} to {number(b)}</td></tr>"
        for name, mean, a, b in zip(names, weights @ values, low, high, strict=True)
    )
    return Section(
        "Model parameters",
        f"<p>Sampled with the tree, of each partition by itself.</p><table><thead><tr><th></th><th>posterior mean</th>"
        f"<th>95 % interval</th></tr></thead><tbody>{rows}</tbody></table>",
    )


def honesty_section(parsimony: bool, chains: float) -> Section:
    """What these figures are good for, and what not."""
    started = (
        f"{chains:.0%} of the trees that it learned from came from Markov chains of local moves, started at "
        "neighbour-joining trees of resampled sites; the balance that it learned weighs them by the target itself."
        if chains
        else "It learned from its own draws alone."
    )
    whole = (
        "A near-optimal tree that no draw shows may exist: trees_there_are in evaluation.json counts those that "
        "prunings and regraftings lead to from the best draws."
        if parsimony
        else "A region of tree space that neither the sampler nor the chains have met is missing from the weights too, "
        "so the marginal likelihood is then too low, and its interval does not show that. A posterior with modes far "
        "apart deserves a second run with another seed."
    )
    return Section(
        "What this is good for",
        f"<p>The draws are independent, the density of every tree is known, and the normalising constant comes with "
        f"them. The price: one training for each alignment, where a Markov chain would have run for minutes. {started} "
        f"{whole}</p>",
    )
