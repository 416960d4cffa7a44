"""The recipe `prior`: learn a diffusion prior from data. What it leaves in the run's `prior/` is what a posterior
starts from.
"""

from __future__ import annotations

import atexit
import math
import shutil
import tempfile
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path
from typing import ClassVar, Literal

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from headwater.conditions import NoCondition
from headwater.diffusion.data import Data, read_data, read_pictures
from headwater.diffusion.denoisers import Network, ResidualMLP, TokenTransformer
from headwater.diffusion.fitting import PriorFitting, Unscored, Weighting
from headwater.diffusion.measures import random_directions, sliced_wasserstein
from headwater.diffusion.pictures import samples_beside_data
from headwater.diffusion.priors import FOLDER, Prior, save_prior
from headwater.diffusion.process import GaussianProcess, Parametrisation, Process, Variance
from headwater.diffusion.tokens import MaskedProcess, OneByOneProcess, RevealingProcess
from headwater.diffusion.written import numbers_of, text_of, write_array
from headwater.environments.base import Objects
from headwater.objectives import Objective
from headwater.policies.base import Policy
from headwater.recipes.base import Problem, Recipe, device_named
from headwater.report import Card, Findings, Section, Term
from headwater.report.findings import line
from headwater.report.numbers import as_float, number
from headwater.runs import Metrics, Run, Samples
from headwater.sampler import Sampler
from headwater.training import ExplorationSettings, Training

_LARGEST_FOR_MLP = 1024
_USUAL_SIZE = 20.0
"""Of the numbers of data that a variance-preserving chain can still turn into unit noise."""
_MEASURED_WHILE_TRAINING, _MEASURED = 256, 2000
_LARGEST_SHARE_OF_START = 0.05
"""Of the weights that training starts from, in their moving average at the end."""


_TERMS = {
    "log_likelihood_bound": Term("Log-likelihood bound", "Of held-out objects, at most their log-likelihood, in nats."),
    "log_likelihood_bound_error": Term("Its standard error", "Over objects."),
    "log_likelihood_bound_learned": Term(
        "The same of learned ones", "Far above the first, the prior has learned its data by heart."
    ),
    "sliced_wasserstein": Term("Sliced Wasserstein distance", "Of samples from held-out objects, over 256 directions."),
    "sliced_wasserstein_floor": Term("The same of data", "Of as many learned objects: no sampler should be nearer."),
    "held_out_objects": Term("Held-out objects", "That were not learned from."),
    "numbers_an_object": Term("Numbers an object", "The bound is a sum over them."),
}


@dataclass(frozen=True)
class ChainSettings:
    """The chain from noise to data."""

    kind: Literal["linear", "cosine", "exploding", "masked", "one-by-one"] = "linear"
    """linear, cosine: variance-preserving, by this schedule. exploding: variance-exploding. masked: of tokens, each
    revealed in a random step. one-by-one: of tokens, one revealed in each step."""
    steps: int = 100
    """From noise to data; one-by-one has as many as there are tokens in an object."""
    parametrisation: Parametrisation | None = None
    """What the network predicts: noise, data or velocity; if not given velocity, of an exploding chain noise."""
    variance: Variance = "large"
    """Of a step: small and learned need final_noise above 0 or an exploding chain."""
    clip: float = 0.0
    """Largest absolute value of predicted data; 0 for no limit."""
    final_noise: float = 0.0
    """Deviation of the noise that is left in the data; not of an exploding chain."""
    largest_noise: float = 50.0
    """Deviation that an exploding chain starts from."""
    smallest_noise: float = 0.01
    """Deviation that an exploding chain leaves in the data."""

    def __post_init__(self) -> None:
        self.process((1,), 2)

    @property
    def is_of_tokens(self) -> bool:
        """Whether objects are strings of tokens."""
        return self.kind in ("masked", "one-by-one")

    def process(self, shape: tuple[int, ...], vocabulary: int) -> Process:
        """Over objects of `shape`. Raises ValueError naming a setting that is out of range."""
        if self.kind == "masked":
            return MaskedProcess(shape[0], vocabulary, self.steps)
        if self.kind == "one-by-one":
            return OneByOneProcess(shape[0], vocabulary)
        usual: Parametrisation = "noise" if self.kind == "exploding" else "velocity"
        return GaussianProcess.of(
            shape, self.steps, self.kind, self.parametrisation or usual, self.variance, self.clip, self.final_noise,
            self.largest_noise, self.smallest_noise,
        )  # fmt: skip


