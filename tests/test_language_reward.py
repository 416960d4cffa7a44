"""Rewards of completions: what is right, and that no failure of a judge is ever a reward of zero."""

from __future__ import annotations

import asyncio
import logging
import math
import subprocess
import sys
import threading
import time
from collections.abc import Iterator, Sequence
from pathlib import Path

import pytest
import torch
from torch import Tensor

from headwater.language.data import Completion, Prompt
from headwater.language.failures import Fatal, InvalidSample, TryAgain
from headwater.language.reward import MathReward, build_reward, chosen_completions, win_rate
from headwater.language.verifier import VerifierReward
from headwater.reward import RewardError
from headwater.reward_worker import Worker


def prompts(*answers: str | None) -> list[Prompt]:
    return [Prompt(f"prompt {i}", answer, {"prompt": f"prompt {i}"}) for i, answer in enumerate(answers)]


def row(*indices: int) -> Tensor:
    return torch.tensor(indices, dtype=torch.float32)[:, None]


def completions(*texts: str) -> list[Completion]:
    return [Completion(text) for text in texts]


NAN = pytest.approx(math.nan, nan_ok=True)

# Mathematics


@pytest.fixture(scope="module")
def judge() -> Iterator[MathReward]:
    reward = MathReward(prompts("1,200", "\\frac{1}{2}", "x^2 + 1", "\\left[0, 1\\right)"), timeout=60)
    yield reward
    reward.close()


@pytest.mark.parametrize(
    ("prompt", "text", "reward"),
    [
        (0, "20*60=1200\n#### 1200", 1),
        (0, "#### $1,200.00.", 1),
        (0, "#### 1200 apples", 1),
        (0, "#### 120", 0),
        (0, "so it is 1200, or 1300", 0),
        (0, "1300, no, 1200", 1),
        (0, "#### 7\nnot 1200", 0),
        (0, "I do not know", 0),
        (0, "", 0),
        (1, "\\boxed{0.5}", 1),
        (1, "\\boxed{\\dfrac{2}{4}}", 1),
        (1, "it is 1/2", 1),
        (1, "\\boxed{\\frac{1}{3}}", 0),
        (2, "\\boxed{1+x^2}", 1),
        (2, "\\boxed{1+y^2}", 0),
        (2, "\\boxed{\\frac{}{x}} \\boxed{}}", 0),
        (3, "\\boxed{[0,1)}", 1),
        (3, "\\boxed{[0,1]}", 0),
    ],
)
def test_an_answer_is_right_if_it_equals_the_reference(judge: MathReward, prompt: int, text: str, reward: int) -> None:
    assert judge(completions(text), row(prompt)).tolist() == [reward]
    assert judge.failures == {}


def test_rewards_follow_the_rows_and_numbers_need_no_process() -> None:
    reward = MathReward(prompts("1", "2"))
    found = reward(completions("2", "2", "1", "#### 1"), row(0, 1, 0, 1))
    assert found.dtype == torch.float32
    assert found.tolist() == [0, 1, 1, 0]
    assert reward._worker is None


def test_the_right_format_may_be_worth_something_to_a_completion_that_ended_itself() -> None:
    reward = MathReward(prompts("1"), format_reward=0.1)
    cut = Completion("#### 2", finished=False)
    found = reward([*completions("#### 1", "#### 2", "\\boxed{2}", "2"), cut], row(0, 0, 0, 0, 0))
    assert found.tolist() == pytest.approx([1, 0.1, 0.1, 0, 0])


def test_a_comparison_that_never_ends_is_no_zero_and_costs_the_others_nothing() -> None:
    reward = MathReward(prompts("2"), timeout=2)
    began = time.monotonic()
    found = reward(completions("\\boxed{6/3}", "\\boxed{9^{9^{9}}}", "\\boxed{2y}"), row(0, 0, 0))
    assert found.tolist() == [1, NAN, 0]
    assert reward.failures == {"timeout": 1}
    assert time.monotonic() - began < 30
    reward.close()


