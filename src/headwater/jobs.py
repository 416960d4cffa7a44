"""What a person does with Headwater, one function each: train, resume, sample, evaluate, report, objects."""

from __future__ import annotations

import dataclasses
import math
import sys
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, closing, contextmanager, nullcontext
from functools import cache
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray

from headwater import evaluation
from headwater.learners import Learners
from headwater.objects import EVALUATION, SAMPLE, ObjectTable
from headwater.policies import EnvironmentPolicy, Exploration, Policy
from headwater.recipes.base import Problem, Recipe
from headwater.report import figures_of, write_report
from headwater.reward import Reward, cache_of
from headwater.runs import Metrics, Run, Samples
from headwater.sampler import Sampler
from headwater.settings import load_recipe
from headwater.training import Evaluate, Trainer

try:
    import fcntl
except ImportError:  # not on Windows
    fcntl = None  # type: ignore[assignment]

TEST_OBJECTS = 1000
"""Objects of each kind, drawn and random, over which rewards and log-probabilities are correlated."""


def train(recipe: Recipe, name: str, folder: Path, command: Sequence[str] = (), progress_bar: bool = True) -> Trainer:
    """Train a new run in `folder`, then draw samples, evaluate and write the report. Files that settings name are
    copied into it.
    """
    with Learners.joined() as learners:
        if learners is not None and not learners.leads:
            return _follow(learners)
        recipe = recipe.prepared(folder)
        recipe.check()
        files = {field.name: getattr(recipe, field.name) for field in dataclasses.fields(recipe)}
        inputs = {setting: path for setting, path in files.items() if isinstance(path, Path) and path.is_file()}
        run = Run.create(folder, name, recipe.settings(), list(command), recipe.seed, inputs)
        return _train(load_recipe(run) if inputs else recipe, run, progress_bar, learners)


def resume(folder: Path, progress_bar: bool = True) -> Trainer:
    """Go on with an interrupted run from its newest checkpoint, to the same end as if it had never stopped."""
    with Learners.joined() as learners:
        if learners is not None and not learners.leads:
            return _follow(learners)
        run = Run.open(folder)
        return _train(load_recipe(run), run, progress_bar, learners)


def sample(folder: Path, count: int, condition: Sequence[float] | None = None, seed: int | None = None) -> list[Path]:
    """Draw `count` objects from a trained run and write them into its folder. Returns the files."""
    sampler, run = Sampler.load(folder), Run.open(folder)
    with _remembering(run, sampler, SAMPLE):
        samples = sampler.sample(count, condition, seed)
    samples = dataclasses.replace(samples, extra=samples.extra | sampler.recipe.columns(samples.objects))
    return [*run.write_samples(samples), *sampler.recipe.write_samples(run, samples)]


def evaluate(folder: Path) -> dict[str, object]:
    """Measure how good a trained run's sampler is, and write evaluation.json."""
    run, sampler = Run.open(folder), Sampler.load(folder)
    with _remembering(run, sampler, EVALUATION):
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
    sections, findings = sampler.recipe.sections(run, sampler.problem.policy), sampler.recipe.findings(figures_of(run))
    return write_report(run, sections, defaults, findings)


def objects(folder: Path, count: int | None = None) -> list[Path]:
    """Write the best `count` objects that a run ever scored (None: all of them) into its folder. Returns the files."""
    return Run.open(folder).write_objects(count)


def _follow(learners: Learners) -> Trainer:
    """Share in the learning of the run that the leader has opened."""
    run = Run.open(Path(learners.announce()))
    recipe = load_recipe(run)
    problem = _begin(recipe)
    trainer = _trainer(recipe, problem, None, None, learners)
    checkpoint = run.latest_checkpoint()
    if checkpoint is not None:
        trainer.restore(checkpoint)
    trainer.follow()
    return trainer


def _begin(recipe: Recipe) -> Problem:
    torch.set_num_threads(recipe.threads)
    torch.manual_seed(recipe.seed)
    return recipe.problem()


def _trainer(
    recipe: Recipe, problem: Problem, run: Run | None, table: ObjectTable | None, learners: Learners | None
) -> Trainer:
    return Trainer(
        problem.policy, problem.reward, problem.conditions, recipe.objective, recipe.training, recipe.exploration,
        recipe.replay, recipe.seed, run, _quick_evaluation(recipe, table), recipe.given_states(), recipe.search,
        problem.explorer, problem.sharpness, learners,
    )  # fmt: skip


def _train(recipe: Recipe, run: Run, progress_bar: bool, learners: Learners | None) -> Trainer:
    if learners is not None:
        learners.announce(str(run.folder))
    problem = _begin(recipe)
    with _held(run), _table(run, recipe) as table:
        trainer = _trainer(recipe, problem, run, table, learners)
        run.tidy()
        checkpoint = run.latest_checkpoint()
        run.forget_metrics_after(checkpoint.iteration if checkpoint else 0)
        if checkpoint is not None:
            trainer.restore(checkpoint)
        _keep(problem, recipe, table, trainer.policy.version)
        trainer.run(progress_bar)
    if not trainer.interrupted:
        recipe.finish(run, trainer.sampler)
        sample(run.folder, recipe.samples)
        evaluate(run.folder)
        report(run.folder)
    return trainer


@contextmanager
def _held(run: Run) -> Iterator[None]:
    """Keep the run from being trained by two processes at once; the system frees the lock however this one ends."""
    with (run.folder / ".lock").open("w") as file:
        try:
            if fcntl is not None:
                fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except (BlockingIOError, PermissionError) as error:
            raise RuntimeError(f"{run.folder}: another process is training this run") from error
        yield


