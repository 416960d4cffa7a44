"""The command line: one verb a thing that a person does. Exit status 0 done, 2 wrong usage or bad input, 1 failed,
130 interrupted.
"""

from __future__ import annotations

import argparse
import importlib
import json
import logging
import os
import sys
from collections.abc import Callable, Sequence
from datetime import datetime
from pathlib import Path

from headwater import __version__, jobs
from headwater.recipes import EnvironmentRecipe, available, find
from headwater.report import figures_of
from headwater.runs import Run
from headwater.settings import load_recipe, parse_recipe, read_config
from headwater.training import Trainer

_DESCRIPTION = """Learn to draw many different good answers, in proportion to how good they are.

  headwater list                                  what can be trained
  headwater train hypergrid                       train, then sample, evaluate and report
  headwater train rna --targets targets.fasta     ... RNA oligomers that bind given targets
  headwater train rna --iterations 500            a setting's own name will do where no other has it
  headwater train rna --help                      every setting of a recipe
  headwater train --config settings.toml          settings from a file; flags override it
"""


def main(arguments: Sequence[str] | None = None) -> None:
    """Run one command; never returns normally on an error, but exits with a status."""
    arguments = list(sys.argv[1:] if arguments is None else arguments)
    logging.basicConfig(format="%(levelname)s: %(message)s", level=logging.WARNING)
    parser = _parser()
    if arguments[:1] == ["train"] and not _asks_for_help_on_train(arguments):
        options = _train_options(parser, arguments[1:])
    else:
        options = parser.parse_args(arguments)
    options.command_line = ["headwater", *arguments]
    try:
        sys.exit(options.function(options))
    except BrokenPipeError:  # whoever read our output has seen enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        sys.exit(0)
    except (ValueError, FileNotFoundError, FileExistsError, NotADirectoryError, ImportError) as error:
        _fail(str(error), 2)
    except KeyboardInterrupt:
        _fail("stopped at once, without a new checkpoint", 130)
    except (RuntimeError, OSError) as error:  # a file of the run that cannot be written is a RuntimeError
        _fail(str(error), 1)


def _asks_for_help_on_train(arguments: Sequence[str]) -> bool:
    return len(arguments) == 2 and arguments[1] in ("-h", "--help")


def _train_options(parser: argparse.ArgumentParser, arguments: list[str]) -> argparse.Namespace:
    """The options of `train` itself; all other flags belong to the parser of the recipe that comes first."""
    recipe = arguments.pop(0) if arguments and not arguments[0].startswith("-") else None
    help_flags = ("-h", "--help")
    options, theirs = parser.parse_known_args(["train", *(flag for flag in arguments if flag not in help_flags)])
    options.recipe = recipe
    options.recipe_flags = theirs + ["--help"] * any(flag in help_flags for flag in arguments)
    return options


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="headwater",
        description=_DESCRIPTION,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    parser.add_argument("--version", action="version", version=f"headwater {__version__}")
    verbs = parser.add_subparsers(required=True, metavar="VERB")

    def verb(name: str, function: Callable[[argparse.Namespace], int], text: str) -> argparse.ArgumentParser:
        added = verbs.add_parser(name, help=text, description=text, allow_abbrev=False)
        added.set_defaults(function=function)
        return added

    train = verb("train", _train, "Train a sampler, then draw samples, evaluate and write the report.")
    train.usage = "headwater train RECIPE [--out FOLDER] [--config FILE.toml] [--quiet] [settings of the recipe]"
    train.add_argument("--out", type=Path, help="the run folder; default runs/RECIPE-DATE-TIME")
    train.add_argument("--config", type=Path, help="a TOML file of settings; flags override it")
    train.add_argument("--quiet", action="store_true", help="no progress bar")

    sample = verb(
        "sample",
        _sample,
        "Draw from a trained sampler into its run folder (Parquet, CSV, and the field's own formats).",
    )
    sample.add_argument("folder", type=Path, help="the run folder")
    sample.add_argument("--count", type=_positive, default=1000, help="how many objects (default 1000)")
    sample.add_argument("--condition", type=float, nargs="+", help="the condition's numbers, for a conditional sampler")
    sample.add_argument("--seed", type=int, help="seed of the draws; default the run's own")

    evaluate = verb(
        "evaluate", _evaluate, "Measure how good a trained sampler is; writes evaluation.json and prints it."
    )
    evaluate.add_argument("folder", type=Path, help="the run folder")

    resume = verb("resume", _resume, "Go on with an interrupted run from its newest checkpoint.")
    resume.add_argument("folder", type=Path, help="the run folder")
    resume.add_argument("--quiet", action="store_true", help="no progress bar")

    report = verb("report", _report, "Write the HTML report of a run anew.")
    report.add_argument("folder", type=Path, help="the run folder")

    objects = verb("objects", _objects, "Write the best objects that a run ever scored (Parquet, CSV).")
    objects.add_argument("folder", type=Path, help="the run folder")
    objects.add_argument("--count", type=_positive, help="how many objects, best first (default all)")

    check = verb(
        "check", _check, "Check an environment: masks, inverses, reachability, cycles, counts, batch-invariance."
    )
    check.add_argument(
        "environment", help="a recipe's name, or your own environment as module:Class or module:function"
    )
    check.add_argument("--seed", type=int, default=0, help="seed of the random walks (default 0)")

    verb("list", _list, "List the recipes that can be trained.")
    return parser


