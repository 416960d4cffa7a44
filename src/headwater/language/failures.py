"""What may go wrong when a completion is judged, and how it is counted. None of it is ever a reward of zero: a policy
that learns from outages of its verifier unlearns what is right.
"""

from __future__ import annotations

import logging
from collections.abc import Sequence
from typing import cast

from torch import Tensor

from headwater.environments.base import Objects
from headwater.language.data import Completion, Prompt
from headwater.reward_worker import RewardError

_log = logging.getLogger(__name__)

# As for any reward function: what fails on every completion of so many batches in a row, so many together, is broken.
_HOPELESS_BATCHES = 3
_HOPELESS_COMPLETIONS = 30
_MOST_REPORTS = 100


class TryAgain(Exception):
    """A verifier raises it when the same call may succeed later: a busy server, a lost connection."""


class InvalidSample(Exception):
    """A verifier raises it when it cannot judge this completion: it is left out and counted."""


class Fatal(Exception):
    """A verifier raises it when going on makes no sense: wrong credentials, no disk."""


class FailureCount:
    """How often judging failed, by kind, and when enough is enough."""

    def __init__(self) -> None:
        self.counts: dict[str, int] = {}
        self._reported: set[str] = set()
        self._last = ""
        self._batches = 0
        self._completions = 0

    def add(self, kind: str, message: str, prompt: Prompt, completion: Completion) -> None:
        """One completion could not be judged. Each message is logged once."""
        self.counts[kind] = self.counts.get(kind, 0) + 1
        self._last = message
        if message not in self._reported and len(self._reported) < _MOST_REPORTS:
            self._reported.add(message)
            place = f"{prompt.place}, " if prompt.place else ""
            _log.warning(
                "no reward of %s to %s%s: %s (%s); it is left out, like others that fail so",
                shortened(completion), place, shortened(prompt.text), message, kind,
            )  # fmt: skip

    def end_batch(self, completions: int, failed: int) -> None:
        """Raises RewardError once batch after batch has failed on every completion."""
        if failed < completions:
            self._batches = self._completions = 0
        elif failed:
            self._batches += 1
            self._completions += failed
            if self._batches >= _HOPELESS_BATCHES and self._completions >= _HOPELESS_COMPLETIONS:
                raise RewardError(
                    f"the reward failed on each of the last {self._completions} completions, in {self._batches} "
                    f"batches; the last time: {self._last}"
                )


class Judge:
    """What rewards of completions have in common: the prompts that condition rows are indices of, and a count of
    failures.
    """

    def __init__(self, prompts: Sequence[Prompt]) -> None:
        self._prompts, self._count = prompts, FailureCount()

    @property
    def failures(self) -> dict[str, int]:
        """Completions that could not be judged, by kind."""
        return dict(self._count.counts)

    def _asked(self, objects: Objects, condition: Tensor) -> tuple[list[Completion], list[Prompt]]:
        completions = cast("list[Completion]", list(objects))
        return completions, prompts_of(self._prompts, condition[:, 0].tolist(), len(completions))


def prompts_of(prompts: Sequence[Prompt], rows: Sequence[float], completions: int) -> list[Prompt]:
    """The prompts that condition rows name. Raises RewardError for rows that are no index, or too few of them."""
    if len(rows) != completions:
        raise RewardError(f"{completions} completions come with {len(rows)} conditions; one for each is needed")
    for row in rows:
        if not (row == int(row) and 0 <= row < len(prompts)):
            raise RewardError(f"a condition names prompt {row:g}; there are prompts 0 to {len(prompts) - 1}")
    return [prompts[int(row)] for row in rows]


def shortened(text: str) -> str:
    """At most 200 characters of it, quoted."""
    shown = repr(str(text))
    return shown if len(shown) <= 200 else f"{shown[:200]}..."
