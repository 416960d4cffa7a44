"""What weights of trajectories say of a sampler: log Z from below, from above and itself, and how far to trust it.

With log w = log r - (log q - log p) of trajectories drawn by q, the mean of log w is at most log Z and the mean of w is
Z; with those of the target the mean of log w is at least log Z. Draws of the prior, weighed by r, are the same with
log q - log p = 0: importance resampling, which every figure stands beside at equal reward calls.
"""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class LogZ:
    """Estimates from N trajectories, in nats; each error is one standard error.

    lower: the mean log-weight, at most log Z. log_z: of the mean weight. upper: the mean log-weight of trajectories of
    the target, NaN where there are none. effective_sample_size: (sum w)^2 / sum w^2, from 1 to N. pareto_k: the shape
    of the weights' tail; above 0.7 neither log_z nor its error is to be trusted (Vehtari et al. 2024, arXiv
    1507.02646); NaN for less than 21 trajectories.
    """

    lower: float
    lower_error: float
    log_z: float
    log_z_error: float
    upper: float
    upper_error: float
    effective_sample_size: float
    pareto_k: float

    def figures(self) -> dict[str, float]:
        """By name."""
        return asdict(self)


def log_z_estimates(log_ratio: Tensor, log_reward: Tensor, target: tuple[Tensor, Tensor] | None = None) -> LogZ:
    """log_ratio, log_reward: `[N]`, of trajectories drawn by the posterior q: log q - log p of the whole trajectory,
    and log r of its object. target: the same two of trajectories of the target, `[M]` each.

    The target's trajectories can be had by walking exact draws of the posterior back by the noising process. `upper` is
    a bound as far as that is the reversal of the prior's own chain: of a coarse chain, or a learned prior, it may be
    off by as much as the two differ.

    Objects on which the reward failed (NaN) are left out; r = 0 (minus infinity) counts. Raises ValueError if nothing
    is left, or a ratio is not finite.
    """
    weight = _log_weights("log_ratio", log_ratio, log_reward)
    above = _log_weights("target", *target) if target is not None else torch.full((1,), math.nan, dtype=torch.float64)
    count, log_mean = len(weight), float(weight.logsumexp(0)) - math.log(len(weight))
    relative = (weight - log_mean).exp() if math.isfinite(log_mean) else torch.full_like(weight, math.nan)
    return LogZ(
        lower=float(weight.mean()),
        lower_error=_standard_error(weight),
        log_z=log_mean,
        log_z_error=_standard_error(relative),
        upper=float(above.mean()),
        upper_error=_standard_error(above),
        effective_sample_size=float(count / relative.square().mean()),
        pareto_k=pareto_shape(weight),
    )


def resampling_estimates(log_reward: Tensor) -> LogZ:
    """The same of draws of the prior itself, weighed by r alone: log_reward is `[N]`."""
    return log_z_estimates(torch.zeros_like(log_reward), log_reward)


def resample(log_weight: Tensor, count: int, generator: torch.Generator) -> Tensor:
    """Indices `[count]` of draws in proportion to weights `[N]`, evenly spread (systematic resampling: Kitagawa 1996),
    in random order; NaN counts as no weight. Raises ValueError if there is no weight at all."""
    weight = torch.where(log_weight.isnan(), -torch.inf, log_weight.double())
    if not bool((weight > -torch.inf).any()):
        raise ValueError(f"r(x) = 0, or the reward failed, on all {len(weight)} draws: there is nothing to resample")
    cumulative = weight.softmax(0).cumsum(0)
    first = torch.rand((), generator=generator, dtype=torch.float64, device=generator.device).cpu()
    places = (torch.arange(count, dtype=torch.float64) + first) / count * cumulative[-1].cpu()
    chosen = torch.searchsorted(cumulative.cpu(), places, right=True).clamp(max=len(weight) - 1)
    return chosen[torch.randperm(count, generator=generator, device=generator.device).cpu()].to(weight.device)


def pareto_shape(log_weight: Tensor) -> float:
    """Shape k of a generalised Pareto distribution fitted to the largest of N weights, as many as min(N / 5, 3 sqrt N):
    NaN if they are less than 5, or all alike.

    Zhang & Stephens 2009 (Technometrics 51, 316-325), with the weak prior of Vehtari et al. 2024, appendix C.
    """
    ordered = log_weight.double().sort().values
    size = math.ceil(min(0.2 * len(ordered), 3 * math.sqrt(len(ordered))))
    if size < 5 or not math.isfinite(float(ordered[-1])):
        return math.nan
    scaled = (ordered[-size - 1 :] - ordered[-1]).exp()
    excess = scaled[1:] - scaled[0]
    excess = excess[excess > 0]
    if len(excess) < 5 or float(excess[0]) == float(excess[-1]):
        return math.nan
    number = 30 + int(math.sqrt(len(excess)))
    grid = torch.arange(1, number + 1, dtype=torch.float64)
    quartile = excess[max(0, int(len(excess) / 4 + 0.5) - 1)]
    theta = 1 / excess[-1] + (1 - (number / (grid - 0.5)).sqrt()) / (3 * quartile)
    shapes = torch.log1p(-theta[:, None] * excess).mean(1)  # the likelihood's own shape at each theta
    profile = len(excess) * ((-theta / shapes).log() - shapes - 1)
    mean = float((profile.softmax(0) * theta).sum())
    k = float(torch.log1p(-mean * excess).mean())
    return (len(excess) * k + 5) / (len(excess) + 10)


def _log_weights(name: str, log_ratio: Tensor, log_reward: Tensor) -> Tensor:
    if log_ratio.shape != log_reward.shape or log_ratio.ndim != 1:
        raise ValueError(f"{name}: shapes {tuple(log_ratio.shape)} and {tuple(log_reward.shape)} must be [N], both")
    if not bool(log_ratio.isfinite().all()):
        raise ValueError(f"{name}: {int((~log_ratio.isfinite()).sum())} of {len(log_ratio)} are not finite")
    weight = (log_reward.double() - log_ratio.double())[~log_reward.isnan()]
    if not len(weight):
        raise ValueError(f"{name}: the reward failed on all {len(log_reward)} objects")
    return weight


def _standard_error(values: Tensor) -> float:
    return float(values.std() / math.sqrt(len(values))) if len(values) > 1 else math.nan
