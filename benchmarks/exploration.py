"""Trajectories until every mode is found on the deceptive hypergrid (Kim et al. 2025, arXiv 2410.01432): trajectory
balance on policy, with epsilon, with local search, with Thompson sampling and with the adaptive teacher.

    python benchmarks/exploration.py --dimensions 2 --side 64 --iterations 1000 --seeds 5

Every method has the same network, learning rates, batch size and number of iterations. A trajectory counts whoever
drew it, candidates of local search included; a reward call is the first time that an object is scored. A run that ends
before it has found every mode is censored: its count stands as > the cap, and sorts above all others in the median.
"""

from __future__ import annotations

import json
import math
import sys
import time
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
import tyro
from torch import Tensor

from headwater.conditions import NoCondition
from headwater.environments import Hypergrid, HypergridReward
from headwater.environments.base import Objects, identity
from headwater.evaluation import ExactDistribution
from headwater.objectives import Objective
from headwater.policies import EnvironmentPolicy, Network
from headwater.runs import provenance
from headwater.search import LocalSearch, TeacherSettings, ThompsonSettings
from headwater.training import ExplorationSettings, Trainer, Training

R0, R1, R2 = 1e-5, 0.1, 2.0
METHODS = {
    "on policy": ExplorationSettings(epsilon=0.0),
    "epsilon 0.1": ExplorationSettings(epsilon=0.1, epsilon_end=0.1),
    "local search": ExplorationSettings(epsilon=0.0, local_search=LocalSearch(rounds=3)),
    "local search, greedy": ExplorationSettings(epsilon=0.0, local_search=LocalSearch(rounds=3, accept="greedy")),
    "thompson": ExplorationSettings(epsilon=0.0, thompson=ThompsonSettings(heads=10)),
    "teacher": ExplorationSettings(epsilon=0.0, teacher=TeacherSettings(share=0.5)),
}


@dataclass(frozen=True)
class Benchmark:
    """What to measure."""

    dimensions: int = 2
    """Axes of the grid, D: it has 2^D modes."""
    side: int = 64
    """Cells along an axis."""
    iterations: int = 1000
    """Gradient steps of a run, the cap."""
    batch_size: int = 16
    """Trajectories an iteration, local search included."""
    seeds: int = 5
    """Runs of each method."""
    methods: tuple[str, ...] = tuple(METHODS)
    """Which methods."""
    out: Path = Path("benchmarks/results/exploration.json")
    """File for the results; those of other grids in it are kept."""


@dataclass
class Watch:
    """The reward, watched: which modes have been met, and after how many trajectories and distinct objects."""

    reward: HypergridReward
    modes: int
    asked: int = 0
    objects: set[int] = field(default_factory=set)
    found: dict[int, tuple[int, int]] = field(default_factory=dict)

    def __call__(self, objects: Objects, condition: Tensor) -> Tensor:
        cells = torch.as_tensor(objects)
        log_reward = self.reward(cells, condition)
        self.asked += len(cells)
        self.objects.update(identity(cells).tolist())
        high = cells[log_reward > math.log(R2)]
        corner = ((2 * high > self.reward.side - 1) * 2 ** torch.arange(cells.shape[1])).sum(1)
        for mode in set(corner.tolist()) - self.found.keys():
            self.found[mode] = (self.asked, len(self.objects))
        return log_reward

    @property
    def all_found(self) -> tuple[int, int] | None:
        """Trajectories and distinct objects after which every mode had been met, to within a batch."""
        return max(self.found.values()) if len(self.found) == self.modes else None


def measure(method: str, seed: int, benchmark: Benchmark, exact: ExactDistribution) -> dict[str, object]:
    """One run."""
    torch.manual_seed(seed)
    watch = Watch(HypergridReward(benchmark.side, R0, R1, R2, "deceptive"), 2**benchmark.dimensions)
    policy = EnvironmentPolicy(Hypergrid(benchmark.dimensions, benchmark.side), Network(), "uniform")
    training = Training(benchmark.iterations, benchmark.batch_size, schedule="constant")
    trainer = Trainer(policy, watch, NoCondition(), Objective("tb"), training, METHODS[method], seed=seed)
    began = time.process_time()
    trainer.run(progress_bar=False)
    trajectories, calls = watch.all_found or (None, None)
    return {
        "method": method,
        "seed": seed,
        "modes": len(watch.found),
        "trajectories": trajectories,
        "reward_calls": calls,
        "total_variation": exact.compare(policy)["total_variation"],
        "cpu_seconds": round(time.process_time() - began, 1),
    }


