"""What `speed.py` measures: one function a question, each returning plain numbers for the results file."""

from __future__ import annotations

import pickle
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import asdict, dataclass, replace
from itertools import product
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from contenders.protocol import Task
from contenders.weights import leaving_after, saved, trained, untrained
from contest import OURS, Runtime, Worker, ratios, spread, take_turns
from headwater.environments.graph import StateGraph
from headwater.evaluation import ExactDistribution
from headwater.policies import EnvironmentPolicy
from headwater.recipes.hypergrid import HypergridRecipe
from provenance import load

STILL = {"learning_rate": 0.0, "log_z_learning_rate": 0.0}
TASKS = {
    "hypergrid-tb": Task(**STILL),
    "hypergrid-db": Task(objective="db", **STILL),
    "hypergrid-subtb": Task(objective="subtb", **STILL),
    "bits-tb": Task(environment="bits", log_z_learning_rate=0.05, epsilon=1e-3, epsilon_end=1e-3),
    "sequences-tb": Task(environment="sequences", learning_rate=5e-4, log_z_learning_rate=0.05),
}
LENGTH_DRAWS = 512
Numbers = dict[str, object]


@dataclass(frozen=True)
class Bench:
    """Who takes part, how long a turn lasts, how many there are, and a folder for what the contenders read."""

    runtimes: dict[str, Runtime]
    folder: Path
    rounds: int
    seconds: float
    say: Callable[[str], None]

    def names(self, task: Task) -> list[str]:
        """The contenders that have this task: torchgfn has no sequences of fixed length with an exit; gfnx with its
        logging is measured on one task only."""
        chosen = [name for name in self.runtimes if not (name == "torchgfn" and task.environment == "sequences")]
        plain = task.environment == "hypergrid" and task.objective == "tb"
        return chosen if plain else [name for name in chosen if name != "gfnx with logging"]

    @contextmanager
    def contenders(self, tasks: dict[str, Task], threads: int) -> Iterator[dict[str, Worker]]:
        """Live workers by name, each with its task."""
        with ExitStack() as stack:
            workers = {}
            for name, task in tasks.items():
                extra = {"logging": True} if name == "gfnx with logging" else {}
                if task.environment == "sequences":
                    extra |= {"table": str(self.folder / "table.csv")}
                chosen = replace(task, settings=task.settings | extra)
                workers[name] = stack.enter_context(Worker(self.runtimes[name], chosen, threads, self.folder))
            yield workers


def iterations(bench: Bench, task_name: str, regime: str, threads: int) -> Numbers:
    """One iteration, everybody at the same weights: `regime` is start, trained, or own (their own initialisation,
    where lengths do not depend on it)."""
    task = TASKS[task_name]
    with bench.contenders(dict.fromkeys(bench.names(task), task), threads) as workers:
        if regime != "own":
            for worker in workers.values():
                worker.ask(do="load", weights=str(weights_file(bench.folder, task, regime)))
        return {"task": task_name, "regime": regime, "threads": threads} | _compared(bench, workers)


def by_length(bench: Bench, steps: Sequence[float], task: Task) -> list[Numbers]:
    """Iterations at one horizon, over the mean length of a trajectory."""
    found = []
    with bench.contenders(_two(bench, task), 1) as workers:
        for count in steps:
            path = saved(leaving_after(task.dimensions, task.side, count), bench.folder / "leaving.npz")
            for worker in workers.values():
                worker.ask(do="load", weights=str(path))
            found.append({"steps": count} | _compared(bench, workers))
    return found


def by_horizon(bench: Bench, sides: Sequence[int], steps: float, task: Task) -> list[Numbers]:
    """Iterations at one mean length, over the longest trajectory possible: dimensions * (side - 1) + 1 steps."""
    found = []
    for side in sides:
        longer = replace(task, side=side)
        path = saved(leaving_after(task.dimensions, side, steps), bench.folder / "leaving.npz")
        with bench.contenders(_two(bench, longer), 1) as workers:
            for worker in workers.values():
                worker.ask(do="load", weights=str(path))
            horizon = task.dimensions * (side - 1) + 1
            found.append({"side": side, "horizon": horizon} | _compared(bench, workers))
    return found


