"""Searchers of a language model that crash, hang or are killed, and verifiers that fail in them: the run goes on,
counts say what happened, and no failure is learned from as a zero.
"""

from __future__ import annotations

import contextlib
import ctypes
import faulthandler
import json
import math
import os
import signal
import time
from collections.abc import Callable
from pathlib import Path
from typing import Literal

import pytest
import torch

from headwater.cli import main
from headwater.conditions import ConditionTable
from headwater.language.data import Completion, Prompt
from headwater.language.failures import TryAgain
from headwater.language.generation import Sampling
from headwater.language.loading import load_model, load_tokenizer
from headwater.language.policy import LanguagePolicy
from headwater.language.verifier import VerifierReward
from headwater.objectives import Objective
from headwater.policies.base import LogProbs
from headwater.replay import ReplaySettings
from headwater.search import SearchSettings
from headwater.search.asynchronous import AsynchronousSearch, Delivery
from headwater.training import ExplorationSettings, Sharpness, Trainer, Training
from headwater.trajectories import Trajectories
from palindromes import make_palindrome_model, prompts

VALUE = 0.25
"""The reward of every completion that could be judged: anything else in a batch can only be a failure."""
BETA, BATCH = 0.1, 12


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("model")
    make_palindrome_model(folder)
    return folder


class Watched(Trainer):
    """Keeps what it has learned from."""

    def _step(self, batch: Trajectories, beta: float, progress: float) -> tuple[float, LogProbs, float]:
        self.__dict__.setdefault("learned", []).append(batch)
        return super()._step(batch, beta, progress)

    @property
    def batches(self) -> list[Trajectories]:
        learned: list[Trajectories] = self.__dict__.get("learned", [])
        return learned


def new_trainer(
    model: Path,
    judge: Callable[[dict[str, str], Completion], object],
    searchers: int = 0,
    patience: float = 120.0,
    replayed: bool = True,
    runtime: Literal["virtual", "processes", "ray"] | None = None,
) -> Watched:
    """With a tenth of a second for a verdict. patience: seconds that a searcher may take over a batch."""
    torch.manual_seed(0)
    tokenizer, texts = load_tokenizer(str(model)), prompts()
    policy = LanguagePolicy(
        load_model(str(model), torch.device("cpu")), tokenizer, tokenizer(texts)["input_ids"], Sampling(1.0, 8)
    )
    asked = [Prompt(text, str(number), {"answer": str(number)}) for number, text in enumerate(texts)]
    reward = VerifierReward(judge, asked, timeout=0.1, back_off=0.01)
    count = BATCH if replayed else 0
    return Watched(
        policy, reward, ConditionTable(torch.arange(float(len(texts)))[:, None]), Objective("vargrad"),
        Training(iterations=9999, batch_size=BATCH, group_size=4, replayed=count, only_replayed=replayed, log_every=1),
        ExplorationSettings(epsilon=0.0), ReplaySettings(1000, per_condition=4), 0,
        search=SearchSettings(runtime, searchers, timeout=patience), sharpness=Sharpness(BETA),
    )  # fmt: skip


def assert_only_verdicts(trainer: Watched) -> None:
    """Whatever was learned from, or is remembered, has a reward that the verifier gave."""
    assert trainer.batches
    for batch in trainer.batches:
        torch.testing.assert_close(batch.log_reward, torch.full((len(batch),), VALUE / BETA))
    if trainer.replay is not None:
        assert set(trainer.replay.state()["log_reward"].tolist()) == {VALUE}


def end(how: str) -> None:
    """Let this process come to an end."""
    if how == "killed":
        os.kill(os.getpid(), signal.SIGKILL)
    if how == "exits":
        os._exit(3)
    if how == "crashes":
        faulthandler.disable()  # pytest's, which would tell of it at length
        ctypes.string_at(0)
    os.kill(os.getpid(), signal.SIGSTOP)  # hangs, with all its threads


@pytest.mark.parametrize("how", ["killed", "exits", "crashes", "hangs"])
def test_a_searcher_that_ends_in_the_middle_is_replaced_and_nothing_is_learned_from_twice(
    model: Path, tmp_path: Path, how: str, caplog: pytest.LogCaptureFixture
) -> None:
    marker, learner = tmp_path / "ended", os.getpid()

    def judge(prompt: dict[str, str], completion: Completion) -> float:
        if os.getpid() != learner and completion.startswith("1"):
            with contextlib.suppress(FileExistsError):  # one of both searchers, once
                marker.touch(exist_ok=False)
                end(how)
        return VALUE

    trainer = new_trainer(model, judge, searchers=2, patience=3.0 if how == "hangs" else 120.0, replayed=False)
    search = trainer.search
    assert isinstance(search, AsynchronousSearch)
    delivered: list[Delivery] = []

    def watched(delivery: Delivery) -> None:
        delivered.append(delivery)
        apply(delivery)

    apply, search._apply = search._apply, watched  # type: ignore[method-assign]
    deadline = time.monotonic() + 60
    try:
        while (trainer.iteration < 8 or not search.restarts) and time.monotonic() < deadline:
            trainer.update()
    finally:
        search.close()
    assert marker.exists()
    assert search.restarts == 1
    said = {"killed": "SIGKILL", "exits": "status 3", "crashes": "SIGSEGV", "hangs": "search.timeout"}[how]
    assert said in caplog.text
    assert search.failed == 0
    drawn = {(one.searcher, one.sequence): tuple(one.drawn.trajectories.identity.tolist()) for one in delivered}
    assert len(drawn) == len(set(drawn.values())) == len(delivered)
    assert search.drawn == BATCH * len(delivered)
    learned = [tuple(batch.identity.tolist()) for batch in trainer.batches]
    assert len(set(learned)) == len(learned) == trainer.iteration
    assert set(learned) <= set(drawn.values())
    assert_only_verdicts(trainer)


