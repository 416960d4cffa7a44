"""Headwater as a user has it: a language policy, a reward, a `Trainer`, and `trainer.update()` in a loop.

Generation and search are timed from outside.
"""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Callable, Sequence
from importlib.metadata import version
from typing import TypeVar

from language import LanguageTask, Spent, answer_of, read_rows
from protocol import begin

FIELDS, ANSWERS = begin()
TASK = LanguageTask(**FIELDS)

import torch  # noqa: E402
from torch import Tensor  # noqa: E402

import headwater  # noqa: E402
from headwater.environments.base import Objects  # noqa: E402
from headwater.language.generation import Sampling  # noqa: E402
from headwater.language.loading import load_model, load_tokenizer  # noqa: E402
from headwater.language.policy import LanguagePolicy  # noqa: E402
from headwater.objectives import Objective  # noqa: E402
from headwater.training import ExplorationSettings, Sharpness, Trainer, Training  # noqa: E402

Result = TypeVar("Result")


class PromptsInOrder:
    """Conditions: the prompts one after the other, as the peer goes through them."""

    size = 1

    def __init__(self, count: int) -> None:
        self.count, self.next = count, 0

    def draw(self, count: int, group_size: int, generator: torch.Generator) -> Tensor:
        groups = count // group_size
        rows = (self.next + torch.arange(groups)) % self.count
        self.next = (self.next + groups) % self.count
        return rows.float().repeat_interleave(group_size)[:, None]


class ExactMatch:
    """1 where the number after the last #### is the answer, as the peer has it."""

    def __init__(self, answers: Sequence[str]) -> None:
        self.answers = answers

    def __call__(self, objects: Objects, condition: Tensor) -> Tensor:
        right = [self.answers[number] for number in condition[:, 0].long().tolist()]
        return torch.tensor([float(answer_of(str(text)) == one) for text, one in zip(objects, right, strict=True)])


def timed(spent: Spent, part: str, call: Callable[..., Result]) -> Callable[..., Result]:
    def timing(*arguments: object, **options: object) -> Result:
        with spent.timing(part):
            return call(*arguments, **options)

    return timing


def trainer_of(task: LanguageTask, spent: Spent) -> Trainer:
    torch.manual_seed(task.seed)
    model, tokenizer = load_model(task.model, torch.device("cpu")), load_tokenizer(task.model)
    rows = read_rows(task.train, task.template)
    prompts = tokenizer([row["prompt"] for row in rows])["input_ids"]
    policy = LanguagePolicy(model, tokenizer, prompts, Sampling(task.temperature, task.max_new_tokens))
    training = Training(
        iterations=task.steps, batch_size=task.prompts * task.completions, group_size=task.completions,
        learning_rate=task.learning_rate, schedule="constant", clip_gradient=1.0, log_every=5,
    )  # fmt: skip
    trainer = Trainer(
        policy, ExactMatch([row["answer"] for row in rows]), PromptsInOrder(len(rows)),
        Objective(str(task.settings.get("objective", "vargrad"))), training,  # type: ignore[arg-type]
        ExplorationSettings(epsilon=0.0), seed=task.seed, sharpness=Sharpness(beta=task.beta),
    )  # fmt: skip
    write = timed(spent, "sampling", policy.local.generate)

    def generate(*arguments: object, **options: object) -> object:
        written = write(*arguments, **options)
        spent.tokens += sum(len(one.tokens) for one in written)
        return written

    policy.local.generate = generate  # type: ignore[method-assign, assignment]
    trainer.search.collect = timed(spent, "search", trainer.search.collect)  # type: ignore[method-assign]
    return trainer


def main() -> None:
    torch.set_num_threads(TASK.threads)
    spent = Spent()
    trainer = trainer_of(TASK, spent)
    about = {
        "parameters": sum(each.numel() for each in trainer.policy.model.parameters()),
        "versions": {"headwater": headwater.__version__, "transformers": version("transformers")}
        | {"torch": torch.__version__},
    }
    print(json.dumps(about), file=ANSWERS, flush=True)
    for line in sys.stdin:
        for _ in range(json.loads(line)["iterations"]):
            wall, cpu = time.perf_counter(), time.process_time()
            trainer.update()
            spent.add("iteration", time.perf_counter() - wall, time.process_time() - cpu)
            spent.iterations += 1
        print(json.dumps(spent.take()), file=ANSWERS, flush=True)


if __name__ == "__main__":
    main()
