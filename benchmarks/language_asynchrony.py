"""What asynchrony buys a language model's post-training: accuracy by wall-clock time, and updates a second where
judging a completion takes a while.

    python benchmarks/language_asynchrony.py start     # makes the models; about a minute a seed
    python benchmarks/language_asynchrony.py curves    # about 80 seconds an arm and seed
    python benchmarks/language_asynchrony.py latency   # about 12 minutes
    python benchmarks/language_asynchrony.py report    # tables and figures from what was measured

Model and problems are those of the recipe tiny-math: a Llama of 1.1 million parameters that was taught until it answers
a third of its word problems.
"""

from __future__ import annotations

import argparse
import json
import shutil
import statistics
import tempfile
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from contenders.language import LanguageTask
from contest import Runtime, Worker
from headwater.language.loading import load_model
from headwater.language.reward import MathReward
from headwater.language.warm_start import make_word_problem_model
from headwater.language.word_problems import PROMPT_TEMPLATE
from headwater.objectives import Objective
from headwater.replay import ReplaySettings
from headwater.report.figures import line_figure
from headwater.search import SearchSettings
from headwater.training import Trainer
from language_runs import (
    RESULTS,
    WORK,
    Arm,
    Delayed,
    accuracy,
    load_problems,
    made_by,
    measure,
    measured,
    new_trainer,
    plus_minus,
    word_problem_model,
    word_problems_folder,
)  # fmt: skip
from peers import PEERS, install

TEST = 300
EVERY = 10.0  # seconds between two kept weights
LAST = 3  # measurements whose mean stands for the end
REPLAY = ReplaySettings(capacity=20_000, rule="stratified", share=0.5, per_condition=16, per_condition_capacity=64)
TBA = {"prompts": 9, "replayed": 16, "replay": REPLAY}
ARMS = {
    "synchronous TB": Arm(threads=2),
    "one step off": Arm(search=SearchSettings(searchers=1)),
    "TBA, 1 searcher": Arm(search=SearchSettings(searchers=1), **TBA),
    "TBA, 2 searchers": Arm(search=SearchSettings(searchers=2), **TBA),
    "GRPO, synchronous": Arm(objective=Objective("grpo"), threads=2),
}
BASE, TRL = "synchronous TB", "TRL's GRPO, synchronous"
LATENCIES = (0.0, 0.5, 2.0)
SEARCHERS = (0, 1, 2, 4, 8)


@dataclass(frozen=True)
class Kept:
    """Weights of a moment: seconds of training, updates, and the model's tensors by name."""

    seconds: float
    updates: int
    weights: dict[str, Tensor]


def curve(name: str, seed: int, seconds: float) -> dict[str, object]:
    """Train one arm for so many seconds of wall-clock time; accuracy is measured when it is over."""
    folder = word_problem_model(seed)
    train, test = load_problems(folder, TEST)
    arm = ARMS.get(name, Arm(threads=2))
    trainer = new_trainer(folder, train, test, MathReward, arm, 1_000_000, seed)
    metrics: list[dict[str, float]] = []
    with tempfile.TemporaryDirectory() as scratch:
        kept = list(_ours(trainer, seconds, metrics) if name in ARMS else _trl(folder, seed, seconds, arm, scratch))
    torch.set_num_threads(2)
    points = []
    for one in kept:
        trainer.policy.model.load_state_dict(one.weights)
        points.append((one.seconds, one.updates, accuracy(trainer, len(train), len(train) + len(test))))
    return {"arm": name, "seed": seed, "points": points, "search": metrics}


def _ours(trainer: Trainer, seconds: float, metrics: list[dict[str, float]]) -> Iterator[Kept]:
    """Weights at the start, about every `EVERY` seconds, and at the end."""
    last, began = 0.0, time.perf_counter()
    yield Kept(0.0, 0, _weights_of(trainer))
    try:
        while last < seconds:
            trainer.update()
            now = time.perf_counter() - began
            if now - last >= EVERY or now >= seconds:
                last = now
                metrics.append(trainer.search.metrics())
                yield Kept(now, trainer.iteration, _weights_of(trainer))
    finally:
        trainer.search.close()


