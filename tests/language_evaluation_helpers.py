"""A language model of a few thousand random weights that reads and writes digits, as a folder, with prompts for it."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from torch import Tensor
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from headwater.language.generation import Generated, Sampling
from headwater.language.policy import LanguagePolicy
from headwater.language.recipe import LanguageRecipe
from headwater.replay import ReplaySettings
from headwater.training import Training

PIECES = ["<s>", "</s>", "<pad>", *"0123456789", "<", ">", "&", "a", "="]
END = 1
PROMPTS = 12
"""Of which every tenth is held out: the first and the eleventh."""


def make_model(folder: Path) -> Path:
    tokenizer = Tokenizer(models.WordLevel({piece: number for number, piece in enumerate(PIECES)}, unk_token="<pad>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Split("", "isolated")
    tokenizer.decoder = decoders.Fuse()
    PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, bos_token="<s>", eos_token="</s>", pad_token="<pad>"
    ).save_pretrained(folder)
    config = LlamaConfig(
        vocab_size=len(PIECES), hidden_size=16, intermediate_size=32, num_hidden_layers=2, num_attention_heads=2,
        max_position_embeddings=64, initializer_range=0.5, bos_token_id=0, eos_token_id=END, pad_token_id=2,
        tie_word_embeddings=True,
    )  # fmt: skip
    with torch.random.fork_rng():
        torch.manual_seed(0)
        LlamaForCausalLM(config).save_pretrained(folder)
    return folder


def make_recipe(folder: Path, **settings: object) -> LanguageRecipe:
    """Prompts `0=`, `1=`, ..., whose answer is the digit itself."""
    lines = [json.dumps({"question": f"{number % 10}=", "answer": f"#### {number % 10}"}) for number in range(PROMPTS)]
    (folder / "prompts.jsonl").write_text("\n".join(lines))
    usual: dict[str, object] = {
        "model": str(make_model(folder / "start")),
        "prompts": folder / "prompts.jsonl",
        "sampling": Sampling(max_new_tokens=4),
        "completions": 4,
        "samples": 20,
        "replay": ReplaySettings(recent_probability=0.5, per_condition=4),
        "training": Training(
            iterations=6, batch_size=8, group_size=4, replayed=8, only_replayed=True, log_every=1, evaluate_every=3,
            checkpoint_every=6, learning_rate=1e-3,
        ),
    }  # fmt: skip
    return LanguageRecipe(**(usual | settings))  # type: ignore[arg-type]


def policy_of(recipe: LanguageRecipe) -> LanguagePolicy:
    policy = recipe.problem().policy
    assert isinstance(policy, LanguagePolicy)
    return policy


class Scripted:
    """Writes what it is told to, one text after the other, each token with log-probability -0.5; a text that ends in
    `.` has come to its end by itself."""

    def __init__(self, texts: Sequence[str]) -> None:
        self.texts = list(texts)

    def generate(self, prompts: Sequence[Sequence[int]], sampling: Sampling, seed: int) -> list[Generated]:
        now, self.texts = self.texts[: len(prompts)], self.texts[len(prompts) :]
        return [generated(text) for text in now]

    def load(self, weights: Mapping[str, Tensor], version: int) -> None:
        raise AssertionError


def generated(text: str) -> Generated:
    finished = text.endswith(".")
    tokens = [PIECES.index(piece) for piece in text.removesuffix(".")] + [END] * finished
    return Generated(tokens, [-0.5] * len(tokens), finished)
