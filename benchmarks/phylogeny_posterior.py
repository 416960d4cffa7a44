"""How good a posterior over trees is: ours and MrBayes', by what phylogeneticists look at, and by CPU time.

    python benchmarks/phylogeny_posterior.py --run runs/ds1 --mrbayes ds1.run1.t ds1.run2.t --reference golden.trees
    python benchmarks/phylogeny_posterior.py --run runs/ds1 --mrbayes ds1.run1.t ds1.run2.t --points 8
    python benchmarks/phylogeny_posterior.py --alignment ds1.nex --mrbayes ds1.run1.t ds1.run2.t

Average standard deviation of split frequencies, total variation between topologies beside what as many independent
draws would have, the posterior mass on topologies that were met; the log marginal likelihood with its interval beside
known values. --reference: trees with weights, or a table of probability and Newick by tabs; without one, ours is
compared with each of MrBayes' runs, and each of these with the others. CPU time of ours is that of training and of
drawing the trees; of MrBayes, what its log says, or --mrbayes-cpu, and the curve over it is from the first parts of its
.t files. Ours is from the run's checkpoints, with the CPU time of an update measured here; or, with --points, from a
training with the same settings and seed in this process, looked at that many times.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import sys
import time
from dataclasses import asdict, dataclass
from pathlib import Path
from statistics import fmean

for _name in ("OMP_NUM_THREADS", "NUMBA_NUM_THREADS"):
    os.environ.setdefault(_name, "1")

import numpy as np  # noqa: E402
import torch  # noqa: E402
from safetensors.torch import load_file  # noqa: E402

from headwater.evaluation import sampling_floor  # noqa: E402
from headwater.phylogeny.data import Alignment, read_alignment  # noqa: E402
from headwater.phylogeny.recipe import PhylogenyRecipe  # noqa: E402
from headwater.phylogeny.summaries import compare, topologies  # noqa: E402
from headwater.phylogeny.tree_files import TreeSample, parse_trees, read_trees  # noqa: E402
from headwater.phylogeny.trees import concatenated  # noqa: E402
from headwater.runs import Run  # noqa: E402
from headwater.sampler import Sampler  # noqa: E402
from headwater.settings import load_recipe  # noqa: E402
from headwater.training import Trainer  # noqa: E402
from phylogeny_known import known  # noqa: E402
from phylogeny_posterior_report import write_report  # noqa: E402
from provenance import load, provenance, slug  # noqa: E402

HERE = Path(__file__).resolve().parent
BURN_IN = 0.25
Look = tuple[float, int, dict[str, torch.Tensor]]
"""CPU seconds, iterations, weights."""

_SPENT = re.compile(r"Analysis used ([\d.]+) seconds of CPU time")


@dataclass(frozen=True)
class Agreement:
    """A sample beside the target, averaged over targets where there are several.

    split_deviation, largest_deviation, topology_distance, covered: see `summaries.Comparison`. floor: the distance that
    `draws` independent draws from the target would have on the average. topologies: how many the sample has.
    """

    split_deviation: float
    largest_deviation: float
    topology_distance: float
    floor: float
    covered: float
    topologies: int
    draws: int


@dataclass(frozen=True)
class Evidence:
    """log marginal likelihood, half its 95 % interval, effective sample size as a share of the draws."""

    log_marginal_likelihood: float
    interval: float
    effective: float
    draws: int


def agreement(sample: TreeSample, targets: list[TreeSample], effective: float = 1.0) -> Agreement:
    """effective: the sample's size in independent draws, as a share of its trees."""
    draws = max(1, round(effective * len(sample.trees)))
    found = [compare(sample.trees, target.trees, sample.weights, target.weights) for target in targets]
    floors = [
        sampling_floor(torch.from_numpy(topologies(target.trees, target.weights).probabilities), draws)
        for target in targets
    ]
    return Agreement(
        fmean(each.split_deviation for each in found),
        fmean(each.largest_deviation for each in found),
        fmean(each.topology_distance for each in found),
        fmean(floors),
        fmean(each.covered for each in found),
        len(topologies(sample.trees, sample.weights).trees),
        draws,
    )


