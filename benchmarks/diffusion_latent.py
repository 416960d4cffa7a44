"""Posteriors in a latent space, p(z | y) in proportion to p(z) p(y | decode(z)), where the truth is known: what latent
DPS makes of them at its best step size, and what a sampler makes that is trained by relative trajectory balance.

    python benchmarks/diffusion_latent.py --seeds 3

linear: a random linear decoder from 4 numbers to 16, with a closed form. digits: an autoencoder with 2 latents of the
8 x 8 digits, and the density of the digits' latents as the prior; the truth is a sum over a grid. Writes
results/diffusion-latent.json and .md.
"""

from __future__ import annotations

import argparse
import math
import sys
from collections.abc import Callable
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
from headwater.diffusion.digits import SHAPE, load_digits
from headwater.diffusion.guidance import dps
from headwater.diffusion.latent import Autoencoder, of_latents
from headwater.diffusion.latent_fitting import fit_autoencoder
from headwater.diffusion.likelihoods import GaussianLikelihood
from headwater.diffusion.measures import beside_floor, random_directions, sliced_wasserstein, total_variation
from headwater.diffusion.mixtures import GaussianMixture
from headwater.diffusion.operators import Downsample, Mask, box_mask
from headwater.diffusion.process import GaussianProcess
from headwater.objectives import Objective
from headwater.replay import ReplaySettings
from headwater.training import ExplorationSettings, Training

STEPS = 20
WIDTH = 0.25
"""Deviation of the linear problem's components."""
DRAWS = 10_000
SCALES = (0.1, 0.3, 0.6, 1.0, 3.0)
SIDE, CELLS = 4.5, 24
"""Of the square of latents, half, and how many cells a side total variation is over."""
RECIPE = Recipe(
    objective=Objective("tb", penalty="huber"),
    training=Training(
        iterations=600, batch_size=64, replayed=64, warm_up=4096, replay_backward=True, learning_rate=2e-3,
        log_z_learning_rate=0.5, schedule="cosine",
    ),
    exploration=ExplorationSettings(epsilon=0.0, average=0.99),
    replay=ReplaySettings(rule="softmax", capacity=20_000),
)  # fmt: skip


@dataclass(frozen=True)
class Known:
    """A posterior of latents and its truth. probability: of parts of the space, `[K]`. shares: of points `[N, d]` in
    these parts. exact: so many exact draws."""

    posterior: Posterior
    log_z: float
    probability: Tensor
    shares: Callable[[Tensor], Tensor]
    exact: Callable[[int, torch.Generator], Tensor]


def chain(dimensions: int) -> GaussianProcess:
    return GaussianProcess.of((dimensions,), STEPS, "cosine", "velocity", "learned", final_noise=0.05)


def shared_mixture(weight: Tensor, mean: Tensor, width: float) -> GaussianMixture:
    log_weight = weight.double().log()
    variance = torch.full((1, mean.shape[1]), width**2, dtype=torch.float64)
    return GaussianMixture(log_weight - log_weight.logsumexp(0), mean.double(), variance)


@cache
def linear(seed: int) -> Known:
    """20 Gaussians in 4 dimensions, of 16 pixels that depend linearly on them 3 are seen."""
    generator = torch.Generator().manual_seed(4)
    process = chain(4)
    data = shared_mixture(0.5 + torch.rand(20, generator=generator), torch.randn(20, 4, generator=generator), WIDTH)
    matrix = torch.randn(16, 4, generator=generator) / 2
    deviation, drawn = 0.3, torch.Generator().manual_seed(1000 + seed)
    operator = Mask((16,), box_mask((16,), slice(0, 3)))
    blank = GaussianLikelihood(operator, deviation)
    ends = data.noised(process.alphas[-1], process.sigmas[-1])
    y = blank.draw(ends.sample(1, drawn) @ matrix.mT, drawn)
    likelihood = of_latents(GaussianLikelihood(operator, deviation, y), lambda z: z @ matrix.mT, (4,))
    exact = ends.posterior(operator.matrix() @ matrix, y[0], deviation)
    log_z = float(ends.log_evidence(operator.matrix() @ matrix, y, deviation)[0])
    return Known(
        Posterior(process, data, likelihood, climb_of(likelihood, data, WIDTH)), log_z, exact.weight,
        lambda x: ends.responsibilities(x).mean(0), lambda count, random: exact.sample(count, random),
    )  # fmt: skip


@cache
def digits_latents() -> tuple[Autoencoder, GaussianMixture]:
    train, _ = load_digits()
    autoencoder = fit_autoencoder(train.images, 2)
    return autoencoder, shared_mixture(torch.ones(len(train)), autoencoder.encode(train.images)[0], 0.15)


