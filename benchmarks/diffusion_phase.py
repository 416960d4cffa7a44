"""Phase retrieval: y = |F x|^2 + noise says nothing of signs and mirror images, so that a posterior has symmetric
modes, whose masses are known exactly. Does a sampler give each its own?

    python benchmarks/diffusion_phase.py --seeds 3

The prior is a mixture in which each component has all its images under the symmetries beside it, with weights 4 : 3 :
2 : 1. r(x) is the same for all four, so the posterior has them in the same proportion, whatever was measured. Writes
results/diffusion-phase.json and .md.
"""

from __future__ import annotations

import argparse
import sys
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
    longer,
    number,
    resampled,
)  # fmt: skip
from diffusion_truth import Truth, by_grid, by_modes
from headwater.diffusion.guidance import dps
from headwater.diffusion.likelihoods import GaussianLikelihood
from headwater.diffusion.measures import beside_floor, random_directions, sliced_wasserstein, total_variation
from headwater.diffusion.mixtures import GaussianMixture
from headwater.diffusion.process import GaussianProcess
from headwater.diffusion.transforms import PhaseRetrieval
from headwater.objectives import Objective
from headwater.replay import ReplaySettings
from headwater.training import ExplorationSettings, Training

SHARES = torch.tensor([0.4, 0.3, 0.2, 0.1], dtype=torch.float64)
"""Of x, -x, the mirror image of x and its negative."""
ORBITS = 4
DEVIATION, WIDTH = 0.1, 0.2
"""Of the noise, and of the prior's components."""
DRAWS = 4000
STEPS = 20
"""Of a chain: those of the prior then give its components their weights to 0.02."""
SCALES = (0.1, 0.3, 1.0, 3.0)
ITERATIONS = {2: 400, 16: 600}
RECIPE = Recipe(
    objective=Objective("tb", penalty="huber"),
    training=Training(
        batch_size=64, replayed=64, warm_up=4096, replay_backward=True, learning_rate=2e-3, log_z_learning_rate=0.5,
        schedule="cosine",
    ),
    exploration=ExplorationSettings(epsilon=0.0, average=0.995),
    replay=ReplaySettings(rule="softmax", capacity=20_000),
)  # fmt: skip


def symmetric_prior(dimensions: int) -> GaussianMixture:
    """`ORBITS` components of random weight, and the images of each; component 4 o + s is image s of orbit o."""
    generator = torch.Generator().manual_seed(dimensions)
    centre = torch.randn(ORBITS, dimensions, generator=generator)
    images = torch.stack([centre, -centre, centre.flip(1), -centre.flip(1)], 1)
    weight = (0.5 + torch.rand(ORBITS, 1, generator=generator)) * SHARES
    log_weight = weight.flatten().double().log()
    width = torch.full((1, dimensions), WIDTH**2, dtype=torch.float64)
    return GaussianMixture(log_weight - log_weight.logsumexp(0), images.flatten(0, 1).double(), width)


@cache
def problem(dimensions: int, seed: int) -> Posterior:
    """With the measurement of a draw from the prior."""
    process = GaussianProcess.of((dimensions,), STEPS, "cosine", "velocity", "learned", final_noise=0.05)
    data, generator = symmetric_prior(dimensions), torch.Generator().manual_seed(1000 + seed)
    operator = PhaseRetrieval((dimensions,))
    truth = data.noised(process.alphas[-1], process.sigmas[-1]).sample(1, generator)
    y = GaussianLikelihood(operator, DEVIATION).draw(truth, generator)
    likelihood = GaussianLikelihood(operator, DEVIATION, y)
    return Posterior(process, data, likelihood, climb_of(likelihood, data, WIDTH, 0.0))


@cache
def truth_of(dimensions: int, seed: int) -> Truth:
    posterior = problem(dimensions, seed)
    if posterior.data.dimensions == 2:
        return by_grid(posterior.log_density, -4.0, 4.0, 800, 2, 20_000, seed)
    starts = torch.cat([posterior.data.mean.float(), posterior.ends.sample(64, torch.Generator().manual_seed(seed))])
    return by_modes(posterior.log_density, starts, 200_000, 20_000, seed)


