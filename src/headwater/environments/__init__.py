"""Discrete construction: the Environment contract, its checker, and the general-purpose environments."""

from headwater.environments.base import Dense, Environment, Native, Objects, Tokens
from headwater.environments.bits import BitReward, bit_sequences
from headwater.environments.hypergrid import Hypergrid, HypergridReward
from headwater.environments.sequences import Sequences
from headwater.environments.sets import Sets
from headwater.environments.slots import Slots

__all__ = [
    "BitReward",
    "Dense",
    "Environment",
    "Hypergrid",
    "HypergridReward",
    "Native",
    "Objects",
    "Sequences",
    "Sets",
    "Slots",
    "Tokens",
    "bit_sequences",
]