class MrBayes:
    """The .t files of one analysis: runs that went on side by side, which took `cpu` seconds together."""

    def __init__(self, files: list[Path], taxa: tuple[str, ...], cpu: float | None) -> None:
        self.runs = [read_trees(file, taxa) for file in files]
        logs = [file.with_name(re.sub(r"(\.run\d+)?\.t$", "", file.name) + ".log") for file in files[:1]]
        said = _SPENT.search(logs[0].read_text(errors="replace")) if logs and logs[0].is_file() else None
        self.cpu = cpu if cpu is not None else float(said[1]) if said else None

    def part(self, run: int, share: float = 1.0) -> TreeSample | None:
        """The trees of a run's first part without its burn-in; None where there are hardly any."""
        whole = self.runs[run]
        stop = round(share * len(whole.trees))
        start = int(BURN_IN * stop)
        if stop - start < 4:
            return None
        return TreeSample(whole.trees[start:stop], whole.weights[start:stop])

    def pooled(self, share: float = 1.0) -> TreeSample | None:
        """All runs' first parts together."""
        parts = [part for run in range(len(self.runs)) if (part := self.part(run, share)) is not None]
        if not parts:
            return None
        return TreeSample(
            concatenated([part.trees for part in parts]), np.concatenate([part.weights for part in parts])
        )

    def after(self, share: float, reference: TreeSample | None) -> tuple[float | None, Agreement] | None:
        """CPU seconds of the first part of the analysis, and how well it agrees: all runs together with the reference;
        without one, each run alone (of which CPU seconds are those of one) with the whole of the others.
        """
        cpu = None if self.cpu is None else share * self.cpu
        if reference is not None:
            part = self.pooled(share)
            return None if part is None else (cpu, agreement(part, [reference]))
        parts = [self.part(run, share) for run in range(len(self.runs))]
        if len(parts) < 2 or any(part is None for part in parts):
            return None
        each = [
            agreement(part, [self._whole(other) for other in range(len(parts)) if other != run])
            for run, part in enumerate(parts)
            if part is not None
        ]
        mean = {name: fmean(asdict(one)[name] for one in each) for name in asdict(each[0])}
        mean["topologies"], mean["draws"] = round(mean["topologies"]), round(mean["draws"])
        return None if cpu is None else cpu / len(parts), Agreement(**mean)  # type: ignore[arg-type]

    def targets(self) -> list[TreeSample]:
        return [self._whole(run) for run in range(len(self.runs))]

    def _whole(self, run: int) -> TreeSample:
        part = self.part(run)
        assert part is not None
        return part


def reference_trees(path: Path, taxa: tuple[str, ...]) -> TreeSample:
    """Trees with weights; or a table, whose first column is the probability and the last Newick, taxa by name or by
    their places in a line "# taxa ...".
    """
    if path.suffix != ".tsv":
        return read_trees(path, taxa, BURN_IN if path.suffix == ".t" else 0.0)
    lines = path.read_text().splitlines()
    named = next((line.split()[2:] for line in lines if line.startswith("# taxa")), list(taxa))
    rows = [line.split("\t") for line in lines if line and not line.startswith("#")]
    block = ",\n".join(f"{i} {name}" for i, name in enumerate(named, start=1))
    trees = "\n".join(f"tree t{i} = [&U] [&W {row[0]}] {row[-1]}" for i, row in enumerate(rows))
    return parse_trees(f"#NEXUS\nbegin trees;\ntranslate\n{block};\n{trees}\nend;\n", taxa, source=str(path))


def drawn(sampler: Sampler, count: int, seed: int) -> tuple[TreeSample, TreeSample, Evidence]:
    """Trees as drawn, the same with importance weights, and what the weights say of the marginal likelihood."""
    assert isinstance(sampler.recipe, PhylogenyRecipe)
    found = sampler.recipe.weighted(sampler.sample(count, seed=seed))
    evidence = Evidence(found.log_z, found.interval, found.effective, len(found.weights))
    plain = TreeSample(found.trees, np.ones(len(found.weights)))
    return plain, TreeSample(found.trees, found.weights), evidence


