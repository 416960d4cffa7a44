"""The recipe `phylogeny` as a user meets it: files, report, errors, conditions, partitions, resuming, processes."""

from __future__ import annotations

import csv
import shutil
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch

from headwater import jobs
from headwater.cli import main
from headwater.evaluation import ExactDistribution
from headwater.phylogeny.environment import Forests
from headwater.phylogeny.policy import TreePolicy
from headwater.phylogeny.recipe import PhylogenyRecipe
from headwater.runs import Run
from headwater.sampler import Sampler
from phylogeny_recipe_helpers import evolved, fasta, train
from test_kill import Driver, assert_same_end

TINY = (
    "--training.iterations", 6, "--training.batch-size", 16, "--training.log-every", 2, "--samples", 60,
    "--network.width", 16, "--network.pair-width", 16, "--network.heads", 2, "--chains.pool", 16, "--chains.warm-up", 3,
)  # fmt: skip
ROWS = evolved(((("a", "b_b"), "c-c"), ("d", "e")), 80, 0.1, seed=1, gaps=0.03)
FILES = ("samples.trees", "consensus.nwk", "splits.tsv", "topologies.trees", "topologies.tsv", "best_trees.tsv")
KINDS = {
    "posterior": (),
    "parsimony": ("--parsimony",),
    "parsimony, gap a state": ("--parsimony", "--gaps", "state", "--inverse-temperatures", "0.25", "0.25"),
}


