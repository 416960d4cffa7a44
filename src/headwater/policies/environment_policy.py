"""The generic policy for a discrete environment: one torso, tied heads for forward actions, backward actions and
state flow.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Literal, get_args

import torch
from torch import Tensor, nn

from headwater.environments.base import Environment, Objects, identity
from headwater.policies.base import NO_EXPLORATION, Exploration, LogProbs, Policy, StatePolicy
from headwater.policies.layers import Activations, Linear
from headwater.policies.native_log_probs import MOST_ACTIONS, NEVER, step_log_probs
from headwater.policies.native_network import NativeNetwork, fingerprint, native_network
from headwater.policies.networks import Network
from headwater.policies.rollout import Walk, explored, walk_backward, walk_forward
from headwater.trajectories import Trajectories, rows_of

Backward = Literal["uniform", "learned", "maximum-entropy", "tlm"]


@dataclass(frozen=True)
class _Rollout:
    """The last one's states, and what the hidden layers gave on it with the weights that the fingerprint tells."""

    states: Tensor
    activations: Activations
    fingerprint: int


class EnvironmentPolicy(StatePolicy):
    """Forward and backward policies and flow over an environment's states.

    backward: "uniform" over legal backward actions; "learned" by the same loss as the forward policy;
    "maximum-entropy", every path to an object equally likely (the environment must know its path counts); "tlm",
    learned by maximum likelihood of the trajectories met (trajectory likelihood maximization, Gritsaev et al. 2025,
    arXiv 2410.15474), the balance loss taking it as given.
    condition_size: C, the columns of the condition; 0 for an unconditional policy.
    """

    def __init__(
        self,
        environment: Environment,
        network: Network | None = None,
        backward: Backward = "uniform",
        condition_size: int = 0,
    ) -> None:
        super().__init__()
        if backward not in get_args(Backward):
            raise ValueError(f"backward = {backward!r}: must be one of {', '.join(get_args(Backward))}")
        if backward == "maximum-entropy" and environment.log_path_count(environment.initial(1)) is None:
            raise ValueError(
                f"backward = 'maximum-entropy' needs path counts: {type(environment).__name__} has no log_path_count"
            )
        network = network or Network()
        self.environment, self.backward_kind = environment, backward
        self._last_rollout: _Rollout | None = None
        self.torso = network.build(environment.feature_type)
        self.sizes = (environment.n_actions, environment.n_backward_actions if self._learns_backward else 0, 1)
        self.heads = Linear(network.width, sum(self.sizes))
        nn.init.zeros_(self.heads.weight)
        nn.init.zeros_(self.heads.bias)
        self.log_z = nn.Parameter(torch.zeros(()))
        self.condition_size = condition_size
        if condition_size:
            self.embed_condition = _small_network(condition_size, network.width, network.width)
            self.log_z_of_condition = _small_network(condition_size, 64, 1)

    @property
    def _learns_backward(self) -> bool:
        return self.backward_kind in ("learned", "tlm")

    def log_z_parameters(self) -> list[nn.Parameter]:
        return [self.log_z, *(self.log_z_of_condition.parameters() if self.condition_size else [])]

    def sample(
        self,
        condition: Tensor,
        exploration: Exploration = NO_EXPLORATION,
        generator: torch.Generator | None = None,
    ) -> Trajectories:
        return self.sample_from(None, condition, exploration, generator)

    def sample_from(
        self,
        states: Tensor | None,
        condition: Tensor,
        exploration: Exploration = NO_EXPLORATION,
        generator: torch.Generator | None = None,
        head: Callable[[Tensor, Tensor, Tensor], Tensor] | None = None,
    ) -> Trajectories:
        """Trajectories from unfinished `states` (`[T, width]`) to exit, without the steps that led to these; None
        starts at the initial state.

        head: draws in the place of the policy's own forward head: (hidden `[n, network width]`, states `[n, width]`,
        trajectory numbers `[n]`) -> logits over actions.
        """
        condition = self._checked(condition)
        generator = generator or torch.default_generator
        self._last_rollout = None  # its memory is what the next one needs
        with torch.no_grad():
            embedded = self.embed_condition(condition) if self.condition_size else None

            def logits(states: Tensor, ids: Tensor) -> Tensor:
                hidden = self.torso(self.environment.features(states), None if embedded is None else embedded[ids])
                return self.heads(hidden) if head is None else head(hidden, states, ids)

            network = self._native_network(embedded) if head is None else None
            walk = walk_forward(
                self.environment, logits, len(condition), exploration, generator, condition.device, network, states
            )
        if walk.activations is not None:
            known = fingerprint(network, walk.states.numpy(), walk.lengths.numpy())
            self._last_rollout = _Rollout(walk.states, walk.activations, known)
        return self._trajectories(walk, condition)

    def sample_backward(self, trajectories: Trajectories, generator: torch.Generator | None = None) -> Trajectories:
        """Walk back with the backward policy from the objects of `trajectories`; their rewards and conditions stay."""
        walked = self.sample_to(self.final_states(trajectories), trajectories.condition, generator)
        return walked.with_log_reward(trajectories.log_reward)

    def sample_to(self, states: Tensor, condition: Tensor, generator: torch.Generator | None = None) -> Trajectories:
        """Trajectories to given final `states` (`[T, width]`, as `environment.states(objects)` gives them), drawn by
        the backward policy.
        """
        condition = self._checked(condition)
        with torch.no_grad():
            embedded = self.embed_condition(condition) if self.condition_size else None

            def logits(states: Tensor, ids: Tensor) -> Tensor:
                if self.backward_kind == "uniform":
                    return torch.zeros(states.shape[0], self.environment.n_backward_actions, device=states.device)
                if self.backward_kind == "maximum-entropy":
                    return self._maximum_entropy(states)
                hidden = self.torso(self.environment.features(states), None if embedded is None else embedded[ids])
                return self.heads(hidden)[:, self.sizes[0] :].contiguous()

            network = self._native_network(embedded) if self._learns_backward else None
            walk = walk_backward(self.environment, logits, states, generator or torch.default_generator, network)
        return self._trajectories(walk, condition)

    def log_probs(self, trajectories: Trajectories) -> LogProbs:
        environment = self.environment
        states, actions = trajectories.steps["state"], trajectories.steps["action"]
        output = self._output(trajectories)
        if self._has_native_log_probs(states):
            learned = self._learns_backward
            taken, backward, log_exit = step_log_probs(environment, output, states, actions, learned)
        else:
            taken, backward, log_exit = self._step_log_probs(trajectories, output)
        log_z = self._log_z(trajectories.condition)
        auxiliary = None
        if self.backward_kind == "tlm":
            auxiliary = -trajectories.sum(backward).mean()
            backward = backward.detach()
        return LogProbs(
            forward=taken,
            backward=backward,
            log_z=log_z,
            log_flow=output[:, -1],
            log_exit=log_exit,
            auxiliary=auxiliary,
        )

    def explored_log_probs(self, trajectories: Trajectories, exploration: Exploration) -> tuple[Tensor, Tensor]:
        """Of every step, without gradient: the log-probability of taking it under `exploration`, and log P_B of undoing
        it, both `[S]`.
        """
        states, actions = trajectories.steps["state"], trajectories.steps["action"]
        with torch.no_grad():
            output = self._output(trajectories)
            forward_logits, backward_logits, _ = output.split(self.sizes, dim=1)  # type: ignore[no-untyped-call]
            probability = explored(forward_logits, self.environment.forward_mask(states), exploration)
            taken = probability.gather(1, actions[:, None])[:, 0].log()
            return taken, self._log_backward(trajectories, backward_logits)

    def back_and_forth(
        self, current: Trajectories, back: float, exploration: Exploration, generator: torch.Generator
    ) -> tuple[Trajectories, Trajectories, Tensor]:
        """As every policy's, along paths drawn anew to the objects of `current`."""
        walked = self.sample_backward(current, generator)
        choices = self._choices(walked)
        limit = (back * choices).ceil().long()
        uniform = torch.rand(len(walked), generator=generator, device=generator.device).to(walked.device)
        kept = choices - 1 - (uniform * limit).long().clamp(max=limit - 1)
        middle = walked.steps["state"][walked.starts + kept]
        candidate = _joined(walked, kept, self.sample_from(middle, walked.condition, exploration, generator))

        both = Trajectories.concatenate([walked, candidate])
        forward, backward = self.explored_log_probs(both, exploration)
        place = torch.arange(both.n_steps, device=both.device) - both.starts[both.index]
        is_after = place >= kept.repeat(2)[both.index]
        old, new = both.sum(torch.where(is_after, backward - forward, 0.0).double()).view(2, -1)
        choices_back = self._choices(candidate)
        limit_back = (back * choices_back).ceil()
        log_ratio = new - old + (limit / limit_back).double().log()
        log_ratio = log_ratio.masked_fill(choices_back - kept > limit_back, -torch.inf)
        return walked, replace(candidate, log_behaviour=both.sum(forward)[len(walked) :]), log_ratio

    def _choices(self, batch: Trajectories) -> Tensor:
        """`[T]` int64, the steps of each trajectory without an exit that was the only action: to take that alone back
        would propose the same object again."""
        is_forced = self.environment.forward_mask(self.final_states(batch)).sum(1) == 1
        return (batch.lengths - is_forced.long()).clamp(min=1)

    def hidden(self, trajectories: Trajectories, head: Linear | None = None) -> Tensor:
        """What the torso makes of the state that each step leaves: `[S, network width]`, or `head` of it."""
        embedded = self.embed_condition(trajectories.condition) if self.condition_size else None
        condition = None if embedded is None else embedded[trajectories.index]
        features = self.environment.features(trajectories.steps["state"])
        return self.torso(features, condition, head, self._known_activations(trajectories, embedded))

    def _known_activations(self, trajectories: Trajectories, embedded: Tensor | None) -> Activations | None:
        """Those of the last rollout, if these are its trajectories and nothing has changed since then."""
        last, states = self._last_rollout, trajectories.steps["state"]
        network = self._native_network(embedded) if last is not None and last.states is states else None
        if last is None or network is None:
            return None
        now = fingerprint(network, states.numpy(), trajectories.lengths.numpy())
        return last.activations if now == last.fingerprint else None

    def _output(self, trajectories: Trajectories) -> Tensor:
        """Logits of actions and, where they are learned, of backward actions, and the flow: `[S, sum of sizes]`."""
        return self.hidden(trajectories, self.heads).float()

    def _has_native_log_probs(self, states: Tensor) -> bool:
        return (
            self.environment.rules is not None
            and self.environment.n_actions <= MOST_ACTIONS
            and self.backward_kind != "maximum-entropy"
            and states.device.type == "cpu"
        )

    def _step_log_probs(self, trajectories: Trajectories, output: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """What `step_log_probs` computes natively, for every kind of backward policy and on any device."""
        environment = self.environment
        states, actions = trajectories.steps["state"], trajectories.steps["action"]
        forward_logits, backward_logits, _ = output.split(self.sizes, dim=1)  # type: ignore[no-untyped-call]
        forward = forward_logits.masked_fill(~environment.forward_mask(states), NEVER).log_softmax(1)
        taken = forward.gather(1, actions[:, None])[:, 0]
        return taken, self._log_backward(trajectories, backward_logits), forward[:, environment.exit_action]

    def action_log_probs(self, states: Tensor, condition: Tensor) -> Tensor:
        """log P_F of every action in each of N states under one condition row `[1, C]`: `[N, n_actions]`, very low
        where illegal.
        """
        embedded = (
            self.embed_condition(self._checked(condition)).expand(len(states), -1) if self.condition_size else None
        )
        logits = self.torso(self.environment.features(states), embedded, self.heads)[:, : self.sizes[0]].float()
        return logits.masked_fill(~self.environment.forward_mask(states), NEVER).log_softmax(1)

    def objects(self, trajectories: Trajectories) -> Objects:
        return self.environment.objects(self.final_states(trajectories))

    def final_states(self, trajectories: Trajectories) -> Tensor:
        """`[T, width]`, the states that exit finished."""
        return trajectories.steps["state"][trajectories.last]

    def _native_network(self, condition: Tensor | None) -> NativeNetwork | None:
        """Torso and heads for a native rollout, which knows no features but the state itself; None where they are
        none.
        """
        if type(self.environment).features is not Environment.features:
            return None
        return native_network(self.torso, self.heads, condition)

    def _log_backward(self, trajectories: Trajectories, backward_logits: Tensor) -> Tensor:
        """log P_B(s_t | s_t+1) at step t: read in the row of the state that the step leads to; 0 for exit, which
        undoes nothing.
        """
        environment = self.environment
        states, actions = trajectories.steps["state"], trajectories.steps["action"]
        is_exit = actions == environment.exit_action
        if self.backward_kind == "uniform":
            log_parents = environment.backward_mask(states).sum(1).clamp(min=1).float().log()
            return torch.where(is_exit, 0.0, -log_parents.roll(-1))
        if self.backward_kind == "maximum-entropy":
            count = environment.log_path_count(states)
            assert count is not None
            return torch.where(is_exit, 0.0, (count - count.roll(-1)).float())
        undo = environment.backward_action(states, actions)
        log_backward = backward_logits.masked_fill(~environment.backward_mask(states), NEVER).log_softmax(1)
        return torch.where(is_exit, 0.0, log_backward.roll(-1, dims=0).gather(1, undo[:, None])[:, 0])

    def _maximum_entropy(self, states: Tensor) -> Tensor:
        """Logits of the maximum-entropy backward policy: the log path count of the parent behind each legal backward
        action.
        """
        mask = self.environment.backward_mask(states)
        rows, backward_actions = mask.nonzero(as_tuple=True)
        count = self.environment.log_path_count(self.environment.backward_step(states[rows], backward_actions))
        assert count is not None
        logits = torch.zeros(mask.shape, device=states.device)
        logits[rows, backward_actions] = count.float()
        return logits

    def _log_z(self, condition: Tensor) -> Tensor:
        if not self.condition_size:
            return self.log_z.expand(len(condition))
        return self.log_z + self.log_z_of_condition(condition)[:, 0]

    def _trajectories(self, walk: Walk, condition: Tensor) -> Trajectories:
        count = len(walk.lengths)
        final = walk.states[walk.lengths.cumsum(0) - 1]
        return Trajectories(
            steps={"state": walk.states, "action": walk.actions},
            lengths=walk.lengths,
            condition=condition,
            log_reward=torch.full((count,), torch.nan, device=condition.device),
            log_behaviour=walk.log_prob,
            version=torch.full((count,), self.version, dtype=torch.int64, device=condition.device),
            identity=identity(final),
        )

    def _checked(self, condition: Tensor) -> Tensor:
        if condition.ndim != 2 or condition.shape[1] != self.condition_size:
            raise ValueError(f"condition has shape {tuple(condition.shape)}, expected [T, {self.condition_size}]")
        return condition


class RelativePolicy(Policy):
    """A posterior policy balanced against a frozen prior policy in the place of the backward policy: relative
    trajectory balance.

    With trajectory balance as the objective it learns to draw prior(x) R(x) / Z. It starts as a copy of the prior, and
    every trajectory must be its object's only one, or the posterior is over trajectories (Venkatraman et al. 2024,
    arXiv 2405.20971).
    """

    def __init__(self, prior: EnvironmentPolicy) -> None:
        super().__init__()
        self.posterior = copy.deepcopy(prior)
        with torch.no_grad():
            self.posterior.log_z.zero_()
            if prior.condition_size:  # the prior's own log Z(c) would be an offset to unlearn
                for parameter in self.posterior.log_z_of_condition[-1].parameters():
                    parameter.zero_()
        self.prior = copy.deepcopy(prior).requires_grad_(False)

    @property
    def environment(self) -> Environment:
        return self.posterior.environment

    def log_z_parameters(self) -> list[nn.Parameter]:
        return self.posterior.log_z_parameters()

    def sample(
        self,
        condition: Tensor,
        exploration: Exploration = NO_EXPLORATION,
        generator: torch.Generator | None = None,
    ) -> Trajectories:
        self.posterior.version = self.version
        return self.posterior.sample(condition, exploration, generator)

    def sample_backward(self, trajectories: Trajectories, generator: torch.Generator | None = None) -> Trajectories:
        return self.posterior.sample_backward(trajectories, generator)

    def log_probs(self, trajectories: Trajectories) -> LogProbs:
        ours = self.posterior.log_probs(trajectories)
        with torch.no_grad():
            reference = self.prior.log_probs(trajectories).forward
        return LogProbs(forward=ours.forward, backward=reference, log_z=ours.log_z, log_exit=ours.log_exit)

    def objects(self, trajectories: Trajectories) -> Objects:
        return self.posterior.objects(trajectories)


def _small_network(inputs: int, hidden: int, outputs: int) -> nn.Sequential:
    return nn.Sequential(nn.Linear(inputs, hidden), nn.SiLU(), nn.Linear(hidden, outputs))


def _joined(walked: Trajectories, kept: Tensor, rest: Trajectories) -> Trajectories:
    """The first `kept` steps of each trajectory of `walked`, then those of `rest`."""
    first = rows_of(walked.starts, kept)
    owner = torch.repeat_interleave(kept, output_size=len(first))
    order = torch.cat([owner, rest.index]).argsort(stable=True)
    steps = {name: torch.cat([walked.steps[name][first], rest.steps[name]])[order] for name in rest.steps}
    return replace(rest, steps=steps, lengths=kept + rest.lengths)
