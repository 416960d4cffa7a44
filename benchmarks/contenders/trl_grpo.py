"""TRL's `GRPOTrainer` in its own loop, on the CPU, without logging, checkpoints, recomputed activations or half
precision. Its two methods that prepare a step are timed from outside; nothing of what they do is changed.
"""

from __future__ import annotations

import json
import os
import sys
import tempfile
import time
from importlib.metadata import version
from typing import TextIO

from language import LanguageTask, Spent, answer_of, read_rows
from protocol import begin

FIELDS, ANSWERS = begin()
TASK = LanguageTask(**FIELDS)
os.environ |= {"HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false", "CUDA_VISIBLE_DEVICES": ""}

import torch  # noqa: E402
from datasets import Dataset  # noqa: E402
from torch import Tensor  # noqa: E402
from transformers import AutoModelForCausalLM, AutoTokenizer, GenerationConfig, TrainerCallback  # noqa: E402
from trl import GRPOConfig, GRPOTrainer  # noqa: E402


class TimedTrainer(GRPOTrainer):
    """A `GRPOTrainer` that says how long it generates, and how long it prepares a step."""

    spent: Spent

    def _generate_single_turn(self, *arguments, **options):  # type: ignore[no-untyped-def]
        with self.spent.timing("sampling"):
            completions, log_probs = super()._generate_single_turn(*arguments, **options)
        self.spent.tokens += sum(map(len, completions))
        return completions, log_probs

    def _prepare_inputs(self, generation_batch):  # type: ignore[no-untyped-def]
        with self.spent.timing("search"):
            return super()._prepare_inputs(generation_batch)


class Pace(TrainerCallback):
    """Times every step; in turns it makes one only when it is asked to, otherwise it evaluates now and then and ends
    the run after `task.seconds`. Evaluation stands still on its clock."""

    def __init__(self, task: LanguageTask, trainer: TimedTrainer, answers: TextIO) -> None:
        self.task, self.trainer, self.answers = task, trainer, answers
        self.rows = read_rows(task.test, task.template)[: task.test_prompts]
        self.asked = 0
        self.seconds = self.evaluated = 0.0
        self.rewards: list[float] = []

    def reward(self, completions: list[str], answer: list[str], **_: object) -> list[float]:
        """1 where the number after the last #### is the answer."""
        self.rewards = [float(answer_of(text) == right) for text, right in zip(completions, answer, strict=True)]
        return self.rewards

    def on_train_begin(self, *_: object, **__: object) -> None:
        if self.task.turns:
            self._wait()
        else:
            self._evaluate(0)
        self.began = time.perf_counter()

    def on_step_begin(self, *_: object, **__: object) -> None:
        self.step_began, self.cpu_began = time.perf_counter(), time.process_time()

    def on_step_end(self, _arguments, state, control, **__: object) -> None:  # type: ignore[no-untyped-def]
        spent, now = self.trainer.spent, time.perf_counter()
        spent.add("iteration", now - self.step_began, time.process_time() - self.cpu_began)
        spent.iterations += 1
        if self.task.turns:
            self.asked -= 1
            if not self.asked:
                self._say(**spent.take())
                self._wait()
            return
        self.seconds += now - self.began  # with what the loop does between steps
        mean = sum(self.rewards) / len(self.rewards)
        self._say(kind="step", seconds=self.seconds, step=state.global_step, mean_reward=mean, **spent.take())
        ends = self.seconds >= self.task.seconds or state.global_step >= self.task.steps
        if ends or self.seconds - self.evaluated >= self.task.evaluate_every:
            self.evaluated = self.seconds
            self._evaluate(state.global_step, ends)
        control.should_training_stop |= ends
        self.began = time.perf_counter()

    def _wait(self) -> None:
        """Until the next iterations are asked for; ends the process when nobody will ask again."""
        line = sys.stdin.readline()
        if not line:
            sys.exit()
        self.asked = json.loads(line)["iterations"]

    def _evaluate(self, step: int, ends: bool = False) -> None:
        if self.task.keep:
            folder = os.path.join(self.task.keep, str(step))
            self.trainer.model.save_pretrained(folder)
            return self._say(kind="kept", seconds=self.seconds, step=step, folder=folder, ends=ends)
        greedy, sampled = (self._accuracy(sampled) for sampled in (False, True))
        self._say(kind="evaluation", seconds=self.seconds, step=step, greedy=greedy, sampled=sampled)

    @torch.no_grad()
    def _accuracy(self, sampled: bool) -> float:
        """Share of test prompts answered right, by one completion each."""
        model, tokenizer, right = self.trainer.model, self.trainer.processing_class, 0
        settings = GenerationConfig(
            max_new_tokens=self.task.max_new_tokens, do_sample=sampled, eos_token_id=tokenizer.eos_token_id,
            pad_token_id=tokenizer.pad_token_id, bos_token_id=tokenizer.bos_token_id,
            **({"temperature": self.task.temperature, "top_k": 0} if sampled else {}),
        )  # fmt: skip
        model.eval()
        with torch.random.fork_rng(devices=[]):  # the run draws what it would draw without being looked at
            for start in range(0, len(self.rows), 100):
                rows = self.rows[start : start + 100]
                inputs = tokenizer([row["prompt"] for row in rows], padding=True, return_tensors="pt")
                inputs.pop("token_type_ids", None)
                written: Tensor = model.generate(**inputs, generation_config=settings)
                texts = tokenizer.batch_decode(written[:, inputs["input_ids"].shape[1] :], skip_special_tokens=True)
                right += sum(answer_of(text) == row["answer"] for text, row in zip(texts, rows, strict=True))
        model.train()
        return right / len(self.rows)

    def _say(self, **values: object) -> None:
        print(json.dumps(values), file=self.answers, flush=True)


