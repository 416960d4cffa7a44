"""Learning a prior from data, as a Policy: a trajectory is one noised step that ends in a given object, and its forward
log-probability says how well the denoiser undoes it, so that the objective `mle` trains it (denoising score matching:
Ho et al. 2020, arXiv 2006.11239, equations 12 and 14; masked tokens: Sahoo et al. 2024, 2406.07524).
"""

from __future__ import annotations

from typing import Literal, get_args

import torch
from torch import Tensor

from headwater.diffusion.laws import GaussianLaw
from headwater.diffusion.policy import STATE
from headwater.diffusion.priors import Prior
from headwater.diffusion.process import GaussianProcess
from headwater.diffusion.tokens import RevealingProcess
from headwater.environments.base import Objects, identity
from headwater.policies.base import NO_EXPLORATION, Exploration, LogProbs, Policy
from headwater.trajectories import Trajectories

Weighting = Literal["simple", "evidence"]

NOISED, NUMBER = "noised", "number"
"""The per-step tensors of the noised state `[S, *shape]`, and of its grid point `[S]`."""


class PriorFitting(Policy):
    """Draws from a prior, and learns it from given objects.

    weighting: how the steps of a chain are weighed. evidence: as in the bound on the log-likelihood. simple: alike, by
    the squared error of the prediction, or by the log-probability of the masked tokens; samples are better by it.

    Raises ValueError for a chain that is neither Gaussian nor masked, and for a learned variance that `simple` does
    not teach.
    """

    def __init__(self, prior: Prior, weighting: Weighting = "simple") -> None:
        super().__init__()
        if not isinstance(prior.process, (GaussianProcess, RevealingProcess)):
            raise ValueError(
                f"a {type(prior.process).__name__} is not learned from data, only Gaussian or masked chains"
            )
        if weighting not in get_args(Weighting):
            raise ValueError(f"weighting = {weighting!r}: must be one of {', '.join(get_args(Weighting))}")
        learned = isinstance(prior.process, GaussianProcess) and prior.process.variance == "learned"
        if learned and weighting == "simple":
            raise ValueError("weighting = 'simple' does not teach a learned variance; take 'evidence'")
        self.denoiser = prior.denoiser
        self.process, self.units, self.alphabet, self.weighting = prior.process, prior.units, prior.alphabet, weighting

    @property
    def prior(self) -> Prior:
        """As it is learned so far; of a moving average, that average."""
        return Prior(self.process, self.denoiser, self.units, self.alphabet)

    @property
    def device(self) -> torch.device:
        return next(self.parameters()).device

    def sample(
        self, condition: Tensor, exploration: Exploration = NO_EXPLORATION, generator: torch.Generator | None = None
    ) -> Trajectories:
        """One object for each row of `condition`, its end alone. log_behaviour estimates its own log-probability."""
        if exploration.epsilon:
            raise ValueError("epsilon: a chain explores by temperature, not by uniform actions")
        generator = generator or torch.default_generator
        drawn, log_prob = self.prior.sample(condition.to(self.device), generator, exploration.temperature)
        return self._trajectories({STATE: drawn}, condition, log_prob)

    @torch.no_grad()
    def sample_to(self, states: Tensor, condition: Tensor, generator: torch.Generator | None = None) -> Trajectories:
        """One step each towards given objects `[T, *shape]`, from a random point of the noising process."""
        generator = generator or torch.default_generator
        data = states.to(self.device)
        number = torch.randint(self.process.n_steps, (len(data),), generator=generator).to(self.device)
        steps = {STATE: data, NOISED: self.process.noised(data, number, generator), NUMBER: number}
        return self._trajectories(steps, condition, torch.zeros(len(data), device=self.device))

    def log_probs(self, trajectories: Trajectories) -> LogProbs:
        """forward: T times the step's part of the weighted log-likelihood. There is no reference, log Z is 0."""
        data, state, number = (trajectories.steps[name] for name in (STATE, NOISED, NUMBER))
        condition = trajectories.condition[trajectories.index].to(state.device)
        prediction = self.denoiser(state, self.process.time(number), condition)
        process = self.process
        if isinstance(process, RevealingProcess):
            forward = self._of_tokens(process, prediction, data, state, number)
        else:
            assert isinstance(process, GaussianProcess)
            forward = self._of_numbers(process, prediction, data, state, number)
        return LogProbs(forward, forward.detach(), torch.zeros(len(trajectories), device=forward.device))

    def objects(self, trajectories: Trajectories) -> Objects:
        return trajectories.steps[STATE][trajectories.last]

    def _of_numbers(
        self, process: GaussianProcess, prediction: Tensor, data: Tensor, state: Tensor, number: Tensor
    ) -> Tensor:
        target = process.prediction_of(data, state, number)
        if self.weighting == "simple":
            return -0.5 * (prediction - target).square().flatten(1).sum(1)
        # the mean over x_k+1 ~ q(. | x_k, x) of its log-density under the denoiser's law: that of q's mean, and a term
        # for q's variance, in the place of a draw of x_k+1
        law = process.law(prediction, state, number)
        known = torch.cat([target, torch.zeros_like(target)], 1) if process.variance == "learned" else target
        small = process.alpha_sigma(number + 1)[1].square() * self._noising_share(process, number)
        mean = process.law(known, state, number).mean
        ones = [1] * (state.ndim - 1)
        spread = (small.view(-1, *ones) / (2 * _deviation(law).square())).expand_as(mean)
        return process.n_steps * (law.log_prob(mean) - spread.flatten(1).sum(1))

    @staticmethod
    def _noising_share(process: GaussianProcess, number: Tensor) -> Tensor:
        """The share of the noise at `number` that the step from `number + 1` has added."""
        (alpha, sigma), (alpha_next, sigma_next) = (process.alpha_sigma(point) for point in (number, number + 1))
        return 1 - (alpha * sigma_next / (alpha_next * sigma)).square()

    def _of_tokens(
        self, process: RevealingProcess, prediction: Tensor, data: Tensor, state: Tensor, number: Tensor
    ) -> Tensor:
        said = prediction.float().log_softmax(-1).gather(-1, data[..., None])[..., 0]
        hidden = torch.where(state == process.mask, said, 0.0).sum(1)
        if self.weighting == "simple":
            return hidden
        return process.n_steps / (process.n_steps - number) * hidden  # so likely is each revealed in this step

    def _trajectories(self, steps: dict[str, Tensor], condition: Tensor, log_behaviour: Tensor) -> Trajectories:
        objects = steps[STATE]
        count = len(objects)
        return Trajectories(
            steps=steps,
            lengths=torch.ones(count, dtype=torch.int64, device=objects.device),
            condition=condition.to(objects.device),
            log_reward=torch.full((count,), torch.nan, device=objects.device),
            log_behaviour=log_behaviour,
            version=torch.full((count,), self.version, device=objects.device),
            identity=identity(objects.flatten(1).contiguous().view(torch.int32)),
        )


class Unscored:
    """The reward of objects that are given: log R = 0."""

    def __call__(self, objects: Objects, condition: Tensor) -> Tensor:
        return torch.zeros(len(objects), device=condition.device)


def _deviation(law: GaussianLaw) -> Tensor:
    deviation = law.deviation
    return deviation.view(-1, *[1] * (law.mean.ndim - 1)) if deviation.ndim == 1 else deviation
