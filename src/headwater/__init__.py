"""Headwater: learn to draw many different good answers, in proportion to how good they are."""

__version__ = "0.1.0"