@dataclass(frozen=True)
class NetworkSettings:
    """The network that learns."""

    kind: Literal["mlp", "unet", "transformer"] | None = None
    """mlp: residual multilayer perceptron. unet: convolutional, for images (extra: diffusion). transformer: for tokens.
    If not given, by what the data are."""
    width: int = 0
    """Of its layers; 0 for 256, of a unet 32, of a transformer 64."""
    blocks: int = 0
    """How many; 0 for 3, of a unet 1 a level, of a transformer 2."""
    levels: int = 2
    """Resolutions of a unet, each half of the one before."""

    def __post_init__(self) -> None:
        for name, least in (("width", 0), ("blocks", 0), ("levels", 1)):
            if getattr(self, name) < least:
                raise ValueError(f"{name} = {getattr(self, name)}: must be at least {least}")

    def build(self, process: Process) -> Network:
        """For the states of `process`. Raises ValueError naming a setting that does not fit them."""
        kind = self.kind or _usual_network(process)
        if (kind == "transformer") != isinstance(process, RevealingProcess):
            raise ValueError(
                f"network.kind = {kind!r}: a transformer is for tokens, chain.kind = masked or one-by-one, and "
                "only that"
            )
        if isinstance(process, RevealingProcess):
            return TokenTransformer(process.length, process.vocabulary, 0, self.width or 64, self.blocks or 2)
        learned = isinstance(process, GaussianProcess) and process.variance == "learned"
        if kind == "mlp":
            return ResidualMLP(process.shape, 0, self.width or 256, self.blocks or 3, learned)
        from headwater.diffusion.diffusers_prior import ConvolutionalNetwork

        return ConvolutionalNetwork(process.shape, 0, self.width or 32, self.blocks or 1, self.levels, learned)


