"""A prior of digits that was learned, and posteriors under inpainting, super-resolution and blur with log Z between two
bounds.

    python benchmarks/diffusion_learned.py

Nothing is known in closed form here: what samplers are held against is twisted SMC with 20,000 particles. Writes
results/diffusion-learned.json and .md; a row that is there is not measured again.
"""

from __future__ import annotations

import argparse
import math
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn

from diffusion_rows import Figures, Rows, cell, machine, over_seeds, run_to_the_end, table
from headwater.conditions import NoCondition
from headwater.diffusion.calibration import chi_squared_per_degree
from headwater.diffusion.chains import draw_chains, walk_back
from headwater.diffusion.denoisers import Denoiser, ResidualMLP, time_features
from headwater.diffusion.digits import SHAPE, load_digits
from headwater.diffusion.estimators import log_z_estimates, resample
from headwater.diffusion.fitting import PriorFitting, Unscored
from headwater.diffusion.guidance import Draws, dps, prior_draws, pseudo_inverse_guidance, twisted_smc
from headwater.diffusion.likelihoods import GaussianLikelihood
from headwater.diffusion.measures import beside_floor, random_directions, sliced_wasserstein
from headwater.diffusion.mixtures import step_numbers
from headwater.diffusion.operators import Blur, Downsample, Mask, Operator, box_mask, gaussian_kernel
from headwater.diffusion.policy import DiffusionPolicy
from headwater.diffusion.prior_recipe import ChainSettings, NetworkSettings, PriorRecipe
from headwater.diffusion.priors import Prior, load_prior, save_prior
from headwater.diffusion.process import GaussianProcess
from headwater.objectives import Objective
from headwater.replay import ReplaySettings
from headwater.training import ExplorationSettings, Trainer, Training

RESULTS = Path(__file__).parent / "results"
STEPS, WIDTH, BLOCKS = 20, 192, 2
PRIOR_UPDATES = 4000
SIGMA = 0.3
PARTICLES, DRAWS, FEW = 20_000, 2000, 500
DEVIATION = 1.5
"""That the particles' guess takes the prior for: with 0.5 and 0.7, nearer to that of most pixels, the estimate of log Z
was up to 20 nats lower and differed from seed to seed; a guess that is too sure of itself fails."""
BATCH = 32
NONE = torch.empty(1, 0)

TASKS: dict[str, Callable[[], Operator]] = {
    "left half hidden": lambda: Mask(SHAPE, box_mask(SHAPE, slice(None), slice(4, None))),
    "super-resolution": lambda: Downsample(SHAPE, 2),
    "blur": lambda: Blur(SHAPE, gaussian_kernel(3, 1.0)),
}


def learned_prior(folder: Path) -> Prior:
    """By the recipe of `headwater train prior`, once."""
    if folder.exists():
        return load_prior(folder)
    data = folder.parent / "digits.npy"
    np.save(data, load_digits()[0].images.numpy())
    recipe = PriorRecipe(
        data=data,
        chain=ChainSettings("cosine", STEPS, "velocity", "learned", final_noise=0.1),
        network=NetworkSettings("mlp", WIDTH, BLOCKS),
        weighting="evidence",
        training=Training(iterations=PRIOR_UPDATES, batch_size=128, learning_rate=2e-3, schedule="cosine"),
        exploration=ExplorationSettings(epsilon=0.0, average=0.995),
        device="cpu",
    )
    torch.manual_seed(0)
    problem = recipe.problem()
    trainer = Trainer(
        problem.policy, Unscored(), NoCondition(), recipe.objective, recipe.training, recipe.exploration,
        given=recipe.given_states(),
    )  # fmt: skip
    run_to_the_end(trainer)
    print("prior:", recipe.quick_evaluation(trainer.sampler), f"{time.process_time():.0f} CPU s", flush=True)
    learned = trainer.sampler
    assert isinstance(learned, PriorFitting)
    save_prior(learned.prior, folder)
    return load_prior(folder)


