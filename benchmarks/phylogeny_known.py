"""What is known of the posteriors that `phylogeny_posterior.py` looks at: log marginal likelihoods under JC69, branch
lengths exponential of rate 10, all topologies alike, in nats; and the size of each alignment, to know it by.

Published: MrBayes' stepping stone, VBPI-GNN (Zhang 2023) and PhyloGFN with bins (Zhou et al. 2024, arXiv 2310.08774) as
in table 1 of PhyloGen (NeurIPS 2024); PhyloGFN's continuous lengths, 3.2e7 trajectories, as in the README of its public
repository at 6a46f86. Mean and standard deviation over runs.

By topology: log p(Y | topology) by importance sampling of its branch lengths, plus the log-prior of the topology, less
the logarithm of its posterior probability in ten published MrBayes runs of 10^7 generations (of the primates, in two of
our own of 300,000), for the most probable topologies. Exact: the same summed over all topologies. Estimate and standard
error, computed for this project outside it; the primates' stepping stone is of two runs of 102,000 generations.
"""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Known:
    """taxa, sites: of the alignment. values: by whose they are, estimate and spread."""

    taxa: int
    sites: int
    values: dict[str, tuple[float, float]]


_SOURCES = ("MrBayes, stepping stone", "VBPI-GNN", "PhyloGFN, bins", "PhyloGFN, continuous", "by topology")
_ROWS = {
    "DS1": (27, 1949, (-7108.42, 0.18), (-7108.41, 0.14), (-7108.95, 0.06), (-7108.4, 0.04), (-7108.40, 0.02)),
    "DS2": (29, 2520, (-26367.57, 0.48), (-26367.73, 0.07), (-26368.90, 0.28), (-26367.7, 0.04), (-26367.71, 0.004)),
    "DS3": (36, 1812, (-33735.44, 0.50), (-33735.12, 0.09), (-33735.60, 0.35), (-33735.1, 0.02), (-33735.09, 0.003)),
    "DS4": (41, 1137, (-13330.44, 0.54), (-13329.94, 0.19), (-13331.83, 0.19), (-13329.9, 0.09), (-13329.93, 0.02)),
    "DS5": (50, 378, (-8214.51, 0.28), (-8214.64, 0.38), (-8215.15, 0.20), (-8214.4, 0.16)),
    "DS6": (50, 1133, (-6724.07, 0.86), (-6724.37, 0.40), (-6730.68, 0.54), (-6724.2, 0.10)),
    "DS7": (59, 1824, (-37332.76, 2.42), (-37332.04, 0.12), (-37359.96, 1.14), (-37331.9, 0.14)),
    "DS8": (64, 1008, (-8649.88, 1.75), (-8650.65, 0.45), (-8654.76, 0.19), (-8650.5, 0.05)),
}

KNOWN = {
    name: Known(taxa, sites, dict(zip(_SOURCES, values, strict=False)))
    for name, (taxa, sites, *values) in _ROWS.items()
} | {
    "primates": Known(12, 898, {"MrBayes, stepping stone": (-6489.15, 0.65), "by topology": (-6489.12, 0.01)}),
    "DS5_n5_s120": Known(5, 120, {"exact": (-435.571, 0.002)}),
    "DS5_n6_s150": Known(6, 150, {"exact": (-594.260, 0.0035)}),
}

PARSIMONY = {
    "DS1": (4026, 1), "DS2": (6223, 1), "DS3": (6659, 2), "DS4": (2424, 4), "DS5": (1491, 2), "DS6": (879, 12),
    "DS7": (7150, None), "DS8": (1461, 21),
}  # fmt: skip
"""Fewest changes, a gap being a fifth state and ? any base, and how many trees were found to have so few: by PAUP*'s
heuristic search, whose tree files are in the supplement of PhyloGFN (Zhou et al. 2024); of DS7, by dnapars.
"""


def known(taxa: int, sites: int) -> tuple[str, dict[str, tuple[float, float]]]:
    """The data set of this size and its values; an empty name if it is none of them."""
    for name, each in KNOWN.items():
        if (each.taxa, each.sites) == (taxa, sites):
            return name, each.values
    return "", {}
