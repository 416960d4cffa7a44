"""Local search in the space of trees: Markov chains of local moves, whose trees the policy learns from beside its own.

The policy must have met the high ground before its balance can weigh it. So part of every batch is taken from a pool of
chains that start at neighbour-joining trees of resampled sites (Felsenstein's bootstrap, 1985), each a few
Metropolis-Hastings moves further, and is walked back by the backward policy. That only says where the policy learns:
how much each tree weighs is asked of the reward, so it matters little how well the chains mix.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn

from headwater.conditions import Conditions
from headwater.objectives import Objective
from headwater.phylogeny.moves import UNIFORMS, propose
from headwater.phylogeny.neighbour_joining import neighbour_joining
from headwater.phylogeny.policy import TreePolicy
from headwater.phylogeny.walks import tables_of
from headwater.policies.base import Exploration, LogProbs
from headwater.reward import Reward
from headwater.search.explorer import Explorer
from headwater.trajectories import Trajectories

_STEP = 2.0  # of all parameters together, in units of their first spread


@dataclass(frozen=True)
class ChainSettings:
    """Local search by chains of moves on trees."""

    share: float = 0.5
    """Share of the fresh trajectories that come from the chains; 0 for none."""
    pool: int = 256
    """Chains, each started from a neighbour-joining tree of resampled sites."""
    moves: int = 32
    """Moves that a chain makes before its tree is learned from again."""
    warm_up: int = 500
    """Moves that every chain makes before the first iteration."""

    def __post_init__(self) -> None:
        if not 0 <= self.share < 1:
            raise ValueError(f"share = {self.share}: must be at least 0 and below 1")
        for name in ("pool", "moves"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} = {getattr(self, name)}: must be at least 1")
        if self.warm_up < 0:
            raise ValueError(f"warm_up = {self.warm_up}: must not be negative")


class Pool(nn.Module):
    """Where every chain is. Buffers only, so that a checkpoint holds it.

    table: int32 `[pool, 2 (n-1)]`. above: float32 `[pool, 2n-1]`. coordinates: `[pool, p]`, of model parameters.
    condition: `[pool, C]`, what each chain is at. log_reward: float32 `[pool]`. turn: chains moved so
    far, each in its turn; 0 before they have started.
    """

    table: Tensor
    above: Tensor
    condition: Tensor
    coordinates: Tensor
    log_reward: Tensor
    turn: Tensor

    def __init__(self, n: int, pool: int, condition_size: int, parameters: int) -> None:
        super().__init__()
        self.register_buffer("table", torch.zeros(pool, 2 * (n - 1), dtype=torch.int32))
        self.register_buffer("above", torch.zeros(pool, 2 * n - 1))
        self.register_buffer("condition", torch.zeros(pool, condition_size))
        self.register_buffer("coordinates", torch.zeros(pool, parameters))
        self.register_buffer("log_reward", torch.full((pool,), torch.nan))
        self.register_buffer("turn", torch.zeros((), dtype=torch.int64))


class TreeChains(Explorer):
    """Draws a share of the trajectories from the chains, the others with the student."""

    own: Pool

    def __init__(self, student: TreePolicy, reward: Reward, conditions: Conditions, settings: ChainSettings) -> None:
        super().__init__(student, nn.Module())
        del self._modules["own"]  # no weights: a search process that gets new ones keeps the chains that it has
        object.__setattr__(self, "own", Pool(student.n, settings.pool, conditions.size, student.evidence.parameters))
        self.trees, self.reward, self.conditions, self.settings = student, reward, conditions, settings

    def sample(self, condition: Tensor, exploration: Exploration, generator: torch.Generator) -> Trajectories:
        """The trajectories of chains have the chains' own conditions; their `log_behaviour` is that of the walk."""
        count = round(self.settings.share * len(condition))
        drawn = []
        if count:
            walked = self.trees.sample_to(*self.advance(count, generator), generator)
            drawn.append(replace(walked, version=torch.full_like(walked.version, self.version)))
        if count < len(condition):
            drawn.append(self.student.sample(condition[count:], exploration, generator))
        return Trajectories.concatenate(drawn)

    def loss(
        self, objective: Objective, log_probs: LogProbs, batch: Trajectories, generator: torch.Generator
    ) -> Tensor:
        """Nothing is learned beside the student."""
        return log_probs.log_z.new_zeros(())

    def advance(self, count: int, generator: torch.Generator) -> tuple[Tensor, Tensor]:
        """Move the next `count` chains on: the objects that they come to, and their conditions."""
        pool = self.own
        if not int(pool.turn):
            self._start(generator)
        chosen = (int(pool.turn) + torch.arange(count)) % len(pool.table)
        pool.turn += count
        self._exchange(chosen, generator)
        for _ in range(self.settings.moves):
            self._move(chosen, generator)
        objects = self.trees.assembled(pool.table[chosen], pool.above[chosen], pool.coordinates[chosen])
        return objects, pool.condition[chosen]

    def _move(self, chosen: Tensor, generator: torch.Generator) -> None:
        """One Metropolis-Hastings move of each chain that is `chosen`, `[K]`."""
        pool, count = self.own, len(chosen)
        uniform = torch.rand(count, UNIFORMS + 1, dtype=torch.float64, generator=generator)
        above = pool.above[chosen] if self.trees.evidence.has_lengths else None
        table, above, ratio = propose(pool.table[chosen], above, uniform[:, 1:])
        parameters = pool.coordinates[chosen]
        if parameters.shape[1]:  # a step of the parameters alone, every fourth time
            alone = torch.rand(count, generator=generator) < 0.25
            assert self.trees.parameter_density is not None
            steps = torch.randn(parameters.shape, generator=generator) @ self.trees.parameter_density.factor.t()
            steps *= _STEP * parameters.shape[1] ** -0.5
            parameters = torch.where(alone[:, None], parameters + steps, parameters)
            table, ratio = torch.where(alone[:, None], pool.table[chosen], table), ratio.masked_fill(alone, 0.0)
            above = None if above is None else torch.where(alone[:, None], pool.above[chosen], above)
        log_reward = self.reward(self.trees.assembled(table, above, parameters), pool.condition[chosen])
        gain = (log_reward - pool.log_reward[chosen]).double() + ratio
        accepted = uniform[:, 0].log() < gain  # NaN, of a reward that failed, is never accepted
        moved = chosen[accepted]
        pool.table[moved], pool.log_reward[moved] = table[accepted], log_reward[accepted]
        pool.coordinates[moved] = parameters[accepted]
        if above is not None:
            pool.above[moved] = above[accepted]

    def _exchange(self, chosen: Tensor, generator: torch.Generator) -> None:
        """Neighbours in temperature among the `chosen`, `[K]`, change places, so that cold chains leave where they are
        stuck (replica exchange, Geyer 1991)."""
        pool = self.own
        if not pool.condition.shape[1]:
            return
        uniform = torch.rand(len(chosen) + 1, dtype=torch.float64, generator=generator)
        ordered = chosen[pool.condition[chosen, 0].argsort()][int(uniform[-1] < 0.5) :]
        pairs = ordered[: len(ordered) // 2 * 2].view(-1, 2)
        here, there = pairs.flatten(), pairs.flip(1).flatten()
        objects = self.trees.assembled(pool.table[there], pool.above[there], pool.coordinates[there])
        log_reward = self.reward(objects, pool.condition[here])
        gain = (log_reward - pool.log_reward[here]).double().view(-1, 2).sum(1)
        accepted = (uniform[: len(pairs)].log() < gain).repeat_interleave(2)
        moved, taken = here[accepted], there[accepted]
        pool.log_reward[moved] = log_reward[accepted]
        for held in (pool.table, pool.above, pool.coordinates):
            held[moved] = held[taken]

    def _start(self, generator: torch.Generator) -> None:
        pool, evidence = self.own, self.trees.evidence
        merges, lengths = neighbour_joining(
            evidence.resampled_distances(len(pool.table), generator), 0.3 / evidence.n_sites
        )
        table, above = tables_of(merges, lengths)
        pool.table.copy_(table)
        pool.above.copy_(above)
        pool.condition.copy_(self.conditions.draw(len(table), 1, generator))
        if self.trees.parameter_density is not None:
            pool.coordinates.copy_(self.trees.parameter_density.start.expand_as(pool.coordinates))
        objects = self.trees.assembled(table, above, pool.coordinates)
        pool.log_reward.copy_(self.reward(objects, pool.condition))
        everyone = torch.arange(len(table))
        for move in range(self.settings.warm_up):
            self._move(everyone, generator)
            if move % self.settings.moves == 0:
                self._exchange(everyone, generator)
