"""Rewards of completions: the right answer to a mathematical question, and, by name, all others of this domain. A
language reward gives the raw reward r of each completion, not a logarithm; its condition rows are indices of prompts.
"""

from __future__ import annotations

import importlib.util
import math
from collections.abc import Sequence

import torch
from torch import Tensor

from headwater.environments.base import Objects
from headwater.language.answers import LONGEST_ANSWER, last_number, marked, plain_number
from headwater.language.data import Completion, Prompt
from headwater.language.failures import Judge, prompts_of, shortened
from headwater.language.verifier import VerifierReward
from headwater.reward import Reward
from headwater.reward_worker import Failure, RewardError, Worker

_REMEMBERED = 100_000
_KINDS = {"no answer within": "timeout", "UnreadableReference": "reference"}  # by how the worker's message begins


def build_reward(
    name: str,
    prompts: Sequence[Prompt],
    reward_model: str = "",
    timeout: float = 10.0,
    concurrency: int = 8,
    label: str | None = None,
) -> Reward:
    """The reward called `name`: math, preference (of `reward_model`, and of its `label` if it has several), or a
    verifier as "module:function". Raises ValueError for another name, RewardError for one that cannot be used.
    """
    if name == "math":
        return MathReward(prompts, timeout)
    if name == "preference":
        from headwater.language.preference import PreferenceReward

        return PreferenceReward(prompts, reward_model, label)
    if ":" in name:
        return VerifierReward(name, prompts, concurrency, timeout)
    raise ValueError(f"reward is {name!r}, must be math, preference, or a function of yours as module:function")


class MathReward(Judge):
    """1 where a completion's answer equals the reference, `format_reward` where it does not but the completion has
    ended by itself with an answer where the formats say, otherwise 0.

    The answer is what follows the last ####, or is in the last \\boxed{...}, or is the last number. Numbers in digits
    are compared exactly; anything else by math-verify, in a process that is killed after `timeout` seconds. No answer
    is reward 0. A comparison that came to nothing is NaN, for it says nothing about the completion, and counted in
    `failures`: "timeout"; "reference", where the reference is no mathematics and the answer is not the same text;
    "crash", where math-verify raised or its process ended.

    Raises RewardError if a prompt has no reference answer, or if math-verify is missing.
    """

    def __init__(self, prompts: Sequence[Prompt], timeout: float = 10.0, format_reward: float = 0.0) -> None:
        if not 0 < timeout < math.inf:
            raise ValueError(f"timeout is {timeout!r}, must be above 0 seconds")
        if not 0 <= format_reward < 1:
            raise ValueError(f"format_reward is {format_reward!r}, must be at least 0 and below 1")
        for number, prompt in enumerate(prompts):
            if not prompt.answer or not prompt.answer.strip():
                place = prompt.place or f"prompt {number}"
                raise RewardError(f"{place} ({shortened(prompt.text)}) has no answer, which math needs")
        if importlib.util.find_spec("math_verify") is None:
            raise RewardError("the reward math needs math-verify: pip install 'headwater[language]'")
        self.timeout, self.format_reward = timeout, format_reward
        super().__init__(prompts)
        self._known: dict[tuple[str, str], float] = {}
        self._worker: Worker | None = None

    def __call__(self, objects: Objects, condition: Tensor) -> Tensor:
        completions, prompts = self._asked(objects, condition)
        marks = [marked(one) for one in completions]
        answers = [mark or last_number(one) for mark, one in zip(marks, completions, strict=True)]
        pairs = [(str(prompt.answer), answer or "") for prompt, answer in zip(prompts, answers, strict=True)]
        why = self._compare({pair for pair in pairs if pair[1]})
        rewards = []
        for pair, mark, prompt, completion in zip(pairs, marks, prompts, completions, strict=True):
            if pair in why:
                self._count.add(*why[pair], prompt, completion)
                rewards.append(math.nan)
            elif pair[1] and self._known[pair]:
                rewards.append(1.0)
            else:
                rewards.append(self.format_reward if mark and completion.finished else 0.0)
        self._count.end_batch(len(rewards), sum(map(math.isnan, rewards)))
        return torch.tensor(rewards, dtype=torch.float32, device=condition.device)

    def close(self) -> None:
        """End the process that compares; a later call starts another."""
        if self._worker is not None:
            self._worker.close()
            self._worker = None

    def _compare(self, pairs: set[tuple[str, str]]) -> dict[tuple[str, str], tuple[str, str]]:
        """Know of each pair whether its texts are equal; those of which that failed, with kind and message."""
        if len(self._known) > _REMEMBERED:
            self._known.clear()
        hard = []
        for pair in pairs - self._known.keys():
            equal = _equal_at_sight(*pair)
            if equal is None:
                hard.append(pair)
            else:
                self._known[pair] = float(equal)
        return {pair: why for pair in sorted(hard) if (why := self._ask(pair))}

    def _ask(self, pair: tuple[str, str]) -> tuple[str, str] | None:
        """Have one pair compared, so that the time limit is of it alone; kind and message if that failed."""
        if self._worker is None:
            self._worker = Worker("headwater.language.equality:equal", self.timeout)
        try:
            (self._known[pair],) = self._worker.call([pair])
        except Failure as failure:
            kind = next((kind for said, kind in _KINDS.items() if str(failure).startswith(said)), "crash")
            compared = f"the answer {shortened(pair[0])}"
            if kind != "reference":
                compared += f" compared with {shortened(pair[1])}"
            return kind, f"{compared}: {failure}"
        return None


def win_rate(reward: Reward, objects: Sequence[Completion], condition: Tensor, baseline: Sequence[Completion]) -> float:
    """Share of completions that score above the baseline completion of the same place, ties half; pairs of which either
    could not be scored are left out, and without any other it is NaN.

    condition: `[T, 1]`, indices of prompts. baseline: T completions to beat, as `chosen_completions` gives them.
    """
    ours, theirs = reward(objects, condition), reward(baseline, condition)
    judged = ~(ours.isnan() | theirs.isnan())
    wins = (ours > theirs).double() + 0.5 * (ours == theirs).double()
    return wins[judged].mean().item()


def chosen_completions(prompts: Sequence[Prompt], condition: Tensor) -> list[Completion]:
    """The reference completion of each condition row's prompt: what its line has chosen, or else its answer.

    Raises ValueError for a prompt with neither.
    """
    found = []
    for prompt in prompts_of(prompts, condition[:, 0].tolist(), len(condition)):
        text = prompt.fields.get("chosen", prompt.fields.get("answer", prompt.fields.get("solution")))
        if text is None:
            raise ValueError(
                f"the prompt {shortened(prompt.text)} has no chosen completion; it has {', '.join(prompt.fields)}"
            )
        found.append(Completion(text))
    return found


def _equal_at_sight(wanted: str, given: str) -> bool | None:
    """Whether two answers are equal, if that takes no algebra to say; otherwise None."""
    if wanted.strip() == given.strip():
        return True
    if len(given) > LONGEST_ANSWER:
        return False
    numbers = plain_number(wanted), plain_number(given)
    return None if None in numbers else numbers[0] == numbers[1]
