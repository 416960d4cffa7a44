"""A small image from the visibilities of a rotating array, as black holes are imaged: with a closed form where the
visibilities are complex numbers, and where only their amplitudes are known, so that an image and its point reflection
measure alike. Is a trained sampler right about the image, and about its own uncertainty?

    python benchmarks/diffusion_visibilities.py --seeds 3

Objects are the standardised coordinates z of 8 x 8 pixels, image = mean + matrix z, of which the prior's Gaussians have
unit variance; turned so that the array sees each by itself as well as it can. Writes results/diffusion-visibilities
.json, .md and .svg.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import cache

import torch
from torch import Tensor

from diffusion_learning import (
    Posterior,
    Recipe,
    climb_of,
)  # fmt: skip
from diffusion_truth import Truth, by_modes
from headwater.diffusion.latent import of_latents
from headwater.diffusion.likelihoods import GaussianLikelihood
from headwater.diffusion.mixtures import GaussianMixture
from headwater.diffusion.operators import Matrix, Operator
from headwater.diffusion.process import GaussianProcess
from headwater.diffusion.transforms import Fourier
from headwater.objectives import Objective
from headwater.replay import ReplaySettings
from headwater.training import ExplorationSettings, Training

SIDE = 8
STATIONS, HOURS = 5, 10
NOISE = 2.5
"""Deviation of each part of a visibility, where the image adds up to about 32."""
DIRECTIONS = 8
STEPS = 20
DRAWS = 4000
RECIPE = Recipe(
    objective=Objective("vargrad", penalty="huber"),
    training=Training(
        iterations=800, batch_size=96, replayed=96, warm_up=0, replay_backward=True, learning_rate=1e-3,
        schedule="cosine",
    ),
    exploration=ExplorationSettings(epsilon=0.0, average=0.99),
    replay=ReplaySettings(rule="recent", capacity=20_000),
)  # fmt: skip


def baselines() -> Tensor:
    """(u, v) in cycles per image of every pair of stations at every hour: `[pairs x hours, 2]`. Stations are spread
    over a disc, so that the longest baseline has 4 cycles, the most that 8 pixels show; seen from a source 40 degrees
    above the equator, each baseline draws an arc of an ellipse while the Earth turns (Thompson, Moran & Swenson 2017,
    equation 4.1, with baselines in the plane of the equator)."""
    generator = torch.Generator().manual_seed(12)
    angle, radius = torch.rand(2, STATIONS, generator=generator)
    east, north = (radius.sqrt() * part for part in ((2 * math.pi * angle).cos(), (2 * math.pi * angle).sin()))
    first, second = torch.triu_indices(STATIONS, STATIONS, 1)
    x, y = east[second] - east[first], north[second] - north[first]
    hour = torch.linspace(-0.5, 0.5, HOURS)[:, None] * math.pi
    u = x * hour.sin() + y * hour.cos()
    v = math.sin(math.radians(40)) * (y * hour.sin() - x * hour.cos())
    points = torch.stack((u, v), 2).flatten(0, 1)
    return points / points.norm(dim=1).max() * SIDE / 2


@dataclass(frozen=True)
class Array:
    """mean: `[64]`, matrix: `[64, 64]`: image = mean + matrix z. visibilities: of images, `[2 P, 64]`, real parts and
    imaginary ones. prior: of z; component k is a crescent that is brightest in direction k of `DIRECTIONS`."""

    mean: Tensor
    matrix: Tensor
    visibilities: Tensor
    prior: GaussianMixture

    def images(self, z: Tensor) -> Tensor:
        """`[N, 64]` both."""
        return self.mean + z @ self.matrix.mT


@cache
def array() -> Array:
    """Crescents of eight directions, with weights 1 to 8, around which brightness varies smoothly."""
    axis = torch.arange(SIDE, dtype=torch.float64) - (SIDE - 1) / 2
    row, column = torch.meshgrid(axis, axis, indexing="ij")
    radius, angle = torch.hypot(row, column), torch.atan2(row, column)
    ring = (-0.5 * ((radius - 2.3) / 0.8).square()).exp()
    turns = torch.arange(DIRECTIONS) * 2 * math.pi / DIRECTIONS
    means = torch.stack([(1.2 * ring * (1 + 0.5 * (angle - turn).cos())).flatten() for turn in turns])
    place = torch.stack((row.flatten(), column.flatten()), 1)
    covariance = 0.4**2 * (-0.5 * (torch.cdist(place, place) / 1.5).square()).exp() + 0.05**2 * torch.eye(SIDE**2)
    operator = Fourier((1, SIDE, SIDE), baselines(), origin=((SIDE - 1) / 2, (SIDE - 1) / 2))
    visibilities = operator.matrix().double()
    spectrum, basis = torch.linalg.eigh(covariance)
    root = basis * spectrum.sqrt()
    _, _, turned = torch.linalg.svd(visibilities @ root, full_matrices=True)
    matrix, mean = root @ turned.mT, means.mean(0)
    weight = torch.arange(1.0, DIRECTIONS + 1).double()
    of_means = torch.linalg.solve(matrix, (means - mean).mT).mT
    prior = GaussianMixture((weight / weight.sum()).log(), of_means, torch.ones(1, SIDE**2, dtype=torch.float64))
    return Array(mean.float(), matrix.float(), visibilities.float(), prior)


class Amplitudes(Operator):
    """The absolute values of visibilities given as real parts above imaginary ones, `[N, 2 P]` to `[N, P]`."""

    is_linear = False

    def __init__(self, matrix: Tensor) -> None:
        super().__init__((matrix.shape[1],), (len(matrix) // 2,))
        self.visibilities = Matrix((matrix.shape[1],), matrix)

    def compute(self, x: Tensor) -> Tensor:
        real, imaginary = self.visibilities(x).chunk(2, 1)
        return (real.square() + imaginary.square() + 1e-6).sqrt()


def problem(kind: str, seed: int) -> tuple[Posterior, Tensor]:
    """The posterior of z, and the truth that was measured, `[1, 64]`."""
    seen, random = array(), torch.Generator().manual_seed(1000 + seed)
    process = GaussianProcess.of((SIDE**2,), STEPS, "cosine", "velocity", "learned", final_noise=0.05)
    operator = (Matrix if kind == "complex" else _amplitudes)((SIDE**2,), seen.visibilities)
    truth = seen.prior.noised(process.alphas[-1], process.sigmas[-1]).sample(1, random)
    y = GaussianLikelihood(operator, NOISE).draw(seen.images(truth), random)
    likelihood = of_latents(GaussianLikelihood(operator, NOISE, y), seen.images, (SIDE**2,))
    return Posterior(process, seen.prior, likelihood, climb_of(likelihood, seen.prior)), truth


def _amplitudes(shape: tuple[int, ...], matrix: Tensor) -> Operator:
    return Amplitudes(matrix)


def truth_of(kind: str, posterior: Posterior, seed: int) -> Truth:
    """In closed form of complex visibilities, else by importance sampling."""
    generator, seen = torch.Generator().manual_seed(seed), array()
    if kind == "complex":
        y = posterior.likelihood.y.flatten() - seen.visibilities @ seen.mean
        matrix = seen.visibilities @ seen.matrix
        exact = posterior.ends.posterior(matrix, y, NOISE)
        log_z = float(posterior.ends.log_evidence(matrix, y[None], NOISE)[0])
        return Truth(exact.sample(20_000, generator), log_z, 0.0, math.nan, math.nan)
    starts = torch.cat([posterior.ends.mean.float(), posterior.ends.sample(24, generator)])
    return by_modes(posterior.log_density, starts, 200_000, 20_000, seed, 1.05)