@pytest.mark.parametrize("runtime", ["processes", "virtual", "ray"])
def test_what_fails_in_searchers_is_counted_by_kind_here_and_after_a_resume(
    model: Path, runtime: Literal["virtual", "processes", "ray"]
) -> None:
    def judge(prompt: dict[str, str], completion: Completion) -> object:
        match sum(map(ord, completion)) % 10:
            case 0:
                raise ValueError("broken")
            case 1:
                raise TryAgain("busy")
            case 2:
                return math.inf
            case 3:
                return "very good"
            case 4:
                time.sleep(3600)
        return VALUE

    trainer = new_trainer(model, judge, searchers=2, runtime=runtime)
    kinds = {"exception", "try again", "no number", "timeout"}
    deadline = time.monotonic() + 60
    try:
        while not (trainer.search.failures.keys() >= kinds and trainer.iteration >= 4) and time.monotonic() < deadline:
            trainer.update()
        checkpoint = trainer.checkpoint()
    finally:
        trainer.search.close()
    metrics = {name: value for name, value in trainer._bookkeeping().items() if name.startswith("reward_failures/")}
    assert metrics == {f"reward_failures/{kind}": count for kind, count in trainer.search.failures.items()}
    assert trainer.search.failures.keys() == kinds
    assert trainer.search.failed == trainer.search.failures.total()
    assert_only_verdicts(trainer)
    again = new_trainer(model, judge, searchers=2, runtime=runtime)
    again.restore(checkpoint)
    assert dict(again.search.failures) == checkpoint.state["failures"]


@torch.no_grad()
def prefer_to_say_nothing(policy: LanguagePolicy) -> None:
    """Make the end as likely after a prompt as what is likeliest there now."""
    said = policy.model(torch.stack(policy.prompts), output_hidden_states=True)
    state, logits = said.hidden_states[-1][:, -1].mean(0), said.logits[:, -1].mean(0)
    end = policy.tokenizer.eos_token_id
    policy.model.get_output_embeddings().weight[end] += state * (logits.max() - logits[end]) / state.square().sum()


def test_an_empty_completion_is_judged_and_learned_from_like_others(model: Path) -> None:
    empty: list[Completion] = []

    def judge(prompt: dict[str, str], completion: Completion) -> float:
        empty.extend([completion] * (not completion))
        return VALUE

    trainer = new_trainer(model, judge, replayed=False)
    assert isinstance(trainer.policy, LanguagePolicy)
    tokenizer = trainer.policy.tokenizer
    prefer_to_say_nothing(trainer.policy)
    for _ in range(8):
        trainer.update()
    learned = Trajectories.concatenate(trainer.batches)
    assert len(learned) == 8 * BATCH
    assert list(trainer.policy.objects(learned)).count("") == len(empty) > 0
    ends_at_once = learned.select(learned.lengths == 1)
    assert ends_at_once.steps["token"].tolist() == [tokenizer.eos_token_id] * len(empty)
    assert len(empty) < len(learned)
    assert_only_verdicts(trainer)


def test_failures_by_kind_reach_the_metrics_of_a_run_and_its_evaluation_does_not_count(
    model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "half_broken.py").write_text(
        "from headwater.language.failures import InvalidSample\n\n\n"
        "def judge(prompt, completion):\n"
        "    if completion.startswith(('0', '1', '2')):\n"
        "        raise InvalidSample('of no use')\n"
        "    return 0.25\n"
    )
    monkeypatch.chdir(tmp_path)
    with pytest.raises(SystemExit) as ended:
        main([
            "train", "language", "--model", str(model), "--prompts", str(model / "prompts.jsonl"), "--reward",
            "half_broken:judge", "--sampling.max-new-tokens", "8", "--samples", "4", "--completions", "2",
            "--training.iterations", "4", "--training.batch-size", "8", "--training.group-size", "4",
            "--training.replayed", "8", "--replay.per-condition", "4", "--training.log-every", "2",
            "--training.evaluate-every", "2", "--quiet", "--out", "run",
        ])  # fmt: skip
    assert not ended.value.code
    rows = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    assert [row["iteration"] for row in rows] == [2, 4]
    assert all(row["reward_failures/invalid"] == row["failed"] > 0 for row in rows)
    assert all(row["mean_reward"] == VALUE for row in rows if math.isfinite(float(row["mean_reward"])))
