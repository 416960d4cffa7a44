"""A posterior's denoiser that climbs the log-likelihood where the prior expects the data to be, and learns how far: the
Langevin parametrisation (Zhang & Chen 2022, arXiv 2111.15141) at the predicted data in the place of the state, with the
step that pseudo-inverse guidance takes (Song et al. 2023, ICLR) where directions of different curvature are known.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from headwater.diffusion.denoisers import Denoiser, ResidualMLP, time_features
from headwater.diffusion.langevin import LogLikelihood
from headwater.diffusion.likelihoods import ascent
from headwater.diffusion.mixtures import step_numbers
from headwater.diffusion.process import GaussianProcess

_HIDDEN = 64
_WIDEST = 2.0  # change of a learned factor, and of a learned variance, half the logarithm of its bounds' ratio
_FARTHEST = 3.0  # that a direction is moved, in deviations: gradients far from the data are wild


@dataclass(frozen=True)
class Climb:
    """How the gradient g of log r at the predicted data moves these: in each direction by v / (1 + v c) g, where v is
    the variance of Gaussian data of `deviation` given the state, and c the curvature of -log r. That is what Bayes'
    rule says of such data if log r is quadratic.

    curvature: not negative, `[d]`, along the columns of the orthonormal `basis`, `[d, d]`; None for the coordinate
    axes. start: what the learned factors on it are at first; with 0 the denoiser is the prior's until it learns.
    """

    curvature: Tensor
    basis: Tensor | None = None
    deviation: float = 1.0
    start: float = 0.0

    def __post_init__(self) -> None:
        size = self.curvature.numel()
        if self.curvature.ndim != 1 or not bool((self.curvature >= 0).all() & self.curvature.isfinite().all()):
            raise ValueError("curvature: must be [d] finite numbers, none of them negative")
        if self.basis is not None and self.basis.shape != (size, size):
            raise ValueError(f"basis has shape {tuple(self.basis.shape)}: must be ({size}, {size}), as curvature has")
        if not self.deviation > 0:
            raise ValueError(f"deviation = {self.deviation}: must be above 0")


class Guided(Denoiser):
    """What `prior` says of data that have been moved uphill, each direction by its `climb` times a factor that is
    learned as a function of time; and a correction that starts at zero and is told the state, the time, the condition
    and the whole move.

    columns: of the condition, which `log_likelihood` is handed. width, blocks: of the correction. The prior is kept as
    it is, and does not learn. Raises ValueError where the process is not Gaussian, or the sizes do not fit.
    """

    curvature: Tensor
    basis: Tensor

    def __init__(
        self,
        process: GaussianProcess,
        prior: Denoiser,
        log_likelihood: LogLikelihood,
        climb: Climb,
        columns: int = 0,
        width: int = 128,
        blocks: int = 2,
    ) -> None:
        super().__init__()
        if not isinstance(process, GaussianProcess):
            raise ValueError(f"a {type(process).__name__} predicts no data, whose likelihood could be climbed")
        size = torch.Size(process.shape).numel()
        if climb.curvature.numel() != size:
            raise ValueError(
                f"curvature has {climb.curvature.numel()} numbers, objects of shape {process.shape} {size}"
            )
        self.process, self.log_likelihood, self.climb = process, log_likelihood, climb
        self.prior = prior.requires_grad_(False)
        self.condition = max(prior.condition, columns)
        self.correction = ResidualMLP(
            process.shape, self.condition + size, width, blocks, process.variance == "learned"
        )
        self.correction.silence()
        self.enter = nn.Linear(time_features(torch.zeros(1)).shape[1], _HIDDEN)
        self.factor = nn.Linear(_HIDDEN, size)
        nn.init.zeros_(self.factor.weight), nn.init.zeros_(self.factor.bias)
        self.register_buffer("curvature", climb.curvature.float(), persistent=False)
        basis = torch.eye(size) if climb.basis is None else climb.basis.float()
        self.register_buffer("basis", basis, persistent=False)

    def forward(self, state: Tensor, time: Tensor, condition: Tensor) -> Tensor:
        number = step_numbers(self.process, time)
        prediction = self.prior(state, time, condition)
        first = prediction.chunk(2, 1)[0] if self.process.variance == "learned" else prediction
        data = self.process.predicted_data(first, state, number)
        variance = self._variance(number)
        farthest = _FARTHEST * variance.sqrt()
        bayes = self._slope(data, condition) @ self.basis * (variance / (1 + variance * self.curvature))
        bayes = torch.maximum(torch.minimum(bayes, farthest), -farthest)
        told = bayes @ self.basis.mT / variance.sqrt()
        change = self.factor(nn.functional.silu(self.enter(time_features(time))))
        factor = self.climb.start + _WIDEST * (change / _WIDEST).tanh()
        moved = data + ((factor * bayes) @ self.basis.mT).view(data.shape)
        first = self.process.prediction_of(moved, state, number)
        correction = self.correction(state, time, torch.cat([condition[:, : self.condition], told], 1))
        if self.process.variance != "learned":
            return first + correction
        added, span = correction.chunk(2, 1)
        return torch.cat([first + added, prediction.chunk(2, 1)[1] + _WIDEST * (span / _WIDEST).tanh()], 1)

    def _slope(self, data: Tensor, condition: Tensor) -> Tensor:
        """The gradient of log r, `[N, d]`; nothing where it is no number."""
        with torch.enable_grad():
            here = data.detach().requires_grad_()
            return ascent(self.log_likelihood(here, condition), here).nan_to_num(0.0, 0.0, 0.0).flatten(1)

    def _variance(self, number: Tensor) -> Tensor:
        """Of Gaussian data given the state: `[N, 1]`."""
        alpha, sigma = self.process.alpha_sigma(number)
        spread = self.climb.deviation**2
        return (spread * sigma.square() / (alpha.square() * spread + sigma.square()))[:, None]
