"""Post-training of a language model that is killed in the middle of saving a checkpoint, and resumed, ends bit for bit
as one that was never killed: weights, adapters, reference, log Z, replay, figures.
"""

from __future__ import annotations

import json
import shutil
import signal
from collections.abc import Iterator
from pathlib import Path

import pytest

from headwater.runs import Run
from test_kill import TIMES, Driver

VARIANTS = {
    "the whole model": [],
    "adapters, a reference that is reset, log Z learned": [
        "--lora.rank", "2", "--reset-every", "3", "--objective.name", "tb",
    ],
    "the whole model, a reference that is reset": ["--reset-every", "3"],
}  # fmt: skip
MOMENTS = (
    ("save checkpoints/.*/replay.safetensors", 1),
    ("open checkpoints/.*/state.json", 2),
    ("rename checkpoints/.*", 2),
)


def share_of_zeros(prompt: dict[str, str], completion: str) -> float:
    """A reward that differs from one completion to the next, so that every update changes the weights."""
    return completion.count("0") / 8


@pytest.fixture(scope="module")
def driver(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Driver]:
    from palindromes import make_palindrome_model  # not where the driver imports `share_of_zeros` from this file

    model = tmp_path_factory.mktemp("model")
    make_palindrome_model(model)
    driver = Driver([
        "language", "--quiet", "--model", str(model), "--prompts", str(model / "prompts.jsonl"), "--reward",
        "test_language_kill:share_of_zeros", "--sampling.max-new-tokens", "8", "--samples", "4",
        "--completions", "2", "--training.iterations", "8", "--training.batch-size", "8", "--training.group-size", "4",
        "--training.learning-rate", "1e-3", "--training.replayed", "8", "--replay.per-condition", "4",
        "--training.log-every", "2", "--training.evaluate-every", "4", "--training.checkpoint-every", "2",
    ])  # fmt: skip
    yield driver
    driver.process.communicate(timeout=60)


def content(folder: Path) -> dict[str, object]:
    """All that two runs of the same settings must have in common, by name."""
    run = Run.open(folder)
    newest = sorted((folder / "checkpoints").iterdir())[-1]
    state = json.loads((newest / "state.json").read_text())
    return {
        "iteration": newest.name,
        "state": {name: value for name, value in state.items() if name not in TIMES},
        "metrics": [{name: row[name] for name in row if name not in TIMES} for row in run.metrics()],
        "settings": (folder / "settings.toml").read_text(),
        "samples": (folder / "samples.csv").read_text(),
        "evaluation": run.evaluation(),
        "model": (folder / "model" / "model.safetensors").read_bytes(),
        "left over": [str(path) for path in folder.rglob("*partial*")],
        **{path.name: path.read_bytes() for path in newest.glob("*.safetensors")},
    }


@pytest.mark.parametrize("variant", VARIANTS)
def test_killed_in_the_middle_of_saving_it_resumes_to_the_same_end(
    driver: Driver, tmp_path: Path, variant: str
) -> None:
    given, driver.settings = driver.settings, [*driver.settings, *VARIANTS[variant]]
    try:
        assert driver.attempt(tmp_path / "whole")["status"] == 0
        for moment, time in MOMENTS:
            assert driver.attempt(tmp_path / "killed", moment, time)["status"] == signal.SIGKILL
        saved = Run.open(tmp_path / "killed").latest_checkpoint()
        assert saved is not None
        assert saved.iteration == 4  # a reference is reset after 3
        assert driver.attempt(tmp_path / "killed")["status"] == 0
    finally:
        driver.settings = given
    expected, found = content(tmp_path / "whole"), content(tmp_path / "killed")
    assert {"policy.safetensors", "replay.safetensors", "optimizer.safetensors"} <= expected.keys()
    assert expected["iteration"] == "iteration-000000008"
    assert {"config.json", "tokenizer.json"} <= {path.name for path in (tmp_path / "killed" / "model").iterdir()}
    rows = Run.open(tmp_path / "whole").metrics()
    assert all(row["gradient_norm"] > 0 for row in rows)
    assert [name for name in expected if found[name] != expected[name]] == []
    shutil.rmtree(tmp_path / "killed")
