"""Phylogenetics: trees in proportion to their posterior probability or their parsimony."""