@pytest.mark.parametrize(
    ("body", "kind"), [("time.sleep(60)", "timeout"), ("os._exit(3)", "crash"), ("raise MemoryError", "crash")]
)
def test_a_comparing_process_that_hangs_dies_or_has_no_memory_gives_nan(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, body: str, kind: str
) -> None:
    (tmp_path / "broken_equality.py").write_text(
        "import os, time\n"
        "def equal(pairs):\n"
        "    if ('a', 'b') in pairs:\n"
        f"        {body}\n"
        "    return [0.0] * len(pairs)\n"
    )
    monkeypatch.chdir(tmp_path)
    reward = MathReward(prompts("a"), timeout=1)
    reward._worker = Worker("broken_equality:equal", 1.0)
    found = reward(completions("\\boxed{c}", "\\boxed{b}", "\\boxed{a}", "none"), row(0, 0, 0, 0))
    assert found.tolist() == [0, NAN, 1, 0]
    assert reward.failures == {kind: 1}
    reward.close()


def test_a_reference_that_is_no_mathematics_makes_no_answer_wrong(caplog: pytest.LogCaptureFixture) -> None:
    asked = [
        Prompt(f"prompt {i}", answer, {}, f"prompts.jsonl, line {i + 1}")
        for i, answer in enumerate(["6:00 p.m.", "\\frac{", "}{", "unused", "1/0", "\\frac{1}{2}"])
    ]
    reward = MathReward(asked, timeout=60)
    answers = ["6:00 p.m.", "5:00 p.m.", "18", "3", "\\frac{1}{2}", "}{", "5", "}{"]
    with caplog.at_level(logging.WARNING):
        found = reward(completions(*(f"#### {one}" for one in answers)), row(0, 0, 0, 1, 2, 2, 4, 5))
    assert found.tolist() == [1, NAN, NAN, NAN, NAN, 1, NAN, 0]
    assert reward.failures == {"reference": 4, "crash": 1}
    told = [record.getMessage() for record in caplog.records]
    assert len(told) == 4  # of each reference once
    assert all(any(f"prompts.jsonl, line {line}, " in message for message in told) for line in (1, 2, 3, 5))
    reward.close()


def test_an_error_of_what_compares_is_none_of_the_answers(monkeypatch: pytest.MonkeyPatch) -> None:
    from headwater.language import equality

    def fails(one: object, other: object, **how: object) -> bool:
        if isinstance(other, str):
            return one == other
        raise TypeError("cannot determine truth value")

    monkeypatch.setattr(equality, "verify", fails)
    with pytest.raises(TypeError, match="truth value"):
        equality._equal("x^2", "2x")
    assert equality._equal("x^2", "x^2")  # as text


def test_a_comparison_works_off_the_main_thread(judge: MathReward) -> None:
    found: list[list[float]] = []
    thread = threading.Thread(target=lambda: found.append(judge(completions("\\boxed{x*x+1}"), row(2)).tolist()))
    thread.start()
    thread.join(60)
    assert found == [[1]]


def test_mathematics_needs_reference_answers_and_rows_that_name_prompts() -> None:
    with pytest.raises(RewardError, match=r"prompt 1 .* has no answer"):
        MathReward(prompts("1", None))
    reward = MathReward(prompts("1"))
    with pytest.raises(RewardError, match="names prompt 1; there are prompts 0 to 0"):
        reward(completions("1"), row(1))
    with pytest.raises(RewardError, match="1 completions come with 2 conditions"):
        reward(completions("1"), row(0, 0))


# Verifiers


def test_a_verifier_sees_the_fields_of_its_prompt_and_the_completion() -> None:
    def score(fields: dict[str, str], completion: str) -> float:
        return float(fields["prompt"] == "prompt 1") + len(completion) / 8

    found = VerifierReward(score, prompts(None, None))(completions("a", "bb", ""), row(0, 1, 1))
    assert found.tolist() == [0.125, 1.25, 1]
    assert found.dtype == torch.float32


@pytest.mark.parametrize("is_async", [False, True])
def test_calls_run_at_once_up_to_the_limit(is_async: bool) -> None:
    lock, now, most = threading.Lock(), 0, 0

    def enter(step: int) -> None:
        nonlocal now, most
        with lock:
            now += step
            most = max(most, now)

    def waits(fields: dict[str, str], completion: str) -> float:
        enter(1)
        time.sleep(0.1)
        enter(-1)
        return 1.0

    async def waits_async(fields: dict[str, str], completion: str) -> float:
        enter(1)
        await asyncio.sleep(0.1)
        enter(-1)
        return 1.0

    reward = VerifierReward(waits_async if is_async else waits, prompts(None), concurrency=4)
    began = time.monotonic()
    assert reward(completions(*"abcdefgh"), row(*[0] * 8)).tolist() == [1] * 8
    assert most == 4
    assert 0.2 <= time.monotonic() - began < 0.7


