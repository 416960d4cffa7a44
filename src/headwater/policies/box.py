"""A policy over a box: points of [0, 1]^d reached in a fixed number of steps, each drawn from a learned density.

The continuous GFlowNet of Lahlou et al. 2023 (arXiv 2301.12594), in the form that leaves no special case: a state is a
point and its number of steps, the source is a state of its own outside the box, and every step forward or backward has
a density over the *whole* box, exactly normalised (`densities.py`). Forward and backward path densities so have one
reference measure, Lebesgue's, wherever a path runs; the one step back into the source is an atom of probability 1. A
mixture's few bumps are composed over the steps: the last ones add the detail.
"""

from __future__ import annotations

import math
from typing import Literal, get_args

import numpy as np
import torch
from torch import Tensor, nn

from headwater.environments.base import Dense, Objects, identity
from headwater.policies.base import NO_EXPLORATION, Exploration, LogProbs, Policy
from headwater.policies.densities import EDGE, UNIFORM, BoxMixture, Kind
from headwater.policies.networks import Network
from headwater.trajectories import Trajectories

BoxBackward = Literal["learned", "fixed"]

WIDEST, NARROWEST = 0.5, 0.02
"""Widths of the first and the last step at the start, and of the fixed backward steps; in between geometrically."""
_LEAST_WIDTH, _LARGEST_WIDTH = 0.005, 3.0
_FREQUENCIES = 4
_CHUNK = 2048  # states whose steps are spread over the whole grid at once


