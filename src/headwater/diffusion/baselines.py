"""Samplers without training by name, at so many reward calls: what a trained posterior is compared with."""

from __future__ import annotations

from typing import Literal, get_args

import torch
from torch import Tensor

from headwater.diffusion.guidance import (
    Draws,
    dps,
    importance_resampling,
    lgd_mc,
    prior_draws,
    pseudo_inverse_guidance,
    twisted_smc,
)
from headwater.diffusion.likelihoods import Likelihood
from headwater.diffusion.priors import Prior
from headwater.diffusion.process import GaussianProcess
from headwater.reward_worker import RewardError

Baseline = Literal["resampling", "twisted-smc", "dps", "lgd-mc", "pseudo-inverse"]
LARGEST = 50_000
"""Most reward calls that a baseline is given."""
_MEASURED = 500
"""Draws of the prior that its deviation is measured on."""
_PARTICLES = 10
_FLATTER = 2.0
"""Times the prior's deviation, for the twist: one that is too sure of itself leaves the weights to few particles."""


def require_baselines(names: tuple[str, ...]) -> None:
    """Raise ValueError for a name that is none."""
    for name in names:
        if name not in get_args(Baseline):
            raise ValueError(f"baselines: {name!r}: must be one of {', '.join(get_args(Baseline))}")


def draw_by(
    name: str, prior: Prior, likelihood: Likelihood, condition: Tensor, calls: int, generator: torch.Generator
) -> Draws:
    """Draws under one condition row `[1, C]`, of as many particles or objects as so many reward calls allow.

    Raises ValueError where the sampler cannot be used here, and says why: no gradient, another chain than a Gaussian
    one, a chain that diverges, or r(x) = 0 for every particle.
    """
    process, denoiser = prior.process, prior.denoiser
    try:
        if name == "resampling":
            return importance_resampling(process, denoiser, likelihood, condition.expand(calls, -1), generator)
        if not isinstance(process, GaussianProcess):
            raise TypeError(f"it follows gradients along a Gaussian chain, this one is a {type(process).__name__}")
        some = prior_draws(process, denoiser, condition.expand(_MEASURED, -1), generator)
        deviation = float(some.std(0).square().mean().sqrt())
        each = process.n_steps * (_PARTICLES if name == "lgd-mc" else 1) + 1
        rows = condition.expand(max(1, calls // each), -1)
        given = (process, denoiser, likelihood, rows, generator)
        if name == "twisted-smc":
            return twisted_smc(*given, deviation=_FLATTER * deviation)
        if name == "dps":
            return dps(*given)
        if name == "lgd-mc":
            return lgd_mc(*given, particles=_PARTICLES, deviation=deviation)
        return pseudo_inverse_guidance(*given, deviation=deviation)
    except (TypeError, RewardError) as error:
        raise ValueError(str(error)) from error
