"""The recipe `tiny-math`: a small Llama, made and taught from scratch, learns arithmetic word problems. Post-training
as it is done with large models, small enough for a laptop.
"""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import ClassVar

from headwater.language.generation import Sampling
from headwater.language.recipe import LanguageRecipe
from headwater.language.warm_start import WarmStart, make_word_problem_model
from headwater.language.word_problems import PROMPT_TEMPLATE
from headwater.recipes.base import Recipe
from headwater.replay import ReplaySettings
from headwater.runs import INPUTS
from headwater.search import SearchSettings
from headwater.training import Training


@dataclass(frozen=True)
class TinyMathRecipe(LanguageRecipe):
    """Arithmetic word problems for a small Llama.

    Everything is made here: problems with worked answers, a tokenizer, and a Llama that is taught until it answers a
    third of them. From there it is post-trained on whether its answers are right.
    """

    summary: ClassVar[str] = "word problems for a small Llama made from scratch (extra: language)"

    template: str = PROMPT_TEMPLATE
    """What the model is given of a line."""
    sampling: Sampling = field(default_factory=lambda: Sampling(max_new_tokens=40))
    """How completions are drawn."""
    training: Training = field(
        default_factory=lambda: Training(
            iterations=400, batch_size=160, group_size=16, replayed=160, only_replayed=True, learning_rate=3e-4,
            log_z_learning_rate=1e-2, schedule="linear", clip_gradient=1.0, log_every=5, evaluate_every=50,
            checkpoint_every=100,
        )
    )  # fmt: skip
    """How long and how fast to learn."""
    replay: ReplaySettings = field(
        default_factory=lambda: ReplaySettings(
            capacity=20_000, rule="stratified", recent_probability=0.95, per_condition=16, per_condition_capacity=64
        )
    )
    """What is remembered of each problem, and how groups are drawn from it."""
    search: SearchSettings = field(default_factory=lambda: SearchSettings(searchers=1))
    """Who searches: one process, while this one learns."""
    warm_start: WarmStart = field(default_factory=WarmStart)
    """The model that training starts from, and its problems."""

    def __post_init__(self) -> None:
        if self.model:  # made already, or the user's own
            super().__post_init__()

    def prepared(self, folder: Path) -> Recipe:
        if self.model:
            return self
        made = folder / INPUTS / "start"
        make_word_problem_model(made, self.seed, self.warm_start)
        return replace(self, model=str(made), prompts=made / "train.jsonl", test_prompts=made / "test.jsonl")
