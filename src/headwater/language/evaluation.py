"""How good a language policy is, and how different its answers are, on test prompts and beside the starting model.

pass@k is the unbiased estimator of Chen et al. 2021 (arXiv 2107.03374): of n completions of a prompt of which c are
right, k drawn without replacement contain a right one with probability 1 - C(n - c, k) / C(n, k). Perplexity under the
starting model stands for the divergence from it, as in Noukhovitch et al. 2024 (arXiv 2410.18252).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from math import comb
from typing import TYPE_CHECKING

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.nn import functional

from headwater.language.backbone import Backbone
from headwater.language.data import Completion
from headwater.language.findings import START
from headwater.language.generation import Generator, ModelGenerator
from headwater.language.loading import load_model
from headwater.language.policy import LanguagePolicy
from headwater.runs import Metrics, Run
from headwater.trajectories import Trajectories

if TYPE_CHECKING:
    from headwater.language.recipe import LanguageRecipe
    from headwater.sampler import Sampler

QUICK_PROMPTS = 100
"""Most test prompts, of one completion each, that are measured on while training goes on."""
SHOWN_PROMPTS, SHOWN_COMPLETIONS = 8, 4
"""Prompts, and different completions of each, that completions.json keeps for a person to read."""
_SAME = ("prompts", "completions_per_prompt", "divergence")  # of the starting model as of the policy, or nothing


@dataclass(frozen=True)
class Drawn:
    """K completions of each of N prompts, a prompt's one after the other.

    prompts: int64 `[N]`. trajectories: N * K of them, whose `STEP_BEHAVIOUR` is of who drew them. log_start: float32
    `[S]`, each token's log-probability under the starting model. states: `[N * K, hidden]`, that model's mean last
    hidden state over a completion. reward: float64 `[N, K]`, NaN where it failed.
    """

    prompts: Tensor
    trajectories: Trajectories
    completions: list[Completion]
    reward: NDArray[np.float64]
    log_start: Tensor
    states: Tensor

    @property
    def each(self) -> int:
        """K."""
        return self.reward.shape[1]

    def of(self, prompt: int) -> list[Completion]:
        return self.completions[prompt * self.each : (prompt + 1) * self.each]


def quick_figures(recipe: LanguageRecipe, policy: LanguagePolicy) -> Metrics:
    """One completion of each of up to `QUICK_PROMPTS` test prompts: the same random numbers every time, and none of the
    run's."""
    condition = held_out_conditions(recipe, QUICK_PROMPTS)
    generator = torch.Generator().manual_seed(recipe.seed + 1)
    writer = ModelGenerator(policy.backbone, policy.tokenizer)
    trajectories = Trajectories.concatenate([
        _written(policy, writer, rows, generator) for rows in torch.split(condition, recipe.training.batch_size)
    ])  # fmt: skip
    reward = recipe.base_reward(policy.objects(trajectories), condition).double().cpu().numpy()
    figures: Metrics = {
        "mean_reward": _mean(reward),
        "mean_length": float(trajectories.lengths.double().mean()),
        "truncated": _share(~policy.finished(trajectories)),
    }
    if are_verdicts(recipe, reward):
        figures["pass_at_1"] = _mean((reward >= 1).astype(float)[~np.isnan(reward)])
    return figures


def figures(recipe: LanguageRecipe, run: Run, sampler: Sampler) -> dict[str, object]:
    """`recipe.completions` of each of up to `recipe.evaluated_prompts` test prompts, by the trained policy and by the
    starting model, whose figures' names begin with `START`. Writes completions.json, which holds some of them.
    """
    policy = sampler.problem.policy
    assert isinstance(policy, LanguagePolicy)
    start = Backbone(load_model(recipe.model, recipe.on, recipe.precision))
    before = draw(recipe, policy, ModelGenerator(start, policy.tokenizer), start)
    after = draw(recipe, policy, ModelGenerator(policy.backbone, policy.tokenizer), start)
    verdicts = are_verdicts(recipe, np.concatenate([before.reward, after.reward]))
    found = figures_of(policy, after, verdicts)
    found |= {START + name: value for name, value in figures_of(policy, before, verdicts).items() if name not in _SAME}
    chosen = _chosen(recipe, after.prompts)
    if chosen is not None:
        found |= {"win_rate": win_rate(after.reward, chosen), START + "win_rate": win_rate(before.reward, chosen)}
    run.write_json("completions.json", _shown(recipe, before, after, verdicts))
    return found


