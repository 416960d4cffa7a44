"""Near-optimal trees: how many of them a trained sampler draws, of how many there are.

    headwater train phylogeny --alignment DS1.nex --parsimony --gaps state --out runs/ds1
    python benchmarks/phylogeny_parsimony.py runs/ds1 runs/ds2

Each run's sampler, one for temperatures T from 0.25 to 4, is drawn from at several: the shortest tree, distinct trees
within four changes of the known optimum, log Z and effective sample size. Beside it:

- all trees that there are within four changes, as far as they hang together by prunings and regraftings
  (`near_optimal.py`), which is what a sampler can be held against. At T = 0.25 these have all but nothing of the
  probability, so their log Z and probabilities are exact there;
- the chains alone that the sampler learns from, without a network, for at most 500 iterations;
- PHYLIP's dnapars (5 orders of the taxa), where it is installed, and PAUP*'s optimum as published.

Adds its rows to results/phylogeny-parsimony.json and writes the table beside it. CPU seconds are of this process, those
of training from its start and the median of twenty updates measured here.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import re
import sys
import tempfile
import time
from pathlib import Path

for _name in ("OMP_NUM_THREADS", "NUMBA_NUM_THREADS"):
    os.environ.setdefault(_name, "1")

import numpy as np  # noqa: E402
import torch  # noqa: E402
from torch import Tensor  # noqa: E402

from headwater.evaluation import log_ratios, sampling_floor  # noqa: E402
from headwater.phylogeny.chains import TreeChains  # noqa: E402
from headwater.phylogeny.guesses import climb  # noqa: E402
from headwater.phylogeny.near_optimal import NearOptimal, near_optimal  # noqa: E402
from headwater.phylogeny.posterior import trees_of  # noqa: E402
from headwater.phylogeny.recipe import PhylogenyRecipe  # noqa: E402
from headwater.phylogeny.reward import ParsimonyReward  # noqa: E402
from headwater.policies import NO_EXPLORATION  # noqa: E402
from headwater.runs import Run  # noqa: E402
from headwater.sampler import Sampler  # noqa: E402
from headwater.training import Trainer  # noqa: E402
from phylogeny_known import PARSIMONY, known  # noqa: E402
from phylogeny_parsimony_report import write_report  # noqa: E402
from phylogeny_posterior import cost, new_trainer  # noqa: E402
from phylogeny_programs import Files, execute, found  # noqa: E402
from provenance import load, provenance  # noqa: E402

HERE = Path(__file__).resolve().parent
WITHIN = 4
TEMPERATURES = (0.25, 0.5, 1.0, 2.0, 4.0)
Row = dict[str, object]


class Near:
    """The trees that there are near the optimum, and how many of given ones are among them."""

    def __init__(self, trees: NearOptimal, reward: ParsimonyReward) -> None:
        self.trees, self.reward = trees, reward
        self.changes = trees.changes.numpy() + reward.sites.constant
        self.optimum = int(self.changes[0])
        self.place = {row.numpy().tobytes(): k for k, row in enumerate(trees.tables)}

    def counts(self, changes: np.ndarray) -> list[int]:
        """Trees within 0, 1 ... changes of the optimum, of distinct trees."""
        return [int((changes <= self.optimum + more).sum()) for more in range(WITHIN + 1)]

    def met(self, tables: Tensor) -> dict[bytes, int]:
        """Changes of the distinct trees within reach among these, which may be trees that the search has not found."""
        changes = self.reward.changes(tables)
        close = changes <= self.optimum + WITHIN
        rows = zip(tables[close], changes[close].tolist(), strict=True)
        return {row.numpy().tobytes(): length for row, length in rows}

    def log_z(self, temperature: float) -> float:
        """Of these trees alone."""
        return float(np.logaddexp.reduce((self.reward.constant - self.changes) / temperature))


def all_near(recipe: PhylogenyRecipe, most: int) -> tuple[Near, Row]:
    """All trees within reach of the optimum that hang together."""
    reward = recipe.base_reward
    assert isinstance(reward, ParsimonyReward)
    began = time.process_time()
    trees = near_optimal(reward.sites.leaves, climb(recipe.evidence), WITHIN, most)
    near = Near(trees, reward)
    row = {"optimum": near.optimum, "within": near.counts(near.changes), "beyond": trees.beyond}
    return near, row | {"cpu": time.process_time() - began}


def chains_alone(trainer: Trainer, near: Near, iterations: int) -> Row:
    """Where the chains come to in the moves of so many iterations, without a network."""
    chains, settings = trainer.explorer, trainer.training
    assert isinstance(chains, TreeChains)
    generator = torch.Generator().manual_seed(0)
    count = round(chains.settings.share * settings.batch_size)
    began, met = time.process_time(), dict[bytes, int]()
    for _ in range(iterations):
        met |= near.met(chains.advance(count, generator)[0])
    return {"within": near.counts(np.array(list(met.values()))), "cpu": time.process_time() - began}


def drawn(sampler: Sampler, near: Near, count: int, seed: int) -> tuple[Row, Row]:
    """What the sampler draws: the distinct trees within reach at any temperature, and figures by temperature."""
    policy, reward = sampler.problem.policy, sampler.problem.reward
    generator = torch.Generator().manual_seed(seed)
    began, met, rows = time.process_time(), dict[bytes, int](), {}
    for temperature in TEMPERATURES:
        condition = torch.tensor([[1 / temperature]]).expand(count, -1)
        with torch.no_grad():
            trajectories = policy.sample(condition, NO_EXPLORATION, generator)
            tables = torch.as_tensor(policy.objects(trajectories))
            trajectories = trajectories.with_log_reward(reward(tables, condition))
            weights = trajectories.log_reward.double() - log_ratios(policy, trajectories)
        here = near.met(tables)
        met |= here
        log_z = float(weights.logsumexp(0)) - math.log(count)
        relative = (weights - log_z).exp()
        changes = near.reward.changes(tables)
        rows[str(temperature)] = {
            "shortest": int(changes.min()),
            "optimal": float((changes == near.optimum).double().mean()),
            "within": near.counts(np.array(list(here.values()))),
            "median": float(changes.double().median()),
            "log_z": log_z,
            "interval": float(1.96 * relative.std() / math.sqrt(count)),
            "effective": float(relative.sum() ** 2 / relative.square().sum()) / count,
            "total_variation": distance(near, tables, relative, temperature)
            if temperature == TEMPERATURES[0]
            else None,
        }
    total = {"within": near.counts(np.array(list(met.values()))), "cpu": time.process_time() - began, "draws": count,
             "unknown": len(met.keys() - near.place.keys())}  # fmt: skip
    return total, rows


def distance(near: Near, tables: Tensor, weights: Tensor, temperature: float) -> Row:
    """Total variation between drawn frequencies and the exact ones, as drawn and with weights; its floor."""
    exact = np.exp((near.reward.constant - near.changes) / temperature - near.log_z(temperature))
    place = torch.tensor([near.place.get(row.tobytes(), len(exact)) for row in tables.numpy()])
    result = {}
    for name, each in (("drawn", torch.ones(len(tables), dtype=torch.float64)), ("weighted", weights)):
        shares = torch.zeros(len(exact) + 1, dtype=torch.float64).index_add(0, place, each) / each.sum()
        result[name] = float((shares - torch.tensor([*exact, 0.0])).abs().sum()) / 2
    return result | {"floor": sampling_floor(torch.from_numpy(exact), len(tables))}


def dnapars(recipe: PhylogenyRecipe, near: Near, folder: Path) -> Row | None:
    """PHYLIP's search from five orders of the taxa, a gap being a state."""
    program = found("dnapars", "/usr/lib/phylip/bin/dnapars")
    if program is None:
        return None
    files = Files(folder, recipe.data, trees_of(near.trees.tables[:1], None, recipe.data.taxa), limit=600.0)
    # to dnapars ? may be a gap as well, N may not
    (folder / "infile").write_text(files.alignment.read_text().replace("?", "N"))
    done = execute([str(program)], folder, 600.0, "J\n13\n5\nY\n")
    said = re.search(r"requires a total of\s+([\d.]+)", (folder / "outfile").read_text(errors="replace"))
    trees = (folder / "outtree").read_text().count(";")
    return {"shortest": None if said is None else round(float(said[1])), "trees": trees, "cpu": done.cpu}


