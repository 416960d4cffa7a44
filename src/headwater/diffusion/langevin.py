"""The Langevin parametrisation of a posterior's network: the gradient of the log-likelihood, times a factor that is
learned (Zhang & Chen 2022, arXiv 2111.15141), as relative trajectory balance uses it (2405.20971).

At a noised state the gradient says little of the data, the less the more noise there is. At the data that the prior
predicts it says how far Bayes' rule moves them, if what is left unknown of them is Gaussian: the step of
pseudo-inverse guidance, whose bias training then removes.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Literal, TypeAlias

import torch
from torch import Tensor, nn

from headwater.diffusion.denoisers import of_times, time_features
from headwater.diffusion.guidance import GRAM_LIMIT, whitened_gram
from headwater.diffusion.laws import per_chain
from headwater.diffusion.likelihoods import GaussianLikelihood, Likelihood
from headwater.diffusion.mixtures import step_numbers
from headwater.diffusion.process import GaussianProcess, Process

LogLikelihood: TypeAlias = Callable[[Tensor, Tensor], Tensor]
"""log r `[N]` of states `[N, *shape]` under conditions `[N, C]`, differentiable in the states; a `Likelihood` is one
too."""
Place = Literal["state", "data"]

_HIDDEN = 64


class Langevin(nn.Module):
    """A push along the gradient of the log-likelihood, in the shape of a state, and a factor on it that is learned as a
    function of time, one for each channel; at the start it is 0.

    at: where the gradient is taken. state: at the noised state, and is the push itself. data: at what the prior
    predicts of the data, and the push is how far Bayes' rule moves them, in the units of a prediction; what is unknown
    of them is taken for Gaussian with the variance that remains of `deviation`, of the data or of one mode of them.
    largest: what each coordinate of a gradient is clipped to, but for that of Gaussian noise on a linear operator at
    the data, whose push is the exact one for such a Gaussian and cannot be too large.

    Raises ValueError for a process that is not Gaussian.
    """

    spectrum: Tensor
    vectors: Tensor

    def __init__(
        self, process: Process, log_likelihood: LogLikelihood, at: Place, deviation: float, largest: float
    ) -> None:
        super().__init__()
        if not isinstance(process, GaussianProcess):
            raise ValueError(f"langevin: strings of tokens or a {type(process).__name__} have no such gradient")
        self.process, self.at, self.deviation, self.largest = process, at, deviation, largest
        self.log_likelihood = log_likelihood
        self.enter = nn.Linear(time_features(torch.zeros(1)).shape[1], _HIDDEN)
        self.last = nn.Linear(_HIDDEN, process.shape[0])
        nn.init.zeros_(self.last.weight), nn.init.zeros_(self.last.bias)
        self.exact = _is_linear(log_likelihood)
        if self.exact:
            assert isinstance(log_likelihood, GaussianLikelihood)
            spectrum, vectors = whitened_gram(log_likelihood)
            self.register_buffer("spectrum", spectrum, persistent=False)
            self.register_buffer("vectors", vectors, persistent=False)

    @property
    def columns(self) -> int:
        """How many numbers `push` has for a network to see."""
        return 2 * math.prod(self.process.shape) if self.at == "data" else 0

    def push(self, said: Tensor, state: Tensor, time: Tensor, condition: Tensor) -> tuple[Tensor, Tensor]:
        """The push, `[N, *shape]`, without gradient, and what of it is worth being seen by a network, `[N, columns]`.
        said: what the prior predicts. At the data the push is in their own units."""
        if self.at == "state":
            push = self._ascent(lambda x: self._log_r(x, condition), state, self.largest)
            return push, push.new_empty(len(push), 0)
        process, number = self.process, step_numbers(self.process, time)
        data = process.predicted_data(said, state, number)
        alpha, sigma = process.alpha_sigma(number)
        unknown = (self.deviation * sigma).square() / ((alpha * self.deviation).square() + sigma.square())
        if self.exact:
            slope = self._ascent(lambda x: self._marginal(x, condition, unknown), data, math.inf)
        else:
            slope = self._ascent(lambda x: self._log_r(x, condition), data, self.largest)
        push = per_chain(unknown, data) * slope
        return push, (torch.cat([data, push], 1).flatten(1) / self.deviation).asinh()  # linear, but for large ones

    def scaled(self, push: Tensor, time: Tensor) -> Tensor:
        """The push times its factor, as a part of a prediction."""
        factor = of_times(lambda features: self.last(nn.functional.silu(self.enter(features))), time)
        if self.at == "data":
            push = self.process.prediction_of(push, torch.zeros_like(push), step_numbers(self.process, time))
        return factor.view(*factor.shape, *[1] * (push.ndim - 2)) * push

    def _log_r(self, x: Tensor, condition: Tensor) -> Tensor:
        if isinstance(self.log_likelihood, Likelihood):
            return self.log_likelihood.log_prob(x, condition[:, : self.log_likelihood.condition_size])
        return self.log_likelihood(x, condition)

    def _marginal(self, x: Tensor, condition: Tensor, unknown: Tensor) -> Tensor:
        """log N(y; A x, unknown A A' + sigma^2) without its constant."""
        likelihood = self.log_likelihood
        assert isinstance(likelihood, GaussianLikelihood)
        residual = likelihood.residual(x, condition[:, : likelihood.condition_size]) / likelihood.sigma.to(x.device)
        along = residual.flatten(1) @ self.vectors
        return -0.5 * (along.square() / (1 + unknown[:, None] * self.spectrum)).sum(1)

    @staticmethod
    def _ascent(log_r: Callable[[Tensor], Tensor], x: Tensor, largest: float) -> Tensor:
        with torch.enable_grad():
            here = x.detach().requires_grad_()
            (slope,) = torch.autograd.grad(log_r(here).sum(), here)
        return slope.nan_to_num(0.0, largest, -largest).clamp(-largest, largest)


def _is_linear(log_likelihood: LogLikelihood) -> bool:
    return (
        isinstance(log_likelihood, GaussianLikelihood)
        and log_likelihood.operator.is_linear
        and math.prod(log_likelihood.operator.measured) <= GRAM_LIMIT
    )
