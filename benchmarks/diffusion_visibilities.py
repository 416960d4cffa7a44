"""A small image from the visibilities of a rotating array, as black holes are imaged: with a closed form where the
visibilities are complex numbers, and where only their amplitudes are known, so that an image and its point reflection
measure alike. Is a trained sampler right about the image, and about its own uncertainty?

    python benchmarks/diffusion_visibilities.py --seeds 3

Objects are the standardised coordinates z of 8 x 8 pixels, image = mean + matrix z, of which the prior's Gaussians have
unit variance; turned so that the array sees each by itself as well as it can. Writes results/diffusion-visibilities
.json, .md and .svg.
"""

from __future__ import annotations

import argparse
import math
import sys
from dataclasses import dataclass
from functools import cache, partial
from pathlib import Path

import torch
from torch import Tensor

from diffusion_learning import (
    MOST_RESAMPLED,
    RESULTS,
    Figures,
    Posterior,
    Recipe,
    climb_of,
    corrected,
    draws,
    estimates,
    keep,
    learn,
    number,
    resampled,
)
from diffusion_truth import Truth, by_modes
from headwater.diffusion.calibration import coverage
from headwater.diffusion.guidance import dps
from headwater.diffusion.latent import of_latents
from headwater.diffusion.likelihoods import GaussianLikelihood
from headwater.diffusion.measures import beside_floor, random_directions, sliced_wasserstein, total_variation
from headwater.diffusion.mixtures import GaussianMixture
from headwater.diffusion.operators import Matrix, Operator
from headwater.diffusion.process import GaussianProcess
from headwater.diffusion.transforms import Fourier
from headwater.objectives import Objective
from headwater.training import ExplorationSettings, Training

SIDE = 8
STATIONS, HOURS = 5, 10
NOISE = 2.5
"""Deviation of each part of a visibility, where the image adds up to about 32."""
DIRECTIONS = 8
STEPS = 30
DRAWS = 4000
SCALES = (0.03, 0.1, 0.3)
"""Step sizes of DPS that are tried."""
RECIPE = Recipe(
    objective=Objective("vargrad", penalty="huber"),
    training=Training(iterations=350, batch_size=128, learning_rate=1e-3, schedule="cosine"),
    exploration=ExplorationSettings(epsilon=0.0, average=0.98),
)


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


@cache
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


@cache
def truth_of(kind: str, seed: int) -> Truth:
    """In closed form of complex visibilities, else by importance sampling."""
    generator, seen, (posterior, _) = torch.Generator().manual_seed(seed), array(), problem(kind, seed)
    if kind == "complex":
        y = posterior.likelihood.y.flatten() - seen.visibilities @ seen.mean
        matrix = seen.visibilities @ seen.matrix
        exact = posterior.ends.posterior(matrix, y, NOISE)
        log_z = float(posterior.ends.log_evidence(matrix, y[None], NOISE)[0])
        return Truth(exact.sample(20_000, generator), log_z, 0.0, math.nan, math.nan)
    starts = torch.cat([posterior.ends.mean.float(), posterior.ends.sample(24, generator)])
    return by_modes(posterior.log_density, starts, 200_000, 20_000, seed, 1.05)


