"""The recipe `digits`: a diffusion prior is learned from handwritten digits, and then what half of one that it has not
seen may have been, given the other half. Everything it needs is made here.
"""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import ClassVar

import torch

from headwater.diffusion.digits import load_digits
from headwater.diffusion.operator_settings import OperatorSettings, operator_of
from headwater.diffusion.posterior_recipe import PosteriorRecipe
from headwater.diffusion.prior_recipe import ChainSettings, PriorRecipe
from headwater.diffusion.priors import Units
from headwater.diffusion.written import write_array
from headwater.objectives import Objective
from headwater.recipes.base import Recipe
from headwater.runs import INPUTS
from headwater.training import Training


@dataclass(frozen=True)
class DigitsRecipe(PosteriorRecipe):
    """Half of a handwritten digit is hidden: what may it have been?

    A prior is learned from scikit-learn's digits, 8 x 8; its run is in the folder inputs/prior. A digit that was held
    out is measured, and the posterior learned.
    """

    summary: ClassVar[str] = "inpaint handwritten digits with uncertainty (extra: diffusion)"

    digit: int = 3
    """Number of the held-out image that is measured, 0 to 449."""
    operator: OperatorSettings = field(default_factory=lambda: OperatorSettings("inpaint", rows="0:4"))
    """What is measured of it: its upper half."""
    objective: Objective = field(default_factory=lambda: Objective("vargrad", penalty="huber", delta=3.0))
    """What to balance."""
    training: Training = field(
        default_factory=lambda: Training(
            iterations=600, batch_size=48, learning_rate=2e-3, schedule="cosine", log_every=10, evaluate_every=100,
            checkpoint_every=100,
        )
    )  # fmt: skip
    """How long and how fast to learn. Draws of the prior would say nothing here, so that there is no replay of them."""
    prior_iterations: int = 3000
    """Updates that the prior is learned in."""

    def __post_init__(self) -> None:
        if self.prior_iterations < 1000:
            raise ValueError(f"prior_iterations = {self.prior_iterations}: must be at least 1000")
        if not 0 <= self.digit < 450:
            raise ValueError(f"digit = {self.digit}: must be from 0 to 449, of the images that are held out")
        if self.prior is not None:  # made already, or the user's own
            super().__post_init__()

    def prepared(self, folder: Path) -> Recipe:
        if self.prior is not None:
            return super().prepared(folder)
        from headwater import jobs

        made = folder / INPUTS
        made.mkdir(parents=True, exist_ok=True)
        learned, held_out = load_digits()
        recipe = PriorRecipe(
            data=write_array(made / "digits.npy", learned.images.numpy()),
            seed=self.seed, threads=self.threads, device=self.device,
            chain=ChainSettings("cosine", steps=50, final_noise=0.1),
            training=Training(
                iterations=self.prior_iterations, batch_size=256, learning_rate=1e-3, schedule="cosine", log_every=100,
                evaluate_every=1000, checkpoint_every=1000,
            ),
        )  # fmt: skip
        jobs.train(recipe, "prior", made / "prior", ["headwater", "train", "prior"])
        truth = held_out.images[self.digit]
        measured = self.likelihood.measured(operator_of(self.operator, tuple(truth.shape)), Units())
        y = measured.likelihood.draw(truth[None], torch.Generator().manual_seed(self.seed))[0]
        return replace(
            self,
            prior=made / "prior",
            measurement=write_array(made / "measurement.npy", y.numpy()),
            truth=write_array(made / "truth.npy", truth.numpy()),
        )
