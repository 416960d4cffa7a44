"""Discrete construction: the Environment contract, its checker, and the general-purpose environments."""

from headwater.environments.base import Dense, Environment, Native, Objects, Tokens

__all__ = ["Dense", "Environment", "Native", "Objects", "Tokens"]