def figures_of(policy: LanguagePolicy, drawn: Drawn, verdicts: bool) -> dict[str, object]:
    """What can be said of completions alone. verdicts: whether a reward says right, 1, or not, less than 1."""
    trajectories, log_start = drawn.trajectories, drawn.log_start
    found: dict[str, object] = {
        "prompts": len(drawn.prompts),
        "completions_per_prompt": drawn.each,
        "failed_completions": int(np.isnan(drawn.reward).sum()),
        "mean_reward": _mean(drawn.reward),
        "mean_reward_error": _error_over_prompts(drawn.reward),
        "distinct_completions": float(np.mean([len(set(drawn.of(n))) for n in range(len(drawn.prompts))])),
        "divergence": float((trajectories.log_behaviour - trajectories.sum(log_start)).mean()),
        "entropy_per_token": -float(trajectories.log_behaviour.sum()) / trajectories.n_steps,
        "start_perplexity": float(torch.exp(-log_start.mean())),
        "mean_length": float(trajectories.lengths.double().mean()),
        "truncated": _share(~policy.finished(trajectories)),
    }
    if verdicts and (curve := pass_at_k(drawn.reward)):
        right = [
            len({text for text, reward in zip(drawn.of(n), row, strict=True) if reward >= 1})
            for n, row in enumerate(drawn.reward)
        ]
        found |= {"pass_at_k": curve, "pass_at_1": curve[0], f"pass_at_{len(curve)}": curve[-1]}
        found["distinct_right_completions"] = float(np.mean(right))
    if drawn.each > 1:
        found["embedding_distance"] = mean_cosine_distance(drawn.states.reshape(-1, drawn.each, drawn.states.shape[1]))
    return found


def held_out_conditions(recipe: LanguageRecipe, most: int) -> Tensor:
    """Condition rows `[N, 1]` of at most so many test prompts, evenly spread over them; 0 for all."""
    first, last = recipe.read[1], len(recipe.read[0]) - 1
    number = last + 1 - first
    count = min(most, number) if most else number
    return torch.linspace(first, last, count).round()[:, None]


def are_verdicts(recipe: LanguageRecipe, reward: NDArray[np.float64]) -> bool:
    """Whether a reward of 1 or more means right and less means wrong: so it is for math, and where each is 1 or 0."""
    if recipe.reward == "math":
        return True
    known = reward[~np.isnan(reward)]
    return bool(len(known)) and bool(np.isin(known, (0.0, 1.0)).all())


def pass_at_k(reward: NDArray[np.float64]) -> list[float]:
    """pass@1 up to pass@K, in the mean over prompts; right is a reward, `[N, K]`, of 1 or more.

    Completions that were not judged do not count; a prompt with fewer than k that were is left out of pass@k, and the
    list ends where no prompt is left.
    """
    judged = (~np.isnan(reward)).sum(1).tolist()
    right = (reward >= 1).sum(1).tolist()
    curve = []
    for k in range(1, max(judged, default=0) + 1):
        hits = [1 - comb(n - c, k) / comb(n, k) for n, c in zip(judged, right, strict=True) if n >= k]
        curve.append(float(np.mean(hits)))
    return curve


def win_rate(reward: NDArray[np.float64], chosen: NDArray[np.float64]) -> float:
    """Share of completions, rewards `[N, K]`, that the reward prefers to the one in the data, `[N]`; a draw is half a
    win. NaN where nothing can be compared."""
    compared = np.sign(reward - chosen[:, None])
    return _mean((compared + 1) / 2)


def mean_cosine_distance(states: Tensor) -> float:
    """Mean of 1 - cosine over all pairs of K states of each prompt `[N, K, hidden]`, K at least 2."""
    unit = functional.normalize(states.double(), dim=2)
    each = states.shape[1]
    cosine = (unit.sum(1).square().sum(1) - each) / (each * (each - 1))  # |sum|^2 holds each pair twice, and K ones
    return float((1 - cosine).mean())


@torch.no_grad()
def mean_states(backbone: Backbone, sequences: Sequence[Tensor]) -> Tensor:
    """The mean over a sequence of a model's last hidden states, for B sequences of tokens: float32 `[B, hidden]`."""
    lengths = torch.tensor([len(sequence) for sequence in sequences], device=backbone.device)
    tokens = nn.utils.rnn.pad_sequence(list(sequences), batch_first=True).to(backbone.device)
    mask = torch.arange(tokens.shape[1], device=backbone.device) < lengths[:, None]
    with torch.autocast(backbone.device.type, torch.bfloat16, enabled=backbone.device.type == "cuda"):
        hidden = backbone.model.base_model(tokens, attention_mask=mask.long()).last_hidden_state
    return (hidden.float() * mask[..., None]).sum(1) / lengths[:, None]