class Guided(Denoiser):
    """A posterior that sees the measurement through its likelihood: what the prior says, with the predicted data moved
    as far as Gaussian data of one deviation around them would be by y, the step of pseudo-inverse guidance without its
    Jacobian; that deviation is learned as a function of time, and a network adds to all. Where it starts is not the
    prior, but near the posterior already.

    Song et al. 2023 (ICLR, "Pseudoinverse-guided diffusion models for inverse problems"), equation 7.
    """

    condition = 0

    def __init__(self, prior: Prior, likelihood: GaussianLikelihood, deviation: float = 0.5) -> None:
        super().__init__()
        assert isinstance(prior.process, GaussianProcess)
        self.process, self.likelihood = prior.process, likelihood
        self.prior = prior.denoiser.requires_grad_(False)
        self.correction = ResidualMLP(SHAPE, 0, WIDTH, BLOCKS, learned_variance=True)
        self.correction.silence()
        last = nn.Linear(32, 1)
        nn.init.zeros_(last.weight), nn.init.constant_(last.bias, math.log(deviation))
        self.spread = nn.Sequential(nn.Linear(64, 32), nn.SiLU(), last)
        size = math.prod(likelihood.operator.measured)
        units = torch.eye(size).view(size, *likelihood.operator.measured)
        with torch.no_grad():
            spectrum, vectors = torch.linalg.eigh(likelihood.operator(likelihood.operator.adjoint(units)).flatten(1))
        self.spectrum, self.vectors = nn.Buffer(spectrum.clamp(min=0)), nn.Buffer(vectors)

    def forward(self, state: Tensor, time: Tensor, condition: Tensor) -> Tensor:
        number, operator = step_numbers(self.process, time), self.likelihood.operator
        with torch.no_grad():
            said = self.prior(state, time, condition)
            data = self.process.predicted_data(said, state, number)
            away = self.likelihood.residual(data, condition).flatten(1) @ self.vectors
        alpha, sigma = self.process.alpha_sigma(number)
        deviation = self.spread(time_features(time))[:, 0].exp()
        unexplained = ((deviation * sigma).square() / ((alpha * deviation).square() + sigma.square()))[:, None]
        pulled = (unexplained * away / (unexplained * self.spectrum + self.likelihood.sigma**2)) @ self.vectors.mT
        pulled = operator.adjoint(pulled.view(-1, *operator.measured))
        moved = self.process.prediction_of(data + pulled, state, number) - said[:, :1]
        return said + torch.cat((moved, torch.zeros_like(moved)), 1) + self.correction(state, time, condition)


@dataclass(frozen=True, eq=False)
class Problem:
    """A prior, one measurement of a draw of it, and draws of the posterior by twisted SMC."""

    prior: Prior
    likelihood: GaussianLikelihood
    truth: Tensor
    reference: Draws
    other: Draws
    seconds: float

    @property
    def process(self) -> GaussianProcess:
        assert isinstance(self.prior.process, GaussianProcess)
        return self.prior.process

    def exact(self, count: int, generator: torch.Generator) -> Tensor:
        """New draws of the reference."""
        return self.reference.resampled(count, generator)


def problem(prior: Prior, name: str) -> Problem:
    operator, generator = TASKS[name](), torch.Generator().manual_seed(11)
    assert isinstance(prior.process, GaussianProcess)
    truth = prior_draws(prior.process, prior.denoiser, NONE, generator)
    y = GaussianLikelihood(operator, SIGMA).draw(truth, generator)
    likelihood = GaussianLikelihood(operator, SIGMA, y[0])
    began = time.process_time()
    reference, other = (
        twisted_smc(prior.process, prior.denoiser, likelihood, NONE.expand(PARTICLES, -1),
                    torch.Generator().manual_seed(seed), deviation=DEVIATION)
        for seed in (21, 22)
    )  # fmt: skip
    return Problem(prior, likelihood, truth, reference, other, time.process_time() - began)


def look_at(here: Problem, draws: Tensor, seed: int) -> Figures:
    """Draws beside those of twisted SMC."""
    generator = torch.Generator().manual_seed(seed)
    directions = random_directions(200, 64, generator)
    exact = here.exact(DRAWS, generator)
    spread = beside_floor(
        lambda a, b: sliced_wasserstein(a, b, directions), draws[:FEW], lambda n: here.exact(n, generator), 3
    )
    low, high = (torch.quantile(draws.flatten(1), level, 0) for level in (0.05, 0.95))
    truth = here.truth.flatten()
    measured = here.likelihood.operator
    assert here.likelihood.y is not None
    y = here.likelihood.y.flatten()

    def chi_squared(points: Tensor) -> float:
        return float(chi_squared_per_degree(points, measured, y, SIGMA).mean())

    low_exact, high_exact = (torch.quantile(exact.flatten(1), level, 0) for level in (0.05, 0.95))
    return {
        "sliced_wasserstein": spread.value,
        "sliced_wasserstein_floor": spread.floor,
        "mean_off": float((draws.mean(0) - exact.mean(0)).square().mean().sqrt()),
        "deviation": float(draws.std(0).square().mean().sqrt()),
        "deviation_exact": float(exact.std(0).square().mean().sqrt()),
        "chi_squared": chi_squared(draws),
        "chi_squared_exact": chi_squared(exact),
        "coverage": float(((truth >= low) & (truth <= high)).double().mean()),
        "coverage_exact": float(((truth >= low_exact) & (truth <= high_exact)).double().mean()),
    }


