"""Searchers in virtual time: any number of them, with weights of a chosen age, in the learner's own thread.

What asynchrony does to learning, without a clock: the same run every time, and one that is resumed goes on bit for bit.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor

from headwater.policies.base import Exploration
from headwater.replay import Replay
from headwater.search.base import Search
from headwater.search.searcher import Drawn, Searcher
from headwater.trajectories import Trajectories


class VirtualSearch(Search):
    """For every update each of `searchers` draws a batch, with the weights that there were `lag` updates ago.

    All batches go to the replay; the learner gets one of them fresh, from one searcher after the other. Weights that
    may still be asked for are kept, here and in the checkpoint. Every random number comes from `generator`.
    """

    def __init__(
        self, searcher: Searcher, replay: Replay | None, generator: torch.Generator, searchers: int, lag: int
    ) -> None:
        super().__init__(searcher, replay)
        self.generator, self.searchers, self.lag = generator, searchers, lag
        self._turn = 0
        self._kept: deque[tuple[int, dict[str, Tensor]]] = deque(maxlen=lag + 1)
        self._keep()

    def collect(self, count: int, exploration: Exploration) -> Trajectories:
        with self._old_weights():
            batches = [self.searcher.collect(count, exploration, self.generator) for _ in range(self.searchers)]
        together = Trajectories.concatenate([drawn.trajectories for drawn in batches])
        self._remember(Drawn(together, sum(one.drawn for one in batches), sum(one.failed for one in batches)))
        self._turn += 1
        return batches[self._turn % self.searchers].trajectories

    def publish(self) -> None:
        self._keep()

    def state(self) -> dict[str, Tensor]:
        tensors = {f"{number}.{name}": value for number, (_, weights) in enumerate(self._kept)
                   for name, value in weights.items()}  # fmt: skip
        return tensors | {"turn": torch.tensor(self._turn), "versions": torch.tensor([v for v, _ in self._kept])}

    def load_state(self, tensors: dict[str, Tensor]) -> None:
        if "versions" not in tensors:  # the run searched otherwise until now: begin with the weights of now
            self._kept.clear()
            self._keep()
            return
        weights: list[dict[str, Tensor]] = [{} for _ in tensors["versions"]]
        for name, value in tensors.items():
            if name not in ("turn", "versions"):
                number, _, parameter = name.partition(".")
                weights[int(number)][parameter] = value.clone()
        self._turn = int(tensors["turn"])
        self._kept.clear()
        self._kept.extend(zip(tensors["versions"].tolist(), weights, strict=True))

    def _keep(self) -> None:
        published = self.searcher.drawing.published() if self.lag else {}
        weights = {name: tensor.detach().clone() for name, tensor in published.items()}
        self._kept.append((self.searcher.policy.version, weights))

    @contextmanager
    def _old_weights(self) -> Iterator[None]:
        """For a while, the searching policy is what it was."""
        if not self.lag:
            yield
            return
        policy, now = self.searcher.policy, self.searcher.policy.version
        live = self.searcher.drawing.published()
        before = {name: tensor.detach().clone() for name, tensor in live.items()}
        policy.version = self._kept[0][0]
        _copy(self._kept[0][1], live)
        try:
            yield
        finally:
            _copy(before, live)
            policy.version = now


@torch.no_grad()
def _copy(source: dict[str, Tensor], target: dict[str, Tensor]) -> None:
    for name, tensor in target.items():
        tensor.copy_(source[name])
