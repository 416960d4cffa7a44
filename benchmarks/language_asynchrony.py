"""What asynchrony buys a language model's post-training: accuracy by wall-clock time, and updates a second where
judging a completion takes a while.

    python benchmarks/language_asynchrony.py curves    # about 4 minutes an arm and seed
    python benchmarks/language_asynchrony.py latency   # about 12 minutes
    python benchmarks/language_asynchrony.py report    # tables and figures from what was measured

Model and problems are those of the recipe tiny-math: a Llama of 1.1 million parameters that was taught until it answers
a third of its word problems. The latency of the judge is simulated: it sleeps, all completions of a batch at once.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import time

import torch

from headwater.language.reward import MathReward
from headwater.objectives import Objective
from headwater.replay import ReplaySettings
from headwater.report.figures import line_figure
from headwater.runs import provenance
from headwater.search import SearchSettings
from headwater.training import Sharpness
from language_runs import RESULTS, Arm, Delayed, accuracy, load_problems, new_trainer, plus_minus, word_problem_model

TEST = 300
EVERY = 10.0  # seconds between two kept weights
REPLAY = ReplaySettings(
    capacity=20_000, rule="stratified", share=0.5, recent_probability=0.75, per_condition=16, per_condition_capacity=64
)
TBA = {"only_replayed": True, "replay": REPLAY}
ARMS = {
    "synchronous TB": Arm(threads=2),
    "one step off": Arm(search=SearchSettings(searchers=1)),
    "TBA, 1 searcher": Arm(search=SearchSettings(searchers=1), **TBA),
    "TBA, 2 searchers": Arm(search=SearchSettings(searchers=2), **TBA),
    "GRPO, synchronous": Arm(objective=Objective("grpo"), threads=2),
    "RLOO, synchronous": Arm(objective=Objective("rloo"), threads=2),
}
LATENCIES = (0.0, 0.5, 2.0)
SEARCHERS = (0, 1, 2, 4, 8)


def curve(name: str, seed: int, seconds: float, beta: float, learning_rate: float) -> dict[str, object]:
    """Train one arm for so many seconds of wall-clock time; accuracy is measured when it is over."""
    from dataclasses import replace

    arm = replace(ARMS[name], sharpness=Sharpness(beta), learning_rate=learning_rate)
    folder = word_problem_model(seed)
    train, test = load_problems(folder, TEST)
    trainer = new_trainer(folder, train, test, MathReward, arm, 1_000_000, seed)
    kept = [(0.0, 0, weights_of(trainer))]
    metrics: list[dict[str, float]] = []
    began = time.perf_counter()
    try:
        while (now := time.perf_counter() - began) < seconds:
            trainer.update()
            now = time.perf_counter() - began
            if now - kept[-1][0] >= EVERY or now >= seconds:
                kept.append((now, trainer.iteration, weights_of(trainer)))
                metrics.append(trainer.search.metrics())
    finally:
        trainer.search.close()
    torch.set_num_threads(2)
    points = []
    for at, iteration, weights in kept:
        trainer.policy.load_state_dict(weights)
        points.append((at, iteration, accuracy(trainer, len(train), len(train) + len(test))))
    return {"arm": name, "seed": seed, "points": points, "drawn": trainer.search.drawn, "search": metrics}


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


def weights_of(trainer) -> dict[str, torch.Tensor]:  # type: ignore[no-untyped-def]
    return {name: tensor.clone() for name, tensor in trainer.policy.state_dict().items()}


def one_by_one(what: str, jobs: list[list[str]]) -> None:
    """Each job in a process of its own, its answer added to what was measured before."""
    path = RESULTS / f"language-{what}.json"
    content = json.loads(path.read_text()) if path.exists() else {"runs": []}
    content |= provenance(["python", *sys.argv], 0)
    for job in jobs:
        command = [sys.executable, __file__, "one", what, *job]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        if done.returncode:
            raise SystemExit(done.stderr[-4000:])
        content["runs"].append(json.loads(done.stdout.splitlines()[-1]))
        path.write_text(json.dumps(content, indent=1) + "\n")
        shown = {key: value for key, value in content["runs"][-1].items() if key not in ("search", "points")}
        last = content["runs"][-1].get("points", [None])[-1]
        print(shown, last, file=sys.stderr)


def report() -> None:
    hardware = ""
    curves_path, latency_path = RESULTS / "language-curves.json", RESULTS / "language-latency.json"
    parts = []
    if curves_path.exists():
        content = json.loads(curves_path.read_text())
        hardware = f"{content['hardware']['cpu']}, {content['hardware']['cores']} cores; {content['started']}"
        parts.append(_curves_part(content["runs"]))
    if latency_path.exists():
        content = json.loads(latency_path.read_text())
        hardware = f"{content['hardware']['cpu']}, {content['hardware']['cores']} cores; {content['started']}"
        parts.append(_latency_part(content["runs"]))
    head = "# Asynchrony in post-training a language model\n\n    python benchmarks/language_asynchrony.py curves\n"
    head += "    python benchmarks/language_asynchrony.py latency\n\n"
    words = "\n".join(line for line in (__doc__ or "").splitlines()[7:]).strip()
    (RESULTS / "language-asynchrony.md").write_text(head + words + "\n\n" + "\n".join(parts) + f"\n{hardware}.\n")


def _curves_part(runs: list[dict]) -> str:  # type: ignore[type-arg]
    names = list(dict.fromkeys(run["arm"] for run in runs))
    figure = {}
    rows = []
    best = {name: [max(point[2] for point in run["points"]) for run in runs if run["arm"] == name] for name in names}
    goal = 0.4
    for name in names:
        mine = [run for run in runs if run["arm"] == name]
        count = min(len(run["points"]) for run in mine)
        figure[name] = (
            [sum(run["points"][i][0] for run in mine) / len(mine) for i in range(count)],
            [sum(run["points"][i][2] for run in mine) / len(mine) for i in range(count)],
        )
        reached = [next((p[0] for p in run["points"] if p[2] >= goal), float("nan")) for run in mine]
        speed = [run["points"][-1][1] / run["points"][-1][0] for run in mine]
        stale = [
            sum(m.get("search/staleness_mean", 0.0) for m in run["search"]) / max(len(run["search"]), 1) for run in mine
        ]
        rows.append(
            f"| {name} | {len(mine)} | {plus_minus([run['points'][0][2] for run in mine])} | {plus_minus(best[name])} "
            f"| {', '.join(f'{r:.0f}' for r in reached)} | {plus_minus(speed)} | {plus_minus(stale, 1)} |"
        )
    svg = line_figure(figure, x_label="seconds", title="Accuracy on held-out word problems", size=(6.4, 3.6))
    (RESULTS / "language-curves.svg").write_text(svg + "\n")
    table = "\n".join(rows)
    return f"""## Accuracy by wall-clock time

