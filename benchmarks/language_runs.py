"""What the benchmarks of language models share: a small model made once, a trainer from it, and accuracy afterwards."""

from __future__ import annotations

import json
import shlex
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from headwater.conditions import ConditionTable
from headwater.environments.base import Objects
from headwater.language.data import Prompt, read_prompts
from headwater.language.generation import Sampling
from headwater.language.loading import load_model, load_tokenizer
from headwater.language.policy import LanguagePolicy
from headwater.objectives import Objective
from headwater.policies.base import NO_EXPLORATION
from headwater.replay import ReplaySettings
from headwater.reward import Reward
from headwater.runs import provenance
from headwater.search import SearchSettings
from headwater.training import ExplorationSettings, Sharpness, Trainer, Training
from headwater.trajectories import Trajectories

WORK = Path(__file__).parent / ".work"
RESULTS = Path(__file__).parent / "results"


@dataclass(frozen=True)
class Arm:
    """One way to train. prompts: searched a step; group: completions of each; replayed: completions a step that are
    learnt from the replay besides them. only_replayed: all that is learnt is drawn from the replay."""

    objective: Objective = field(default_factory=lambda: Objective("vargrad"))
    search: SearchSettings = field(default_factory=SearchSettings)
    prompts: int = 10
    group: int = 16
    replayed: int = 0
    only_replayed: bool = False
    replay: ReplaySettings = field(default_factory=ReplaySettings)
    learning_rate: float = 3e-4
    sharpness: Sharpness = field(default_factory=lambda: Sharpness(0.1))
    threads: int = 1
    max_new_tokens: int = 40


@dataclass
class Delayed:
    """A reward that answers `seconds` later, as a judge on another machine does: all completions of a batch at once."""

    reward: Reward
    seconds: float

    def __call__(self, objects: Objects, condition: Tensor) -> Tensor:
        time.sleep(self.seconds)
        return self.reward(objects, condition)


def new_trainer(
    model: Path, train: Sequence[Prompt], test: Sequence[Prompt], reward: Callable[[Sequence[Prompt]], Reward],
    arm: Arm, iterations: int, seed: int, schedule: str = "constant",
) -> Trainer:  # fmt: skip
    """A trainer of the model in a folder; its conditions are the training prompts, and the test prompts follow them."""
    torch.manual_seed(seed)
    torch.set_num_threads(arm.threads)
    prompts = [*train, *test]
    tokenizer = load_tokenizer(str(model))
    ids = tokenizer([prompt.text for prompt in prompts])["input_ids"]
    policy = LanguagePolicy(
        load_model(str(model), torch.device("cpu")), tokenizer, ids, Sampling(1.0, arm.max_new_tokens),
        learns_log_z=arm.objective.name == "tb",
    )  # fmt: skip
    batch = arm.prompts * arm.group
    replayed = batch if arm.only_replayed else arm.replayed
    training = Training(
        iterations=iterations, batch_size=batch, group_size=arm.group, replayed=replayed,
        only_replayed=arm.only_replayed, learning_rate=arm.learning_rate, log_z_learning_rate=0.01,
        schedule=schedule, clip_gradient=1.0,
    )  # fmt: skip
    rows = torch.arange(len(train), dtype=torch.float32)[:, None]
    return Trainer(
        policy, reward(prompts), ConditionTable(rows), arm.objective, training, ExplorationSettings(epsilon=0.0),
        arm.replay, seed, search=arm.search, sharpness=arm.sharpness,
    )  # fmt: skip


def draw(trainer: Trainer, first: int, last: int, each: int, seed: int = 5) -> Trajectories:
    """Scored completions of prompts `first` to `last`, `each` of every one, by the policy as it is."""
    policy = trainer.policy
    rows = torch.arange(first, last, dtype=torch.float32).repeat_interleave(each)[:, None]
    drawn = policy.sample(rows, NO_EXPLORATION, torch.Generator().manual_seed(seed))
    reward = trainer.search.searcher.reward
    reward = reward.reward if isinstance(reward, Delayed) else reward
    return drawn.with_log_reward(reward(policy.objects(drawn), rows))


def accuracy(trainer: Trainer, first: int, last: int, each: int = 1) -> float:
    """Mean reward of sampled completions of prompts `first` to `last`."""
    return float(draw(trainer, first, last, each).log_reward.mean())


