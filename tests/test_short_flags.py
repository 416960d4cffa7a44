"""Short forms of settings on the command line."""

from __future__ import annotations

from typing import cast

import pytest

from headwater.cli import main
from headwater.recipes import available
from headwater.recipes.bits import BitsRecipe
from headwater.settings import parse_recipe


def parsed(*flags: str) -> BitsRecipe:
    return cast(BitsRecipe, parse_recipe("bits", flags, "bits"))


def test_a_tables_name_stands_for_its_first_setting() -> None:
    recipe = parsed("--search", "virtual", "--searchers", "8", "--objective=db")
    assert (recipe.search.runtime, recipe.search.searchers, recipe.objective.name) == ("virtual", 8, "db")


def test_a_settings_own_name_will_do_where_only_one_table_has_it() -> None:
    recipe = parsed("--batch-size", "24", "--group_size=3", "--only-replayed", "--replayed", "8", "--seed", "5")
    training = recipe.training
    assert (training.batch_size, training.group_size, training.only_replayed, training.replayed) == (24, 3, True, 8)
    assert not parsed("--no-only-replayed").training.only_replayed
    assert recipe.seed == 5


def test_long_forms_are_left_alone() -> None:
    assert parsed("--training.batch-size", "24", "--no-keep-objects") == parsed("--batch-size=24", "--no-keep-objects")


def test_a_name_that_several_tables_have_is_an_error_that_names_them(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as ended:
        main(["train", "bits", "--temperature", "2"])
    assert ended.value.code == 2
    said = capsys.readouterr().err
    assert "--temperature may be one of" in said
    assert "--replay.temperature" in said


def test_an_unknown_name_is_an_error_as_before() -> None:
    with pytest.raises(SystemExit) as ended:
        parsed("--searcherz", "8")
    assert ended.value.code == 2


@pytest.mark.parametrize("name", available())
def test_every_recipe_takes_short_forms(name: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as ended:
        parse_recipe(name, ["--iterations", "7", "--help"], name)
    assert ended.value.code == 0
    assert "--training.iterations" in capsys.readouterr().out
