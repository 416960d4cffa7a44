"""First guesses at a posterior, so that a policy starts at the data's scale: a good tree, the log marginal likelihood,
and where the parameters of the substitution model are, and how sure that is.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from headwater.phylogeny.branch_lengths import fit_lengths, log_likelihood_gradients
from headwater.phylogeny.evidence import Evidence, LikelihoodEvidence
from headwater.phylogeny.moves import UNIFORMS, propose
from headwater.phylogeny.neighbour_joining import neighbour_joining
from headwater.phylogeny.reward import ParsimonyReward, log_topologies, no_choice
from headwater.phylogeny.walks import tables_of, walks_to

_ROUNDS, _STEPS = 3, 8  # of lengths and parameters in turn; of parameters in a turn
_APART = 0.1  # of coordinates, for second differences: the likelihood's single precision does not show there


@dataclass(frozen=True)
class Guess:
    """log_marginal: of the alignment. coordinates: `[p]`, the best of the sampled parameters. factor: `[p, p]`, lower
    triangular, of their covariance.
    """

    log_marginal: float
    coordinates: Tensor
    factor: Tensor


def guess(evidence: LikelihoodEvidence, branch_rate: float, start: Tensor) -> Guess:
    """Laplace's approximation about the neighbour-joining tree and the most parsimonious that a short climb finds,
    whichever is better; edge by edge, and over the parameters together. start: coordinates `[p]`, p = 0 for none.
    """
    joined, lengths = neighbour_joining(evidence.distances[None], 1e-5)
    climbed, _ = walks_to(climb(evidence), None, no_choice(torch.empty(1, 2 * (evidence.n - 1))))
    merges = torch.cat([joined, climbed])
    b = torch.cat([lengths, torch.full_like(lengths, float(lengths.mean()))]).double()
    b, log_marginal = _fitted(evidence, branch_rate, merges, b, start)
    best = int(log_marginal.argmax())
    merges, b, at = merges[best : best + 1], b[best : best + 1], start
    factor = torch.zeros(len(start), len(start))
    for _ in range(_ROUNDS if len(start) else 0):
        at, factor = _climbed(evidence, merges, b, at)
        b, log_marginal = _fitted(evidence, branch_rate, merges, b, at)
    volume = float(factor.diagonal().log().sum()) + 0.5 * len(start) * math.log(2 * math.pi)
    return Guess(float(log_marginal.max()) + float(evidence.log_prior(at[None])) + volume, at, factor)


def climb(evidence: Evidence, count: int = 64, moves: int = 400) -> Tensor:
    """The table of the most parsimonious tree, `[1, 2 (n-1)]`, that `count` climbs find, of random moves each of which
    is taken if it costs nothing, from neighbour-joining trees of resampled sites. Always the same.
    """
    generator = torch.Generator().manual_seed(0)
    reward = ParsimonyReward(evidence.masks, evidence.weights.numpy(), evidence.planes)
    tables, _ = tables_of(neighbour_joining(evidence.resampled_distances(count, generator))[0])
    changes = reward.changes(tables)
    for _ in range(moves):
        uniform = torch.rand(count, UNIFORMS, dtype=torch.float64, generator=generator)
        proposed, _, _ = propose(tables, None, uniform)
        new = reward.changes(proposed)
        taken = new <= changes
        tables, changes = torch.where(taken[:, None], proposed, tables), torch.where(taken, new, changes)
    return tables[changes.argmin()][None]


def _fitted(
    evidence: LikelihoodEvidence, branch_rate: float, merges: Tensor, lengths: Tensor, parameters: Tensor
) -> tuple[Tensor, Tensor]:
    """The best lengths of each tree, float64 `[T, n-1, 2]`, and Laplace's approximation about them, `[T]`."""
    processes = evidence.processes(parameters[None] if len(parameters) else None)
    parts = [(part.tips, process) for part, process in zip(evidence.parts, processes, strict=True)]
    fitted, log_likelihood = fit_lengths(parts, merges.numpy(), lengths.clamp(min=1e-6).numpy(), branch_rate)
    found = [log_likelihood_gradients(tips, process, merges.numpy(), fitted) for tips, process in parts]
    b, second = (torch.from_numpy(x).flatten(1)[:, :-1] for x in (fitted, sum(each.second for each in found)))
    spread = 0.5 * (2 * math.pi / (-second * b.square()).clamp(min=1.0)).log()
    prior = b.shape[1] * math.log(branch_rate) - branch_rate * b.sum(1) - log_topologies(evidence.n)
    return torch.from_numpy(fitted), torch.from_numpy(log_likelihood) + prior + (b.log() + spread).sum(1)


def _climbed(evidence: LikelihoodEvidence, merges: Tensor, lengths: Tensor, at: Tensor) -> tuple[Tensor, Tensor]:
    """Newton's method from coordinates `at` `[p]` on one tree: where it ends, and the covariance's factor there."""

    def value(x: Tensor) -> Tensor:
        tree, its = merges.expand(len(x), -1, -1).contiguous(), lengths.expand(len(x), -1, -1).contiguous()
        return evidence.log_likelihood(tree, its, x) + evidence.log_prior(x)

    for _ in range(_STEPS):
        slope, curvature = _differences(value, at)
        size, direction = torch.linalg.eigh(-curvature)
        step = direction @ ((direction.t() @ slope) / size.clamp(min=1.0))
        step = (step / step.abs().max().clamp(min=1.0)).float()  # none by more than 1
        tried = at + step * torch.tensor([0.0, 0.125, 0.25, 0.5, 1.0])[:, None]
        chosen = int(value(tried).argmax())
        at = tried[chosen]
        if chosen == 0 or float(step.abs().max()) < 1e-3:
            break
    size, direction = torch.linalg.eigh(-_differences(value, at)[1])
    covariance = direction @ torch.diag(1 / size.clamp(min=1.0)) @ direction.t()
    return at, torch.linalg.cholesky(covariance).float()


def _differences(value: Callable[[Tensor], Tensor], at: Tensor) -> tuple[Tensor, Tensor]:
    """First derivatives `[p]` and second ones `[p, p]` of `value`, all points in one call."""
    p = len(at)
    unit = _APART * torch.eye(p)
    i, j = torch.triu_indices(p, p, 1)
    shifts = torch.cat([torch.zeros(1, p), unit, -unit, unit[i] + unit[j], -unit[i] - unit[j]])
    middle, up, down, both_up, both_down = torch.split(value(at + shifts), [1, p, p, len(i), len(i)])
    curvature = torch.diag((up + down - 2 * middle) / _APART**2)
    mixed = both_up + both_down - up[i] - up[j] - down[i] - down[j] + 2 * middle
    curvature[i, j] = curvature[j, i] = mixed / (2 * _APART**2)
    return (up - down) / (2 * _APART), curvature