def load_problems(folder: Path, most_test: int) -> tuple[list[Prompt], list[Prompt]]:
    """Training and test prompts of a folder with train.jsonl and test.jsonl."""
    from headwater.language.word_problems import PROMPT_TEMPLATE

    train = read_prompts(folder / "train.jsonl", PROMPT_TEMPLATE)
    return train, read_prompts(folder / "test.jsonl", PROMPT_TEMPLATE)[:most_test]


def word_problems_folder(seed: int) -> Path:
    return WORK / f"word-problems-{seed}"


def word_problem_model(seed: int) -> Path:
    """The folder of the small model that was taught word problems with this seed, made if it is not there."""
    from headwater.language.warm_start import make_word_problem_model

    folder = word_problems_folder(seed)
    if not (folder / "test.jsonl").exists():
        make_word_problem_model(folder, seed)
    return folder


def measure(what: str, jobs: Sequence[Sequence[str]], forks: Callable[..., dict[str, object]] | None = None) -> None:
    """Each job in a process of its own, by `script one what *job`, or, where the clock does not matter, by
    `forks(what, *job)` in a fork of this one. Its answer is kept in language-`what`.json as soon as it is there. Jobs
    that have been done are not done again, and answers to others are dropped: the file is what this command measures.
    A "note" that somebody wrote into it, on what else the machine did, stays."""
    path = RESULTS / f"language-{what}.json"
    before = json.loads(path.read_text()) if path.exists() else {"runs": []}
    known = {tuple(run["job"]): run for run in before["runs"] if "job" in run}
    runs = [known[tuple(job)] for job in jobs if tuple(job) in known]
    facts = provenance(["python", Path(sys.argv[0]).name, *sys.argv[1:]], 0)
    facts |= {name: before[name] for name in ("note",) if name in before}
    for job in jobs:
        if tuple(job) in known:
            continue
        answer = _forked(forks, what, *job) if forks else _started(what, *job)
        runs.append(answer | {"job": list(job)})
        path.write_text(json.dumps(facts | {"runs": runs}, indent=1) + "\n")
        shown = {name: value for name, value in runs[-1].items() if name not in ("search", "points", "job")}
        print(shown, runs[-1].get("points", [""])[-1], file=sys.stderr)


def _started(*job: str) -> dict[str, Any]:
    done = subprocess.run([sys.executable, sys.argv[0], "one", *job], capture_output=True, text=True, check=False)
    if done.returncode:
        raise SystemExit(done.stderr[-4000:])
    answer: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return answer


def _forked(call: Callable[..., dict[str, Any]], *job: str) -> dict[str, Any]:
    """Saves what importing takes. The answer is as if it had been written as JSON."""
    with get_context("fork").Pool(1) as pool:
        answer: dict[str, Any] = json.loads(json.dumps(pool.apply(call, job)))
        return answer


def measured(what: str) -> dict[str, Any] | None:
    """What `measure` has written, or None."""
    path = RESULTS / f"language-{what}.json"
    return json.loads(path.read_text()) if path.exists() else None


def made_by(content: Mapping[str, Any]) -> str:
    """The command that measured it, where and when, and the note about it."""
    _, script, *arguments = content["command"]
    hardware = content["hardware"]
    return (
        f"    {shlex.join(['python', f'benchmarks/{Path(script).name}', *arguments])}\n\n"
        f"{hardware['cpu']}, {hardware['cores']} cores; begun {content['started']}. {content.get('note', '')}".rstrip()
    )


def interval(values: Sequence[float]) -> tuple[float, float]:
    """Mean, and half the width of its 95 % interval (Student's t)."""
    if len(values) < 2:
        return (values[0] if values else float("nan")), float("nan")
    quantile = {2: 12.71, 3: 4.30, 4: 3.18, 5: 2.78, 6: 2.57, 7: 2.45, 8: 2.36, 9: 2.31, 10: 2.26}[len(values)]
    return statistics.fmean(values), quantile * statistics.stdev(values) / len(values) ** 0.5


def plus_minus(values: Sequence[float], digits: int = 2) -> str:
    mean, half = interval(values)
    return f"{mean:.{digits}f}" if len(values) < 2 else f"{mean:.{digits}f} ± {half:.{digits}f}"
