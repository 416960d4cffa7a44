"""The recipe `posterior`: given a diffusion prior p(x) and a likelihood r(x), learn to draw from p(x) r(x) / Z, by
relative trajectory balance (Venkatraman et al. 2024, arXiv 2405.20971; for inverse problems 2503.09746).
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path
from typing import ClassVar

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from headwater.conditions import NoCondition
from headwater.diffusion.adapters import Adapter
from headwater.diffusion.baselines import require_baselines
from headwater.diffusion.denoisers import Denoiser, Network
from headwater.diffusion.latent import LatentPrior, is_latent, load_latent_prior, of_latents, save_latent_prior
from headwater.diffusion.likelihood_settings import LikelihoodSettings, Measured
from headwater.diffusion.likelihoods import Likelihood, MeasurementLikelihood, require_support
from headwater.diffusion.measurements import read_array, read_measurements
from headwater.diffusion.operator_settings import OperatorSettings, operator_of
from headwater.diffusion.operators import Operator
from headwater.diffusion.pictures import is_image, png_of
from headwater.diffusion.policy import DiffusionPolicy
from headwater.diffusion.posterior_evaluation import evaluate
from headwater.diffusion.posterior_report import Seen, findings_of, report_sections
from headwater.diffusion.priors import Prior, load_prior, save_prior
from headwater.diffusion.process import GaussianProcess
from headwater.diffusion.written import numbers_of, text_of, write_array
from headwater.environments.base import Objects
from headwater.objectives import Objective
from headwater.policies.base import Policy
from headwater.recipes.base import Problem, Recipe, device_named
from headwater.replay import ReplaySettings
from headwater.report import Findings, Section
from headwater.runs import INPUTS, Run, Samples, atomic
from headwater.sampler import Sampler
from headwater.training import ExplorationSettings, Sharpness, Training

_TRIED = 256
"""Draws of the prior on which the likelihood is tried before there is a run."""
_PICTURED = 64
"""Samples in samples.png."""


@dataclass(frozen=True)
class PosteriorRecipe(Recipe):
    """Learn to draw from a diffusion prior times a likelihood: the posterior.

    --prior runs/digits --operator inpaint --operator.rows 0:4 --measurement y.npy. The prior is a run of train prior,
    or a pipeline folder of diffusers. What is drawn is in samples.npy, its mean and deviation beside it.
    """

    summary: ClassVar[str] = "draw from a diffusion prior times a likelihood: inverse problems, guidance"

    prior: Path | None = None
    """Folder of a run of train prior, of a prior, or of a pipeline of diffusers."""
    prior_steps: int = 0
    """Steps of a diffusers pipeline's chain; 0 for as many as it was trained with."""
    prior_eta: float = 1.0
    """Noise of a diffusers DDIM scheduler: above 0, since a chain without noise has no probabilities."""
    operator: OperatorSettings = field(default_factory=OperatorSettings)
    """What is measured of an object."""
    measurement: Path | None = None
    """What was measured: an array .npy, a table .csv or a picture. With an operator inpaint also a whole object."""
    value_range: tuple[float, float] = (-1.0, 1.0)
    """Of a measurement that is a picture, what black and white are."""
    likelihood: LikelihoodSettings = field(default_factory=LikelihoodSettings)
    """The noise of the measurement, and what else is known."""
    truth: Path | None = None
    """The object itself, if it is known: a file as of a measurement. Only for comparison."""
    adapter: Adapter = field(default_factory=lambda: Adapter("correction", langevin=True, gradient_at="data"))
    """How the posterior's network is made from the prior's: a copy, low-rank adapters, or a network beside it; with
    langevin it is told the gradient of the likelihood, where there is one."""
    learned_steps: int = 0
    """Steps of each chain that are learned from in an update, drawn at random; 0 for all."""
    annealing: Sharpness = field(default_factory=lambda: Sharpness(1.0, 1.0, 0.5))
    """The likelihood to the power 1 / beta, where beta falls from so much to 1 over this share of the run."""
    baselines: tuple[str, ...] = ("resampling", "twisted-smc")
    """Samplers without training to compare with, at equal reward calls: resampling, twisted-smc, dps, lgd-mc,
    pseudo-inverse."""
    device: str = "auto"
    """cpu, cuda, cuda:1, ...; auto takes a GPU if there is one."""
    objective: Objective = field(default_factory=lambda: Objective("tb", penalty="huber"))
    """What to balance."""
    training: Training = field(
        default_factory=lambda: Training(
            iterations=1000, batch_size=128, replayed=64, warm_up=2000, replay_backward=True, learning_rate=3e-3,
            log_z_learning_rate=0.5, schedule="cosine", log_every=20, evaluate_every=200, checkpoint_every=200,
        )
    )  # fmt: skip
    """How long and how fast to learn. The replay is warmed up with draws of the prior."""
    exploration: ExplorationSettings = field(default_factory=lambda: ExplorationSettings(epsilon=0.0))
    """temperature: factor on the variance of every step. epsilon: share of chains that the prior draws."""
    replay: ReplaySettings = field(default_factory=lambda: ReplaySettings(capacity=20_000, rule="softmax"))
    """Which objects chains are walked back from."""
    keep_objects: bool = False
    """Keep every object ever scored, with its reward, in objects.sqlite."""

    def __post_init__(self) -> None:
        if self.prior is None:
            raise ValueError(
                "prior: name a folder, of a run of train prior or of a pipeline of diffusers (headwater train prior "
                "--data images.npy makes one)"
            )
        if self.annealing.at(1.0) != 1:
            raise ValueError(
                f"annealing.beta_end = {self.annealing.at(1.0)}: must be 1 in the end; likelihood.beta is the power of "
                "the likelihood"
            )
        if self.truth is not None and self.measurement is None:
            raise ValueError("truth: is compared with the posterior of a measurement; give that too")
        if self.objective.name not in ("tb", "vargrad", "rloo"):
            raise ValueError(
                f"objective.name = {self.objective.name!r}: must be vargrad, tb, or rloo, the policy gradient with "
                "divergence"
            )
        require_baselines(self.baselines)

    # What is learned

    def prepared(self, folder: Path) -> Recipe:
        """With a copy of the prior in the run, if it is one of Headwater's."""
        kept = folder / INPUTS / "prior"
        if self.prior == kept:
            return self
        if self.latent is not None:
            save_latent_prior(self.latent, kept)
        elif isinstance(self.given.denoiser, Network):
            save_prior(self.given, kept)
        else:
            return self
        return replace(self, prior=kept)

    @cached_property
    def latent(self) -> LatentPrior | None:
        """The prior of an autoencoder's latents, with that; None where the prior is one of objects."""
        assert self.prior is not None
        if not is_latent(self.prior):
            return None
        latent = load_latent_prior(self.prior)
        latent.autoencoder.to(self.on)
        return latent

    @cached_property
    def given(self) -> Prior:
        """The prior of what chains end in."""
        assert self.prior is not None
        return self.latent.prior if self.latent else load_prior(self.prior, self.prior_steps, self.prior_eta)

    @property
    def shape(self) -> tuple[int, ...]:
        """Of an object."""
        return self.latent.shape if self.latent else self.given.process.shape

    @torch.no_grad()
    def in_units(self, ends: Tensor) -> Tensor:
        """Objects in the units of the data, of what chains end in, `[N, *shape]`."""
        return self.given.units.of_data((self.latent.decode(ends.to(self.on)) if self.latent else ends).cpu())

    @cached_property
    def forward(self) -> Operator:
        """A(x), in the units of the data."""
        return operator_of(self.operator, self.shape)

    @cached_property
    def y(self) -> Tensor | None:
        """What was measured, `[1, *forward.measured]`; None where nothing was."""
        if self.measurement is None:
            return None
        y = read_measurements(self.measurement, self.forward, self.value_range)
        if len(y) > 1:
            raise ValueError(f"{self.measurement}: holds {len(y)} measurements, a posterior is of one")
        return y

    @property
    def shown_measurement(self) -> Tensor | None:
        """What the samples are of."""
        return self.y

    @cached_property
    def measured(self) -> Measured | None:
        """The likelihood of the measurement; None where there is none."""
        return None if self.y is None else self.likelihood.measured(self.forward, self.given.units, self.y)

    @cached_property
    def target(self) -> Likelihood:
        """r, of what chains end in."""
        likelihood = self.likelihood.likelihood(self.measured, self.given.units)
        return (
            likelihood if self.latent is None else of_latents(likelihood, self.latent.decode, self.given.process.shape)
        )

    @property
    def measured_likelihood(self) -> MeasurementLikelihood | None:
        """Of the measurement alone, of what chains end in."""
        if self.measured is None or self.latent is None:
            return None if self.measured is None else self.measured.likelihood
        of_latent = of_latents(self.measured.likelihood, self.latent.decode, self.given.process.shape)
        assert isinstance(of_latent, MeasurementLikelihood)
        return of_latent

    @cached_property
    def true_object(self) -> Tensor | None:
        """In the units of the data, `[*shape]`."""
        if self.truth is None:
            return None
        values, shape = read_array(self.truth, self.value_range), self.shape
        if values.numel() != math.prod(shape):
            raise ValueError(f"{self.truth}: has shape {tuple(values.shape)}, an object of the prior has {shape}")
        return values.reshape(shape)

    @cached_property
    def on(self) -> torch.device:
        """The device."""
        return device_named(self.device)

    def problem(self) -> Problem:
        annealed = self.annealing if self.annealing.at(0.0) != 1 else None
        return Problem(self.policy(self._denoiser()), self.target, NoCondition(), sharpness=annealed)

    def policy(self, posterior: Denoiser, log_z: nn.Module | None = None) -> DiffusionPolicy:
        """Of a posterior's denoiser."""
        process, prior = self.given.process, self.given.denoiser
        policy = DiffusionPolicy(process, prior, posterior, log_z, self.training.steps_at_once, self.learned_steps)
        return policy.to(self.on)

    def _denoiser(self, columns: int = 0, examples: Tensor | None = None) -> Denoiser:
        """By the adapter, without a gradient where there is none."""
        adapter = self.adapter
        if adapter.langevin and not self._has_gradient(examples):
            adapter = replace(adapter, langevin=False)
        return adapter.posterior(self.given, columns, self.target if adapter.langevin else None, examples)

    def _has_gradient(self, examples: Tensor | None) -> bool:
        if not isinstance(self.given.process, GaussianProcess):
            return False
        condition = torch.empty(1, 0) if examples is None else examples[:1]
        try:
            self.target.gradient(torch.zeros(1, *self.given.process.shape, device=self.on), condition.to(self.on))
        except TypeError:
            return False
        return True

    def check(self) -> None:
        """Also that the likelihood is not 0, and has not failed, on all of some draws of the prior."""
        problem, _ = self.problem(), self.true_object
        row = torch.empty(1, 0) if (row := self.default_condition()) is None else row
        rows = row.to(self.on).expand(_TRIED, -1)
        objects, _ = self.given.sample(rows, torch.Generator().manual_seed(self.seed))
        require_support(problem.reward(objects, rows), f"of {_TRIED} draws of the prior")

    # How good it is

    def evaluation(self, run: Run, sampler: Sampler) -> dict[str, object]:
        """Bounds on log Z and an estimate, how far to trust them, and other samplers at equal reward calls."""
        policy = sampler.problem.policy
        assert isinstance(policy, DiffusionPolicy)
        calls = max((int(float(row["reward_calls"])) for row in run.metrics() if "reward_calls" in row), default=0)
        evaluated = evaluate(
            policy, self.given, self.target, self.measured_likelihood, self.true_object, self.in_units, self.baselines,
            calls, torch.Generator().manual_seed(self.seed + 2), self.default_condition(),
        )  # fmt: skip
        for name, objects in evaluated.drawn_by.items():
            write_array(run.folder / f"baseline-{name}.npy", self.in_units(objects).numpy())
        return evaluated.figures

    def findings(self, figures: Mapping[str, object]) -> Findings:
        return findings_of(figures)

    # Its objects

    @property
    def _tokens(self) -> bool:
        return not self.given.process.start(1, torch.Generator()).is_floating_point()

    def text(self, objects: Objects) -> list[str]:
        assert isinstance(objects, Tensor)
        return text_of(objects if self._tokens else self.in_units(objects), self.given.alphabet)

    def drawn(self, samples: Samples) -> NDArray[np.generic]:
        """The samples as numbers in the units of the data, `[N, *shape]`; tokens as whole numbers."""
        return numbers_of(samples.objects, self.shape, self._tokens, self.given.alphabet)

    def write_samples(self, run: Run, samples: Samples) -> list[Path]:
        """Write samples.npy; of numbers also mean.npy and deviation.npy, of images samples.png and mean.png."""
        values = self.drawn(samples)
        files = [write_array(run.folder / "samples.npy", values)]
        if not self._tokens:
            files += [
                write_array(run.folder / "mean.npy", values.mean(0)),
                write_array(run.folder / "deviation.npy", values.std(0)),
            ]
        if is_image(self.shape):
            low, high = (float(value) for value in np.quantile(values.astype(np.float64), [0.001, 0.999]))
            for name, shown in (("samples", values[:_PICTURED]), ("mean", values.mean(0, keepdims=True))):
                files.append(run.folder / f"{name}.png")
                with atomic(files[-1]) as partial:
                    partial.write_bytes(png_of(shown, low, high))
        return files

    def sections(self, run: Run, policy: Policy) -> list[Section]:
        samples = run.samples()
        if samples is None:
            return []
        y = self.shown_measurement
        seen = None if y is None else Seen(self.forward, y, self.likelihood)
        return report_sections(
            run.folder, run.evaluation(), seen, self.true_object, self.drawn(samples), samples.objects
        )