def trained(here: Problem, seed: int, iterations: int) -> Figures:
    """Relative trajectory balance on own draws and on chains walked back from earlier ones."""
    torch.manual_seed(seed)
    began, denoiser = time.process_time(), here.prior.denoiser
    policy = DiffusionPolicy(here.process, denoiser, Guided(here.prior, here.likelihood))
    training = Training(
        iterations=iterations, batch_size=BATCH, replayed=BATCH, replay_backward=True, learning_rate=1e-3,
        schedule="cosine",
    )  # fmt: skip
    trainer = Trainer(
        policy, here.likelihood, NoCondition(), Objective("vargrad"), training,
        ExplorationSettings(epsilon=0.0, average=0.98), ReplaySettings(rule="uniform", capacity=5000), seed,
    )  # fmt: skip
    run_to_the_end(trainer)
    seconds = time.process_time() - began
    calls = iterations * BATCH + DRAWS
    sampler = trainer.sampler
    assert isinstance(sampler, DiffusionPolicy)
    return {"cpu_seconds": seconds, "reward_calls": calls} | bounded(here, sampler.posterior, seed)


def bounded(here: Problem, denoiser: nn.Module, seed: int) -> Figures:
    generator = torch.Generator().manual_seed(seed)
    given = (here.process, here.prior.denoiser, denoiser, here.likelihood)
    drawn = draw_chains(*given, NONE.expand(DRAWS, -1), generator)
    above = walk_back(*given, here.exact(DRAWS, generator), NONE.expand(DRAWS, -1), generator)
    found = log_z_estimates(drawn.log_ratio, drawn.log_reward, (above.log_ratio, above.log_reward))
    weight = drawn.log_reward - drawn.log_ratio
    above_own = float((weight.softmax(0) * weight).sum())
    return {
        "sandwich": found.upper - found.lower,
        "upper_own": above_own,
        "sandwich_own": above_own - found.lower,
        "log_z_off": found.log_z - float(here.reference.log_z or math.nan),
        **found.figures(),
        **look_at(here, drawn.objects, seed),
    }


def untrained(here: Problem, seed: int, iterations: int) -> Figures:
    """Where training starts."""
    torch.manual_seed(seed)
    return bounded(here, Guided(here.prior, here.likelihood), seed)


def alone(here: Problem, seed: int, iterations: int) -> Figures:
    return bounded(here, here.prior.denoiser, seed)


def guided(here: Problem, seed: int, iterations: int, draw: Callable[..., Draws]) -> Figures:
    generator = torch.Generator().manual_seed(seed)
    made = draw(here.process, here.prior.denoiser, here.likelihood, NONE.expand(DRAWS, -1), generator)
    return {"reward_calls": made.reward_calls} | look_at(here, made.objects, seed)


def resampled(here: Problem, seed: int, iterations: int) -> Figures:
    """Draws of the prior, weighed: as many reward calls as training makes."""
    generator, calls = torch.Generator().manual_seed(seed), iterations * BATCH + DRAWS
    draws = prior_draws(here.process, here.prior.denoiser, NONE.expand(calls, -1), generator)
    log_r = here.likelihood(draws, NONE.expand(calls, -1))
    found = log_z_estimates(torch.zeros(calls), log_r)
    figures = found.figures() | {"log_z_off": found.log_z - float(here.reference.log_z or math.nan)}
    chosen = draws[resample(log_r, DRAWS, generator)]
    return {"reward_calls": calls} | dict(figures) | look_at(here, chosen, seed)


def particles(here: Problem, seed: int, iterations: int) -> Figures:
    """A second run of what all are held against: the floor."""
    made, generator = here.other, torch.Generator().manual_seed(seed)
    assert made.log_z is not None
    assert here.reference.log_z is not None
    figures: Figures = {
        "cpu_seconds": here.seconds / 2,
        "reward_calls": made.reward_calls,
        "log_z": made.log_z,
        "log_z_off": made.log_z - here.reference.log_z,
    }
    return figures | look_at(here, made.resampled(DRAWS, generator), seed)


