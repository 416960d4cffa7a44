"""What a person does with Headwater, one function each: train, resume, evaluate, sample, report."""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch

from headwater import evaluation
from headwater.environments.graph import TooManyStates
from headwater.policies import EnvironmentPolicy, Exploration, Policy
from headwater.recipes import Problem, Recipe
from headwater.report import write_report
from headwater.runs import Metrics, Run, Samples
from headwater.sampler import Sampler
from headwater.settings import load_recipe
from headwater.training import Evaluate, Trainer

ENUMERATION_LIMIT = 200_000
"""Spaces of up to this many states are compared with their exact distribution."""
BASELINE_LIMIT = 200_000
"""Most reward calls that the random-search baseline repeats."""


def train(recipe: Recipe, name: str, folder: Path, command: Sequence[str] = (), progress_bar: bool = True) -> Trainer:
    """Train a new run in `folder`, then draw samples, evaluate and write the report."""
    run = Run.create(folder, name, recipe.settings(), list(command), recipe.seed)
    return _train(recipe, run, progress_bar)


def resume(folder: Path, progress_bar: bool = True) -> Trainer:
    """Go on with an interrupted run from its newest checkpoint, to the same end as if it had never stopped."""
    run = Run.open(folder)
    return _train(load_recipe(run), run, progress_bar)


def sample(folder: Path, count: int, condition: Sequence[float] | None = None, seed: int | None = None) -> list[Path]:
    """Draw `count` objects from a trained run and write them into its folder."""
    sampler = Sampler.load(folder)
    run = Run.open(folder)
    samples = sampler.sample(count, condition, seed)
    return [*run.write_samples(samples), *sampler.recipe.write_samples(run, samples)]


def evaluate(folder: Path) -> dict[str, object]:
    """Measure how good a trained run's sampler is, and write evaluation.json."""
    run, sampler = Run.open(folder), Sampler.load(folder)
    figures = _evaluation(run, sampler)
    run.write_json("evaluation.json", figures)
    return figures


def report(folder: Path) -> Path:
    """Write the HTML report of a run anew."""
    run = Run.open(folder)
    return write_report(run, load_recipe(run).sections(run))


def _train(recipe: Recipe, run: Run, progress_bar: bool) -> Trainer:
    torch.set_num_threads(recipe.threads)
    torch.manual_seed(recipe.seed)
    problem = recipe.problem()
    trainer = Trainer(
        problem.policy, problem.reward, problem.conditions, recipe.objective, recipe.training, recipe.exploration,
        recipe.replay, recipe.seed, run, _quick_evaluation(recipe, problem),
    )  # fmt: skip
    checkpoint = run.latest_checkpoint()
    run.forget_metrics_after(checkpoint.iteration if checkpoint else 0)
    if checkpoint is not None:
        trainer.restore(checkpoint)
    trainer.run(progress_bar)
    if not trainer.interrupted:
        sample(run.folder, recipe.samples)
        evaluate(run.folder)
        report(run.folder)
    return trainer


def _exact(recipe: Recipe, problem: Problem) -> evaluation.ExactDistribution | None:
    """The exact distribution, where the space is small enough to enumerate."""
    if not isinstance(problem.policy, EnvironmentPolicy):
        return None
    try:
        return evaluation.ExactDistribution(
            problem.policy.environment, problem.reward, recipe.default_condition(), limit=ENUMERATION_LIMIT
        )
    except TooManyStates:
        return None


def _quick_evaluation(recipe: Recipe, problem: Problem) -> Evaluate:
    """What is measured again and again while training, on random numbers of its own."""
    exact = _exact(recipe, problem)
    condition = recipe.default_condition()
    generator = torch.Generator().manual_seed(recipe.seed + 1)

    def measure(policy: Policy) -> Metrics:
        if exact is not None:
            return exact.compare(policy)
        return evaluation.bounds(policy, problem.reward, condition, 256, generator)

    return measure


def _evaluation(run: Run, sampler: Sampler) -> dict[str, object]:
    ...