@pytest.fixture(scope="module")
def alignment(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return fasta(tmp_path_factory.mktemp("data") / "five.fasta", ROWS)


@pytest.fixture(scope="module")
def reference(alignment: Path) -> Path:
    """Trees as another program writes them."""
    path = alignment.with_name("reference.t")
    names = ",".join(f"{i} '{name}'" for i, name in enumerate(ROWS, 1))
    trees = ["((1,2),3,(4,5))", "((1,3),2,(4,5))", "((1,2),3,(4,5))", "((1,2),3,(4,5))"]
    lines = [f"tree rep.{i} = [&U] {tree};" for i, tree in enumerate(trees)]
    path.write_text("\n".join(["#NEXUS", "begin trees;", f"translate {names};", *lines, "end;", ""]))
    return path


def rows_of(path: Path) -> list[dict[str, str]]:
    with path.open() as file:
        return list(csv.DictReader(file, delimiter="\t" if path.suffix == ".tsv" else ","))


# What a run writes


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("compared", [False, True])
def test_a_run_writes_the_files_of_the_field_and_its_report(
    tmp_path: Path, alignment: Path, reference: Path, kind: str, compared: bool
) -> None:
    flags = (*KINDS[kind], *(("--reference", reference) if compared else ()))
    run = train(tmp_path / "run", "--alignment", alignment, *TINY, *flags)
    assert all((run.folder / name).stat().st_size for name in FILES)
    samples, figures = run.samples(), run.evaluation()
    assert samples is not None
    assert len(samples.objects) == 60
    splits = rows_of(run.folder / "splits.tsv")
    assert sum(float(row["frequency"]) for row in splits) == pytest.approx(2, abs=1e-4)  # a tree has two inner edges
    topologies = rows_of(run.folder / "topologies.tsv")
    assert float(topologies[-1]["cumulative"]) == pytest.approx(1)
    assert len(topologies) == figures["distinct_topologies"] <= 15
    best = rows_of(run.folder / "best_trees.tsv")
    if kind == "posterior":
        assert float(best[0]["log_posterior"]) == pytest.approx(samples.log_reward.max(), abs=1e-3)
        assert figures["samples_log_marginal_likelihood_interval"] > 0  # type: ignore[operator]
        assert "total_variation" not in figures
    else:
        assert -float(best[0]["minus_changes"]) == figures["fewest_changes"]
        assert 0 < figures["total_variation"] < 1  # type: ignore[operator]
        beta = 0.25 if "state" in kind else 4
        assert np.ptp(samples.log_reward + beta * np.array(samples.extra["changes"])) < 1e-4
    page = (run.folder / "report.html").read_text()
    sections = ["Consensus tree", "Topologies", "What this is good for", *["Agreement with the reference"] * compared]
    assert all(f"<h2>{title}</h2>" in page for title in sections)
    assert ("Agreement" in page) == compared == ("split_deviation" in figures)


def test_other_programs_read_the_samples_as_they_are_weighted(tmp_path: Path, alignment: Path) -> None:
    dendropy = pytest.importorskip("dendropy")
    run = train(tmp_path / "run", "--alignment", alignment, *TINY)
    kept = {"preserve_underscores": True}
    trees = dendropy.TreeList.get(path=run.folder / "samples.trees", schema="nexus", store_tree_weights=True, **kept)
    assert {taxon.label for taxon in trees.taxon_namespace} == set(ROWS)
    samples, recipe = run.samples(), Sampler.load(run.folder).recipe
    assert isinstance(recipe, PhylogenyRecipe)
    assert samples is not None
    assert [tree.weight for tree in trees] == pytest.approx(recipe.weighted(samples).weights, rel=1e-4)
    assert [tree.length() for tree in trees] == pytest.approx(samples.extra["tree_length"], rel=1e-5)
    consensus = dendropy.Tree.get(path=run.folder / "consensus.nwk", schema="newick", **kept)
    assert {leaf.taxon.label for leaf in consensus.leaf_node_iter()} == set(ROWS)


def test_the_progress_bar_shows_log_r_since_r_is_too_small(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    alignment = fasta(tmp_path / "long.fasta", {name: 4 * row for name, row in ROWS.items()})
    with pytest.raises(SystemExit):
        main(["train", "phylogeny", "--alignment", str(alignment), "--out", str(tmp_path / "run"), *map(str, TINY)])
    shown = capsys.readouterr().err
    assert "log R -" in shown
    assert ", reward" not in shown
    run = Run.open(tmp_path / "run")
    assert not [name for name in run.evaluation() if name.endswith("mean_reward")]
    assert "Mean reward" not in (run.folder / "report.html").read_text()


# Errors

GOOD = {name: row.replace("-", "A") for name, row in ROWS.items()}
BAD = {
    "unequal lengths": ({**GOOD, "d": GOOD["d"] + "A"}, ("line 7", "'d'", "81 sites")),
    "unknown character": ({**GOOD, "d": "A*" + GOOD["d"][2:]}, ("line 8", "'d'", "'*'")),
    "all gaps": ({**GOOD, "e": "-" * 80}, ("line 9", "'e'")),
    "three taxa": (dict(list(GOOD.items())[:3]), ("3 taxa", "at least 4")),
}


def fails(folder: Path, capsys: pytest.CaptureFixture[str], *flags: object) -> str:
    """What the command says, in one line, when it refuses before there is a run."""
    capsys.readouterr()
    with pytest.raises(SystemExit) as ended:
        main(["train", "phylogeny", "--quiet", "--out", str(folder / "run"), *map(str, flags)])
    assert ended.value.code == 2
    assert not (folder / "run").exists()
    said = capsys.readouterr().err
    assert "Traceback" not in said
    return " ".join(said.replace("│", " ").split())


@pytest.mark.parametrize("what", BAD)
def test_an_alignment_that_cannot_be_used_is_refused_with_file_line_and_taxon(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], what: str
) -> None:
    monkeypatch.chdir(tmp_path)
    rows, words = BAD[what]
    fasta(Path("bad.fasta"), rows)
    said = fails(tmp_path, capsys, "--alignment", "bad.fasta")
    assert all(word in said for word in ("bad.fasta", *words)), said


def test_a_taxon_that_comes_twice_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    text = fasta(Path("twice.fasta"), GOOD).read_text()
    Path("twice.fasta").write_text(text.replace(">e\n", ">d\n"))
    said = fails(tmp_path, capsys, "--alignment", "twice.fasta")
    assert all(word in said for word in ("twice.fasta", "line 9", "'d'")), said


def test_missing_files_and_trees_of_other_taxa_are_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], alignment: Path
) -> None:
    monkeypatch.chdir(tmp_path)
    assert "nowhere.nex" in fails(tmp_path, capsys, "--alignment", "nowhere.nex")
    assert "nowhere.t" in fails(tmp_path, capsys, "--alignment", alignment, "--reference", "nowhere.t")
    Path("other.nwk").write_text("((a,b_b),'c-c',(d,f));")
    said = fails(tmp_path, capsys, "--alignment", alignment, "--reference", "other.nwk")
    assert all(word in said for word in ("other.nwk", "other taxa", "e", "f")), said


