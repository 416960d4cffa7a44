"""What a rule sees of a replay: its entries, oldest first, and who is where when they stand by reward."""

from __future__ import annotations

from collections.abc import Callable
from functools import cached_property

import torch
from torch import Tensor

from headwater.trajectories import Trajectories


class Entries:
    """The n entries of a replay, oldest first.

    log_reward:    `[n]` float32.
    condition_key: `[n]` int64, equal for entries of equal condition.
    version:       `[n]` int64, the version of the policy that drew each entry.
    recent:        how many entries, at the end, came with the most recent batch.
    gather:        the trajectories at `[K]` indices.

    Of a replay's own entries, a column costs time in proportion to n, and the methods `ranked`, `ranked_log_reward`,
    `n_above` and `trajectories` in proportion to what is asked. They hold until the next entries are added.
    """

    def __init__(
        self,
        log_reward: Tensor,
        condition_key: Tensor,
        version: Tensor,
        recent: int,
        gather: Callable[[Tensor], Trajectories] | None = None,
    ) -> None:
        self.log_reward, self.condition_key, self.version = log_reward, condition_key, version
        self.recent = recent
        self._gather = gather

    def __len__(self) -> int:
        return self.log_reward.shape[0]

    def ranked(self, positions: Tensor) -> Tensor:
        """`[K]` int64, the entries at these positions by falling log-reward, from 0 on; equal ones oldest first."""
        return self._best_first[positions]

    def ranked_log_reward(self, positions: Tensor) -> Tensor:
        """`[K]` float32, the log-rewards of the entries at these positions by falling log-reward."""
        return self._falling_log_reward[positions]

    def n_above(self, log_reward: Tensor) -> Tensor:
        """`[K]` int64, how many entries have a log-reward above each of these (`[K]` float32)."""
        return torch.searchsorted(-self._falling_log_reward, -log_reward)

    def trajectories(self, indices: Tensor) -> Trajectories:
        """The entries at `[K]` indices, as a batch; raises TypeError where there are only columns."""
        if self._gather is None:
            raise TypeError("these entries are columns only: a rule that looks at trajectories draws from a replay")
        return self._gather(indices)

    @cached_property
    def by_condition(self) -> tuple[Tensor, Tensor]:
        """`[n]` int64, the entries one condition after the other, by rising key, each oldest first; and `[G]` int64,
        where each of the G conditions ends there.
        """
        keys, order = self.condition_key.sort(stable=True)
        return order, torch.unique_consecutive(keys, return_counts=True)[1].cumsum(0)

    @cached_property
    def _best_first(self) -> Tensor:
        return self.log_reward.argsort(descending=True, stable=True)

    @cached_property
    def _falling_log_reward(self) -> Tensor:
        return self.log_reward[self._best_first]

    def select(self, chosen: Tensor) -> Entries:
        """The entries at `chosen`, `[K]` indices in rising order."""
        recent = int((chosen >= len(self) - self.recent).sum())
        columns = (self.log_reward[chosen], self.condition_key[chosen], self.version[chosen])
        return Entries(*columns, recent, lambda indices: self.trajectories(chosen[indices]))
