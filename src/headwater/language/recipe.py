"""The recipe `language`: post-train a causal language model on a reward, by trajectory balance with asynchrony."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, ClassVar

import torch
from torch import Tensor

from headwater.conditions import ConditionTable
from headwater.environments.base import Objects
from headwater.language.backends import VLLM, Remote
from headwater.language.data import Prompt, read_prompts
from headwater.language.findings import findings
from headwater.language.generation import Sampling
from headwater.language.loading import Lora, Precision, load_model, load_tokenizer, save_model
from headwater.language.policy import LanguagePolicy
from headwater.language.vllm_server import ServerError
from headwater.objectives import Objective
from headwater.policies.base import Policy
from headwater.recipes.base import Problem, Recipe, device_named
from headwater.replay import ReplaySettings
from headwater.report import Findings, Section
from headwater.reward import Reward
from headwater.runs import Metrics, Run
from headwater.training import ExplorationSettings, Sharpness, Training

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

    from headwater.sampler import Sampler

_OBJECTIVES = ("vargrad", "tb", "rloo", "grpo")


@dataclass(frozen=True)
class LanguageRecipe(Recipe):
    """Post-train a language model on a reward.

    The target of each prompt is the starting model times exp(reward / beta): many different good completions, in
    proportion. --model FOLDER_OR_HUB_NAME --prompts gsm8k.jsonl --reward math.
    """

    summary: ClassVar[str] = "post-train a causal language model, asynchronously (extra: language)"

    model: str = ""
    """A causal language model: a Hugging Face folder or a name on the hub."""
    prompts: Path | None = None
    """Prompts to train on, JSON lines: GSM8K, MATH, or objects with a prompt and maybe an answer."""
    test_prompts: Path | None = None
    """Prompts to measure on; without it every tenth of the training prompts is held out."""
    template: str = ""
    """What the model is given of a line, with its fields in braces: "{question}\\n". The question or prompt alone if
    not given."""
    chat: bool = False
    """Put the prompt into the model's chat template, as the user's turn."""
    reward: str = "math"
    """math: the answer is right, 1 or 0. preference: what reward_model says. Or your own as module:function, of the
    prompt's fields and the completion."""
    reward_model: str = ""
    """A sequence-classification model for the reward preference: a folder or a name on the hub."""
    reward_timeout: float = 10.0
    """Seconds that judging one completion may take."""
    reward_concurrency: int = 8
    """Completions that your own function judges at once."""
    sampling: Sampling = field(default_factory=Sampling)
    """How completions are drawn."""
    sharpness: Sharpness = field(default_factory=lambda: Sharpness(beta=0.1))
    """The target: beta weighs the divergence from the starting model."""
    lora: Lora = field(default_factory=Lora)
    """Adapters that learn in the model's place."""
    reset_every: int = 0
    """Updates after which the reference becomes what the policy is now; 0 keeps the starting model."""
    recompute: bool = False
    """Compute activations again on the way back (gradient checkpointing): less memory, more time."""
    precision: Precision = "float32"
    """Of the weights. On a GPU the arithmetic is in bfloat16 in any case, sums of log-probabilities in float32."""
    device: str = "auto"
    """cpu, cuda, cuda:1, ...; auto takes a GPU if there is one."""
    vllm: VLLM = field(default_factory=VLLM)
    """Write completions with a vLLM server."""
    completions: int = 8
    """Completions of each test prompt in the evaluation: pass@1 up to pass@ this."""
    evaluated_prompts: int = 200
    """Most test prompts that the evaluation measures on, evenly spread over them; 0 for all."""
    objective: Objective = field(default_factory=lambda: Objective("vargrad"))
    """What to balance: vargrad estimates log Z(prompt) from a group, tb learns it; rloo and grpo to compare with."""
    training: Training = field(
        default_factory=lambda: Training(
            iterations=500, batch_size=80, group_size=20, replayed=80, only_replayed=True, learning_rate=1e-5,
            log_z_learning_rate=1e-3, schedule="cosine", clip_gradient=1.0, steps_at_once=65_536, log_every=5,
            evaluate_every=50, checkpoint_every=100,
        )
    )  # fmt: skip
    """How long and how fast to learn."""
    exploration: ExplorationSettings = field(default_factory=lambda: ExplorationSettings(epsilon=0.0))
    """How the search departs from the policy: by temperature."""
    replay: ReplaySettings = field(
        default_factory=lambda: ReplaySettings(
            rule="stratified", share=0.3, recent_probability=0.5, per_condition=20, per_condition_capacity=100
        )
    )
    """What is remembered of each prompt, and how groups are drawn from it."""
    keep_objects: bool = False
    """Not for completions, whose reward depends on the prompt."""

    def __post_init__(self) -> None:
        if not self.model:
            raise ValueError("model: name a causal language model, a Hugging Face folder or a name on the hub")
        if self.prompts is None:
            raise ValueError("prompts: name a file of prompts, such as gsm8k.jsonl")
        if self.objective.name not in _OBJECTIVES:
            raise ValueError(f"objective.name = {self.objective.name!r}: over tokens, one of {', '.join(_OBJECTIVES)}")
        if self.keep_objects:
            raise ValueError("keep_objects: completions are scored by prompt, and are not kept")
        if self.training.warm_up:
            raise ValueError(
                "training.warm_up: a language model starts from its reference; there is nothing to warm up"
            )
        if self.exploration.epsilon:
            raise ValueError("exploration.epsilon: a language model explores by temperature, not by uniform tokens")
        training, replay = self.training, self.replay
        if self.objective.name != "tb" and training.group_size < 2:
            raise ValueError("training.group_size: completions of one prompt are compared, so 2 or more of them")
        if training.replayed and self.objective.name != "tb" and replay.per_condition < 2:
            raise ValueError("replay.per_condition: completions of one prompt are compared, so 2 or more of them")
        if training.batch_size % training.group_size:
            raise ValueError(
                f"training.batch_size = {training.batch_size}: must be a multiple of group_size = {training.group_size}"
            )
        if training.replayed and replay.per_condition and training.replayed % replay.per_condition:
            raise ValueError(
                f"training.replayed = {training.replayed}: must be a multiple of replay.per_condition = "
                f"{replay.per_condition}"
            )
        if training.replay_backward:
            raise ValueError("training.replay_backward: a completion has one path, from left to right")
        if self.vllm.url and self.search.searchers > 1:
            raise ValueError("search.searchers: one searcher for one vLLM server, which serves many requests at once")
        if self.completions < 1:
            raise ValueError(f"completions = {self.completions}: must be at least 1")
        if self.evaluated_prompts < 0:
            raise ValueError(f"evaluated_prompts = {self.evaluated_prompts}: must not be negative")
        if self.reset_every < 0:
            raise ValueError(f"reset_every = {self.reset_every}: must not be negative")
        _ = self.read

    # The problem

    @cached_property
    def read(self) -> tuple[list[Prompt], int]:
        """All prompts, and how many of them, the first, are trained on."""
        assert self.prompts is not None
        given = read_prompts(self.prompts, self.template or None)
        if self.test_prompts is not None:
            return given + read_prompts(self.test_prompts, self.template or None), len(given)
        if len(given) < 2:
            raise ValueError(f"{self.prompts}: one prompt cannot be both trained and measured on; give test_prompts")
        held_out = given[::10] if len(given) >= 10 else given[:1]
        kept = {id(prompt) for prompt in held_out}
        train = [prompt for prompt in given if id(prompt) not in kept]
        return train + held_out, len(train)

    @cached_property
    def tokenizer(self) -> PreTrainedTokenizerBase:
        return load_tokenizer(self.model)

    @cached_property
    def on(self) -> torch.device:
        """The device."""
        return device_named(self.device)

    def token_ids(self) -> list[list[int]]:
        """Each prompt as the model is given it."""
        texts = [prompt.text for prompt in self.read[0]]
        if not self.chat:
            return [list(ids) for ids in self.tokenizer(texts)["input_ids"]]
        if self.tokenizer.chat_template is None:
            raise ValueError(f"chat: the tokenizer of {self.model!r} has no chat template")
        turns = [[{"role": "user", "content": text}] for text in texts]
        asked = self.tokenizer.apply_chat_template(turns, add_generation_prompt=True, tokenize=True, return_dict=True)
        return [list(ids) for ids in asked["input_ids"]]

    def check(self) -> None:
        policy = self.problem().policy
        assert isinstance(policy, LanguagePolicy)
        if self.vllm.url:
            try:
                self.vllm.connect(policy.backbone, self.tokenizer)
            except ServerError as error:
                raise ValueError(f"vllm.url = {self.vllm.url!r}: {error}") from error

    def problem(self) -> Problem:
        model = load_model(self.model, self.on, self.precision, self.lora, self.recompute)
        remote = None
        if self.vllm.url:
            remote = Remote(lambda: self.vllm.connect(policy.backbone, self.tokenizer), self.vllm.every)
        learns_log_z = self.objective.name == "tb"
        policy = LanguagePolicy(
            model,
            self.tokenizer,
            self.token_ids(),
            self.sampling,
            self.reset_every,
            learns_log_z,
            remote,
            [prompt.place for prompt in self.read[0]],
        ).to(self.on)
        rows = torch.arange(self.read[1], dtype=torch.float32)[:, None]
        return Problem(policy, self.base_reward, ConditionTable(rows), sharpness=self.sharpness)

    @cached_property
    def base_reward(self) -> Reward:
        """r of a completion, an index of its prompt as condition."""
        from headwater.language.reward import build_reward

        return build_reward(self.reward, self.read[0], self.reward_model, self.reward_timeout, self.reward_concurrency)

    # Its objects

    def asked(self, count: int) -> Tensor:
        """The test prompts, each as often as the others."""
        first, number = self.read[1], len(self.read[0]) - self.read[1]
        each = -(-count // number)
        rows = torch.arange(first, first + number, dtype=torch.float32).repeat_interleave(each)
        spread = torch.linspace(0, len(rows) - 1, count).round().long()
        return rows[spread][:, None]

    def default_condition(self) -> Tensor:
        return torch.tensor([[float(self.read[1])]])

    def text(self, objects: Objects) -> list[str]:
        return [str(one) for one in objects]

    def distance(self, a: str, b: str) -> float:
        """Share of words that they do not have in common."""
        first, second = set(a.split()), set(b.split())
        return 1 - len(first & second) / max(len(first | second), 1)

    least_distance: ClassVar[float] = 0.2
    sample_names: ClassVar[tuple[str, str]] = ("completion", "reward")

    def condition_columns(self, condition: Tensor) -> dict[str, list[object]]:
        asked = [self.read[0][index] for index in condition[:, 0].long().tolist()]
        return {"prompt": [prompt.text for prompt in asked], "answer": [prompt.answer for prompt in asked]}

    def finish(self, run: Run, policy: Policy) -> None:
        """Write the trained model as an ordinary Hugging Face folder."""
        assert isinstance(policy, LanguagePolicy)
        save_model(policy.model, policy.tokenizer, run.folder / "model")

    def quick_evaluation(self, policy: Policy) -> Metrics | None:
        from headwater.language.evaluation import quick_figures

        assert isinstance(policy, LanguagePolicy)
        return quick_figures(self, policy)

    def evaluation(self, run: Run, sampler: Sampler) -> dict[str, object] | None:
        from headwater.language.evaluation import figures

        return figures(self, run, sampler)

    def findings(self, figures: Mapping[str, object]) -> Findings:
        return findings(figures)

    def sections(self, run: Run, policy: Policy) -> list[Section]:
        from headwater.language.sections import sections

        return sections(self, run)
