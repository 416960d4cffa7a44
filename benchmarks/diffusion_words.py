"""Words with letters missing: a masked prior over letters fills them in, first as it likes, then under a wish.

    headwater train prior --data benchmarks/five-letter-words.txt --chain.kind one-by-one \\
        --held-out 0.05 --training.iterations 5000 --training.batch-size 64 --exploration.average 0.99 --out runs/words
    python benchmarks/diffusion_words.py --prior runs/words

The wish is one that no letter can be judged by alone: two vowels, and no letter twice. Three letters are missing, so
all 17,576 answers can be enumerated, and each share is printed beside the exact one. Writes results/diffusion-words.md.
"""

from __future__ import annotations

import argparse
import sys
import time
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from torch import Tensor

from diffusion_rows import cell, run_to_the_end, table
from headwater.conditions import NoCondition
from headwater.diffusion.adapters import Adapter
from headwater.diffusion.chains import draw_chains
from headwater.diffusion.estimators import log_z_estimates
from headwater.diffusion.measures import total_variation
from headwater.diffusion.policy import DiffusionPolicy
from headwater.diffusion.priors import Prior, load_prior
from headwater.diffusion.strings import end_probabilities, every_string
from headwater.diffusion.tokens import FREE, OneByOneProcess
from headwater.environments.base import Objects
from headwater.objectives import Objective
from headwater.replay import ReplaySettings
from headwater.training import ExplorationSettings, Trainer, Training
from provenance import cpu_model

HERE = Path(__file__).parent
WORDS = HERE / "five-letter-words.txt"
PATTERNS = ("st...", ".r..e", "..i.t")
DRAWS, SHOWN = 2000, 8
MISSING = "."


@dataclass(frozen=True)
class TwoVowels:
    """log r: 3 for exactly two vowels, and 4 off for each letter that was there before. alphabet: of the tokens."""

    alphabet: str

    def __call__(self, objects: Objects, condition: Tensor) -> Tensor:
        x = torch.as_tensor(objects)
        vowel = torch.tensor([letter in "aeiou" for letter in self.alphabet])[x].sum(1)
        ordered = x.sort(1).values
        again = (ordered[:, 1:] == ordered[:, :-1]).sum(1)
        return 3.0 * (vowel == 2) - 4.0 * again


@dataclass(frozen=True)
class Answer:
    """To one pattern: the lines to print, and what they rest on."""

    lines: list[str]
    total_variation: float
    of_prior: float
    log_z_off: float
    effective_sample_size: float
    cpu_seconds: float
    reward_calls: int


def fill_in(prior: Prior, pattern: str, seed: int, iterations: int) -> Answer:
    """Train a sampler for the pattern, and put what it says beside prior, exact posterior and the list of words."""
    assert isinstance(prior.process, OneByOneProcess)
    reward = TwoVowels(prior.alphabet)
    given = tuple(FREE if letter == MISSING else prior.alphabet.index(letter) for letter in pattern)
    process = replace(prior.process, given=given)
    began = time.process_time()
    torch.manual_seed(seed)
    policy = DiffusionPolicy(process, prior.denoiser, Adapter("copy").posterior(prior))
    training = Training(
        iterations=iterations, batch_size=32, replayed=32, warm_up=512, replay_backward=True, schedule="cosine"
    )
    trainer = Trainer(
        policy, reward, NoCondition(), Objective("vargrad"), training, ExplorationSettings(epsilon=0.0),
        ReplaySettings(rule="softmax"), seed,
    )  # fmt: skip
    run_to_the_end(trainer)
    seconds = time.process_time() - began

    strings, nothing = every_string(process), torch.empty(1, 0)
    before, after = (end_probabilities(process, each) for each in (prior.denoiser, policy.posterior))
    joint = before.log() + reward(strings, nothing).double()
    target = joint.softmax(0)
    generator = torch.Generator().manual_seed(seed)
    drawn = draw_chains(process, prior.denoiser, policy.posterior, reward, nothing.expand(DRAWS, -1), generator)
    found = log_z_estimates(drawn.log_ratio, drawn.log_reward)
    words = set(WORDS.read_text().split())
    known = torch.tensor([spelt(prior, row) in words for row in strings])

    def top(probability: Tensor) -> list[str]:
        best = probability.topk(SHOWN).indices.tolist()
        return [f"{spelt(prior, strings[i])} {100 * float(probability[i]):.1f}" for i in best]

    columns = zip(top(before), top(target), top(after), strict=True)
    heads = ["prior", "exact posterior", "sampler"]
    lines = [f"## {pattern.replace(MISSING, '_')}", "", *table(heads, [list(row) for row in columns]), ""]
    on_list = ", ".join(f"{name} {100 * float(p[known].sum()):.0f} %" for name, p in (
        ("prior", before), ("exact posterior", target), ("sampler", after)))  # fmt: skip
    lines += [f"Of the strings, words of the list: {on_list}.", ""]
    return Answer(
        lines, total_variation(after, target), total_variation(before, target),
        found.log_z - float(joint.logsumexp(0)), found.effective_sample_size / DRAWS, seconds,
        training.warm_up + iterations * training.batch_size,
    )  # fmt: skip


def spelt(prior: Prior, row: Tensor) -> str:
    return "".join(prior.alphabet[token] for token in row.tolist())


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--prior", type=Path, required=True, help="folder of the run that learned it")
    parser.add_argument("--patterns", nargs="+", default=PATTERNS, help="three dots each, for letters to fill in")
    parser.add_argument("--iterations", type=int, default=600, help="updates of training")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--output", type=Path, default=HERE / "results" / "diffusion-words.md")
    asked = parser.parse_args()
    prior = load_prior(asked.prior)
    answers = {pattern: fill_in(prior, pattern, asked.seed, asked.iterations) for pattern in asked.patterns}
    command = " ".join(["python benchmarks/diffusion_words.py", *sys.argv[1:]])
    figures = [
        [f"`{pattern.replace(MISSING, '_')}`", *map(cell, (
            one.total_variation, one.of_prior, one.log_z_off, one.effective_sample_size, one.reward_calls,
            round(one.cpu_seconds)))]
        for pattern, one in answers.items()
    ]  # fmt: skip
    heads = ["pattern", "total variation from the exact posterior", "of the prior", "log Z off by (nats)",
             "effective sample size", "reward calls", "CPU s of training"]  # fmt: skip
    lines = [INTRODUCTION, *table(heads, figures), ""]
    lines += [line for one in answers.values() for line in one.lines]
    lines += ["Commands:", "", PRIOR, f"    {command}", "", f"{cpu_model()}, torch {torch.__version__}."]
    asked.output.write_text("\n".join(lines) + "\n")
    print("\n".join(lines))


INTRODUCTION = """# Words with letters missing

A masked diffusion prior has learned 484 common English words of five letters, one letter revealed a step. It fills in
what a pattern leaves open; a posterior sampler, trained by relative trajectory balance, does so under a wish that no
letter can be judged by alone: exactly two vowels (log r = 3), and no letter twice (4 off for each). All 17,576 ways to
fill in three letters are enumerated, so the exact posterior is known, and what the sampler draws is computed, not
sampled. In per cent below.
"""
PRIOR = """    headwater train prior --data benchmarks/five-letter-words.txt --chain.kind one-by-one \\
        --held-out 0.05 --training.iterations 5000 --training.batch-size 64 --exploration.average 0.99 \\
        --out runs/words"""


if __name__ == "__main__":
    main()
