"""Learning an autoencoder from data, as a Policy: a trajectory is one given object with the noise of its latents, and
its forward log-probability the bound on its log-density, so that the objective `mle` trains it.
"""

from __future__ import annotations

import torch
from torch import Tensor

from headwater.conditions import NoCondition
from headwater.diffusion.fitting import Unscored
from headwater.diffusion.latent import Autoencoder
from headwater.diffusion.policy import STATE
from headwater.environments.base import Objects, identity
from headwater.objectives import Objective
from headwater.policies.base import NO_EXPLORATION, Exploration, LogProbs, Policy
from headwater.training import ExplorationSettings, Trainer, Training
from headwater.trajectories import Trajectories

LATENT_NOISE = "latent_noise"
"""The per-step tensor of the standard normal noise of latents, `[S, d_z]`."""

FITTING = Training(iterations=2000, batch_size=128, learning_rate=2e-3, schedule="cosine")


class AutoencoderFitting(Policy):
    """Draws objects of standard normal latents, and learns the autoencoder from given objects."""

    def __init__(self, autoencoder: Autoencoder) -> None:
        super().__init__()
        self.autoencoder = autoencoder

    @torch.no_grad()
    def sample(
        self, condition: Tensor, exploration: Exploration = NO_EXPLORATION, generator: torch.Generator | None = None
    ) -> Trajectories:
        noise = self._noise(len(condition), generator)
        return self._trajectories(self.autoencoder.decode(noise), noise, condition)

    def sample_to(self, states: Tensor, condition: Tensor, generator: torch.Generator | None = None) -> Trajectories:
        """One step each to given objects `[T, *shape]`, with new noise of their latents."""
        noise = self._noise(len(states), generator)
        return self._trajectories(states.to(noise.device), noise, condition)

    def log_probs(self, trajectories: Trajectories) -> LogProbs:
        """forward: the bound on the log-density of each object. There is no reference, log Z is 0."""
        forward = self.autoencoder.evidence(trajectories.steps[STATE], trajectories.steps[LATENT_NOISE])
        return LogProbs(forward, forward.detach(), forward.new_zeros(len(trajectories)))

    def objects(self, trajectories: Trajectories) -> Objects:
        return trajectories.steps[STATE][trajectories.last]

    def _noise(self, count: int, generator: torch.Generator | None) -> Tensor:
        generator = generator or torch.default_generator
        drawn = torch.randn(count, self.autoencoder.latent, generator=generator, device=generator.device)
        return drawn.to(next(self.parameters()).device)

    def _trajectories(self, objects: Tensor, noise: Tensor, condition: Tensor) -> Trajectories:
        count = len(objects)
        return Trajectories(
            steps={STATE: objects, LATENT_NOISE: noise},
            lengths=torch.ones(count, dtype=torch.int64, device=objects.device),
            condition=condition.to(objects.device),
            log_reward=torch.full((count,), torch.nan, device=objects.device),
            log_behaviour=torch.zeros(count, device=objects.device),
            version=torch.full((count,), self.version, device=objects.device),
            identity=identity(objects.flatten(1).contiguous().view(torch.int32)),
        )


def fit_autoencoder(
    data: Tensor, latent: int, width: int = 256, training: Training = FITTING, seed: int = 0
) -> Autoencoder:
    """An autoencoder of `data`, `[N, *shape]`, with `latent` numbers for each object; its latents, `encode`, are what a
    prior is then learned from. Raises ValueError where data are not finite."""
    if not bool(data.isfinite().all()):
        raise ValueError("data: not finite")
    torch.manual_seed(seed)
    fitting = AutoencoderFitting(Autoencoder(tuple(data.shape[1:]), latent, width))
    trainer = Trainer(
        fitting, Unscored(), NoCondition(), Objective("mle"), training, ExplorationSettings(epsilon=0.0),
        seed=seed, given=data,
    )  # fmt: skip
    trainer.run(progress_bar=False)
    return fitting.autoencoder.eval().requires_grad_(False)
