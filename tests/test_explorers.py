"""Thompson sampling, the adaptive teacher and local search in the training loop: who draws, who learns what, resume."""

from __future__ import annotations

import math
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import Tensor

from headwater.conditions import InverseTemperature, NoCondition
from headwater.environments.hypergrid import Hypergrid, HypergridReward
from headwater.evaluation import ExactDistribution
from headwater.objectives import Name, Objective, trajectory_residual
from headwater.policies import EnvironmentPolicy, Exploration, Network, RelativePolicy
from headwater.policies.environment_policy import Backward
from headwater.replay import ReplaySettings
from headwater.reward import TemperedReward
from headwater.runs import Run
from headwater.search import LocalSearch, Teacher, TeacherSettings, Thompson, ThompsonSettings
from headwater.search.teacher import teacher_log_reward
from headwater.training import ExplorationSettings, NonFiniteLoss, Trainer, Training
from headwater.trajectories import Trajectories
from helpers import random_policy, same, seeded

KINDS = {
    "local search": ExplorationSettings(local_search=LocalSearch(3)),
    "greedy": ExplorationSettings(local_search=LocalSearch(3, accept="greedy")),
    "thompson": ExplorationSettings(thompson=ThompsonSettings(4)),
    "teacher": ExplorationSettings(teacher=TeacherSettings(0.5)),
    "teacher, average, local search": ExplorationSettings(
        average=0.9, teacher=TeacherSettings(0.5, alpha=0.5), local_search=LocalSearch(1)
    ),
}
every_kind = pytest.mark.parametrize("exploration", KINDS.values(), ids=KINDS.keys())
SHORT = Training(iterations=30, batch_size=8, replayed=8, checkpoint_every=7, learning_rate=1e-2)


@pytest.fixture(autouse=True)
def _one_thread() -> None:
    torch.set_num_threads(1)
    torch.manual_seed(0)


def grid_policy(backward: Backward = "learned", condition_size: int = 0) -> EnvironmentPolicy:
    return EnvironmentPolicy(Hypergrid(2, 6), Network(width=64), backward, condition_size)


def grid_reward() -> HypergridReward:
    return HypergridReward(6, r0=0.05)


def trainer_of(
    exploration: ExplorationSettings,
    training: Training = SHORT,
    name: Name = "tb",
    seed: int = 0,
    run: Run | None = None,
) -> Trainer:
    torch.manual_seed(seed)
    replay = ReplaySettings(50, "rank")
    return Trainer(
        grid_policy(), grid_reward(), NoCondition(), Objective(name), training, exploration, replay, seed, run
    )


def everything(trainer: Trainer) -> dict[str, Tensor]:
    parts = trainer.checkpoint().tensors
    return {f"{part}/{name}": tensor.clone() for part, tensors in parts.items() for name, tensor in tensors.items()}


@every_kind
def test_a_run_stopped_and_resumed_ends_bit_for_bit_as_one_that_never_was(
    tmp_path: Path, exploration: ExplorationSettings
) -> None:
    whole = trainer_of(exploration)
    whole.run(progress_bar=False)
    first = trainer_of(exploration, run=Run.create(tmp_path / "run", "test", {}, ["test"], seed=0))
    for _ in range(17):
        first.update()
        if first.iteration == 14:
            first.save()
    checkpoint = Run.open(tmp_path / "run").latest_checkpoint()
    assert checkpoint is not None
    second = trainer_of(exploration, seed=99)  # other weights, other random numbers: all must come from the checkpoint
    second.restore(checkpoint)
    second.run(progress_bar=False)
    left, right = everything(second), everything(whole)
    assert left.keys() == right.keys()
    assert [name for name in left if not torch.equal(left[name], right[name])] == []
    assert second.search.drawn == whole.search.drawn == 30 * 8


