"""A denoiser as a Policy: a trajectory is a chain of states from noise to data, the reference path measure the prior.

Trajectory balance then asks that log Z + sum_t log q(x_t+1 | x_t) - log p(x_t+1 | x_t) = log r(x_T) along every chain,
so that q draws from p(x) r(x) / Z: relative trajectory balance (Venkatraman et al. 2024, arXiv 2405.20971, equations 8
to 10). No gradient of the reward or through the sampler is needed, and the chain may come from anywhere: drawn by q, by
p, or walked back by the noising process from any object.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from headwater.diffusion.adapters import Corrected
from headwater.diffusion.laws import Law
from headwater.diffusion.process import Process
from headwater.environments.base import Objects, identity
from headwater.objectives import path_log_ratio, variance_residual
from headwater.policies.base import NO_EXPLORATION, Exploration, LogProbs, Policy
from headwater.trajectories import Trajectories

STATE = "state"
"""The per-step tensor `[S, *shape]`: the state that each step leads to; a chain's first step draws where it starts."""


class DiffusionPolicy(Policy):
    """Draws objects of `process` by chains of T + 1 steps, the first of which draws the start.

    prior, posterior: denoisers, called with states `[N, *shape]`, times `[N]` and conditions `[N, C]`; the prior is
    frozen. log_z: log Z of condition rows, `[N, C]` to `[N, 1]`; one number if not given. steps_at_once: steps whose
    activations are held at once, 0 for no limit; more are computed again on the way back, with the same gradient.
    learned_steps: of each chain so many steps, drawn anew at every update, carry the gradient of all (times T over
    their number: it stays unbiased; appendix H.1 of the paper); 0 for all.

    Exploration: `temperature` multiplies the variance of every step, and with probability `epsilon` a chain is drawn
    by the prior.
    """

    is_relative = True

    def __init__(
        self,
        process: Process,
        prior: nn.Module,
        posterior: nn.Module,
        log_z: nn.Module | None = None,
        steps_at_once: int = 0,
        learned_steps: int = 0,
    ) -> None:
        super().__init__()
        if not 0 <= learned_steps <= process.n_steps:
            raise ValueError(
                f"learned_steps = {learned_steps}: must be from 0 to the {process.n_steps} steps of a chain"
            )
        self.process, self.posterior = process, posterior
        prior.requires_grad_(False)
        self._prior = (prior,)  # a tuple hides it, where it is a part of the posterior already
        if all(module is not prior for module in posterior.modules()):
            self.prior_denoiser = prior
        self.log_z = nn.Parameter(torch.zeros(())) if log_z is None else log_z
        self.steps_at_once, self.learned_steps = steps_at_once, learned_steps

    @property
    def prior(self) -> nn.Module:
        return self._prior[0]

    @property
    def device(self) -> torch.device:
        return next(self.parameters()).device

    def log_z_parameters(self) -> list[nn.Parameter]:
        return [self.log_z] if isinstance(self.log_z, nn.Parameter) else list(self.log_z.parameters())

    @torch.no_grad()
    def sample(
        self, condition: Tensor, exploration: Exploration = NO_EXPLORATION, generator: torch.Generator | None = None
    ) -> Trajectories:
        generator = generator or torch.default_generator
        process, count, condition = self.process, len(condition), condition.to(self.device)
        epsilon, temperature = exploration.epsilon, exploration.temperature
        by_prior = torch.rand(count, generator=generator, device=generator.device).to(self.device) < epsilon
        state = process.start(count, generator).to(self.device)
        states = [state]
        ours, theirs = (process.start_log_prob(state) for _ in range(2))
        for step in range(process.n_steps):
            number = torch.full((count,), step, device=self.device)
            law = self._law(self.posterior, state, number, condition, temperature)
            following = law.sample(generator)
            if epsilon:
                prior_law = self._law(self.prior, state, number, condition)
                shown = by_prior.view(-1, *[1] * (state.ndim - 1))
                following = torch.where(shown, prior_law.sample(generator), following)
                theirs = theirs + prior_law.log_prob(following)
            ours = ours + law.log_prob(following)
            state = following
            states.append(state)
        if epsilon:  # whole chains are drawn by one of both
            weight = torch.tensor(epsilon).double()
            ours = torch.logaddexp(ours.double() + (-weight).log1p(), theirs.double() + weight.log()).float()
        return self._trajectories(states, condition, ours)

    def sample_backward(self, trajectories: Trajectories, generator: torch.Generator | None = None) -> Trajectories:
        """Walk back by the noising process from the objects of `trajectories`, of which the last step is enough."""
        walked = self.sample_to(trajectories.steps[STATE][trajectories.last], trajectories.condition, generator)
        return walked.with_log_reward(trajectories.log_reward)

    @torch.no_grad()
    def sample_to(self, states: Tensor, condition: Tensor, generator: torch.Generator | None = None) -> Trajectories:
        """Chains to given objects `[N, *shape]`, drawn backward by the noising process, not yet scored."""
        generator = generator or torch.default_generator
        state = states.to(self.device)
        walked, log_behaviour = [state], torch.zeros(len(state), device=self.device)
        for step in reversed(range(self.process.n_steps)):
            number = torch.full((len(state),), step, device=self.device)
            before = self.process.noise(state, number, generator)
            log_behaviour = log_behaviour + self.process.noise_log_prob(before, state, number)
            state = before
            walked.append(state)
        return self._trajectories(walked[::-1], condition.to(self.device), log_behaviour)

    @torch.no_grad()
    def back_and_forth(
        self, current: Trajectories, back: float, exploration: Exploration, generator: torch.Generator
    ) -> tuple[Trajectories, Trajectories, Tensor]:
        """Keep the first steps of each chain and draw the others anew: at most a share `back` of them, at least one, by
        the posterior at the temperature of `exploration`. With what is returned, Metropolis-Hastings keeps chains in
        proportion to the prior's probability of the whole chain times r: the target's own, whatever the posterior.
        """
        count, each = len(current), self.process.n_steps
        limit = math.ceil(back * each)
        uniform = torch.rand(count, generator=generator, device=generator.device).to(self.device)
        kept = each - 1 - (uniform * limit).long().clamp(max=limit - 1)  # steps after the start
        old = current.steps[STATE].view(count, each + 1, *self.process.shape)
        new, condition = old.clone(), current.condition.to(self.device)
        ours, theirs = (torch.zeros(2, count, dtype=torch.float64, device=self.device) for _ in range(2))
        behaviour = self.process.start_log_prob(old[:, 0]).double()
        for step in range(each):
            rows = (kept <= step).nonzero()[:, 0]
            number = torch.full((count,), step, device=self.device)
            before = self._law(self.posterior, old[:, step], number, condition, exploration.temperature)
            of_old = before.log_prob(old[:, step + 1]).double()
            behaviour = behaviour + torch.where(kept > step, of_old, 0.0)
            if not len(rows):
                continue
            law = self._law(self.posterior, new[rows, step], number[rows], condition[rows], exploration.temperature)
            new[rows, step + 1] = law.sample(generator)
            drawn = law.log_prob(new[rows, step + 1]).double()
            behaviour[rows] += drawn
            for which, states, log_prob in ((0, old, of_old[rows]), (1, new, drawn)):
                prior = self._law(self.prior, states[rows, step], number[rows], condition[rows])
                ours[which, rows] += log_prob
                theirs[which, rows] += prior.log_prob(states[rows, step + 1]).double()
        gain = theirs - ours
        candidate = self._trajectories(list(new.unbind(1)), condition, behaviour.float())
        return current, candidate, gain[1] - gain[0]

    def _law(
        self, denoiser: nn.Module, state: Tensor, number: Tensor, condition: Tensor, temperature: float = 1.0
    ) -> Law:
        law = self.process.law(denoiser(state, self.process.time(number), condition), state, number)
        return law if temperature == 1 else law.tempered(temperature)

    def log_probs(self, trajectories: Trajectories) -> LogProbs:
        """forward: of the posterior, backward: of the prior. The start has the same law in both."""
        steps, rows = self._steps(trajectories)
        start = self.process.start_log_prob(trajectories.steps[STATE][trajectories.starts])
        with torch.no_grad():
            steps = replace(steps, said=self._in_chunks(self._said_by_prior, steps))
            of_prior = self._in_chunks(self._by_prior, steps)
        whole = start.new_zeros(trajectories.n_steps).index_copy(0, trajectories.starts, start)
        return LogProbs(
            forward=whole.index_copy(0, rows, self._of_posterior(steps)),
            backward=whole.index_copy(0, rows, of_prior),
            log_z=self._log_z(trajectories.condition),
        )

    def objects(self, trajectories: Trajectories) -> Objects:
        """The data that chains end in: `[T, *shape]`."""
        return trajectories.steps[STATE][trajectories.last]

    def remembered(self, trajectories: Trajectories) -> Trajectories:
        """Their ends."""
        ends = {STATE: trajectories.steps[STATE][trajectories.last]}
        return replace(trajectories, steps=ends, lengths=torch.ones_like(trajectories.lengths))

    def published(self) -> dict[str, Tensor]:
        """What learns, for searchers elsewhere: the prior never changes."""
        learnt = {name for name, parameter in self.named_parameters() if parameter.requires_grad}
        return {name: tensor for name, tensor in self.state_dict(keep_vars=True).items() if name in learnt}

    def measures(self, log_probs: LogProbs, batch: Trajectories) -> dict[str, float]:
        """Of the batch that was learned from: the divergence from the prior, and how far its chains are from balance,
        as the deviation of their residuals over chains of one condition."""
        with torch.no_grad():
            ratio = path_log_ratio(log_probs, batch)
            residual = variance_residual(log_probs, batch)
            return {"divergence": float(ratio.mean()), "residual_deviation": float(residual.square().mean().sqrt())}

    def _steps(self, trajectories: Trajectories) -> tuple[_Steps, Tensor]:
        """Every step from one state to the next, and the row of the trajectories that it leads to."""
        states, each = trajectories.steps[STATE], self.process.n_steps + 1
        if bool((trajectories.lengths != each).any()):
            raise ValueError(f"chains must have {each} steps: only the ends of these have been remembered")
        row = torch.arange(len(states), device=states.device)
        left = row.view(-1, each)[:, :-1].T.flatten()  # first steps first: a few at once have few different times
        condition = trajectories.condition[trajectories.index[left]]
        nothing = states.new_empty(len(left), 0)
        return _Steps(states[left], states[left + 1], left % each, condition, nothing), left + 1

    def _of_posterior(self, steps: _Steps) -> Tensor:
        """Log-probability of each step under the posterior; if only some are learned from, they carry all gradient."""
        some, each = self.learned_steps, self.process.n_steps
        if not some or not torch.is_grad_enabled():
            return self._in_chunks(self._by_posterior, steps)
        draws = torch.rand(len(steps) // each, each, generator=torch.Generator().manual_seed(self.version))
        chosen = (draws.argsort(1).argsort(1) < some).T.flatten().to(steps.state.device)
        learned, others = (which.nonzero()[:, 0] for which in (chosen, ~chosen))
        log_prob = self._in_chunks(self._by_posterior, steps.at(learned))
        log_prob = log_prob.detach() + (each / some) * (log_prob - log_prob.detach())
        with torch.no_grad():
            rest = self._in_chunks(self._by_posterior, steps.at(others))
        return log_prob.new_zeros(len(steps)).index_copy(0, learned, log_prob).index_copy(0, others, rest)

    def _in_chunks(self, function: Callable[[_Steps], Tensor], steps: _Steps) -> Tensor:
        """What it says of each step; activations of so many are held at once."""
        chunks = [steps] if not self.steps_at_once else steps.split(self.steps_at_once)
        if len(chunks) == 1 or not torch.is_grad_enabled():
            parts = [function(chunk) for chunk in chunks]
        else:
            parts = [checkpoint(function, chunk, use_reentrant=False) for chunk in chunks]
        return torch.cat(parts) if parts else steps.state.new_zeros(0, dtype=torch.float32)

    def _said_by_prior(self, steps: _Steps) -> Tensor:
        return self.prior(steps.state, self.process.time(steps.number), steps.condition)

    def _by_prior(self, steps: _Steps) -> Tensor:
        """Log-probability of each step."""
        return self._log_prob(steps.said, steps)

    def _by_posterior(self, steps: _Steps) -> Tensor:
        given = (steps.state, self.process.time(steps.number), steps.condition)
        if isinstance(self.posterior, Corrected) and self.posterior.prior is self.prior:  # it has been asked already
            return self._log_prob(self.posterior.after(steps.said, *given), steps)
        return self._log_prob(self.posterior(*given), steps)

    def _log_prob(self, prediction: Tensor, steps: _Steps) -> Tensor:
        return self.process.law(prediction, steps.state, steps.number).log_prob(steps.following)

    def _log_z(self, condition: Tensor) -> Tensor:
        if isinstance(self.log_z, nn.Parameter):
            return self.log_z.expand(len(condition))
        return self.log_z(condition)[:, 0].float()

    def _trajectories(self, states: list[Tensor], condition: Tensor, log_behaviour: Tensor) -> Trajectories:
        count, end = len(condition), states[-1].contiguous()
        return Trajectories(
            steps={STATE: torch.stack(states, 1).flatten(0, 1)},
            lengths=torch.full((count,), len(states), device=end.device),
            condition=condition,
            log_reward=torch.full((count,), torch.nan, device=end.device),
            log_behaviour=log_behaviour,
            version=torch.full((count,), self.version, device=end.device),
            identity=identity(end.flatten(1).view(torch.int32)),
        )


@dataclass(frozen=True)
class _Steps:
    """M steps: from `state` to `following`, `[M, *shape]`; number: `[M]`; condition: `[M, C]`; said: by the prior of
    the state, `[M, ...]`, empty before it is asked."""

    state: Tensor
    following: Tensor
    number: Tensor
    condition: Tensor
    said: Tensor

    def __len__(self) -> int:
        return len(self.number)

    def at(self, rows: Tensor) -> _Steps:
        return _Steps(*(column[rows] for column in self._columns))

    def split(self, size: int) -> list[_Steps]:
        columns = (torch.split(column, size) for column in self._columns)
        return [_Steps(*parts) for parts in zip(*columns, strict=True)]

    @property
    def _columns(self) -> tuple[Tensor, ...]:
        return self.state, self.following, self.number, self.condition, self.said
