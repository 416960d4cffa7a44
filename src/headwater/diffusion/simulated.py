"""Pairs of objects and measurements, from whose objects chains are walked back while a sampler learns.

Simulated ones, draws of the prior with a measurement of each, teach a sampler of all posteriors q(x | y) at once: the
object is an exact draw of the posterior under its own measurement, so walked back by the noising process it is a chain
from where the posterior is, however little of the prior is there. (Simulation-based inference: Cranmer et al. 2020,
arXiv 1911.01429.) Under one fixed measurement, objects that any other sampler has found do the same; they need not be
exact draws, since trajectory balance asks the same of every chain.
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

    objects: `[M, *shape]`. measurement: `[M, C]`, flattened; equal ones have several objects, as all do if C = 0.
    Raises ValueError where there is not one of each, or a measurement is not finite.
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
        device = next(prior.denoiser.parameters(), torch.empty(0)).device
        objects, measured = [], []
        for first in range(0, count, batch_size):
            nothing = torch.empty(min(batch_size, count - first), 0, device=device)
            objects.append(prior_draws(prior.process, prior.denoiser, nothing, generator))
            measured.append(likelihood.draw(objects[-1], generator).flatten(1))
        return Pairs(torch.cat(objects).cpu(), torch.cat(measured).cpu())

    @property
    def size(self) -> int:
        """C."""
        return self.measurement.shape[1]

    def draw(self, count: int, group_size: int, generator: torch.Generator) -> Tensor:
        """`[count, C]` measurements; each run of `group_size` rows shares one."""
        rows = torch.randint(len(self.measurement), (-(-count // group_size),), generator=generator)
        return self.measurement[rows].repeat_interleave(group_size, 0)[:count]

    def object_of(self, measurement: Tensor, generator: torch.Generator) -> tuple[Tensor, Tensor]:
        """An object of each of the rows `[N, C]` that are among the measurements, at random where there are several,
        `[K, *shape]`; and which rows these are, bool `[N]`."""
        wanted = _key(measurement.cpu())
        first, end = (torch.searchsorted(self._sorted_keys, wanted, right=right) for right in (False, True))
        found = end > first
        uniform = torch.rand(len(wanted), generator=generator, device=generator.device, dtype=torch.float64).cpu()
        place = first + ((end - first) * uniform).long()
        chosen = self.objects[self._order[place[found].to(self._order.device)]]
        return chosen.to(measurement.device), found.to(measurement.device)

    @cached_property
    def _order(self) -> Tensor:
        return _key(self.measurement).argsort()

    @cached_property
    def _sorted_keys(self) -> Tensor:
        return _key(self.measurement)[self._order]


class FromPairs(Explorer):
    """Draws with the student, but for a `share` of the chains under each measurement, at least one, which are walked
    back from objects that belong to it.

    Among chains of one group under the log-partition variance, those of the student are thereby held against draws of
    the posterior. Measurements that are not among the pairs are left to the student.
    """

    def __init__(self, student: Policy, pairs: Pairs, share: float = 0.25) -> None:
        super().__init__(student, nn.Module())
        if not 0 <= share <= 1:
            raise ValueError(f"share = {share}: must lie between 0 and 1")
        self.pairs, self.share = pairs, share

    @staticmethod
    def of(pairs: Pairs, share: float = 0.25) -> Callable[[Policy], FromPairs]:
        """What a `Trainer` takes as its explorer."""
        return lambda student: FromPairs(student, pairs, share)

    @torch.no_grad()
    def sample(self, condition: Tensor, exploration: Exploration, generator: torch.Generator) -> Trajectories:
        """The student's chains, in the order of their rows, then those that are walked back: `[T]` in all."""
        rows = _first_share(condition, self.share)
        objects, found = self.pairs.object_of(condition[rows], generator)
        walked = rows[found]
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


def _first_share(rows: Tensor, share: float) -> Tensor:
    """Where the first rows of each distinct kind are, a share of them and at least one, in rising order."""
    kind = torch.zeros(len(rows), dtype=torch.int64, device=rows.device)
    if rows.shape[1]:
        kind = torch.unique(rows, dim=0, return_inverse=True)[1]
    order, count = kind.argsort(stable=True), torch.bincount(kind)
    before = count.cumsum(0) - count
    rank = torch.empty_like(kind)
    rank[order] = torch.arange(len(rows), device=rows.device) - before[kind[order]]
    return (rank < (share * count).long().clamp(min=1)[kind]).nonzero()[:, 0]
