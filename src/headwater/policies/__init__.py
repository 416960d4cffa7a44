"""Policies: the contract, the generic policy for environments, networks and rollouts."""

from headwater.policies.base import NO_EXPLORATION, Exploration, LogProbs, Policy
from headwater.policies.box import BoxPolicy
from headwater.policies.environment_policy import EnvironmentPolicy, RelativePolicy
from headwater.policies.networks import Network

__all__ = [
    "NO_EXPLORATION",
    "BoxPolicy",
    "EnvironmentPolicy",
    "Exploration",
    "LogProbs",
    "Network",
    "Policy",
    "RelativePolicy",
]
