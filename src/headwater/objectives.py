"""Objectives: residuals of balance along trajectories, and the losses made of them. Pure functions of per-step tensors.

With u the log-ratio of the forward and the reference path measure, every residual here says by how much the flow into
some stretch of a trajectory differs from the flow out of it. Nothing in this file knows what is being built.

| name | residual | source |
|---|---|---|
| tb | log Z + sum_t (log P_F - log P_B) - log R | arXiv 2201.13259; with a prior as P_B, relative TB: 2405.20971 |
| vargrad | the same, its mean over equal conditions in the place of -log Z | Zhang et al. 2023, arXiv 2302.05446 |
| db | log F(s) + log P_F - log P_B - log F(s') | Bengio et al. 2023, arXiv 2111.09266 |
| mdb | the same, with F(s) = R(s) / P_F(exit, s) where all states may exit | Deleu et al. 2022, arXiv 2202.13903 |
| subtb | log F(s_i) + sum_ij (log P_F - log P_B) - log F(s_j), weighted by lambda^(j-i) | arXiv 2209.12782 |
| fldb, flsubtb | db and subtb with F(s) = R(s) F~(s) | Pan et al. 2023, arXiv 2302.01687 |
| mle | none: -sum_t log P_F, on backward trajectories sampled from given objects | arXiv 2209.02606 |

Two that balance nothing, to compare with: policy gradients of the reward with a penalty on the divergence from P_B.

| name | loss | source |
|---|---|---|
| rloo | REINFORCE on log R - (log P_F - log P_B as drawn), less the mean of the others of its group | 2402.14740 |
| grpo | clipped ratio to what drew it, times the reward in standard deviations of its group | 2402.03300 |
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal, get_args

import torch
from torch import Tensor
from torch.nn import functional

from headwater.policies.base import LogProbs
from headwater.trajectories import Trajectories

Name = Literal["tb", "vargrad", "db", "mdb", "subtb", "fldb", "flsubtb", "mle", "rloo", "grpo"]
Contrast = Literal["mean", "others", "pairs"]
Penalty = Literal["squared", "huber", "log-cosh"]

STEP_REWARD = "log_reward"
"""The per-step tensor `[S]` that holds log R of the state each step leaves, as if it were finished there."""

STEP_BEHAVIOUR = "log_behaviour"
"""The per-step tensor `[S]` of each step's log-probability under what drew it, where a policy keeps it."""


@dataclass(frozen=True)
class Objective:
    """A loss by name."""

    name: Name = "tb"
    """Which balance to ask for."""
    penalty: Penalty = "squared"
    """What a residual costs: squared; huber, linear beyond delta; log-cosh."""
    delta: float = 1.0
    """Where huber turns linear."""
    subtb_lambda: float = 0.9
    """A stretch of k steps weighs lambda^k in subtb: 1 weighs all alike, small values approach detailed balance."""
    contrast: Contrast = "mean"
    """What vargrad compares a trajectory with: the mean of its group; the mean of the others (leave-one-out); or each
    of the others by itself, in pairs. Squared, all three have the same gradient but for a factor."""
    clip: float = 0.2
    """How far from 1 grpo lets a step's probability ratio count."""
    divergence: float = 0.0
    """Weight of the divergence from the reference in grpo, per step."""

    def __post_init__(self) -> None:
        for field, names in (("name", Name), ("penalty", Penalty), ("contrast", Contrast)):
            if getattr(self, field) not in get_args(names):
                raise ValueError(f"{field} = {getattr(self, field)!r}: must be one of {', '.join(get_args(names))}")
        if not 0 < self.clip < 1:
            raise ValueError(f"clip = {self.clip}: must be above 0 and below 1")
        if not self.divergence >= 0:
            raise ValueError(f"divergence = {self.divergence}: must not be negative")
        if not self.delta > 0:
            raise ValueError(f"delta = {self.delta}: must be positive")
        if not self.subtb_lambda > 0:
            raise ValueError(f"subtb_lambda = {self.subtb_lambda}: must be positive")

    @property
    def needs_step_rewards(self) -> bool:
        """Whether the batch must carry `STEP_REWARD`, the reward of every state on the way."""
        return self.name in ("mdb", "fldb", "flsubtb")

    def __call__(self, log_probs: LogProbs, batch: Trajectories) -> Tensor:
        """The loss, a float32 scalar: a mean over trajectories (tb, vargrad, subtb, mle) or over steps (db, mdb)."""
        loss = _LOSSES[self.name](self, log_probs, batch)
        return loss if log_probs.auxiliary is None else loss + log_probs.auxiliary

    def log_z(self, log_probs: LogProbs, batch: Trajectories) -> Tensor:
        """This objective's estimate of log Z at each trajectory's condition, `[T]`, without gradient."""
        with torch.no_grad():
            if self.name in ("vargrad", "mle", "mdb", "rloo", "grpo"):
                ratio = path_log_ratio(log_probs, batch) - batch.log_reward
                return -_group_mean(ratio, batch.group)
            if self.name == "tb":
                return log_probs.log_z.detach()
            flow = _flow(log_probs, batch, forward_looking=self.name in ("fldb", "flsubtb"))
            return flow[batch.starts]

    def in_units_of_reward(self, loss: Tensor, beta: float) -> Tensor:
        """The loss of a reward r = beta log R, such that its gradient is the same whatever the beta, for equal
        advantages in r: times beta / 2 for a squared residual of log R, times beta for its policy gradient.
        """
        if self.name == "grpo":  # in standard deviations already
            return loss
        return loss * (beta if self.name in ("rloo", "mle") else beta / 2)

    def cost(self, residual: Tensor) -> Tensor:
        """The penalty of each residual, same shape."""
        if self.penalty == "squared":
            return residual.square()
        if self.penalty == "huber":
            return functional.huber_loss(residual, torch.zeros_like(residual), reduction="none", delta=self.delta)
        magnitude = residual.abs()  # log cosh r = |r| + log(1 + exp(-2 |r|)) - log 2, without overflow
        return magnitude + torch.log1p(torch.exp(-2 * magnitude)) - torch.log(torch.tensor(2.0))


