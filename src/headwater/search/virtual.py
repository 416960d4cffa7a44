"""Searchers in virtual time: any number of them, with weights of a chosen age, in the learner's own thread.

What asynchrony does to learning, without a clock: the same run every time, and one that is resumed goes on bit for bit.
"""

from __future__ import annotations

import time
from collections import Counter, deque
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
        self._stalenesses: list[int] = []
        self._trajectories, self._searching, self._began = 0, 0.0, time.monotonic()

    def collect(self, count: int, exploration: Exploration) -> Trajectories:
        began, now = time.monotonic(), self.searcher.policy.version
        with self._old_weights():
            self._stalenesses.append(now - self.searcher.policy.version)
            batches = [self.searcher.collect(count, exploration, self.generator) for _ in range(self.searchers)]
        together = Trajectories.concatenate([drawn.trajectories for drawn in batches])
        failures = sum((Counter(one.failures) for one in batches), Counter[str]())
        drawn, failed = sum(one.drawn for one in batches), sum(one.failed for one in batches)
        self._remember(Drawn(together, drawn, failed, failures))
        self._turn += 1
        self._trajectories += drawn
        self._searching += time.monotonic() - began
        return batches[self._turn % self.searchers].trajectories

    def publish(self) -> None:
        self._keep()

    def metrics(self) -> dict[str, float]:
        """Since the last call, as of other searchers: staleness in updates, rates by wall-clock time, and the shares of
        it in which learner and searchers wait for each other, which have one thread between them.
        """
        passed = max(time.monotonic() - self._began, 1e-9)
        figures = {
            "search/trajectories_per_second": self._trajectories / passed,
            "search/updates_per_second": len(self._stalenesses) / passed,
            "search/learner_idle": self._searching / passed,
            "search/worker_idle": 1 - self._searching / passed,
        }
        if self._stalenesses:
            figures |= {
                "search/staleness_mean": sum(self._stalenesses) / len(self._stalenesses),
                "search/staleness_max": float(max(self._stalenesses)),
            }
        self._stalenesses = []
        self._trajectories, self._searching, self._began = 0, 0.0, time.monotonic()
        return figures

    def state(self) -> dict[str, Tensor]:
        tensors = {f"{number}.{name}": value for number, (_, weights) in enumerate(self._kept)
                   for name, value in weights.items()}  # fmt: skip
        return tensors | {
            "turn": torch.tensor(self._turn),
            "versions": torch.tensor([version for version, _ in self._kept], dtype=torch.int64),
            "stalenesses": torch.tensor(self._stalenesses, dtype=torch.int64),
        }

    def load_state(self, tensors: dict[str, Tensor]) -> None:
        self._kept.clear()
        self._stalenesses = tensors["stalenesses"].tolist() if "stalenesses" in tensors else []
        if "versions" not in tensors:  # the run searched otherwise until now
            return
        weights: list[dict[str, Tensor]] = [{} for _ in tensors["versions"]]
        for name, value in tensors.items():
            if name not in ("turn", "versions", "stalenesses"):
                number, _, parameter = name.partition(".")
                weights[int(number)][parameter] = value.clone()
        self._turn = int(tensors["turn"])
        self._kept.extend(zip(tensors["versions"].tolist(), weights, strict=True))

    def _keep(self) -> None:
        if self.lag:
            weights = {name: tensor.detach().clone() for name, tensor in self.searcher.drawing.published().items()}
            self._kept.append((self.searcher.policy.version, weights))

    @contextmanager
    def _old_weights(self) -> Iterator[None]:
        """For a while, the searching policy is what it was."""
        if not self.lag:
            yield
            return
        if not self._kept:  # nothing is older than the weights of now
            self._keep()
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
