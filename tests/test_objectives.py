"""Objectives: zero exactly at the true flows of a small environment, and equal to the formulas written out."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import get_args

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from headwater.environments.base import Environment
from headwater.environments.graph import enumerate_states
from headwater.environments.hypergrid import Hypergrid
from headwater.environments.sequences import Sequences
from headwater.objectives import (
    STEP_REWARD,
    Name,
    Objective,
    path_log_ratio,
    step_residual,
    subtrajectory_residuals,
    trajectory_residual,
    variance_residual,
)
from headwater.policies import LogProbs
from headwater.trajectories import Trajectories
from helpers import every_trajectory, random_policy, seeded

BALANCES = [name for name in get_args(Name) if name not in ("mle", "rloo", "grpo")]
MATTERS = {
    "tb": {"forward", "backward", "log_z", "reward"},
    "vargrad": {"forward", "backward", "reward"},
    "db": {"forward", "backward", "log_flow", "reward"},
    "mdb": {"forward", "backward", "log_exit", "step reward"},
    "subtb": {"forward", "backward", "log_flow", "reward"},
    "fldb": {"forward", "backward", "log_flow", "reward", "step reward"},
    "flsubtb": {"forward", "backward", "log_flow", "reward", "step reward"},
}
PIECES = ["forward", "backward", "log_z", "log_flow", "log_exit", "reward", "step reward"]


def exact_flows(environment: Environment, seed: int = 0) -> tuple[dict[str, Tensor], Trajectories]:
    """Every trajectory of an environment whose every state may exit, under a random reward and uniform P_B, with the
    true log P_F, log P_B, log Z, log F and log P_F(exit), by a sweep from the last states to the first."""
    graph = enumerate_states(environment)
    count = len(graph.states)
    reward = torch.rand(count, generator=seeded(seed), dtype=torch.float64) + 0.1
    parents = torch.bincount(graph.target, minlength=count).double()
    flow = reward.clone()
    for level in reversed(graph.levels):
        flow.index_add_(0, graph.source[level], flow[graph.target[level]] / parents[graph.target[level]])
    batch = every_trajectory(environment)
    row = {tuple(state): number for number, state in enumerate(graph.states.tolist())}
    state = torch.tensor([row[tuple(values)] for values in batch.steps["state"].tolist()])
    is_exit = batch.steps["action"] == environment.exit_action
    after = state.roll(-1)
    backward = torch.where(is_exit, 1.0, 1 / parents[after])
    forward = torch.where(is_exit, reward[state], flow[after] * backward) / flow[state]
    step_reward = reward[state].log().float()
    pieces = {
        "forward": forward.log().float(),
        "backward": backward.log().float(),
        "log_z": flow[0].log().float().expand(len(batch)),
        "log_flow": flow[state].log().float(),
        "log_exit": (reward[state] / flow[state]).log().float(),
    }
    batch = replace(batch, steps={**batch.steps, STEP_REWARD: step_reward})
    return pieces, batch.with_log_reward(step_reward[batch.last])


def loss_of(name: str, pieces: dict[str, Tensor], batch: Trajectories) -> Tensor:
    """The loss, with the flow that the objective asks for: F, or the forward-looking F / R."""
    if name in ("fldb", "flsubtb"):
        pieces = pieces | {"log_flow": pieces["log_flow"] - exact_flows(Hypergrid(2, 3))[1].steps[STEP_REWARD]}
    return Objective(name)(LogProbs(**pieces), batch)  # type: ignore[arg-type]


@pytest.mark.parametrize("name", BALANCES)
def test_the_loss_is_zero_at_the_exact_flows(name: str) -> None:
    pieces, batch = exact_flows(Hypergrid(2, 3))
    assert float(loss_of(name, pieces, batch)) < 1e-10


@pytest.mark.parametrize("name", BALANCES)
@pytest.mark.parametrize("piece", PIECES)
def test_the_loss_is_zero_no_more_when_a_piece_that_matters_is_wrong_anywhere(name: str, piece: str) -> None:
    pieces, batch = exact_flows(Hypergrid(2, 3))
    rows = len(batch) if piece in ("log_z", "reward") else batch.n_steps
    for row in range(rows):
        wrong, changed = dict(pieces), batch
        bump = torch.zeros(rows).index_fill(0, torch.tensor([row]), 0.1)
        if piece == "reward":
            changed = batch.with_log_reward(batch.log_reward + bump)
        elif piece == "step reward":
            changed = replace(batch, steps={**batch.steps, STEP_REWARD: batch.steps[STEP_REWARD] + bump})
        else:
            wrong[piece] = pieces[piece] + bump
        loss = float(loss_of(name, wrong, changed))
        assert (loss > 1e-5) == _matters(name, piece, row, batch), row


def _matters(name: str, piece: str, row: int, batch: Trajectories) -> bool:
    if piece not in MATTERS[name]:
        return False
    if name != "mdb":
        return True
    # modified detailed balance looks at steps between states, not at exit: a trajectory that exits at once says nothing
    at_exit, alone = bool((batch.last == row).any()), bool(batch.lengths[batch.index[row]] == 1)
    return not at_exit if piece in ("forward", "backward") else not alone


@pytest.mark.parametrize("name", [*BALANCES, "mle"])
def test_every_objective_knows_log_z_at_the_exact_flows(name: str) -> None:
    pieces, batch = exact_flows(Hypergrid(2, 3))
    log_z = pieces["log_z"].clone()
    if name in ("fldb", "flsubtb"):
        pieces["log_flow"] = pieces["log_flow"] - batch.steps[STEP_REWARD]
    if name != "tb":
        pieces["log_z"] = torch.full_like(log_z, torch.nan)
    torch.testing.assert_close(Objective(name).log_z(LogProbs(**pieces), batch), log_z, rtol=0, atol=1e-5)


def test_vargrad_estimates_log_z_of_each_condition_apart() -> None:
    (pieces, batch), (other_pieces, other) = exact_flows(Hypergrid(2, 3), 0), exact_flows(Hypergrid(2, 3), 1)
    batch, other = (replace(b, condition=torch.full((len(b), 1), c)) for b, c in ((batch, 0.5), (other, 2.0)))
    both = {name: torch.cat([pieces[name], other_pieces[name]]) for name in pieces}
    log_z = Objective("vargrad").log_z(LogProbs(**both), Trajectories.concatenate([batch, other]))
    torch.testing.assert_close(log_z, both["log_z"], rtol=0, atol=1e-5)
    assert float(log_z[0] - log_z[-1]) != 0


def random_log_probs(batch: Trajectories, seed: int = 0) -> LogProbs:
    generator = seeded(seed)
    per_step = [-torch.rand(batch.n_steps, generator=generator) * 2 for _ in range(4)]
    return LogProbs(per_step[0], per_step[1], torch.randn(len(batch), generator=generator), per_step[2], per_step[3])


def packed(lengths: list[int], seed: int = 0, conditions: list[float] | None = None) -> Trajectories:
    """Trajectories of given lengths whose numbers mean nothing."""
    count, total = len(lengths), sum(lengths)
    generator = seeded(seed)
    return Trajectories(
        steps={STEP_REWARD: torch.randn(total, generator=generator), "row": torch.arange(total)},
        lengths=torch.tensor(lengths),
        condition=torch.tensor(conditions or [0.0] * count)[:, None],
        log_reward=torch.randn(count, generator=generator),
        log_behaviour=torch.zeros(count),
        version=torch.zeros(count, dtype=torch.int64),
        identity=torch.arange(count),
    )


def naive_subtrajectory_loss(log_probs: LogProbs, batch: Trajectories, weight: float, forward_looking: bool) -> float:
    losses = []
    for begin, length, log_reward in zip(batch.starts.tolist(), batch.lengths.tolist(), batch.log_reward, strict=True):
        assert log_probs.log_flow is not None
        rows = slice(begin, begin + length)
        flow = log_probs.log_flow[rows].double()
        if forward_looking:
            flow = flow + batch.steps[STEP_REWARD][rows].double()
        flows = [*flow.tolist(), float(log_reward)]
        ratios = (log_probs.forward[rows].double() - log_probs.backward[rows].double()).tolist()
        total = weights = 0.0
        for i in range(length):
            for j in range(i + 1, length + 1):
                residual = flows[i] + sum(ratios[i:j]) - flows[j]
                total += weight ** (j - i) * residual**2
                weights += weight ** (j - i)
        losses.append(total / weights)
    return sum(losses) / len(losses)


@settings(deadline=None, max_examples=40)
@given(
    st.lists(st.integers(1, 7), min_size=1, max_size=6),
    st.sampled_from([0.5, 0.9, 1.0, 1.9]),
    st.booleans(),
    st.integers(0, 1000),
)
def test_subtb_is_the_weighted_mean_over_all_stretches(
    lengths: list[int], weight: float, looking: bool, seed: int
) -> None:
    batch = packed(lengths, seed)
    log_probs = random_log_probs(batch, seed)
    loss = Objective("flsubtb" if looking else "subtb", subtb_lambda=weight)(log_probs, batch)
    assert float(loss) == pytest.approx(naive_subtrajectory_loss(log_probs, batch, weight, looking), rel=1e-4, abs=1e-6)


@pytest.mark.parametrize("weight", [1e-3, 0.5, 1.9, 50.0])
def test_no_lambda_overflows_on_a_long_trajectory(weight: float) -> None:
    batch = packed([120, 3])
    assert torch.isfinite(Objective("subtb", subtb_lambda=weight)(random_log_probs(batch), batch))


def test_subtb_stretches_lose_no_precision_in_a_large_batch() -> None:
    alone = packed([20] * 2)
    large = Trajectories.concatenate([packed([40] * 3000, seed=1), alone])
    steep = random_log_probs(large, 2)
    steep = replace(steep, forward=steep.forward * 10)
    ends = {"forward": steep.forward[-40:], "backward": steep.backward[-40:], "log_z": steep.log_z[-2:]}
    assert steep.log_flow is not None
    expected = subtrajectory_residuals(LogProbs(**ends, log_flow=steep.log_flow[-40:]), alone)[0]
    residual = subtrajectory_residuals(steep, large)[0]
    torch.testing.assert_close(residual[-len(expected) :], expected, rtol=1e-5, atol=1e-4)


def test_subtb_of_one_step_is_detailed_balance_and_the_longest_stretch_is_tb() -> None:
    batch = packed([4, 1, 6])
    log_probs = random_log_probs(batch)
    residual, length, owner = subtrajectory_residuals(log_probs, batch)
    order = owner[length == 1].argsort(stable=True)
    torch.testing.assert_close(residual[length == 1][order].sort()[0], step_residual(log_probs, batch).sort()[0])
    assert log_probs.log_flow is not None
    whole = residual[length == batch.lengths[owner]]
    expected = trajectory_residual(replace(log_probs, log_z=log_probs.log_flow[batch.starts]), batch)
    torch.testing.assert_close(whole, expected)


def test_detailed_balance_is_written_out_step_by_step() -> None:
    batch = packed([3, 1, 2])
    log_probs = random_log_probs(batch)
    assert log_probs.log_flow is not None
    flow, looking = log_probs.log_flow, log_probs.log_flow + batch.steps[STEP_REWARD]
    for forward_looking, f in ((False, flow), (True, looking)):
        r = batch.log_reward
        after = torch.stack([f[1], f[2], r[0], r[1], f[5], r[2]])
        expected = f + log_probs.forward - log_probs.backward - after
        torch.testing.assert_close(step_residual(log_probs, batch, forward_looking), expected)
        name: Name = "fldb" if forward_looking else "db"
        torch.testing.assert_close(Objective(name)(log_probs, batch), expected.square().mean())


residuals = [-1e4, -3.0, -1.0, -0.3, 0.0, 1e-4, 0.5, 2.0, 1e4]


@pytest.mark.parametrize("delta", [0.25, 1.0, 4.0])
def test_penalties_are_their_formulas(delta: float) -> None:
    values = torch.tensor(residuals)
    squared = Objective(penalty="squared").cost(values)
    huber = Objective(penalty="huber", delta=delta).cost(values)
    log_cosh = Objective(penalty="log-cosh").cost(values)
    for r, s, h, c in zip(residuals, squared.tolist(), huber.tolist(), log_cosh.tolist(), strict=True):
        assert s == pytest.approx(r * r)
        assert h == pytest.approx(r * r / 2 if abs(r) <= delta else delta * (abs(r) - delta / 2))
        expected = math.log(math.cosh(r)) if abs(r) < 100 else abs(r) - math.log(2)
        assert c == pytest.approx(expected, rel=1e-6, abs=1e-6)


@pytest.mark.parametrize("penalty", ["squared", "huber", "log-cosh"])
def test_the_gradient_of_a_penalty_is_finite_and_zero_at_zero(penalty: str) -> None:
    values = torch.tensor(residuals, requires_grad=True)
    Objective(penalty=penalty).cost(values).sum().backward()  # type: ignore[arg-type, no-untyped-call]
    assert values.grad is not None
    assert torch.isfinite(values.grad).all()
    assert float(values.grad[residuals.index(0.0)]) == 0
    assert torch.equal(values.grad.sign(), values.detach().sign())


@pytest.mark.parametrize("name", BALANCES)
def test_the_penalty_reaches_every_balance(name: Name) -> None:
    batch = packed([3, 1, 4])
    log_probs = random_log_probs(batch)
    losses = {
        penalty: float(Objective(name, penalty)(log_probs, batch))  # type: ignore[arg-type]
        for penalty in ("squared", "huber", "log-cosh")
    }
    assert losses["huber"] < losses["squared"]
    assert losses["log-cosh"] < losses["squared"]
    assert len(set(losses.values())) == 3


@pytest.mark.parametrize("name", ["tb", "vargrad", "db", "mdb", "subtb", "fldb", "flsubtb", "mle"])
def test_the_order_of_a_batch_changes_neither_loss_nor_gradient(name: Name) -> None:
    batch = packed([3, 1, 4, 2, 5, 2], conditions=[1.0, 2.0, 1.0, 2.0, 3.0, 1.0])
    log_probs = random_log_probs(batch)
    order = torch.tensor([4, 1, 5, 0, 3, 2])
    permuted = batch.select(order)
    rows = permuted.steps["row"]

    def loss_and_gradient(batch: Trajectories, rows: Tensor, order: Tensor) -> tuple[Tensor, Tensor]:
        forward = log_probs.forward.clone().requires_grad_()
        assert log_probs.log_flow is not None
        assert log_probs.log_exit is not None
        parts = LogProbs(
            forward[rows],
            log_probs.backward[rows],
            log_probs.log_z[order],
            log_probs.log_flow[rows],
            log_probs.log_exit[rows],
        )
        loss = Objective(name)(parts, batch)
        return loss.detach(), torch.autograd.grad(loss, forward)[0]

    loss, gradient = loss_and_gradient(batch, torch.arange(batch.n_steps), torch.arange(len(batch)))
    permuted_loss, permuted_gradient = loss_and_gradient(permuted, rows, order)
    torch.testing.assert_close(permuted_loss, loss)
    torch.testing.assert_close(permuted_gradient, gradient)
    assert gradient.abs().sum() > 0


def test_vargrad_is_the_variance_within_each_condition() -> None:
    batch = packed([3, 1, 4, 2, 5], conditions=[1.0, 2.0, 1.0, 2.0, 3.0])
    log_probs = random_log_probs(batch)
    score = path_log_ratio(log_probs, batch) - batch.log_reward
    spread = [score[[0, 2]], score[[1, 3]], score[[4]]]
    expected = sum((part - part.mean()).square().sum() for part in spread) / 5
    torch.testing.assert_close(Objective("vargrad")(log_probs, batch), torch.as_tensor(expected))
    assert float(variance_residual(log_probs, batch)[4]) == 0  # alone in its group


def test_vargrad_has_the_gradient_of_tb_at_its_own_log_z() -> None:
    batch = packed([3, 2, 4])
    log_probs = random_log_probs(batch)
    forward = log_probs.forward.clone().requires_grad_()
    log_probs = replace(log_probs, forward=forward)
    best = Objective("vargrad").log_z(log_probs, batch)
    left = torch.autograd.grad(Objective("vargrad")(log_probs, batch), forward)[0]
    right = torch.autograd.grad(Objective("tb")(replace(log_probs, log_z=best), batch), forward)[0]
    torch.testing.assert_close(left, right)


def test_the_gradient_of_a_tb_batch_is_the_mean_over_its_parts() -> None:
    environment = Hypergrid(2, 4)
    policy = random_policy(environment)
    batch = policy.sample(torch.empty(24, 0), generator=seeded(0))
    batch = batch.with_log_reward(torch.randn(24, generator=seeded(1)))

    def gradient(part: Trajectories) -> Tensor:
        loss = Objective("tb")(policy.log_probs(part), part)
        parameters = list(policy.parameters())
        return torch.cat([g.flatten() for g in torch.autograd.grad(loss, parameters)])

    parts = batch.split([5, 1, 12, 6])
    mean = sum(len(part) / 24 * gradient(part) for part in parts)
    torch.testing.assert_close(gradient(batch), torch.as_tensor(mean), rtol=1e-3, atol=1e-4)


def test_mle_is_the_mean_log_likelihood_and_knows_nothing_of_rewards() -> None:
    batch = packed([3, 1, 4])
    log_probs = random_log_probs(batch)
    expected = -sum(float(part.sum()) for part in log_probs.forward.split([3, 1, 4])) / 3
    assert float(Objective("mle")(log_probs, batch)) == pytest.approx(expected, rel=1e-5)
    unscored = batch.with_log_reward(torch.full((3,), torch.nan))
    assert float(Objective("mle")(log_probs, unscored)) == pytest.approx(expected, rel=1e-5)


@pytest.mark.parametrize("name", [*BALANCES, "mle"])
def test_a_policys_own_loss_is_added(name: Name) -> None:
    batch = packed([3, 1, 4])
    log_probs = random_log_probs(batch)
    with_auxiliary = replace(log_probs, auxiliary=torch.tensor(2.5))
    torch.testing.assert_close(Objective(name)(with_auxiliary, batch), Objective(name)(log_probs, batch) + 2.5)


@pytest.mark.parametrize("name", ["db", "subtb", "fldb", "flsubtb"])
def test_balance_of_flows_needs_a_flow_head(name: Name) -> None:
    batch = packed([3, 1])
    with pytest.raises(ValueError, match="flow head"):
        Objective(name)(replace(random_log_probs(batch), log_flow=None), batch)


def test_modified_balance_needs_states_that_may_all_exit() -> None:
    batch = packed([3, 1])
    with pytest.raises(ValueError, match="every state"):
        Objective("mdb")(replace(random_log_probs(batch), log_exit=None), batch)
    environment = Sequences("AB", 3)  # of fixed length: only full sequences exit
    policy = random_policy(environment)
    drawn = policy.sample(torch.empty(4, 0), generator=seeded(0)).with_log_reward(torch.zeros(4))
    drawn = replace(drawn, steps={**drawn.steps, STEP_REWARD: torch.zeros(drawn.n_steps)})
    with pytest.raises(ValueError, match="every state"):
        Objective("mdb")(policy.log_probs(drawn), drawn)


@pytest.mark.parametrize(
    ("field", "value"),
    [("name", "td"), ("penalty", "absolute"), ("delta", 0.0), ("delta", math.nan), ("subtb_lambda", 0.0)],
)
def test_an_illegal_setting_is_named(field: str, value: object) -> None:
    with pytest.raises(ValueError, match=field):
        Objective(**{field: value})  # type: ignore[arg-type]


@pytest.mark.parametrize("name", [*BALANCES, "mle"])
def test_only_objectives_that_look_at_states_on_the_way_ask_for_their_rewards(name: Name) -> None:
    batch = packed([3, 2])
    batch = replace(batch, steps={"row": batch.steps["row"]})
    if Objective(name).needs_step_rewards:
        with pytest.raises(KeyError):
            Objective(name)(random_log_probs(batch), batch)
    else:
        assert torch.isfinite(Objective(name)(random_log_probs(batch), batch))