@pytest.mark.parametrize("kind", ["local search", "thompson", "teacher"])
def test_searching_so_the_sampler_reaches_the_exact_distribution(kind: str) -> None:
    trainer = trainer_of(KINDS[kind], Training(iterations=350, batch_size=32, learning_rate=1e-2))
    trainer.run(progress_bar=False)
    exact = ExactDistribution(Hypergrid(2, 6), grid_reward())
    assert exact.compare(trainer.sampler)["total_variation"] < 0.06


@pytest.mark.parametrize("name", ["vargrad", "db", "mdb", "subtb", "flsubtb"])
@pytest.mark.parametrize("kind", ["local search", "thompson", "teacher"])
def test_every_objective_trains_with_every_search(kind: str, name: Name) -> None:
    trainer = trainer_of(KINDS[kind], replace(SHORT, iterations=10), name)
    trainer.run(progress_bar=False)
    assert all(torch.isfinite(parameter).all() for parameter in trainer.policy.parameters())


@pytest.mark.parametrize("kind", ["local search", "thompson", "teacher"])
def test_every_search_works_under_conditions(kind: str) -> None:
    policy, reward = grid_policy(condition_size=1), TemperedReward(grid_reward())
    conditions, training = InverseTemperature(0.5, 2.0), replace(SHORT, group_size=2, iterations=10)
    trainer = Trainer(policy, reward, conditions, Objective("vargrad"), training, KINDS[kind])
    trainer.run(progress_bar=False)
    batch = trainer.search.collect(8, Exploration())
    assert torch.equal(batch.log_reward, reward(policy.objects(batch), batch.condition))


@pytest.mark.parametrize("kind", ["thompson", "teacher"])
def test_the_logged_loss_is_the_objectives_alone(kind: str) -> None:
    trainer = trainer_of(KINDS[kind], replace(SHORT, replayed=0, log_every=1))
    drawn = trainer.search.collect(8, Exploration())
    trainer.search.collect = lambda count, exploration: drawn  # type: ignore[method-assign]
    expected = trainer.objective(trainer.policy.log_probs(drawn), drawn).item()
    assert trainer.update()["loss"] == pytest.approx(expected, rel=1e-5)


def test_an_explorers_loss_that_is_not_finite_ends_the_run() -> None:
    trainer = trainer_of(KINDS["thompson"])
    assert trainer.explorer is not None
    trainer.explorer.loss = lambda *given: torch.tensor(math.nan)  # type: ignore[method-assign]
    with pytest.raises(NonFiniteLoss, match="loss nan"):
        trainer.update()


# Thompson sampling.


def thompson(policy: EnvironmentPolicy, **settings: float) -> Thompson:
    explorer = Thompson(policy, ThompsonSettings(**{"heads": 3, **settings}))  # type: ignore[arg-type]
    torch.nn.init.normal_(explorer.own.learnt.weight, std=0.5)
    return explorer


def test_one_head_draws_a_trajectory_from_beginning_to_end() -> None:
    policy = random_policy(Hypergrid(2, 5))
    explorer = thompson(policy)
    drawn = explorer.sample(torch.empty(300, 0), Exploration(), seeded(1))
    states, actions = drawn.steps["state"], drawn.steps["action"]
    with torch.no_grad():
        logits = explorer.own(policy.hidden(drawn), states)
    mask = policy.environment.forward_mask(states)[:, None]
    every = logits.masked_fill(~mask, -torch.inf).log_softmax(2)
    taken = every.gather(2, actions[:, None, None].expand(-1, 3, 1))[:, :, 0]
    by_head = torch.stack([drawn.sum(column) for column in taken.unbind(1)])
    distance = (by_head - drawn.log_behaviour).abs()
    assert distance.min(0).values.max() < 1e-3
    chosen = distance.argmin(0)
    assert torch.bincount(chosen[drawn.lengths > 2], minlength=3).min() > 10


