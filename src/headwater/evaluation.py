"""How good a sampler is: its exact distribution where the space is small, bounds and correlations everywhere.

Log-weights of trajectories, log w = log R + log P_B - log P_F, carry most of it: their mean under the sampler is a
lower bound on log Z (ELBO), their mean under the target an upper bound (EUBO), and both meet at log Z when the sampler
is right.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Protocol

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from headwater.environments.base import Environment
from headwater.environments.graph import enumerate_states
from headwater.objectives import path_log_ratio
from headwater.policies.base import NO_EXPLORATION, Policy, StatePolicy
from headwater.policies.environment_policy import EnvironmentPolicy, RelativePolicy
from headwater.reward import Reward
from headwater.trajectories import Trajectories

_CHUNK = 16384  # states that a network sees at once
_CHUNK_STEPS = 65536  # steps of trajectories that a network sees at once


class ExactDraws(Protocol):
    """Whatever draws from the target itself."""

    def sample(self, count: int, generator: torch.Generator) -> Tensor:
        """`count` final states: `[count, width]`."""
        ...


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
        network = _state_policy(policy)
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

    def empirical_total_variation(self, states: Tensor) -> dict[str, float]:
        """Total variation of a sample of final states from the target, with its floor: what a perfect sampler would
        show with as many draws. Raises ValueError naming a state that cannot be reached."""
        counts = torch.bincount(self.graph.rows(states), minlength=len(self.graph))[self.graph.terminal]
        return {
            "empirical_total_variation": float((counts / len(states) - self.probabilities).abs().sum() / 2),
            "empirical_total_variation_floor": sampling_floor(self.probabilities, len(states)),
        }


def sampling_floor(probabilities: Tensor, count: int) -> float:
    """Expected total variation between a distribution (`[objects]`) and `count` draws from itself.

    Half the sum of the mean absolute deviations of binomial counts, each by de Moivre's closed form
    E|X - n p| = 2 n! / ((m - 1)! (n - m)!) p^m (1 - p)^(n - m + 1) with m = floor(n p) + 1.
    """
    p = probabilities.double().clamp(max=1.0)
    n = torch.tensor(float(count), dtype=torch.float64)
    m = (n * p).floor() + 1
    log_ways = torch.lgamma(n + 1) - torch.lgamma(m) - torch.lgamma(n - m + 1)
    deviations = 2 * (log_ways + torch.xlogy(m, p) + torch.special.xlog1py(n - m + 1, -p)).exp()
    return float(deviations.sum() / (2 * n))


def bounds(
    policy: Policy,
    reward: Reward,
    condition: Tensor | None,
    count: int,
    generator: torch.Generator,
    exact: ExactDraws | None = None,
) -> dict[str, float]:
    """Bounds on log Z from `count` draws, under one condition row.

    elbo: the mean log-weight of the sampler's own trajectories, at most log Z. log_z_estimate: importance-sampled log
    Z, with the half width of its 95 % interval. effective_sample_size: as a share of the draws, 0 to 1. eubo: the mean
    log-weight under the target, at least log Z: from exact draws where `exact` is given, else self-normalised from the
    sampler's own, which is biased downward where the sampler misses modes. All are NaN if the reward failed on every
    draw. Of a RelativePolicy, Z is the sum of prior times reward, and `exact` must be the distribution of that.
    """
    asked = (torch.empty(1, 0) if condition is None else condition).expand(count, -1)
    drawn = policy.sample(asked, NO_EXPLORATION, generator)
    drawn = drawn.with_log_reward(reward(policy.objects(drawn), asked))
    drawn = drawn.select(~drawn.log_reward.isnan())
    if not len(drawn):
        names = ("elbo", "eubo", "log_z_estimate", "log_z_interval", "effective_sample_size")
        return dict.fromkeys(names, math.nan)
    weights = _log_weights(policy, drawn)
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
        walked = _state_policy(policy).sample_to(states, asked, generator)
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
    state_policy = _state_policy(policy)

    def walk(rows: Tensor) -> Trajectories:
        return state_policy.sample_to(states[rows], condition[rows], generator)

    return _log_prob(state_policy, walk, len(states), state_policy.environment.max_steps, walks)


def log_prob_of_objects(
    policy: Policy, trajectories: Trajectories, walks: int = 10, generator: torch.Generator | None = None
) -> Tensor:
    """The same of the objects that given trajectories end in, for every policy that walks backward; of points of a
    continuous space, their log-density.
    """
    generator = generator or torch.default_generator

    def walk(rows: Tensor) -> Trajectories:
        return policy.sample_backward(trajectories.select(rows), generator)

    longest = int(trajectories.lengths.max()) if len(trajectories) else 1
    return _log_prob(policy, walk, len(trajectories), longest, walks)


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
    """
    chosen: list[int] = []
    for index in best_distinct(log_reward, objects, pool):
        if all(distance(objects[index], objects[other]) >= least for other in chosen):
            chosen.append(index)
        if len(chosen) == count:
            break
    return chosen


