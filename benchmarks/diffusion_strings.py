"""Masked diffusion over strings that can be enumerated: how exactly a posterior sampler draws and fills in.

    python benchmarks/diffusion_strings.py

The prior is a Markov chain over 4,096 strings with its exact conditionals, the reward depends on pairs and counts of
tokens. What a sampler draws is not sampled but computed, by passing probabilities along its chain. The readable part,
words with letters missing, is in diffusion_words.py. Writes results/diffusion-strings.json and .md; a row that is there
is not measured again.
"""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.nn import functional

from diffusion_rows import Figures, Rows, machine, over_seeds, run_to_the_end, table
from headwater.conditions import NoCondition
from headwater.diffusion.adapters import Corrected
from headwater.diffusion.chains import draw_chains, walk_back
from headwater.diffusion.denoisers import Denoiser
from headwater.diffusion.estimators import log_z_estimates
from headwater.diffusion.measures import total_variation
from headwater.diffusion.policy import DiffusionPolicy
from headwater.diffusion.strings import MarkovDenoiser, MarkovStrings, end_probabilities, every_string
from headwater.diffusion.tokens import FREE, MaskedProcess, OneByOneProcess, RevealingProcess
from headwater.environments.base import Objects
from headwater.objectives import Objective
from headwater.replay import ReplaySettings
from headwater.training import ExplorationSettings, Trainer, Training

RESULTS = Path(__file__).parent / "results"
LENGTH, VOCABULARY = 6, 4
DRAWS = 2000
WARM_UP, BATCH = 2000, 64

MARKOV = MarkovStrings.random(VOCABULARY, LENGTH, torch.Generator().manual_seed(2), 1.5)
NOTHING = torch.empty(1, 0)


def reward(objects: Objects, condition: Tensor) -> Tensor:
    """Of A, C, G, U as a hairpin: 3 for each of the three pairs of opposite letters that are complements, and 2 off for
    each letter by which the number of C and G differs from 2."""
    x = torch.as_tensor(objects)
    pairs = (x[:, :3] + x.flip(1)[:, :3] == VOCABULARY - 1).float().sum(1)
    strong = ((x == 1) | (x == 2)).float().sum(1)
    return 3 * pairs - 2 * (strong - 2).abs()


class TokenMLP(Denoiser):
    """Logits of short strings by a residual multilayer perceptron of all tokens together; it is told no time, since the
    masks say it."""

    condition = 0

    def __init__(self, length: int, vocabulary: int, width: int = 128, blocks: int = 2) -> None:
        super().__init__()
        self.shape = (-1, length, vocabulary)
        self.token = nn.Embedding(length * (vocabulary + 1), width)
        self.offset = nn.Buffer((vocabulary + 1) * torch.arange(length), persistent=False)
        self.norms = nn.ModuleList(nn.LayerNorm(width) for _ in range(blocks))
        self.first = nn.ModuleList(nn.Linear(width, width) for _ in range(blocks))
        self.second = nn.ModuleList(nn.Linear(width, width) for _ in range(blocks))
        self.last = nn.Linear(width, length * vocabulary)

    def forward(self, state: Tensor, time: Tensor, condition: Tensor) -> Tensor:
        hidden = self.token(state + self.offset).sum(1)
        for norm, first, second in zip(self.norms, self.first, self.second, strict=True):
            hidden = hidden + second(functional.silu(first(norm(hidden))))
        return self.last(functional.silu(hidden)).view(self.shape)

    def silence(self) -> None:
        nn.init.zeros_(self.last.weight), nn.init.zeros_(self.last.bias)


class TableDenoiser(nn.Module):
    """The exact law of each token given the revealed ones, of any distribution over all strings: `[V^L]`."""

    def __init__(self, probability: Tensor) -> None:
        super().__init__()
        cube = probability.view((VOCABULARY,) * LENGTH)
        for axis in range(LENGTH):  # the mask's place holds the sum over the token
            cube = torch.cat((cube, cube.sum(axis, keepdim=True)), axis)
        self.log_mass = cube.flatten().log()
        self.place = (VOCABULARY + 1) ** torch.arange(LENGTH - 1, -1, -1)

    def forward(self, state: Tensor, time: Tensor, condition: Tensor) -> Tensor:
        without = ((state * self.place).sum(1, keepdim=True) - state * self.place)[..., None]
        return self.log_mass[without + torch.arange(VOCABULARY) * self.place[:, None]]


