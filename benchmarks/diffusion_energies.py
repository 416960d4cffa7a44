"""Samplers that are given an energy alone, by relative trajectory balance: the prior is a chain whose ends are standard
normal exactly, and the reward the target's density over theirs, so that log Z is the energy's own.

    python benchmarks/diffusion_energies.py --seeds 1

Beside the table of Sendera et al. 2024 (arXiv 2402.05098, table 1) on the same three energies. Writes
results/diffusion-energies.json after every run, and .md; runs that are there already are not done again.
"""

from __future__ import annotations

import argparse
import json
import math
import sys
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from torch import Tensor

from diffusion_known import RESULTS, Figures
from diffusion_modes import Method, train
from headwater.diffusion.adapters import Adapter
from headwater.diffusion.chains import draw_chains, walk_back
from headwater.diffusion.estimators import log_z_estimates, resampling_estimates
from headwater.diffusion.measures import random_directions, sliced_wasserstein
from headwater.diffusion.mixtures import GaussianMixture, MixtureDenoiser
from headwater.diffusion.process import GaussianProcess
from headwater.diffusion.targets import Energy, Funnel, ManyWell, OverNormal, twenty_five
from headwater.environments.base import Objects
from headwater.objectives import Objective
from headwater.replay import ReplaySettings
from headwater.search import ExplorationSettings
from headwater.training import Training
from provenance import load, provenance

DRAWS = 2000
PUBLISHED = {
    "25 Gaussians": {"TB + exploration + local search": (0.171, 0.004), "PIS + Langevin": (1.799, 0.225)},
    "funnel": {"TB + exploration + local search": (0.653, 0.285), "PIS + Langevin": (0.587, 0.285)},
    "many wells": {"TB + exploration + local search": (4.57, 0.19), "PIS + Langevin": (13.19, 0.07)},
}
"""log Z less its lower bound, and the size of the reweighted estimate's error."""


class Gaussians:
    """25 Gaussians as an energy."""

    def __init__(self) -> None:
        self.mixture = twenty_five()

    dimensions = 2
    log_z = 0.0

    def __call__(self, objects: Objects, condition: Tensor) -> Tensor:
        return self.mixture.log_prob(torch.as_tensor(objects)).float()

    def sample(self, count: int, generator: torch.Generator) -> Tensor:
        return self.mixture.sample(count, generator)


@dataclass(frozen=True)
class Scaled:
    """A reward of objects that are points over `scale`."""

    reward: OverNormal

    @property
    def scale(self) -> float:
        return math.sqrt(self.reward.variance)

    def __call__(self, objects: Objects, condition: Tensor) -> Tensor:
        return self.reward(self.scale * torch.as_tensor(objects), condition)


def even_chain(dimensions: int, steps: int, most: float = 20.0, least: float = 0.02) -> GaussianProcess:
    """Variance-preserving, with sigma / alpha falling from `most` to `least` by one factor at every step: standard
    normal data stay so all along, however few steps there are."""
    ratios = [most * (least / most) ** (k / steps) for k in range(steps + 1)]
    alphas = tuple(1 / math.sqrt(1 + ratio**2) for ratio in ratios)
    sigmas = tuple(ratio * alpha for ratio, alpha in zip(ratios, alphas, strict=True))
    return GaussianProcess((dimensions,), alphas, sigmas, "noise", "learned")
