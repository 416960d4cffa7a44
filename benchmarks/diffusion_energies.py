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
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from diffusion_known import RESULTS, Figures
from diffusion_modes import Method, cell, train
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


@dataclass(frozen=True)
class Contest:
    """An energy, the deviation of the normal distribution that the prior's chains end in, and how to learn."""

    energy: Energy
    deviation: float
    method: Method
    steps: int = 30

    @property
    def reward(self) -> Scaled:
        return Scaled(OverNormal(self.energy, self.deviation**2))


def learning(updates: int, fresh: int, replayed: int, seeded: int, rate: float, log_z_rate: float = 0.1) -> Training:
    return Training(
        updates, fresh, replayed, seeded, bool(replayed), learning_rate=rate, log_z_learning_rate=log_z_rate,
        schedule="cosine", log_every=updates,
    )  # fmt: skip


LANGEVIN = Adapter("correction", width=128, blocks=2, langevin=True)
VARIANCE, QUIET = Objective("vargrad"), ExplorationSettings(epsilon=0.0)
OWN = ReplaySettings(capacity=20_000, rule="uniform")
"""What the sampler has drawn lately, walked back anew."""

CONTESTS = {
    "25 Gaussians": Contest(
        Gaussians(),
        7.5,
        Method(
            "TB, a third walked back from a replay seeded with the prior's draws, waves of the state",
            learning(500, 128, 64, 2000, 3e-3),
            exploration=QUIET,
            adapter=Adapter("correction", width=128, blocks=2, octaves=6),
        ),
        steps=40,
    ),
    "funnel": Contest(
        Funnel(),
        2.0,
        Method(
            "VarGrad, a third walked back from the sampler's own draws, Langevin",
            learning(600, 128, 64, 0, 3e-3), VARIANCE, QUIET, OWN, LANGEVIN,
        ),
    ),
    "many wells": Contest(
        ManyWell(),
        1.5,
        Method(
            "VarGrad, a third walked back from the sampler's own draws, Langevin",
            learning(1000, 128, 64, 0, 3e-3), VARIANCE, QUIET, OWN, LANGEVIN,
        ),
    ),
}  # fmt: skip


def normal_prior(dimensions: int, steps: int) -> tuple[GaussianProcess, MixtureDenoiser]:
    """A chain whose ends are standard normal, and its denoiser."""
    process = even_chain(dimensions, steps)
    normal = GaussianMixture.of(torch.ones(1), torch.zeros(1, dimensions), 1.0)
    return process, MixtureDenoiser(normal, process)


def measured(contest: Contest, seed: int) -> Figures:
    """A run of one contest."""
    energy, reward, generator = contest.energy, contest.reward, torch.Generator().manual_seed(seed)
    process, prior = normal_prior(energy.dimensions, contest.steps)
    posterior, trainer, seconds = train(process, prior, reward, contest.method, seed, reward)
    rows = torch.empty(DRAWS, 0)
    drawn = draw_chains(process, prior, posterior, reward, rows, generator)
    exact = energy.sample(DRAWS, generator)
    above = walk_back(process, prior, posterior, reward, exact / reward.scale, rows, generator)
    found = log_z_estimates(drawn.log_ratio, drawn.log_reward, (above.log_ratio, above.log_reward))
    calls = trainer.search.drawn
    plain = resampling_estimates(reward(torch.randn(calls, energy.dimensions, generator=generator), rows))
    directions = random_directions(200, energy.dimensions, generator)
    points, others = reward.scale * drawn.objects, energy.sample(DRAWS, generator)
    return {
        "log_z_exact": energy.log_z,
        **found.figures(),
        "share": found.effective_sample_size / DRAWS,
        "gap": energy.log_z - found.lower,
        "reweighted_error": found.log_z - energy.log_z,
        "upper_gap": found.upper - energy.log_z,
        "sliced_wasserstein": sliced_wasserstein(points, exact, directions),
        "sliced_wasserstein_floor": sliced_wasserstein(others, exact, directions),
        "resampling_error": plain.log_z - energy.log_z,
        "resampling_share": plain.effective_sample_size / calls,
        "reward_calls": calls,
        "cpu_seconds": seconds,
        "settings": repr(contest.method),
        **modes(energy, points),
    }


def modes(energy: Energy, points: Tensor) -> Figures:
    """Total variation of the weights of 25 modes; or the share of right wells, over all pairs, and exactly."""
    if isinstance(energy, Gaussians):
        share = energy.mixture.responsibilities(points).mean(0)
        return {"total_variation": float((share - 1 / len(share)).abs().sum() / 2)}
    if isinstance(energy, ManyWell):
        return {"right": float((points[:, 0::2] > 0).double().mean()), "right_exact": energy.right}
    return {}


