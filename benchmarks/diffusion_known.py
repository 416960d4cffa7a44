"""Posterior samplers on priors of which everything is known: log Z, draws, weights of modes and classes in closed form.

    python benchmarks/diffusion_known.py nine lattice-8 digits-top-row --contenders resampling,closed-form --seeds 2

Each contender makes a denoiser for a problem; what its chains give stands beside the floor of exact draws, and beside
importance resampling of the prior's chains at equal reward calls. Writes results/diffusion-known.json and .md.
"""

from __future__ import annotations

import argparse
import json
import math
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import get_args

import torch
from torch import Tensor, nn

from headwater.diffusion.calibration import chi_squared_per_degree, coverage
from headwater.diffusion.chains import Chains, draw_chains, walk_back
from headwater.diffusion.digits import CLASSES, SHAPE, View, digits_prior, load_digits, view_matrix
from headwater.diffusion.estimators import log_z_estimates, resample, resampling_estimates
from headwater.diffusion.guidance import Draws
from headwater.diffusion.likelihoods import GaussianLikelihood
from headwater.diffusion.measures import (
    MODE,
    beside_floor,
    class_shares,
    mean_discrepancy,
    modes_found,
    random_directions,
    sliced_wasserstein,
    total_variation,
    wasserstein,
)
from headwater.diffusion.mixtures import GaussianMixture, MixtureDenoiser
from headwater.diffusion.operators import Matrix
from headwater.diffusion.process import GaussianProcess, Variance
from headwater.diffusion.targets import DensityRatio, lattice, nine_of_twenty_five, random_measurement, twenty_five
from headwater.reward import Reward
from provenance import load, provenance

RESULTS = Path(__file__).parent / "results"
DRAWS = 2000
Figures = dict[str, object]


@dataclass(frozen=True)
class Problem:
    """A prior, as a process, its denoiser and the mixture that chains end in if they are fine enough; and a reward.

    posterior: given a condition row `[C]`, a mixture with the modes of the prior's. measured: without it there is
    nothing to measure, and the condition is empty. label: `[K]`, the class of each mode, or None.
    """

    name: str
    process: GaussianProcess
    mixture: GaussianMixture
    prior: nn.Module
    reward: Reward
    posterior: Callable[[Tensor], GaussianMixture]
    log_z: Callable[[Tensor], Tensor]
    measured: GaussianLikelihood | None = None
    label: Tensor | None = None

    def measurements(self, count: int, generator: torch.Generator) -> tuple[Tensor, Tensor]:
        """Truths `[M, *shape]` from the mixture, and a condition row of each, `[M, C]`."""
        truth = self.mixture.sample(count, generator).view(count, *self.process.shape)
        if self.measured is None:
            return truth, torch.empty(count, 0)
        return truth, self.measured.draw(truth, generator)


Contender = Callable[[Problem, Tensor, int], tuple[nn.Module | Draws, int]]
"""Makes a denoiser for a problem with a seed, good at condition row `[1, C]` at least; and says how often it asked the
reward for that. Or else it draws from the posterior of that row by itself."""


class ClosedForm(nn.Module):
    """The denoiser of the exact posterior mixture under each condition: what chains of so many steps can be expected to
    do, and what makes the chain's own log Z known."""

    def __init__(self, problem: Problem) -> None:
        super().__init__()
        self.problem = problem
        self.known: dict[tuple[float, ...], MixtureDenoiser] = {}

    def forward(self, state: Tensor, time: Tensor, condition: Tensor) -> Tensor:
        group = torch.zeros(len(state), dtype=torch.int64)
        if condition.shape[1]:
            group = torch.unique(condition, dim=0, return_inverse=True)[1]
        order, parts = group.argsort(), []
        for rows in torch.split(order, torch.bincount(group).tolist()):
            row = condition[rows[0]]
            key = tuple(row.tolist())
            if key not in self.known:
                self.known[key] = MixtureDenoiser(self.problem.posterior(row), self.problem.process, of_ends=True)
            parts.append(self.known[key](state[rows], time[rows], condition[rows]))
        return torch.cat(parts)[order.argsort()]


def closed_form(problem: Problem, condition: Tensor, seed: int) -> tuple[nn.Module, int]:
    return ClosedForm(problem), 0