def exact(process: RevealingProcess) -> tuple[Tensor, float]:
    """The posterior over every string that the process may end in, float64, and its log Z: of the prior among them."""
    strings = every_string(process)
    log_prior = MARKOV.log_prob(strings).double().log_softmax(0)
    joint = log_prior + reward(strings, NOTHING).double()
    return joint.softmax(0), float(joint.logsumexp(0))


def train(process: RevealingProcess, seed: int, iterations: int, replayed: bool = True) -> tuple[DiffusionPolicy, int]:
    """A sampler of the posterior, and how often it asked the reward."""
    torch.manual_seed(seed)
    prior = MarkovDenoiser(MARKOV)
    policy = DiffusionPolicy(process, prior, Corrected(prior, TokenMLP(LENGTH, VOCABULARY)))  # type: ignore[arg-type]
    training = Training(
        iterations=iterations, batch_size=BATCH if replayed else 2 * BATCH, replayed=BATCH if replayed else 0,
        warm_up=WARM_UP if replayed else 0, replay_backward=replayed, learning_rate=2e-3, schedule="cosine",
    )  # fmt: skip
    trainer = Trainer(
        policy, reward, NoCondition(), Objective("vargrad"), training, ExplorationSettings(epsilon=0.0),
        ReplaySettings(rule="uniform"), seed,
    )  # fmt: skip
    run_to_the_end(trainer)
    return policy, training.warm_up + iterations * training.batch_size


def shares(draws: Tensor) -> Tensor:
    """Of all strings, in the order of `every_string`: float64 `[V^L]`."""
    place = VOCABULARY ** torch.arange(LENGTH - 1, -1, -1)
    return torch.bincount((draws * place).sum(1), minlength=VOCABULARY**LENGTH).double() / len(draws)


def look_at(process: RevealingProcess, denoiser: nn.Module, seed: int) -> Figures:
    """A sampler of the whole posterior: exactly, and by draws."""
    target, log_z = exact(process)
    generator, prior = torch.Generator().manual_seed(seed), MarkovDenoiser(MARKOV)
    ends = end_probabilities(process, denoiser)
    rows = NOTHING.expand(DRAWS, -1)
    drawn = draw_chains(process, prior, denoiser, reward, rows, generator)
    chosen = torch.multinomial(target, DRAWS, replacement=True, generator=generator)
    above = walk_back(process, prior, denoiser, reward, every_string(process)[chosen], rows, generator)
    found = log_z_estimates(drawn.log_ratio, drawn.log_reward, (above.log_ratio, above.log_reward))
    return {
        "total_variation": total_variation(ends, target),
        "divergence": float((target * (target.log() - ends.log())).sum()),
        "log_z_exact": log_z,
        "log_z_off": found.log_z - log_z,
        **found.figures(),
        "total_variation_of_draws": total_variation(shares(drawn.objects), target),
    }


def learned(process: RevealingProcess, seed: int, iterations: int, replayed: bool = True) -> Figures:
    began = time.process_time()
    policy, calls = train(process, seed, iterations, replayed)
    seconds = time.process_time() - began
    figures: Figures = {"cpu_seconds": seconds, "reward_calls": calls}
    figures |= look_at(process, policy.posterior, seed)
    if isinstance(process, OneByOneProcess):
        figures |= filling_in(policy.posterior)
    return figures


def filling_in(denoiser: nn.Module) -> Figures:
    """A sampler of the whole posterior asked to fill in what is between every first and last token: it has learned the
    law of each token given any others."""
    target, _ = exact(OneByOneProcess(LENGTH, VOCABULARY))
    cube = target.view(VOCABULARY, -1, VOCABULARY).sum(1)
    away = torch.zeros_like(cube)
    for first in range(VOCABULARY):
        for last in range(VOCABULARY):
            process = between(first, last)
            away[first, last] = total_variation(end_probabilities(process, denoiser), exact(process)[0])
    return {
        "filling_in_mean": float((away * cube).sum()),
        "filling_in_unweighted": float(away.mean()),
        "filling_in_largest": float(away.max()),
    }


def between(first: int, last: int) -> OneByOneProcess:
    return OneByOneProcess(LENGTH, VOCABULARY, (first, *[FREE] * (LENGTH - 2), last))


