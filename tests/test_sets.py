"""The recipe for sets: rewards by hand, the exact distribution after training, inclusion by item, and clear errors."""

from __future__ import annotations

import itertools
import math
from pathlib import Path

import pytest
import torch
from torch import Tensor

from headwater import Sampler, jobs
from headwater.environments import Sets
from headwater.policies import EnvironmentPolicy, Network
from headwater.recipes.sets import SetsRecipe
from headwater.runs import Run
from headwater.training import Trainer, Training

NOTHING = torch.empty(1, 0)
WEIGHTS = "oak,1.0\nash,0.5\nelm,0\nyew,-1.5\nfir,0.7\n"
TREES = ["oak", "ash", "elm", "yew", "fir"]
SYNERGIES = "oak,ash,-2\nfir,yew,1.5\nelm,oak,0.25\n"


@pytest.fixture(autouse=True)
def _one_thread() -> None:
    torch.set_num_threads(1)
    torch.manual_seed(0)


@pytest.fixture
def trees(tmp_path: Path) -> dict[str, Path]:
    (tmp_path / "weights.csv").write_text(WEIGHTS)
    (tmp_path / "synergies.csv").write_text(SYNERGIES)
    return {"weights": tmp_path / "weights.csv", "synergies": tmp_path / "synergies.csv"}


def by_hand(chosen: tuple[str, ...]) -> float:
    weight = {line.split(",")[0]: float(line.split(",")[1]) for line in WEIGHTS.split()}
    synergy = {frozenset(line.split(",")[:2]): float(line.split(",")[2]) for line in SYNERGIES.split()}
    pairs = itertools.combinations(chosen, 2)
    return sum(weight[one] for one in chosen) + sum(synergy.get(frozenset(pair), 0) for pair in pairs)


def test_rewards_are_weights_and_synergies_of_the_pairs_in_the_set(trees: dict[str, Path]) -> None:
    recipe = SetsRecipe(**trees, size=3)  # type: ignore[arg-type]
    chosen = [one for size in range(4) for one in itertools.combinations(TREES, size)]
    expected = torch.tensor([by_hand(one) for one in chosen])
    torch.testing.assert_close(recipe.base_reward()(chosen, NOTHING), expected)
    exact = recipe.exact_distribution()
    assert exact is not None
    assert len(exact.states) == 26
    assert exact.log_z == pytest.approx(float(expected.double().logsumexp(0)), abs=1e-5)
    lines = recipe.text(chosen)
    assert lines[0] == ""
    assert "oak, ash" in lines
    assert recipe.objects(lines) == chosen
    assert recipe.distance("oak, ash", "oak, elm, fir") == 3
    assert recipe.distance("", "oak") == 1


@pytest.mark.parametrize("exactly", [False, True])
def test_sets_reach_the_exact_distribution(exactly: bool, trees: dict[str, Path]) -> None:
    recipe = SetsRecipe(**trees, size=3, exact=exactly)  # type: ignore[arg-type]
    problem = recipe.problem()
    policy = EnvironmentPolicy(recipe.environment(), Network(width=64))
    exact = recipe.exact_distribution()
    assert exact is not None
    before = exact.compare(policy)["total_variation"]
    training = Training(iterations=300, batch_size=32, learning_rate=1e-2)
    Trainer(policy, problem.reward, problem.conditions, recipe.objective, training).run(progress_bar=False)
    assert exact.compare(policy)["total_variation"] < 0.05 < 0.2 < before


def inclusion(html: str) -> dict[str, list[float]]:
    rows = html.split("<tr>")[2:]
    cells = [[cell.split("</td>")[0] for cell in row.split("<td>")[1:]] for row in rows]
    return {row[0]: [float(value) for value in row[1:]] for row in cells}


