"""Learning to draw from one posterior on a prior in closed form, and what its chains say then: shared by the commands
on phase retrieval, latents and visibilities.
"""

from __future__ import annotations

import json
import math
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field, replace
from pathlib import Path

import torch
from torch import Tensor, nn

from diffusion_guided import Climb, Guided
from headwater.conditions import NoCondition
from headwater.diffusion.chains import Chains, draw_chains, walk_back
from headwater.diffusion.denoisers import Denoiser
from headwater.diffusion.estimators import LogZ, log_z_estimates, resample, resampling_estimates
from headwater.diffusion.likelihoods import GaussianLikelihood, Likelihood
from headwater.diffusion.mixtures import GaussianMixture, MixtureDenoiser
from headwater.diffusion.policy import DiffusionPolicy
from headwater.diffusion.process import GaussianProcess
from headwater.objectives import Objective
from headwater.replay import ReplaySettings
from headwater.training import ExplorationSettings, Trainer, Training
from provenance import load, provenance

RESULTS = Path(__file__).parent / "results"
MOST_RESAMPLED = 300_000
"""Draws of the prior that are weighed, where training took more calls of the likelihood and its gradient."""
Figures = dict[str, object]


class KnownPrior(Denoiser):
    """The closed-form denoiser of a mixture."""

    condition = 0

    def __init__(self, mixture: GaussianMixture, process: GaussianProcess) -> None:
        super().__init__()
        self.known = MixtureDenoiser(mixture, process)

    def forward(self, state: Tensor, time: Tensor, condition: Tensor) -> Tensor:
        return self.known(state, time, condition)


@dataclass(frozen=True)
class Posterior:
    """A mixture as the prior of data, its chain, and the likelihood of one measurement that was made."""

    process: GaussianProcess
    data: GaussianMixture
    likelihood: Likelihood
    climb: Climb

    @property
    def ends(self) -> GaussianMixture:
        """What chains end in, if they are fine enough: the data with the noise of the last grid point."""
        return self.data.noised(self.process.alphas[-1], self.process.sigmas[-1])

    def prior(self) -> KnownPrior:
        return KnownPrior(self.data, self.process)

    def log_density(self, x: Tensor) -> Tensor:
        """Of the posterior, without its constant: `[N, *shape]` to float64 `[N]`."""
        rows = x.new_empty(len(x), 0)
        return self.ends.log_prob(x) + self.likelihood.log_prob(x.view(-1, *self.process.shape), rows).double()


@dataclass(frozen=True)
class Recipe:
    """How a posterior is learned."""

    width: int = 128
    blocks: int = 2
    objective: Objective = field(default_factory=lambda: Objective("vargrad"))
    training: Training = field(default_factory=Training)
    exploration: ExplorationSettings = field(default_factory=lambda: ExplorationSettings(epsilon=0.0, average=0.99))
    replay: ReplaySettings = field(default_factory=lambda: ReplaySettings(rule="softmax", capacity=20_000))


@dataclass(frozen=True)
class Learned:
    """denoiser: of the posterior. seconds: of one core, of training. reward_calls: objects scored; gradient_calls:
    states at which the gradient of log r was asked for."""

    denoiser: nn.Module
    seconds: float
    reward_calls: int
    gradient_calls: int


def climb_of(
    likelihood: GaussianLikelihood, data: GaussianMixture, deviation: float = 1.0, start: float = 1.0
) -> Climb:
    """The curvature of -log r in each coordinate: the mean square of the operator's derivative over draws of the prior,
    summed over what is measured and in units of its noise."""
    x = data.sample(256, torch.Generator().manual_seed(0)).view(256, *likelihood.operator.shape)
    jacobian = torch.func.vmap(torch.func.jacrev(lambda one: likelihood.operator(one[None])[0].flatten()))(x)
    return Climb(jacobian.flatten(2).square().sum(1).mean(0) / likelihood.sigma.square(), None, deviation, start)


class Counted:
    """A likelihood that counts the objects it is asked of, for their gradient."""

    def __init__(self, likelihood: Likelihood) -> None:
        self.likelihood, self.count = likelihood, 0

    def __call__(self, x: Tensor, condition: Tensor) -> Tensor:
        self.count += len(x)
        return self.likelihood.log_prob(x, condition)


def learn(posterior: Posterior, recipe: Recipe, seed: int) -> Learned:
    """Train one posterior by relative trajectory balance."""
    torch.manual_seed(seed)
    process, prior, counted = posterior.process, posterior.prior(), Counted(posterior.likelihood)
    denoiser = Guided(process, prior, counted, posterior.climb, 0, recipe.width, recipe.blocks)
    trainer = Trainer(
        DiffusionPolicy(process, prior, denoiser), posterior.likelihood, NoCondition(), recipe.objective,
        recipe.training, recipe.exploration, recipe.replay, seed,
    )  # fmt: skip
    began = time.process_time()
    trainer.run(progress_bar=False)
    if trainer.interrupted:
        raise SystemExit("interrupted: what was learned so far is no result")
    sampler = trainer.sampler
    assert isinstance(sampler, DiffusionPolicy)
    return Learned(sampler.posterior.eval(), time.process_time() - began, trainer.search.drawn, counted.count)


