"""Recipes: one kind of job each. A recipe is a frozen dataclass of settings that can build what a run needs.

Its fields are the command line's flags and the tables of settings.toml at once; a domain adds a recipe by an entry
point in the group `headwater.recipes`, and a user names a class of their own as `module:Class`.
"""

from __future__ import annotations

import dataclasses
import importlib
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from importlib.metadata import entry_points
from pathlib import Path
from typing import TYPE_CHECKING, ClassVar, cast

import torch
from torch import Tensor

from headwater.conditions import Conditions, InverseTemperature, NoCondition
from headwater.environments.base import Environment, Objects
from headwater.environments.graph import TooManyStates
from headwater.evaluation import ExactDistribution, ExactDraws, best_and_different
from headwater.objectives import Objective
from headwater.policies import EnvironmentPolicy, Network, Policy
from headwater.policies.environment_policy import Backward
from headwater.replay import ReplaySettings
from headwater.report import Findings, Section, common_findings
from headwater.reward import CACHE_CAPACITY, CachedReward, Reward, TemperedReward
from headwater.runs import Metrics, Run, Samples, Setting
from headwater.search import Explorer, SearchSettings
from headwater.training import ExplorationSettings, Sharpness, Training

if TYPE_CHECKING:
    from headwater.sampler import Sampler

GROUP = "headwater.recipes"
ENUMERATION_LIMIT = 200_000
"""Spaces of up to this many states are compared with their exact distribution."""


@dataclass
class Problem:
    """What a run trains: a policy, the reward that it learns, the conditions that it is asked for; and, where the
    domain has its own way to search, what makes the explorer that draws in the policy's place. sharpness: where the
    reward says r, and exp(r / beta) is the target.
    """

    policy: Policy
    reward: Reward
    conditions: Conditions
    explorer: Callable[[Policy], Explorer] | None = None
    sharpness: Sharpness | None = None