def filled_in(first: int, last: int, seed: int, iterations: int) -> Figures:
    """A sampler that was trained for one first and last token alone."""
    process = between(first, last)
    target, log_z = exact(process)
    began = time.process_time()
    policy, calls = train(process, seed, iterations)
    seconds = time.process_time() - began
    generator, prior = torch.Generator().manual_seed(seed), MarkovDenoiser(MARKOV)
    drawn = draw_chains(process, prior, policy.posterior, reward, NOTHING.expand(DRAWS, -1), generator)
    found = log_z_estimates(drawn.log_ratio, drawn.log_reward)
    untrained = total_variation(end_probabilities(process, prior), target)
    return {
        "cpu_seconds": seconds,
        "reward_calls": calls,
        "total_variation": total_variation(end_probabilities(process, policy.posterior), target),
        "total_variation_of_prior": untrained,
        "log_z_off": found.log_z - log_z,
        "effective_sample_size": found.effective_sample_size,
    }


def resampled(calls: int, seed: int) -> Figures:
    """Strings of the prior weighed by r: total variation of their weights, and of as many draws as others make."""
    generator = torch.Generator().manual_seed(seed)
    process, prior = OneByOneProcess(LENGTH, VOCABULARY), MarkovDenoiser(MARKOV)
    target, log_z = exact(process)
    drawn = draw_chains(process, prior, prior, reward, NOTHING.expand(calls, -1), generator)
    found = log_z_estimates(drawn.log_ratio, drawn.log_reward)
    weight = shares(drawn.objects) * reward(every_string(process), NOTHING).double().exp()
    weight = weight / weight.sum()
    chosen = torch.multinomial(weight, DRAWS, replacement=True, generator=generator)
    return {
        "reward_calls": calls,
        "total_variation": total_variation(weight, target),
        "log_z_off": found.log_z - log_z,
        "effective_sample_size": found.effective_sample_size * DRAWS / calls,
        "total_variation_of_draws": total_variation(shares(every_string(process)[chosen]), target),
    }


def exact_draws(seed: int) -> Figures:
    """The floor of what is measured on draws."""
    process = OneByOneProcess(LENGTH, VOCABULARY)
    target, _ = exact(process)
    chosen = torch.multinomial(target, DRAWS, replacement=True, generator=torch.Generator().manual_seed(seed))
    return {
        "total_variation": 0.0,
        "total_variation_of_draws": total_variation(shares(every_string(process)[chosen]), target),
    }


ONE_BY_ONE = OneByOneProcess(LENGTH, VOCABULARY)


def masked(steps: int) -> MaskedProcess:
    return MaskedProcess(LENGTH, VOCABULARY, steps)


SAMPLERS: dict[str, Callable[[int, int], Figures]] = {
    "one token a step": lambda seed, iterations: learned(ONE_BY_ONE, seed, iterations),
    "one token a step, own draws only": lambda seed, iterations: learned(ONE_BY_ONE, seed, iterations, False),
    "6 steps": lambda seed, iterations: learned(masked(6), seed, iterations),
    "exact conditionals, one token a step": lambda seed, iterations: look_at(
        ONE_BY_ONE, TableDenoiser(exact(ONE_BY_ONE)[0]), seed
    ),
    **{
        f"exact conditionals, {steps} steps": lambda seed, iterations, steps=steps: look_at(  # type: ignore[misc]
            masked(steps), TableDenoiser(exact(ONE_BY_ONE)[0]), seed
        )
        for steps in (3, 6, 32)
    },
    "the prior": lambda seed, iterations: look_at(ONE_BY_ONE, MarkovDenoiser(MARKOV), seed),
    "resampling, equal calls": lambda seed, iterations: resampled(WARM_UP + iterations * BATCH + DRAWS, seed),
    "resampling, 2,000 calls": lambda seed, iterations: resampled(DRAWS, seed),
    "exact draws": lambda seed, iterations: exact_draws(seed),
}
ONCE = ("exact conditionals", "the prior")
"""Samplers that do not learn, and so do not differ from seed to seed in what is computed exactly."""

