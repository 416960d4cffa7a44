"""The Search contract, as the training loop sees it: fresh trajectories come out, new weights go in."""

from __future__ import annotations

import math
from abc import abstractmethod
from collections import Counter
from dataclasses import dataclass
from typing import Literal

from torch import Tensor

from headwater.policies.base import Exploration
from headwater.replay import Replay
from headwater.search.searcher import Calls, Drawn, Searcher
from headwater.trajectories import Trajectories


class SearchError(RuntimeError):
    """The search cannot go on; the message says what stopped it."""


class Search:
    """Fills the replay, and gives the learner fresh trajectories.

    searcher: what is run. replay: where everything scored goes, or None. drawn, failed: trajectories so far, and those
    of them whose reward failed. failures: how often rewards failed, by kind, where they tell kinds.
    """

    def __init__(self, searcher: Searcher, replay: Replay | None) -> None:
        self.searcher, self.replay = searcher, replay
        self.drawn = self.failed = 0
        self.failures: Counter[str] = Counter()

    @abstractmethod
    def collect(self, count: int, exploration: Exploration) -> Trajectories:
        """Fresh scored trajectories for one iteration: `count` were drawn, those whose reward failed are left out."""

    def publish(self) -> None:
        """The searching policy has new weights and a new version."""

    def metrics(self) -> dict[str, float]:
        """How the search went since the last call, by name."""
        return {}

    @property
    def calls(self) -> Calls | None:
        """Objects that were asked for, by all searchers; None where the reward does not count them."""
        return self.searcher.calls

    def state(self) -> dict[str, Tensor]:
        """What was drawn but not handed out yet, and the books about it; empty where there is nothing to keep. It puts
        what has arrived into the replay and the counts first.
        """
        return {}

    def load_state(self, tensors: dict[str, Tensor]) -> None:
        """Become the search whose `state` this is. Raises ValueError if it is no such state."""

    def close(self) -> None:
        """Let go of everything; a later `collect` starts anew."""

    def _remember(self, drawn: Drawn) -> None:
        """Count what was drawn, and put what was scored into the replay: an infinite log-reward is not for it, but for
        the loss to refuse.
        """
        self.drawn += drawn.drawn
        self.failed += drawn.failed
        self.failures.update(drawn.failures)
        if self.replay is not None:
            self.replay.add(drawn.trajectories.select(drawn.trajectories.log_reward.isfinite()))


@dataclass(frozen=True)
class SearchSettings:
    """Who draws and scores trajectories."""

    runtime: Literal["inline", "virtual", "processes", "ray"] | None = None
    """Who searches: inline, in turn with learning; virtual, searchers in turn in one thread, with old weights and
    nothing left to the clock; processes of this machine; ray, actors of a cluster. Processes if not given and there
    are searchers."""
    searchers: int = 0
    """How many search side by side; 0 for inline search."""
    lag: int = 0
    """Updates by which the weights of virtual searchers are old."""
    staleness: int = 20
    """Updates by which the policy that drew a fresh batch may be behind; an older batch only goes to the replay."""
    timeout: float = 600.0
    """Seconds that a searcher may take over one batch before it is ended and another takes its place."""
    address: str = ""
    """Of an existing Ray cluster, such as auto or ray://head:10001; a local one is started if not given."""
    cpus: float = 1.0
    """Cores of a Ray searcher."""
    gpus: float = 0.0
    """GPUs of a Ray searcher."""
    resources: tuple[str, ...] = ()
    """Further resources of a Ray searcher, each as name=amount."""

    def __post_init__(self) -> None:
        for name in ("searchers", "lag", "staleness", "cpus", "gpus"):
            if not 0 <= getattr(self, name) < math.inf:
                raise ValueError(f"{name} = {getattr(self, name)}: must not be negative")
        if self.runtime in ("virtual", "processes", "ray") and not self.searchers:
            raise ValueError(f"searchers = 0: runtime = {self.runtime!r} needs at least 1")
        if self.runtime == "inline" and self.searchers:
            raise ValueError(f"searchers = {self.searchers}: inline search has none; runtime virtual, processes or ray")
        if self.lag and self.runtime != "virtual":
            raise ValueError(f"lag = {self.lag}: only for runtime = 'virtual'; elsewhere the clock decides")
        if self.staleness < self.searchers - 1 and self.runtime != "virtual":
            raise ValueError(
                f"staleness = {self.staleness}: {self.searchers} searchers work side by side only if it is at least "
                f"{self.searchers - 1}"
            )
        if not self.timeout > 0:
            raise ValueError(f"timeout = {self.timeout}: must be above 0 seconds")
        if (self.address or self.gpus or self.resources) and self.runtime != "ray":
            raise ValueError("address, gpus, resources: only for runtime = 'ray'")
        _ = self.custom_resources

    @property
    def custom_resources(self) -> dict[str, float]:
        """Ray's custom resources by name. Raises ValueError for one that is not name=amount."""
        found = {}
        for text in self.resources:
            name, _, amount = text.partition("=")
            try:
                found[name] = float(amount)
            except ValueError:
                found[name] = math.nan
            if not name or not 0 < found[name] < math.inf:
                raise ValueError(f"resources: {text!r} must be name=amount, such as accelerator=1")
        return found
