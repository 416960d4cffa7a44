"""How fast Headwater trains, beside the libraries that do the same work.

    python benchmarks/speed.py --quick                     a first look, in minutes
    python benchmarks/speed.py                             every part, on one and two threads (hours)
    python benchmarks/speed.py --parts iteration --tasks hypergrid-tb --threads 1

Every contender is a live process with its task built. They take turns, ours first, for about --seconds each; a ratio
is taken between the turns of one round, so that what else the machine does weighs on both sides. A ratio is the peer's
time over ours: above 1, ours is faster. CPU time counts all threads of a process.

Parts:
  iteration  one training iteration on each task; on the hypergrid at untrained and at trained lengths
  training   whole runs of --training-iterations from scratch: lengths grow as the sampler learns
  quality    seconds until the exact total variation on the 20^4 hypergrid is below --target
  curve      cost over the mean length at a fixed horizon, and over the horizon at a fixed mean length

The peers are cloned from their public repositories and installed into environments of their own, below --peers, once.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
import time
from pathlib import Path

import measurements
from contenders.protocol import Task
from contest import OURS, Runtime
from peers import install
from provenance import cpu_model, provenance, slug
from speed_report import write_report

HERE = Path(__file__).resolve().parent
CONTENDERS = (OURS, "gfnx", "gfnx with logging", "torchgfn")
PARTS = ("iteration", "training", "quality", "curve")
FOLDER_OPTIONS = ("--peers", "--gfnx", "--torchgfn", "--out")

EXPLORING = {"epsilon": 0.1, "epsilon_end": 0.0, "epsilon_iterations": 30_000, "iterations": 62_500}
QUALITY = {
    OURS: EXPLORING,
    "gfnx": EXPLORING,  # its configs/tb_hypergrid.yaml
    "torchgfn": EXPLORING,  # its script's rates; without exploration, its default, trajectory balance stalls here
}
"""Settings of the race to a target, by contender; batch 16, Adam at 1e-3, log Z at 0.1 for all."""


def arguments() -> argparse.Namespace:
    description, _, rest = (__doc__ or "").partition("\n\n")
    parser = argparse.ArgumentParser(
        description=description, epilog=rest, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("--parts", nargs="+", choices=PARTS, default=PARTS, metavar="PART", help="what to measure (default: all)")
    add("--tasks", nargs="+", choices=list(measurements.TASKS), default=list(measurements.TASKS), metavar="TASK",
        help=f"tasks of the part iteration: {', '.join(measurements.TASKS)}")  # fmt: skip
    add("--contenders", nargs="+", choices=CONTENDERS, default=CONTENDERS, metavar="NAME",
        help=f"who takes part: {', '.join(CONTENDERS)}; ours always does")  # fmt: skip
    add("--threads", nargs="+", type=int, default=[1, 2], metavar="N", help="threads of a contender (default: 1 2)")
    add("--rounds", type=int, default=15, help="turns of every contender (default: 15)")
    add("--seconds", type=float, default=1.0, help="seconds of a turn (default: 1)")
    add("--training-iterations", type=int, default=10_000, help="length of a whole run (default: 10000)")
    add("--target", type=float, default=0.1, help="total variation to reach in the part quality (default: 0.1)")
    add("--ours", type=json.loads, default={}, metavar="JSON",
        help="our settings in the race, fields of contenders/protocol.py's Task, in the place of the peers'; its "
        "settings may hold training, exploration, objective and replay")  # fmt: skip
    add("--cap", type=float, default=3600.0, help="seconds after which quality gives a run up (default: 3600)")
    add("--every", type=int, default=500, help="iterations between looks at the total variation (default: 500)")
    add("--seeds", type=int, default=1, help="runs of the parts training and quality (default: 1)")
    add("--quick", action="store_true", help="one thread, few short turns, short runs: to see that all works")
    add("--peers", type=Path, default=HERE / ".peers", help="where peers are kept (default: benchmarks/.peers)")
    add("--gfnx", type=Path, help="a checkout of gfnx, in the place of a clone")
    add("--torchgfn", type=Path, help="a checkout of torchgfn, in the place of a clone")
    add("--out", type=Path, default=HERE / "results", help="where results are written (default: benchmarks/results)")
    if "--quick" in sys.argv:  # other defaults; what is asked for by name still holds
        parser.set_defaults(threads=[1], rounds=3, seconds=0.2, training_iterations=200, cap=20.0)
    return parser.parse_args()


def runtimes(chosen: argparse.Namespace) -> tuple[dict[str, Runtime], dict[str, str]]:
    """How to start each contender, and the peers' commits."""
    found, commits = {OURS: Runtime(Path(sys.executable), "headwater_worker.py")}, {}
    for name, workers in (("gfnx", ("gfnx", "gfnx with logging")), ("torchgfn", ("torchgfn",))):
        asked = [worker for worker in workers if worker in chosen.contenders]
        if asked:
            peer = install(name, chosen.peers, getattr(chosen, name))
            commits[name] = peer.commit
            found |= {worker: Runtime(peer.python.absolute(), f"{name}_worker.py", peer.checkout) for worker in asked}
    return found, commits