def measured(folder: Path, options: argparse.Namespace) -> Row:
    """All figures of one run."""
    run, sampler = Run.open(folder), Sampler.load(folder)
    recipe = sampler.recipe
    if not isinstance(recipe, PhylogenyRecipe) or not recipe.parsimony:
        raise SystemExit(f"{folder}: not a run over trees by parsimony")
    name, _ = known(len(recipe.data.taxa), recipe.data.sites)
    iterations = sampler.problem.policy.version
    near, exists = all_near(recipe, options.most)
    start, each = cost(recipe)
    row: Row = {
        "taxa": len(recipe.data.taxa), "sites": recipe.data.sites, "gaps": recipe.gaps, "iterations": iterations,
        "training_cpu": start + each * iterations, "training_wall": run.metrics()[-1].get("seconds"),
        "batch_size": recipe.training.batch_size, "planned": recipe.training.iterations,
        "training": " ".join(map(_bare, run.provenance["command"])),
        "settings": {key: value for key, value in recipe.settings().items() if "/" not in str(value)},
        "published": PARSIMONY.get(name) if recipe.gaps == "state" else None,
        "exist": exists, "exact_log_z": near.log_z(TEMPERATURES[0]), "load": load(),
        **provenance(["python", "benchmarks/phylogeny_parsimony.py", *map(_bare, sys.argv[1:])]),
    }  # fmt: skip
    with tempfile.TemporaryDirectory() as scratch:
        row["dnapars"] = dnapars(recipe, near, Path(scratch)) if recipe.gaps == "state" else None
    row["chains"] = chains_alone(new_trainer(recipe), near, min(iterations, 500))
    row["sampler"], row["temperatures"] = drawn(sampler, near, options.samples, options.seed)
    return {"name": name or (recipe.data.source or folder).stem, **row}


def _bare(word: str) -> str:
    return Path(word).name if "/" in word else word


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("runs", type=Path, nargs="+", help="run folders of: headwater train phylogeny --parsimony")
    add("--samples", type=int, default=2000, help="trees to draw at each temperature")
    add("--most", type=int, default=50_000, help="trees that a search for all of them meets")
    add("--seed", type=int, default=1, help="of the draws")
    add("--out", type=Path, default=HERE / "results" / "phylogeny-parsimony.json")
    options = parser.parse_args()
    torch.set_num_threads(1)
    for folder in options.runs:
        row = measured(folder, options)
        rows = json.loads(options.out.read_text()) if options.out.is_file() else {}
        rows[str(row["name"])] = row
        options.out.write_text(json.dumps(dict(sorted(rows.items())), indent=1) + "\n")
        print(write_report(options.out).read_text(), flush=True)


if __name__ == "__main__":
    main()
