"""A task of many right answers a prompt: write a palindrome of six digits whose first half has a given sum modulo six.

Of the 6^6 = 46,656 strings over the digits 0 to 5, 36 are right for each of six prompts: a sparse reward (1 in 1,296)
with 216 modes that can all be listed. It shows how many of them a sampler finds and keeps.
"""

from __future__ import annotations

import json
import random
from collections.abc import Mapping
from itertools import islice, product
from pathlib import Path

from headwater.language.warm_start import fit, labelled, length_sorted_batches, new_model, train_tokenizer

SYMBOLS = "012345"
HALF = 3
LENGTH = 2 * HALF
_BATCH = 64


def prompts() -> list[str]:
    """The text of each prompt; prompt c asks for a half whose sum is c modulo six."""
    return [f"palindrome {remainder}:" for remainder in range(len(SYMBOLS))]


def palindromes(remainder: int) -> list[str]:
    """All right answers to the prompt with this remainder, in lexical order."""
    halves = ("".join(half) for half in product(SYMBOLS, repeat=HALF))
    return [half + half[::-1] for half in halves if _sum(half) % len(SYMBOLS) == remainder]


def palindrome_reward(prompt: Mapping[str, str], completion: str) -> float:
    """1 for a right answer, else 0. `prompt` holds the fields of a line of prompts.jsonl; `answer` is its remainder."""
    right_form = len(completion) == LENGTH and set(completion) <= set(SYMBOLS) and completion == completion[::-1]
    return float(right_form and _sum(completion[:HALF]) % len(SYMBOLS) == int(prompt["answer"]))


def make_palindrome_model(folder: Path, seed: int = 0, steps: int = 150) -> None:
    """Write a folder of `transformers` whose model draws all strings of six digits about equally often, whatever the
    prompt, and prompts.jsonl (`prompt`, `answer`) beside it. It takes seconds.

    steps: of training, 16 or more, which teach the model to write six digits and stop, and nothing else.
    """
    generator = random.Random(seed)
    texts = ["".join(generator.choices(SYMBOLS, k=LENGTH)) for _ in range(steps * _BATCH)]
    tokenizer = train_tokenizer([*prompts(), *SYMBOLS])
    model = new_model(tokenizer, width=64, layers=2, heads=2, seed=seed)
    examples = labelled(tokenizer, [generator.choice(prompts()) for _ in texts], texts)
    batches = length_sorted_batches(examples, _BATCH, generator)
    for _ in islice(fit(model, batches, learning_rate=0.003, warm_up=20), steps):
        pass
    folder.mkdir(parents=True, exist_ok=True)
    lines = [json.dumps({"prompt": prompt, "answer": str(c)}) for c, prompt in enumerate(prompts())]
    (folder / "prompts.jsonl").write_text("".join(f"{line}\n" for line in lines), encoding="utf-8")
    tokenizer.save_pretrained(folder)
    model.save_pretrained(folder)


def _sum(digits: str) -> int:
    return sum(map(int, digits))
