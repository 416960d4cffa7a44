"""Likelihoods and constraints r(x), or r(x | y), that a diffusion prior is multiplied by: core rewards over tensors of
objects, differentiable in x where their parts are. Constant terms are kept, so that log Z of the posterior is the
log-evidence log p(y) under the prior.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from typing import Literal, TypeAlias

import torch
from torch import Tensor

from headwater.diffusion.measurements import fitting
from headwater.diffusion.operators import Operator
from headwater.environments.base import Objects
from headwater.reward_worker import RewardError

Combination = Literal["maximum", "sum"]
LogFunction: TypeAlias = Callable[..., Tensor]
"""`function(x)`, or where there is a condition `function(x, condition)`: log r of `[N, *shape]`, `[N]`."""

_HOPELESS = 30  # a function that fails on so many objects in a row is broken


class Likelihood(ABC):
    """log r(x) or log r(x | y), a reward whose objects are tensors `[N, *shape]`.

    condition_size: C, the values of y flattened where y comes with the condition; 0 where it is known beforehand.
    """

    condition_size: int = 0

    @abstractmethod
    def compute(self, x: Tensor, condition: Tensor) -> Tensor:
        """What `log_prob` gives, of a condition that fits."""

    def log_prob(self, x: Tensor, condition: Tensor) -> Tensor:
        """log r of `[N, *shape]` under `[N, C]`: `[N]`, NaN where it failed; with gradient where there is one. Raises
        ValueError where a shape does not fit. A condition is not looked at where none is needed."""
        if self.condition_size and condition.shape != (len(x), self.condition_size):
            raise ValueError(
                f"condition has shape {tuple(condition.shape)}, {type(self).__name__} needs "
                f"({len(x)}, {self.condition_size}): what was measured of each object, flattened"
            )
        return self.compute(x, condition)

    def __call__(self, objects: Objects, condition: Tensor) -> Tensor:
        """As `log_prob`, float32 and without gradient."""
        if not isinstance(objects, Tensor):
            raise TypeError(f"a likelihood is of tensors of objects, not of {type(objects).__name__}")
        with torch.no_grad():
            return self.log_prob(objects, condition).float()

    def gradient(self, x: Tensor, condition: Tensor) -> tuple[Tensor, Tensor]:
        """log r and its gradient in x: `[N]` and `[N, *shape]`. Raises TypeError where it is not differentiable."""
        with torch.enable_grad():
            x = x.detach().requires_grad_()
            log_r = self.log_prob(x, condition)
            return log_r.detach(), ascent(log_r, x)


def ascent(log_r: Tensor, x: Tensor) -> Tensor:
    """The gradient of `log_r` `[N]` in x `[N, *shape]`, which it was computed from. Raises TypeError where there is
    none."""
    gradient: Tensor | None = None
    if log_r.requires_grad:
        (gradient,) = torch.autograd.grad(log_r.sum(), x, allow_unused=True)
    if gradient is None:
        raise TypeError("the likelihood is not differentiable in x: there is no gradient to follow")
    return gradient


class MeasurementLikelihood(Likelihood):
    """p(y | A(x)) of a measurement. y: the one that was made, in the shape of `operator.measured`; None where each
    object comes with its own, as its condition. Raises MeasurementError where y does not fit the operator."""

    def __init__(self, operator: Operator, y: Tensor | None) -> None:
        self.operator = operator
        self.y = None
        self.condition_size = math.prod(operator.measured) if y is None else 0
        if y is not None:
            self.y = fitting(y, operator)
            if len(self.y) > 1:
                raise ValueError(f"y holds {len(self.y)} measurements, this likelihood is of one")

    @abstractmethod
    def log_density(self, y: Tensor, clean: Tensor) -> Tensor:
        """log p of y `[N or 1, *measured]` given A(x) `[N, *measured]`: `[N]`."""

    @abstractmethod
    def draw(self, x: Tensor, generator: torch.Generator) -> Tensor:
        """A measurement of each object: `[N, *measured]`."""

    def clean(self, x: Tensor) -> Tensor:
        """A(x), `[N, *measured]`, on the device of x, where the operator moves to."""
        return self.operator.to(x.device)(x)

    def measurement(self, condition: Tensor) -> Tensor:
        """y of each object, `[N, *measured]`, or `[1, *measured]` where there is one for all."""
        return condition.reshape(-1, *self.operator.measured) if self.y is None else self.y.to(condition.device)

    def compute(self, x: Tensor, condition: Tensor) -> Tensor:
        return self.log_density(self.measurement(condition), self.clean(x))


class GaussianLikelihood(MeasurementLikelihood):
    """y = A(x) + sigma e with e ~ N(0, I): sum of log N(y; A(x), sigma^2). sigma: one number, or one for each measured
    value. Raises ValueError where sigma is not above 0 or does not fit the operator."""

    def __init__(self, operator: Operator, sigma: float | Tensor, y: Tensor | None = None) -> None:
        super().__init__(operator, y)
        self.sigma = torch.as_tensor(sigma, dtype=torch.float32)
        if not ((self.sigma > 0) & self.sigma.isfinite()).all():
            raise ValueError(f"sigma is {_shown(self.sigma)}, must be above 0 and finite")
        if self.sigma.dim() and self.sigma.shape != operator.measured:
            raise ValueError(f"sigma has shape {tuple(self.sigma.shape)}, the operator measures {operator.measured}")

    def log_density(self, y: Tensor, clean: Tensor) -> Tensor:
        scaled = (y - clean) / self.sigma.to(clean.device)
        each = self.sigma.double().log() + 0.5 * math.log(2 * math.pi)
        return -0.5 * scaled.square().flatten(1).sum(1) - float(each.expand(self.operator.measured).sum())

    def draw(self, x: Tensor, generator: torch.Generator) -> Tensor:
        clean = self.clean(x)
        noise = torch.randn(clean.shape, generator=generator, device=generator.device).to(clean.device)
        return clean + self.sigma.to(clean.device) * noise

    def residual(self, x: Tensor, condition: Tensor) -> Tensor:
        """y - A(x), differentiable: `[N, *measured]`."""
        return self.measurement(condition) - self.clean(x)


class PoissonLikelihood(MeasurementLikelihood):
    """Counts y ~ Poisson(gain A(x) + background). Where that rate is below `floor`, it is `floor`. Raises ValueError
    where a count is no whole number from 0, or a setting is out of range."""

    def __init__(
        self,
        operator: Operator,
        gain: float = 1.0,
        background: float = 0.0,
        y: Tensor | None = None,
        floor: float = 1e-3,
    ) -> None:
        for name, value in (("gain", gain), ("floor", floor)):
            if not 0 < value < math.inf:
                raise ValueError(f"{name} is {value}, must be above 0 and finite")
        if not 0 <= background < math.inf:
            raise ValueError(f"background is {background}, must be at least 0 and finite")
        super().__init__(operator, y)
        self.gain, self.background, self.floor = gain, background, floor
        if self.y is not None and (wrong := self.y[~_is_count(self.y)]).numel():
            raise ValueError(
                f"y holds {_shown(wrong)}: {wrong.numel()} values that are no counts, whole numbers from 0"
            )

    def rate(self, clean: Tensor) -> Tensor:
        """The expected counts, in the shape of A(x)."""
        return (self.gain * clean + self.background).clamp(min=self.floor)

    def log_density(self, y: Tensor, clean: Tensor) -> Tensor:
        rate = self.rate(clean)
        terms = torch.xlogy(y, rate) - rate - torch.lgamma(y + 1)
        return torch.where(_is_count(y), terms, math.nan).flatten(1).sum(1)

    def draw(self, x: Tensor, generator: torch.Generator) -> Tensor:
        rate = self.rate(self.clean(x))
        return torch.poisson(rate.to(generator.device), generator=generator).to(rate.device)


class ClassifierLikelihood(Likelihood):
    """log p(class of x is in a group), by a classifier that gives logits `[N, K]` of `[N, *shape]`.

    groups: classes that count as one, such as the even and the odd digits; by default each class is a group.
    group:  the one that is wanted; None where the condition `[N, 1]` holds its number.
    combination: of the probabilities in a group, "sum" (what is meant by probability) or the "maximum".

    Raises ValueError where a group is empty or holds no class of the classifier's, or the logits have a wrong shape.
    """

    def __init__(
        self,
        classifier: Callable[[Tensor], Tensor],
        group: int | None = None,
        groups: Sequence[Sequence[int]] | None = None,
        combination: Combination = "sum",
    ) -> None:
        if groups is not None and not all(groups):
            raise ValueError(f"groups are {groups!r}, each must hold a class")
        if group is not None and not 0 <= group < (math.inf if groups is None else len(groups)):
            raise ValueError(f"group is {group}, must be the number of a group, from 0")
        if combination not in ("maximum", "sum"):
            raise ValueError(f"combination is {combination!r}, must be maximum or sum")
        if isinstance(classifier, torch.nn.Module):
            classifier.eval()
        self.classifier, self.group, self.groups, self.combination = classifier, group, groups, combination
        self.condition_size = 1 if group is None else 0

    def compute(self, x: Tensor, condition: Tensor) -> Tensor:
        if isinstance(self.classifier, torch.nn.Module):
            self.classifier.to(x.device)
        logits = self.classifier(x)
        if logits.dim() != 2 or len(logits) != len(x):
            raise ValueError(f"the classifier gave logits of shape {tuple(logits.shape)}, must be ({len(x)}, classes)")
        member = self._members(logits)
        wanted = condition[:, 0] if self.group is None else torch.full((len(x),), float(self.group), device=x.device)
        if not ((wanted >= 0) & (wanted < len(member)) & (wanted == wanted.floor())).all():
            raise ValueError(f"group is {_shown(wanted)}, must be whole numbers from 0 below {len(member)}")
        among = logits.log_softmax(1).masked_fill(~member[wanted.long()], -math.inf)
        return among.logsumexp(1) if self.combination == "sum" else among.amax(1)

    def _members(self, logits: Tensor) -> Tensor:
        """Which classes each group holds: bool `[groups, K]`."""
        count = logits.shape[1]
        if self.groups is None:
            return torch.eye(count, dtype=torch.bool, device=logits.device)
        if not all(0 <= one < count for group in self.groups for one in group):
            raise ValueError(f"groups are {self.groups!r}, but the classifier has the classes 0 to {count - 1}")
        member = torch.zeros(len(self.groups), count, dtype=torch.bool, device=logits.device)
        for row, group in enumerate(self.groups):
            member[row, list(group)] = True
        return member


class FunctionLikelihood(Likelihood):
    """A function of the user's own, log r of a tensor of objects: `function(x)`, or with `condition_size` above 0
    `function(x, condition)`. Written with torch it is differentiable.

    Where a call raises, each object is tried alone, and one that fails alone is NaN; `failed` counts them. Raises
    RewardError where it has failed on 30 objects or more in a row, or returns something else than a float tensor `[N]`.
    """

    def __init__(self, function: LogFunction, condition_size: int = 0) -> None:
        self.function, self.condition_size = function, condition_size
        self.failed = 0
        self._in_a_row = 0

    def compute(self, x: Tensor, condition: Tensor) -> Tensor:
        if not len(x):
            return x.new_zeros(0)
        try:
            log_r = self._ask(x, condition)
        except RewardError:
            raise
        except Exception as error:
            if len(x) > 1:
                alone = zip(torch.split(x, 1), torch.split(condition, 1), strict=True)
                return torch.cat([self.compute(*one) for one in alone])
            self.failed += 1
            self._in_a_row += 1
            if self._in_a_row >= _HOPELESS:
                raise RewardError(
                    f"the likelihood function failed on each of the last {self._in_a_row} objects; "
                    f"the last time: {type(error).__name__}: {error}"
                ) from error
            return x.new_full((1,), math.nan)
        self._in_a_row = 0
        return log_r

    def _ask(self, x: Tensor, condition: Tensor) -> Tensor:
        log_r = self.function(x, condition) if self.condition_size else self.function(x)
        if not isinstance(log_r, Tensor) or log_r.shape != (len(x),) or not log_r.is_floating_point():
            got = f"{log_r.dtype} {tuple(log_r.shape)}" if isinstance(log_r, Tensor) else type(log_r).__name__
            raise RewardError(f"the likelihood function must return a float tensor ({len(x)},), it returned {got}")
        return log_r


class Product(Likelihood):
    """The product of likelihoods: log r is the sum. Each takes its own columns of the condition, one after the other,
    as many as its `condition_size`."""

    def __init__(self, parts: Sequence[Likelihood]) -> None:
        if not parts:
            raise ValueError("parts is empty: a product needs one likelihood at least")
        self.parts = tuple(parts)
        self.condition_size = sum(part.condition_size for part in parts)

    def compute(self, x: Tensor, condition: Tensor) -> Tensor:
        sizes = [part.condition_size for part in self.parts]
        columns = torch.split(condition[:, : self.condition_size], sizes, dim=1)
        terms = [part.log_prob(x, own) for part, own in zip(self.parts, columns, strict=True)]
        return torch.stack(terms).sum(0)


class Tempered(Likelihood):
    """r(x)^beta: flatter below 1, sharper above."""

    def __init__(self, likelihood: Likelihood, beta: float) -> None:
        if not 0 <= beta < math.inf:
            raise ValueError(f"beta is {beta}, must be at least 0 and finite")
        self.likelihood, self.beta = likelihood, beta
        self.condition_size = likelihood.condition_size

    def compute(self, x: Tensor, condition: Tensor) -> Tensor:
        if self.beta == 0:  # 0 times -inf would be NaN
            return torch.zeros_like(self.likelihood.log_prob(x, condition))
        return self.beta * self.likelihood.log_prob(x, condition)


def require_support(log_r: Tensor, what: str = "draws of the prior") -> Tensor:
    """log r as it is. Raises RewardError, with the count, where r(x) is 0 or has failed on every object: then there is
    nothing to learn from."""
    failed, zero = int(log_r.isnan().sum()), int((log_r == -math.inf).sum())
    if failed + zero < len(log_r):
        return log_r
    if not failed:
        raise RewardError(f"r(x) = 0 on all {zero} {what}: no object has a posterior probability")
    raise RewardError(f"r(x) = 0 on {zero} and has failed on {failed} of all {len(log_r)} {what}")


def _is_count(y: Tensor) -> Tensor:
    return (y >= 0) & (y == y.floor())


def _shown(values: Tensor) -> str:
    listed = values.flatten().tolist()
    return ", ".join(f"{value:g}" for value in listed[:5]) + (", ..." if len(listed) > 5 else "")
