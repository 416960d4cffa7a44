"""The command line as a person uses it: verbs, settings, errors, the run folder, interruption and resume."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
from safetensors.torch import load_file

from headwater import Sampler
from headwater.recipes import available, find
from headwater.runs import Run, Samples

SMALL = ["--dimensions", "2", "--side", "4", "--network.width", "16", "--training.log-every", "10", "--samples", "50"]


def headwater(*arguments: str, cwd: Path, expect: int = 0) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "headwater.cli", *arguments]
    done = subprocess.run(command, cwd=cwd, capture_output=True, text=True, timeout=300)
    assert done.returncode == expect, done.stdout + done.stderr
    return done


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("runs")
    headwater(
        "train",
        "hypergrid",
        "--out",
        "run",
        "--quiet",
        "--training.iterations",
        "150",
        "--training.learning-rate",
        "0.02",
        *SMALL,
        cwd=folder,
    )
    return folder / "run"


def test_a_run_folder_explains_itself(trained: Path) -> None:
    names = {path.name for path in trained.iterdir()}
    assert names >= {
        "README.md", "settings.toml", "provenance.json", "metrics.jsonl", "checkpoints", "samples.parquet",
        "samples.csv", "evaluation.json", "figures", "report.html",
    }  # fmt: skip
    run = Run.open(trained)
    assert run.recipe_name == "hypergrid"
    assert run.settings["side"] == 4
    assert run.provenance["seed"] == 0
    assert run.metrics()[-1]["iteration"] == 150
    assert json.loads((trained / "evaluation.json").read_text())["total_variation"] < 0.3
    samples = run.samples()
    assert samples is not None
    assert len(samples.objects) == 50


def test_a_trained_sampler_loads_in_one_line_and_repeats_its_draws(trained: Path) -> None:
    first, second = (Sampler.load(trained).sample(20, seed=3) for _ in range(2))
    assert first.objects == second.objects
    np.testing.assert_array_equal(first.log_prob, second.log_prob)
    assert Sampler.load(trained).sample(20, seed=4).objects != first.objects
    with pytest.raises(ValueError, match="takes 0"):
        Sampler.load(trained).sample(1, condition=[1.0])


def test_sample_evaluate_and_report_work_on_a_finished_run(trained: Path) -> None:
    headwater("sample", str(trained), "--count", "30", "--seed", "5", cwd=trained)
    samples = Run.open(trained).samples()
    assert samples is not None
    assert len(samples.objects) == 30
    assert "total_variation" in headwater("evaluate", str(trained), cwd=trained).stdout
    (trained / "report.html").unlink()
    assert headwater("report", str(trained), cwd=trained).stdout.strip().endswith("report.html")
    assert (trained / "report.html").stat().st_size > 10_000


def test_settings_come_from_a_file_and_flags_override_it(tmp_path: Path) -> None:
    (tmp_path / "mine.toml").write_text(
        'recipe = "hypergrid"\ndimensions = 2\nside = 4\nsamples = 5\n[training]\niterations = 7\nbatch_size = 3\n'
    )
    headwater("train", "--config", "mine.toml", "--out", "run", "--quiet", "--training.batch-size", "4", cwd=tmp_path)
    settings = Run.open(tmp_path / "run").settings
    assert settings["training"]["iterations"] == 7  # type: ignore[index,call-overload]
    assert settings["training"]["batch_size"] == 4  # type: ignore[index,call-overload]


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["train", "nonsense"], ["nonsense", "hypergrid"]),
        (["train", "hypergrid", "--sidee", "5"], ["--sidee", "--side"]),
        (["train", "hypergrid", "--side", "1"], ["side = 1", "at least 2"]),
        (["train", "hypergrid", "--side", "big"], ["--side", "big"]),
        (["train", "hypergrid", "--objective.name", "magic"], ["magic", "subtb"]),
        (["train", "hypergrid", "--network.torso", "transformer", "--network.heads", "7"], ["heads = 7"]),
        (["train", "hypergrid", "--exploration.epsilon", "2"], ["epsilon = 2.0", "between 0 and 1"]),
        (["train", "hypergrid", "--replay.quantile", "2"], ["quantile"]),
        (["train", "sequences"], ["table", "function"]),
        (["train", "sequences", "--table", "missing.csv"], ["missing.csv"]),
        (["train", "--config", "missing.toml"], ["missing.toml"]),
        (["train"], ["name a recipe"]),
        (["sample", "nowhere"], ["nowhere", "settings.toml"]),
        (["resume", "nowhere"], ["nowhere"]),
        (["check", "no_such_module:thing"], ["no_such_module"]),
        (["frobnicate"], ["frobnicate"]),
    ],
)
def test_a_mistake_is_named_with_what_is_legal_and_status_2(
    arguments: list[str], said: list[str], tmp_path: Path
) -> None:
    done = headwater(*arguments, cwd=tmp_path, expect=2)
    printed = " ".join((done.stdout + done.stderr).replace("│", " ").split())
    for words in said:
        assert words in printed
    assert "Traceback" not in printed


def test_a_mistake_in_a_settings_file_is_named(tmp_path: Path) -> None:
    (tmp_path / "bad.toml").write_text('recipe = "hypergrid"\n[training]\niterations = "many"\n')
    printed = headwater("train", "--config", "bad.toml", cwd=tmp_path, expect=2)
    assert "--training.iterations" in printed.stdout + printed.stderr
    (tmp_path / "broken.toml").write_text("recipe = ")
    assert "broken.toml" in headwater("train", "--config", "broken.toml", cwd=tmp_path, expect=2).stderr


def test_a_run_folder_is_never_overwritten(trained: Path) -> None:
    done = headwater("train", "hypergrid", "--out", str(trained), *SMALL, cwd=trained, expect=2)
    assert "resume" in done.stderr


def test_control_c_ends_with_a_checkpoint_and_resume_ends_as_if_never_stopped(tmp_path: Path) -> None:
    settings = [
        *SMALL, "--training.iterations", "1500", "--training.replayed", "4", "--exploration.average", "0.9",
        "--training.checkpoint-every", "5000", "--training.evaluate-every", "5000", "--quiet",
    ]  # fmt: skip
    headwater("train", "hypergrid", "--out", "whole", *settings, cwd=tmp_path)
    command = [sys.executable, "-m", "headwater.cli", "train", "hypergrid", "--out", "stopped", *settings]
    process = subprocess.Popen(command, cwd=tmp_path, stderr=subprocess.PIPE, text=True)
    metrics = tmp_path / "stopped" / "metrics.jsonl"
    while not (metrics.exists() and len(metrics.read_text().splitlines()) >= 3):
        assert process.poll() is None, process.stderr.read() if process.stderr else ""
        time.sleep(0.02)
    os.kill(process.pid, signal.SIGINT)
    _, said = process.communicate(timeout=120)
    assert process.returncode == 130
    assert "headwater resume stopped" in said
    stopped_at = max((tmp_path / "stopped" / "checkpoints").iterdir()).name
    assert stopped_at < "iteration-000001500"
    headwater("resume", "stopped", "--quiet", cwd=tmp_path)
    whole, resumed = (
        load_file(tmp_path / run / "checkpoints" / "iteration-000001500" / "policy.safetensors")
        for run in ("whole", "stopped")
    )
    for name, weights in whole.items():
        assert weights.equal(resumed[name]), name
    iterations = [row["iteration"] for row in Run.open(tmp_path / "stopped").metrics()]
    assert iterations == list(range(10, 1501, 10))


def test_a_users_reward_and_files_go_with_the_run(tmp_path: Path) -> None:
    (tmp_path / "scores.csv").write_text(
        "sequence,reward\n" + "".join(f"{a}{b},{1 + 3 * (a == b)}\n" for a in "ACGT" for b in "ACGT")
    )
    flags = ["--length", "2", "--training.iterations", "200", "--samples", "20", "--network.width", "16", "--quiet"]
    headwater("train", "sequences", "--table", "scores.csv", "--out", "run", *flags, cwd=tmp_path)
    (tmp_path / "scores.csv").unlink()
    (tmp_path / "run").rename(tmp_path / "moved")
    assert "total_variation" in headwater("evaluate", "moved", cwd=tmp_path).stdout
    (tmp_path / "mine.py").write_text("def score(words):\n    return [2.0 ** word.count('A') for word in words]\n")
    headwater("train", "sequences", "--function", "mine:score", "--out", "own", *flags, cwd=tmp_path)


def test_check_reports_on_a_users_environment(tmp_path: Path) -> None:
    (tmp_path / "mine.py").write_text(
        "import torch\n"
        "from headwater.environments import Hypergrid\n"
        "def good():\n    return Hypergrid(2, 3)\n"
        "class Bad(Hypergrid):\n"
        "    def __init__(self):\n        super().__init__(2, 3)\n        self.native = None\n"
        "    def backward_step(self, states, backward_actions):\n        return states.clone()\n"
    )
    assert "9" in headwater("check", "mine:good", cwd=tmp_path).stdout
    headwater("check", "mine:Bad", cwd=tmp_path, expect=1)
    headwater("check", "hypergrid", cwd=tmp_path)


def test_list_names_every_recipe_and_every_recipe_has_help(tmp_path: Path) -> None:
    listed = headwater("list", cwd=tmp_path).stdout
    assert {"hypergrid", "bits", "sequences", "rna"} <= set(available())
    for name in available():
        assert name in listed
        assert find(name).summary in listed
    assert "--training.iterations" in headwater("train", "rna", "--help", cwd=tmp_path).stdout


def test_a_conditional_run_samples_at_a_given_temperature(tmp_path: Path) -> None:
    flags = ["--inverse-temperatures", "0.5", "2", "--training.iterations", "100", "--quiet", *SMALL]
    headwater("train", "hypergrid", "--out", "run", *flags, cwd=tmp_path)
    headwater("sample", "run", "--count", "10", "--condition", "1.5", cwd=tmp_path)
    assert "takes 1" in headwater("sample", "run", "--condition", "1", "2", cwd=tmp_path, expect=2).stderr


def test_maximum_likelihood_learns_from_a_file_of_given_objects(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "words.txt").write_text("ACAC\nACAC\nGTGT\n")
    (tmp_path / "mine.py").write_text("def score(words):\n    return [1.0] * len(words)\n")
    flags = ["--function", "mine:score", "--length", "4", "--objective.name", "mle", "--network.width", "32", "--quiet"]
    refused = headwater("train", "sequences", *flags, cwd=tmp_path, expect=2)
    assert "given" in refused.stdout + refused.stderr
    more = ["--given", "words.txt", "--training.iterations", "200", "--training.learning-rate", "0.01", "--out", "run"]
    headwater("train", "sequences", *flags, *more, cwd=tmp_path)
    drawn = Sampler.load(tmp_path / "run").sample(300).objects
    assert drawn.count("ACAC") > drawn.count("GTGT") > 60
    (tmp_path / "words.txt").write_text("ACAC\nACXX\n")
    assert "line 2" in headwater("train", "sequences", *flags, "--given", "words.txt", cwd=tmp_path, expect=2).stderr
    assert not (tmp_path / "runs").exists()


def test_an_evaluation_counts_the_modes_that_were_found(trained: Path) -> None:
    figures = Run.open(trained).evaluation()
    assert figures["modes_total"] == 4
    hit = find("hypergrid")(dimensions=2, side=8)  # type: ignore[call-arg]
    objects, rewards = ["1 1", "6 1", "1 1", "3 3"], np.log([2.501, 2.501, 2.501, 0.001])
    assert hit.measures(Samples(objects, rewards, np.zeros(4)))["modes"] == 2
