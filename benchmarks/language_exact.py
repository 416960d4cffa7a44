"""How far a language model ends from its exact target, by objective and by who wrote the completions it learned from.

    python benchmarks/language_exact.py --seeds 5

A small GPT-2 writes strings of at most four letters. Every string is enumerated as a trajectory, so total variation to
pi_ref exp(r / beta) / Z and log Z are exact. Completions to learn from are written by the policy itself, by the policy
of 200 updates ago, or uniformly at random. Compared: trajectory balance with a learned log Z (tb) and without
(vargrad), REINFORCE whose penalty on the divergence is that of the time of writing, less a leave-one-out baseline
(rloo), and REINFORCE on the reward alone.
"""

from __future__ import annotations

import itertools
import json
import math
import statistics
import sys
import time
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import torch
import tyro
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from torch import Tensor, nn
from transformers import GPT2Config, GPT2LMHeadModel, PreTrainedTokenizerFast

from headwater.conditions import ConditionTable
from headwater.language.generation import Generated, Sampling
from headwater.language.policy import REFERENCE, LanguagePolicy
from headwater.objectives import Objective, others_mean
from headwater.policies.base import Exploration, LogProbs, Policy
from headwater.search.explorer import Explorer
from headwater.training import ExplorationSettings, Sharpness, Trainer, Training
from headwater.trajectories import Trajectories
from provenance import provenance

LETTERS, END = "abcde", 5
STUDENT = {2: 12.71, 3: 4.30, 4: 3.18, 5: 2.78, 6: 2.57, 7: 2.45, 8: 2.36, 9: 2.31, 10: 2.26}  # 97.5 %, by runs


@dataclass(frozen=True)
class Benchmark:
    """What to measure."""

    longest: int = 4
    """Letters of a string, at most."""
    beta: float = 0.6
    """Weight of the divergence from the starting model."""
    iterations: int = 500
    """Updates of a run."""
    batch_size: int = 128
    """Completions an update."""
    learning_rate: float = 5e-3
    """Adam's, falling to zero as a cosine."""
    lag: int = 200
    """Updates by which the old policy is behind."""
    seeds: int = 5
    """Runs of each pair, 2 to 10."""
    objectives: tuple[str, ...] = ("tb", "vargrad", "rloo", "reward only")
    """How to learn."""
    behaviours: tuple[str, ...] = ("on policy", "old policy", "uniform")
    """Who writes the completions."""
    out: Path = Path("benchmarks/results/language-exact.json")
    """File for the results."""


class RewardOnly(Objective):
    """REINFORCE on the reward, less the mean of the others: no divergence, no correction for who wrote it."""

    def __call__(self, log_probs: LogProbs, batch: Trajectories) -> Tensor:
        advantage = batch.log_reward - others_mean(batch.log_reward, batch.group)
        return -(advantage * batch.sum(log_probs.forward)).mean()


OBJECTIVES: dict[str, Objective] = {
    "tb": Objective("tb"),
    "vargrad": Objective("vargrad"),
    "rloo": Objective("rloo"),
    "reward only": RewardOnly("rloo"),
}


def build_policy(seed: int, longest: int, learns_log_z: bool) -> LanguagePolicy:
    """A GPT-2 of random weights, large enough that it prefers some strings from the start."""
    words = {word: number for number, word in enumerate([*LETTERS, "<end>"])}
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=Tokenizer(WordLevel(words, unk_token="<end>")), eos_token="<end>", pad_token="<end>"
    )
    config = GPT2Config(
        vocab_size=len(words), n_embd=32, n_layer=2, n_head=2, n_positions=8, initializer_range=0.05,
        eos_token_id=END, bos_token_id=None, tie_word_embeddings=False,
    )  # fmt: skip
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        model = GPT2LMHeadModel(config)
    return LanguagePolicy(model, tokenizer, [[0]], Sampling(1.0, longest), learns_log_z=learns_log_z)


def reward(objects: Sequence[str], condition: Tensor) -> Tensor:
    """Letters c are good, so are neighbours that are equal; to begin with b is bad."""
    scores = []
    for text in objects:
        letters = text.split()
        equal = sum(one == other for one, other in itertools.pairwise(letters))
        scores.append(0.8 * letters.count("c") + 0.5 * equal - 1.0 * (letters[:1] == ["b"]))
    return torch.tensor(scores)


