"""Figures of language policies: pass@k and the rest as they are defined, and nothing of the run disturbed."""

from __future__ import annotations

import json
from itertools import combinations
from math import nan
from pathlib import Path

import numpy as np
import pytest
import torch

from headwater.language import evaluation
from headwater.language.backbone import Backbone
from headwater.language.evaluation import (
    draw,
    figures,
    figures_of,
    held_out_conditions,
    mean_cosine_distance,
    pass_at_k,
    quick_figures,
    win_rate,
)
from headwater.language.generation import Sampling
from headwater.language.loading import load_model
from headwater.runs import Run
from headwater.sampler import Sampler
from language_evaluation_helpers import Scripted, generated, make_recipe, policy_of


def test_pass_at_k_is_the_share_of_sets_of_k_that_hold_a_right_one() -> None:
    reward = np.array([[1, 0, 0, 1, 0], [0, 0, 0, 0, 1], [0, 0, 0, 0, 0], [1, 1, 1, 1, 1]], dtype=float)
    for k, found in enumerate(pass_at_k(reward), 1):
        by_hand = [np.mean([max(chosen) for chosen in combinations(row, k)]) for row in reward.tolist()]
        assert found == pytest.approx(np.mean(by_hand))
    assert len(pass_at_k(reward)) == 5


def test_completions_that_were_not_judged_do_not_count_in_pass_at_k() -> None:
    judged = pass_at_k(np.array([[1, 0, nan, nan], [0, 0, 1, nan]]))
    assert judged == pytest.approx([(1 / 2 + 1 / 3) / 2, (1 + 2 / 3) / 2, 1])  # the first has no three
    assert pass_at_k(np.full((2, 3), nan)) == []


def test_win_rate_counts_a_draw_as_half_and_leaves_out_what_cannot_be_compared() -> None:
    reward = np.array([[1.0, 3.0, 2.0], [5.0, nan, 4.0], [1.0, 1.0, 1.0]])
    assert win_rate(reward, np.array([2.0, 9.0, nan])) == pytest.approx((0 + 1 + 0.5 + 0 + 0) / 5)


def test_mean_cosine_distance_is_that_of_all_pairs() -> None:
    states = torch.randn(3, 5, 7, generator=torch.Generator().manual_seed(0))
    pairs = [
        1 - torch.cosine_similarity(of_prompt[a], of_prompt[b], dim=0)
        for of_prompt in states
        for a, b in combinations(range(5), 2)
    ]
    assert mean_cosine_distance(states) == pytest.approx(float(torch.stack(pairs).mean()), abs=1e-6)