@pytest.mark.parametrize(
    ("flags", "word"),
    [
        (("--gaps", "state"), "gaps"),
        (("--keep-objects",), "keep_objects"),
        (("--objective.name", "mdb"), "objective.name"),
        (("--parsimony", "--objective.name", "vargrad"), "vargrad"),
        (("--exploration.teacher.share", "0.5"), "teacher"),
        (("--exploration.local-search.rounds", "2"), "local_search"),
        (("--model.sampled",), "free parameters"),
        (("--branch-rate", "0"), "branch_rate"),
        (("--inverse-temperatures", "2", "1"), "low = 2.0"),
        (("--chains.share", "1"), "share"),
        (("--network.heads", "7"), "heads"),
    ],
)
def test_settings_that_do_not_go_together_are_refused_by_name(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], alignment: Path, flags: tuple[str, ...], word: str
) -> None:
    assert word in fails(tmp_path, capsys, "--alignment", alignment, *flags)


def test_the_command_as_a_process_says_no_more_than_what_is_wrong(tmp_path: Path) -> None:
    fasta(tmp_path / "bad.fasta", BAD["unequal lengths"][0])
    command = [sys.executable, "-m", "headwater.cli", "train", "phylogeny", "--alignment", "bad.fasta", "--out", "run"]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=300)
    assert done.returncode == 2
    assert "Traceback" not in done.stdout + done.stderr
    assert [path.name for path in tmp_path.iterdir()] == ["bad.fasta"]


# Models, partitions, conditions

NEXUS = """#NEXUS
begin data;
dimensions ntax=5 nchar=80;
format datatype=dna gap=-;
matrix
{rows}
;
end;
begin sets;
charset first = 1-30;
charset second = 31-80;
end;
"""


@pytest.fixture(scope="module")
def parted(alignment: Path) -> Path:
    path = alignment.with_name("parted.nex")
    rows = "\n".join(f"'{name}' {row}" for name, row in ROWS.items())
    path.write_text(NEXUS.format(rows=rows))
    return path


def test_each_partition_has_a_model_of_its_own(tmp_path: Path, parted: Path) -> None:
    run = train(tmp_path / "run", "--alignment", parted, "--model.name", "HKY85", *TINY)
    recipe, samples = Sampler.load(run.folder).recipe, run.samples()
    assert isinstance(recipe, PhylogenyRecipe)
    assert samples is not None
    by_part = [
        PhylogenyRecipe(alignment=fasta(tmp_path / f"{start}.fasta", {n: r[start:stop] for n, r in ROWS.items()}),
                        model=recipe.model).columns(samples.objects)["log_likelihood"]
        for start, stop in ((0, 30), (30, 80))
    ]  # fmt: skip
    assert samples.extra["log_likelihood"] == pytest.approx(np.sum(by_part, 0), abs=1e-3)


def test_gtr_with_gamma_and_invariable_sites_runs(tmp_path: Path, alignment: Path) -> None:
    model = ("--model.name", "GTR", "--model.gamma-categories", 4, "--model.invariant")
    exchange = ("--model.exchangeabilities", 1, 4, 1, 1, 4, 1)
    run = train(tmp_path / "run", "--alignment", alignment, *model, *exchange, *TINY)
    assert np.isfinite(run.metrics()[-1]["loss"])
    assert run.settings["model"]["exchangeabilities"] == [1, 4, 1, 1, 4, 1]  # type: ignore[call-overload,index]


def test_one_sampler_draws_at_every_temperature_it_has_learnt(tmp_path: Path) -> None:
    alignment = fasta(tmp_path / "vague.fasta", evolved(((("a", "b"), "c"), ("d", "e")), 40, 0.4, seed=2))
    run = train(
        tmp_path / "run", "--alignment", alignment, "--parsimony", "--samples", 400, "--training.iterations", 600,
    )  # fmt: skip
    sampler, exact = Sampler.load(run.folder), {}
    for beta in (1.0, 4.0):
        assert jobs.sample(run.folder, 400, [beta])
        samples, condition = run.samples(), sampler.condition([beta])
        assert samples is not None
        assert np.ptp(samples.log_reward + beta * np.array(samples.extra["changes"])) < 1e-4
        exact[beta] = ExactDistribution(Forests(5), sampler.problem.reward, condition)
        assert exact[beta].compare(sampler.problem.policy)["total_variation"] < 0.15
        best = exact[beta].log_reward.max() - 1e-3
        expected = float(exact[beta].probabilities[exact[beta].log_reward > best].sum())
        assert np.mean(samples.log_reward > float(best)) == pytest.approx(expected, abs=0.15)
    assert (exact[4.0].probabilities - exact[1.0].probabilities).abs().sum() / 2 > 0.2  # not one answer for both
    with pytest.raises(ValueError, match="takes 1"):
        jobs.sample(run.folder, 10, [1.0, 2.0])


