"""Phylogeny: trees in proportion to their parsimony or to their posterior, given aligned DNA."""