def path_log_ratio(log_probs: LogProbs, batch: Trajectories) -> Tensor:
    """sum_t log P_F - log P_B of each trajectory: `[T]`."""
    return batch.sum((log_probs.forward - log_probs.backward).float())


def trajectory_residual(log_probs: LogProbs, batch: Trajectories) -> Tensor:
    """The trajectory-balance residual, `[T]`."""
    return log_probs.log_z + path_log_ratio(log_probs, batch) - batch.log_reward


def variance_residual(log_probs: LogProbs, batch: Trajectories) -> Tensor:
    """The residual about the mean of its group of equal condition, `[T]`: log Z cancels. Groups of one teach
    nothing.
    """
    ratio = path_log_ratio(log_probs, batch) - batch.log_reward
    return ratio - _group_mean(ratio, batch.group)


def step_residual(log_probs: LogProbs, batch: Trajectories, forward_looking: bool = False) -> Tensor:
    """The detailed-balance residual of every step, `[S]`; after the last step flows the reward."""
    flow = _flow(log_probs, batch, forward_looking)
    after = flow.roll(-1).index_copy(0, batch.last, batch.log_reward.to(flow.dtype))
    return flow + log_probs.forward - log_probs.backward - after


def modified_step_residual(log_probs: LogProbs, batch: Trajectories) -> Tensor:
    """The modified detailed-balance residual, `[S]`, zero at exit steps: every state may exit, and its flow is its
    own.
    """
    if log_probs.log_exit is None or bool((log_probs.log_exit < -1e8).any()):  # masked: exit is not legal there
        raise ValueError("modified detailed balance needs a policy in whose every state exit is an action")
    flow = batch.steps[STEP_REWARD] - log_probs.log_exit
    residual = flow + log_probs.forward - log_probs.backward - flow.roll(-1)
    return residual.index_fill(0, batch.last, 0.0)


def subtrajectory_residuals(
    log_probs: LogProbs, batch: Trajectories, forward_looking: bool = False
) -> tuple[Tensor, Tensor, Tensor]:
    """Residuals of every stretch i < j of every trajectory of n steps, n (n + 1) / 2 each.

    With c the running sum of log P_F - log P_B and v_i = log F(s_i) - c_i, the residual of a stretch is v_i - v_j: no
    sum is done twice. Returns residuals `[P]`, stretch lengths `[P]` and the trajectory of each `[P]`.
    """
    flow = _flow(log_probs, batch, forward_looking)
    ratio = (log_probs.forward - log_probs.backward).float()
    running = ratio.double().cumsum(0)  # over the whole batch: in single precision, late trajectories would drown
    running = (running - (running - ratio)[batch.starts][batch.index]).float()  # inclusive sum within the trajectory
    before = flow - (running - ratio)  # v at the state that each step leaves
    at_end = batch.log_reward - running[batch.last]  # v at the end, where the reward flows
    # nodes of a trajectory: its steps, then its end
    n_nodes = batch.lengths + 1
    node_starts = batch.starts + torch.arange(len(batch), device=batch.device)
    nodes = torch.empty(int(batch.n_steps + len(batch)), device=batch.device, dtype=before.dtype)
    nodes = nodes.index_copy(0, torch.arange(batch.n_steps, device=batch.device) + batch.index, before)
    nodes = nodes.index_copy(0, node_starts + batch.lengths, at_end)
    owner = torch.repeat_interleave(n_nodes, output_size=nodes.shape[0])
    position = torch.arange(nodes.shape[0], device=batch.device) - node_starts[owner]
    # each node j pairs with the `position` nodes before it
    later = torch.repeat_interleave(position)
    offset = torch.arange(later.shape[0], device=batch.device) - (position.cumsum(0) - position)[later]
    earlier = later - 1 - offset
    return nodes[earlier] - nodes[later], later - earlier, owner[later]


def _trajectory_balance(objective: Objective, log_probs: LogProbs, batch: Trajectories) -> Tensor:
    return objective.cost(trajectory_residual(log_probs, batch)).mean()


