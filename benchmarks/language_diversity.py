"""Diversity and sparse rewards: how many of a prompt's right answers a post-trained language model keeps, and what more
searchers find, by each rule of drawing from the replay.

    python benchmarks/language_diversity.py diversity   # about a minute an arm and seed
    python benchmarks/language_diversity.py sparse      # about a minute a rule, number of searchers and seed
    python benchmarks/language_diversity.py staleness   # about a minute a cell
    python benchmarks/language_diversity.py report

The task: six prompts, each of which asks for a palindrome of six digits whose first half has a given sum modulo six; 36
of the 46,656 strings are right for each, 216 in all. The model, a Llama of 0.13 million parameters, starts by writing
all strings of six digits about equally often (1 in 1,296 is right). Nothing depends on the clock: searchers take turns
in one thread.
"""

from __future__ import annotations

import argparse
import json
import math
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from headwater.language.data import Prompt, read_prompts
from headwater.language.evaluation import pass_at_k
from headwater.language.verifier import VerifierReward
from headwater.objectives import Objective
from headwater.replay import ReplaySettings
from headwater.search import SearchSettings
from headwater.training import Sharpness, Trainer
from language_runs import RESULTS, WORK, Arm, draw, made_by, measure, measured, new_trainer, plus_minus
from palindromes import make_palindrome_model, palindrome_reward

UPDATES, MODES, EACH = 1000, 216, 256
RIGHT = 36 / 6**6  # of all strings, for each prompt
REPLAY = ReplaySettings(capacity=20_000, rule="stratified", share=0.3, quantile=0.9, recent_probability=0.3,
                        per_condition=20)  # fmt: skip
TASK = Arm(prompts=6, group=20, only_replayed=True, replay=REPLAY, learning_rate=1e-3, sharpness=Sharpness(0.05),
           max_new_tokens=8)  # fmt: skip
ON_POLICY = {"only_replayed": False, "replay": ReplaySettings()}
ARMS = {
    "TB, replay": TASK,
    "TB, on policy": replace(TASK, **ON_POLICY),
    "GRPO, on policy": replace(TASK, objective=Objective("grpo"), **ON_POLICY),
    "RLOO with KL, on policy": replace(TASK, objective=Objective("rloo"), **ON_POLICY),
    "GRPO, replay": replace(TASK, objective=Objective("grpo")),
    "RLOO with KL, replay": replace(TASK, objective=Objective("rloo")),
}
RULES = {
    "uniform": replace(REPLAY, rule="uniform"),
    "softmax of reward": replace(REPLAY, rule="softmax", temperature=0.1),
    "stratified": REPLAY,
}
SEARCHERS = (1, 4, 16)
BETAS = (0.05, 0.2)


def palindromes_folder(seed: int) -> Path:
    folder = WORK / f"palindromes-{seed}"
    if not (folder / "prompts.jsonl").exists():
        make_palindrome_model(folder, seed)
    return folder


def reward(prompts: list[Prompt]) -> VerifierReward:
    return VerifierReward(_batch, prompts, batch=4096, timeout=60.0)


def _batch(prompts: list[dict[str, str]], completions: list[str]) -> list[float]:
    return [palindrome_reward(prompt, completion) for prompt, completion in zip(prompts, completions, strict=True)]


def train(arm: Arm, seed: int, updates: int, searched: int = 1) -> dict[str, object]:
    """`searched`: as many groups are searched for an update as that many searchers would bring."""
    folder = palindromes_folder(seed)
    prompts = read_prompts(folder / "prompts.jsonl")
    trainer = new_trainer(folder, prompts, [], reward, arm, updates, seed)
    trainer.training = replace(trainer.training, batch_size=trainer.training.batch_size * searched)
    found: set[tuple[int, str]] = set()
    first_hit = None
    collect = trainer.search.collect

    def watched(count, exploration):  # type: ignore[no-untyped-def]
        nonlocal first_hit
        batch = collect(count, exploration)
        right = (batch.log_reward > 0).nonzero()[:, 0]
        if len(right):
            first_hit = trainer.iteration + 1 if first_hit is None else first_hit
            texts = trainer.policy.objects(batch.select(right))
            found.update(zip(batch.condition[right, 0].int().tolist(), map(str, texts), strict=True))
        return batch

    trainer.search.collect = watched  # type: ignore[method-assign]
    began = time.process_time()
    for _ in range(updates):
        trainer.update()
    seconds = time.process_time() - began
    trainer.search.close()
    return answers_of(trainer, len(prompts)) | {
        "seed": seed, "updates": updates, "found": len(found), "first_hit": first_hit, "cpu_seconds": seconds,
    }  # fmt: skip


