"""How good a sampler is: its exact distribution where the space is small, bounds and correlations everywhere.

Log-weights of trajectories, log w = log R + log P_B - log P_F, carry most of it: their mean under the sampler is a
lower bound on log Z (ELBO), their mean under the target an upper bound (EUBO), and both meet at log Z when the sampler
is right.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from headwater.environments.base import Environment
from headwater.environments.graph import enumerate_states
from headwater.objectives import path_log_ratio
from headwater.policies.base import NO_EXPLORATION, Policy
from headwater.policies.environment_policy import EnvironmentPolicy, RelativePolicy
from headwater.reward import Reward
from headwater.trajectories import Trajectories

_CHUNK = 16384


class ExactDistribution:
    """The target distribution R(x) / Z over every object of an environment, under one condition.

    states: int32 `[objects, width]`. log_reward: float64 `[objects]`. log_z. probabilities: float64 `[objects]`.
    condition: one row `[1, C]`, or None. Raises TooManyStates if there are more than `limit` states.
    """

    def __init__(
        self, environment: Environment, reward: Reward, condition: Tensor | None = None, limit: int = 1_000_000
    ) -> None:
        self.graph = enumerate_states(environment, limit)
        self.condition = torch.empty(1, 0) if condition is None else condition
        self.states = self.graph.states[self.graph.terminal]
        asked = self.condition.expand(len(self.states), -1)
        parts = [
            reward(environment.objects(states), rows)
            for states, rows in zip(torch.split(self.states, _CHUNK), torch.split(asked, _CHUNK), strict=True)
        ]
        self.log_reward = torch.cat(parts).double()
        if self.log_reward.isnan().any():
            raise ValueError(f"the reward failed on {int(self.log_reward.isnan().sum())} of {len(self.states)} objects")
        self.log_z = float(self.log_reward.logsumexp(0))
        self.probabilities = (self.log_reward - self.log_z).exp()

    def log_probs(self, policy: Policy) -> Tensor:
        """Log-probability of every object under the sampler, by dynamic programming over all states: float64
        `[objects]`.
        """
        network = _environment_policy(policy)
        with torch.no_grad():
            parts = [network.action_log_probs(part, self.condition) for part in torch.split(self.graph.states, _CHUNK)]
        log_probs = torch.cat(parts).double()
        reached = self.graph.log_path_sums(log_probs[self.graph.source, self.graph.action])
        return (reached + log_probs[:, -1])[self.graph.terminal]

    def compare(self, policy: Policy) -> dict[str, float]:
        """total_variation (half the summed difference of all probabilities), jensen_shannon (nats) and log_z_exact."""
        learned, target = self.log_probs(policy).exp(), self.probabilities
        middle = (learned + target) / 2
        divergence = (_entropy_terms(learned, middle) + _entropy_terms(target, middle)) / 2
        return {
            "total_variation": float((learned - target).abs().sum() / 2),
            "jensen_shannon": float(divergence),
            "log_z_exact": self.log_z,
        }

    def sample(self, count: int, generator: torch.Generator) -> Tensor:
        """`count` final states drawn from the target itself: int32 `[count, width]`."""
        cumulative = self.probabilities.cumsum(0)
        uniform = torch.rand(count, generator=generator, dtype=torch.float64) * cumulative[-1]
        return self.states[torch.searchsorted(cumulative, uniform).clamp(max=len(self.states) - 1)]

    def empirical_total_variation(self, states: Tensor, seed: int = 0) -> dict[str, float]:
        """Total variation of a sample of final states from the target, with its floor: what a perfect sampler would
        show with as many draws."""
        drawn = torch.cat([self.states, states])
        groups = torch.unique(drawn, dim=0, return_inverse=True)[1]
        counts = torch.bincount(groups[len(self.states) :], minlength=len(self.states)).double()[
            groups[: len(self.states)]
        ]
        return {
            "empirical_total_variation": float((counts / len(states) - self.probabilities).abs().sum() / 2),
            "empirical_total_variation_floor": sampling_floor(self.probabilities.numpy(), len(states), seed),
        }


def sampling_floor(probabilities: NDArray[np.float64], count: int, seed: int = 0, repeats: int = 5) -> float:
    """Mean total variation between a distribution and `count` draws from itself."""
    generator = np.random.default_rng(seed)
    exact = probabilities / probabilities.sum()
    distances = [np.abs(generator.multinomial(count, exact) / count - exact).sum() / 2 for _ in range(repeats)]
    return float(np.mean(distances))


def bounds(
    policy: Policy,
    reward: Reward,
    condition: Tensor | None,
    count: int,
    generator: torch.Generator,
    exact: ExactDistribution | None = None,
) -> dict[str, float]:
    """Bounds on log Z from `count` draws, under one condition row.

    elbo: the mean log-weight of the sampler's own trajectories, at most log Z. log_z_estimate: importance-sampled log
    Z, with the half width of its 95 % interval. effective_sample_size: as a share of the draws, 0 to 1. eubo: the mean
    log-weight under the target, at least log Z: from exact draws where `exact` is given, else self-normalised from the
    sampler's own, which is biased downward where the sampler misses modes.
    """
    asked = (torch.empty(1, 0) if condition is None else condition).expand(count, -1)
    drawn = policy.sample(asked, NO_EXPLORATION, generator)
    drawn = drawn.with_log_reward(reward(policy.objects(drawn), asked))
    weights = _log_weights(policy, drawn.select(~drawn.log_reward.isnan()))
    shares = weights.softmax(0)
    log_z = float(weights.logsumexp(0) - math.log(len(weights)))
    relative = (weights - log_z).exp()
    figures = {
        "elbo": float(weights.mean()),
        "eubo": float((shares * weights).sum()),
        "log_z_estimate": log_z,
        "log_z_interval": float(1.96 * relative.std() / math.sqrt(len(weights))),
        "effective_sample_size": float(1 / shares.square().sum() / len(weights)),
    }
    if exact is not None:
        states = exact.sample(count, generator)
        walked = _environment_policy(policy).sample_to(states, asked, generator)
        walked = walked.with_log_reward(reward(policy.objects(walked), asked))
        figures["eubo"] = float(_log_weights(policy, walked).mean())
    return figures


def log_prob_of_states(
    policy: Policy, states: Tensor, condition: Tensor, walks: int = 10, generator: torch.Generator | None = None
) -> Tensor:
    """Log-probability of given final states `[N, width]` under the sampler, with conditions `[N, C]`: float64 `[N]`.

    log of the mean over `walks` backward walks of P_F / P_B; exact where an object has one trajectory, which then is
    walked once.
    """
    environment_policy = _environment_policy(policy)
    if environment_policy.environment.n_backward_actions == 1:
        walks = 1
    estimates = []
    with torch.no_grad():
        for part, rows in zip(torch.split(states, 1024), torch.split(condition, 1024), strict=True):
            walked = environment_policy.sample_to(part.repeat(walks, 1), rows.repeat(walks, 1), generator)
            forward = walked.sum(environment_policy.log_probs(walked).forward.double())
            ratios = (forward - walked.log_behaviour.double()).view(walks, len(part))
            estimates.append(ratios.logsumexp(0) - math.log(walks))
    return torch.cat(estimates) if estimates else torch.empty(0, dtype=torch.float64)


def correlation(log_reward: NDArray[np.float64], log_prob: NDArray[np.float64]) -> dict[str, float]:
    """pearson and spearman between log-rewards and log-probabilities, both `[N]`; NaN where one does not vary."""

    def pearson(a: NDArray[np.float64], b: NDArray[np.float64]) -> float:
        a, b = a - a.mean(), b - b.mean()
        norm = math.sqrt(float((a @ a) * (b @ b)))
        return float(a @ b) / norm if norm else math.nan

    def ranks(values: NDArray[np.float64]) -> NDArray[np.float64]:
        _, group, counts = np.unique(values, return_inverse=True, return_counts=True)
        return (counts.cumsum() - (counts - 1) / 2)[group]

    return {"pearson": pearson(log_reward, log_prob), "spearman": pearson(ranks(log_reward), ranks(log_prob))}


def best_distinct(log_reward: NDArray[np.float64], objects: Sequence[str], count: int) -> list[int]:
    """Indices of the `count` best distinct objects, best first."""
    chosen: dict[str, int] = {}
    for index in np.argsort(-log_reward, kind="stable"):
        chosen.setdefault(objects[index], int(index))
        if len(chosen) == count:
            break
    return list(chosen.values())


def best_and_different(
    objects: Sequence[str],
    log_reward: NDArray[np.float64],
    count: int,
    distance: Callable[[str, str], float],
    least: float,
    pool: int = 1000,
) -> list[int]:
    """Indices of at most `count` objects among the `pool` best, best first, each at least `least` away from every
    better one chosen.

    With a threshold on the reward these are its modes."""
    chosen: list[int] = []
    for index in best_distinct(log_reward, objects, pool):
        if all(distance(objects[index], objects[other]) >= least for other in chosen):
            chosen.append(index)
        if len(chosen) == count:
            break
    return chosen


def diversity(objects: Sequence[str], distance: Callable[[str, str], float]) -> float:
    """Mean distance over all pairs of objects; NaN for fewer than two."""
    distances = [distance(a, b) for index, a in enumerate(objects) for b in objects[:index]]
    return float(np.mean(distances)) if distances else math.nan


def _log_weights(policy: Policy, trajectories: Trajectories) -> Tensor:
    with torch.no_grad():
        ratio = path_log_ratio(policy.log_probs(trajectories), trajectories)
    return (trajectories.log_reward - ratio).double()


def _environment_policy(policy: Policy) -> EnvironmentPolicy:
    if isinstance(policy, RelativePolicy):
        return policy.posterior
    if not isinstance(policy, EnvironmentPolicy):
        raise TypeError(f"{type(policy).__name__} is no policy over a discrete environment")
    return policy


def _entropy_terms(p: Tensor, q: Tensor) -> Tensor:
    return torch.special.xlogy(p, p / q).nan_to_num(0.0).sum()


__all__ = [
    "ExactDistribution",
    "best_and_different",
    "best_distinct",
    "bounds",
    "correlation",
    "diversity",
    "log_prob_of_states",
    "sampling_floor",
]
