"""Posteriors under linear measurements, learned by relative trajectory balance, beside closed forms and what needs no
training: importance resampling, DPS, pseudo-inverse guidance and twisted SMC.

    python benchmarks/diffusion_linear.py lattice --seeds 3
    python benchmarks/diffusion_linear.py digits --seeds 3

lattice: one sampler q(x | y) for all y, in 2, 8 and 80 dimensions. digits: one sampler for each measurement. Results go
to results/diffusion-lattice.json and diffusion-digits.json; what is there is not run again.
"""

from __future__ import annotations

import argparse
import copy
import json
import sys
import time
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

import torch
from torch import Tensor, nn

import diffusion_known as known
from diffusion_known import Contender, Figures, Problem
from headwater.diffusion.adapters import Adapter
from headwater.diffusion.estimators import resample, resampling_estimates
from headwater.diffusion.fitting import Unscored
from headwater.diffusion.guidance import Draws, dps, pseudo_inverse_guidance, twisted_smc
from headwater.diffusion.likelihoods import GaussianLikelihood
from headwater.diffusion.mixtures import MixtureDenoiser
from headwater.diffusion.policy import DiffusionPolicy
from headwater.diffusion.priors import Prior
from headwater.diffusion.simulated import FromPairs, Pairs
from headwater.objectives import Objective
from headwater.training import ExplorationSettings, Trainer, Training
from provenance import load, provenance

VARIANCE = Objective("vargrad")


@dataclass(frozen=True)
class Recipe:
    """How a posterior is learned. imitate: updates by the likelihood of the chains that are walked back, before those
    of relative trajectory balance. share: of chains that are walked back. deviation: see `Adapter`."""

    imitate: int
    balance: int
    batch_size: int = 128
    group_size: int = 4
    share: float = 0.25
    deviation: float = 1.0
    width: int = 128
    first_rate: float = 2e-3
    rate: float = 1e-3
    objective: Objective = VARIANCE