def test_figures_of_known_completions(tmp_path: Path) -> None:
    recipe = make_recipe(tmp_path)
    policy, start = policy_of(recipe), Backbone(load_model(recipe.model, torch.device("cpu")))
    # Held out are 0= and, of the eleventh line, 0= again.
    texts = ["0.", "0.", "0=0.", "7777", "3.", "1.", "1.", "0<>&"]
    found = figures_of(policy, drawn := draw(recipe, policy, Scripted(texts), start), verdicts=True)
    assert [str(text) for text in drawn.completions] == [text.removesuffix(".") for text in texts]
    assert drawn.reward.tolist() == [[1, 1, 1, 0], [0, 0, 0, 1]]
    assert found["pass_at_k"] == pytest.approx([0.5, (1 + 1 / 2) / 2, (1 + 3 / 4) / 2, 1])
    assert (found["pass_at_1"], found["pass_at_4"]) == (found["pass_at_k"][0], 1)  # type: ignore[index]
    assert found["distinct_completions"] == 3
    assert found["distinct_right_completions"] == (2 + 1) / 2
    assert found["mean_reward"] == 0.5
    assert found["mean_reward_error"] == pytest.approx(0.25)  # of 3/4 and 1/4: 0.3536 / sqrt(2)
    assert found["truncated"] == 2 / 8
    assert found["mean_length"] == pytest.approx((2 + 2 + 4 + 4 + 2 + 2 + 2 + 4) / 8)
    assert found["entropy_per_token"] == pytest.approx(0.5)

    log_start, states = [], []
    for number, text in enumerate(texts):
        prompt, tokens = policy.prompts[[10, 11][number // 4]], torch.tensor(generated(text).tokens)
        with torch.no_grad():
            logits = start.model(torch.cat([prompt, tokens])[None]).logits[0, len(prompt) - 1 : -1]
            states.append(start.model.base_model(tokens[None]).last_hidden_state[0].mean(0))
        log_start.append(torch.log_softmax(logits, 1).gather(1, tokens[:, None])[:, 0])
    divergence = np.mean([float(-0.5 * len(log) - log.sum()) for log in log_start])
    assert found["divergence"] == pytest.approx(divergence, rel=1e-4)
    assert found["start_perplexity"] == pytest.approx(float(torch.exp(-torch.cat(log_start).mean())), rel=1e-4)
    distance = mean_cosine_distance(torch.stack(states).reshape(2, 4, -1))
    assert found["embedding_distance"] == pytest.approx(distance, abs=1e-5)


def test_a_policy_that_has_learnt_nothing_has_the_figures_of_its_start(tmp_path: Path) -> None:
    recipe = make_recipe(tmp_path)
    run = Run.create(tmp_path / "run", "language", {}, [], 0)
    found = figures(recipe, run, Sampler(recipe, recipe.problem()))
    for name in ("mean_reward", "pass_at_k", "distinct_completions", "truncated", "entropy_per_token"):
        assert found[name] == found[f"start/{name}"]
    assert found["divergence"] == pytest.approx(0, abs=1e-5)
    assert found["start_perplexity"] > 0  # type: ignore[operator]
    shown = run.read_json("completions.json")["prompts"]
    assert isinstance(shown, list)
    assert [entry["answer"] for entry in shown] == ["0", "0"]
    for entry in shown:
        assert entry["before"] == entry["after"]
        assert sum(one["times"] for one in entry["after"]) <= recipe.completions


def test_figures_are_of_the_policy_and_not_of_the_start_once_they_differ(tmp_path: Path) -> None:
    recipe = make_recipe(tmp_path, completions=8)
    problem = recipe.problem()
    with torch.no_grad():
        problem.policy.backbone.model.get_output_embeddings().weight[3] += 5  # type: ignore[union-attr, operator]
    found = figures(recipe, Run.create(tmp_path / "run", "language", {}, [], 0), Sampler(recipe, problem))
    assert found["divergence"] > 0.5  # type: ignore[operator]
    assert found["entropy_per_token"] != found["start/entropy_per_token"]


def test_quick_figures_are_of_one_completion_a_prompt(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    recipe = make_recipe(tmp_path)
    monkeypatch.setattr(evaluation, "ModelGenerator", lambda *_: Scripted(["0.", "1234"]))
    found = quick_figures(recipe, policy_of(recipe))
    assert found == {"mean_reward": 0.5, "pass_at_1": 0.5, "mean_length": 3, "truncated": 0.5}


def test_quick_figures_leave_all_random_numbers_alone_and_repeat_theirs(tmp_path: Path) -> None:
    recipe = make_recipe(tmp_path, sampling=Sampling(max_new_tokens=12))
    policy = policy_of(recipe)
    before = torch.get_rng_state()
    first = quick_figures(recipe, policy)
    assert torch.equal(torch.get_rng_state(), before)
    assert quick_figures(recipe, policy) == first


def test_rewards_that_grade_have_no_pass_at_k(tmp_path: Path) -> None:
    recipe = make_recipe(tmp_path, reward="my_rewards:graded")
    recipe.__dict__["base_reward"] = lambda objects, condition: torch.tensor(
        [0.3 * (1 + len(text)) for text in objects]
    )
    policy, start = policy_of(recipe), Backbone(load_model(recipe.model, torch.device("cpu")))
    assert not any("pass" in name for name in quick_figures(recipe, policy))
    drawn = draw(recipe, policy, Scripted(["0.", "00.", "000.", "0."] * 2), start)
    found = figures_of(policy, drawn, evaluation.are_verdicts(recipe, drawn.reward))
    assert found["mean_reward"] == pytest.approx(0.3 * 11 / 4)
    assert not any("pass" in name or "right" in name for name in found)


def test_the_preferred_completions_of_the_data_are_what_wins_are_counted_against(tmp_path: Path) -> None:
    lines = [{"prompt": f"{n % 10}=", **({"chosen": "00"} if n == 0 else {})} for n in range(12)]
    (tmp_path / "pairs.jsonl").write_text("\n".join(map(json.dumps, lines)))
    recipe = make_recipe(tmp_path, prompts=tmp_path / "pairs.jsonl", reward="preference", reward_model="none")
    recipe.__dict__["base_reward"] = lambda objects, condition: torch.tensor([float(len(text)) for text in objects])
    found = figures(recipe, Run.create(tmp_path / "run", "language", {}, [], 0), Sampler(recipe, recipe.problem()))
    policy = policy_of(recipe)
    start = Backbone(load_model(recipe.model, torch.device("cpu")))
    drawn = draw(recipe, policy, evaluation.ModelGenerator(policy.backbone, policy.tokenizer), start)
    assert found["win_rate"] == np.mean([(np.sign(len(text) - 2) + 1) / 2 for text in drawn.of(0)])


def test_where_every_reward_failed_there_are_figures_all_the_same(tmp_path: Path) -> None:
    recipe = make_recipe(tmp_path)
    recipe.__dict__["base_reward"] = lambda objects, condition: torch.full((len(objects),), nan)
    run = Run.create(tmp_path / "run", "language", {}, [], 0)
    run.write_json("evaluation.json", figures(recipe, run, Sampler(recipe, recipe.problem())))
    assert run.evaluation()["mean_reward"] is None
    assert run.evaluation()["failed_completions"] == 8


def test_prompts_that_are_measured_on_are_held_out_and_spread_evenly(tmp_path: Path) -> None:
    recipe = make_recipe(tmp_path)
    assert held_out_conditions(recipe, 100)[:, 0].tolist() == [10, 11]
    assert held_out_conditions(recipe, 0)[:, 0].tolist() == [10, 11]
    assert held_out_conditions(recipe, 1)[:, 0].tolist() == [10]