PAIRS = ((0, 3), (2, 1), (3, 1))
"""First and last token: complements, others, and what makes a pair impossible."""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--iterations", type=int, default=2000, help="updates of training")
    parser.add_argument("--output", type=Path, default=RESULTS / "diffusion-strings.json")
    asked = parser.parse_args()
    command = ["python benchmarks/diffusion_strings.py", *sys.argv[1:]]
    rows = Rows(asked.output, command)
    for seed in range(asked.seeds):
        for name, sampler in SAMPLERS.items():
            if seed and name.startswith(ONCE):
                continue
            rows.measure({"sampler": name, "seed": seed}, lambda s=sampler, seed=seed: s(seed, asked.iterations))  # type: ignore[misc]
        for first, last in PAIRS:
            key: Figures = {"sampler": "between two tokens", "first": first, "last": last, "seed": seed}
            few = asked.iterations // 4
            rows.measure(key, lambda a=first, b=last, seed=seed, few=few: filled_in(a, b, seed, few))  # type: ignore[misc]
    asked.output.with_suffix(".md").write_text(report(rows, " ".join(command)))


def report(rows: Rows, command: str) -> str:
    """What a reader needs."""
    names = ("total_variation", "divergence", "log_z_off", "effective_sample_size", "total_variation_of_draws",
             "reward_calls", "cpu_seconds")  # fmt: skip
    lines = [[name, *(over_seeds(rows.where(sampler=name), one) for one in names)] for name in SAMPLERS]
    heads = ["sampler", "total variation", "divergence from the posterior (nats)", "log Z off by (nats)",
             "ESS of 2,000", "total variation of 2,000 draws", "reward calls", "CPU s of training"]  # fmt: skip
    between = [
        [f"{'ACGU'[first]}____{'ACGU'[last]}", *(over_seeds(
            rows.where(sampler="between two tokens", first=first, last=last), one) for one in (
                "total_variation", "total_variation_of_prior", "log_z_off", "effective_sample_size", "cpu_seconds"))]
        for first, last in PAIRS
    ]  # fmt: skip
    asked = [
        [name, *(over_seeds(rows.where(sampler=name), one) for one in (
            "filling_in_mean", "filling_in_unweighted", "filling_in_largest"))]
        for name in ("one token a step", "one token a step, own draws only")
    ]  # fmt: skip
    target, log_z = exact(ONE_BY_ONE)
    prior = MARKOV.log_prob(every_string(ONE_BY_ONE)).double()
    said = INTRODUCTION.format(
        log_z=log_z,
        before=float(-(prior.exp() * prior).sum()),
        after=float(-torch.xlogy(target, target).sum()),
        divergence=float((target * (target.log() - prior)).sum()),
    )
    filled = ["first and last", "total variation", "of the prior", "log Z off by", "ESS of 2,000", "CPU s"]
    parts = [
        [said], table(heads, lines), [READING], table(filled, between), [ASKED],
        table(["sampler", "mean by the posterior", "mean of 16 pairs", "largest"], asked),
        ["", GOALS, "", f"    {command}", "", machine(rows)],
    ]  # fmt: skip
    return "\n".join(line for part in parts for line in part) + "\n"


INTRODUCTION = """# Masked diffusion over strings that can be enumerated

How exactly does a sampler trained by relative trajectory balance draw from prior times reward, and fill in what is
missing, when tokens depend on each other? The prior is a Markov chain over 6 tokens of 4 (4,096 strings) with its exact
conditionals; the reward, 3 for each of three complementary pairs of opposite tokens and 2 off for each C or G too many
or too few, is no product over tokens. log Z is {log_z:.3f}; the entropy falls from {before:.2f} to {after:.2f} nats,
and the posterior diverges from the prior by {divergence:.2f}. Total variation and divergence are not estimated from
draws: the probability of every string is computed by passing probabilities along the sampler's chain. Mean over seeds,
and range in brackets.
"""
READING = """
A chain that reveals each token at a random time draws those that it reveals together independently: with the exact
conditionals of the posterior 3, 6 and 32 steps are as far off as said. (What 6 steps are trained towards is their own,
coarser prior times r, which is not the posterior here.) One token a step has no such floor, in as many steps
as there are tokens. Half of each batch are chains walked back from a replay that draws of the prior have filled. ESS
of resampling is that of 2,000 draws of the prior; its total variation is of the weights on all its draws.

## Filling in between a given first and last token

Trained for one pair:
"""
ASKED = """
Not trained for any: the samplers of all strings, asked to fill in between each of the 16 pairs. They have learned the
law of each token given any others; pairs that the posterior hardly has are seen little, least by own draws alone:
"""
GOALS = """Goals: total variation at most 0.05 and log Z within 0.02 of exact, met; filling in at most 0.08, met by
samplers trained for a pair and in the mean, missed for the rarest pairs by samplers of all strings."""


if __name__ == "__main__":
    main()
