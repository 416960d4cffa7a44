"""Settings from flags and TOML files: both are read by one parser against one typed schema, the recipe's dataclass.

A TOML file is turned into the flags it stands for and goes before the command line's own, so a flag overrides the file
and every mistake is reported the same way: by the setting's name, with what is legal. Two short forms save typing: the
name of a table stands for its first setting (`--search ray`), and a setting's own name will do where only one table has
it (`--searchers 8`).
"""

from __future__ import annotations

import dataclasses
import tomllib
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import get_type_hints

import tyro

from headwater.recipes import Recipe, find
from headwater.runs import INPUTS, Run

CONFIG_LIMIT = 1_000_000
"""Largest settings file that is read, in bytes."""


def parse_recipe(name: str, flags: Sequence[str], program: str) -> Recipe:
    """Build the recipe `name` from command-line flags. Exits with status 2 on an unknown setting or an illegal
    value. Raises ValueError for a short form that may mean several settings.
    """
    recipe = find(name)
    return tyro.cli(recipe, prog=program, args=_in_full(recipe, flags), description=recipe.summary)


def _in_full(recipe: type[Recipe], flags: Sequence[str]) -> list[str]:
    """The flags without short forms."""
    kinds = get_type_hints(recipe)
    settings = {field.name.replace("_", "-"): kinds[field.name] for field in dataclasses.fields(recipe)}
    tables = {
        name: [field.name.replace("_", "-") for field in dataclasses.fields(kind)]
        for name, kind in settings.items()
        if isinstance(kind, type) and dataclasses.is_dataclass(kind)
    }

    def full(flag: str) -> str:
        name, equals, value = flag.partition("=")
        key = name.removeprefix("--").replace("_", "-")
        if not name.startswith("--") or "." in key:
            return flag
        if key in tables:
            return f"--{key}.{tables[key][0]}{equals}{value}"
        bare = key.removeprefix("no-")
        owners = [table for table, names in tables.items() if bare in names or key in names]
        if {key, bare} & settings.keys() or not owners:
            return flag
        if len(owners) > 1:
            several = ", ".join(f"--{table}.{key}" for table in owners)
            raise ValueError(f"{name} may be one of {several}: say which")
        return f"--{owners[0]}.{key}{equals}{value}"

    return [full(flag) for flag in flags]


def load_recipe(run: Run) -> Recipe:
    """The recipe of an existing run, from its settings.toml."""
    kept = {
        name: str(run.folder / value) if isinstance(value, str) and value.startswith(f"{INPUTS}/") else value
        for name, value in run.settings.items()
    }
    flags = flags_of(kept)
    return parse_recipe(run.recipe_name, flags, f"{run.folder / 'settings.toml'}")


def read_config(path: Path) -> tuple[str | None, list[str]]:
    """The recipe that a TOML file names, if it does, and its settings as flags. Raises ValueError naming the file."""
    try:
        if path.stat().st_size > CONFIG_LIMIT:
            raise ValueError(f"{path}: larger than {CONFIG_LIMIT} bytes, not a settings file")
        content = tomllib.loads(path.read_text())
    except OSError as error:
        raise ValueError(f"{path}: {error.strerror or error}") from error
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise ValueError(f"{path}: not TOML: {error}") from error
    recipe = content.pop("recipe", None)
    return (None if recipe is None else str(recipe)), flags_of(content)


def flags_of(settings: Mapping[str, object], prefix: str = "") -> list[str]:
    """The command-line flags that say what nested settings say."""
    flags: list[str] = []
    for key, value in settings.items():
        name = f"{prefix}{key.replace('_', '-')}"
        if isinstance(value, Mapping):
            flags += flags_of(value, f"{name}.")
        elif isinstance(value, bool):
            head, _, last = name.rpartition(".")
            flags.append(f"--{name}" if value else f"--{head}{'.' if head else ''}no-{last}")
        elif isinstance(value, list):
            flags += [f"--{name}", *map(str, value)]
        else:
            flags.append(f"--{name}={value}")
    return flags
