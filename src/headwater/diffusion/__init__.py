"""Diffusion posteriors: given a diffusion prior and a likelihood, learn to sample their product."""