def train(problem: Problem, likelihood: GaussianLikelihood, pairs: Pairs, recipe: Recipe, seed: int) -> nn.Module:
    """The posterior's denoiser."""
    torch.manual_seed(seed)
    adapter = Adapter("correction", width=recipe.width, langevin=True, gradient_at="data", deviation=recipe.deviation)
    examples = pairs.measurement if pairs.size else None
    posterior = adapter.posterior(prior_of(problem), pairs.size, likelihood, examples)
    policy = DiffusionPolicy(problem.process, problem.prior, posterior)
    if recipe.imitate:
        settings = Training(
            iterations=recipe.imitate, batch_size=recipe.batch_size, learning_rate=recipe.first_rate, schedule="cosine"
        )
        Trainer(
            policy, Unscored(), pairs, Objective("mle"), settings, ExplorationSettings(epsilon=0.0), seed=seed,
            explorer=FromPairs.of(pairs, 1.0),
        ).run(progress_bar=False)  # fmt: skip
    IMITATED[problem.name, seed // EACH if pairs.size else seed] = copy.deepcopy(posterior)
    settings = Training(
        iterations=recipe.balance, batch_size=recipe.batch_size, group_size=recipe.group_size,
        learning_rate=recipe.rate, schedule="cosine",
    )  # fmt: skip
    trainer = Trainer(
        policy, likelihood, pairs, recipe.objective, settings,
        ExplorationSettings(epsilon=0.0), seed=seed, explorer=FromPairs.of(pairs, recipe.share),
    )  # fmt: skip
    trainer.run(progress_bar=False)
    assert isinstance(trainer.sampler, DiffusionPolicy)
    return trainer.sampler.posterior


LEARNED: dict[tuple[str, int], nn.Module] = {}
IMITATED: dict[tuple[str, int], nn.Module] = {}
"""What has been learned, and what before relative trajectory balance, by problem and training."""


def imitated(recipe: Recipe, problem: Problem, condition: Tensor, seed: int) -> tuple[nn.Module, int]:
    """What `train` has before relative trajectory balance: the likelihood of the walked chains alone."""
    key = problem.name, seed // EACH if problem.name.startswith("lattice") else seed
    if key not in IMITATED:
        learned(replace(recipe, balance=1), problem, condition, seed)
    return IMITATED[key], 0


def learned(recipe: Recipe, problem: Problem, condition: Tensor, seed: int) -> tuple[nn.Module, int]:
    how = amortized if problem.name.startswith("lattice") else one_measurement
    return how(recipe, problem, condition, seed)


def prior_of(problem: Problem) -> Prior:
    assert isinstance(problem.prior, MixtureDenoiser)
    return Prior(problem.process, problem.prior)


def amortized(recipe: Recipe, problem: Problem, condition: Tensor, seed: int) -> tuple[nn.Module, int]:
    """One sampler for all y, from simulated pairs; the same for `EACH` seeds, which differ in their measurement."""
    key = problem.name, seed // EACH
    if key not in LEARNED:
        pairs = Pairs.simulated(prior_of(problem), measured(problem), 20_000, seeded(seed))
        LEARNED[key] = train(problem, measured(problem), pairs, recipe, seed)
    return LEARNED[key], recipe.balance * recipe.batch_size


def one_measurement(recipe: Recipe, problem: Problem, condition: Tensor, seed: int) -> tuple[nn.Module, int]:
    """A sampler for one y; what twisted SMC found is walked back, equal weights or not."""
    found, _ = of_smc(2000, problem, condition, seed)
    objects = found.resampled(len(found.objects), seeded(seed))
    pairs = Pairs(objects, torch.empty(len(objects), 0))
    likelihood = measured(problem)
    fixed = GaussianLikelihood(likelihood.operator, likelihood.sigma, condition[0])
    return train(problem, fixed, pairs, recipe, seed), found.reward_calls + recipe.balance * recipe.batch_size


def of_dps(scale: float, problem: Problem, condition: Tensor, seed: int) -> tuple[Draws, int]:
    draws = dps(
        problem.process, problem.prior, measured(problem), condition.expand(DRAWS, -1), seeded(seed), scale,
        limit_of(problem),
    )  # fmt: skip
    return draws, 0


def of_pseudo_inverse(problem: Problem, condition: Tensor, seed: int) -> tuple[Draws, int]:
    draws = pseudo_inverse_guidance(
        problem.process, problem.prior, measured(problem), condition.expand(DRAWS, -1), seeded(seed),
        limit=limit_of(problem), deviation=deviation_of(problem),
    )  # fmt: skip
    return draws, 0


def of_smc(particles: int, problem: Problem, condition: Tensor, seed: int) -> tuple[Draws, int]:
    draws = twisted_smc(
        problem.process, problem.prior, measured(problem), condition.expand(particles, -1), seeded(seed),
        deviation=deviation_of(problem),
    )  # fmt: skip
    return draws, 0


def measured(problem: Problem) -> GaussianLikelihood:
    assert problem.measured is not None
    return problem.measured


def seeded(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def limit_of(problem: Problem) -> float:
    """Root mean square that guidance may move the predicted data in a step, without which some chains diverge."""
    return 10.0 if problem.name.startswith("lattice") else 1.0


def deviation_of(problem: Problem) -> float:
    """Of a mode of the lattice; of a pixel of the digits."""
    return 1.0 if problem.name.startswith("lattice") else 0.75


LATTICE = {2: Recipe(150, 200, 64), 8: Recipe(200, 250, 64), 80: Recipe(400, 200, rate=5e-4)}
DIGITS = Recipe(40, 300, group_size=1, deviation=0.75, share=0.5, objective=Objective("vargrad", "huber", 3.0))
SCALES = {"lattice": (1.0, 3.0, 10.0, 30.0), "digits": (0.1, 0.3, 1.0)}
DRAWS = 1000
EACH = 3
"""Measurements that one sampler for all is looked at with."""


def contenders(problem: Problem) -> dict[str, Contender]:
    kind, _, which = problem.name.partition("-")
    recipe = LATTICE[int(which)] if kind == "lattice" else DIGITS
    return {
        "learned": partial(learned, recipe),
        "imitation alone": partial(imitated, recipe),
        "closed form": known.closed_form,
        **{f"DPS {scale:g}": partial(of_dps, scale) for scale in SCALES[kind]},
        "pseudo-inverse": of_pseudo_inverse,
        "twisted SMC": partial(of_smc, DRAWS),
    }


def by_resampling(problem: Problem, condition: Tensor, calls: int, seed: int) -> Figures:
    """Importance resampling of exact draws of the prior."""
    generator = seeded(seed)
    objects = problem.mixture.sample(calls, generator).view(calls, *problem.process.shape)
    log_reward = measured(problem)(objects, condition.expand(calls, -1))
    kept = objects[resample(log_reward, DRAWS, generator)]
    figures: Figures = {**resampling_estimates(log_reward).figures(), "reward_calls": calls}
    figures["log_z_exact"] = float(problem.log_z(condition)[0])
    return figures | known.look_at(problem, condition, kept, generator, slow=False)


class Book:
    """Rows that are written down as they come, and not made again."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.rows: list[Figures] = json.loads(path.read_text())["rows"] if path.exists() else []

    def has(self, **key: object) -> bool:
        return any(all(row[name] == value for name, value in key.items()) for row in self.rows)

    def add(self, row: Figures, command: list[str]) -> None:
        self.rows.append(row)
        content = {"provenance": provenance(command), "load": load(), "rows": self.rows}
        self.path.write_text(json.dumps(content, indent=1) + "\n")
        known.say(row)


def run(problem: Problem, seed: int, book: Book, command: list[str]) -> None:
    """All contenders on the measurement of a seed."""
    _, condition = problem.measurements(1, torch.Generator().manual_seed(1000 + seed))
    key: Figures = {"problem": problem.name, "seed": seed}
    for name, contender in contenders(problem).items():
        if book.has(**key, contender=name):
            continue
        amortizes = problem.name.startswith("lattice") and name in ("learned", "imitation alone", "closed form")
        many = 100 if amortizes and seed % EACH == 0 else 0
        try:
            figures = known.one(problem, contender, condition, seed, many, DRAWS, slow=False)
        except ValueError as error:  # guidance that diverges
            figures = {"failed": str(error)}
        book.add(key | {"contender": name} | figures, command)
    mine = {row["contender"]: row for row in book.rows if row["problem"] == problem.name and row["seed"] == seed}
    most = int(str(mine["learned"]["reward_calls"]))
    for name, calls in (("resampling", DRAWS), ("resampling as learned", most)):
        if not book.has(**key, contender=name):
            began = time.process_time()
            figures = by_resampling(problem, condition, calls, seed)
            book.add(key | {"contender": name} | figures | {"seconds": time.process_time() - began}, command)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=("lattice", "digits"))
    parser.add_argument("--seeds", type=int, default=3, help="each has a measurement of its own")
    parser.add_argument("--problems", default="", help="only these, by name, with commas")
    asked = parser.parse_args()
    torch.set_num_threads(1)
    book = Book(known.RESULTS / f"diffusion-{asked.what}.json")
    command = ["python benchmarks/diffusion_linear.py", *sys.argv[1:]]
    for name in asked.problems.split(",") if asked.problems else PROBLEMS[asked.what]:
        for seed in range(asked.seeds):
            run(known.PROBLEMS[name](50 if asked.what == "lattice" else 25, "learned"), seed, book, command)


PROBLEMS = {
    "lattice": ("lattice-80", "lattice-8", "lattice-2"),
    "digits": ("digits-top-row", "digits-random-projections"),
}

if __name__ == "__main__":
    main()