def trainer_of(task: LanguageTask, folder: str) -> TimedTrainer:
    """The trainer and its pace. Weights in float32; a model as small as ours is slowest at everything else."""
    tokenizer = AutoTokenizer.from_pretrained(task.model)
    tokenizer.padding_side = "left"
    model = AutoModelForCausalLM.from_pretrained(task.model, dtype=torch.float32)
    size = task.prompts * task.completions
    settings = {
        "per_device_train_batch_size": size, "num_generations": task.completions, "steps_per_generation": 1,
        "max_completion_length": task.max_new_tokens, "temperature": task.temperature, "beta": task.beta,
        "epsilon": task.clip, "num_iterations": task.iterations, "learning_rate": task.learning_rate,
        "max_steps": task.steps, "lr_scheduler_type": "constant", "max_grad_norm": 1.0, "seed": task.seed,
        "bf16": False, "fp16": False, "use_cpu": True, "gradient_checkpointing": False,
        "shuffle_dataset": not task.turns, "report_to": "none", "logging_strategy": "no", "save_strategy": "no",
        "eval_strategy": "no", "disable_tqdm": True, "dataloader_pin_memory": False,
        "optim": "adamw_torch_fused",
    }  # fmt: skip
    arguments = GRPOConfig(output_dir=folder, **settings | task.settings)
    rows = read_rows(task.train, task.template)
    pace: list[Pace] = []  # it needs the trainer, which needs its reward

    def reward(completions: list[str], answer: list[str], **_: object) -> list[float]:
        return pace[0].reward(completions, answer)

    trainer = TimedTrainer(
        model, reward_funcs=reward, args=arguments, train_dataset=Dataset.from_list(rows), processing_class=tokenizer
    )
    trainer.spent = Spent()
    pace.append(Pace(task, trainer, ANSWERS))
    trainer.add_callback(pace[0])
    return trainer


def main() -> None:
    torch.set_num_threads(TASK.threads)
    with tempfile.TemporaryDirectory() as folder:
        trainer = trainer_of(TASK, folder)
        about = {
            "kind": "about", "parameters": sum(each.numel() for each in trainer.model.parameters()),
            "versions": {name: version(name) for name in ("trl", "transformers", "accelerate", "torch")},
        }  # fmt: skip
        print(json.dumps(about), file=ANSWERS, flush=True)
        trainer.train()


if __name__ == "__main__":
    main()