def _log_partition_variance(objective: Objective, log_probs: LogProbs, batch: Trajectories) -> Tensor:
    if objective.contrast == "mean":
        return objective.cost(variance_residual(log_probs, batch)).mean()
    ratio = path_log_ratio(log_probs, batch) - batch.log_reward
    if objective.contrast == "others":
        return objective.cost(ratio - others_mean(ratio, batch.group)).mean()
    first, second = _pairs(batch.group)
    if not len(first):
        return ratio.sum() * 0
    return objective.cost(ratio[first] - ratio[second]).mean() / 2


def _reinforce_leave_one_out(objective: Objective, log_probs: LogProbs, batch: Trajectories) -> Tensor:
    log_prob = batch.sum(log_probs.forward.float())
    with torch.no_grad():  # the divergence as it was when the trajectory was drawn, as a reward
        score = batch.log_reward - (batch.log_behaviour - batch.sum(log_probs.backward.float()))
        advantage = score - others_mean(score, batch.group)
    return -(advantage * log_prob).mean()


def _group_relative(objective: Objective, log_probs: LogProbs, batch: Trajectories) -> Tensor:
    if STEP_BEHAVIOUR not in batch.steps:
        raise ValueError("grpo needs a policy that keeps the log-probability of every step it draws")
    forward, index = log_probs.forward.float(), batch.index
    with torch.no_grad():
        centred = batch.log_reward - _group_mean(batch.log_reward, batch.group)
        spread = _group_mean(centred.square(), batch.group).sqrt()
        advantage = (centred / (spread + 1e-4))[index]
    ratio = (forward - batch.steps[STEP_BEHAVIOUR].float()).exp()
    loss = -torch.minimum(ratio * advantage, ratio.clamp(1 - objective.clip, 1 + objective.clip) * advantage)
    if objective.divergence:  # k3 of Schulman 2020, unbiased on policy and never negative
        behind = log_probs.backward.float() - forward
        loss = loss + objective.divergence * (behind.exp() - behind - 1)
    return (batch.sum(loss) / batch.lengths).mean()


def _detailed_balance(objective: Objective, log_probs: LogProbs, batch: Trajectories) -> Tensor:
    return objective.cost(step_residual(log_probs, batch, objective.name == "fldb")).mean()


def _modified_detailed_balance(objective: Objective, log_probs: LogProbs, batch: Trajectories) -> Tensor:
    return objective.cost(modified_step_residual(log_probs, batch)).mean()


def _subtrajectory_balance(objective: Objective, log_probs: LogProbs, batch: Trajectories) -> Tensor:
    residual, length, owner = subtrajectory_residuals(log_probs, batch, objective.name == "flsubtb")
    # lambda^(length - 1) over the trajectory's longest term, so that no lambda overflows
    exponent = (length - 1).float() if objective.subtb_lambda <= 1 else (length - batch.lengths[owner]).float()
    weight = objective.subtb_lambda**exponent
    total = torch.zeros(len(batch), device=batch.device).index_add(0, owner, weight)
    return (objective.cost(residual) * weight / total[owner]).sum() / len(batch)


def _maximum_likelihood(objective: Objective, log_probs: LogProbs, batch: Trajectories) -> Tensor:
    return -batch.sum(log_probs.forward).mean()


_LOSSES: dict[str, Callable[[Objective, LogProbs, Trajectories], Tensor]] = {
    "tb": _trajectory_balance,
    "vargrad": _log_partition_variance,
    "db": _detailed_balance,
    "fldb": _detailed_balance,
    "mdb": _modified_detailed_balance,
    "subtb": _subtrajectory_balance,
    "flsubtb": _subtrajectory_balance,
    "mle": _maximum_likelihood,
    "rloo": _reinforce_leave_one_out,
    "grpo": _group_relative,
}


def _flow(log_probs: LogProbs, batch: Trajectories, forward_looking: bool) -> Tensor:
    if log_probs.log_flow is None:
        raise ValueError("detailed and sub-trajectory balance need a policy with a flow head")
    return log_probs.log_flow + batch.steps[STEP_REWARD] if forward_looking else log_probs.log_flow


def _group_mean(values: Tensor, group: Tensor) -> Tensor:
    n_groups = int(group.max()) + 1 if group.numel() else 0
    total = torch.zeros(n_groups, device=values.device).index_add(0, group, values)
    return (total / torch.bincount(group, minlength=n_groups))[group]


def others_mean(values: Tensor, group: Tensor) -> Tensor:
    """The mean over the other members of each one's group: `[T]`. A group of one has its own value."""
    size = torch.bincount(group)[group]
    return torch.where(size > 1, (_group_mean(values, group) * size - values) / (size - 1).clamp(min=1), values)


def _pairs(group: Tensor) -> tuple[Tensor, Tensor]:
    """Every ordered pair of different members of one group: two `[P]` indices."""
    same = group[:, None] == group[None, :]
    first, second = same.fill_diagonal_(False).nonzero(as_tuple=True)
    return first, second