@cache
def digits(seed: int) -> Known:
    """Of a digit the means of its four quarters are seen."""
    autoencoder, data = digits_latents()
    process, drawn = chain(2), torch.Generator().manual_seed(1000 + seed)
    operator, deviation = Downsample(SHAPE, 4), 0.1
    ends = data.noised(process.alphas[-1], process.sigmas[-1])
    with torch.no_grad():
        y = GaussianLikelihood(operator, deviation).draw(autoencoder.decode(ends.sample(1, drawn)), drawn)
    likelihood = of_latents(GaussianLikelihood(operator, deviation, y), autoencoder.decode, (2,))
    posterior = Posterior(process, data, likelihood, climb_of(likelihood, data, start=0.0))
    fine = 25 * CELLS
    axis = (torch.arange(fine, dtype=torch.float64) + 0.5) / fine * 2 * SIDE - SIDE
    points = torch.cartesian_prod(axis, axis)
    with torch.no_grad():
        values = torch.cat([posterior.log_density(part.float()) for part in points.split(20_000)])
    log_z = float(values.logsumexp(0)) + 2 * math.log(2 * SIDE / fine)
    mass = values.softmax(0)

    def shares(x: Tensor) -> Tensor:
        at = ((x.double() + SIDE) / (2 * SIDE) * CELLS).floor().clamp(0, CELLS - 1).long()
        return torch.bincount(at[:, 0] * CELLS + at[:, 1], minlength=CELLS**2).double() / len(x)

    def exact(count: int, random: torch.Generator) -> Tensor:
        chosen = points[torch.multinomial(mass, count, replacement=True, generator=random)]
        return (chosen + (torch.rand(count, 2, generator=random) - 0.5) * 2 * SIDE / fine).float()

    cells = mass.view(CELLS, 25, CELLS, 25).sum((1, 3)).flatten()
    return Known(posterior, log_z, cells, shares, exact)


PROBLEMS: dict[str, Callable[[int], Known]] = {"linear": linear, "digits": digits}


def look(known: Known, x: Tensor, seed: int) -> Figures:
    """Latents beside exact draws of their posterior."""
    random = torch.Generator().manual_seed(seed)
    directions = random_directions(50, x.shape[1], random)

    def distance(one: Tensor, two: Tensor) -> float:
        return sliced_wasserstein(one, two, directions)

    floors = [total_variation(known.shares(known.exact(len(x), random)), known.probability) for _ in range(3)]
    sliced = beside_floor(distance, x, lambda count: known.exact(count, random), 3)
    return {
        "total_variation": total_variation(known.shares(x), known.probability),
        "total_variation_floor": sum(floors) / len(floors),
        "sliced_wasserstein": sliced.value,
        "sliced_wasserstein_floor": sliced.floor,
    }


def trained(name: str, seed: int) -> Figures:
    known, generator = PROBLEMS[name](seed), torch.Generator().manual_seed(seed)
    learned = learn(known.posterior, RECIPE, seed)
    drawn = draws(known.posterior, learned.denoiser, DRAWS, generator)
    found = estimates(known.posterior, learned.denoiser, drawn, known.exact(2000, generator), generator)
    return {
        "log_z_exact": known.log_z,
        **found.figures(),
        "log_z_away": found.log_z - known.log_z,
        "seconds": learned.seconds,
        "reward_calls": learned.reward_calls,
        "gradient_calls": learned.gradient_calls,
        **look(known, drawn.objects, seed),
        "total_variation_corrected": total_variation(known.shares(corrected(drawn, generator)), known.probability),
    }


def guided(name: str, seed: int) -> Figures:
    """Latent DPS at the step size of least total variation, of those tried, which no user could know."""
    known, tried, best = PROBLEMS[name](seed), {}, {}
    posterior = known.posterior
    for scale in SCALES:
        generator = torch.Generator().manual_seed(seed)
        try:
            drawn = dps(
                posterior.process, posterior.prior(), posterior.likelihood, torch.empty(DRAWS, 0), generator, scale
            )
        except ValueError:  # diverged
            continue
        figures = look(known, drawn.objects, seed)
        tried[str(scale)] = figures["total_variation"]
        if not best or number(figures["total_variation"]) < number(best["total_variation"]):
            best = figures | {"scale": scale, "reward_calls": drawn.reward_calls}
    return best | {"total_variation_by_scale": tried}


def weighed(name: str, seed: int, calls: int) -> Figures:
    """Importance resampling of the prior at as many reward calls as training took."""
    known, generator = PROBLEMS[name](seed), torch.Generator().manual_seed(seed)
    x, found = resampled(known.posterior, calls, DRAWS, generator)
    return dict(found.figures()) | {
        "log_z_away": found.log_z - known.log_z, "reward_calls": min(calls, MOST_RESAMPLED), **look(known, x, seed)
    }  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("problems", nargs="*", default=list(PROBLEMS), help="linear, digits or both")
    parser.add_argument("--seeds", type=int, default=3, help="each has a measurement of its own")
    parser.add_argument("--output", type=Path, default=RESULTS / "diffusion-latent.json")
    asked = parser.parse_args()
    torch.set_num_threads(1)
    command = ["python benchmarks/diffusion_latent.py", *sys.argv[1:]]
    for seed in range(asked.seeds):
        for name in asked.problems:
            key = {"problem": name, "seed": seed}
            ours = keep(asked.output, {"sampler": "trained"} | key, partial(trained, name, seed), command)
            calls = int(number(ours["reward_calls"]) + number(ours["gradient_calls"]))
            keep(asked.output, {"sampler": "latent DPS"} | key, partial(guided, name, seed), command)
            make = partial(weighed, name, seed, calls)
            keep(asked.output, {"sampler": "resampling"} | key, make, command)


if __name__ == "__main__":
    main()
