"""Log marginal likelihoods of trained runs beside published ones, each with what its training cost.

    headwater train phylogeny --alignment DS4.nex --training.iterations 400 --out runs/ds4
    python benchmarks/phylogeny_evidence.py runs/ds4 runs/ds5 runs/ds6 runs/ds7 runs/ds8

Adds its rows to results/phylogeny-posterior-ds4-ds8.json and writes the table beside it. An estimate is the logarithm
of the mean importance weight. Short of convergence it lies below log p(Y) with probability near one, and its interval,
which knows only the weights that were drawn, is too narrow: the effective sample size says how far to trust both. CPU
seconds of training are from its start and the median of twenty updates measured here.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import textwrap
import time
from dataclasses import asdict
from pathlib import Path
from typing import Any

for _name in ("OMP_NUM_THREADS", "NUMBA_NUM_THREADS"):
    os.environ.setdefault(_name, "1")

import torch  # noqa: E402

from headwater.phylogeny.recipe import PhylogenyRecipe  # noqa: E402
from headwater.runs import Run  # noqa: E402
from headwater.sampler import Sampler  # noqa: E402
from phylogeny_known import known  # noqa: E402
from phylogeny_posterior import cost, drawn  # noqa: E402
from provenance import load, provenance  # noqa: E402

RESULTS = Path(__file__).resolve().parent / "results"
Row = dict[str, Any]

_SAID = """JC69, branch lengths exponential of rate 10, all topologies alike; nats. Headwater: the logarithm of the mean
importance weight with half its 95 % interval, after short trainings of the CPU time given, one core each. Where few
draws have nearly all of the weight the estimate is low and its interval means nothing. Before training: Laplace's
approximation about one good tree, where log Z starts. Others: over runs, with standard deviation; where they come from
is in `benchmarks/phylogeny_known.py`."""


def measured(folder: Path, samples: int, seed: int) -> Row:
    """What one run says of its alignment."""
    sampler, run = Sampler.load(folder), Run.open(folder)
    recipe = sampler.recipe
    if not isinstance(recipe, PhylogenyRecipe) or recipe.parsimony or recipe.temperatures is not None:
        raise SystemExit(f"{folder}: not a run over a posterior of trees")
    iterations, last = sampler.problem.policy.version, run.metrics()[-1]
    start, each = cost(recipe)
    began = time.process_time()
    *_, evidence = drawn(sampler, samples, seed)
    name, values = known(len(recipe.data.taxa), recipe.data.sites)
    return {
        "name": name or folder.name, "taxa": len(recipe.data.taxa), "sites": recipe.data.sites, "known": values,
        "iterations": iterations, "trajectories": last.get("trajectories"), "training_wall": last.get("seconds"),
        "training_cpu": start + each * iterations, "drawing_cpu": time.process_time() - began,
        "training": " ".join(Path(word).name if "/" in word else word for word in run.provenance["command"]),
        "guess": recipe.guess.log_marginal, **asdict(evidence), "load": load(),
        "settings": {key: value for key, value in recipe.settings().items() if "/" not in str(value)},
        **provenance(["python", "benchmarks/phylogeny_evidence.py", *(Path(word).name if "/" in word else word
                                                                      for word in sys.argv[1:])]),
    }  # fmt: skip


def page(rows: dict[str, Row]) -> str:
    """The table in Markdown."""
    sources = list(dict.fromkeys(source for row in rows.values() for source in row["known"]))
    head = ["", "taxa", "iterations", "training, CPU-seconds", "Headwater", "effective", "before training", *sources]
    lines = ["| " + " | ".join(head) + " |", "|-" * len(head) + "|"]
    for name, row in rows.items():
        cells = [
            name, str(row["taxa"]), f"{row['iterations']:,}", f"{row['training_cpu']:,.0f}",
            f"{row['log_marginal_likelihood']:.2f} +- {row['interval']:.2f}",
            f"{row['effective'] * row['draws']:,.1f} of {row['draws']:,}", f"{row['guess']:.1f}",
            *(f"{row['known'][each][0]:.2f} ({row['known'][each][1]:g})" if each in row["known"] else ""
              for each in sources),
        ]  # fmt: skip
        lines.append("| " + " | ".join(cells) + " |")
    machines = [
        f"- {name}: {row['date']}, {row['cpu']}, one of {row['cores']} cores shared with other work "
        f"(load {row['load']}), Python {row['python']}, {', '.join(f'{k} {v}' for k, v in row['versions'].items())}, "
        f"ours at {row['commit'][:10]}; {row['training_wall']:,.0f} s of training by the clock."
        for name, row in rows.items()
    ]
    typed = dict.fromkeys(row[key] for key in ("training", "command") for row in rows.values())
    commands = [f"    {command}" for command in typed if command]
    parts = ["# Phylogeny: log marginal likelihoods after short trainings", *commands, "\n".join(lines)]
    return "\n\n".join([*parts, textwrap.fill(_SAID, 120, break_on_hyphens=False), "\n".join(machines)]) + "\n"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("runs", type=Path, nargs="*", help="run folders of: headwater train phylogeny; none: write the page again")
    add("--samples", type=int, default=2000, help="trees to draw")
    add("--seed", type=int, default=1, help="of the draws")
    add("--out", type=Path, default=RESULTS / "phylogeny-posterior-ds4-ds8.json")
    options = parser.parse_args()
    torch.set_num_threads(1)
    rows: dict[str, Row] = json.loads(options.out.read_text()) if options.out.is_file() else {}
    for folder in options.runs:
        row = measured(folder, options.samples, options.seed)
        rows[row["name"]] = row
        rows = dict(sorted(rows.items()))
        options.out.write_text(json.dumps(rows, indent=1) + "\n")
    options.out.with_suffix(".md").write_text(page(rows))
    print(page(rows))


if __name__ == "__main__":
    main()