def modes(
    objects: Sequence[str],
    log_reward: NDArray[np.float64],
    threshold: float,
    distance: Callable[[str, str], float],
    least: float,
) -> list[int]:
    """Indices of the distinct objects with a log-reward of at least `threshold`, best first, each at least `least` away
    from every better one: one a mode that was found.
    """
    high = np.flatnonzero(log_reward >= threshold).tolist()
    chosen = best_and_different([objects[i] for i in high], log_reward[high], len(high), distance, least, len(high))
    return [high[index] for index in chosen]


def diversity(objects: Sequence[str], distance: Callable[[str, str], float]) -> float:
    """Mean distance over all pairs of objects; NaN for fewer than two."""
    distances = [distance(a, b) for index, a in enumerate(objects) for b in objects[:index]]
    return float(np.mean(distances)) if distances else math.nan


def log_ratios(policy: Policy, trajectories: Trajectories) -> Tensor:
    """sum_t log P_F - log P_B of each trajectory, without gradient: float64 `[T]`."""
    if not len(trajectories):
        return torch.empty(0, dtype=torch.float64)
    at_once = max(1, _CHUNK_STEPS // int(trajectories.lengths.max()))
    parts = [trajectories.select(part) for part in torch.split(torch.arange(len(trajectories)), at_once)]
    with torch.no_grad():
        return torch.cat([path_log_ratio(policy.log_probs(part), part) for part in parts]).double()


def _log_weights(policy: Policy, trajectories: Trajectories) -> Tensor:
    return trajectories.log_reward.double() - log_ratios(policy, trajectories)


def _log_prob(policy: Policy, walk: Callable[[Tensor], Trajectories], count: int, max_steps: int, walks: int) -> Tensor:
    """log of the mean of P_F / P_B over `walks` walks back from each of `count` objects; `walk` takes their numbers."""
    if isinstance(policy, EnvironmentPolicy) and policy.environment.n_backward_actions == 1:
        walks = 1
    at_once = max(1, _CHUNK_STEPS // (walks * max_steps))
    estimates = []
    with torch.no_grad():
        for rows in torch.split(torch.arange(count), at_once):
            walked = walk(rows.repeat(walks))
            forward = walked.sum(policy.log_probs(walked).forward.double())
            ratios = (forward - walked.log_behaviour.double()).view(walks, len(rows))
            estimates.append(ratios.logsumexp(0) - math.log(walks))
    return torch.cat(estimates) if count else torch.empty(0, dtype=torch.float64)


def _state_policy(policy: Policy) -> StatePolicy:
    if isinstance(policy, RelativePolicy):
        return policy.posterior
    if not isinstance(policy, StatePolicy):
        raise TypeError(f"{type(policy).__name__} is no policy over a discrete environment")
    return policy


def _entropy_terms(p: Tensor, q: Tensor) -> Tensor:
    return (torch.xlogy(p, p) - torch.xlogy(p, q)).sum()


__all__ = [
    "ExactDistribution",
    "ExactDraws",
    "best_and_different",
    "best_distinct",
    "bounds",
    "correlation",
    "diversity",
    "log_prob_of_objects",
    "log_prob_of_states",
    "log_ratios",
    "modes",
    "sampling_floor",
]