@torch.no_grad()
def draw(recipe: LanguageRecipe, policy: LanguagePolicy, writer: Generator, start: Backbone) -> Drawn:
    """K completions of each test prompt by `writer`, as many at once as the learner has in a batch."""
    rows = held_out_conditions(recipe, recipe.evaluated_prompts)
    condition = rows.repeat_interleave(recipe.completions, 0)
    generator = torch.Generator().manual_seed(recipe.seed + 2)
    drawn, log_start, states = [], [], []
    for part in torch.split(condition, recipe.training.batch_size):
        batch = _written(policy, writer, part, generator)
        numbers, prompt_of = torch.unique(part[:, 0].long(), return_inverse=True)
        tokens = batch.steps["token"].long()
        log_start.append(
            start.log_probs(
                [policy.prompts[number].to(start.device) for number in numbers.tolist()], prompt_of.to(start.device),
                tokens, batch.lengths, policy.sampling.temperature,
            )[0]
        )  # fmt: skip
        states.append(mean_states(start, torch.split(tokens, batch.lengths.tolist())))
        drawn.append(batch)
    trajectories = Trajectories.concatenate(drawn)
    completions = list(policy.objects(trajectories))
    reward = recipe.base_reward(completions, condition).double().cpu().numpy().reshape(len(rows), recipe.completions)
    return Drawn(
        rows[:, 0].long(),
        trajectories,
        completions,
        reward,
        torch.cat(log_start),
        torch.cat(states),
    )


def _written(policy: LanguagePolicy, writer: Generator, condition: Tensor, generator: torch.Generator) -> Trajectories:
    """One completion for each condition row. It is written by `writer`, so that a server is left alone with which
    others may search at the time."""
    prompts = [policy.prompts[number].tolist() for number in condition[:, 0].long().tolist()]
    seed = int(torch.randint(2**62, (), generator=generator))
    return policy.trajectories(condition, writer.generate(prompts, policy.sampling, seed))


def _chosen(recipe: LanguageRecipe, prompts: Tensor) -> NDArray[np.float64] | None:
    """The rewards `[N]` of the completions that the data prefer, NaN for a prompt without; None if none has one."""
    if recipe.reward != "preference":
        return None
    given = [recipe.read[0][number].fields.get("chosen") for number in prompts.tolist()]
    known = [index for index, text in enumerate(given) if text]
    if not known:
        return None
    reward = np.full(len(given), np.nan)
    reward[known] = recipe.base_reward([Completion(given[index]) for index in known], prompts[known, None].float())
    return reward


def _shown(recipe: LanguageRecipe, before: Drawn, after: Drawn, verdicts: bool) -> dict[str, object]:
    """A few prompts with different completions before and after training."""
    number = len(after.prompts)
    rows = torch.linspace(0, number - 1, min(SHOWN_PROMPTS, number)).round().long().tolist()
    asked = [recipe.read[0][int(after.prompts[row])] for row in rows]
    return {
        "verdicts": verdicts,
        "prompts": [
            {
                "prompt": prompt.text,
                "answer": prompt.answer,
                "before": _different(before, row),
                "after": _different(after, row),
            }
            for row, prompt in zip(rows, asked, strict=True)
        ],
    }


def _different(drawn: Drawn, prompt: int) -> list[dict[str, object]]:
    """The first different completions of one prompt, and how often each was drawn."""
    told: dict[str, dict[str, object]] = {}
    texts = drawn.of(prompt)
    for text, reward in zip(texts, drawn.reward[prompt].tolist(), strict=True):
        told.setdefault(
            str(text),
            {
                "text": str(text),
                "reward": None if np.isnan(reward) else reward,
                "finished": text.finished,
                "times": texts.count(text),
            },
        )
    return list(told.values())[:SHOWN_COMPLETIONS]


def _mean(values: NDArray[np.float64]) -> float:
    known = values[~np.isnan(values)]
    return float(known.mean()) if len(known) else float("nan")


def _error_over_prompts(reward: NDArray[np.float64]) -> float:
    """Standard error of the mean reward, prompts being what was drawn at random; NaN with fewer than two."""
    means = np.array([_mean(row) for row in reward])
    means = means[~np.isnan(means)]
    return float(means.std(ddof=1) / np.sqrt(len(means))) if len(means) > 1 else float("nan")


def _share(flags: Tensor) -> float:
    return float(flags.float().mean())