def answers_of(trainer: Trainer, prompts: int) -> dict[str, object]:
    drawn = draw(trainer, 0, prompts, EACH)
    right = (drawn.log_reward > 0).view(prompts, EACH)
    texts = [str(text) for text in trainer.policy.objects(drawn)]
    hits = {(n // EACH, text) for n, text in enumerate(texts) if right.flatten()[n]}
    at = pass_at_k(right.double().numpy())
    return {
        "success": float(right.float().mean()),
        "distinct": len(hits),
        "prompts_solved": len({prompt for prompt, _ in hits}),
        "pass_at": {k: at[k - 1] for k in (1, 4, 16, 64)},
    }


def one(kind: str, name: str, seed_given: str, updates_given: str) -> dict[str, object]:
    torch.set_num_threads(1)
    seed, updates = int(seed_given), int(updates_given)
    if kind == "diversity":
        return {"arm": name, **train(ARMS[name], seed, updates)}
    if kind == "sparse":
        rule, _, number = name.rpartition("/")
        searchers = int(number)
        replay = replace(RULES[rule], capacity=REPLAY.capacity * searchers)
        return {"rule": rule, "searchers": searchers, **train(replace(TASK, replay=replay), seed, updates, searchers)}
    lag, recent, beta = name.split("/")
    search = SearchSettings(runtime="virtual", searchers=1, lag=int(lag), staleness=10_000)
    arm = replace(TASK, search=search, replay=replace(REPLAY, recent_probability=float(recent)),
                  sharpness=Sharpness(float(beta)))  # fmt: skip
    return {"lag": int(lag), "recent": float(recent), "beta": float(beta), **train(arm, seed, updates)}


def jobs_of(options: argparse.Namespace) -> list[list[str]]:
    names = {
        "diversity": options.arms,
        "sparse": [f"{rule}/{n}" for rule in RULES for n in SEARCHERS],
        "staleness": [f"{lag}/{recent}/{beta}" for beta in BETAS for recent in options.recent for lag in options.lags],
    }[options.what]
    return [[name, str(seed), str(options.updates)] for seed in options.seeds for name in names]


def report() -> None:
    parts = [
        f"# Many right answers, sparse rewards\n\n{(__doc__ or '').split('report', 1)[1].strip()}\n\n"
        f"An update learns from {TASK.prompts} x {TASK.group} completions. Mean and 95 % interval over seeds."
    ]
    for kind, write in (("diversity", _diversity), ("sparse", _sparse), ("staleness", _staleness)):
        if content := measured(kind):
            title, text = write(content["runs"])
            parts.append(f"## {title}\n\n{made_by(content)} {_updates(content['runs'])}\n\n{text}")
    (RESULTS / "language-diversity.md").write_text("\n\n".join(parts) + "\n")


def _updates(runs: list[dict[str, Any]]) -> str:
    each = sorted({run.get("updates", UPDATES) for run in runs})
    return f"{' or '.join(map(str, each))} updates a run."


def _diversity(runs: list[dict[str, Any]]) -> tuple[str, str]:
    rows = []
    for name in dict.fromkeys(run["arm"] for run in runs):
        mine = [run for run in runs if run["arm"] == name]
        at = [plus_minus([run["pass_at"][k] for run in mine]) for k in ("1", "4", "16", "64")]
        distinct = plus_minus([run["distinct"] for run in mine], 1)
        found = plus_minus([run["found"] for run in mine], 0)
        rows.append(f"| {name} | {len(mine)} | {' | '.join(at)} | {distinct} | {found} |")
    return (
        "Diversity",
        f"""\
{EACH} completions of each prompt after training: pass@k, and how many of the {MODES} different right answers are among
them; "found" counts those that search met on the way.

| arm | seeds | pass@1 | pass@4 | pass@16 | pass@64 | different right answers | found |
|---|---|---|---|---|---|---|---|
{chr(10).join(rows)}""",
    )


def _sparse(runs: list[dict[str, Any]]) -> tuple[str, str]:
    rows, back, recent = [], REPLAY.capacity // (TASK.prompts * TASK.group), REPLAY.recent_probability
    for rule in RULES:
        for n in SEARCHERS:
            mine = [run for run in runs if run["rule"] == rule and run["searchers"] == n]
            if not mine:
                continue
            hits = [run["first_hit"] or run["updates"] for run in mine]
            rows.append(
                f"| {rule} | {n} | {len(mine)} | {plus_minus(hits, 1)} | {plus_minus([r['found'] for r in mine], 0)} "
                f"| {plus_minus([r['success'] for r in mine])} | {plus_minus([r['distinct'] for r in mine], 1)} |"
            )
    return (
        "Sparse reward and more searchers",
        f"""\
The learner's budget is fixed; with n searchers, n times as many completions are searched in the time of an update, and
the replay holds n times as many: it looks {back} updates back, or further, since it keeps one of equal completions.
Found: by search, on the way; drawn: in {EACH} completions of each prompt. Under every rule a group is recent with
probability m = {recent:g}.

| rule of the replay | searchers | seeds | update of the first hit | right answers found | success | different drawn |
|---|---|---|---|---|---|---|
{chr(10).join(rows)}""",
    )


def _success_of_target(beta: float) -> float:
    """Of pi_ref exp(r / beta) / Z, where pi_ref writes every string equally often."""
    right = RIGHT * math.exp(1 / beta)
    return right / (right + 1 - RIGHT)


def _staleness(runs: list[dict[str, Any]]) -> tuple[str, str]:
    parts, lags_run = [], sorted({run["lag"] for run in runs})
    for beta in BETAS:
        rows = []
        for recent in sorted({run["recent"] for run in runs}):
            cells = []
            for lag in lags_run:
                mine = [r for r in runs if (r["lag"], r["recent"], r["beta"]) == (lag, recent, beta)]
                success, distinct = [r["success"] for r in mine], [float(r["distinct"]) for r in mine]
                cells.append(f"{plus_minus(success)} ({plus_minus(distinct, 0)})" if mine else "")
            rows.append(f"| {recent:g} | {' | '.join(cells)} |")
        lags = " | ".join(f"lag {lag}" for lag in lags_run)
        head = f"beta = {beta:g} (success of the exact target: {_success_of_target(beta):.2f})"
        parts.append(f"{head}\n\n| m | {lags} |\n|---|{'---|' * len(lags_run)}\n" + "\n".join(rows))
    return (
        "Staleness",
        "Success (different right answers) when searchers have weights that are so many updates old, by the share m\n"
        "of groups that are recent, for two beta; "
        f"{len({run['seed'] for run in runs})} seeds. Searchers in virtual time.\n\n" + "\n\n".join(parts),
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=["diversity", "sparse", "staleness", "report", "one"])
    parser.add_argument("one", nargs="*", help=argparse.SUPPRESS)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2, 3, 4])
    parser.add_argument("--arms", nargs="+", choices=list(ARMS), default=list(ARMS), help="of diversity")
    parser.add_argument("--lags", type=int, nargs="+", default=[1, 5, 20, 50], help="of staleness")
    parser.add_argument("--recent", type=float, nargs="+", default=[0.0, 0.3, 0.7, 1.0], help="m, of staleness")
    parser.add_argument("--updates", type=int, default=UPDATES)
    options = parser.parse_args()
    if options.what == "one":
        print(json.dumps(one(*options.one)))
        return
    if options.what != "report":
        torch.set_num_threads(1)
        measure(options.what, jobs_of(options), one)
    report()


if __name__ == "__main__":
    main()
