"""Simulated pairs: objects drawn from the prior, and a measurement of each, with which a sampler of all posteriors
q(x | y) learns at once. The object is an exact draw of the posterior under its own measurement, so walked back by the
noising process it is a chain from where the posterior is, however little of the prior is there: no seeding of a replay
is needed. (Simulation-based inference: Cranmer et al. 2020, arXiv 1911.01429; here with a likelihood, as data for
relative trajectory balance, which needs it no less.)
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor, nn

from headwater.diffusion.guidance import prior_draws
from headwater.diffusion.likelihoods import MeasurementLikelihood
from headwater.diffusion.priors import Prior
from headwater.environments.base import identity
from headwater.objectives import Objective
from headwater.policies.base import Exploration, LogProbs, Policy
from headwater.search import Explorer
from headwater.trajectories import Trajectories


@dataclass(frozen=True, eq=False)
class Pairs:
    """Conditions: M measurements, each with the object that it was made of.

    objects: `[M, *shape]`. measurement: `[M, C]`, flattened. Raises ValueError where there is not one of each, or a
    measurement is not finite.
    """

    objects: Tensor
    measurement: Tensor

    def __post_init__(self) -> None:
        if self.measurement.ndim != 2 or not len(self.objects) or len(self.objects) != len(self.measurement):
            shapes = f"{tuple(self.objects.shape)} and {tuple(self.measurement.shape)}"
            raise ValueError(f"objects and measurement have shapes {shapes}: must be [M, ...] and [M, C], M above 0")
        if wrong := int((~self.measurement.isfinite()).any(1).sum()):
            raise ValueError(f"measurement: {wrong} of {len(self.measurement)} have values that are not finite")

    @staticmethod
    def simulated(
        prior: Prior, likelihood: MeasurementLikelihood, count: int, generator: torch.Generator, batch_size: int = 1000
    ) -> Pairs:
        """`count` draws of the prior's chain, which takes no condition, and a measurement of each."""
        objects, measured = [], []
        for first in range(0, count, batch_size):
            nothing = torch.empty(min(batch_size, count - first), 0)
            objects.append(prior_draws(prior.process, prior.denoiser, nothing, generator))
            measured.append(likelihood.draw(objects[-1], generator).flatten(1))
        return Pairs(torch.cat(objects), torch.cat(measured))

    @property
    def size(self) -> int:
        """C."""
        return self.measurement.shape[1]

    def draw(self, count: int, group_size: int, generator: torch.Generator) -> Tensor:
        """`[count, C]` measurements; each run of `group_size` rows shares one."""
        rows = torch.randint(len(self.measurement), (-(-count // group_size),), generator=generator)
        return self.measurement[rows].repeat_interleave(group_size, 0)[:count]

    def object_of(self, measurement: Tensor) -> tuple[Tensor, Tensor]:
        """The objects of rows `[N, C]` that are among the measurements, `[K, *shape]`; and which rows these are, bool
        `[N]`."""
        wanted = _key(measurement.cpu())
        place = torch.searchsorted(self._sorted_keys, wanted).clamp(max=len(self._order) - 1)
        found = self._sorted_keys[place] == wanted
        return self.objects[self._order[place[found]]].to(measurement.device), found.to(measurement.device)

    @cached_property
    def _order(self) -> Tensor:
        return _key(self.measurement).argsort()

    @cached_property
    def _sorted_keys(self) -> Tensor:
        return _key(self.measurement)[self._order]


class FromPairs(Explorer):
    """Draws with the student, but for one chain under each measurement, which is walked back from its object.

    Among chains of one group under the log-partition variance, those of the student are thereby held against an exact
    draw of the posterior. Measurements that are not among the pairs are left to the student.
    """

    def __init__(self, student: Policy, pairs: Pairs) -> None:
        super().__init__(student, nn.Module())
        self.pairs = pairs

    @staticmethod
    def of(pairs: Pairs) -> Callable[[Policy], FromPairs]:
        """What a `Trainer` takes as its explorer."""
        return lambda student: FromPairs(student, pairs)

    @torch.no_grad()
    def sample(self, condition: Tensor, exploration: Exploration, generator: torch.Generator) -> Trajectories:
        """The student's chains in the order of their rows, then those of objects, `[T]` in all."""
        first = _first_of_each(condition)
        objects, found = self.pairs.object_of(condition[first])
        walked = first[found]
        left = torch.ones(len(condition), dtype=torch.bool, device=condition.device)
        left[walked] = False
        parts = []
        if bool(left.any()):
            parts.append(self.student.sample(condition[left], exploration, generator))
        if len(walked):
            parts.append(self.student.sample_to(objects, condition[walked], generator))
        return Trajectories.concatenate(parts)

    def loss(
        self, objective: Objective, log_probs: LogProbs, batch: Trajectories, generator: torch.Generator
    ) -> Tensor:
        """Nothing is learned here."""
        return log_probs.log_z.new_zeros(())

    def published(self) -> dict[str, Tensor]:
        return self.student.published()


def _key(rows: Tensor) -> Tensor:
    return identity(rows.float().contiguous().view(torch.int32))


def _first_of_each(rows: Tensor) -> Tensor:
    """Where each distinct row is for the first time, in rising order."""
    _, which = torch.unique(rows, dim=0, return_inverse=True)
    places = torch.full((int(which.max()) + 1,), len(rows), device=rows.device)
    return places.scatter_reduce(0, which, torch.arange(len(rows), device=rows.device), "amin").sort().values