@dataclass(frozen=True)
class PriorRecipe(Recipe):
    """Learn a diffusion prior from data.

    --data images.npy, points.csv, a folder of pictures, or with --chain.kind one-by-one lines.txt. The run's folder
    prior/ is the prior.
    """

    summary: ClassVar[str] = "learn a diffusion prior from images, points or strings of tokens"

    data: Path | None = None
    """What to learn from: an array .npy, a table .csv, lines .txt, or a folder of pictures."""
    standardise: bool = False
    """Subtract the mean of all numbers in the data and divide by their deviation; drawn objects are in the data's units
    all the same."""
    held_out: float = 0.1
    """Share of the objects that is measured on and not learned from."""
    chain: ChainSettings = field(default_factory=ChainSettings)
    """From noise to data."""
    network: NetworkSettings = field(default_factory=NetworkSettings)
    """What learns."""
    weighting: Weighting = "simple"
    """How the steps of a chain weigh: simple, alike; evidence, as in the bound on the log-likelihood."""
    device: str = "auto"
    """cpu, cuda, cuda:1, ...; auto takes a GPU if there is one."""
    samples: int = 256
    """Objects to draw when training is over."""
    objective: Objective = field(default_factory=lambda: Objective("mle"))
    """Maximum likelihood, and no other."""
    training: Training = field(
        default_factory=lambda: Training(
            iterations=5000, batch_size=256, learning_rate=1e-3, schedule="cosine", log_every=100, evaluate_every=1000
        )
    )
    """How long and how fast to learn."""
    exploration: ExplorationSettings = field(default_factory=lambda: ExplorationSettings(epsilon=0.0, average=0.999))
    """The moving average of the weights, which is what is kept."""
    keep_objects: bool = False
    """Not for given objects, which have no reward."""

    def __post_init__(self) -> None:
        if self.data is None:
            raise ValueError("data: name an array .npy, a table .csv, lines .txt or a folder of pictures")
        if self.objective.name != "mle":
            raise ValueError(f"objective.name = {self.objective.name!r}: a prior is learned by mle")
        if self.keep_objects:
            raise ValueError("keep_objects: given objects have no reward, and are not kept")
        if self.exploration.epsilon:
            raise ValueError("exploration.epsilon: nothing is explored, the objects are given")
        iterations, average = self.training.iterations, self.exploration.average
        if average**iterations > _LARGEST_SHARE_OF_START:
            most = math.floor(1000 * _LARGEST_SHARE_OF_START ** (1 / iterations)) / 1000
            raise ValueError(
                f"exploration.average = {average}: after {iterations} iterations too much of it would be what training "
                f"started from; take at most {most}, or 0"
            )
        if not 0 < self.held_out < 1:
            raise ValueError(f"held_out = {self.held_out}: must be above 0 and below 1")
        if self.training.replayed:
            raise ValueError(f"training.replayed = {self.training.replayed}: must be 0, the objects are given")

    def prepared(self, folder: Path) -> Recipe:
        """A folder of pictures as one array, which the run then keeps a copy of."""
        if self.data is None or not self.data.is_dir():
            return self
        pixels = read_pictures(self.data)
        made = Path(tempfile.mkdtemp(prefix="headwater-"))
        atexit.register(shutil.rmtree, made, ignore_errors=True)
        np.save(made / f"{self.data.name}.npy", pixels)
        return replace(self, data=made / f"{self.data.name}.npy")

    @cached_property
    def read(self) -> Data:
        """All data."""
        assert self.data is not None
        data = read_data(self.data, self.chain.is_of_tokens, self.standardise)
        if data.is_tokens:
            return data
        largest = float(data.objects.abs().max())
        if self.chain.kind in ("linear", "cosine") and largest > _USUAL_SIZE:
            raise ValueError(
                f"{self.data}: the largest number is {largest:.4g}, too far from the unit noise that a "
                "variance-preserving chain starts from; add --standardise, or take chain.kind = exploding"
            )
        if 0 < self.chain.clip < largest:
            raise ValueError(f"chain.clip = {self.chain.clip}: the largest number in {self.data} is {largest:.4g}")
        return data

    @cached_property
    def split(self) -> tuple[Tensor, Tensor]:
        """What is learned from, and what is measured on: the same of the same data at every seed."""
        objects = self.read.objects
        order = torch.randperm(len(objects), generator=torch.Generator().manual_seed(0))
        count = min(max(1, round(self.held_out * len(objects))), len(objects) - 1)
        return objects[order[count:].sort()[0]], objects[order[:count].sort()[0]]

    @cached_property
    def on(self) -> torch.device:
        """The device."""
        return device_named(self.device)

    def problem(self) -> Problem:
        process = self.chain.process(self.read.shape, self.read.vocabulary)
        prior = Prior(process, self.network.build(process), self.read.units, self.read.alphabet)
        return Problem(PriorFitting(prior, self.weighting).to(self.on), Unscored(), NoCondition())

    def given_states(self) -> Tensor:
        return self.split[0]

    def finish(self, run: Run, policy: Policy) -> None:
        assert isinstance(policy, PriorFitting)
        save_prior(policy.prior, run.folder / FOLDER)

    # How good it is

    def quick_evaluation(self, policy: Policy) -> Metrics | None:
        assert isinstance(policy, PriorFitting)
        generator = torch.Generator().manual_seed(self.seed + 1)
        return {
            "log_likelihood_bound": float(_bound(policy, self.split[1][:_MEASURED_WHILE_TRAINING], generator).mean())
        }

    def evaluation(self, run: Run, sampler: Sampler) -> dict[str, object]:
        """Bounds on the mean log-likelihood, in nats an object and in the prior's own numbers, of data that were held
        out and of others; how far samples are from data, beside how far data are from data."""
        policy, (learned, held_out) = sampler.problem.policy, self.split
        assert isinstance(policy, PriorFitting)
        generator = torch.Generator().manual_seed(self.seed + 2)
        bounds = _bound(policy, held_out[:_MEASURED], generator).double()
        some = learned[torch.randperm(len(learned), generator=generator)[:_MEASURED]]
        figures: dict[str, object] = {
            "held_out_objects": len(bounds),
            "log_likelihood_bound": float(bounds.mean()),
            "log_likelihood_bound_error": float(bounds.std(correction=0)) / len(bounds) ** 0.5,
            "log_likelihood_bound_learned": float(_bound(policy, some, generator).double().mean()),
            "numbers_an_object": held_out[0].numel(),
        }
        if not self.read.is_tokens:
            count = min(_MEASURED, len(held_out), len(learned))
            drawn = policy.sample(torch.empty(count, 0), generator=generator)
            objects = policy.objects(drawn)
            assert isinstance(objects, Tensor)
            pairs = {"sliced_wasserstein": objects.cpu(), "sliced_wasserstein_floor": some[:count]}
            directions = random_directions(256, held_out[0].numel(), generator)
            figures |= {name: sliced_wasserstein(one, held_out[:count], directions) for name, one in pairs.items()}
        return figures

    # Its objects

    def findings(self, figures: Mapping[str, object]) -> Findings:
        return Findings(
            headline=[
                *line(figures, "bound on the log-likelihood of held-out data: {:.3f} nats", "log_likelihood_bound"),
                *line(
                    figures, "sliced Wasserstein distance from them: {:.4f}; of data from data: {:.4f}",
                    "sliced_wasserstein", "sliced_wasserstein_floor",
                ),
            ],
            cards=[
                Card(name, number(as_float(figures[key])), note)
                for key, name, note in (
                    ("log_likelihood_bound", "Log-likelihood bound", "of held-out data, in nats"),
                    ("sliced_wasserstein", "Sliced Wasserstein", "of samples from held-out data"),
                )
                if key in figures
            ],
            terms=_TERMS,
        )  # fmt: skip

    def text(self, objects: Objects) -> list[str]:
        assert isinstance(objects, Tensor)
        own = objects if self.read.is_tokens else self.read.units.of_data(objects.cpu())
        return text_of(own, self.read.alphabet)

    def drawn(self, samples: Samples) -> NDArray[np.generic]:
        """The samples as numbers in the units of the data, `[N, *shape]`; tokens as whole numbers."""
        return numbers_of(samples.objects, self.read.shape, self.read.is_tokens, self.read.alphabet)

    def write_samples(self, run: Run, samples: Samples) -> list[Path]:
        """Write samples.npy."""
        return [write_array(run.folder / "samples.npy", self.drawn(samples))]

    def sections(self, run: Run, policy: Policy) -> list[Section]:
        samples = run.samples()
        if samples is None:
            return []
        return [samples_beside_data(self.drawn(samples), self.split[1], self.read, samples.objects)]


def _bound(policy: PriorFitting, objects: Tensor, generator: torch.Generator) -> Tensor:
    """Of each object, with the noise that the chain leaves in it: `[N]`."""
    prior, objects = policy.prior, objects.to(policy.device)
    end = torch.full((len(objects),), prior.process.n_steps, device=objects.device)
    noised = prior.process.noised(objects, end, generator)
    return prior.log_prob_bound(noised, torch.empty(len(objects), 0, device=objects.device), generator).cpu()


def _usual_network(process: Process) -> str:
    if isinstance(process, RevealingProcess):
        return "transformer"
    shape = process.shape
    return "unet" if len(shape) == 3 and shape[0] * shape[1] * shape[2] > _LARGEST_FOR_MLP else "mlp"