class Old(Explorer):
    """Draws with the student as it was `lag` updates ago, from the start on with what it was at the start."""

    def __init__(self, student: LanguagePolicy, lag: int) -> None:
        super().__init__(student, nn.Module())
        self.drawing = build_policy(0, student.sampling.max_new_tokens, learns_log_z=student.log_z_head is not None)
        self.past: deque[dict[str, Tensor]] = deque(maxlen=lag + 1)

    def sample(self, condition: Tensor, exploration: Exploration, generator: torch.Generator) -> Trajectories:
        assert isinstance(self.student, LanguagePolicy)
        self.past.append({name: tensor.clone() for name, tensor in self.student.state_dict().items()})
        self.drawing.load_state_dict(self.past[0])
        drawn = self.drawing.sample(condition, exploration, generator)
        reference = self.student.reference_log_probs(drawn)
        version = drawn.version + max(self.student.version - self.past.maxlen + 1, 0)  # type: ignore[operator]
        return replace(drawn, steps={**drawn.steps, REFERENCE: reference}, version=version)

    def loss(
        self, objective: Objective, log_probs: LogProbs, batch: Trajectories, generator: torch.Generator
    ) -> Tensor:
        return log_probs.forward.new_zeros(())


class Uniform(Explorer):
    """Draws every token with the same probability."""

    def __init__(self, student: LanguagePolicy) -> None:
        super().__init__(student, nn.Module())

    def sample(self, condition: Tensor, exploration: Exploration, generator: torch.Generator) -> Trajectories:
        assert isinstance(self.student, LanguagePolicy)
        longest = self.student.sampling.max_new_tokens
        drawn = torch.randint(END + 1, (len(condition), longest), generator=generator).tolist()
        written = []
        for tokens in drawn:
            finished = END in tokens
            tokens = tokens[: tokens.index(END) + 1] if finished else tokens
            written.append(Generated(tokens, [-math.log(END + 1)] * len(tokens), finished))
        return self.student.trajectories(condition, written)

    loss = Old.loss


def explorer(behaviour: str, lag: int) -> Callable[[Policy], Explorer] | None:
    """Who writes; None for the policy itself."""
    makers: dict[str, Callable[[Policy], Explorer]] = {
        "old policy": lambda policy: Old(policy, lag),  # type: ignore[arg-type]
        "uniform": lambda policy: Uniform(policy),  # type: ignore[arg-type]
    }
    return makers.get(behaviour)


class Exact:
    """Every string of at most `longest` letters, the target's probability of each, and log Z."""

    def __init__(self, policy: LanguagePolicy, beta: float) -> None:
        longest = policy.sampling.max_new_tokens
        letters = range(len(LETTERS))
        ended = [(*word, END) for length in range(longest) for word in itertools.product(letters, repeat=length)]
        cut = list(itertools.product(letters, repeat=longest))
        written = [Generated(list(word), [0.0] * len(word), word[-1] == END) for word in [*ended, *cut]]
        condition = torch.zeros(len(written), 1)
        drawn = policy.trajectories(condition, written)
        self.all = drawn.with_log_reward(reward(policy.objects(drawn), condition) / beta)
        self.log_target = self.all.sum(policy.reference_log_probs(self.all)) + self.all.log_reward
        self.log_z = float(self.log_target.logsumexp(0))
        self.log_target = self.log_target - self.log_z

    @torch.no_grad()
    def compare(self, policy: LanguagePolicy) -> dict[str, float]:
        """Total variation, the mass of all strings (1), and the error of log Z: of the learned one where there is one,
        else of the estimate from the policy's own completions in expectation."""
        said = policy.log_probs(self.all)
        log_prob = self.all.sum(said.forward)
        probability = log_prob.exp()
        estimate = (probability * (self.log_z + self.log_target - log_prob)).sum()
        log_z = said.log_z[0] if policy.log_z_head is not None else estimate
        return {
            "total_variation": float((probability - self.log_target.exp()).abs().sum() / 2),
            "mass": float(probability.sum()),
            "log_z_error": float((log_z - self.log_z).abs()),
        }


