"""Phylogeny: trees in proportion to parsimony or to their Bayesian posterior, from an alignment of DNA."""
