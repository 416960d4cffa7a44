"""What goes wrong while a language model is post-trained: the run goes on, and no failure is learned from as a zero."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path

import pytest
import torch

from headwater.conditions import ConditionTable
from headwater.language.data import Prompt
from headwater.language.failures import InvalidSample, TryAgain
from headwater.language.generation import Sampling
from headwater.language.loading import load_model, load_tokenizer
from headwater.language.policy import LanguagePolicy
from headwater.language.recipe import LanguageRecipe
from headwater.language.verifier import VerifierReward
from headwater.objectives import Objective
from headwater.replay import ReplaySettings
from headwater.search import SearchSettings
from headwater.search.asynchronous import AsynchronousSearch, Delivery
from headwater.training import ExplorationSettings, Sharpness, Trainer, Training
from palindromes import make_palindrome_model, prompts

VALUE = 0.25  # of every completion that was judged: a zero can only be a failure


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("model")
    make_palindrome_model(folder)
    return folder


def new_trainer(model: Path, judge: object, searchers: int = 0, iterations: int = 12, **how: object) -> Trainer:
    torch.manual_seed(0)
    tokenizer, texts = load_tokenizer(str(model)), prompts()
    policy = LanguagePolicy(
        load_model(str(model), torch.device("cpu")), tokenizer, tokenizer(texts)["input_ids"], Sampling(1.0, 8)
    )
    asked = [Prompt(text, str(n), {"answer": str(n)}) for n, text in enumerate(texts)]
    reward = VerifierReward(judge, asked, back_off=0.01, **how)  # type: ignore[arg-type]
    training = Training(iterations=iterations, batch_size=12, group_size=4, replayed=12, only_replayed=True)
    return Trainer(
        policy, reward, ConditionTable(torch.arange(6.0)[:, None]), Objective("vargrad"), training,
        ExplorationSettings(epsilon=0.0), ReplaySettings(1000, per_condition=4), 0,
        search=SearchSettings(searchers=searchers, timeout=120.0), sharpness=Sharpness(0.1),
    )  # fmt: skip


def remembered(trainer: Trainer) -> list[float]:
    assert trainer.replay is not None
    return trainer.replay.state()["log_reward"].tolist()


def test_what_fails_is_counted_and_left_out_and_what_succeeds_later_counts(model: Path) -> None:
    tried: dict[str, int] = {}

    def judge(prompt: dict[str, str], completion: str) -> object:
        match sum(map(ord, completion)) % 8:
            case 0:
                raise ValueError("broken")
            case 1:
                return float("nan")
            case 2:
                return None
            case 3:
                raise InvalidSample("of no use")
            case 4:
                tried[completion] = tried.get(completion, 0) + 1
                if tried[completion] < 3:
                    raise TryAgain("busy")
        return VALUE

    trainer = new_trainer(model, judge)
    for _ in range(12):
        trainer.update()
    kinds = trainer.search.searcher.reward.failures  # type: ignore[attr-defined]
    assert set(remembered(trainer)) == {VALUE}
    assert trainer.search.failed == sum(kinds.values()) > 0
    assert {"exception", "no number", "invalid"} <= kinds.keys()
    assert max(tried.values()) >= 3
    assert trainer._bookkeeping()["reward_failures/invalid"] == kinds["invalid"]


def test_a_judge_that_hangs_holds_up_neither_the_run_nor_the_others(model: Path) -> None:
    def judge(prompt: dict[str, str], completion: str) -> float:
        if sum(map(ord, completion)) % 16 == 3:
            time.sleep(3600)
        return VALUE

    trainer = new_trainer(model, judge, iterations=4, timeout=0.2, concurrency=8)
    began = time.monotonic()
    while not trainer.search.failed and time.monotonic() - began < 60:
        trainer.update()
    assert trainer.search.failed > 0
    assert set(remembered(trainer)) == {VALUE}


def test_a_searcher_that_is_killed_is_replaced_and_nothing_is_learned_from_twice(model: Path, tmp_path: Path) -> None:
    marker = tmp_path / "killed"
    learner = os.getpid()

    def judge(prompt: dict[str, str], completion: str) -> float:
        if os.getpid() != learner and completion.startswith("1") and not marker.exists():
            marker.touch()
            os.kill(os.getpid(), signal.SIGKILL)
        return VALUE

    trainer = new_trainer(model, judge, searchers=2)
    search = trainer.search
    assert isinstance(search, AsynchronousSearch)
    applied: list[tuple[int, int]] = []

    def watched(delivery: Delivery) -> None:
        before = search.drawn
        apply(delivery)
        if search.drawn > before:
            applied.append((delivery.searcher, delivery.sequence))

    apply, search._apply = search._apply, watched  # type: ignore[method-assign]
    try:
        for _ in range(12):
            trainer.update()
    finally:
        search.close()
    assert marker.exists()
    assert search.restarts == 1
    assert len(set(applied)) == len(applied)
    assert search.drawn == 12 * len(applied)
    assert set(remembered(trainer)) == {VALUE}


def arguments(model: Path, out: Path, *more: str) -> list[str]:
    return [
        "train", "language", "--model", str(model), "--prompts", str(model / "prompts.jsonl"), "--reward",
        "palindromes:palindrome_reward", "--sampling.max-new-tokens", "8", "--samples", "12",
        "--completions", "2", "--training.iterations", "16", "--training.batch-size", "8", "--training.group-size", "4",
        "--training.replayed", "8", "--replay.per-condition", "4", "--training.checkpoint-every", "4",
        "--training.log-every", "4", "--training.evaluate-every", "16", "--quiet", "--out", str(out), *more,
    ]  # fmt: skip


@pytest.mark.parametrize(
    ("more", "told"),
    [
        (["--model", "/nowhere/at/all"], "no such folder"),
        (["--prompts", "{bad}"], "line 2"),
        (["--prompts", "{empty}"], "empty"),
        (["--reward", "beauty"], "must be math, preference"),
        (["--reward", "no_such_module:judge"], "no_such_module"),
        (["--training.replayed", "6"], "training.replayed = 6: must be a multiple of replay.per_condition = 4"),
        (["--training.batch-size", "6"], "training.batch_size = 6: must be a multiple of group_size = 4"),
        (["--sampling.max-new-tokens", "5000"], "more than the model's context"),
        (["--template", "{nonsense}"], "nonsense"),
        (["--device", "cuda:7"], "device"),
        (["--lora.rank", "2", "--lora.targets", "no_such_layer"], "no_such_layer"),
    ],
)
def test_bad_input_is_an_error_that_says_what_is_wrong(
    model: Path, tmp_path: Path, more: Sequence[str], told: str, capsys: pytest.CaptureFixture[str]
) -> None:
    from headwater.cli import main

    (tmp_path / "bad.jsonl").write_text('{"prompt": "a", "answer": "1"}\n{"prompt": \n')
    (tmp_path / "empty.jsonl").write_text("")
    places = {"bad": tmp_path / "bad.jsonl", "empty": tmp_path / "empty.jsonl"}
    filled = [str(places[flag[1:-1]]) if flag[1:-1] in places else flag for flag in more]
    with pytest.raises(SystemExit) as ended:
        main(arguments(model, tmp_path / "run", *filled))
    error = " ".join(capsys.readouterr().err.replace("│", " ").split())
    assert told in error
    assert ended.value.code == 2
    assert not (tmp_path / "run" / "settings.toml").exists()


def test_a_recipe_without_model_or_prompts_says_what_to_name() -> None:
    with pytest.raises(ValueError, match="model: name a causal language model"):
        LanguageRecipe()
    with pytest.raises(ValueError, match="prompts: name a file"):
        LanguageRecipe(model="somewhere")


def test_without_transformers_the_error_names_the_extra_and_other_recipes_are_listed() -> None:
    hidden = "import sys, importlib.util as u; find = u.find_spec; "
    hidden += "u.find_spec = lambda name, *more: None if name == 'transformers' else find(name, *more); "
    hidden += "from headwater.cli import main; main(['list'])"
    done = subprocess.run([sys.executable, "-c", hidden], capture_output=True, text=True, timeout=120, check=True)
    assert "pip install 'headwater[language]'" in done.stdout
    assert "hypergrid" in done.stdout
