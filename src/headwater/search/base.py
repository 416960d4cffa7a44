"""The Search contract, as the training loop sees it: fresh trajectories come out, new weights go in."""

from __future__ import annotations

from abc import abstractmethod
from dataclasses import dataclass

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
    of them whose reward failed.
    """

    def __init__(self, searcher: Searcher, replay: Replay | None) -> None:
        self.searcher, self.replay = searcher, replay
        self.drawn = self.failed = 0

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
        if self.replay is not None:
            self.replay.add(drawn.trajectories.select(drawn.trajectories.log_reward.isfinite()))


@dataclass(frozen=True)
class SearchSettings:
    """Who draws and scores trajectories."""

    processes: int = 0
    """Processes that draw and score while the learner learns; 0 does it in turn with learning, in one process."""
    staleness: int = 20
    """Updates by which the policy that drew a fresh batch may be behind; an older batch only goes to the replay."""
    timeout: float = 600.0
    """Seconds that a process may take over one batch before it is ended and another takes its place."""

    def __post_init__(self) -> None:
        if self.processes < 0:
            raise ValueError(f"processes = {self.processes}: must not be negative")
        if self.staleness < max(self.processes - 1, 0):
            raise ValueError(
                f"staleness = {self.staleness}: {self.processes} processes work side by side only if it is at least "
                f"{self.processes - 1}"
            )
        if not self.timeout > 0:
            raise ValueError(f"timeout = {self.timeout}: must be above 0 seconds")