@pytest.mark.parametrize("is_async", [False, True])
def test_a_call_that_hangs_is_left_behind_and_counted(is_async: bool) -> None:
    def hangs(fields: dict[str, str], completion: str) -> float:
        if completion == "h":
            time.sleep(20)
        return 1.0

    async def hangs_async(fields: dict[str, str], completion: str) -> float:
        if completion == "h":
            await asyncio.sleep(20)
        return 1.0

    reward = VerifierReward(hangs_async if is_async else hangs, prompts(None), concurrency=1, timeout=0.3)
    began = time.monotonic()
    assert reward(completions("a", "h", "b"), row(0, 0, 0)).tolist() == [1, NAN, 1]
    assert time.monotonic() - began < 3
    assert reward.failures == {"timeout": 1}


def test_an_async_call_that_is_late_is_ended() -> None:
    before = threading.active_count()

    async def hangs(fields: dict[str, str], completion: str) -> float:
        await asyncio.sleep(60)
        return 1.0

    VerifierReward(hangs, prompts(None), timeout=0.2)(completions("a"), row(0))
    end = time.monotonic() + 5
    while threading.active_count() > before and time.monotonic() < end:
        time.sleep(0.02)
    assert threading.active_count() == before


def test_a_hung_call_does_not_keep_the_interpreter_from_ending() -> None:
    code = (
        "import time, torch\n"
        "from headwater.language.data import Completion, Prompt\n"
        "from headwater.language.verifier import VerifierReward\n"
        "reward = VerifierReward(lambda fields, text: time.sleep(600), [Prompt('a', None, {})], timeout=0.2)\n"
        "print(reward([Completion('b')], torch.zeros(1, 1)).tolist(), reward.failures)\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60, check=True)
    assert done.stdout.strip() == "[nan] {'timeout': 1}"


def test_what_may_succeed_later_is_tried_again_with_growing_pauses() -> None:
    calls: list[float] = []

    def busy(fields: dict[str, str], completion: str) -> float:
        if completion == "busy":
            calls.append(time.monotonic())
            if len(calls) < 3:
                raise TryAgain("busy")
        return 2.0

    reward = VerifierReward(busy, prompts(None), concurrency=1, attempts=3, back_off=0.1)
    assert reward(completions("busy", "a"), row(0, 0)).tolist() == [2, 2]
    first, second, third = calls
    assert second - first >= 0.1
    assert third - second >= 0.2
    assert reward.failures == {}


def test_what_never_succeeds_is_left_out_after_the_last_attempt() -> None:
    calls = 0

    def busy(fields: dict[str, str], completion: str) -> float:
        nonlocal calls
        if completion == "a":
            return 1.0
        calls += 1
        raise TryAgain("busy")

    reward = VerifierReward(busy, prompts(None), attempts=3, back_off=0.01)
    assert reward(completions("a", "b"), row(0, 0)).tolist() == [1, NAN]
    assert calls == 3
    assert reward.failures == {"try again": 1}


class _Weird:
    def __float__(self) -> float:
        return math.nan


def test_invalid_samples_exceptions_and_poisoned_values_are_nan_each_counted_as_what_it_is(
    caplog: pytest.LogCaptureFixture,
) -> None:
    def breaks(fields: dict[str, str], completion: str) -> object:
        match completion:
            case "invalid":
                raise InvalidSample("no code in it")
            case "exception":
                raise KeyError("k")
            case "exit":
                sys.exit(1)
            case "nan":
                return math.nan
            case "infinite":
                return torch.tensor(torch.inf)
            case "large":
                return 1e300  # infinite in float32
            case "none":
                return None
            case "weird":
                return _Weird()
        return 0

    reward = VerifierReward(breaks, prompts(None))
    kinds = ("invalid", "exception", "exit", "nan", "infinite", "large", "none", "weird")
    with caplog.at_level(logging.WARNING):
        found = reward(completions("fine", *kinds), row(*[0] * 9))
    assert found.tolist() == [0, *[NAN] * 8]
    assert reward.failures == {"invalid": 1, "exception": 2, "no number": 5}
    assert "no code in it" in caplog.text


def test_a_fatal_error_ends_the_run_and_names_prompt_and_completion() -> None:
    def gives_up(fields: dict[str, str], completion: str) -> float:
        if completion == "b":
            raise Fatal("wrong key")
        return 1.0

    reward = VerifierReward(gives_up, prompts(None, None))
    with pytest.raises(RewardError, match="the completion 'b' to the prompt 'prompt 1': wrong key"):
        reward(completions("a", "b"), row(0, 1))


def test_failing_on_everything_ends_the_run_and_failing_on_most_does_not() -> None:
    works = False

    def fails(fields: dict[str, str], completion: str) -> float:
        if works and completion == "0":
            return 1.0
        raise OSError("no sandbox")

    reward = VerifierReward(fails, prompts(None))
    batch, rows = completions(*map(str, range(12))), row(*[0] * 12)
    reward(batch, rows)
    reward(batch, rows)
    works = True
    reward(batch, rows)
    works = False
    reward(batch, rows)
    reward(batch, rows)
    with pytest.raises(RewardError, match=r"each of the last 36 completions, in 3 batches.*no sandbox"):
        reward(batch, rows)


def test_a_batch_verifier_gets_lists_and_a_batch_that_fails_is_judged_one_by_one() -> None:
    sizes: list[int] = []

    def lengths(fields: list[dict[str, str]], texts: list[str]) -> list[float]:
        sizes.append(len(texts))
        assert [each["prompt"] for each in fields] == ["prompt 0"] * len(texts)
        if "x" in texts:
            raise ValueError("no x")
        return [float(len(text)) for text in texts]

    reward = VerifierReward(lengths, prompts(None), batch=3, concurrency=1)
    found = reward(completions("a", "bb", "x", "dddd"), row(0, 0, 0, 0))
    assert found.tolist() == [1, 2, NAN, 4]
    assert sizes == [3, 1, 1, 1, 1]
    assert reward.failures == {"exception": 1}
    with pytest.raises(RewardError, match="returned 1 rewards for 2 completions"):
        VerifierReward(lambda fields, texts: [1.0], prompts(None), batch=2)(completions("a", "b"), row(0, 0))


def test_settings_that_make_no_sense_are_refused() -> None:
    for settings in ({"concurrency": 0}, {"timeout": 0.0}, {"attempts": 0}, {"back_off": -1.0}, {"batch": 0}):
        with pytest.raises(ValueError, match=next(iter(settings))):
            VerifierReward(lambda fields, text: 1.0, prompts(None), **settings)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="format_reward is 1"):
        MathReward(prompts("1"), format_reward=1)


