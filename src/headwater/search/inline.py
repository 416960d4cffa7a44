"""Search in the learner's own process: draw, score, remember, one batch at a time."""

from __future__ import annotations

import torch

from headwater.policies.base import Exploration
from headwater.replay import Replay
from headwater.search.base import Search
from headwater.search.searcher import Searcher
from headwater.trajectories import Trajectories


class InlineSearch(Search):
    """Each `collect` draws with the weights of that moment; every random number comes from `generator`."""

    def __init__(self, searcher: Searcher, replay: Replay | None, generator: torch.Generator) -> None:
        super().__init__(searcher, replay)
        self.generator = generator

    def collect(self, count: int, exploration: Exploration) -> Trajectories:
        drawn = self.searcher.collect(count, exploration, self.generator)
        self._remember(drawn)
        return drawn.trajectories
