"""Diffusion posteriors: objects in proportion to a diffusion prior times a likelihood or constraint."""