class BoxPolicy(Policy):
    """Forward and backward step densities and flow over points of [0, 1]^d.

    steps: n, the steps of every trajectory. density: "beta" or "gaussian" (truncated normal). components: K, of each
    forward mixture. backward: "fixed" blurs the point step by step, ever more widely toward the source; "learned" lets
    the loss move and stretch that blur. The per-step tensor `point` is where each step leads, `[S, d]`; objects are the
    last points, float32 `[T, d]`.
    """

    def __init__(
        self,
        dimensions: int,
        steps: int = 4,
        density: Kind = "beta",
        components: int = 8,
        backward: BoxBackward = "learned",
        network: Network | None = None,
    ) -> None:
        super().__init__()
        for name, value in (("dimensions", dimensions), ("steps", steps), ("components", components)):
            if value < 1:
                raise ValueError(f"{name} = {value}: must be at least 1")
        if density not in get_args(Kind):
            raise ValueError(f"density = {density!r}: must be one of {', '.join(get_args(Kind))}")
        if backward not in get_args(BoxBackward):
            raise ValueError(f"backward = {backward!r}: must be one of {', '.join(get_args(BoxBackward))}")
        network = network or Network()
        self.dimensions, self.n_steps, self.kind, self.components = dimensions, steps, density, components
        self.backward_kind = backward
        self.torso = network.build(Dense(dimensions * (1 + 2 * _FREQUENCIES) + steps + 1))
        per_component = 2 * dimensions
        self.sizes = (components * (1 + per_component), per_component if backward == "learned" else 0, 1)
        self.heads = nn.Linear(network.width, sum(self.sizes))
        nn.init.zeros_(self.heads.weight)
        nn.init.zeros_(self.heads.bias)
        with torch.no_grad():  # components that start at one place would stay together
            self.heads.bias[components : components * (1 + dimensions)].normal_()
        self.log_z = nn.Parameter(torch.zeros(()))
        self.widths: Tensor
        self.register_buffer("widths", torch.logspace(math.log10(WIDEST), math.log10(NARROWEST), steps), False)

    def log_z_parameters(self) -> list[nn.Parameter]:
        return [self.log_z]

    def sample(
        self,
        condition: Tensor,
        exploration: Exploration = NO_EXPLORATION,
        generator: torch.Generator | None = None,
    ) -> Trajectories:
        """With probability `epsilon` a step goes to a uniform point of the box."""
        generator = generator or torch.default_generator
        count = len(self._unconditional(condition))
        points, log_behaviour = [], torch.zeros(count, device=condition.device)
        state = self._source(count)
        with torch.no_grad():
            for time in range(self.n_steps):
                mixture = self.forward_step(state, time).tempered(exploration.temperature)
                state = mixture.sample(generator)
                log_prob = mixture.log_prob(state)
                if exploration.epsilon:
                    anywhere = torch.rand(count, 1 + self.dimensions, generator=generator, device=condition.device)
                    uniform = anywhere[:, :1] < exploration.epsilon
                    state = torch.where(uniform, anywhere[:, 1:].clamp(EDGE, 1 - EDGE), state)
                    # (1 - epsilon) of the policy's density and epsilon of the uniform one, which is 1
                    log_prob = (
                        (mixture.log_prob(state).double().exp() * (1 - exploration.epsilon))
                        .add(exploration.epsilon)
                        .log()
                        .float()
                    )
                log_behaviour = log_behaviour + log_prob
                points.append(state)
        return self._trajectories(points, condition, log_behaviour)

    def sample_backward(self, trajectories: Trajectories, generator: torch.Generator | None = None) -> Trajectories:
        generator = generator or torch.default_generator
        state = trajectories.steps["point"][trajectories.last]
        points, log_behaviour = [state], torch.zeros(len(state), device=state.device)
        with torch.no_grad():
            for time in range(self.n_steps - 1, 0, -1):
                mixture = self.backward_step(state, time)
                state = mixture.sample(generator)
                log_behaviour = log_behaviour + mixture.log_prob(state)
                points.append(state)
        walked = self._trajectories(points[::-1], trajectories.condition, log_behaviour)
        return walked.with_log_reward(trajectories.log_reward)

    def log_probs(self, trajectories: Trajectories) -> LogProbs:
        reached = trajectories.steps["point"]
        time = torch.arange(len(reached), device=reached.device) - trajectories.starts[trajectories.index]
        # one pass of the network: over the source, then every point that a step leads to, which the next step leaves
        output = self._heads(torch.cat([self._source(1), reached]), torch.cat([time[:1], time + 1]))
        forward, backward, flow = torch.split(output, list(self.sizes), dim=1)
        is_first = time == 0
        left = torch.where(is_first, 0, torch.arange(len(reached), device=reached.device))  # row of the state left
        point_left = torch.where(is_first[:, None], self._source(1), reached.roll(1, 0))
        log_forward = self._forward_mixture(point_left, time, forward[left]).log_prob(reached)
        undone = self._backward_mixture(reached, time, backward[1:]).log_prob(point_left)
        return LogProbs(
            forward=log_forward,
            backward=torch.where(is_first, 0.0, undone),
            log_z=self.log_z.expand(len(trajectories)),
            log_flow=flow[left, 0],
        )

    def objects(self, trajectories: Trajectories) -> Objects:
        return trajectories.steps["point"][trajectories.last]

    def forward_step(self, points: Tensor, time: int) -> BoxMixture:
        """Where a step from each of N points, at `time` = 0 .. n - 1, goes. At time 0 the points are ignored: all are
        the source.
        """
        times = torch.full((len(points),), time, device=points.device)
        points = points if time else self._source(len(points))
        return self._forward_mixture(points, times, self._heads(points, times)[:, : self.sizes[0]])

    def backward_step(self, points: Tensor, time: int) -> BoxMixture:
        """Where each of N points came from at `time` = 1 .. n - 1, being at its point a step later."""
        times = torch.full((len(points),), time, device=points.device)
        if self.backward_kind == "fixed":
            return self._backward_mixture(points, times, torch.empty(len(points), 0))
        output = self._heads(points, times + 1)
        return self._backward_mixture(points, times, output[:, self.sizes[0] : -1])

    def cell_probabilities(self, cells: int, nodes: int = 5) -> Tensor:
        """Probability that a trajectory ends in each of `cells` ** d cells of the box, d at most 2: float64 `[cells]`
        or `[cells, cells]`.

        By quadrature: the density after each step on a grid of `nodes` Gauss-Legendre nodes a cell and axis. Exact as
        long as the nodes lie closer than a step is wide; how far the sum is from 1 shows the error.
        """
        if self.dimensions > 2:
            raise ValueError(f"dimensions = {self.dimensions}: quadrature is done over at most 2")
        offsets, weights = (torch.from_numpy(values) / 2 for values in np.polynomial.legendre.leggauss(nodes))
        axis = ((torch.arange(cells)[:, None] + 0.5 + offsets) / cells).flatten()
        weight = (weights / cells).repeat(cells)
        points = torch.cartesian_prod(*[axis] * self.dimensions).view(-1, self.dimensions).float()
        volume = weight if self.dimensions == 1 else torch.outer(weight, weight)
        with torch.no_grad():
            mass = torch.ones(1, dtype=torch.float64)
            state = self._source(1)
            for time in range(self.n_steps):
                density = torch.zeros(volume.shape, dtype=torch.float64)
                for part, share in zip(torch.split(state, _CHUNK), torch.split(mass, _CHUNK), strict=True):
                    density += _spread(self.forward_step(part, time), share, axis)
                mass, state = (density * volume).flatten(), points
        shape = (cells, nodes) * self.dimensions
        return mass.view(shape).sum(tuple(range(1, 2 * self.dimensions, 2)))

    def _source(self, count: int) -> Tensor:
        return torch.full((count, self.dimensions), 0.5, device=self.log_z.device)

    def _heads(self, points: Tensor, times: Tensor) -> Tensor:
        """The network's output at points and the steps that led there: `[N, sum(sizes)]`. Waves of rising frequency let
        it see fine detail.
        """
        frequency = 2 * math.pi * 2.0 ** torch.arange(_FREQUENCIES, device=points.device)
        phase = (points[:, :, None] * frequency).flatten(1)
        steps = nn.functional.one_hot(times, self.n_steps + 1).float()
        return self.heads(self.torso(torch.cat([2 * points - 1, phase.sin(), phase.cos(), steps], dim=1), None)).float()

    def _forward_mixture(self, points: Tensor, times: Tensor, output: Tensor) -> BoxMixture:
        weight, where = output[:, : self.components], output[:, self.components :]
        shift, stretch = where.view(len(output), 2, self.components, self.dimensions).unbind(1)
        width = self.widths[times][:, None, None]
        return self._mixture(weight, points[:, None, :] + width * shift, width, stretch)

    def _backward_mixture(self, points: Tensor, times: Tensor, output: Tensor) -> BoxMixture:
        width = self.widths[times][:, None, None]
        shift, stretch = (
            output.tanh()
            .view(len(output), 2, 1, self.dimensions)
            .unbind(1)  # bounded: it may not chase the forward steps
            if self.backward_kind == "learned"
            else (torch.zeros_like(points[:, None]),) * 2
        )
        weight = torch.zeros(len(points), 1, device=points.device)
        return self._mixture(weight, points[:, None, :] + width * shift, width, stretch)

    def _mixture(self, weight: Tensor, target: Tensor, width: Tensor, stretch: Tensor) -> BoxMixture:
        low, high = math.log(_LEAST_WIDTH), math.log(_LARGEST_WIDTH)
        middle = torch.logit((width.log() - low) / (high - low))
        stretched = (low + (high - low) * torch.sigmoid(middle + stretch)).exp()
        return BoxMixture(self.kind, weight.log_softmax(1), _into_box(target), stretched)

    def _trajectories(self, points: list[Tensor], condition: Tensor, log_behaviour: Tensor) -> Trajectories:
        count = len(condition)
        return Trajectories(
            steps={"point": torch.stack(points, 1).flatten(0, 1)},
            lengths=torch.full((count,), self.n_steps, dtype=torch.int64, device=condition.device),
            condition=condition,
            log_reward=torch.full((count,), torch.nan, device=condition.device),
            log_behaviour=log_behaviour,
            version=torch.full((count,), self.version, dtype=torch.int64, device=condition.device),
            identity=identity(points[-1].contiguous().view(torch.int32)),
        )

    def _unconditional(self, condition: Tensor) -> Tensor:
        if condition.ndim != 2 or condition.shape[1]:
            raise ValueError(f"condition has shape {tuple(condition.shape)}, expected [T, 0]")
        return condition


def _into_box(x: Tensor, sharpness: float = 40.0) -> Tensor:
    """The identity inside the box, bent smoothly to stay in it near its edges."""
    softplus = nn.functional.softplus
    return (x + softplus(-x, sharpness) - softplus(x - 1, sharpness)).clamp(0, 1)


def _spread(mixture: BoxMixture, mass: Tensor, axis: Tensor) -> Tensor:
    """Density at the grid over nodes `axis` (`[G]`) after steps of N mixtures, whose states hold `mass` (`[N]`):
    `[G]` or `[G, G]`.
    """
    share = (1 - UNIFORM) * mass[:, None] * mixture.log_weight.double().exp()
    uniform = UNIFORM * mass.sum()
    along = mixture.log_densities(axis.view(-1, 1, 1, 1)).exp()  # [G, N, K, d]
    if along.shape[3] == 1:
        return torch.einsum("nk,gnk->g", share, along[..., 0]) + uniform
    first, second = (along[..., i].flatten(1) for i in range(2))
    return (first * share.flatten()) @ second.T + uniform