def new_trainer(recipe: PhylogenyRecipe) -> Trainer:
    """As the run was trained, without its logs."""
    torch.manual_seed(recipe.seed)
    problem = recipe.problem()
    return Trainer(
        problem.policy, problem.reward, problem.conditions, recipe.objective, recipe.training, recipe.exploration,
        recipe.replay, recipe.seed, given=recipe.given_states(), search=recipe.search, explorer=problem.explorer,
    )  # fmt: skip


def cost(recipe: PhylogenyRecipe) -> tuple[float, float]:
    """CPU seconds of training's start, and of an update: the median of twenty."""
    began = time.process_time()
    trainer = new_trainer(recipe)
    ends = []
    try:
        for _ in range(21):
            trainer.update()
            ends.append(time.process_time() - began)
    finally:
        trainer.search.close()
    each = float(np.median(np.diff(ends)))
    return max(0.0, ends[0] - each), each


def checkpoints(folder: Path, start: float, each: float) -> list[Look]:
    """Of a run: its weights as far as they are kept."""
    found = []
    for kept in sorted((folder / "checkpoints").glob("iteration-*")):
        iteration = int(kept.name.rpartition("-")[2])
        average = kept / "average.safetensors"
        weights = load_file(average if average.is_file() else kept / "policy.safetensors")
        found.append((start + each * iteration, iteration, weights))
    return found


def trained_anew(recipe: PhylogenyRecipe, points: int) -> list[Look]:
    """Weights on the way of a training with the run's settings, each look twice as far as the one before."""
    began = time.process_time()
    trainer = new_trainer(recipe)
    last = recipe.training.iterations
    wanted = {max(1, round(last / 2**k)) for k in range(points)}
    kept = []
    try:
        while trainer.iteration < last:
            trainer.update()
            if trainer.iteration in wanted:
                spent = time.process_time() - began
                weights = {name: value.clone() for name, value in trainer.sampler.state_dict().items()}
                kept.append((spent, trainer.iteration, weights))
                print(f"iteration {trainer.iteration}: {spent:.0f} CPU seconds", file=sys.stderr, flush=True)
    finally:
        trainer.search.close()
    return kept


def our_curve(
    recipe: PhylogenyRecipe, kept: list[Look], options: argparse.Namespace, targets: list[TreeSample]
) -> list[dict[str, object]]:
    """Agreement and evidence by CPU seconds of training and drawing."""
    rows: list[dict[str, object]] = []
    problem = recipe.problem()
    for spent, iteration, weights in kept:
        problem.policy.load_state_dict(weights)
        problem.policy.requires_grad_(False)
        began = time.process_time()
        plain, weighted, evidence = drawn(Sampler(recipe, problem), options.samples, options.seed)
        row = {"iteration": iteration, "training_cpu": spent, "cpu": spent + time.process_time() - began}
        rows.append(row | _both(plain, weighted, evidence, targets))
        print(json.dumps(rows[-1]), file=sys.stderr, flush=True)
    return rows


def _both(plain: TreeSample, weighted: TreeSample, evidence: Evidence, targets: list[TreeSample]) -> dict[str, object]:
    row: dict[str, object] = {"evidence": asdict(evidence)}
    if targets:
        row["drawn"] = asdict(agreement(plain, targets))
        row["weighted"] = asdict(agreement(weighted, targets, evidence.effective))
    return row


def ours(options: argparse.Namespace, recipe: PhylogenyRecipe, targets: list[TreeSample]) -> dict[str, object]:
    """The trained run's figures, what it cost, and its curve."""
    began = time.process_time()
    found = drawn(Sampler.load(options.run), options.samples, options.seed)
    drawing = time.process_time() - began
    metrics = Run.open(options.run).metrics()
    last = metrics[-1] if metrics else {}
    start, each = cost(recipe)
    kept = trained_anew(recipe, options.points) if options.points else checkpoints(options.run, start, each)
    names = ("iteration", "seconds", "eval/log_z_estimate", "eval/log_z_interval", "eval/effective_sample_size")
    return {
        "drawing_cpu": drawing,
        "training_cpu": start + each * last.get("iteration", recipe.training.iterations),
        "training_wall": last.get("seconds"),
        "iterations": last.get("iteration"),
        "trajectories": last.get("trajectories"),
        "metrics": [{name: row.get(name) for name in names} for row in metrics if "eval/log_z_estimate" in row],
        "curve": our_curve(recipe, kept, options, targets),
        **_both(*found, targets),
    }