def _trl(folder: Path, seed: int, seconds: float, arm: Arm, scratch: str) -> Iterator[Kept]:
    """The same of TRL's trainer, in a process and an environment of its own; its clock stands while it writes them."""
    trl = install("trl", WORK.parent / ".peers")
    task = LanguageTask(
        str(folder), str(folder / "train.jsonl"), str(folder / "test.jsonl"), PROMPT_TEMPLATE, arm.group, arm.prompts,
        arm.max_new_tokens, learning_rate=arm.learning_rate, beta=0.0, seconds=seconds, evaluate_every=EVERY,
        keep=scratch, threads=2, seed=seed, turns=False,
    )  # fmt: skip
    with Worker(Runtime(trl.python, "trl_grpo.py", trl.checkout), task, 2, WORK) as worker:
        ends = False
        while not ends:
            said = worker.read()
            if said["kind"] == "kept":
                ends = said["ends"]
                model = load_model(said["folder"], torch.device("cpu"))
                yield Kept(said["seconds"], said["step"], model.state_dict())


def _weights_of(trainer: Trainer) -> dict[str, Tensor]:
    return {name: tensor.clone() for name, tensor in trainer.policy.model.state_dict().items()}


def start(seed: int) -> dict[str, object]:
    """Make the model of this seed anew."""
    torch.set_num_threads(2)
    folder = word_problems_folder(seed)
    shutil.rmtree(folder, ignore_errors=True)
    began = time.perf_counter()
    greedy = make_word_problem_model(folder, seed)
    return {"seed": seed, "seconds": time.perf_counter() - began, "greedy": greedy}


def latency(searchers: int, seconds: float, updates: int, seed: int) -> dict[str, object]:
    """Updates a second with a judge that takes `seconds`."""
    arm = ARMS["synchronous TB"] if not searchers else Arm(search=SearchSettings(searchers=searchers), **TBA)
    folder = word_problem_model(seed)
    train, test = load_problems(folder, TEST)
    trainer = new_trainer(folder, train, test, lambda all_: Delayed(MathReward(all_), seconds), arm, 1_000_000, seed)
    try:
        trainer.update()  # brings searchers to life
        began = time.perf_counter()
        for _ in range(updates):
            trainer.update()
        passed = time.perf_counter() - began
        metrics = trainer.search.metrics()
    finally:
        trainer.search.close()
    torch.set_num_threads(2)
    reached = accuracy(trainer, len(train), len(train) + len(test))
    return {"searchers": searchers, "latency": seconds, "seconds": passed, "updates": updates, "seed": seed,
            "accuracy": reached, "search": metrics}  # fmt: skip


def report() -> None:
    parts = [
        "# Asynchrony in post-training a language model\n\n"
        "Model and problems are those of the recipe tiny-math: a Llama of 1.1 million parameters that was taught until "
        "it answers\na third of its word problems."
    ]
    for what, write in (("start", _start_part), ("curves", _curves_part), ("latency", _latency_part)):
        if content := measured(what):
            title, text = write(content["runs"])
            parts.append(f"## {title}\n\n{made_by(content)}\n\n{text}")
    (RESULTS / "language-asynchrony.md").write_text("\n\n".join(parts) + "\n")


def _start_part(runs: list[dict[str, Any]]) -> tuple[str, str]:
    rows = [f"| {run['seed']} | {run['greedy']:.3f} | {run['seconds']:.0f} |" for run in runs]
    table = "\n".join(rows)
    return (
        "The models that training starts from",
        f"""\
From random weights to where training stops: 35 % of 400 held-out problems, by greedy decoding. Sampled completions, as
below, are right less often.

| seed | accuracy, greedy | seconds |
|---|---|---|
{table}""",
    )