def prior(problem: Problem, condition: Tensor, seed: int) -> tuple[nn.Module, int]:
    """The prior itself."""
    return problem.prior, 0


CONTENDERS: dict[str, Contender] = {"prior": prior, "closed-form": closed_form}


def nine(steps: int, variance: Variance) -> Problem:
    """25 Gaussians to 9."""
    process = GaussianProcess.of((2,), steps, "exploding", "noise", variance, largest_noise=30.0, smallest_noise=0.2)
    mixture, target = twenty_five(), nine_of_twenty_five()
    ends = mixture.noised(process.alphas[-1], process.sigmas[-1])
    target_ends = target.noised(process.alphas[-1], process.sigmas[-1])
    return Problem(
        "nine", process, ends, MixtureDenoiser(mixture, process), DensityRatio(target_ends, ends),
        lambda row: target_ends, lambda rows: torch.zeros(len(rows), dtype=torch.float64),
    )  # fmt: skip


def linear(
    name: str, process: GaussianProcess, mixture: GaussianMixture, matrix: Tensor, deviation: float,
    label: Tensor | None = None, precision: torch.dtype = torch.float64,
) -> Problem:  # fmt: skip
    """A mixture under a linear measurement of where its chains end. precision: of the prior's denoiser."""
    ends = mixture.noised(process.alphas[-1], process.sigmas[-1])
    likelihood = GaussianLikelihood(Matrix(process.shape, matrix), deviation)
    return Problem(
        name, process, ends, MixtureDenoiser(mixture.to(precision), process), likelihood,
        lambda row: ends.posterior(matrix, row, deviation), lambda rows: ends.log_evidence(matrix, rows, deviation),
        likelihood, label,
    )  # fmt: skip