@dataclass(frozen=True)
class Recipe(ABC):
    """The settings that every recipe has."""

    summary: ClassVar[str] = ""
    baseline_calls: ClassVar[int] = 200_000
    """Most reward calls that the evaluation's random search repeats."""

    seed: int = 0
    """Seed of everything random in the run."""
    threads: int = 1
    """CPU threads for the networks; one is often the fastest for small ones."""
    samples: int = 1000
    """Objects to draw when training is over."""
    objective: Objective = field(default_factory=Objective)
    """What to balance."""
    training: Training = field(default_factory=Training)
    """How long and how fast to learn."""
    exploration: ExplorationSettings = field(default_factory=ExplorationSettings)
    """How the search departs from the policy."""
    replay: ReplaySettings = field(default_factory=ReplaySettings)
    """What is remembered; used where training.replayed is above 0."""
    search: SearchSettings = field(default_factory=SearchSettings)
    """Who draws and scores."""
    keep_objects: bool = True
    """Keep every object ever scored, with its reward, in objects.sqlite."""

    @abstractmethod
    def problem(self) -> Problem:
        """Build the policy, reward and conditions. Weights are drawn from torch's global generator, which the caller
        seeds.
        """

    def exact_distribution(self) -> ExactDistribution | None:
        """The target distribution under the default condition, where the space is small enough to enumerate."""
        return None

    def exact_log_z(self) -> float | None:
        """log Z under the default condition where it is known without an enumeration: by elimination, by quadrature."""
        return None

    def exact_draws(self) -> ExactDraws | None:
        """Exact draws of the target where they can be had without an enumeration."""
        return None

    def given_states(self) -> Tensor | None:
        """Objects to learn from in the place of drawing new ones, as final states `[N, width]`; None to draw."""
        return None

    def default_condition(self) -> Tensor | None:
        """The condition row `[1, C]` that samples and evaluations ask for unless told otherwise; None without
        conditions.
        """
        return None

    def prepared(self, folder: Path) -> Recipe:
        """The recipe with all that it needs made under `folder`, where a run is about to start."""
        return self

    def asked(self, count: int) -> Tensor:
        """The conditions of `count` samples, `[count, C]`: the default one for each."""
        row = self.default_condition()
        return (torch.empty(1, 0) if row is None else row).expand(count, -1)

    def check(self) -> None:
        """Raise what is wrong with a file or a reward, before there is a run."""
        self.problem(), self.given_states()

    def finish(self, run: Run, policy: Policy) -> None:
        """Write what else a trained run leaves behind."""
        return

    def quick_evaluation(self, policy: Policy) -> Metrics | None:
        """What is measured again and again while training; None for bounds on log Z."""
        return None

    def evaluation(self, run: Run, sampler: Sampler) -> dict[str, object] | None:
        """The figures of evaluation.json; None for those that suit every sampler of one distribution."""
        return None

    def text(self, objects: Objects) -> list[str]:
        """Each object as one line of text, different objects as different text."""
        return [
            value if isinstance(value, str) else " ".join(map(str, cast("tuple[object, ...]", value)))
            for value in listed(objects)
        ]

    def write_samples(self, run: Run, samples: Samples) -> list[Path]:
        """Write the samples in the field's own formats too; returns the files."""
        return []

    def findings(self, figures: Mapping[str, object]) -> Findings:
        """What a run amounts to, on a terminal and at the top of its report, and what its figures are called. figures:
        those of evaluation.json, as far as there are any; and `trajectories` and `log_z` of training.
        """
        return common_findings(figures)

    def sections(self, run: Run, policy: Policy) -> list[Section]:
        """The report's sections of this domain: the objects drawn as the field draws them. `policy` is trained."""
        return []

    sample_names: ClassVar[tuple[str, str]] = ("object", "log_reward")
    """What the first two columns of the samples are called, see `Samples.names`."""

    least_distance: ClassVar[float] = 1
    """Objects in the table of the best and most different ones are at least this far apart."""

    def distance(self, a: str, b: str) -> float:
        """How different two objects are, given as text: by default the positions in which they differ."""
        first, second = (value.split() if " " in value else value for value in (a, b))
        return sum(x != y for x, y in zip(first, second, strict=False)) + abs(len(first) - len(second))

    def best(self, samples: Samples, count: int) -> list[int]:
        """Indices of the best and most different samples, at least `least_distance` apart."""
        return best_and_different(samples.objects, samples.log_reward, count, self.distance, self.least_distance)

    def measures(self, samples: Samples) -> dict[str, float]:
        """Further figures of the samples for the evaluation, such as the modes found."""
        return {}

    def condition_columns(self, condition: Tensor) -> dict[str, list[object]]:
        """Further columns of a table of objects, from what was asked for, `[N, C]`."""
        return {}

    def columns(self, objects: Sequence[str]) -> dict[str, list[object]]:
        """Further columns of a table of objects (given as text): what a person of the field wants to see of each."""
        return {}

    def settings(self) -> dict[str, Setting]:
        """All settings as plain data, for settings.toml."""
        return _plain(dataclasses.asdict(self))


