"""What a person does with Headwater, one function each: train, resume, sample, evaluate, report."""

from __future__ import annotations

import dataclasses
import shutil
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch

from headwater import evaluation
from headwater.policies import EnvironmentPolicy, Exploration, Policy
from headwater.recipes.base import Recipe
from headwater.report import write_report
from headwater.runs import Metrics, Run, Samples
from headwater.sampler import Sampler
from headwater.settings import INPUTS, load_recipe
from headwater.training import Evaluate, Trainer

BASELINE_LIMIT = 200_000
"""Most reward calls that the random-search baseline repeats."""
TEST_OBJECTS = 1000
"""Objects of each kind, drawn and random, over which rewards and log-probabilities are correlated."""


def train(recipe: Recipe, name: str, folder: Path, command: Sequence[str] = (), progress_bar: bool = True) -> Trainer:
    """Train a new run in `folder`, then draw samples, evaluate and write the report. Files that settings name are
    copied into it.
    """
    recipe.problem(), recipe.given_states()  # what is wrong with a file or a reward shows before there is a folder
    run = Run.create(folder, name, recipe.settings(), list(command), recipe.seed)
    return _train(_keep_inputs(recipe, run, name), run, progress_bar)


def resume(folder: Path, progress_bar: bool = True) -> Trainer:
    """Go on with an interrupted run from its newest checkpoint, to the same end as if it had never stopped."""
    run = Run.open(folder)
    return _train(load_recipe(run), run, progress_bar)


def sample(folder: Path, count: int, condition: Sequence[float] | None = None, seed: int | None = None) -> list[Path]:
    """Draw `count` objects from a trained run and write them into its folder. Returns the files."""
    sampler, run = Sampler.load(folder), Run.open(folder)
    samples = sampler.sample(count, condition, seed)
    samples = dataclasses.replace(samples, extra=sampler.recipe.columns(samples.objects))
    return [*run.write_samples(samples), *sampler.recipe.write_samples(run, samples)]


def evaluate(folder: Path) -> dict[str, object]:
    """Measure how good a trained run's sampler is, and write evaluation.json."""
    run, sampler = Run.open(folder), Sampler.load(folder)
    figures = _evaluation(run, sampler)
    run.write_json("evaluation.json", figures)
    return figures


def report(folder: Path) -> Path:
    """Write the HTML report of a run anew."""
    run, sampler = Run.open(folder), Sampler.load(folder)
    try:
        defaults = type(sampler.recipe)().settings()
    except ValueError:  # a recipe that cannot do without some setting
        defaults = None
    return write_report(run, sampler.recipe.sections(run, sampler.problem.policy), defaults)