def test_every_tree_ever_scored_is_kept_where_that_is_asked_for(tmp_path: Path, alignment: Path) -> None:
    run = train(tmp_path / "run", "--alignment", alignment, "--parsimony", "--keep-objects", *TINY)
    table = run.objects()
    assert 1 <= table.num_rows <= 15
    recipe = Sampler.load(run.folder).recipe
    assert isinstance(recipe, PhylogenyRecipe)
    changes = np.array(recipe.columns(table["object"].to_pylist())["changes"])
    assert np.ptp(changes + np.array(table["log_reward"])) == 0


# Seeds, processes, kills


def weights(folder: Path) -> dict[str, bytes]:
    checkpoint = sorted((folder / "checkpoints").iterdir())[-1]
    return {path.name: path.read_bytes() for path in checkpoint.glob("*.safetensors")}


def test_a_seed_says_everything(tmp_path: Path, alignment: Path) -> None:
    runs = [
        train(tmp_path / str(k), "--alignment", alignment, *TINY, "--seed", seed) for k, seed in enumerate((5, 5, 6))
    ]
    first, again, other = (weights(run.folder) for run in runs)
    assert first == again
    assert first != other
    assert (runs[0].folder / "samples.csv").read_bytes() == (runs[1].folder / "samples.csv").read_bytes()


def test_processes_search_with_chains_of_their_own(tmp_path: Path, alignment: Path) -> None:
    flags = ("--search.searchers", 2, "--training.replayed", 8, "--training.iterations", 20)
    run = train(tmp_path / "run", "--alignment", alignment, *TINY, *flags)
    rows = run.metrics()
    assert rows[-1]["iteration"] == 20
    assert rows[-1]["failed"] == 0
    assert np.isfinite([row["loss"] for row in rows]).all()


SETTINGS = [
    "phylogeny", "--quiet", *map(str, TINY), "--parsimony", "--keep-objects", "--training.iterations", "12",
    "--training.checkpoint-every", "3", "--training.evaluate-every", "6", "--inverse-temperatures", "0.25", "2",
]  # fmt: skip


@pytest.fixture(scope="module")
def driver(alignment: Path) -> Iterator[Driver]:
    driver = Driver([*SETTINGS, "--alignment", str(alignment)])
    yield driver
    driver.process.communicate(timeout=60)


def test_killed_and_resumed_with_chains_it_ends_with_the_same_weights(driver: Driver, tmp_path: Path) -> None:
    assert driver.attempt(tmp_path / "whole")["status"] == 0
    assert {"explorer.safetensors", "policy.safetensors"} <= weights(tmp_path / "whole").keys()
    folder = tmp_path / "run"
    for moment, time in (
        ("open checkpoints/.*/state.json", 1),
        ("open metrics.jsonl", 2),
        ("rename checkpoints/.*", 2),
    ):
        assert driver.attempt(folder, moment, time)["status"] == signal.SIGKILL
    assert driver.attempt(folder)["status"] == 0
    assert_same_end(folder, tmp_path / "whole")
    shutil.rmtree(folder)


def test_over_a_range_of_temperatures_the_log_posterior_is_taken_from_a_guess() -> None:
    plain, ranged = PhylogenyRecipe(), PhylogenyRecipe(inverse_temperatures=(0.5, 1.0))
    problem, tempered = plain.problem(), ranged.problem()
    assert isinstance(problem.policy, TreePolicy)
    drawn = problem.policy.sample(torch.empty(4, 0), generator=torch.Generator().manual_seed(0))
    objects = problem.policy.objects(drawn)
    above = problem.reward(objects, drawn.condition) - plain.guess.log_marginal
    for beta in (0.5, 1.0):
        found = tempered.reward(objects, torch.full((4, 1), beta))
        torch.testing.assert_close(found, beta * above, atol=0.01, rtol=1e-5)