def _table(run: Run, recipe: Recipe) -> AbstractContextManager[ObjectTable | None]:
    """The run's table of scored objects, closed in the end; None where the recipe keeps none."""
    return closing(ObjectTable(run.objects_path)) if recipe.keep_objects else nullcontext()


def _keep(problem: Problem, recipe: Recipe, table: ObjectTable | None, resumed_at: int = sys.maxsize) -> None:
    """Let the problem's reward look objects up in the table, and record there what it is asked for."""
    cache = cache_of(problem.reward)
    if table is not None and cache is not None:
        cache.keep_in(table, recipe.text, resumed_at)


@contextmanager
def _remembering(run: Run, sampler: Sampler, origin: str) -> Iterator[None]:
    """Rewards that the run knows are not paid for again, and new ones are kept, as asked for by `origin`."""
    with _table(run, sampler.recipe) as table:
        if table is not None:
            table.origin, table.iteration = origin, sampler.problem.policy.version
        _keep(sampler.problem, sampler.recipe, table)
        yield


def _quick_evaluation(recipe: Recipe, table: ObjectTable | None) -> Evaluate:
    """What is measured again and again while training: on random numbers of its own, and with rewards that are not
    counted.
    """
    exact = recipe.exact_distribution()

    @cache
    def reward() -> Reward:  # of a problem of its own, whose calls are not the search's
        twin = recipe.problem()
        _keep(twin, recipe, table)
        return twin.reward

    def measure(policy: Policy) -> Metrics:
        if table is not None:
            table.origin, table.iteration = EVALUATION, policy.version
        if exact is not None:
            return dict(exact.compare(policy))
        own = recipe.quick_evaluation(policy)
        if own is not None:
            return own
        generator = torch.Generator().manual_seed(recipe.seed + 1)
        return dict(evaluation.bounds(policy, reward(), recipe.default_condition(), 128, generator))

    return measure


def _evaluation(run: Run, sampler: Sampler) -> dict[str, object]:
    recipe, policy, reward = sampler.recipe, sampler.problem.policy, sampler.problem.reward
    own = recipe.evaluation(run, sampler)
    if own is not None:
        return own
    generator = torch.Generator().manual_seed(recipe.seed + 2)
    samples = run.samples() or sampler.sample(recipe.samples)
    rows = run.metrics()
    figures: dict[str, object] = {}
    exact = recipe.exact_distribution()
    log_z = recipe.exact_log_z() if exact is None else exact.log_z
    if exact is not None:
        figures |= exact.compare(policy)
    if log_z is not None:
        figures["log_z_exact"] = log_z
        learned = [row["log_z"] for row in rows if "log_z" in row]
        if learned:
            figures["log_z_gap"] = abs(float(learned[-1]) - log_z)
    draws = exact or recipe.exact_draws()
    figures |= evaluation.bounds(policy, reward, recipe.default_condition(), 2000, generator, draws)
    figures |= _sample_figures(recipe, samples) | recipe.measures(samples)
    if exact is not None and isinstance(policy, EnvironmentPolicy):
        drawn = policy.sample(sampler.condition().expand(TEST_OBJECTS, -1), generator=generator)
        figures |= exact.empirical_total_variation(policy.final_states(drawn))
    if policy.walks_backward:
        figures |= _correlations(sampler, samples, generator)
        calls = int(float(rows[-1].get("reward_calls", 0))) if rows else 0
        if exact is None and calls:
            figures |= _random_search(sampler, min(calls, recipe.baseline_calls), generator)
    return figures


def _sample_figures(recipe: Recipe, samples: Samples) -> dict[str, object]:
    top = evaluation.best_distinct(samples.log_reward, samples.objects, 100)
    top_objects = [samples.objects[index] for index in top]
    return {
        "samples": len(samples.objects),
        "distinct_samples": len(set(samples.objects)),
        "mean_log_reward": float(samples.log_reward.mean()),
        "top_100_mean_log_reward": float(samples.log_reward[top].mean()),
        **_mean_reward("top_100_mean_reward", samples.log_reward[top]),
        "top_100_diversity": evaluation.diversity(top_objects, recipe.distance),
    }


def _mean_reward(name: str, log_reward: NDArray[np.float64]) -> dict[str, object]:
    """Nothing where a float cannot hold it, as of likelihoods: the mean log-reward says it."""
    with np.errstate(over="ignore"):
        mean = float(np.exp(log_reward).mean())
    return {name: mean} if 0 < mean < math.inf else {}


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
        **_mean_reward("baseline_top_100_mean_reward", best),
        "baseline_log_reward": scores[:1000].tolist(),
    }


def _correlations(sampler: Sampler, samples: Samples, generator: torch.Generator) -> dict[str, float]:
    """Of log-reward and log-probability: over distinct draws of the sampler, and over as many random objects
    besides.
    """
    policy, reward = sampler.problem.policy, sampler.problem.reward
    first = evaluation.best_distinct(samples.log_reward, samples.objects, TEST_OBJECTS)
    drawn_reward, drawn_prob = samples.log_reward[first], samples.log_prob[first]
    condition = sampler.condition().expand(len(first), -1)
    random = policy.sample(condition, Exploration(epsilon=1.0), generator)
    random_reward = reward(policy.objects(random), condition).double().numpy()
    random_prob = evaluation.log_prob_of_objects(policy, random, 10, generator).numpy()
    known = np.isfinite(random_reward)
    both = evaluation.correlation(
        np.concatenate([drawn_reward, random_reward[known]]), np.concatenate([drawn_prob, random_prob[known]])
    )
    return {
        **evaluation.correlation(drawn_reward, drawn_prob),
        **{f"{name}_with_random_objects": value for name, value in both.items()},
    }