def command() -> list[str]:
    """What was typed, without the folders of this machine."""
    kept, words = ["python", "benchmarks/speed.py"], iter(sys.argv[1:])
    for word in words:
        if word in FOLDER_OPTIONS:
            next(words)
        elif word.partition("=")[0] not in FOLDER_OPTIONS:
            kept.append(f"'{word}'" if " " in word else word)
    return kept


def main() -> None:
    chosen = arguments()
    found, commits = runtimes(chosen)
    results: dict[str, object] = {"provenance": provenance(command()) | {"peers": commits}}
    chosen.out.mkdir(parents=True, exist_ok=True)
    path = chosen.out / f"speed-{slug(cpu_model())}-{time.strftime('%Y-%m-%d', time.gmtime())}.json"

    def say(text: str) -> None:
        print(text, flush=True)

    def keep(part: str, numbers: object) -> None:
        results.setdefault(part, []).append(numbers)  # type: ignore[attr-defined]
        path.write_text(json.dumps(results, indent=1) + "\n")
        write_report(path)

    work = HERE / ".work"
    work.mkdir(exist_ok=True)
    with tempfile.TemporaryDirectory(dir=work) as folder:
        bench = measurements.Bench(found, Path(folder), chosen.rounds, chosen.seconds, say)
        measure(bench, chosen, keep)
    print(f"results: {path} and {path.with_name('speed.md')}")


def measure(bench: measurements.Bench, chosen: argparse.Namespace, keep) -> None:  # type: ignore[no-untyped-def]
    if "iteration" in chosen.parts:
        if "sequences-tb" in chosen.tasks:
            measurements.write_table(bench.folder)
        for threads in chosen.threads:
            for task in chosen.tasks:
                for regime in ("start", "trained") if task.startswith("hypergrid") else ("own",):
                    bench.say(f"{task}, {regime}, threads {threads}")
                    keep("iteration", measurements.iterations(bench, task, regime, threads))
    if "training" in chosen.parts:
        for threads in chosen.threads:
            for seed in range(chosen.seeds):
                bench.say(f"training, {chosen.training_iterations} iterations, threads {threads}, seed {seed}")
                keep("training", measurements.training(bench, chosen.training_iterations, threads, seed))
    if "curve" in chosen.parts:
        bench.say("cost over the mean length")
        steps = (3, 20, 80) if chosen.quick else (2, 5, 10, 20, 40, 80, 1e6)
        keep("by_length", measurements.by_length(bench, steps, measurements.TASKS["hypergrid-tb"]))
        bench.say("cost over the horizon")
        sides = (8, 32) if chosen.quick else (8, 16, 24, 32, 48, 64)
        keep("by_horizon", measurements.by_horizon(bench, sides, 10, measurements.TASKS["hypergrid-tb"]))
    if "quality" in chosen.parts:
        for seed in range(chosen.seeds):
            for name, settings in QUALITY.items():
                if name in bench.runtimes:
                    bench.say(f"to total variation {chosen.target}: {name}, seed {seed}")
                    task = Task(seed=seed, **settings | (chosen.ours if name == OURS else {}))
                    threads = chosen.threads[0]
                    numbers = measurements.quality(bench, name, task, threads, chosen.target, chosen.cap, chosen.every)
                    keep("quality", numbers)


if __name__ == "__main__":
    main()