def lattice_problem(dimensions: int, steps: int, variance: Variance) -> Problem:
    """25 Gaussians in many dimensions, of which half as many numbers as there are, at most 4, are measured."""
    generator = torch.Generator().manual_seed(dimensions)
    most = 30 * math.sqrt(dimensions / 2)  # as wide as the lattice along its plane, where all dimensions add up
    process = GaussianProcess.of(
        (dimensions,), steps, "exploding", "noise", variance, largest_noise=most, smallest_noise=0.3
    )
    matrix, deviation = random_measurement(dimensions, min(4, dimensions // 2), generator)
    return linear(f"lattice-{dimensions}", process, lattice(dimensions, generator), matrix, deviation)


def digits_problem(view: View, steps: int, variance: Variance) -> Problem:
    """Handwritten digits of which little is seen."""
    train, _ = load_digits()
    process = GaussianProcess.of(SHAPE, steps, "cosine", "velocity", variance, final_noise=0.1)
    matrix = view_matrix(view, torch.Generator().manual_seed(5))
    return linear(
        f"digits-{view.replace(' ', '-')}", process, digits_prior(train), matrix, 0.1, train.label, torch.float32
    )


PROBLEMS: dict[str, Callable[[int, Variance], Problem]] = {
    "nine": nine,
    **{f"lattice-{d}": partial(lattice_problem, d) for d in (2, 8, 80)},
    **{f"digits-{view.replace(' ', '-')}": partial(digits_problem, view) for view in get_args(View)},
}


def resampled(problem: Problem, condition: Tensor, calls: int, generator: torch.Generator) -> tuple[Tensor, Figures]:
    """`DRAWS` objects by importance resampling of `calls` chains of the prior, and their estimates of log Z."""
    parts = [
        draw_chains(problem.process, problem.prior, problem.prior, problem.reward, rows, generator)
        for rows in torch.split(condition.expand(calls, -1), 10_000)
    ]
    objects, log_reward = torch.cat([part.objects for part in parts]), torch.cat([part.log_reward for part in parts])
    found = resampling_estimates(log_reward)
    return objects[resample(log_reward, DRAWS, generator)], {**found.figures(), "reward_calls": calls}


def look_at(
    problem: Problem, condition: Tensor, objects: Tensor, generator: torch.Generator, slow: bool = True
) -> Figures:
    """Objects of one measurement beside as many exact draws of its posterior. slow: also by the distances that take the
    best assignment, or all pairs."""
    exact = problem.posterior(condition[0])
    directions = random_directions(200, exact.dimensions, generator)
    few = min(500, len(objects))

    def draw(count: int) -> Tensor:
        return exact.sample(count, generator).view(count, *problem.process.shape)

    def of_modes(points: Tensor) -> Tensor:
        share = problem.mixture.responsibilities(points).mean(0)
        return share if problem.label is None else class_shares(share, problem.label, CLASSES)

    expected = exact.weight if problem.label is None else class_shares(exact.weight, problem.label, CLASSES)
    floors = [total_variation(of_modes(draw(len(objects))), expected) for _ in range(5)]
    figures: Figures = {
        "sliced_wasserstein": beside_floor(lambda a, b: sliced_wasserstein(a, b, directions), objects, draw),
        "total_variation": total_variation(of_modes(objects), expected),
        "total_variation_floor": sum(floors) / len(floors),
        "modes_found": modes_found(of_modes(objects), expected),
        "modes": int((expected >= MODE).sum()),
    }
    if slow:
        figures["wasserstein_of_500"] = beside_floor(wasserstein, objects[:few], draw, 3)
        figures["mean_discrepancy_of_500"] = beside_floor(mean_discrepancy, objects[:few], draw, 3)
    if problem.measured is not None:
        measured = problem.measured
        for name, points in (("chi_squared", objects), ("chi_squared_exact", draw(len(objects)))):
            values = chi_squared_per_degree(points, measured.operator, condition[0], float(measured.sigma))
            figures[name] = float(values.mean())
    return figures


def one(
    problem: Problem, contender: Contender, condition: Tensor, seed: int, measurements: int,
    draws: int = DRAWS, slow: bool = True,
) -> Figures:  # fmt: skip
    """A contender at one condition row, `[1, C]`, and over so many others."""
    generator, began = torch.Generator().manual_seed(seed), time.process_time()
    denoiser, calls = contender(problem, condition, seed)
    seconds = time.process_time() - began
    if isinstance(denoiser, Draws):
        return of_draws(problem, denoiser, condition, generator, slow) | {"seconds": seconds}
    rows = condition.expand(draws, -1)

    def chains(walk_from: Tensor | None = None) -> Chains:
        given = (problem.process, problem.prior, denoiser, problem.reward)
        if walk_from is None:
            return draw_chains(*given, rows, generator)
        return walk_back(*given, walk_from, rows, generator)

    drawn = chains()
    exact = problem.posterior(condition[0]).sample(draws, generator).view(drawn.objects.shape)
    above = chains(exact)
    found = log_z_estimates(drawn.log_ratio, drawn.log_reward, (above.log_ratio, above.log_reward))
    many = problem.measured is not None and measurements
    evened = drawn.objects[resample(drawn.log_reward - drawn.log_ratio, draws, generator)]
    weighed = look_at(problem, condition, evened, generator, False)
    return {
        "reward_calls": calls + draws,
        "seconds": seconds,
        "log_z_exact": float(problem.log_z(condition)[0]),
        **found.figures(),
        **look_at(problem, condition, drawn.objects, generator, slow),
        **{f"{name}_weighed": weighed[name] for name in ("sliced_wasserstein", "total_variation")},
        **(over_measurements(problem, denoiser, measurements, seed) if many else {}),
    }


def of_draws(
    problem: Problem, draws: Draws, condition: Tensor, generator: torch.Generator, slow: bool = True
) -> Figures:
    """The same of what a sampler without a denoiser drew."""
    weighted = draws.log_z is not None
    objects = draws.resampled(len(draws.objects), generator) if weighted else draws.objects
    return {
        "reward_calls": draws.reward_calls,
        "log_z_exact": float(problem.log_z(condition)[0]),
        "log_z": draws.log_z,
        "effective_sample_size": draws.effective_sample_size if weighted else None,
        **look_at(problem, condition, objects, generator, slow),
    }


def over_measurements(problem: Problem, denoiser: nn.Module, count: int, seed: int, each: int = 64) -> Figures:
    """Of a denoiser for all conditions at once: `each` draws for each of `count` measurements, their coverage around a
    draw of the exact posterior, and how far the estimates of log Z(y) are off."""
    generator = torch.Generator().manual_seed(2000 + seed)
    truth, condition = problem.measurements(count, generator)
    rows = condition.repeat_interleave(each, 0)
    drawn = draw_chains(problem.process, problem.prior, denoiser, problem.reward, rows, generator)
    objects = drawn.objects.view(count, each, *problem.process.shape)
    reference = torch.cat([problem.posterior(row).sample(1, generator) for row in condition]).view(truth.shape)
    covered = coverage(truth, objects, reference, generator)
    weights = (drawn.log_reward - drawn.log_ratio).view(count, each)
    away = weights.logsumexp(1) - math.log(each) - problem.log_z(condition)
    return {
        "measurements": count,
        "coverage": covered.coverage.tolist(),
        "coverage_largest": covered.largest,
        "coverage_largest_expected": covered.largest_expected,
        "log_z_over_measurements": float(away.square().mean().sqrt()),
        "log_z_bias": float(away.mean()),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("problems", nargs="+", choices=PROBLEMS)
    parser.add_argument("--contenders", default=",".join(CONTENDERS), help="which, by name, with commas")
    parser.add_argument("--steps", type=int, default=50, help="of a chain")
    parser.add_argument("--variance", choices=get_args(Variance), default="learned", help="of a step")
    parser.add_argument("--seeds", type=int, default=1, help="each has a measurement of its own")
    parser.add_argument("--measurements", type=int, default=0, help="also over so many, of denoisers for all at once")
    parser.add_argument("--output", type=Path, default=RESULTS / "diffusion-known.json")
    asked = parser.parse_args()
    rows: list[Figures] = []
    for name in asked.problems:
        problem = PROBLEMS[name](asked.steps, asked.variance)
        for seed in range(asked.seeds):
            _, condition = problem.measurements(1, torch.Generator().manual_seed(1000 + seed))
            most = DRAWS
            for contender in asked.contenders.split(","):
                figures = one(problem, CONTENDERS[contender], condition, seed, asked.measurements)
                most = max(most, int(figures["reward_calls"]))  # type: ignore[call-overload]
                rows.append({"problem": name, "contender": contender, "seed": seed} | figures)
                say(rows[-1])
            generator = torch.Generator().manual_seed(seed)
            objects, figures = resampled(problem, condition, most, generator)
            figures |= {"log_z_exact": float(problem.log_z(condition)[0])}
            figures |= look_at(problem, condition, objects, generator)
            rows.append({"problem": name, "contender": "resampling", "seed": seed} | figures)
            say(rows[-1])
    command = ["python benchmarks/diffusion_known.py", *sys.argv[1:]]
    asked.output.write_text(json.dumps({"provenance": provenance(command), "load": load(), "rows": rows}, indent=1))
    asked.output.with_suffix(".md").write_text(report(rows, " ".join(command)))


COLUMNS = {
    "log_z_exact": "log Z", "lower": "lower", "log_z": "reweighted", "upper": "upper",
    "effective_sample_size": "ESS", "pareto_k": "k", "sliced_wasserstein": "sliced W (floor)",
    "wasserstein_of_500": "W, 500 draws (floor)", "total_variation": "TV", "total_variation_floor": "its floor",
    "modes_found": "found", "modes": "of", "chi_squared": "chi²", "chi_squared_exact": "exact",
    "reward_calls": "reward calls", "coverage_largest": "coverage off by", "coverage_largest_expected": "expected",
    "log_z_over_measurements": "log Z(y) off by",
}  # fmt: skip


def report(rows: list[Figures], command: str) -> str:
    """A table of all rows, and the command."""
    lines = ["# Samplers beside known posteriors", "", f"    {command}", ""]
    lines += ["| problem | seed | sampler | " + " | ".join(COLUMNS.values()) + " |", "|---" * (3 + len(COLUMNS)) + "|"]
    for row in rows:
        cells = [
            str(row["problem"]),
            str(row["seed"]),
            str(row["contender"]),
            *(shown(row.get(key)) for key in COLUMNS),
        ]
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines) + "\n"


def shown(value: object) -> str:
    if isinstance(value, tuple):
        return f"{value[0]:.3g} ({value[1]:.3g})"
    if value is None or (isinstance(value, float) and math.isnan(value)):
        return ""
    return f"{value:.3g}" if isinstance(value, float) and abs(value) < 100 else f"{float(str(value)):.0f}"


def say(row: Figures) -> None:
    print(
        row["problem"], row["seed"], row["contender"], *(f"{key} {shown(row.get(key))}" for key in COLUMNS), flush=True
    )


if __name__ == "__main__":
    main()
