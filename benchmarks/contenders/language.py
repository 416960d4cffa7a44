"""What a contender in post-training a language model is asked, and how all of them judge a completion. Nothing but the
standard library, since it is read by the peers' environments too.
"""

from __future__ import annotations

import json
import re
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from pathlib import Path

_PARTS = ("sampling", "search", "iteration")
_ANSWER = re.compile(r"####\s*(-?[\d,]*\.?\d+)")


@dataclass(frozen=True)
class LanguageTask:
    """A model, its prompts and how it is trained: the same for every contender.

    model: a Hugging Face folder. train, test: JSON lines with question and answer (GSM8K). turns: iterations are made
    when they are asked for, and each answered with where its time went; otherwise a whole run, a line at a time.
    """

    model: str
    train: str
    test: str
    template: str = "{question}\n"
    completions: int = 20
    """Completions of a prompt."""
    prompts: int = 4
    """Prompts an iteration."""
    max_new_tokens: int = 40
    temperature: float = 1.0
    learning_rate: float = 1e-4
    beta: float = 0.05
    """Weight of the divergence from the starting model; 0 where a contender need not know that model."""
    clip: float = 0.2
    """Of the ratio of probabilities, in the objectives that have one."""
    iterations: int = 1
    """Gradient steps on the same completions."""
    steps: int = 1_000_000
    seconds: float = 1e9
    """Training ends after so many, evaluation not counted."""
    evaluate_every: float = 30.0
    """Seconds of training between two evaluations."""
    test_prompts: int = 200
    """Most test prompts that an evaluation looks at."""
    keep: str = ""
    """A folder: an evaluation only writes the weights there, for the one who asked to measure."""
    threads: int = 1
    seed: int = 0
    turns: bool = True
    settings: dict[str, object] = field(default_factory=dict)
    """What one contender alone understands."""

    def to_json(self) -> str:
        return json.dumps(asdict(self))


def read_rows(path: str, template: str) -> list[dict[str, str]]:
    """prompt and answer of each line of a file; the answer is the number after the last ####."""
    lines = [json.loads(line) for line in Path(path).read_text(encoding="utf-8").splitlines() if line.strip()]
    return [{"prompt": template.format(**line), "answer": answer_of(line["answer"]) or ""} for line in lines]


def answer_of(text: str) -> str | None:
    """The number after the last ####, without commas; None where there is none."""
    found = _ANSWER.findall(text)
    return found[-1].replace(",", "") if found else None


class Spent:
    """Where the time of the iterations since the last `take` went: wall-clock seconds, and CPU seconds of all threads.

    sampling is generating completions alone; search is all that comes before the gradient: generating, judging,
    log-probabilities under other models; iteration is everything, and learning what is not search.
    """

    def __init__(self) -> None:
        self.wall = dict.fromkeys(_PARTS, 0.0)
        self.cpu = dict.fromkeys(_PARTS, 0.0)
        self.tokens = self.iterations = 0

    @contextmanager
    def timing(self, part: str) -> Iterator[None]:
        wall, cpu = time.perf_counter(), time.process_time()
        try:
            yield
        finally:
            self.add(part, time.perf_counter() - wall, time.process_time() - cpu)

    def add(self, part: str, wall: float, cpu: float) -> None:
        self.wall[part] += wall
        self.cpu[part] += cpu

    def take(self) -> dict[str, object]:
        """Seconds of each part, tokens that were generated and iterations. They begin again at zero."""
        for seconds in (self.wall, self.cpu):
            seconds["learning"] = seconds["iteration"] - seconds["search"]
        taken = {"wall": self.wall, "cpu": self.cpu, "tokens": self.tokens, "iterations": self.iterations}
        self.__init__()  # type: ignore[misc]
        return taken
