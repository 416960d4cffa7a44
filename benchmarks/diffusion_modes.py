"""Which modes a posterior sampler finds, and with what weights: nine of twenty-five Gaussians, the first experiment of
relative trajectory balance (Venkatraman et al. 2024, arXiv 2405.20971, appendix C.1), by where its chains come from.

    python benchmarks/diffusion_modes.py --seeds 3 --others 1

All methods train one network by as many updates on as many chains, on a prior whose denoiser is known in closed form.
Writes results/diffusion-modes.json after every run, and .md; runs that are there already are not done again.
"""

from __future__ import annotations

import argparse
import json
import math
import time
from dataclasses import dataclass, field
from pathlib import Path

import torch
from torch import Tensor, nn

from diffusion_known import DRAWS, RESULTS, Figures, Problem, closed_form, look_at, nine, one, prior, resampled
from headwater.conditions import NoCondition
from headwater.diffusion.adapters import Adapter, LogLikelihood
from headwater.diffusion.denoisers import Denoiser
from headwater.diffusion.policy import DiffusionPolicy
from headwater.diffusion.priors import Prior
from headwater.diffusion.process import Process
from headwater.objectives import Objective
from headwater.replay import ReplaySettings
from headwater.reward import Reward
from headwater.training import ExplorationSettings, Trainer, Training
from provenance import load, provenance

STEPS, UPDATES, CHAINS, SEEDED = 20, 1200, 192, 2000


@dataclass(frozen=True)
class Method:
    """How a posterior is trained. text: where its chains come from, for a table."""

    text: str
    training: Training
    objective: Objective = field(default_factory=lambda: Objective("tb", "huber"))
    exploration: ExplorationSettings = field(default_factory=lambda: ExplorationSettings(epsilon=0.0))
    replay: ReplaySettings = field(default_factory=lambda: ReplaySettings(rule="softmax"))
    adapter: Adapter = field(default_factory=lambda: Adapter("correction", width=128, blocks=2, octaves=4))


def training(fresh: int, replayed: int = 0, only: bool = False) -> Training:
    """`fresh` chains of an update are drawn, `replayed` are walked back from a replay that prior draws have seeded."""
    return Training(
        UPDATES, fresh, replayed, SEEDED if replayed else 0, bool(replayed), only,
        learning_rate=3e-3, schedule="cosine", log_every=UPDATES,
    )  # fmt: skip


METHODS = {
    "seeded": Method(
        "two thirds on-policy, one third walked back from a replay seeded with the prior's draws and read in "
        "proportion to r; TB",
        training(128, 64),
    ),
    "replay alone": Method("all walked back from the same replay; TB", training(16, CHAINS, only=True)),
    "on-policy TB": Method("on-policy; TB", training(CHAINS)),
    "on-policy variance": Method(
        "on-policy; VarGrad, whose gradient is that of REINFORCE on log r with a divergence from the prior",
        training(CHAINS),
        Objective("vargrad"),
    ),
    "tempered": Method(
        "steps of 1.5 times the variance; TB", training(CHAINS), exploration=ExplorationSettings(0.0, temperature=1.5)
    ),
    "prior's chains": Method(
        "half by the prior, falling to none at the end; TB",
        training(CHAINS),
        exploration=ExplorationSettings(epsilon=0.5, decay=1.0),
    ),
}


def train(
    process: Process, denoiser: Denoiser, reward: Reward, method: Method, seed: int,
    log_likelihood: LogLikelihood | None = None,
) -> tuple[nn.Module, Trainer, float]:  # fmt: skip
    """The posterior's denoiser, its trainer, and the CPU seconds that it took."""
    torch.manual_seed(seed)
    posterior = method.adapter.posterior(Prior(process, denoiser), 0, log_likelihood)
    policy = DiffusionPolicy(process, denoiser, posterior)
    replay = method.replay if method.training.replayed else None
    trainer = Trainer(
        policy, reward, NoCondition(), method.objective, method.training, method.exploration, replay, seed
    )
    began = time.process_time()
    trainer.run(progress_bar=False)
    sampler = trainer.sampler
    assert isinstance(sampler, DiffusionPolicy)
    return sampler.posterior, trainer, time.process_time() - began