def _train(recipe: Recipe, run: Run, progress_bar: bool) -> Trainer:
    torch.set_num_threads(recipe.threads)
    torch.manual_seed(recipe.seed)
    problem = recipe.problem()
    trainer = Trainer(
        problem.policy, problem.reward, problem.conditions, recipe.objective, recipe.training, recipe.exploration,
        recipe.replay, recipe.seed, run, _quick_evaluation(recipe), recipe.given_states(),
        recipe.search,
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


def _keep_inputs(recipe: Recipe, run: Run, name: str) -> Recipe:
    """Copy the files that settings name into the run folder, so that it can be resumed and moved without them."""
    paths = {field.name: getattr(recipe, field.name) for field in dataclasses.fields(recipe)}
    kept = {field: path for field, path in paths.items() if isinstance(path, Path) and path.is_file()}
    if not kept:
        return recipe
    (run.folder / INPUTS).mkdir(exist_ok=True)
    for path in kept.values():
        shutil.copyfile(path, run.folder / INPUTS / path.name)
    run.write_settings(name, {**run.settings, **{field: f"{INPUTS}/{path.name}" for field, path in kept.items()}})
    return load_recipe(run)


def _quick_evaluation(recipe: Recipe) -> Evaluate:
    """What is measured again and again while training: on random numbers of its own, and with rewards that are not
    counted.
    """
    twin, exact = recipe.problem(), recipe.exact_distribution()

    def measure(policy: Policy) -> Metrics:
        if exact is not None:
            return dict(exact.compare(policy))
        generator = torch.Generator().manual_seed(recipe.seed + 1)
        return dict(evaluation.bounds(policy, twin.reward, recipe.default_condition(), 128, generator))

    return measure


def _evaluation(run: Run, sampler: Sampler) -> dict[str, object]:
    recipe, policy, reward = sampler.recipe, sampler.problem.policy, sampler.problem.reward
    generator = torch.Generator().manual_seed(recipe.seed + 2)
    samples = run.samples() or sampler.sample(recipe.samples)
    rows = run.metrics()
    figures: dict[str, object] = {}
    exact = recipe.exact_distribution()
    if exact is not None:
        figures |= exact.compare(policy)
        learned = [row["log_z"] for row in rows if "log_z" in row]
        if learned:
            figures["log_z_gap"] = abs(float(learned[-1]) - exact.log_z)
    figures |= evaluation.bounds(policy, reward, recipe.default_condition(), 2000, generator, exact)
    figures |= _sample_figures(recipe, samples) | recipe.measures(samples)
    if isinstance(policy, EnvironmentPolicy):
        condition = sampler.condition()
        if exact is not None:
            drawn = policy.sample(condition.expand(TEST_OBJECTS, -1), generator=generator)
            figures |= exact.empirical_total_variation(policy.final_states(drawn))
        figures |= _correlations(sampler, samples, generator)
        calls = int(float(rows[-1].get("reward_calls", 0))) if rows else 0
        if exact is None and calls:
            figures |= _random_search(sampler, min(calls, BASELINE_LIMIT), generator)
    return figures


def _sample_figures(recipe: Recipe, samples: Samples) -> dict[str, object]:
    top = evaluation.best_distinct(samples.log_reward, samples.objects, 100)
    top_objects = [samples.objects[index] for index in top]
    return {
        "samples": len(samples.objects),
        "distinct_samples": len(set(samples.objects)),
        "mean_log_reward": float(samples.log_reward.mean()),
        "top_100_mean_log_reward": float(samples.log_reward[top].mean()),
        "top_100_mean_reward": float(np.exp(samples.log_reward[top]).mean()),
        "top_100_diversity": evaluation.diversity(top_objects, recipe.distance),
    }


def _random_search(sampler: Sampler, calls: int, generator: torch.Generator) -> dict[str, object]:
    """What search without learning finds with as many reward calls: objects built by uniformly random actions."""
    policy, reward = sampler.problem.policy, sampler.problem.reward
    found: dict[int, float] = {}
    while len(found) < calls:
        condition = sampler.condition().expand(min(4096, calls - len(found)), -1)
        drawn = policy.sample(condition, Exploration(epsilon=1.0), generator)
        values = reward(policy.objects(drawn), condition)
        before = len(found)
        found |= dict(zip(drawn.identity.tolist(), values.tolist(), strict=True))
        if len(found) == before:  # every object has been met
            break
    scores = np.array(list(found.values()))
    scores = scores[np.isfinite(scores)]
    best = np.sort(scores)[-100:]
    return {
        "baseline_calls": len(found),
        "baseline_top_100_mean_log_reward": float(best.mean()),
        "baseline_top_100_mean_reward": float(np.exp(best).mean()),
        "baseline_log_reward": scores[:1000].tolist(),
    }


def _correlations(sampler: Sampler, samples: Samples, generator: torch.Generator) -> dict[str, float]:
    """Of log-reward and log-probability: over distinct draws of the sampler, and over as many random objects
    besides.
    """
    policy, reward = sampler.problem.policy, sampler.problem.reward
    assert isinstance(policy, EnvironmentPolicy)
    first = evaluation.best_distinct(samples.log_reward, samples.objects, TEST_OBJECTS)
    drawn_reward, drawn_prob = samples.log_reward[first], samples.log_prob[first]
    condition = sampler.condition().expand(len(first), -1)
    random = policy.sample(condition, Exploration(epsilon=1.0), generator)
    random_reward = reward(policy.objects(random), condition).double().numpy()
    random_prob = evaluation.log_prob_of_states(policy, policy.final_states(random), condition, 10, generator).numpy()
    known = np.isfinite(random_reward)
    both = evaluation.correlation(
        np.concatenate([drawn_reward, random_reward[known]]), np.concatenate([drawn_prob, random_prob[known]])
    )
    return {
        **evaluation.correlation(drawn_reward, drawn_prob),
        **{f"{name}_with_random_objects": value for name, value in both.items()},
    }
