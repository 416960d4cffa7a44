"""What a chain of finitely many steps makes of a known prior. Its ends are not quite draws from the mixture that its
denoiser knows, so its log Z = log E[r(x_T)] is not quite the mixture's: here it is, by importance sampling of whole
chains, and in closed form where every step is Gaussian and affine (Doob's h-transform: Rogers & Williams 2000, IV.39).
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import NamedTuple, TypeGuard

import torch
from torch import Tensor, nn

from headwater.diffusion.laws import GaussianLaw, Law
from headwater.diffusion.mixtures import span_of, step_numbers
from headwater.diffusion.process import BrownianProcess, GaussianProcess, Process
from headwater.environments.base import Objects
from headwater.reward import Reward


class Chains(NamedTuple):
    """Drawn chains. objects: their ends, `[N, *shape]`. log_ratio: `[N]`, log-probability under what drew them, less
    that under the prior; log_reward: `[N]`. Both are float64, for `estimators.log_z_estimates`."""

    objects: Tensor
    log_ratio: Tensor
    log_reward: Tensor


@torch.no_grad()
def draw_chains(
    process: Process,
    prior: nn.Module,
    proposal: nn.Module,
    reward: Reward,
    condition: Tensor,
    generator: torch.Generator,
) -> Chains:
    """One chain for each row of `condition`, `[N, C]`, drawn by the denoiser `proposal` and weighed against `prior`.

    With the denoiser of the exact posterior mixture as proposal, the weights are even enough for the chain's own log Z
    where weighing draws of the prior (`proposal` = `prior`) is hopeless.
    """
    state = process.start(len(condition), generator).to(condition.device)
    log_ratio = torch.zeros(len(condition), dtype=torch.float64, device=state.device)
    for step in range(process.n_steps):
        law = _law(process, proposal, state, step, condition)
        following = law.sample(generator)
        if proposal is not prior:
            of_prior = _law(process, prior, state, step, condition).log_prob(following)
            log_ratio = log_ratio + (law.log_prob(following) - of_prior).double()
        state = following
    return Chains(state, log_ratio, reward(state, condition).double())


@torch.no_grad()
def walk_back(
    process: Process,
    prior: nn.Module,
    proposal: nn.Module,
    reward: Reward,
    objects: Tensor,
    condition: Tensor,
    generator: torch.Generator,
) -> Chains:
    """Chains that end in `objects`, `[N, *shape]`, drawn backward by the noising process: exact draws of the posterior
    walked back are what the upper bound on log Z takes."""
    state, log_ratio = objects, torch.zeros(len(objects), dtype=torch.float64, device=objects.device)
    for step in reversed(range(process.n_steps)):
        before = process.noise(state, torch.full((len(objects),), step, device=state.device), generator)
        ours, of_prior = (
            _law(process, each, before, step, condition).log_prob(state).double() for each in (proposal, prior)
        )
        log_ratio, state = log_ratio + ours - of_prior, before
    return Chains(objects, log_ratio, reward(objects, condition).double())


def _law(process: Process, denoiser: nn.Module, state: Tensor, step: int, condition: Tensor) -> Law:
    number = torch.full((len(state),), step, device=state.device)
    return process.law(denoiser(state, process.time(number), condition), state, number)


@dataclass(frozen=True, eq=False)
class QuadraticReward:
    """log r(x) = constant + sum of slope x - curvature x^2 / 2 over the coordinates: a Reward of objects `[N, *shape]`.

    slope, curvature: float64 `[d]`; the curvature is not negative. With none of it r tilts the prior exponentially, and
    the best steps keep the prior's variance.
    """

    slope: Tensor
    curvature: Tensor
    constant: float = 0.0

    def __post_init__(self) -> None:
        if self.slope.ndim != 1 or self.slope.shape != self.curvature.shape:
            shapes = f"{tuple(self.slope.shape)} and {tuple(self.curvature.shape)}"
            raise ValueError(f"slope and curvature have shapes {shapes}: must be [d], both")
        if not bool((self.curvature >= 0).all()):
            raise ValueError(f"curvature = {float(self.curvature.min()):g}: must not be negative")

    @staticmethod
    def of_measurement(gain: Tensor, measurement: Tensor, deviation: float) -> QuadraticReward:
        """The likelihood of a measurement gain x + deviation noise of every coordinate, `[d]`; gain 0: not seen."""
        seen, gain, y = gain != 0, gain.double(), measurement.double()
        constant = -0.5 * (y / deviation).square() - math.log(deviation * math.sqrt(2 * math.pi))
        return QuadraticReward(gain * y / deviation**2, (gain / deviation).square(), float(constant[seen].sum()))

    def __call__(self, objects: Objects, condition: Tensor) -> Tensor:
        x = torch.as_tensor(objects).flatten(1).double()
        return (self.constant + x @ self.slope.to(x) - 0.5 * x.square() @ self.curvature.to(x)).float()


class GaussianChain:
    """All that there is to know of a chain whose prior's steps have means affine in the state, each coordinate by
    itself, under a quadratic reward: of the denoiser of one Gaussian along the coordinate axes, for one.

    h_k(x) = log E[r(x_T) | x_k = x] is quadratic, found backward from the last step. Tilted by h_k+1, a step stays
    Gaussian, and along every chain of such steps log Z's part in balance is h_0(x_0) exactly: what is left of the
    residual is how much the start, which has the prior's law, knows of the data.

    Raises ValueError where the process cannot have steps narrower than the prior's and the curvature asks for them.
    """

    def __init__(self, process: GaussianProcess | BrownianProcess, prior: nn.Module, reward: QuadraticReward) -> None:
        if bool((reward.curvature > 0).any()) and not _has_learned_variance(process):
            raise ValueError("curvature: must be 0 where steps have the prior's variance; take variance = 'learned'")
        if len(reward.slope) != math.prod(process.shape):
            raise ValueError(f"slope: {len(reward.slope)} numbers for objects of shape {process.shape}")
        self.process, self.prior = process, prior
        slope, curvature, constant = reward.slope.double(), reward.curvature.double(), reward.constant
        slopes, curvatures, constants = [slope], [curvature], [constant]
        for shift, factor, variance in reversed(list(zip(*self._steps(), strict=True))):
            narrowing = 1 + variance * curvature
            gained = slope * shift - 0.5 * curvature * shift.square() + 0.5 * variance * slope.square()
            constant += float((gained / narrowing - 0.5 * narrowing.log()).sum())
            slope = factor * (slope - curvature * shift) / narrowing
            curvature = factor.square() * curvature / narrowing
            slopes.append(slope)
            curvatures.append(curvature)
            constants.append(constant)
        self._slope, self._curvature = (torch.stack(each[::-1]) for each in (slopes, curvatures))
        self._constant = torch.tensor(constants[::-1], dtype=torch.float64)

    @property
    def log_z(self) -> float:
        """log E[r(x_T)] of the chain itself."""
        process = self.process
        start = process.start_deviation**2 if isinstance(process, GaussianProcess) else 0.0
        slope, narrowing = self._slope[0], 1 + start * self._curvature[0]
        return float(self._constant[0] + (0.5 * start * slope.square() / narrowing - 0.5 * narrowing.log()).sum())

    def log_expected_reward(self, state: Tensor, number: Tensor) -> Tensor:
        """h at states `[N, *shape]` of grid points `[N]`, from 0 to T: float64 `[N]`."""
        x = state.flatten(1).double().cpu()
        slope, curvature, constant = (table[number.cpu()] for table in (self._slope, self._curvature, self._constant))
        return (constant + (slope * x - 0.5 * curvature * x.square()).sum(1)).to(state.device)

    def denoiser(self) -> GaussianChainDenoiser:
        """The posterior's own: with it each step is the prior's step tilted by h."""
        return GaussianChainDenoiser(self)

    @torch.no_grad()
    def _steps(self) -> tuple[Tensor, Tensor, Tensor]:
        """Of every step, the mean's value at 0 and its slope, and the variance: float64 `[T, d]` each."""
        number = torch.arange(self.process.n_steps)
        at_0, at_1 = (self._law(torch.full((len(number), *self.process.shape), x), number) for x in (0.0, 1.0))
        shift, end, deviation = (_rows(values, at_0.mean) for values in (at_0.mean, at_1.mean, at_0.deviation))
        return shift, end - shift, deviation.square()

    def _law(self, state: Tensor, number: Tensor) -> GaussianLaw:
        prediction = self.prior(state, self.process.time(number), state.new_empty(len(state), 0))
        return self.process.law(prediction, state, number)


