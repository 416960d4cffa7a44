"""What asynchronous search is for: a reward of 50 ms an object, searched inline and in 1, 2 and 4 worker processes.

The reward sleeps, as one that waits for a laboratory's server or another program does, so it needs no core. The target
is a hypergrid of 144 cells, so the distance from it is exact. Weights are kept as training goes on, and measured when
it is over: the clock runs for searching and learning alone.

    python benchmarks/slow_reward.py --seeds 0 1 2     # about 12 minutes; seeds run side by side
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
import time
from pathlib import Path

import torch
from torch import Tensor

from headwater.conditions import NoCondition
from headwater.environments.base import Objects
from headwater.environments.hypergrid import Hypergrid, HypergridReward
from headwater.evaluation import ExactDistribution
from headwater.objectives import Objective
from headwater.policies import EnvironmentPolicy, Network
from headwater.replay import ReplaySettings
from headwater.report.figures import line_figure
from headwater.runs import provenance
from headwater.search import SearchSettings
from headwater.training import ExplorationSettings, Trainer, Training

SIDE, R0 = 12, 0.1
BATCH, REPLAYED = 16, 48
QUALITY = 0.05
RESULTS = Path(__file__).parent / "results"
GRID = HypergridReward(SIDE, R0)


class SlowReward:
    """The hypergrid's reward, `delay` seconds late for each object."""

    def __init__(self, delay: float) -> None:
        self.delay = delay

    def __call__(self, objects: Objects, condition: Tensor) -> Tensor:
        time.sleep(self.delay * len(objects))
        return GRID(objects, condition)


def new_trainer(processes: int, delay: float, iterations: int, seed: int) -> Trainer:
    torch.manual_seed(seed)
    policy = EnvironmentPolicy(Hypergrid(2, SIDE), Network(width=128), "learned")
    training = Training(iterations=iterations, batch_size=BATCH, replayed=REPLAYED, learning_rate=5e-3)
    return Trainer(
        policy, SlowReward(delay), NoCondition(), Objective("tb"), training, ExplorationSettings(epsilon=0.1),
        ReplaySettings(capacity=10_000, rule="uniform"), seed, search=SearchSettings(searchers=processes),
    )  # fmt: skip


def measure(processes: int, delay: float, iterations: int, seed: int, every: int) -> dict[str, object]:
    """Train once. Returns total variation by seconds of wall-clock time, and how the search went."""
    torch.set_num_threads(1)
    warm = new_trainer(0, 0.0, 3, seed)  # compiles the native code
    warm.run(progress_bar=False)
    trainer = new_trainer(processes, delay, iterations, seed)
    exact = ExactDistribution(trainer.policy.environment, GRID)  # type: ignore[arg-type]
    kept, waiting = [], []
    began = time.perf_counter()
    try:
        while trainer.iteration < iterations:
            trainer.update()
            if trainer.iteration % every == 0:
                weights = {name: tensor.clone() for name, tensor in trainer.policy.state_dict().items()}
                kept.append((time.perf_counter() - began, trainer.iteration, weights))
                waiting.append(trainer.search.metrics())
    finally:
        trainer.search.close()
    curve = []
    for seconds, iteration, weights in kept:
        trainer.policy.load_state_dict(weights)
        curve.append((seconds, iteration, exact.compare(trainer.policy)["total_variation"]))
    names = ("staleness_mean", "learner_idle", "worker_idle")
    shares = {
        name: statistics.fmean(row[f"search/{name}"] for row in waiting if f"search/{name}" in row)
        for name in names
        if any(f"search/{name}" in row for row in waiting)
    }
    return {"processes": processes, "seed": seed, "curve": curve, "drawn": trainer.search.drawn, **shares}


def time_to(curve: list[tuple[float, int, float]], quality: float) -> float:
    """Seconds until total variation is below `quality` and stays there."""
    above = [i for i, (_, _, distance) in enumerate(curve) if distance >= quality]
    first = above[-1] + 1 if above else 0
    return curve[first][0] if first < len(curve) else float("nan")


def side_by_side(options: argparse.Namespace) -> list[dict[str, object]]:
    """Every search, each with all seeds at once in processes of their own."""
    runs = []
    for processes in options.processes:
        command = [
            sys.executable, __file__, "--one", str(processes), "--delay", str(options.delay), "--iterations",
            str(options.iterations), "--every", str(options.every), "--seeds",
        ]  # fmt: skip
        started = [subprocess.Popen([*command, str(seed)], stdout=subprocess.PIPE, text=True) for seed in options.seeds]
        for process in started:
            output, _ = process.communicate()
            if process.returncode:
                raise SystemExit(f"a run ended with status {process.returncode}")
            runs.append(json.loads(output))
            print(processes, runs[-1]["seed"], time_to(runs[-1]["curve"], QUALITY), file=sys.stderr)
    return runs


