"""The recipe `tiny-math`: a small Llama, made and taught from scratch, learns arithmetic word problems. Post-training
as it is done with large models, small enough for a laptop.
"""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import ClassVar

from headwater.language.recipe import LanguageRecipe
from headwater.language.warm_start import WarmStart, make_word_problem_model
from headwater.language.word_problems import PROMPT_TEMPLATE
from headwater.recipes.base import Recipe
from headwater.runs import INPUTS


@dataclass(frozen=True)
class TinyMathRecipe(LanguageRecipe):
    """Arithmetic word problems for a small Llama.

    Everything is made here: problems with worked answers, a tokenizer, and a Llama that is taught until it answers a
    third of them. From there it is post-trained on whether its answers are right.
    """

    summary: ClassVar[str] = "word problems for a small Llama made from scratch (extra: language)"

    template: str = PROMPT_TEMPLATE
    """What the model is given of a line."""
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
