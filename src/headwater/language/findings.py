"""What a language run amounts to: pass@1 and the mean reward on test prompts, beside those of the starting model; and
what its figures are called.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from math import isfinite

from headwater.report import Card, Findings, Term, common_findings
from headwater.report.findings import after, line
from headwater.report.numbers import as_float, number

START = "start/"
"""Before the name of a figure that is of the starting model."""

_TERMS: dict[str, Term] = {
    "pass_at_1": Term("pass@1", "Probability that a completion is right, on the test prompts."),
    "mean_reward": Term("Mean reward", "Of the completions of the test prompts."),
    "mean_reward_error": Term("Its standard error", "Over prompts."),
    "win_rate": Term("Win rate", "Share of completions with a higher reward than the one that the data prefer."),
    "distinct_completions": Term("Different completions", "Of one prompt, in the mean over prompts."),
    "distinct_right_completions": Term("Different right completions", "Of one prompt, in the mean over prompts."),
    "embedding_distance": Term(
        "Embedding distance",
        "Mean cosine distance of pairs of one prompt's completions, by the starting model's mean last hidden states.",
    ),
    "divergence": Term(
        "Divergence from the start",
        "log-probability minus the starting model's, of a completion of its own, in nats."
    ),
    "entropy_per_token": Term("Entropy", "−log-probability of a token of its own completions, in nats."),
    "start_perplexity": Term(
        "Perplexity under the start", "exp of the starting model's mean −log-probability of a token."
    ),
    "mean_length": Term("Mean length", "Steps of a trajectory: for a language model, tokens."),
    "truncated": Term("Share cut off", "Completions that the length limit or a stop text ended."),
    "prompts": Term("Test prompts", "That were measured on."),
    "completions_per_prompt": Term("Completions of each", "That were drawn."),
    "failed_completions": Term("Completions without a reward", "The reward failed on them; they do not count."),
}  # fmt: skip


def term(name: str) -> Term:
    """What a figure is called."""
    if (k := name.removeprefix("pass_at_")).isdecimal() and name not in _TERMS:
        return Term(f"pass@{k}", f"Probability that one of {k} completions is right.")
    return _TERMS[name]


def findings(figures: Mapping[str, object]) -> Findings:
    """Before and after training. Where rewards are verdicts, pass@1 stands for the mean reward, which is the same."""
    curve = [name for name in figures if name.removeprefix("pass_at_").isdecimal()]
    terms = _TERMS | {name: term(name) for name in curve}
    score = "pass_at_1" if "pass_at_1" in figures else "mean_reward"
    if START + score not in figures:
        return replace(common_findings(figures), terms=terms)
    return Findings(
        headline=_headline(figures, score),
        verdict=_verdict(figures, score),
        cards=[_card(figures, name) for name in (score, "distinct_right_completions") if START + name in figures],
        terms=terms,
        shown=[name for name in figures if name.startswith(START) or START + name in figures],
    )


def _headline(figures: Mapping[str, object], score: str) -> list[str]:
    called = "mean reward" if score == "mean_reward" else "pass@1"
    return [
        *line(figures, f"{called} on test prompts: {{:.3f}}; before training: {{:.3f}}", score, START + score),
        *line(
            figures, "different right completions, of {} of a prompt: {:.2f}; before training: {:.2f}",
            "completions_per_prompt", "distinct_right_completions", START + "distinct_right_completions",
        ),
    ]  # fmt: skip


def _verdict(figures: Mapping[str, object], score: str) -> list[str]:
    now, before = as_float(figures[score]), as_float(figures[START + score])
    if not (isfinite(now) and isfinite(before)):
        return []
    label = term(score).label
    return [f"{after(figures)} sampler's {label} on the test prompts is {number(now)}; it was {number(before)}."]


def _card(figures: Mapping[str, object], name: str) -> Card:
    before = number(as_float(figures[START + name]))
    return Card(term(name).label, number(as_float(figures[name])), f"{before} before training")