def trained(problem: Problem, method: Method, seed: int) -> Figures:
    """A run of one method, measured."""
    took: list[float] = []

    def contender(problem: Problem, condition: Tensor, seed: int) -> tuple[nn.Module, int]:
        assert isinstance(problem.prior, Denoiser)
        denoiser, trainer, seconds = train(problem.process, problem.prior, problem.reward, method, seed)
        took.append(seconds)
        return denoiser, trainer.search.drawn

    figures = one(problem, contender, torch.empty(1, 0), seed, 0)
    return figures | {"cpu_seconds": took[0], "settings": repr(method)}


def reference(problem: Problem, name: str, calls: int, seed: int) -> Figures:
    """What needs no training: the prior, the closed-form posterior, importance resampling, exact draws."""
    generator, condition = torch.Generator().manual_seed(seed), torch.empty(1, 0)
    if name == "prior":
        return one(problem, prior, condition, seed, 0)
    if name == "closed form":
        return one(problem, closed_form, condition, seed, 0)
    if name == "exact draws":
        return look_at(problem, condition, problem.posterior(condition[0]).sample(DRAWS, generator), generator)
    objects, figures = resampled(problem, condition, calls, generator)
    share = float(str(figures["effective_sample_size"])) * DRAWS / calls  # as if of DRAWS, like everyone's
    return figures | {"effective_sample_size": share} | look_at(problem, condition, objects, generator)


REFERENCES = ("prior", "closed form", "resampling, 2000 calls", "resampling, equal calls", "exact draws")


def runs(seeds: int, others: int) -> list[tuple[str, int]]:
    """What to do, the first method with `seeds` seeds and all others with `others`."""
    learned = [("seeded", seed) for seed in range(seeds)]
    learned += [(name, seed) for name in METHODS if name != "seeded" for seed in range(others)]
    return [*((name, 0) for name in REFERENCES), *learned]


def run(problem: Problem, name: str, seed: int) -> Figures:
    if name in METHODS:
        return trained(problem, METHODS[name], seed)
    seeded = METHODS["seeded"].training
    calls = SEEDED if "2000" in name else SEEDED + seeded.iterations * seeded.batch_size
    return reference(problem, name, calls, seed)


COLUMNS = {
    "modes_found": "modes of 9", "total_variation": "TV of mode weights", "log_z": "log Z, reweighted (exactly 0)",
    "lower": "lower bound", "upper": "upper bound", "share": "ESS", "wasserstein_of_500": "W2 of 500 draws",
    "reward_calls": "reward calls", "cpu_seconds": "CPU s",
}  # fmt: skip


def cell(rows: list[Figures], key: str) -> str:
    """The mean over runs, and the lowest and highest."""
    found = [value[0] if isinstance(value := row.get(key), (tuple, list)) else value for row in rows]
    values = [float(str(value)) for value in found if value is not None]
    if not values or any(math.isnan(value) for value in values):
        return ""
    digits = 0 if key in ("modes_found", "reward_calls", "cpu_seconds") else 2 if key != "total_variation" else 3
    mean, low, high = (f"{value:,.{digits}f}" for value in (sum(values) / len(values), min(values), max(values)))
    return mean if low == high else f"{mean} ({low} to {high})"


def verdict(rows: list[Figures]) -> list[str]:
    """Which goals the seeded runs reach, all of them."""
    if not rows:
        return []
    reached = {
        "all modes found": all(row["modes_found"] == row["modes"] for row in rows),
        "total variation at most 0.08": all(float(str(row["total_variation"])) <= 0.08 for row in rows),
        "reweighted log Z within 0.05 of 0": all(abs(float(str(row["log_z"]))) <= 0.05 for row in rows),
        "effective sample size at least 0.4": all(float(str(row["share"])) >= 0.4 for row in rows),
        "under 6 minutes of one core": all(float(str(row["cpu_seconds"])) < 360 for row in rows),
    }
    said = (f"{goal}: {'reached' if yes else 'missed'}" for goal, yes in reached.items())
    return [f"Goals, for every one of {len(rows)} runs of the first method: {'; '.join(said)}.", ""]


