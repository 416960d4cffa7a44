"""Trees evaluated, and trajectories trained on, per second of one core: Headwater beside the programs that
phylogeneticists use, and beside PhyloGFN.

    python benchmarks/phylogeny_speed.py                         the 12 primates that are shipped
    python benchmarks/phylogeny_speed.py --alignment DS1.nex     another alignment
    python benchmarks/phylogeny_speed.py --without phylogfn      leave a peer out

MrBayes, IQ-TREE, RAxML and PHYLIP take part where they are installed (Debian: mrbayes iqtree raxml phylip), PhyloGFN's
public repository if it can be cloned; a line says what is lacking. All are bound to one core and take turns, and a
ratio is taken turn by turn, in CPU time. That answers agree is checked before the clock starts.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from statistics import median

for _name in ("OMP_NUM_THREADS", "NUMBA_NUM_THREADS"):
    os.environ[_name] = "1"

import numpy as np  # noqa: E402
import torch  # noqa: E402

from contenders.protocol import Task  # noqa: E402
from contest import Runtime, Worker  # noqa: E402
from headwater.phylogeny import felsenstein, fitch  # noqa: E402
from headwater.phylogeny.branch_lengths import fit_lengths  # noqa: E402
from headwater.phylogeny.evidence import LikelihoodEvidence  # noqa: E402
from headwater.phylogeny.moves import UNIFORMS, propose  # noqa: E402
from headwater.phylogeny.neighbour_joining import neighbour_joining  # noqa: E402
from headwater.phylogeny.network import ForestNetwork  # noqa: E402
from headwater.phylogeny.posterior import trees_of  # noqa: E402
from headwater.phylogeny.recipe import PhylogenyRecipe  # noqa: E402
from headwater.phylogeny.settings import ModelSettings  # noqa: E402
from headwater.phylogeny.trees import Trees  # noqa: E402
from headwater.phylogeny.walks import tables_of  # noqa: E402
from headwater.training import Trainer  # noqa: E402
from peers import install  # noqa: E402
from phylogeny_programs import ALPHA, KAPPA, Files, Program, found, version  # noqa: E402
from phylogeny_speed_report import write_report  # noqa: E402
from provenance import load, provenance, slug  # noqa: E402

HERE = Path(__file__).resolve().parent
OURS = "Headwater"
MODELS = {
    "JC69": ModelSettings(),
    "HKY85+G4": ModelSettings("HKY85", gamma_categories=4, kappa=KAPPA, alpha=ALPHA),
}
GIVEN, AT_ONCE, CHAINS = 20_000, 2000, 256
PHYLOGFN = "benchmark_dna_cfgs/continuous_branch_lengths_modeling/cfg_continuous_temperature_anneal_0.24.yaml"
THEIR_SIZE = ForestNetwork(width=128, layers=6, heads=4, feed_forward=2, pair_width=256, components=5)

Turn = Callable[[float], tuple[float, float]]


@dataclass
class Contender:
    """name: whose it is. turn: works for about so many CPU seconds; how much it did, and the seconds it took. rates:
    per second, turn by turn. agreement: its scores less ours, lowest and highest, and over how many trees.
    """

    name: str
    turn: Turn
    note: str = ""
    agreement: tuple[float, float, int] | None = None
    rates: list[float] = field(default_factory=list)

    def row(self) -> dict[str, object]:
        return {"name": self.name, "note": self.note, "agreement": self.agreement, "rates": self.rates}


@dataclass
class Group:
    """What does comparable work; the first is ours. unit: what is counted. note: what is not the same."""

    title: str
    unit: str
    note: str
    contenders: list[Contender]
    left_out: list[str] = field(default_factory=list)


def here(work: Callable[[], int]) -> Turn:
    """Turns of something that runs in this process: `work` says how much it did."""
    work()  # compiles what it needs

    def turn(seconds: float) -> tuple[float, float]:
        began, done = time.process_time(), 0
        while (took := time.process_time() - began) < seconds:
            done += work()
        return done, took

    return turn


def some_trees(evidence: LikelihoodEvidence, taxa: tuple[str, ...], count: int) -> Trees:
    """Neighbour-joining trees of resampled sites, each ten random moves away: all different."""
    generator = torch.Generator().manual_seed(0)
    merges, lengths = neighbour_joining(evidence.resampled_distances(500, generator), 0.3 / evidence.n_sites)
    table, above = tables_of(merges, lengths)
    chosen = torch.arange(count) % len(table)
    table, moved = table[chosen], above[chosen]
    for _ in range(10):
        uniform = torch.rand(count, UNIFORMS, dtype=torch.float64, generator=generator)
        table, lengths_after, _ = propose(table, moved, uniform)
        assert lengths_after is not None
        moved = lengths_after
    trees = trees_of(table, moved, taxa)
    assert trees.lengths is not None
    lengths64 = np.maximum(trees.lengths, 1e-6)  # IQ-TREE's shortest
    lengths64[:, -1, 1] = 0.0
    return Trees(taxa, trees.merges, lengths64)


class Bench:
    """One alignment, its trees, and whoever is there to work on them."""

    def __init__(self, options: argparse.Namespace, folder: Path, stack: ExitStack) -> None:
        self.options, self.folder, self.stack = options, folder, stack
        self.recipes = {name: PhylogenyRecipe(alignment=options.alignment, model=model)
                        for name, model in MODELS.items()}  # fmt: skip
        self.alignment = self.recipes["JC69"].data
        evidence = self.recipes["JC69"].evidence
        assert isinstance(evidence, LikelihoodEvidence)
        self.evidence = evidence
        self.trees = some_trees(evidence, self.alignment.taxa, GIVEN)
        self.files = Files(folder, self.alignment, self.trees, options.limit)
        self.versions: dict[str, str] = {}
        self.programs = {
            "MrBayes": self._program("MrBayes", ["mb", "-v"], r"(?:MrBayes,? |Version\s*:?\s*)v?(\d[\w.]*)"),
            "IQ-TREE": self._program("IQ-TREE", ["iqtree2", "--version"], r"version (\S+)"),
            "RAxML": self._program(
                "RAxML", ["raxmlHPC-PTHREADS-AVX", "-v"], r"version (\S+)", "raxmlHPC-PTHREADS-SSE3", "raxmlHPC"
            ),
            "PHYLIP": self._program("PHYLIP", ["dnapars"], "", "/usr/lib/phylip/bin/dnapars"),
        }

    def groups(self) -> Iterator[Group]:
        wanted = self.options.groups
        if "parsimony" in wanted:
            yield self.parsimony("state")
            yield self.parsimony("missing")
        if "likelihood" in wanted:
            for model in MODELS:
                yield self.likelihood(model)
        if "lengths" in wanted:
            yield self.lengths()
        if "proposals" in wanted:
            for model in MODELS:
                yield self.proposals(model)
        if "training" in wanted:
            yield self.training()

    def parsimony(self, gaps: str) -> Group:
        patterns = self.alignment.patterns("state" if gaps == "state" else "missing")
        sites = fitch.pack(patterns.masks, patterns.weights, 5 if gaps == "state" else 4)
        merges = self.trees.merges[:AT_ONCE]

        def work() -> int:
            return len(fitch.scores(sites.leaves, merges))

        scores = fitch.scores(sites.leaves, merges) + sites.constant
        group = Group(
            f"Parsimony of given trees, a gap is {'a fifth state' if gaps == 'state' else 'missing data'}",
            "trees", "dnapars also works out the states at every node and draws every tree into its output file.",
            [Contender(OURS, here(work))],
        )  # fmt: skip
        self._join(group, "PHYLIP", "PHYLIP dnapars", lambda at: self.files.dnapars(at, gaps == "state"), scores)
        return group

    def likelihood(self, model: str) -> Group:
        recipe = self.recipes[model]
        assert isinstance(recipe.evidence, LikelihoodEvidence)
        (part,) = recipe.evidence.parts
        merges, lengths = self.trees.merges[:AT_ONCE], self._some_lengths()[:AT_ONCE]

        def scores() -> np.ndarray:
            return felsenstein.log_likelihoods(part.tips, part.process, merges, lengths)

        group = Group(
            f"Log-likelihood of given trees with given lengths, {model}", "trees",
            "IQ-TREE also reads every tree and writes its score.", [Contender(OURS, here(lambda: len(scores())))],
        )  # fmt: skip
        self._join(group, "IQ-TREE", "IQ-TREE -blfix", lambda at: self.files.iqtree(at, model, False), scores())
        return group

    def lengths(self) -> Group:
        (part,) = self.evidence.parts
        merges, lengths = self.trees.merges[:100], self._some_lengths()[:100]

        def fitted() -> np.ndarray:
            return fit_lengths([(part.tips, part.process)], merges, lengths, tolerance=0.01)[1]

        group = Group(
            "Branch lengths of given trees fitted by maximum likelihood, JC69", "trees",
            "Everybody stops by a rule of its own: ours when it expects to gain less than 0.01 nats, IQ-TREE and RAxML "
            "by their defaults. Unlikely trees can have several maxima, nats apart, and not all end in the same.",
            [Contender(OURS, here(lambda: len(fitted())))],
        )  # fmt: skip
        best = fitted()
        self._join(group, "IQ-TREE", "IQ-TREE -z", lambda at: self.files.iqtree(at, "JC69", True), best)
        self._join(group, "RAxML", "RAxML -f n", self.files.raxml, best)
        return group

    def proposals(self, model: str) -> Group:
        recipe = self.recipes[model]
        reward, policy = recipe.base_reward, recipe.problem().policy
        generator = torch.Generator().manual_seed(0)
        table, above = tables_of(
            torch.from_numpy(self.trees.merges[:CHAINS]), torch.from_numpy(self._some_lengths()[:CHAINS]).float()
        )
        nothing = torch.zeros(CHAINS, 0)
        score = reward(policy.assembled(table, above), nothing)  # type: ignore[union-attr,operator]

        def work() -> int:
            nonlocal table, above, score
            uniform = torch.rand(CHAINS, UNIFORMS + 1, dtype=torch.float64, generator=generator)
            moved, stretched, ratio = propose(table, above, uniform[:, 1:])
            assert stretched is not None
            new = reward(policy.assembled(moved, stretched), nothing)  # type: ignore[union-attr,operator]
            accepted = (uniform[:, 0].log() < (new - score).double() + ratio)[:, None]
            table, above = torch.where(accepted, moved, table), torch.where(accepted, stretched, above)
            score = torch.where(accepted[:, 0], new, score)
            return CHAINS

        group = Group(
            f"Proposals of Markov chains over trees and lengths, {model} with fixed parameters", "proposals",
            f"MrBayes evaluates only the part of a tree that a proposal changes; we evaluate whole trees, of {CHAINS} "
            "chains side by side. How well the moves mix is another matter.", [Contender(OURS, here(work))],
        )  # fmt: skip
        for beagle in (False, True):
            name = "MrBayes with BEAGLE" if beagle else "MrBayes, its own kernels"
            self._join(group, "MrBayes", name, lambda at, beagle=beagle: self.files.mrbayes(at, model, beagle), None)
        return group

    def training(self) -> Group:
        group = Group(
            "Training: trajectories drawn, scored and learned from, JC69", "trajectories",
            "Headwater: half from the policy, half from chains. PhyloGFN: half from the policy, half from the best "
            "trees. Each with its own batch and network; the second of ours has their width and depth, and fewer "
            "parameters since it sees distinct columns, not sites. Ratios are of both.",
            [],
        )  # fmt: skip
        for name, network in ((OURS, ForestNetwork()), (f"{OURS}, a network of their size", THEIR_SIZE)):
            recipe = PhylogenyRecipe(alignment=self.options.alignment, network=network)
            problem = recipe.problem()
            trainer = Trainer(
                problem.policy, problem.reward, problem.conditions, recipe.objective, recipe.training,
                recipe.exploration, recipe.replay, explorer=problem.explorer,
            )  # fmt: skip

            def work(trainer: Trainer = trainer) -> int:
                trainer.update()
                return trainer.training.batch_size + trainer.training.replayed

            count = sum(weight.numel() for weight in problem.policy.parameters())
            note = f"width {network.width}, {network.layers} layers, {count:,} parameters, batch {work()}"
            group.contenders.append(Contender(name, here(work), note))
        self._phylogfn(group)
        return group

    def _phylogfn(self, group: Group) -> None:
        if "phylogfn" in self.options.without:
            group.left_out.append("PhyloGFN: left out as asked")
            return
        try:
            peer = install("phylogfn", self.options.peers, self.options.phylogfn)
        except Exception as error:
            group.left_out.append(f"PhyloGFN: not installed ({type(error).__name__})")
            return
        sequences = self.folder / "alignment.fasta"
        rows = self.files.alignment.read_text().splitlines()[1:]
        sequences.write_text("".join(f">{row[:10].strip()}\n{row[10:]}\n" for row in rows))
        task = Task("trees", settings={"configuration": PHYLOGFN, "sequences": str(sequences)})
        runtime = Runtime(peer.python, "phylogfn_worker.py", peer.checkout)
        worker = self.stack.enter_context(Worker(runtime, task, 1, self.folder))
        self.versions["PhyloGFN"] = f"{peer.commit[:7]}, torch {worker.about['torch']}"
        batch = int(worker.about["batch"])

        def turn(seconds: float) -> tuple[float, float]:
            done, took = 0, 0.0
            while took < seconds:
                took += worker.milliseconds(1)[0] / 1e3
                done += batch
            return done, took

        note = f"width 128, 6 layers, {worker.about['parameters']:,} parameters, batch {batch}"
        group.contenders.append(Contender("PhyloGFN, public repository", turn, note))

    def _program(self, name: str, command: list[str], pattern: str, *places: str) -> Path | None:
        at = None if slug(name) in self.options.without else found(command[0], *places)
        if at is not None and pattern:
            self.versions[name] = version([str(at), *command[1:]], pattern)
        return at

    def _join(
        self, group: Group, name: str, label: str, made: Callable[[Path], Program], ours: np.ndarray | None
    ) -> None:
        """Let a program take part, if it is there and works; compare its scores with ours."""
        at = self.programs[name]
        if at is None:
            group.left_out.append(f"{label}: not installed, or left out as asked")
            return
        program = made(at)
        try:
            said = program.prepare(self.options.seconds)
        except (RuntimeError, TimeoutError, OSError) as error:
            group.left_out.append(f"{label}: {str(error).splitlines()[0]}")
            return
        if name == "PHYLIP":
            self.versions[name] = said.text.partition("version ")[2][:5]
        if not program.is_fair:
            group.left_out.append(
                f"{label}: {program.each:.2g} CPU-seconds a tree, less than a tree a second, is no measure of what its "
                "kernels can do"
            )
            return
        if "BEAGLE" in label and "Using BEAGLE" not in said.text:
            group.left_out.append(f"{label}: it was built without, or the library is not there")
            return
        agreement = None
        if program.scores is not None and ours is not None:
            theirs = np.array(program.scores(said.text))
            if not (count := min(len(theirs), len(ours))):
                raise RuntimeError(f"{label} tells no scores")
            less = theirs[:count] - ours[:count]
            agreement = (float(less.min()), float(less.max()), count)
        group.contenders.append(Contender(label, program.turn, agreement=agreement))

    def _some_lengths(self) -> np.ndarray:
        assert self.trees.lengths is not None
        return self.trees.lengths


def measure(group: Group, rounds: int, seconds: float) -> dict[str, object]:
    for _ in range(rounds):
        for contender in group.contenders:
            done, took = contender.turn(seconds)
            contender.rates.append(done / took)
    said = ", ".join(f"{each.name} {median(each.rates):,.1f}" for each in group.contenders)
    print(f"{group.title}: {said}; {group.left_out}", file=sys.stderr, flush=True)
    return {
        "title": group.title, "unit": group.unit, "note": group.note, "left_out": group.left_out,
        "contenders": [contender.row() for contender in group.contenders],
    }  # fmt: skip


@contextmanager
def bound_to(core: int | None) -> Iterator[None]:
    """This process, and those that it starts, on one core."""
    if core is None or not hasattr(os, "sched_setaffinity"):
        yield
        return
    before = os.sched_getaffinity(0)
    os.sched_setaffinity(0, {core})
    try:
        yield
    finally:
        os.sched_setaffinity(0, before)


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--alignment", type=Path, help="aligned DNA (default: the primates)")
    names = ("parsimony", "likelihood", "lengths", "proposals", "training")
    add("--groups", nargs="+", choices=names, default=names, help="what to measure (default: all)")
    add("--without", nargs="+", choices=("phylogfn", "mrbayes", "iq-tree", "raxml", "phylip"), default=(),
        help="peers to leave out")  # fmt: skip
    add("--rounds", type=int, default=7)
    add("--seconds", type=float, default=2.0, help="CPU seconds of a turn, about")
    add("--limit", type=float, default=120.0, help="seconds after which a program's run is given up")
    add("--core", type=int, default=0, help="to which all are bound; -1 for none")
    add("--peers", type=Path, default=HERE / ".peers", help="where PhyloGFN is cloned and installed")
    add("--phylogfn", type=Path, help="a checkout of PhyloGFN that you have")
    add("--out", type=Path, default=HERE / "results")
    return parser.parse_args()


def main() -> None:
    options = arguments()
    torch.set_num_threads(1)
    made = provenance(["python", "benchmarks/phylogeny_speed.py", *_without_folders(sys.argv[1:])])
    with bound_to(options.core if options.core >= 0 else None), ExitStack() as stack:
        bench = Bench(options, Path(stack.enter_context(tempfile.TemporaryDirectory())), stack)
        name = "primates" if options.alignment is None else options.alignment.stem
        result = {
            "provenance": made,
            "load": [load()],
            "alignment": {
                "name": name, "taxa": bench.evidence.n, "sites": bench.alignment.sites,
                "patterns": bench.alignment.patterns().masks.shape[1],
            },
            "rounds": options.rounds, "seconds": options.seconds, "trees_at_once": AT_ONCE,
            "groups": [measure(group, options.rounds, options.seconds) for group in bench.groups()],
            "peers": bench.versions,
        }  # fmt: skip
    result["load"].append(load())  # type: ignore[attr-defined]
    file = options.out / f"phylogeny-speed-{slug(name)}.json"
    file.write_text(json.dumps(result, indent=1) + "\n")
    print(write_report(file))


def _without_folders(words: list[str]) -> list[str]:
    """The command without this machine's folders."""
    kept = [word for i, word in enumerate(words) if not {word, words[i - 1] if i else ""} & {"--peers", "--phylogfn"}]
    return [Path(word).name if "/" in word else word for word in kept]


if __name__ == "__main__":
    main()