COLUMNS = {
    "gap": "log Z less lower bound", "reweighted_error": "reweighted less log Z", "upper_gap": "upper bound less log Z",
    "share": "ESS", "sliced_wasserstein": "sliced W2", "sliced_wasserstein_floor": "exact draws",
    "resampling_error": "resampling less log Z", "resampling_share": "its ESS", "reward_calls": "reward calls",
    "cpu_seconds": "CPU s",
}  # fmt: skip


def report(content: dict[str, object]) -> str:
    rows: list[Figures] = content["rows"]  # type: ignore[assignment]
    facts: dict[str, object] = content["provenance"]  # type: ignore[assignment]
    lines = [
        "# Samplers from energies alone",
        "",
        "Can relative trajectory balance draw from a density of which only the energy is given? The prior is a chain "
        "whose ends are normal, the reward the target's density over theirs. The lower bound and the reweighted "
        f"estimate of log Z, from {DRAWS:,} draws, stand beside those published for the same energies.",
        "",
        "| energy | log Z | runs | " + " | ".join(COLUMNS.values()) + " |",
        "|---" * (3 + len(COLUMNS)) + "|",
    ]
    for name, contest in CONTESTS.items():
        mine = [row for row in rows if row["energy"] == name]
        if mine:
            cells = " | ".join(cell(mine, key) for key in COLUMNS)
            lines.append(
                f"| {name}, d = {contest.energy.dimensions} | {contest.energy.log_z:.4g} | {len(mine)} | {cells} |"
            )
    lines += [
        "",
        "| energy | here: gap, error | TB, exploration, local search | PIS, Langevin | gap reached | error reached |",
        "|---|---|---|---|---|---|",
    ]
    for name in CONTESTS:
        mine = [row for row in rows if row["energy"] == name]
        if mine:
            lines.append(compared(name, mine))
    lines += ["", *notes(rows), "", f"    {facts['command']}", ""]
    lines += [
        f"{facts['cpu']}, one thread, other work on the machine (load {content['load']}); CPU seconds are of the "
        f"training. {facts['date']}, commit {facts['commit']}. Settings of each run: "
        "[diffusion-energies.json](diffusion-energies.json).",
    ]
    return "\n".join(lines) + "\n"


def compared(name: str, rows: list[Figures]) -> str:
    """A row of the second table: the goal is the published figure of the third column."""
    gap = sum(float(str(row["gap"])) for row in rows) / len(rows)
    error = sum(abs(float(str(row["reweighted_error"]))) for row in rows) / len(rows)
    others = list(PUBLISHED[name].values())
    reached = ["yes" if mine <= other + 0.005 else "no" for mine, other in zip((gap, error), others[0], strict=True)]
    said = [f"{one:.3g} / {two:.3g}" for one, two in ((gap, error), *others)]
    return f"| {name} | " + " | ".join([*said, *reached]) + " |"


def notes(rows: list[Figures]) -> list[str]:
    methods = {str(row["energy"]): CONTESTS[str(row["energy"])] for row in rows}
    lines = [
        f"- {name}: {contest.method.text}; {contest.method.training.iterations:,} updates on "
        f"{contest.method.training.batch_size} + {contest.method.training.replayed} chains of {contest.steps} steps, "
        f"prior of deviation {contest.deviation:g}."
        for name, contest in methods.items()
    ]
    for row in rows:
        if "total_variation" in row:
            text = f"total variation of the weights of the 25 modes {float(str(row['total_variation'])):.3f}"
        elif "right" in row:
            text = f"share of right wells {float(str(row['right'])):.3f}, exactly {float(str(row['right_exact'])):.3f}"
        else:
            continue
        lines.append(f"- {row['energy']}, seed {row['seed']}: {text}.")
    lines += [
        "- Resampling: importance resampling of the prior's ends at as many reward calls. ESS: effective sample size "
        "over the number of draws. Published: Sendera et al. 2024 (arXiv 2402.05098, table 1), means of 5 runs with "
        "chains of 100 steps, which trained for longer.",
    ]
    return lines


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--energies", default=",".join(CONTESTS), help="which, by name, with commas")
    parser.add_argument("--seeds", type=int, default=1)
    parser.add_argument("--output", type=Path, default=RESULTS / "diffusion-energies.json")
    asked = parser.parse_args()
    torch.set_num_threads(1)
    rows: list[Figures] = json.loads(asked.output.read_text())["rows"] if asked.output.exists() else []
    done = {(row["energy"], row["seed"]) for row in rows}
    for name in asked.energies.split(","):
        for seed in range(asked.seeds):
            if (name, seed) not in done:
                rows.append({"energy": name, "seed": seed} | measured(CONTESTS[name], seed))
                print(name, seed, *(f"{key} {cell(rows[-1:], key)}" for key in COLUMNS), flush=True)
            command = ["python benchmarks/diffusion_energies.py", f"--seeds {asked.seeds}"]
            content: dict[str, object] = {"provenance": provenance(command), "load": load(), "rows": rows}
            asked.output.write_text(json.dumps(content, indent=1) + "\n")
            asked.output.with_suffix(".md").write_text(report(content))


if __name__ == "__main__":
    main()