def write(runs: list[dict[str, object]], options: argparse.Namespace, made: dict[str, object]) -> None:
    """JSON, table and curves into `RESULTS`; `made` says where, when and with what the runs were made."""
    RESULTS.mkdir(exist_ok=True)
    content = {
        "settings": vars(options) | {"side": SIDE, "r0": R0, "batch": BATCH, "replayed": REPLAYED, "quality": QUALITY},
        **made,
        "runs": runs,
    }
    (RESULTS / "slow_reward.json").write_text(json.dumps(content, indent=1) + "\n")
    curves, rows = {}, []
    base = None
    for processes in options.processes:
        mine = [run for run in runs if run["processes"] == processes]
        reached = [time_to(run["curve"], QUALITY) for run in mine]  # type: ignore[arg-type]
        whole = [run["curve"][-1][0] for run in mine]  # type: ignore[index]
        last = [run["curve"][-1][2] for run in mine]  # type: ignore[index]
        base = base or (statistics.fmean(reached), statistics.fmean(whole))
        name = "inline" if not processes else f"{processes} process{'es' * (processes > 1)}"
        points = list(zip(*(run["curve"] for run in mine), strict=True))  # type: ignore[misc]
        curves[name] = (
            [statistics.fmean(point[0] for point in at) for at in points],
            [statistics.fmean(point[2] for point in at) for at in points],
        )
        shares = [
            " / ".join(f"{run.get(share, float('nan')):.2f}" for run in mine) if processes else ""
            for share in ("staleness_mean", "learner_idle", "worker_idle")
        ]
        rows.append(
            f"| {name} | {spread(reached)} | {base[0] / statistics.fmean(reached):.2f} | {spread(whole)} "
            f"| {base[1] / statistics.fmean(whole):.2f} | {spread(last, 4)} | {' | '.join(shares)} |"
        )
    title = f"Exact total variation by wall-clock time, {1000 * options.delay:g} ms an object"
    svg = line_figure(curves, x_label="seconds", title=title, log_y=True, size=(6.4, 3.6))
    (RESULTS / "slow_reward.svg").write_text(svg + "\n")
    hardware, versions = content["hardware"], ", ".join(f"{name} {is_}" for name, is_ in content["versions"].items())
    text = f"""# A reward of {1000 * options.delay:g} ms an object

    {" ".join(["python", *sys.argv])}

A hypergrid of {SIDE} x {SIDE} cells (R0 = {R0}), trajectory balance, {options.iterations} updates of {BATCH} fresh and
{REPLAYED} replayed trajectories; every object is paid for, nothing is cached. {len(options.seeds)} seeds, run side by
side; mean and range. Time to quality: seconds until the exact total variation is below {QUALITY} and stays there,
looked at every {options.every} updates.

| search | time to quality, s | faster | all updates, s | faster | total variation at the end | staleness | \
learner idle | workers idle |
|---|---|---|---|---|---|---|---|---|
{chr(10).join(rows)}

Staleness is in updates; idle as a share of wall-clock time; both for each seed. A reward that sleeps needs no core, so
more workers than cores help here; one that computes does not have that.

![The curves](slow_reward.svg)

{hardware["cpu"]}, {hardware["cores"]} cores, shared with other work; {versions}; {content["started"]}.
"""  # type: ignore[index]
    (RESULTS / "slow_reward.md").write_text(text)


def spread(values: list[float], digits: int = 1) -> str:
    return f"{statistics.fmean(values):.{digits}f} ({min(values):.{digits}f} to {max(values):.{digits}f})"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--processes", type=int, nargs="+", default=[0, 1, 2, 4], help="0 is inline")
    parser.add_argument("--delay", type=float, default=0.05, help="seconds an object")
    parser.add_argument("--iterations", type=int, default=300)
    parser.add_argument("--every", type=int, default=10, help="updates between two measurements")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--one", type=int, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.one is not None:
        print(json.dumps(measure(options.one, options.delay, options.iterations, options.seeds[0], options.every)))
        return
    del options.one
    made = provenance(["python", *sys.argv], 0)
    write(side_by_side(options), options, made)


if __name__ == "__main__":
    main()