def test_a_run_goes_with_its_tables_and_reports_how_likely_each_item_is(trees: dict[str, Path], tmp_path: Path) -> None:
    training = Training(iterations=150, batch_size=32, learning_rate=1e-2)
    recipe = SetsRecipe(**trees, size=3, training=training, network=Network(width=32), samples=20)  # type: ignore[arg-type]
    jobs.train(recipe, "sets", tmp_path / "run", progress_bar=False)
    for path in trees.values():
        path.unlink()
    sampler, run = Sampler.load(tmp_path / "run"), Run.open(tmp_path / "run")
    assert float(str(run.evaluation()["total_variation"])) < 0.2
    (section,) = sampler.recipe.sections(run, sampler.problem.policy)
    every = [one for size in range(4) for one in itertools.combinations(TREES, size)]
    share: Tensor = torch.tensor([by_hand(one) for one in every]).softmax(0)
    for name, (learned, exact) in inclusion(section.html).items():
        expected = float(sum(p for one, p in zip(every, share, strict=True) if name in one))
        assert exact == pytest.approx(expected, abs=1e-4)
        assert learned == pytest.approx(exact, abs=0.2)
    assert jobs.report(tmp_path / "run").exists()


def test_a_function_scores_numbered_items_and_items_of_a_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "score.py").write_text(
        "def even(sets):\n    return [1.0 + 3.0 * (len(one) % 2 == 0) for one in sets]\n"
    )
    numbered = SetsRecipe(function="score:even", items=4, size=2)
    target = numbered.exact_distribution()
    assert target is not None
    assert target.log_z == pytest.approx(math.log(4 * 1 + 7 * 4.0))
    assert numbered.objects(["", "0, 3"]) == [(), (0, 3)]
    (tmp_path / "items.txt").write_text("red\n\ngreen \nblue\n")
    training = Training(iterations=3)
    named = SetsRecipe(function="score:even", items=tmp_path / "items.txt", size=2, training=training, samples=5)
    environment = named.environment()
    assert isinstance(environment, Sets)
    assert environment.items == ["red", "green", "blue"]
    jobs.train(named, "sets", tmp_path / "run", progress_bar=False)
    (tmp_path / "items.txt").unlink()
    again = Sampler.load(tmp_path / "run")
    assert again.recipe.environment().items == ["red", "green", "blue"]  # type: ignore[attr-defined]
    large = SetsRecipe(function="score:even", items=40, size=20, exact=True)
    assert large.exact_distribution() is None
    (section,) = large.sections(Run.open(tmp_path / "run"), large.problem().policy)
    shares = inclusion(section.html)
    assert sum(learned for (learned,) in shares.values()) == pytest.approx(20, abs=0.01)


@pytest.mark.parametrize(
    ("weights", "synergies", "said"),
    [
        ("oak,1\noak,2\n", None, "line 2: item 'oak' has a weight already"),
        ("oak\n", None, "line 1: must be an item and a number"),
        ("oak,heavy\n", None, "line 1: 'heavy' is not a number"),
        ("oak,inf\n", None, "line 1: 'inf' is not a finite number"),
        ("", None, "nothing in it"),
        (WEIGHTS, "oak,birch,1\n", "line 1: 'birch' has no weight"),
        (WEIGHTS, "oak,oak,1\n", "must be a pair that is not yet listed"),
        (WEIGHTS, "oak,ash,1\nash,oak,2\n", "line 2: 'ash' and 'oak' must be a pair that is not yet listed"),
        (WEIGHTS, "oak,1\n", "line 1: must be two items and a number"),
        ('"oak,tree",1\nash,2\n', None, "must not hold a comma"),
    ],
)
def test_a_broken_table_is_named_with_its_fault(weights: str, synergies: str | None, said: str, tmp_path: Path) -> None:
    (tmp_path / "w.csv").write_text(weights)
    (tmp_path / "s.csv").write_text(synergies or "")
    with pytest.raises(ValueError, match=r"[ws]\.csv") as error:
        SetsRecipe(weights=tmp_path / "w.csv", synergies=None if synergies is None else tmp_path / "s.csv", size=1)
    assert said in str(error.value)


def test_a_recipe_for_sets_needs_one_reward(tmp_path: Path, trees: dict[str, Path]) -> None:
    with pytest.raises(ValueError, match="either weights"):
        SetsRecipe()
    with pytest.raises(ValueError, match="synergies go with weights"):
        SetsRecipe(function="a:b", synergies=trees["synergies"])
    with pytest.raises(ValueError, match="size = 9"):
        SetsRecipe(weights=trees["weights"], size=9)
    (tmp_path / "items.txt").write_text("a\nb\na\n")
    with pytest.raises(ValueError, match=r"items\.txt: 'a' is there twice"):
        SetsRecipe(function="a:b", items=tmp_path / "items.txt", size=1)