def draws(posterior: Posterior, denoiser: nn.Module, count: int, generator: torch.Generator) -> Chains:
    """Chains drawn by a posterior's denoiser and weighed against the prior, 2,000 at once."""
    return _in_parts(posterior, denoiser, torch.empty(count, 0), generator, None)


def corrected(drawn: Chains, generator: torch.Generator) -> Tensor:
    """Objects resampled by the weights of their chains, as many, which are right whatever the sampler has learned, as
    far as its weights are even."""
    return drawn.objects[resample(drawn.log_reward - drawn.log_ratio, len(drawn.objects), generator)]


def estimates(
    posterior: Posterior, denoiser: nn.Module, drawn: Chains, exact: Tensor, generator: torch.Generator
) -> LogZ:
    """log Z and the weights' figures, with the upper bound from exact draws of the posterior."""
    above = _in_parts(posterior, denoiser, torch.empty(len(exact), 0), generator, exact)
    return log_z_estimates(drawn.log_ratio, drawn.log_reward, (above.log_ratio, above.log_reward))


def _in_parts(
    posterior: Posterior, denoiser: nn.Module, rows: Tensor, generator: torch.Generator, ends: Tensor | None
) -> Chains:
    given = (posterior.process, posterior.prior(), denoiser, posterior.likelihood)
    parts = []
    for part in torch.arange(len(rows)).split(2000):
        if ends is None:
            parts.append(draw_chains(*given, rows[part], generator))
        else:
            objects = ends[part].view(-1, *posterior.process.shape)
            parts.append(walk_back(*given, objects, rows[part], generator))
    return Chains(*(torch.cat(column) for column in zip(*parts, strict=True)))


def resampled(posterior: Posterior, calls: int, count: int, generator: torch.Generator) -> tuple[Tensor, LogZ]:
    """Importance resampling of so many exact draws of the prior, `MOST_RESAMPLED` at most: `[count, *shape]`, and what
    their weights say. Only those are held that weigh anything beside the best."""
    kept, scores, best = [], [], -math.inf
    for size in torch.arange(min(calls, MOST_RESAMPLED)).split(50_000):
        x = posterior.ends.sample(len(size), generator).view(len(size), *posterior.process.shape)
        score = posterior.likelihood(x, x.new_empty(len(size), 0)).double()
        scores.append(score)
        best = max(best, float(score.max()))
        kept.append((x[score > best - 25], score[score > best - 25]))
    chosen = resample(torch.cat([score for _, score in kept]), count, generator)
    return torch.cat([x for x, _ in kept])[chosen], resampling_estimates(torch.cat(scores))


def keep(path: Path, key: dict[str, object], make: Callable[[], Figures], command: list[str]) -> Figures:
    """The row of `key` in the results at `path`; made and written there if it is not yet."""
    rows = read(path)
    found = next((row for row in rows if all(row.get(name) == value for name, value in key.items())), None)
    if found is None:
        found = key | make()
        content = {"provenance": provenance(command), "load": load(), "rows": [*read(path), found]}
        path.write_text(json.dumps(content, indent=1) + "\n")
        print(json.dumps({name: value for name, value in found.items() if not isinstance(value, list)}), flush=True)
    return found


def read(path: Path) -> list[Figures]:
    """The rows that are there already."""
    return json.loads(path.read_text())["rows"] if path.exists() else []


def interval(values: Iterable[float], digits: int = 3) -> str:
    """The mean and its 95 % interval by Student's t, as text; of one value that alone."""
    numbers = [value for value in values if not math.isnan(value)]
    if not numbers:
        return ""
    mean = sum(numbers) / len(numbers)
    if len(numbers) == 1:
        return f"{mean:.{digits}g}"
    spread = math.sqrt(sum((value - mean) ** 2 for value in numbers) / (len(numbers) - 1) / len(numbers))
    student = {2: 12.71, 3: 4.303, 4: 3.182, 5: 2.776, 6: 2.571, 8: 2.365, 10: 2.262}.get(len(numbers), 2.0)
    return f"{mean:.{digits}g} ± {student * spread:.2g}"


def longer(recipe: Recipe, iterations: int) -> Recipe:
    """The same for so many iterations."""
    return replace(recipe, training=replace(recipe.training, iterations=iterations))


def number(value: object) -> float:
    """Of a figure."""
    return float(str(value))


def table(rows: list[Figures], by: tuple[str, ...], columns: dict[str, str]) -> list[str]:
    """Lines of Markdown: one row for each setting of the figures `by`, in their order, with the mean and the interval
    of each column over what is alike."""
    groups = list(dict.fromkeys(tuple(row[name] for name in by) for row in rows))
    lines = ["| " + " | ".join([*by, *columns.values()]) + " |", "|---" * (len(by) + len(columns)) + "|"]
    for group in groups:
        some = [row for row in rows if tuple(row[name] for name in by) == group]
        cells = [interval(number(row[name]) for row in some if row.get(name) is not None) for name in columns]
        lines.append("| " + " | ".join([*map(str, group), *cells]) + " |")
    return lines