def measure(objective: str, behaviour: str, seed: int, settings: Benchmark) -> dict[str, object]:
    """One run."""
    policy = build_policy(seed, settings.longest, learns_log_z=objective == "tb")
    exact = Exact(policy, settings.beta)
    start = exact.compare(policy)["total_variation"]
    training = Training(
        settings.iterations, settings.batch_size, group_size=settings.batch_size, schedule="cosine",
        learning_rate=settings.learning_rate, log_z_learning_rate=0.1,
    )  # fmt: skip
    trainer = Trainer(
        policy, reward, ConditionTable(torch.zeros(1, 1)), OBJECTIVES[objective], training,
        ExplorationSettings(epsilon=0.0), seed=seed, explorer=explorer(behaviour, settings.lag),
        sharpness=Sharpness(settings.beta),
    )  # fmt: skip
    began = time.process_time()
    trainer.run(progress_bar=False)
    seconds = round(time.process_time() - began, 1)
    return {
        "objective": objective, "behaviour": behaviour, "seed": seed, "strings": len(exact.all), "log_z": exact.log_z,
        "total_variation_at_start": start, **exact.compare(policy), "cpu_seconds": seconds,
    }  # fmt: skip


def mean_and_interval(values: Sequence[float], digits: int = 3) -> str:
    """The mean and half its 95 % interval, by Student's distribution."""
    if len(values) < 2:
        return f"{values[0]:.{digits}f}"
    half = STUDENT[len(values)] * statistics.stdev(values) / math.sqrt(len(values))
    return f"{statistics.fmean(values):.{digits}f} ± {half:.{digits}f}"


def page(record: dict[str, object]) -> str:
    """What has been measured, as Markdown."""
    runs, source = record["runs"], record["provenance"]
    assert isinstance(runs, list)
    assert isinstance(source, dict)
    strings, starts = runs[0]["strings"], [run["total_variation_at_start"] for run in runs]
    lines = [
        "# A language model's distance from its exact target",
        f"    {source['command']}",
        f"{source['cpu']}, {source['cores']} cores, {source['date']}, torch {source['versions']['torch']}, commit "
        f"{source['commit'][:10]}. {strings:,} strings, all enumerated; total variation at the start "
        f"{min(starts):.2f} to {max(starts):.2f}. Mean and half its 95 % interval over the seeds.",
        "Error of log Z: of the learned one for tb; else of the estimate from the policy's own completions, in "
        "expectation.",
        "| objective | completions by | total variation | worst | error of log Z | CPU s a run |\n"
        "|---|---|---|---|---|---|",
    ]
    pairs = dict.fromkeys((run["objective"], run["behaviour"]) for run in runs)
    for objective, behaviour in pairs:
        mine = [run for run in runs if (run["objective"], run["behaviour"]) == (objective, behaviour)]
        distance = [run["total_variation"] for run in mine]
        lines[-1] += (
            f"\n| {objective} | {behaviour} | {mean_and_interval(distance)} | {max(distance):.3f} "
            f"| {mean_and_interval([run['log_z_error'] for run in mine])} "
            f"| {statistics.fmean(run['cpu_seconds'] for run in mine):.0f} |"
        )
    return "\n\n".join(lines) + "\n"


def main(settings: Benchmark) -> None:
    torch.set_num_threads(1)
    command = ["python", *sys.argv]
    runs = []
    for seed in range(settings.seeds):  # interleaved, so that a busy machine slows all alike
        for objective, behaviour in itertools.product(settings.objectives, settings.behaviours):
            runs.append(measure(objective, behaviour, seed, settings))
            print(json.dumps(runs[-1]), flush=True)
        described = {name: value for name, value in asdict(settings).items() if name != "out"}
        record = {"provenance": provenance(command), "settings": described, "runs": runs}
        settings.out.parent.mkdir(parents=True, exist_ok=True)
        settings.out.write_text(json.dumps(record, indent=1) + "\n")
        settings.out.with_suffix(".md").write_text(page(record))
    print(f"\n{page(record)}")


if __name__ == "__main__":
    main(tyro.cli(Benchmark, description=__doc__))
