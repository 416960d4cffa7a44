"""How good a sampler of a posterior is: bounds on log Z and an estimate of it, how far to trust them, what its draws
say of the measurement and of the truth, and what samplers without training come to with as many reward calls.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from headwater.diffusion.baselines import LARGEST, draw_by
from headwater.diffusion.estimators import log_z_estimates, pareto_shape, resample
from headwater.diffusion.guidance import Draws
from headwater.diffusion.likelihoods import GaussianLikelihood, Likelihood, MeasurementLikelihood
from headwater.diffusion.measures import random_directions, sliced_wasserstein
from headwater.diffusion.policy import DiffusionPolicy
from headwater.diffusion.priors import Prior
from headwater.evaluation import log_ratios
from headwater.report.numbers import as_float

DRAWS = 2000
_AT_ONCE = 500
_KEPT = 256
"""Objects of each baseline that are kept for pictures."""
_TRUSTED_TAIL = 0.7
_FEWEST = 50.0
"""Effective draws of another sampler that an upper bound can be made of."""


@dataclass(frozen=True)
class Evaluated:
    """figures: as in evaluation.json. drawn_by: objects `[N, *shape]` by each baseline, all of one weight."""

    figures: dict[str, object]
    drawn_by: dict[str, Tensor]


@dataclass(frozen=True)
class _Drawn:
    """Objects `[N, *shape]`, log r `[N]`, and log q - log p of the paths that drew them, `[N]`."""

    objects: Tensor
    log_reward: Tensor
    log_ratio: Tensor


def evaluate(
    policy: DiffusionPolicy,
    prior: Prior,
    target: Likelihood,
    measured: MeasurementLikelihood | None,
    truth: Tensor | None,
    in_units: Callable[[Tensor], Tensor],
    baselines: Sequence[str],
    calls: int,
    generator: torch.Generator,
    condition: Tensor | None = None,
) -> Evaluated:
    """Of `DRAWS` draws under one condition row `[1, C]`. truth: the object itself, `[*shape]` in the units of the data;
    in_units: what makes such objects of what chains end in. calls: how often the reward was asked in training; so
    often, but at most `LARGEST` times, each baseline asks it.
    """
    row = (torch.empty(1, 0) if condition is None else condition).to(policy.device)
    drawn = _draw(policy, target, row, generator)
    weight = drawn.log_reward.double() - drawn.log_ratio
    kept = resample(weight, DRAWS, generator)
    posterior = drawn.objects[kept]
    others, rows, drawn_by = _others(baselines, prior, target, row, min(calls, LARGEST), generator)
    found = log_z_estimates(drawn.log_ratio, drawn.log_reward, (drawn.log_ratio[kept], drawn.log_reward[kept]))
    figures: dict[str, object] = {
        "elbo": found.lower,
        "elbo_error": found.lower_error,
        "log_z_estimate": found.log_z,
        "log_z_interval": 1.96 * found.log_z_error,
        "eubo": found.upper,
        "eubo_error": found.upper_error,
        "effective_sample_size": found.effective_sample_size / len(weight),
        "pareto_k": found.pareto_k,
        "mean_log_reward": float(drawn.log_reward.double().nanmean()),
    }
    figures |= _walked_back(policy, target, row, others, generator)
    figures |= _of_measurement(measured, row, drawn.objects, posterior)
    if truth is not None:
        figures |= _of_truth(truth, in_units(posterior))
    if prior.process.start(1, torch.Generator()).is_floating_point():
        directions = random_directions(256, posterior[0].numel(), generator)
        for one in rows:
            if (objects := drawn_by.get(str(one["name"]))) is not None:
                mine = posterior[: len(objects)].cpu()
                one["sliced_wasserstein"] = sliced_wasserstein(objects.cpu(), mine, directions)
        halves = posterior[:_KEPT].cpu(), posterior[_KEPT : 2 * _KEPT].cpu()
        figures["sliced_wasserstein_floor"] = sliced_wasserstein(*halves, directions)
    resampled = next((one for one in rows if one["name"] == "resampling" and "problem" not in one), None)
    if resampled is not None:
        enough = min(found.effective_sample_size, DRAWS / 2)
        shape = as_float(resampled["pareto_k"])
        figures |= {f"resampling_{name}": resampled[name] for name in ("reward_calls", "log_z", "effective_draws")}
        figures["resampling_is_enough"] = as_float(resampled["effective_draws"]) >= enough and not shape > _TRUSTED_TAIL
    figures["baselines"] = rows
    return Evaluated(figures, {name: objects[:_KEPT] for name, objects in drawn_by.items()})


def _draw(policy: DiffusionPolicy, target: Likelihood, row: Tensor, generator: torch.Generator) -> _Drawn:
    parts = []
    for count in [_AT_ONCE] * (DRAWS // _AT_ONCE):
        rows = row.expand(count, -1)
        paths = policy.sample(rows, generator=generator)
        objects = policy.objects(paths)
        assert isinstance(objects, Tensor)
        parts.append((objects, target(objects, rows), log_ratios(policy, paths)))
    objects, log_reward, log_ratio = (torch.cat(column) for column in zip(*parts, strict=True))
    return _Drawn(objects, log_reward.to(log_ratio.device), log_ratio)


def _others(
    baselines: Sequence[str], prior: Prior, target: Likelihood, row: Tensor, calls: int, generator: torch.Generator
) -> tuple[dict[str, Draws], list[dict[str, object]], dict[str, Tensor]]:
    """What each baseline drew, a row of figures for it, and its objects, all of one weight."""
    others: dict[str, Draws] = {}
    rows: list[dict[str, object]] = []
    objects: dict[str, Tensor] = {}
    for name in baselines:
        try:
            drawn = others[name] = draw_by(name, prior, target, row, max(calls, 1), generator)
        except ValueError as error:
            rows.append({"name": name, "problem": str(error)})
            continue
        objects[name] = drawn.resampled(min(DRAWS, len(drawn.objects)), generator)
        log_reward = target(objects[name], row.expand(len(objects[name]), -1)).double()
        rows.append(
            {
                "name": name,
                "draws": len(drawn.objects),
                "reward_calls": drawn.reward_calls,
                "log_z": drawn.log_z,
                "effective_draws": drawn.effective_sample_size,
                "pareto_k": pareto_shape(drawn.log_weight) if name == "resampling" else math.nan,
                "mean_log_reward": float(log_reward.nanmean()),
            }
        )
    return others, rows, objects


def _walked_back(
    policy: DiffusionPolicy, target: Likelihood, row: Tensor, others: dict[str, Draws], generator: torch.Generator
) -> dict[str, object]:
    """The mean log-weight of chains walked back from draws of another sampler that weighs them right, the one with the
    most effective draws, if it has enough: above log Z where the noising reverses the prior's chain, as it does not
    quite of a coarse or a learned one; and far above it where the sampler misses what the other has found."""
    weighed = {name: draws for name, draws in others.items() if draws.log_z is not None}
    best = max(weighed, key=lambda name: weighed[name].effective_sample_size, default="")
    if not best or weighed[best].effective_sample_size < _FEWEST:
        return {}
    weights = []
    for objects in torch.split(weighed[best].resampled(DRAWS, generator), _AT_ONCE):
        rows = row.expand(len(objects), -1)
        ratio = log_ratios(policy, policy.sample_to(objects, rows, generator))
        weights.append(target(objects, rows).to(ratio.device).double() - ratio)
    return {"log_weight_walked_back": float(torch.cat(weights).nanmean()), "walked_back_from": best}


def _of_measurement(
    measured: MeasurementLikelihood | None, row: Tensor, draws: Tensor, posterior: Tensor
) -> dict[str, object]:
    """The mean squared residual over the noise, a measured value: of the draws, and of the reweighted ones."""
    if not isinstance(measured, GaussianLikelihood):
        return {}
    return {
        name: float((measured.residual(objects, row) / measured.sigma).square().mean())
        for name, objects in (("chi_squared", draws), ("chi_squared_reweighted", posterior))
    }


def _of_truth(truth: Tensor, posterior: Tensor) -> dict[str, object]:
    """In the units of the data, root mean square over values; and how many of these lie in their central intervals."""
    low, high = posterior.quantile(torch.tensor([0.05, 0.95]), dim=0)
    inside = (low <= truth) & (truth <= high)
    return {
        "coverage_of_90": float(inside.float().mean()),
        "error_of_mean": float((posterior.mean(0) - truth).square().mean().sqrt()),
        "posterior_deviation": float(posterior.var(0).mean().sqrt()),
    }