Sampled completions of {TEST} held-out problems, one each; weights are kept every {EVERY:.0f} s and measured when the
run is over. Synchronous arms use both cores, a searcher and the learner one each. Mean and 95 % interval over seeds;
seconds until {goal:.0%} for each seed (nan: not reached).

| arm | seeds | at the start | best | seconds to {goal:.0%} | updates a second | staleness |
|---|---|---|---|---|---|---|
{table}

![Accuracy by wall-clock time](language-curves.svg)
"""


def _latency_part(runs: list[dict]) -> str:  # type: ignore[type-arg]
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
    return f"""## A judge that takes its time (simulated)

Seconds an update; in brackets how much faster than synchronous training, which judges all completions of a batch at
once and has both cores, and the accuracy after {runs[0]["updates"] + 1} updates ({TEST} completions: a standard error
of 0.03). An update on stale or replayed completions teaches less than one on fresh ones: the price of the speed.

| searchers | {header} |
|---|{"---|" * len(base)}
{chr(10).join(rows)}
"""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=["curves", "latency", "report", "one"])
    parser.add_argument("one", nargs="*", help=argparse.SUPPRESS)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0])
    parser.add_argument("--arms", nargs="+", choices=list(ARMS), default=list(ARMS))
    parser.add_argument("--seconds", type=float, default=200.0, help="of training, an arm")
    parser.add_argument("--updates", type=int, default=24, help="of each latency")
    parser.add_argument("--beta", type=float, default=0.1)
    parser.add_argument("--learning-rate", type=float, default=3e-4)
    options = parser.parse_args()
    if options.what == "report":
        report()
    elif options.what == "curves":
        jobs = [
            [name, str(seed), str(options.seconds), str(options.beta), str(options.learning_rate)]
            for seed in options.seeds
            for name in options.arms
        ]
        one_by_one("curves", jobs)
        report()
    elif options.what == "latency":
        one_by_one("latency", [[str(n), str(v), str(options.updates), "0"] for v in LATENCIES for n in SEARCHERS])
        report()
    else:
        kind, *rest = options.one
        if kind == "curves":
            print(json.dumps(curve(rest[0], int(rest[1]), *map(float, rest[2:]))))
        else:
            print(json.dumps(latency(int(rest[0]), float(rest[1]), int(rest[2]), int(rest[3]))))


if __name__ == "__main__":
    main()