def look(posterior: Posterior, x: Tensor, truth: Truth, seed: int) -> Figures:
    """Draws `[N, 64]` of z beside those of the exact posterior: chi-squared of what was measured, modes, and coverage:
    of draws of the exact posterior in the place of truths, by balls around others of them that hold a share of
    64 draws each."""
    generator = torch.Generator().manual_seed(seed)
    directions = random_directions(100, x.shape[1], generator)

    def exact(count: int) -> Tensor:
        return truth.draws[torch.randperm(len(truth.draws), generator=generator)[:count]]

    def share(points: Tensor) -> Tensor:
        return posterior.ends.responsibilities(points).mean(0)

    def covered(points: Tensor) -> float:
        some = torch.randint(len(points), (2000, 64), generator=generator)
        found = coverage(exact(2000), points[some], exact(2000), generator)
        return float((found.coverage - found.level).abs().max())

    expected, own = share(truth.draws), share(x)
    sliced = beside_floor(lambda one, two: sliced_wasserstein(one, two, directions), x, exact, 3)
    half = torch.tensor([1, 0]).repeat_interleave(DIRECTIONS // 2)
    first = half[expected.argmax()]  # the half of the directions in which the best component is; its mirror is beyond
    return {
        "chi_squared": chi_squared(posterior, x),
        "chi_squared_exact": chi_squared(posterior, truth.draws),
        "coverage_off": covered(x),
        "coverage_off_floor": covered(truth.draws),
        "mass_off": abs(float(own[half == first].sum() - expected[half == first].sum())),
        "total_variation": total_variation(own, expected),
        "total_variation_floor": total_variation(share(exact(len(x))), expected),
        "sliced_wasserstein": sliced.value,
        "sliced_wasserstein_floor": sliced.floor,
    }


def chi_squared(posterior: Posterior, x: Tensor) -> float:
    """The mean over draws of the squared residual in units of the noise, per measured value."""
    likelihood = posterior.likelihood
    assert isinstance(likelihood, GaussianLikelihood)
    with torch.no_grad():
        return float((likelihood.residual(x, x.new_empty(len(x), 0)) / likelihood.sigma).square().mean())


def trained(kind: str, seed: int) -> Figures:
    (posterior, z), generator = problem(kind, seed), torch.Generator().manual_seed(seed)
    truth, learned = truth_of(kind, seed), learn(posterior, RECIPE, seed)
    drawn = draws(posterior, learned.denoiser, DRAWS, generator)
    found = estimates(posterior, learned.denoiser, drawn, truth.draws[:2000], generator)
    images, exact = (array().images(points) for points in (drawn.objects, truth.draws))
    return {
        "log_z_exact": truth.log_z,
        "log_z_exact_error": truth.log_z_error,
        "truth_effective_sample_size": truth.effective_sample_size,
        "truth_pareto_k": truth.pareto_k,
        **found.figures(),
        "log_z_away": found.log_z - truth.log_z,
        "seconds": learned.seconds,
        "reward_calls": learned.reward_calls,
        "gradient_calls": learned.gradient_calls,
        **look(posterior, drawn.objects, truth, seed),
        "corrected": look(posterior, corrected(drawn, generator), truth, seed),
        "pictures": {
            "truth": rounded(array().images(z)[0]),
            "samples": [rounded(image) for image in images[:4]],
            "mean": rounded(images.mean(0)),
            "deviation": rounded(images.std(0)),
            "exact mean": rounded(exact.mean(0)),
            "exact deviation": rounded(exact.std(0)),
        },
    }


def rounded(image: Tensor) -> list[float]:
    return [round(value, 2) for value in image.tolist()]


def guided(kind: str, seed: int) -> Figures:
    """DPS at the step size that comes nearest to the exact draws, of those tried."""
    posterior, _ = problem(kind, seed)
    truth, tried, best = truth_of(kind, seed), {}, {}
    for scale in SCALES:
        generator = torch.Generator().manual_seed(seed)
        rows = torch.empty(DRAWS // 2, 0)
        try:
            drawn = dps(posterior.process, posterior.prior(), posterior.likelihood, rows, generator, scale)
        except ValueError:  # diverged
            continue
        figures = look(posterior, drawn.objects, truth, seed)
        tried[str(scale)] = figures["sliced_wasserstein"]
        if not best or number(figures["sliced_wasserstein"]) < number(best["sliced_wasserstein"]):
            best = figures | {"scale": scale, "reward_calls": drawn.reward_calls}
    return best | {"sliced_wasserstein_by_scale": tried}


def weighed(kind: str, seed: int, calls: int) -> Figures:
    (posterior, _), generator = problem(kind, seed), torch.Generator().manual_seed(seed)
    truth = truth_of(kind, seed)
    x, found = resampled(posterior, calls, DRAWS, generator)
    away = {"log_z_away": found.log_z - truth.log_z, "reward_calls": min(calls, MOST_RESAMPLED)}
    return dict(found.figures()) | away | look(posterior, x, truth, seed)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("kinds", nargs="*", default=["complex", "amplitudes"], help="complex, amplitudes or both")
    parser.add_argument("--seeds", type=int, default=3, help="each has a measurement of its own")
    parser.add_argument("--output", type=Path, default=RESULTS / "diffusion-visibilities.json")
    asked = parser.parse_args()
    torch.set_num_threads(1)
    command = ["python benchmarks/diffusion_visibilities.py", *sys.argv[1:]]
    for seed in range(asked.seeds):
        for kind in asked.kinds:
            key = {"visibilities": kind, "seed": seed}
            ours = keep(asked.output, {"sampler": "trained"} | key, partial(trained, kind, seed), command)
            calls = int(number(ours["reward_calls"]) + number(ours["gradient_calls"]))
            keep(asked.output, {"sampler": "DPS"} | key, partial(guided, kind, seed), command)
            make = partial(weighed, kind, seed, calls)
            keep(asked.output, {"sampler": "resampling"} | key, make, command)


if __name__ == "__main__":
    main()
