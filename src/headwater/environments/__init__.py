"""Discrete construction: the Environment contract, its checker, and the general-purpose environments."""

from headwater.environments.base import Dense, Environment, Native, Objects, Tokens
from headwater.environments.bge import BGeReward
from headwater.environments.bits import BitReward, bit_sequences
from headwater.environments.checker import CheckReport, check_environment
from headwater.environments.dags import Dags
from headwater.environments.hypergrid import Hypergrid, HypergridReward
from headwater.environments.sequences import Sequences
from headwater.environments.sets import Sets
from headwater.environments.slots import Slots
from headwater.environments.watched import Fault

__all__ = [
    "BGeReward",
    "BitReward",
    "CheckReport",
    "Dags",
    "Dense",
    "Environment",
    "Fault",
    "Hypergrid",
    "HypergridReward",
    "Native",
    "Objects",
    "Sequences",
    "Sets",
    "Slots",
    "Tokens",
    "bit_sequences",
    "check_environment",
]