def training(bench: Bench, count: int, threads: int, seed: int, chunks: int = 20) -> Numbers:
    """A whole run of `count` iterations with real learning: the lengths grow as the sampler learns."""
    task = Task(
        epsilon=0.1, epsilon_end=0.0, epsilon_iterations=max(1, round(count * 0.48)), iterations=count, seed=seed
    )  # the share of exploring iterations is that of gfnx's configuration, 30,000 of 62,500
    exact = Exact(task, bench.folder)
    names = [name for name in (OURS, "gfnx") if name in bench.runtimes]
    size = max(1, count // chunks)
    with bench.contenders(dict.fromkeys(names, task), threads) as workers:
        history: dict[str, list[dict[str, float]]] = {name: [] for name in names}
        for _ in range(chunks):
            for name, worker in workers.items():
                took = worker.ask(do="run", iterations=size)
                length = worker.ask(do="lengths", count=LENGTH_DRAWS)["mean"]
                history[name].append(took | {"mean_length": length})
        contenders = {
            name: {
                "cpu_seconds": sum(chunk["cpu"] for chunk in history[name]),
                "wall_seconds": sum(chunk["wall"] for chunk in history[name]),
                "lengths": [chunk["mean_length"] for chunk in history[name]],
                "chunks": history[name],
                "total_variation": exact.total_variation(worker),
                "about": worker.about,
            }
            for name, worker in workers.items()
        }
    result: Numbers = {"iterations": size * chunks, "threads": threads, "seed": seed, "load": load()}
    return result | {"contenders": contenders}


def quality(bench: Bench, name: str, task: Task, threads: int, target: float, cap: float, every: int) -> Numbers:
    """Seconds of training until the exact total variation falls below `target`; evaluation is outside the clock. A run
    that has not reached it after `cap` seconds of wall clock, or its own number of iterations, is cut off there."""
    exact = Exact(task, bench.folder)
    wall = cpu = 0.0
    done, curve = 0, []
    with bench.contenders({name: task}, threads) as workers:
        worker = workers[name]
        while wall < cap and done < task.iterations:
            took = worker.ask(do="run", iterations=min(every, task.iterations - done))
            wall, cpu, done = wall + took["wall"], cpu + took["cpu"], done + min(every, task.iterations - done)
            distance = exact.total_variation(worker)
            curve.append({"iterations": done, "wall": wall, "cpu": cpu, "total_variation": distance})
            bench.say(f"  {name} seed {task.seed}: {done} iterations, {wall:.0f} s, total variation {distance:.3f}")
            if distance < target:
                break
        return {
            "contender": name, "seed": task.seed, "threads": threads, "target": target, "task": asdict(task),
            "reached": curve[-1]["total_variation"] < target, "wall": wall, "cpu": cpu, "iterations": done,
            "load": load(), "curve": curve, "about": worker.about,
        }  # fmt: skip


class Exact:
    """The exact distribution of a hypergrid, and how far from it a contender is: everybody's logits go through the same
    dynamic programming over all states."""

    def __init__(self, task: Task, folder: Path) -> None:
        recipe = HypergridRecipe(dimensions=task.dimensions, side=task.side)
        problem = recipe.problem()
        self._exact = ExactDistribution(recipe.environment(), problem.reward)
        self._policy = _TableOfLogits(problem.policy, self._exact.graph)
        self._states, self._logits = folder / "states.npy", folder / "logits.npy"
        np.save(self._states, self._exact.graph.states.numpy().astype(np.int64))

    def total_variation(self, worker: Worker) -> float:
        worker.ask(do="logits", states=str(self._states), to=str(self._logits))
        self._policy.logits = torch.from_numpy(np.load(self._logits)).float()
        return self._exact.compare(self._policy)["total_variation"]


class _TableOfLogits(EnvironmentPolicy):
    """A policy that looks its forward logits up, one row a state of the graph, in the place of a network."""

    def __init__(self, like: object, graph: StateGraph) -> None:
        assert isinstance(like, EnvironmentPolicy)
        super().__init__(like.environment)
        self._graph = graph
        self.logits = torch.empty(0)

    def action_log_probs(self, states: Tensor, condition: Tensor) -> Tensor:
        logits = self.logits[self._graph.rows(states)]
        return logits.masked_fill(~self.environment.forward_mask(states), -1e9).log_softmax(1)


def weights_file(folder: Path, task: Task, regime: str) -> Path:
    """Weights for a regime on the task's grid; the trained ones are kept between runs."""
    if regime == "start":
        return saved(untrained(task.dimensions, task.side), folder / "start.npz")
    path = folder.parent / f"trained-{task.dimensions}x{task.side}.npz"
    if not path.exists():
        weights, figures = trained(task.dimensions, task.side)
        print(f"weights fitted to the target: total variation {figures['total_variation']:.3f}")
        saved(weights, path)
    return path


def write_table(folder: Path) -> None:
    """A made-up landscape of the size of TFBind8 (65,536 sequences), as our table and as the pickle gfnx looks for: the
    measured one is not ours to give, and speed does not depend on its numbers."""
    scores = np.random.default_rng(0).beta(2.0, 6.0, 4**8).round(6)
    rows = np.array(list(product(range(4), repeat=8)))
    letters = np.array(list("ACGT"))[rows]
    lines = [f"{''.join(word)},{score}" for word, score in zip(letters, scores, strict=True)]
    (folder / "table.csv").write_text("\n".join(["sequence,reward", *lines]) + "\n")
    place = folder / "proxy" / "weights" / "tfbind"
    place.mkdir(parents=True)
    with open(place / "tfbind8-exact-v0-all.pkl", "wb") as file:
        pickle.dump({"x": rows, "y": scores[:, None]}, file)


def _two(bench: Bench, task: Task) -> dict[str, Task]:
    return {name: task for name in (OURS, "gfnx") if name in bench.runtimes}


def _compared(bench: Bench, workers: dict[str, Worker]) -> Numbers:
    lengths = {name: worker.ask(do="lengths", count=LENGTH_DRAWS) for name, worker in workers.items()}
    before = load()
    timings = take_turns(workers, bench.rounds, bench.seconds)
    contenders = {
        name: {
            "cpu_ms": spread(timing.cpu),
            "wall_ms": spread(timing.wall),
            "turns": asdict(timing),
            "mean_length": lengths[name]["mean"],
            "longest": lengths[name]["longest"],
            "memory": workers[name].ask(do="memory"),
            "about": workers[name].about,
        }
        for name, timing in timings.items()
    }
    for name, numbers in contenders.items():
        bench.say(f"  {name}: {numbers['cpu_ms']['median']:.2f} ms CPU, length {numbers['mean_length']:.1f}")  # type: ignore[index]
    compared = ratios(timings)
    for name, ratio in compared.items():
        bench.say(f"  {name} / {OURS}: CPU {_shown(ratio['cpu'])}, wall {_shown(ratio['wall'])}")
    return {"load": [before, load()], "contenders": contenders, "ratios": compared}


def _shown(value: dict[str, float]) -> str:
    return f"{value['median']:.2f} ({value['low']:.2f} to {value['high']:.2f})"