SAMPLERS: dict[str, Callable[[Problem, int, int], Figures]] = {
    "relative trajectory balance": trained,
    "where it starts": untrained,
    "the prior": alone,
    "DPS, scale 0.3": partial(guided, draw=partial(dps, scale=0.3)),
    "DPS, scale 1": partial(guided, draw=dps),
    "pseudo-inverse guidance": partial(guided, draw=partial(pseudo_inverse_guidance, deviation=0.5)),
    "resampling, equal calls": resampled,
    "twisted SMC, other seed": particles,
}
ONCE = ("where it starts", "the prior", "twisted SMC, other seed")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tasks", nargs="+", choices=TASKS, default=tuple(TASKS))
    parser.add_argument("--seeds", type=int, default=2)
    parser.add_argument("--iterations", type=int, default=1000, help="updates of training")
    parser.add_argument("--prior", type=Path, default=Path("runs/digits-prior"), help="folder, made if not there")
    parser.add_argument("--output", type=Path, default=RESULTS / "diffusion-learned.json")
    asked = parser.parse_args()
    asked.prior.parent.mkdir(parents=True, exist_ok=True)
    command = ["python benchmarks/diffusion_learned.py", *sys.argv[1:]]
    rows, prior = Rows(asked.output, command), learned_prior(asked.prior)
    for name in asked.tasks:
        here = problem(prior, name)
        for seed in range(asked.seeds):
            for sampler, measure in SAMPLERS.items():
                if seed and sampler in ONCE:
                    continue
                key: Figures = {"task": name, "sampler": sampler, "seed": seed}
                rows.measure(key, partial(measure, here, seed, asked.iterations))
    asked.output.with_suffix(".md").write_text(report(rows, " ".join(command)))


COLUMNS = {
    "lower": "log Z: lower bound", "log_z": "reweighted", "log_z_off": "off by",
    "upper_own": "upper, own draws reweighted", "sandwich_own": "above lower", "upper": "upper, walked back",
    "sandwich": "above lower", "effective_sample_size": "ESS", "pareto_k": "k",
    "sliced_wasserstein": "sliced Wasserstein", "mean_off": "mean off by", "deviation": "deviation",
    "chi_squared": "chi-squared per value", "coverage": "truth within 90 %", "reward_calls": "reward calls",
    "cpu_seconds": "CPU s",
}  # fmt: skip
"""Of the tables."""


def report(rows: Rows, command: str) -> str:
    """What a reader needs."""
    parts = [[INTRODUCTION]]
    for task in TASKS:
        every = rows.where(task=task)
        if not every:
            continue
        known = every[0]
        parts.append(
            [
                f"## {task}",
                "",
                f"Twisted SMC, the reference: deviation {cell(known['deviation_exact'])}, chi-squared "
                f"{cell(known['chi_squared_exact'])}, truth within {cell(known['coverage_exact'])}; sliced Wasserstein "
                f"distance of two sets of its draws {cell(known['sliced_wasserstein_floor'])}.",
                "",
                *table(["sampler", *COLUMNS.values()], [
                    [name, *(over_seeds(rows.where(task=task, sampler=name), one) for one in COLUMNS)]
                    for name in SAMPLERS if rows.where(task=task, sampler=name)
                ]),
                "",
            ]
        )  # fmt: skip
    parts.append([GOALS, "", f"    {command}", "", machine(rows)])
    return "\n".join(line for part in parts for line in part) + "\n"


INTRODUCTION = """# A learned prior of digits, and what is measured of its draws

How near is a sampler trained by relative trajectory balance to the posterior where nothing is known in closed form? The
prior is a diffusion chain of 20 steps over 8 x 8 digits that `headwater train prior` learns (a multilayer perceptron,
learned variances); y is measured once of one of its draws, with noise of deviation 0.3 on pixels from -1 to 1. Samplers
are held against twisted SMC with 20,000 particles. The upper bound is the mean log-weight of its draws walked back by
the noising process: a bound as far as that is the reversal of the learned chain. Deviation is the root mean square of
the pixels' own; "truth within 90 %" is the share of pixels whose central interval of draws holds the truth, of a right
sampler 0.9 in the mean over many measurements.
"""
GOALS = ""


if __name__ == "__main__":
    main()