def measured(options: argparse.Namespace, recipe: PhylogenyRecipe | None, alignment: Alignment) -> dict[str, object]:
    """All figures of one alignment."""
    taxa = alignment.taxa
    reference = None if options.reference is None else reference_trees(options.reference, taxa)
    theirs = MrBayes(options.mrbayes, taxa, options.mrbayes_cpu) if options.mrbayes else None
    targets = [reference] if reference is not None else theirs.targets() if theirs is not None else []
    name, values = known(len(taxa), alignment.sites)
    result: dict[str, object] = {
        "alignment": {"name": name or (alignment.source or Path("alignment")).stem, "taxa": len(taxa),
                      "sites": alignment.sites},
        "known": values,
        "target": "" if not targets else options.reference.name if reference is not None else "MrBayes' other runs",
    }  # fmt: skip
    if targets:
        table = [topologies(target.trees, target.weights) for target in targets]
        result["target_topologies"] = [len(each.trees) for each in table]
        result["target_for_95_percent"] = [each.credible() for each in table]
    if theirs is not None:
        found = theirs.after(1.0, reference)
        shares = [2.0**-k for k in range(7, -1, -1)]
        curve = [theirs.after(share, reference) for share in shares]
        result["mrbayes"] = {
            "cpu": theirs.cpu, "runs": len(theirs.runs), "trees": sum(len(run.trees) for run in theirs.runs),
            "agreement": None if found is None else asdict(found[1]),
            "curve": [{"cpu": each[0], **asdict(each[1])} for each in curve if each is not None],
        }  # fmt: skip
        if len(theirs.runs) > 1:
            between = agreement(theirs.targets()[0], theirs.targets()[1:])
            result["mrbayes"]["between_runs"] = asdict(between)  # type: ignore[index]
    if recipe is not None:
        result["headwater"] = ours(options, recipe, targets)
    return result


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--run", type=Path, help="a run folder of: headwater train phylogeny")
    add("--alignment", type=Path, help="where there is no run")
    add("--mrbayes", type=Path, nargs="+", default=[], help=".t files of one analysis")
    add("--mrbayes-cpu", type=float, help="CPU seconds that it took, all runs together")
    add("--reference", type=Path, help="trees with weights, or a table of probability and Newick")
    add("--samples", type=int, default=5000, help="trees to draw")
    add("--points", type=int, default=0, help="train again, and look this often")
    add("--seed", type=int, default=1, help="of the draws")
    add("--out", type=Path, default=HERE / "results")
    options = parser.parse_args()
    if options.run is None and options.alignment is None:
        parser.error("give --run, or --alignment with --mrbayes")
    return options


def main() -> None:
    options = arguments()
    torch.set_num_threads(1)
    made = provenance(["python", "benchmarks/phylogeny_posterior.py", *(Path(word).name if "/" in word else word
                                                                        for word in sys.argv[1:])])  # fmt: skip
    recipe = None
    if options.run is not None:
        recipe = load_recipe(Run.open(options.run))
        if not isinstance(recipe, PhylogenyRecipe) or recipe.parsimony:
            raise SystemExit(f"{options.run}: not a run over a posterior of trees")
    alignment = recipe.data if recipe is not None else read_alignment(options.alignment)
    result = {"provenance": made, "load": load(), "samples": options.samples, **measured(options, recipe, alignment)}
    if recipe is not None:
        result["settings"] = {key: value for key, value in recipe.settings().items() if "/" not in str(value)}
    name = slug(str(result["alignment"]["name"]))  # type: ignore[index]
    file = options.out / f"phylogeny-posterior-{name}.json"
    file.write_text(json.dumps(result, indent=1) + "\n")
    print(write_report(file).read_text())


if __name__ == "__main__":
    main()