def _train(options: argparse.Namespace) -> int:
    named, flags = read_config(options.config) if options.config else (None, [])
    name = options.recipe or named
    if name is None:
        raise ValueError(f"name a recipe: one of {', '.join(available())}, or your own as module:Class")
    if named is not None and options.recipe not in (None, named):
        raise ValueError(f"{options.config}: settings of recipe {named!r}, but the command names {name!r}")
    recipe = parse_recipe(name, [*flags, *options.recipe_flags], f"headwater train {name}")
    short = name.rpartition(":")[2].lower()
    folder = options.out or Path("runs") / f"{short}-{datetime.now():%Y%m%d-%H%M%S}"
    trainer = jobs.train(recipe, name, folder, options.command_line, progress_bar=not options.quiet)
    return _ended(trainer, folder)


def _resume(options: argparse.Namespace) -> int:
    trainer = jobs.resume(options.folder, progress_bar=not options.quiet)
    return _ended(trainer, options.folder)


def _ended(trainer: Trainer, folder: Path) -> int:
    if trainer.learners is not None and not trainer.learners.leads:  # the leader says all there is to say
        return 0
    if trainer.interrupted:
        print(f"\nStopped with a checkpoint. Go on with: headwater resume {folder}", file=sys.stderr)
        return 130
    print(_table(folder))
    run = Run.open(folder)
    print("\n".join(load_recipe(run).findings(figures_of(run)).headline))
    print(f"run folder: {folder}\nreport:     {(folder / 'report.html').resolve()}")
    return 0


def _table(folder: Path, count: int = 12) -> str:
    """The best and most different samples of a run, as text."""
    run = Run.open(folder)
    samples, recipe = run.samples(), load_recipe(run)
    if samples is None:
        return ""
    chosen = recipe.best(samples, count)
    what, reward = samples.names
    columns = {
        what: [_line(samples.objects[i]) for i in chosen],
        reward.replace("_", " "): [f"{samples.log_reward[i]:.3f}" for i in chosen],
        "log prob": [f"{samples.log_prob[i]:.3f}" for i in chosen],
        **{name: [_line(str(values[i])) for i in chosen] for name, values in samples.extra.items()},
    }
    widths = [max(len(name), *map(len, values)) for name, values in columns.items()]
    rows = [list(columns), ["-" * width for width in widths], *map(list, zip(*columns.values(), strict=True))]
    lines = ["  ".join(value.ljust(width) for value, width in zip(row, widths, strict=True)).rstrip() for row in rows]
    return "\n".join(
        ["", f"The best of {len(samples.objects)} draws that differ by at least {recipe.least_distance:g}:", *lines, ""]
    )


def _line(text: str, most: int = 60) -> str:
    """A text on one line of a terminal, which it cannot command."""
    shown = "".join(letter if letter.isprintable() else " " for letter in text)
    return shown if len(shown) <= most else shown[: most - 3] + "..."


def _sample(options: argparse.Namespace) -> int:
    for path in jobs.sample(options.folder, options.count, options.condition, options.seed):
        print(path)
    return 0


def _evaluate(options: argparse.Namespace) -> int:
    figures = jobs.evaluate(options.folder)
    print(json.dumps({name: value for name, value in figures.items() if not isinstance(value, list)}, indent=2))
    return 0


def _report(options: argparse.Namespace) -> int:
    print(jobs.report(options.folder).resolve())
    return 0


def _objects(options: argparse.Namespace) -> int:
    for path in jobs.objects(options.folder, options.count):
        print(path)
    return 0


def _check(options: argparse.Namespace) -> int:
    from headwater.environments import Environment, check_environment

    if ":" in options.environment:
        sys.path.insert(0, "")  # a user's own module lies in the folder they stand in
        module_name, _, attribute = options.environment.partition(":")
        try:
            made = getattr(importlib.import_module(module_name), attribute)
        except (ImportError, AttributeError) as error:
            raise ValueError(f"{options.environment}: cannot be loaded: {error}") from error
        environment = made() if callable(made) else made
    else:
        recipe = find(options.environment)()
        if not isinstance(recipe, EnvironmentRecipe):
            raise ValueError(f"recipe {options.environment!r} has no discrete environment to check")
        environment = recipe.environment()
    if not isinstance(environment, Environment):
        raise ValueError(
            f"{options.environment}: makes a {type(environment).__name__}, not a headwater.environments.Environment"
        )
    report = check_environment(environment, seed=options.seed)
    print(report)
    return 0 if report.ok else 1


def _list(options: argparse.Namespace) -> int:
    for name in available():
        try:
            print(f"{name:12} {find(name).summary}")
        except ValueError as error:
            print(f"{name:12} cannot be loaded: {error}")
    print("\nheadwater train RECIPE --help shows a recipe's settings.")
    return 0


def _positive(text: str) -> int:
    value = int(text)
    if value < 1:
        raise argparse.ArgumentTypeError(f"{value}: must be at least 1")
    return value


def _fail(message: str, status: int) -> None:
    print(f"headwater: error: {message}", file=sys.stderr)
    sys.exit(status)


if __name__ == "__main__":
    main()