def look(posterior: Posterior, x: Tensor, truth: Truth, seed: int) -> Figures:
    """The masses of the four images and of all components, and the distance from exact draws."""
    generator = torch.Generator().manual_seed(seed)
    directions = random_directions(100, posterior.data.dimensions, generator)

    def exact(count: int) -> Tensor:
        return truth.draws[torch.randperm(len(truth.draws), generator=generator)[:count]]

    def share(points: Tensor) -> Tensor:
        return posterior.ends.responsibilities(points).mean(0)

    image, expected = share(x).view(ORBITS, 4).sum(0), share(truth.draws)
    sliced = beside_floor(lambda one, two: sliced_wasserstein(one, two, directions), x, exact)
    return {
        "image_masses": image.tolist(),
        "mass_error": float((image - SHARES).abs().max()),
        "sign_error": abs(float(image[0] + image[2]) - 0.6),
        "total_variation": total_variation(share(x), expected),
        "total_variation_floor": total_variation(share(exact(len(x))), expected),
        "sliced_wasserstein": sliced.value,
        "sliced_wasserstein_floor": sliced.floor,
    }


def trained(dimensions: int, seed: int) -> Figures:
    posterior, generator = problem(dimensions, seed), torch.Generator().manual_seed(seed)
    truth, learned = truth_of(dimensions, seed), learn(posterior, longer(RECIPE, ITERATIONS[dimensions]), seed)
    drawn = draws(posterior, learned.denoiser, DRAWS, generator)
    found = estimates(posterior, learned.denoiser, drawn, truth.draws[:2000], generator)
    return {
        "log_z_exact": truth.log_z,
        "log_z_exact_error": truth.log_z_error,
        "truth_effective_sample_size": truth.effective_sample_size,
        **found.figures(),
        "log_z_away": found.log_z - truth.log_z,
        "seconds": learned.seconds,
        "reward_calls": learned.reward_calls,
        "gradient_calls": learned.gradient_calls,
        **look(posterior, drawn.objects, truth, seed),
        "corrected": look(posterior, corrected(drawn, generator), truth, seed),
    }


def guided(dimensions: int, seed: int) -> Figures:
    """DPS at the step size that comes nearest to the exact draws, of those tried."""
    posterior = problem(dimensions, seed)
    truth, best = truth_of(dimensions, seed), None
    prior, tried = posterior.prior(), {}
    for scale in SCALES:
        generator = torch.Generator().manual_seed(seed)
        try:
            drawn = dps(posterior.process, prior, posterior.likelihood, torch.empty(DRAWS, 0), generator, scale)
        except ValueError:  # diverged
            continue
        figures = look(posterior, drawn.objects, truth, seed)
        tried[str(scale)] = figures["sliced_wasserstein"]
        if best is None or float(str(figures["sliced_wasserstein"])) < float(str(best["sliced_wasserstein"])):
            best = figures | {"scale": scale, "reward_calls": drawn.reward_calls}
    return (best or {}) | {"sliced_wasserstein_by_scale": tried}


def weighed(dimensions: int, seed: int, calls: int) -> Figures:
    posterior, generator = problem(dimensions, seed), torch.Generator().manual_seed(seed)
    truth = truth_of(dimensions, seed)
    x, found = resampled(posterior, calls, DRAWS, generator)
    away = {"log_z_away": found.log_z - truth.log_z, "reward_calls": min(calls, MOST_RESAMPLED)}
    return dict(found.figures()) | away | look(posterior, x, truth, seed)


COLUMNS = {
    "mass_error": "largest error of a mode's mass", "sign_error": "error of a sign's mass",
    "total_variation": "TV of components", "total_variation_floor": "its floor",
    "sliced_wasserstein": "sliced W", "sliced_wasserstein_floor": "its floor", "log_z_away": "log Z reweighted, off by",
    "effective_sample_size": "ESS", "seconds": "CPU s",
}  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--dimensions", type=int, nargs="+", default=list(ITERATIONS), choices=ITERATIONS)
    parser.add_argument("--seeds", type=int, default=3, help="each has a measurement of its own")
    parser.add_argument("--output", type=Path, default=RESULTS / "diffusion-phase.json")
    asked = parser.parse_args()
    torch.set_num_threads(1)
    command = ["python benchmarks/diffusion_phase.py", *sys.argv[1:]]
    for seed in range(asked.seeds):
        for dimensions in asked.dimensions:
            key = {"dimensions": dimensions, "seed": seed}
            make = partial(trained, dimensions, seed)
            ours = keep(asked.output, {"sampler": "trained"} | key, make, command)
            calls = int(number(ours["reward_calls"]) + number(ours["gradient_calls"]))
            keep(asked.output, {"sampler": "DPS"} | key, partial(guided, dimensions, seed), command)
            make = partial(weighed, dimensions, seed, calls)
            keep(asked.output, {"sampler": "resampling"} | key, make, command)


if __name__ == "__main__":
    main()