class GaussianChainDenoiser(nn.Module):
    """The optimal posterior denoiser of a `GaussianChain`; it has no parameters."""

    def __init__(self, chain: GaussianChain) -> None:
        super().__init__()
        self.chain = chain

    def forward(self, state: Tensor, time: Tensor, condition: Tensor) -> Tensor:
        """The prediction at states `[N, *shape]`, times `[N]`; conditions are not looked at."""
        process, number = self.chain.process, step_numbers(self.chain.process, time)
        prediction = self.chain.prior(state, time, condition)
        law = process.law(prediction, state, number)
        mean, deviation = _rows(law.mean, law.mean), _rows(law.deviation, law.mean)
        slope, curvature = (
            table[(number + 1).cpu()].to(state.device) for table in (self.chain._slope, self.chain._curvature)
        )
        narrowing = 1 + deviation.square() * curvature
        pulled = ((mean + deviation.square() * slope) / narrowing - mean).view(state.shape)
        first = prediction.chunk(2, 1)[0] if _has_learned_variance(process) else prediction
        # the mean is linear in the prediction: how far it moves with it, seen at the origin
        origin = torch.zeros_like(state)
        at_0, at_1 = (torch.full_like(prediction, value) for value in (0.0, 1.0))
        moves = process.law(at_1, origin, number).mean - process.law(at_0, origin, number).mean
        first = (first.double() + pulled / moves.double()).to(state.dtype)
        if not _has_learned_variance(process):
            return first
        narrow = (deviation / narrowing.sqrt()).view(state.shape)
        return torch.cat((first, span_of(process, state, number, narrow)), 1)


def _has_learned_variance(process: Process) -> TypeGuard[GaussianProcess]:
    return isinstance(process, GaussianProcess) and process.variance == "learned"


def _rows(values: Tensor, like: Tensor) -> Tensor:
    """`[N]` or `[N, *shape]` as float64 `[N, d]`."""
    values = values.view(-1, *[1] * (like.ndim - 1)) if values.ndim == 1 else values
    return values.expand_as(like).flatten(1).double()