def test_heads_learn_the_objective_of_their_bootstrap_and_leave_the_sampler_its_own() -> None:
    policy = random_policy(Hypergrid(2, 5))
    batch = policy.sample(torch.empty(40, 0), Exploration(), seeded(2))
    batch = batch.with_log_reward(HypergridReward(5)(policy.objects(batch), batch.condition))
    explorer = thompson(policy, bootstrap=1.0)
    log_probs = policy.log_probs(batch)
    loss = explorer.loss(Objective("tb"), log_probs, batch, seeded(3))
    logits = explorer.own(policy.hidden(batch), batch.steps["state"])
    every = logits.masked_fill(~policy.environment.forward_mask(batch.steps["state"])[:, None], -1e9).log_softmax(2)
    expected = [
        trajectory_residual(
            replace(log_probs, forward=every[:, head].gather(1, batch.steps["action"][:, None])[:, 0]), batch
        ).square().mean()
        for head in range(3)
    ]  # fmt: skip
    torch.testing.assert_close(loss, torch.stack(expected).mean())
    loss.backward()  # type: ignore[no-untyped-call]
    assert policy.heads.weight.grad is None
    assert policy.log_z.grad is None
    assert explorer.own.learnt.weight.grad is not None
    assert explorer.own.prior.weight.grad is None
    some = thompson(policy, bootstrap=0.3).loss(Objective("tb"), policy.log_probs(batch), batch, seeded(3))
    assert not torch.isclose(some, loss)
    assert thompson(policy, bootstrap=1e-9).loss(Objective("tb"), log_probs, batch, seeded(3)) == 0


def test_priors_make_heads_differ_and_are_of_the_scale_that_is_asked_for() -> None:
    policy = random_policy(Hypergrid(2, 5))
    states = ExactDistribution(Hypergrid(2, 5), HypergridReward(5)).states
    hidden = torch.zeros(len(states), policy.heads.weight.shape[0])
    heads = Thompson(policy, ThompsonSettings(200, prior=2.0)).own
    torch.nn.init.zeros_(heads.learnt.bias)
    logits = heads(hidden, states).detach()
    assert float(logits.std(1).mean()) == pytest.approx(2.0, rel=0.1)
    without = Thompson(policy, ThompsonSettings(5, prior=0.0)).own
    torch.nn.init.zeros_(without.learnt.bias)
    assert without(hidden, states).abs().max() == 0


# The adaptive teacher.


def test_the_teacher_weighs_what_is_drawn_too_rarely_twenty_times() -> None:
    delta = torch.tensor([0.0, 2.0, -2.0])
    log_reward = torch.tensor([0.0, 1.0, -1.0])
    expected = [math.log(1e-3), math.log(80.001), math.log(4.001)]
    torch.testing.assert_close(teacher_log_reward(delta, log_reward, 0.0), torch.tensor(expected))
    mixed = torch.tensor(expected) + 0.5 * log_reward
    torch.testing.assert_close(teacher_log_reward(delta, log_reward, 0.5), mixed)


def scored_everywhere(policy: EnvironmentPolicy) -> Trajectories:
    exact = ExactDistribution(policy.environment, grid_reward())
    batch = policy.sample_to(exact.states, torch.empty(len(exact.states), 0), seeded(4))
    return batch.with_log_reward(grid_reward()(policy.objects(batch), batch.condition))