def _curves_part(runs: list[dict[str, Any]]) -> tuple[str, str]:
    figure, rows, goal = {}, [], 0.35
    ends = {(run["arm"], run["seed"]): statistics.fmean(point[2] for point in run["points"][-LAST:]) for run in runs}
    for name in dict.fromkeys(run["arm"] for run in runs):
        mine = [run for run in runs if run["arm"] == name]
        count = min(len(run["points"]) for run in mine)
        figure[name] = (
            [statistics.fmean(run["points"][i][0] for run in mine) for i in range(count)],
            [statistics.fmean(run["points"][i][2] for run in mine) for i in range(count)],
        )
        first = [run["points"][0][2] for run in mine]
        last = [ends[name, run["seed"]] for run in mine]
        more = [
            end - ends[BASE, run["seed"]] for end, run in zip(last, mine, strict=True) if (BASE, run["seed"]) in ends
        ]
        reached = [next((f"{p[0]:.0f}" for p in run["points"] if p[2] >= goal), "-") for run in mine]
        speed = [run["points"][-1][1] / run["points"][-1][0] for run in mine]
        stale = [statistics.fmean(m.get("search/staleness_mean", 0.0) for m in run["search"] or [{}]) for run in mine]
        difference = plus_minus(more, 3) if name != BASE else ""
        rows.append(
            f"| {name} | {len(mine)} | {plus_minus(first)} | {plus_minus(last)} | {difference} "
            f"| {', '.join(reached)} | {plus_minus(speed)} | {plus_minus(stale, 1)} |"
        )
    svg = line_figure(figure, x_label="seconds", title="Accuracy on held-out word problems", size=(6.4, 3.6))
    (RESULTS / "language-curves.svg").write_text(svg + "\n")
    table = "\n".join(rows)
    return (
        "Accuracy by wall-clock time",
        f"""\
Sampled completions of {TEST} held-out problems, one each; weights are kept every {EVERY:.0f} s and measured when the
run is over, those of TRL by the same code. Every arm learns from {Arm.prompts} prompts x {Arm.group} completions an
update, at a learning rate of {Arm.learning_rate:g}; of TBA one of the prompts comes from the replay. Synchronous arms
use both cores, a searcher and the learner one each. TRL {PEERS["trl"].commit} has its own defaults, but for what
`contenders/trl_grpo.py` sets. Mean and 95 % interval over seeds; at the end: mean of the last {LAST} measurements;
less {BASE}: the difference at the end, seed by seed; seconds to {goal:.0%}: of each seed, - if not reached.

| arm | seeds | at the start | at the end | less {BASE} | seconds to {goal:.0%} | updates a second | staleness |
|---|---|---|---|---|---|---|---|
{table}

![Accuracy by wall-clock time](language-curves.svg)

Tried before, with one searcher and on seeds 0 and 1: learning from the replay alone, as the recipe tiny-math does, with
a share m = 0.75, 0.95 or 1 of recent groups. All three ended below the TBA of the table on both seeds, m = 0.75 lowest,
the others by no more than the noise; and m = 1, where nothing old is drawn, below one step off. What differs there is
that the replay keeps one of equal completions: what the model writes often counts no more than what it writes once.""",
    )


def _latency_part(runs: list[dict[str, Any]]) -> tuple[str, str]:
    base = {run["latency"]: run["seconds"] / run["updates"] for run in runs if not run["searchers"]}
    rows = []
    for searchers in sorted({run["searchers"] for run in runs}):
        cells = []
        for seconds in sorted(base):
            found = [run for run in runs if run["searchers"] == searchers and run["latency"] == seconds]
            if not found:
                cells.append("")
                continue
            each = found[-1]["seconds"] / found[-1]["updates"]
            cells.append(f"{each:.2f} s ({base[seconds] / each:.1f}x, {found[-1]['accuracy']:.2f})")
        rows.append(f"| {searchers or 'synchronous'} | {' | '.join(cells)} |")
    header = " | ".join(f"{seconds:g} s" for seconds in sorted(base))
    return (
        "A judge that takes its time (simulated)",
        f"""\
The judge sleeps, all completions of a batch at once. Seconds an update; in brackets how much faster than synchronous
training, which has both cores, and the accuracy after {runs[0]["updates"] + 1} updates ({TEST} completions: a standard
error of 0.03). An update on stale or replayed completions teaches less than one on fresh ones: the price of the speed.

| searchers | {header} |
|---|{"---|" * len(base)}
{chr(10).join(rows)}""",
    )


def jobs_of(options: argparse.Namespace) -> list[list[str]]:
    if options.what == "start":
        return [[str(seed)] for seed in options.seeds]
    if options.what == "curves":
        return [[name, str(seed), str(options.seconds)] for seed in options.seeds for name in options.arms]
    return [[str(n), str(v), str(options.updates), "0"] for v in LATENCIES for n in SEARCHERS]


def one(kind: str, *job: str) -> dict[str, object]:
    if kind == "start":
        return start(int(job[0]))
    if kind == "curves":
        return curve(job[0], int(job[1]), float(job[2]))
    return latency(int(job[0]), float(job[1]), int(job[2]), int(job[3]))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=["start", "curves", "latency", "report", "one"])
    parser.add_argument("one", nargs="*", help=argparse.SUPPRESS)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2, 3, 4])
    parser.add_argument("--arms", nargs="+", choices=[*ARMS, TRL], default=[*ARMS, TRL], help="of curves")
    parser.add_argument("--seconds", type=float, default=60.0, help="of training, an arm of curves")
    parser.add_argument("--updates", type=int, default=24, help="of each latency")
    options = parser.parse_args()
    if options.what == "one":
        print(json.dumps(one(*options.one)))
        return
    if options.what != "report":
        measure(options.what, jobs_of(options))
    report()


if __name__ == "__main__":
    main()