@dataclass(frozen=True)
class EnvironmentRecipe(Recipe):
    """A recipe whose objects are built in a discrete environment."""

    caches_reward: ClassVar[bool] = True
    """Whether to remember each object's reward: not worth it for a reward that is computed in no time."""

    network: Network = field(default_factory=Network)
    """The network over the environment's states."""
    backward: Backward = "uniform"
    """The backward policy."""
    inverse_temperatures: tuple[float, float] | None = None
    """Learn R(x)^beta for every beta in this range with one sampler."""
    given: Path | None = None
    """Text file with one object a line, to learn from in the place of drawing new ones; the objective mle needs it."""

    def __post_init__(self) -> None:
        if self.objective.name == "mle" and self.given is None:
            raise ValueError("objective mle learns from given objects: name a file of them with given")
        if self.objective.name == "vargrad" and self.inverse_temperatures and self.training.group_size < 2:
            raise ValueError(
                "objective vargrad compares trajectories of one condition: training.group_size must be 2 or more"
            )

    @abstractmethod
    def environment(self) -> Environment:
        """The space of objects."""

    @abstractmethod
    def base_reward(self) -> Reward:
        """The reward at inverse temperature 1."""

    def objects(self, lines: Sequence[str]) -> Objects:
        """The inverse of `text`."""
        return lines

    def given_states(self) -> Tensor | None:
        """Final states of the objects in the file `given`. Raises ValueError naming the file and the line."""
        if self.given is None:
            return None
        environment, rows = self.environment(), []
        for number, line in enumerate(self.given.read_text().splitlines(), 1):
            if line.strip():
                try:
                    rows.append(environment.states(self.objects([line.strip()])))
                except ValueError as error:
                    raise ValueError(f"{self.given}, line {number}: {error}") from error
        if not rows:
            raise ValueError(f"{self.given}: no objects in it")
        return torch.cat(rows)

    def problem(self) -> Problem:
        conditions: Conditions = NoCondition()
        reward: Reward = CachedReward(self.base_reward(), CACHE_CAPACITY if self.caches_reward else 0)
        if self.inverse_temperatures is not None:
            conditions, reward = InverseTemperature(*self.inverse_temperatures), TemperedReward(reward)
        policy = EnvironmentPolicy(self.environment(), self.network, self.backward, conditions.size)
        return Problem(policy, reward, conditions)

    def exact_distribution(self) -> ExactDistribution | None:
        problem = self.problem()
        try:
            return ExactDistribution(self.environment(), problem.reward, self.default_condition(), ENUMERATION_LIMIT)
        except TooManyStates:
            return None

    def default_condition(self) -> Tensor | None:
        if self.inverse_temperatures is None:
            return None
        low, high = self.inverse_temperatures
        return torch.tensor([[min(max(1.0, low), high)]])


def listed(objects: Objects) -> list[object]:
    """The objects as a list of Python values: strings as they are, tensor rows as tuples."""
    if isinstance(objects, Tensor):
        return [tuple(row) for row in objects.tolist()]
    return list(objects)


def device_named(name: str) -> torch.device:
    """The device of a setting: auto takes a GPU if there is one. Raises ValueError for one that is not there."""
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        return torch.empty(0, device=name).device
    except (RuntimeError, AssertionError) as error:
        said = str(error).splitlines()[0]
        raise ValueError(f"device = {name!r}: auto, cpu, or a device that is there: {said}") from error


def available() -> dict[str, str]:
    """The recipes that are installed: name to `module:Class`."""
    return {point.name: point.value for point in sorted(entry_points(group=GROUP), key=lambda point: point.name)}


def find(name: str) -> type[Recipe]:
    """The recipe class of an installed name or of `module:Class`. Raises ValueError naming what there is."""
    known = available()
    target = known.get(name, name)
    if ":" not in target:
        raise ValueError(f"no recipe {name!r}: choose one of {', '.join(known)}, or give your own as module:Class")
    module_name, class_name = target.split(":", 1)
    try:
        found = getattr(importlib.import_module(module_name), class_name)
    except (ImportError, AttributeError) as error:
        raise ValueError(f"recipe {name!r} cannot be loaded from {target}: {error}") from error
    if not (isinstance(found, type) and issubclass(found, Recipe)):
        raise ValueError(f"recipe {name!r}: {target} is not a subclass of headwater.recipes.Recipe")
    return found


def _plain(value: object) -> dict[str, Setting]:
    def convert(value: object) -> Setting:
        if isinstance(value, dict):
            return {key: convert(item) for key, item in value.items() if item is not None}
        if isinstance(value, (list, tuple)):
            return [convert(item) for item in value]
        return value if isinstance(value, (bool, int, float, str)) else str(value)

    return cast("dict[str, Setting]", convert(value))