def median_and_range(values: list[float | None], cap: str, digits: int = 0) -> str:
    """ "median (lowest to highest)"; None, a censored run, is the largest of all."""
    ordered = sorted(math.inf if value is None else value for value in values)
    middle = (ordered[(len(ordered) - 1) // 2] + ordered[len(ordered) // 2]) / 2
    shown = [cap if value == math.inf else f"{value:,.{digits}f}" for value in (middle, ordered[0], ordered[-1])]
    return f"{shown[0]} ({shown[1]} to {shown[2]})"


def table(runs: list[dict[str, object]], benchmark: Benchmark) -> str:
    modes, cap = 2**benchmark.dimensions, f">{benchmark.iterations * benchmark.batch_size:,}"
    lines = [
        f"| method | runs that found all {modes} modes | trajectories until then | distinct objects scored until then "
        "| total variation at the end | CPU s |",
        "|---|---|---|---|---|---|",
    ]
    for method in dict.fromkeys(str(run["method"]) for run in runs):
        mine = [run for run in runs if run["method"] == method]

        def column(name: str, mine: list[dict[str, object]] = mine) -> list[float | None]:
            return [None if run[name] is None else float(str(run[name])) for run in mine]

        done = sum(run["trajectories"] is not None for run in mine)
        lines.append(
            f"| {method} | {done} of {len(mine)} | {median_and_range(column('trajectories'), cap)} "
            f"| {median_and_range(column('reward_calls'), 'not all')} "
            f"| {median_and_range(column('total_variation'), '', 3)} | {median_and_range(column('cpu_seconds'), '')} |"
        )
    return "\n".join(lines)


def main(benchmark: Benchmark) -> None:
    torch.set_num_threads(1)
    grid = f"{benchmark.side}^{benchmark.dimensions}"
    reward = HypergridReward(benchmark.side, R0, R1, R2, "deceptive")
    exact = ExactDistribution(Hypergrid(benchmark.dimensions, benchmark.side), reward)
    runs = []
    for seed in range(benchmark.seeds):  # methods interleaved, so that a busy machine slows all alike
        for method in benchmark.methods:
            runs.append(measure(method, seed, benchmark, exact))
            print(json.dumps(runs[-1]), flush=True)
        known = json.loads(benchmark.out.read_text()) if benchmark.out.exists() else {}
        settings = {name: value for name, value in asdict(benchmark).items() if name != "out"}
        known[grid] = {"settings": settings, **provenance(sys.argv, 0), "runs": runs}
        benchmark.out.parent.mkdir(parents=True, exist_ok=True)
        benchmark.out.write_text(json.dumps(known, indent=1) + "\n")
        benchmark.out.with_suffix(".md").write_text(page(known))
    print(f"\n{table(runs, benchmark)}")


def page(known: dict[str, Any]) -> str:
    """What has been measured, as Markdown, one section a grid."""
    sections = ["# Trajectories until every mode of the deceptive hypergrid is found"]
    for grid, record in known.items():
        hardware = record["hardware"]
        sections += [
            f"## {grid}, R0 = {R0}, R1 = {R1}, R2 = {R2}",
            f"    python {' '.join(record['command'])}",
            f"{hardware['cpu']}, {hardware['cores']} cores, {record['started']}, torch {record['versions']['torch']}. "
            "Median (range) over the seeds; `>` where a run was stopped before it had found all.",
            table(record["runs"], Benchmark(**record["settings"])),
        ]
    return "\n\n".join(sections) + "\n"


if __name__ == "__main__":
    main(tyro.cli(Benchmark, description=__doc__))
