"""The report of a language run at every stage of it, with completions that would rather be markup."""

from __future__ import annotations

import csv
import json
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest
import torch

from headwater import cli, jobs
from headwater.language.policy import LanguagePolicy
from headwater.language.recipe import LanguageRecipe
from headwater.language.sections import sections
from headwater.replay import ReplaySettings
from headwater.report import Section, figures_of, write_report
from headwater.runs import Run, Samples
from headwater.settings import load_recipe
from headwater.trajectories import Trajectories
from language_evaluation_helpers import make_recipe
from test_report import HOSTILE, Page

EVALUATION = {
    "prompts": 3,
    "completions_per_prompt": 4,
    "mean_reward": 0.5,
    "mean_reward_error": 0.125,
    "pass_at_k": [0.5, 0.6, 0.7, 0.8],
    "pass_at_1": 0.5,
    "pass_at_4": 0.8,
    "divergence": 2.25,
    "start/mean_reward": 0.25,
    "start/mean_reward_error": 0.0625,
    "start/pass_at_k": [0.25, 0.3, 0.35, 0.4],
    "start/pass_at_1": 0.25,
    "start/pass_at_4": 0.4,
}


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Run:
    folder = tmp_path_factory.mktemp("language")
    jobs.train(make_recipe(folder), "language", folder / "run", progress_bar=False)
    return Run.open(folder / "run")


def started(folder: Path) -> tuple[LanguageRecipe, Run]:
    recipe = make_recipe(folder)
    return recipe, Run.create(folder / "run", "language", {"model": recipe.model}, ["headwater"], 0)


def report(recipe: LanguageRecipe, run: Run) -> Path:
    return write_report(run, sections(recipe, run), findings=recipe.findings(figures_of(run)))


def row(iteration: int, **more: float) -> dict[str, float]:
    return {
        "iteration": iteration, "trajectories": 8 * iteration, "seconds": 0.5 * iteration, "mean_reward": 0.3,
        "divergence": 0.1 * iteration, "entropy_per_token": 1.5, "staleness_mean": 1.0, "staleness_max": 3.0,
        "staleness/from_0": 0.5, "staleness/from_1": 0.25, "staleness/from_2": 0.25, "beta": 0.1, **more,
    }  # fmt: skip


def completion(text: str, reward: float | None, finished: bool = True, times: int = 1) -> dict[str, object]:
    return {"text": text, "reward": reward, "finished": finished, "times": times}


def titles(made: Sequence[Section]) -> list[str]:
    return [section.title for section in made]


def test_sections_of_a_run_hold_what_there_is_at_its_stage(tmp_path: Path) -> None:
    recipe, run = started(tmp_path)
    assert sections(recipe, run) == []
    Page(report(recipe, run).read_text())

    for iteration in range(1, 4):
        run.append_metrics(row(iteration))
    made = sections(recipe, run)
    assert titles(made) == ["Divergence and entropy", "What was learnt from"]
    assert "Beta" not in made[0].html  # it was the same throughout
    assert "remembered" not in made[1].html  # no replay in these rows

    run.append_metrics(row(4, **{"eval/mean_reward": 0.5, "eval/pass_at_1": 0.5, "beta": 0.05, "replay/entries": 80}))
    made = sections(recipe, run)
    assert titles(made) == ["What was learnt", "Divergence and entropy", "What was learnt from"]
    assert "pass@1 by time" in made[0].html
    assert "Beta" in made[1].html
    assert "Completions remembered" in made[2].html

    run.write_json("evaluation.json", EVALUATION)
    made = sections(recipe, run)
    assert titles(made)[0] == "Answers before and after"
    Page(report(recipe, run).read_text())


def test_figures_before_stand_beside_those_after(tmp_path: Path) -> None:
    recipe, run = started(tmp_path)
    run.append_metrics(row(1))
    run.write_json("evaluation.json", EVALUATION)
    page = Page(report(recipe, run).read_text()).text
    assert "pass@40.40.8" in page.replace("\n", "")
    assert "0.25 ± 0.06250.5 ± 0.125" in page
    assert "Divergence from the start–2.25" in page  # of the start there is none
    assert "the sampler's pass@1 on the test prompts is 0.5; it was 0.25." in page.replace("&#39;", "'")
    assert page.count("pass@4") == 1  # not once more in the table of all runs
    assert "pass@10.50.25 before training" in page.replace("\n", "")  # a key figure
    assert "Completions of each4That were drawn." in page.replace("\n", "")  # in the table, with its meaning


def test_a_reward_that_is_no_verdict_is_compared_by_its_mean(tmp_path: Path) -> None:
    found = make_recipe(tmp_path).findings({"mean_reward": 2.5, "start/mean_reward": 1.25, "trajectories": 40})
    assert found.headline == ["mean reward on test prompts: 2.500; before training: 1.250"]
    assert found.verdict == ["After 40 trajectories the sampler's Mean reward on the test prompts is 2.5; it was 1.25."]
    assert [(card.label, card.value, card.note) for card in found.cards] == [
        ("Mean reward", "2.5", "1.25 before training")
    ]
    assert set(found.shown) == {"mean_reward", "start/mean_reward"}