def test_a_reward_is_found_by_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "my_verifier.py").write_text("def score(fields, completion):\n    return len(completion)\n")
    monkeypatch.chdir(tmp_path)
    assert isinstance(build_reward("math", prompts("1")), MathReward)
    assert build_reward("my_verifier:score", prompts(None))(completions("abc"), row(0)).tolist() == [3]
    with pytest.raises(RewardError, match="verifier 'my_verifier:none': module my_verifier has no function none"):
        build_reward("my_verifier:none", prompts(None))
    with pytest.raises(ValueError, match="reward is 'maths', must be math, preference"):
        build_reward("maths", prompts("1"))
    with pytest.raises(RewardError, match="needs reward_model"):
        build_reward("preference", prompts(None))


def test_the_win_rate_counts_ties_half_and_leaves_failures_out() -> None:
    def length(objects: Sequence[Completion], condition: Tensor) -> Tensor:
        return torch.tensor([math.nan if one == "x" else float(len(one)) for one in objects])

    asked = [
        Prompt("a", None, {"chosen": "bb"}), Prompt("b", "ccc", {"answer": "ccc", "rejected": "r"})
    ]  # fmt: skip
    rows = row(0, 0, 0, 1, 1)
    baseline = chosen_completions(asked, rows)
    assert baseline == ["bb", "bb", "bb", "ccc", "ccc"]
    assert win_rate(length, completions("b", "bb", "bbb", "cccc", "x"), rows, baseline) == 2.5 / 4  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="has no chosen completion"):
        chosen_completions([Prompt("a", None, {"prompt": "a"})], row(0))
