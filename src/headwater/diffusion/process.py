"""Chains of T steps from noise to data, and the noising processes that they undo: mathematics without parameters.

A grid has points 0 (noise) to T (data); step number k leads from point k to point k + 1. A denoiser's prediction says
what a step does; `noise` undoes it, so any object can be walked back to where chains start (Sohl-Dickstein et al. 2015,
arXiv 1503.03585; Ho et al. 2020, 2006.11239; Song et al. 2021, 2011.13456). Tokens: `tokens.py`.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import pairwise
from typing import Literal, get_args

import torch
from torch import Tensor

from headwater.diffusion.laws import GaussianLaw, Law, normal_like, per_chain

Parametrisation = Literal["noise", "data", "velocity"]
Variance = Literal["small", "large", "learned"]
Schedule = Literal["linear", "cosine", "exploding"]

_LARGEST_SPAN = 5.0
"""Of the logarithm of a factor on a deviation."""


class Process(ABC):
    """A chain of `n_steps` steps over states of `shape`."""

    shape: tuple[int, ...]

    @property
    @abstractmethod
    def n_steps(self) -> int:
        """T."""

    @abstractmethod
    def start(self, count: int, generator: torch.Generator) -> Tensor:
        """States at grid point 0: `[count, *shape]`."""

    @abstractmethod
    def start_log_prob(self, state: Tensor) -> Tensor:
        """Log-density or log-probability of states at grid point 0: `[N]`."""

    def time(self, number: Tensor) -> Tensor:
        """What a denoiser is told of step `number` (`[N]`): 1 at noise, near 0 at the last step."""
        return 1 - number.float() / self.n_steps

    @abstractmethod
    def law(self, prediction: Tensor, state: Tensor, number: Tensor) -> Law:
        """Of the states at grid points `number + 1`, from what a denoiser says of `state` at `number` (`[N]`)."""

    @abstractmethod
    def noise(self, state: Tensor, number: Tensor, generator: torch.Generator) -> Tensor:
        """States at grid points `number`, drawn by the noising process from `state` at `number + 1`."""

    @abstractmethod
    def noise_log_prob(self, noised: Tensor, state: Tensor, number: Tensor) -> Tensor:
        """Log-density or log-probability of what `noise` has drawn: `[N]`."""

    @abstractmethod
    def noised(self, data: Tensor, number: Tensor, generator: torch.Generator) -> Tensor:
        """States at grid points `number`, drawn from `data` in one go."""


@dataclass(frozen=True)
class GaussianProcess(Process):
    """x_k = alpha_k x + sigma_k eps, with data x and standard normal eps.

    alphas, sigmas: of grid points 0 to T. parametrisation: what is predicted: eps, x, or the velocity
    alpha_k eps - sigma_k x. variance: of a step: small, that of q(x_k+1 | x_k, x); large, that of the noising step; or
    learned, between both in logarithm by a second half of the prediction (Nichol & Dhariwal 2021, arXiv 2102.09672).
    Of small and large a second half is the logarithm of a factor on the deviation: a posterior's steps are narrower.
    clip: the largest absolute value that predicted data may have, 0 for no limit. times: what the denoiser is told of
    each step, if not 1 - k / T.

    Raises ValueError where a step would be deterministic: its log-probability could not balance anything.
    """

    shape: tuple[int, ...]
    alphas: tuple[float, ...]
    sigmas: tuple[float, ...]
    parametrisation: Parametrisation = "noise"
    variance: Variance = "large"
    clip: float = 0.0
    times: tuple[float, ...] | None = None

    def __post_init__(self) -> None:
        for name, names in (("parametrisation", Parametrisation), ("variance", Variance)):
            if getattr(self, name) not in get_args(names):
                raise ValueError(f"{name} = {getattr(self, name)!r}: must be one of {', '.join(get_args(names))}")
        if len(self.alphas) != len(self.sigmas) or len(self.alphas) < 2:
            raise ValueError(f"{len(self.alphas)} alphas, {len(self.sigmas)} sigmas: one of each for every grid point")
        if self.times is not None and len(self.times) != self.n_steps:
            raise ValueError(f"{len(self.times)} times: must be one for each of {self.n_steps} steps")
        ratios = [sigma / alpha for sigma, alpha in zip(self.sigmas, self.alphas, strict=True)]
        if any(one <= two for one, two in pairwise(ratios)) or ratios[-1] < 0:
            raise ValueError("sigma / alpha must fall from each grid point to the next, to 0 or above")
        if self.sigmas[-1] == 0 and self.variance != "large":
            raise ValueError(
                f"variance = {self.variance!r}: the last step would be deterministic, since sigma is 0 at the data; "
                "take variance = 'large', or leave some noise at the end (final_noise)"
            )

    @staticmethod
    def of(
        shape: Sequence[int],
        n_steps: int,
        schedule: Schedule = "linear",
        parametrisation: Parametrisation = "noise",
        variance: Variance = "large",
        clip: float = 0.0,
        final_noise: float = 0.0,
        largest_noise: float = 50.0,
        smallest_noise: float = 0.01,
    ) -> GaussianProcess:
        """By a schedule. linear, cosine: variance-preserving, with the continuous-time linear beta from 0.1 to 20 (Song
        et al. 2021) or the squared cosine (Nichol & Dhariwal 2021). exploding: alpha = 1 and sigma geometrically from
        `largest_noise` to `smallest_noise`. final_noise: the sigma that is left in the data, of the first two.
        """
        if schedule not in get_args(Schedule):
            raise ValueError(f"schedule = {schedule!r}: must be one of {', '.join(get_args(Schedule))}")
        if n_steps < 1:
            raise ValueError(f"n_steps = {n_steps}: must be at least 1")
        times = [1 - k / n_steps for k in range(n_steps + 1)]
        if schedule == "exploding":
            if not 0 < smallest_noise < largest_noise:
                raise ValueError(f"smallest_noise = {smallest_noise}: must be above 0 and below {largest_noise}")
            alphas = [1.0] * (n_steps + 1)
            sigmas = [smallest_noise * (largest_noise / smallest_noise) ** time for time in times]
        else:
            if not 0 <= final_noise < 0.5:
                raise ValueError(f"final_noise = {final_noise}: must be at least 0 and below 0.5")
            signal = _linear_signal if schedule == "linear" else _cosine_signal
            # the squared alpha at the end is 1 - final_noise^2, all others keep their odds to it
            odds = [(1 - signal(time)) / signal(time) + final_noise**2 / (1 - final_noise**2) for time in times]
            alphas = [math.sqrt(1 / (1 + value)) for value in odds]
            sigmas = [math.sqrt(value / (1 + value)) for value in odds]
        return GaussianProcess(tuple(shape), tuple(alphas), tuple(sigmas), parametrisation, variance, clip)

    @property
    def n_steps(self) -> int:
        return len(self.alphas) - 1

    def time(self, number: Tensor) -> Tensor:
        return super().time(number) if self.times is None else self._at("time", number)

    def start(self, count: int, generator: torch.Generator) -> Tensor:
        drawn = torch.randn((count, *self.shape), generator=generator, device=generator.device)
        return self.start_deviation * drawn

    def start_log_prob(self, state: Tensor) -> Tensor:
        return GaussianLaw(torch.zeros_like(state), state.new_full((len(state),), self.start_deviation)).log_prob(state)

    @property
    def start_deviation(self) -> float:
        """Of the noise that chains start from, with the variance that data of variance 1 add to it if alpha is not
        1 all along."""
        return self.sigmas[0] if self.alphas[0] == 1 else math.sqrt(self.sigmas[0] ** 2 + self.alphas[0] ** 2)

    def law(self, prediction: Tensor, state: Tensor, number: Tensor) -> GaussianLaw:
        span = prediction[:, self.shape[0] :] if prediction.shape[1] > self.shape[0] else None
        data = self.predicted_data(prediction, state, number)
        of_data, of_state = (per_chain(self._at(name, number), state) for name in ("of_data", "of_state"))
        mean = of_data * data + of_state * state
        if self.variance != "learned":
            deviation = self._at(self.variance, number)
            if span is None:
                return GaussianLaw(mean, deviation)
            return GaussianLaw(mean, per_chain(deviation, state) * span.clamp(-_LARGEST_SPAN, _LARGEST_SPAN).exp())
        if span is None:
            raise ValueError(f"a learned variance needs {2 * self.shape[0]} channels, the prediction has half of them")
        low, high = (per_chain(self._at(name, number), state).log() for name in ("small", "large"))
        share = (span + 1) / 2
        return GaussianLaw(mean, (share * high + (1 - share) * low).exp())

    def predicted_data(self, prediction: Tensor, state: Tensor, number: Tensor) -> Tensor:
        """The mean of the data, given the state: `[N, *shape]`. What the prediction says of the variance is not looked
        at."""
        prediction = prediction[:, : self.shape[0]]
        alpha, sigma = (per_chain(self._at(name, number), state) for name in ("alpha", "sigma"))
        if self.parametrisation == "noise":
            data = (state - sigma * prediction) / alpha
        elif self.parametrisation == "velocity":
            data = (alpha * state - sigma * prediction) / (alpha**2 + sigma**2)
        else:
            data = prediction
        return data.clamp(-self.clip, self.clip) if self.clip else data

    def prediction_of(self, data: Tensor, state: Tensor, number: Tensor) -> Tensor:
        """What a denoiser must say for `data` to be its predicted data: the inverse of `predicted_data`."""
        alpha, sigma = (per_chain(self._at(name, number), state) for name in ("alpha", "sigma"))
        if self.parametrisation == "noise":
            return (state - alpha * data) / sigma
        if self.parametrisation == "velocity":
            return (alpha * state - (alpha**2 + sigma**2) * data) / sigma
        return data

    def noise(self, state: Tensor, number: Tensor, generator: torch.Generator) -> Tensor:
        return self._noising(state, number).sample(generator)

    def noise_log_prob(self, noised: Tensor, state: Tensor, number: Tensor) -> Tensor:
        return self._noising(state, number).log_prob(noised)

    def noised(self, data: Tensor, number: Tensor, generator: torch.Generator) -> Tensor:
        alpha, sigma = (per_chain(self._at(name, number), data) for name in ("alpha", "sigma"))
        return alpha * data + sigma * normal_like(data, generator)

    def alpha_sigma(self, number: Tensor) -> tuple[Tensor, Tensor]:
        """alpha and sigma of grid points: `[N]` each."""
        return self._at("alpha", number), self._at("sigma", number)

    def _noising(self, state: Tensor, number: Tensor) -> GaussianLaw:
        return GaussianLaw(per_chain(self._at("ratio", number), state) * state, self._at("noising", number))

    def _at(self, name: str, number: Tensor) -> Tensor:
        table = self._tables[name]
        if table.device != number.device:
            self._tables[name] = table = table.to(number.device)
        return table[number]

    @cached_property
    def _tables(self) -> dict[str, Tensor]:
        """Of every step or grid point, in double precision until the end."""
        alpha, sigma = (torch.tensor(values, dtype=torch.float64) for values in (self.alphas, self.sigmas))
        before, after = slice(None, -1), slice(1, None)
        ratio = alpha[before] / alpha[after]
        noising = sigma[before].square() - ratio.square() * sigma[after].square()  # variance of a noising step
        small = sigma[after].square() * noising / sigma[before].square()
        tables = {
            "alpha": alpha, "sigma": sigma, "ratio": ratio, "noising": noising.sqrt(),
            "of_data": alpha[after] * noising / sigma[before].square(),
            "of_state": ratio * sigma[after].square() / sigma[before].square(),
            "small": small.sqrt(), "large": noising.sqrt(),
        }  # fmt: skip
        if self.times is not None:
            tables["time"] = torch.tensor(self.times, dtype=torch.float64)
        return {name: table.float() for name, table in tables.items()}


@dataclass(frozen=True)
class BrownianProcess(Process):
    """A drifting Brownian motion from the origin: x_k+1 = x_k + u / T + sqrt(variance / T) eps, where the prediction u
    is the drift. Without drift it ends at N(0, variance); data are walked back by the bridge to the origin (path
    integral samplers: Zhang & Chen 2022, arXiv 2111.15141).
    """

    shape: tuple[int, ...]
    steps: int
    variance: float = 1.0

    def __post_init__(self) -> None:
        if self.steps < 1:
            raise ValueError(f"steps = {self.steps}: must be at least 1")
        if not self.variance > 0:
            raise ValueError(f"variance = {self.variance}: must be above 0")

    @property
    def n_steps(self) -> int:
        return self.steps

    def start(self, count: int, generator: torch.Generator) -> Tensor:
        return torch.zeros((count, *self.shape), device=generator.device)

    def start_log_prob(self, state: Tensor) -> Tensor:
        return state.new_zeros(len(state))  # an atom

    def law(self, prediction: Tensor, state: Tensor, number: Tensor) -> GaussianLaw:
        deviation = state.new_full((len(state),), math.sqrt(self.variance / self.steps))
        return GaussianLaw(state + prediction / self.steps, deviation)

    def noise(self, state: Tensor, number: Tensor, generator: torch.Generator) -> Tensor:
        mean, deviation = self._bridge(state, number, number + 1)
        return mean + per_chain(deviation, state) * normal_like(state, generator)

    def noise_log_prob(self, noised: Tensor, state: Tensor, number: Tensor) -> Tensor:
        mean, deviation = self._bridge(state, number, number + 1)
        first = number == 0  # the origin, an atom
        log_prob = GaussianLaw(mean, torch.where(first, 1.0, deviation)).log_prob(noised)
        return torch.where(first, 0.0, log_prob)

    def noised(self, data: Tensor, number: Tensor, generator: torch.Generator) -> Tensor:
        mean, deviation = self._bridge(data, number, torch.full_like(number, self.steps))
        return mean + per_chain(deviation, data) * normal_like(data, generator)

    def _bridge(self, state: Tensor, number: Tensor, at: Tensor) -> tuple[Tensor, Tensor]:
        """Mean and deviation at grid points `number` of the motion that is at `state` at grid points `at`."""
        share = number.float() / at.float()
        spread = self.variance * number.float() * (at - number).float() / (at.float() * self.steps)
        return per_chain(share, state) * state, spread.sqrt()


def _linear_signal(time: float, low: float = 0.1, high: float = 20.0) -> float:
    """alpha^2 at `time` from 0, data, to 1, noise."""
    return math.exp(-0.5 * time**2 * (high - low) - time * low)


def _cosine_signal(time: float) -> float:
    def at(time: float) -> float:
        return math.cos((time + 0.008) / 1.008 * math.pi / 2) ** 2

    return at(0.995 * time) / at(0)  # a little is left at noise, for the data to be had from it