def test_hostile_completions_and_prompts_are_text_on_the_page(tmp_path: Path) -> None:
    recipe, run = started(tmp_path)
    run.append_metrics(row(1))
    shown = {
        "verdicts": True,
        "prompts": [
            {
                "prompt": f"{HOSTILE} prompt",
                "answer": "</code><img src=x onerror=alert(2)>",
                "before": [completion("</pre></td></table>" + HOSTILE, 0.0, finished=False, times=3)],
                "after": [completion("\x00\x1b[31m&lt;" + "y" * 5000, 1.0), completion("z", None)],
            }
        ],
    }
    run.write_json("completions.json", shown)
    html = report(recipe, run).read_text()
    page = Page(html)
    assert not {"script", "img"} & {tag for tag, _ in page.elements}
    assert f"{HOSTILE} prompt" in page.text
    assert "</pre></td></table>" in page.text
    assert "\x00" not in html
    assert "\x1b" not in html
    assert "&lt;yyy" in page.text
    assert "y" * 1000 not in page.text
    assert "not right, 3 times, cut off" in page.text
    assert "✓ right" in page.text
    assert "reward failed" in page.text


def test_staleness_is_counted_in_ranges_that_double() -> None:
    class Model(LanguagePolicy):
        def __init__(self) -> None:
            self.version = 300

        def finished(self, trajectories: Trajectories) -> torch.Tensor:
            return torch.ones(len(trajectories), dtype=torch.bool)

    behind = [0, 0, 1, 3, 4, 7, 127, 128, 290, 2]
    batch = scored(torch.zeros(10), 300 - torch.tensor(behind))
    log_probs = type("Said", (), {"forward": torch.zeros(10), "backward": torch.zeros(10)})()
    found = Model().measures(log_probs, batch)
    shares = {name.removeprefix("staleness/from_"): value for name, value in found.items() if "from_" in name}
    assert {name: value for name, value in shares.items() if value} == pytest.approx(
        {"0": 0.2, "1": 0.1, "2": 0.2, "4": 0.2, "64": 0.1, "128": 0.2}
    )


def scored(log_reward: torch.Tensor, version: torch.Tensor) -> Trajectories:
    """Trajectories of one step, each of its own identity, of conditions 0, 1, 2 in turn."""
    number = torch.arange(len(log_reward))
    return Trajectories(
        steps={"token": number.int()},
        lengths=torch.ones_like(number),
        condition=(number % 3).float()[:, None],
        log_reward=log_reward.float(),
        log_behaviour=torch.zeros(len(number)),
        version=version,
        identity=number,
    )


def test_a_replay_says_what_it_holds() -> None:
    replay = ReplaySettings(capacity=5).build(lambda _: [])
    assert replay.summary(9) == {"replay/entries": 0}
    replay.add(scored(torch.tensor([1.0, 0, 0, 1, -1, 2]), torch.tensor([0, 1, 2, 3, 4, 5])))  # the first is pushed out
    assert replay.summary(9) == {
        "replay/entries": 5, "replay/conditions": 3, "replay/positive": 2 / 5, "replay/mean_age": 6
    }  # fmt: skip


def test_a_run_leaves_samples_that_read_as_prompts_and_completions(trained: Run) -> None:
    with (trained.folder / "samples.csv").open(newline="") as file:
        rows = list(csv.DictReader(file))
    assert list(rows[0]) == ["completion", "reward", "log_prob", "prompt", "answer"]
    assert {(one["prompt"], one["answer"]) for one in rows} == {("0=", "0")}
    assert {one["reward"] for one in rows} <= {"0.0", "1.0"}
    samples = trained.samples()
    assert samples is not None
    assert samples.names == ("completion", "reward")
    assert samples.objects == [one["completion"] for one in rows]


def test_a_run_has_its_curves_its_figures_and_its_completions(trained: Run) -> None:
    html = (trained.folder / "report.html").read_text()
    page = Page(html)
    for title in ("Answers before and after", "Completions before and after", "What was learnt", "Age of what is"):
        assert title in page.text
    assert "Probability follows reward" not in page.text  # of one prompt's log Z, and rewards are no logarithms
    assert "Mean log-reward" not in page.text
    assert {"pass_at_1", "start/pass_at_1", "embedding_distance"} <= trained.evaluation().keys()
    last = trained.metrics()[-1]
    assert last["replay/entries"] > 8
    assert "eval/pass_at_1" in last
    assert sum(value for name, value in last.items() if name.startswith("staleness/from_")) == pytest.approx(1)


def test_a_run_ends_with_pass_at_1_before_and_after(trained: Run, capsys: pytest.CaptureFixture[str]) -> None:
    headline = "\n".join(load_recipe(trained).findings(figures_of(trained)).headline)
    found = trained.evaluation()
    before, after = found["start/pass_at_1"], found["pass_at_1"]
    assert f"pass@1 on test prompts: {after:.3f}; before training: {before:.3f}" in headline
    assert "different right completions" in headline
    assert "mean reward" not in headline
    table = cli._table(trained.folder)
    assert "completion" in table
    assert "reward" in table
    assert "log reward" not in table
    with pytest.raises(SystemExit) as ended:
        cli.main(["evaluate", str(trained.folder)])
    assert ended.value.code == 0
    assert json.loads(capsys.readouterr().out)["pass_at_1"] == after


def test_samples_are_one_line_each_in_a_terminal(tmp_path: Path) -> None:
    run = Run.create(tmp_path / "run", "hypergrid", {}, [], 0)
    extra: dict[str, list[object]] = {"prompt": ["What?\n" * 40]}
    run.write_samples(Samples(["a\n\x1b[2Jb"], np.array([1.0]), np.array([-1.0]), extra, ("completion", "reward")))
    lines = cli._table(run.folder).splitlines()
    assert [line for line in lines if "What?" in line] == [lines[-1]]
    assert "\x1b" not in lines[-1]
    assert "..." in lines[-1]
    assert len(lines[-1]) < 120