def test_the_teacher_learns_to_draw_where_the_student_draws_too_rarely() -> None:
    """A student that never leaves the lower half of the first axis, and is right there, has that half to learn."""
    trainer = trainer_of(ExplorationSettings(), Training(iterations=300, batch_size=32, learning_rate=1e-2))
    trainer.run(progress_bar=False)
    student = trainer.policy
    assert isinstance(student, EnvironmentPolicy)
    student.zero_grad()
    teacher = Teacher(student, TeacherSettings(1.0))
    batch = scored_everywhere(student)
    is_far = student.final_states(batch)[:, 0] >= 3
    with torch.no_grad():
        true = student.log_probs(batch)
        missing = torch.where(is_far[batch.index] & (batch.steps["action"] == 2), -5.0, 0.0)
    forgetful = replace(true, forward=true.forward + missing)
    optimizer = torch.optim.Adam(teacher.own.parameters(), lr=1e-2)
    for _ in range(200):
        loss = teacher.loss(Objective("tb"), forgetful, batch, seeded(0))
        optimizer.zero_grad()
        loss.backward()  # type: ignore[no-untyped-call]
        optimizer.step()
    drawn = teacher.sample(torch.empty(500, 0), Exploration(), seeded(5))
    assert (student.final_states(drawn)[:, 0] >= 3).float().mean() > 0.95
    assert all(parameter.grad is None or not parameter.grad.any() for parameter in student.parameters())


@pytest.mark.parametrize(("share", "expected"), [(0.0, 0), (1.0, 400), (0.25, 100)])
def test_the_teacher_draws_its_share_for_the_rows_that_it_was_given(share: float, expected: int) -> None:
    student = grid_policy(condition_size=1)
    teacher = Teacher(student, TeacherSettings(share))
    with torch.no_grad():
        teacher.own.heads.bias[:3] = torch.tensor([-50.0, -50.0, 50.0])  # exits at once
        student.heads.bias[:3] = torch.tensor([50.0, 0.0, -50.0])  # never does
    condition = torch.rand(400, 1)
    drawn = teacher.sample(condition, Exploration(), seeded(6))
    assert torch.equal(drawn.condition, condition)
    assert abs(int((drawn.lengths == 1).sum()) - expected) <= (30 if 0 < share < 1 else 0)


# Settings.


def test_with_everything_off_nobody_but_the_policy_draws() -> None:
    plain = trainer_of(ExplorationSettings())
    assert plain.explorer is None
    batch = plain.search.collect(8, Exploration())
    assert same(batch.with_log_reward(torch.zeros(8)), drawn_by_policy(plain).with_log_reward(torch.zeros(8)))
    assert "explorer" not in plain.checkpoint().tensors


def drawn_by_policy(trainer: Trainer) -> Trajectories:
    return trainer.policy.sample(torch.empty(8, 0), Exploration(), seeded(0))


def test_settings_that_contradict_each_other_are_refused() -> None:
    heads, teacher = ThompsonSettings(4), TeacherSettings(0.5)
    with pytest.raises(ValueError, match=r"thompson.heads = 4: must be 0 where teacher.share"):
        ExplorationSettings(thompson=heads, teacher=teacher)
    with pytest.raises(ValueError, match=r"thompson.heads = 4: must be 0 where average"):
        ExplorationSettings(thompson=heads, average=0.9)


@every_kind
def test_policies_and_sources_that_cannot_be_searched_so_are_refused(exploration: ExplorationSettings) -> None:
    relative = RelativePolicy(grid_policy())
    said = "RelativePolicy has no local search" if exploration.local_search.rounds else "policy over an environment"
    with pytest.raises(ValueError, match=said):
        Trainer(relative, grid_reward(), NoCondition(), Objective(), SHORT, exploration)
    given = torch.zeros(3, 2, dtype=torch.int32)
    with pytest.raises(ValueError, match="given objects"):
        Trainer(grid_policy(), grid_reward(), NoCondition(), Objective(), SHORT, exploration, given=given)


@pytest.mark.parametrize(
    ("settings", "field", "value"),
    [
        (ThompsonSettings, "heads", -1),
        (ThompsonSettings, "bootstrap", 0.0),
        (ThompsonSettings, "prior", -1.0),
        (TeacherSettings, "share", 1.5),
        (TeacherSettings, "alpha", -0.1),
    ],
)
def test_an_illegal_setting_is_named(settings: type, field: str, value: float) -> None:
    with pytest.raises(ValueError, match=f"{field} = {value}"):
        settings(**{field: value})
