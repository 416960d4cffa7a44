"""Policy gradients and the forms of vargrad against formulas written out, and the identity that ties them."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from torch import Tensor

from headwater.objectives import STEP_BEHAVIOUR, Objective, others_mean
from headwater.policies.base import LogProbs
from headwater.training import Sharpness
from headwater.trajectories import Trajectories
from helpers import seeded

GROUPS = [0, 1, 0, 0, 1, 2, 1, 0]
"""Interleaved, of different sizes, one of them with a single member."""


def batch_of(groups: list[int] = GROUPS, seed: int = 0) -> Trajectories:
    generator, count = seeded(seed), len(groups)
    lengths = torch.randint(1, 6, (count,), generator=generator)
    behaviour = -torch.rand(int(lengths.sum()), generator=generator)
    return Trajectories(
        steps={STEP_BEHAVIOUR: behaviour},
        lengths=lengths,
        condition=torch.tensor(groups).float()[:, None],
        log_reward=torch.randn(count, generator=generator) * 2,
        log_behaviour=torch.zeros(count).index_add(0, torch.repeat_interleave(lengths), behaviour),
        version=torch.zeros(count, dtype=torch.int64),
        identity=torch.arange(count),
    )


def said_of(batch: Trajectories, forward: Tensor | None = None) -> LogProbs:
    generator = seeded(9)
    reference = -torch.rand(batch.n_steps, generator=generator)
    ours = -torch.rand(batch.n_steps, generator=generator) if forward is None else forward.clone()
    return LogProbs(ours.requires_grad_(), reference, torch.zeros(len(batch)))


def gradient_of(objective: Objective, batch: Trajectories, forward: Tensor | None = None) -> Tensor:
    said = said_of(batch, forward)
    return torch.autograd.grad(objective(said, batch), said.forward)[0]


def rows(batch: Trajectories) -> list[list[int]]:
    return [[row for row in range(batch.n_steps) if int(batch.index[row]) == one] for one in range(len(batch))]


def test_rloo_weighs_each_log_prob_by_the_score_less_the_mean_of_the_others() -> None:
    batch = batch_of()
    reference, places = said_of(batch).backward, rows(batch)
    score = []
    for one, steps in enumerate(places):
        drawn = sum(float(batch.steps[STEP_BEHAVIOUR][step]) for step in steps)
        score.append(float(batch.log_reward[one]) - drawn + sum(float(reference[step]) for step in steps))
    expected = torch.zeros(batch.n_steps)
    for one, steps in enumerate(places):
        others = [score[other] for other, group in enumerate(GROUPS) if group == GROUPS[one] and other != one]
        advantage = score[one] - sum(others) / len(others) if others else 0.0
        expected[steps] = -advantage / len(GROUPS)
    torch.testing.assert_close(gradient_of(Objective("rloo"), batch), expected, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("divergence", [0.0, 0.3])
def test_grpo_clips_ratios_and_standardises_rewards_by_group(divergence: float) -> None:
    batch = batch_of()
    said = said_of(batch)
    places, total, clipped = rows(batch), 0.0, 0
    for one, steps in enumerate(places):
        mates = torch.tensor([float(batch.log_reward[k]) for k, group in enumerate(GROUPS) if group == GROUPS[one]])
        spread = float((mates - mates.mean()).square().mean().sqrt())
        advantage = (float(batch.log_reward[one]) - float(mates.mean())) / (spread + 1e-4)
        losses = []
        for step in steps:
            ours, theirs = float(said.forward[step].detach()), float(said.backward[step])
            ratio = torch.tensor(ours - float(batch.steps[STEP_BEHAVIOUR][step])).exp().item()
            limited = min(max(ratio, 0.8), 1.2)
            clipped += limited * advantage < ratio * advantage
            behind = theirs - ours
            losses.append(
                -min(ratio * advantage, limited * advantage)
                + divergence * (torch.tensor(behind).exp().item() - behind - 1)
            )
        total += sum(losses) / len(losses)
    assert clipped > 0
    found = Objective("grpo", divergence=divergence)(said, batch)
    assert float(found.detach()) == pytest.approx(total / len(GROUPS), abs=1e-5)


def test_grpo_asks_for_log_probs_of_every_step_drawn() -> None:
    batch = replace(batch_of(), steps={"token": torch.zeros(batch_of().n_steps)})
    with pytest.raises(ValueError, match="every step it draws"):
        Objective("grpo")(said_of(batch), batch)


def test_on_policy_vargrad_is_reinforce_with_the_divergence_in_the_reward() -> None:
    """gradient = 2 mean((log P_F - log P_B - log R, less its mean) grad log P_F): research of TBA, equation 7."""
    batch = batch_of()
    said = said_of(batch)
    ratio = batch.sum(said.forward.detach() - said.backward)
    score = batch.log_reward - ratio
    advantage = score - torch.stack([score[batch.group == group].mean() for group in batch.group])
    expected = -2 * advantage[batch.index] / len(batch)
    torch.testing.assert_close(gradient_of(Objective("vargrad"), batch), expected, atol=1e-6, rtol=1e-5)
    # and with groups of one size it is rloo's, on policy, but for a factor
    even = batch_of([0, 1, 2] * 4)
    forward = even.steps[STEP_BEHAVIOUR]
    ours, theirs = (gradient_of(Objective(name), even, forward) for name in ("vargrad", "rloo"))
    torch.testing.assert_close(ours, 2 * (1 - 1 / 4) * theirs, atol=1e-6, rtol=1e-5)


def test_contrasts_have_the_same_gradient_but_for_a_factor() -> None:
    size = 4
    batch = batch_of([0, 1, 2] * size)
    mean, others, pairs = (
        gradient_of(Objective("vargrad", contrast=contrast), batch) for contrast in ("mean", "others", "pairs")
    )
    assert mean.abs().max() > 0.1
    factor = size / (size - 1)
    torch.testing.assert_close(others, mean * factor**2, atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(pairs, mean * factor, atol=1e-5, rtol=1e-5)
    alone = batch_of([0, 1, 2])
    for contrast in ("mean", "others", "pairs"):
        assert gradient_of(Objective("vargrad", contrast=contrast), alone).abs().max() == 0  # type: ignore[arg-type]


def test_the_mean_of_the_others_leaves_each_one_out() -> None:
    values, group = torch.tensor([1.0, 10.0, 2.0, 6.0]), torch.tensor([0, 1, 0, 0])
    assert others_mean(values, group).tolist() == [4.0, 10.0, 3.5, 1.5]


@pytest.mark.parametrize("name", ["vargrad", "tb", "rloo", "grpo"])
def test_in_units_of_reward_the_gradient_does_not_depend_on_beta(name: str) -> None:
    """Where policy and reference agree, and behaviour with them, the advantage is that of the reward alone."""
    plain, found = batch_of([0, 1, 2] * 4), []
    reference = said_of(plain).backward
    plain = replace(
        plain, steps={STEP_BEHAVIOUR: reference.clone()}, log_behaviour=plain.sum(reference)
    )  # fmt: skip
    for beta in (0.1, 1.0, 4.0):
        objective, batch = Objective(name), plain.with_log_reward(plain.log_reward / beta)  # type: ignore[arg-type]
        said = said_of(batch, reference)
        loss = objective.in_units_of_reward(objective(said, batch), beta)
        found.append(torch.autograd.grad(loss, said.forward)[0])
    assert found[0].abs().max() > 0.05
    for other in found[1:]:
        torch.testing.assert_close(other, found[0], atol=1e-5, rtol=2e-3)


def test_beta_goes_from_its_start_to_its_end_and_rises_with_staleness() -> None:
    sharpness = Sharpness(1.0, 0.2, until=0.5, per_staleness=0.1)
    assert [round(sharpness.at(progress), 6) for progress in (0, 0.25, 0.5, 1.0)] == [1.0, 0.6, 0.2, 0.2]
    assert sharpness.at(0.5, staleness=5) == pytest.approx(0.3)
    assert Sharpness(0.3).at(0.7) == 0.3
    for field, value in (("beta", 0.0), ("beta_end", -1.0), ("until", 0.0), ("per_staleness", -0.1)):
        with pytest.raises(ValueError, match=f"{field} = "):
            Sharpness(**{field: value})