def report(content: dict[str, object]) -> str:
    rows: list[Figures] = content["rows"]  # type: ignore[assignment]
    by_name = {name: [row for row in rows if row["method"] == name] for name in (*METHODS, *REFERENCES)}
    floor = [float(str(row["total_variation_floor"])) for row in rows if "total_variation_floor" in row]
    w_floor = [float(str(row["wasserstein_of_500"][1])) for row in rows]  # type: ignore[index]
    facts: dict[str, object] = content["provenance"]  # type: ignore[assignment]
    lines = [
        "# Which modes a posterior sampler finds",
        "",
        "The prior is 25 equal Gaussians, the reward makes of it 9 of them with unequal weights (log Z = 0). Does a "
        "posterior that is trained by relative trajectory balance find all nine, with their weights? And what does it "
        "matter where its chains come from? One network, "
        f"{UPDATES:,} updates on {CHAINS} chains of {STEPS} steps each; the prior's denoiser is the closed form, so "
        "that errors are those of the training.",
        "",
        *verdict(by_name["seeded"]),
        "| method | runs | " + " | ".join(COLUMNS.values()) + " |",
        "|---" * (2 + len(COLUMNS)) + "|",
    ]
    for name, mine in by_name.items():
        if mine:
            text = f"{name}: {METHODS[name].text}" if name in METHODS else name
            lines.append(f"| {text} | {len(mine)} | " + " | ".join(cell(mine, key) for key in COLUMNS) + " |")
    lines += [
        "",
        f"Means over runs (lowest to highest), of {DRAWS:,} draws of a run. A mode counts as found if it has at least "
        f"a fifth of its weight. Floors of exact draws: TV {sum(floor) / len(floor):.3f}, "
        f"W2 {sum(w_floor) / len(w_floor):.2f}. ESS: effective sample size of the weighted draws, over their number; "
        "the closed form has less than 1, since its steps are finite. Bounds on log Z are means over chains: drawn "
        "by the sampler (lower), and walked back from exact draws (upper, the larger the more of the posterior is "
        "missed). Equal calls: as many as the first method asks for.",
        "",
        f"    {facts['command']}",
        "",
        f"{facts['cpu']}, one thread, other work on the machine (load {content['load']}); CPU seconds are of the "
        f"training. {facts['date']}, commit {facts['commit']}. Settings of each run: "
        "[diffusion-modes.json](diffusion-modes.json).",
    ]
    return "\n".join(lines) + "\n"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, default=3, help="of the first method")
    parser.add_argument("--others", type=int, default=1, help="seeds of every other")
    parser.add_argument("--output", type=Path, default=RESULTS / "diffusion-modes.json")
    asked = parser.parse_args()
    torch.set_num_threads(1)
    problem = nine(STEPS, "learned")
    rows: list[Figures] = json.loads(asked.output.read_text())["rows"] if asked.output.exists() else []
    done = {(row["method"], row["seed"]) for row in rows}
    for name, seed in runs(asked.seeds, asked.others):
        if (name, seed) not in done:
            figures = run(problem, name, seed)
            size = figures.get("effective_sample_size")
            share = {} if size is None else {"share": float(str(size)) / DRAWS}
            rows.append({"method": name, "seed": seed} | figures | share)
            print(name, seed, *(f"{key} {cell(rows[-1:], key)}" for key in COLUMNS), flush=True)
        command = ["python benchmarks/diffusion_modes.py", f"--seeds {asked.seeds}", f"--others {asked.others}"]
        content: dict[str, object] = {"provenance": provenance(command), "load": load(), "rows": rows}
        asked.output.write_text(json.dumps(content, indent=1) + "\n")
        asked.output.with_suffix(".md").write_text(report(content))


if __name__ == "__main__":
    main()
