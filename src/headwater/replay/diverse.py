"""Draws that are good and different: more candidates than wanted, by any rule, of which the most different are kept.

Source: the farthest-point traversal of Gonzalez, Theoretical Computer Science 38 (1985): each choice is the candidate
whose nearest chosen one is farthest, which is within a factor of 2 of the largest smallest distance there is.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TypeAlias

import torch
from torch import Generator, Tensor

from headwater.environments.base import Objects
from headwater.replay.entries import Entries
from headwater.replay.rules import Rule, require
from headwater.trajectories import Trajectories

Distance: TypeAlias = Callable[[object, Objects], Tensor]
"""How far one object is from each of K others: `[K]`, not negative, 0 for itself."""
ObjectsOf: TypeAlias = Callable[[Trajectories], Objects]
"""The objects that trajectories finish, as `Policy.objects` gives them."""

_TOGETHER = 256  # drawn so many at a time, so that distances grow in proportion to what is drawn


def final_states(trajectories: Trajectories) -> Tensor:
    """`[T, width]`, the last state of each trajectory. Raises ValueError where steps have no `state`."""
    if "state" not in trajectories.steps:
        raise ValueError("these trajectories have no steps.state: say how to get their objects")
    return trajectories.steps["state"][trajectories.last]


def hamming(one: object, others: Objects) -> Tensor:
    """The number of places in which rows differ. Raises TypeError for objects that are no tensor."""
    if not (isinstance(one, Tensor) and isinstance(others, Tensor)):
        raise TypeError(f"the Hamming distance takes rows of a tensor, not {type(others).__name__}")
    return (others != one).flatten(1).sum(1)


@dataclass(frozen=True)
class Pairwise:
    """A distance by a function of two objects, called once for each pair."""

    function: Callable[[object, object], float]

    def __call__(self, one: object, others: Objects) -> Tensor:
        return torch.tensor([float(self.function(one, other)) for other in others], dtype=torch.float64)


@dataclass(frozen=True)
class Diverse:
    """Draws `candidates` times what is wanted by `rule`, and keeps the most different.

    The first kept is the candidate of highest log-reward, then always the one whose nearest kept one is farthest; of
    equals the first drawn. Where too few candidates are distinct, the rest of the draw repeats the kept ones in turn.
    A draw of `count` takes at most candidates * count * min(count, 256) distances: beyond 256 it is made in parts.

    Raises ValueError, when it draws, for a distance that is negative or not a number.
    """

    rule: Rule
    candidates: int = 4
    distance: Distance = hamming
    objects: ObjectsOf = final_states

    def __post_init__(self) -> None:
        require(self.candidates >= 2, "candidates", self.candidates, "at least 2")

    def draw(self, count: int, entries: Entries, generator: Generator) -> Tensor:
        parts = [min(_TOGETHER, count - done) for done in range(0, count, _TOGETHER)]
        return torch.cat([self._part(part, entries, generator) for part in parts])

    def _part(self, count: int, entries: Entries, generator: Generator) -> Tensor:
        drawn = self.rule.draw(self.candidates * count, entries, generator)
        drawn = drawn[_first_of_each(drawn)]
        batch = entries.trajectories(drawn)
        kept = _farthest(self.objects(batch), int(batch.log_reward.argmax()), count, self.distance)
        return drawn[torch.tensor(kept)[torch.arange(count) % len(kept)]]


def _farthest(objects: Objects, first: int, count: int, distance: Distance) -> list[int]:
    """At most `count` different indices, from `first` on, each the farthest from those before it."""
    kept = [first]
    nearest = torch.full((len(objects),), torch.inf, dtype=torch.float64)
    while len(kept) < min(count, len(objects)):
        nearest = torch.minimum(nearest, _checked(distance(objects[kept[-1]], objects), len(objects)))
        nearest[kept[-1]] = -1  # behind every other one, even at distance 0
        kept.append(int(nearest.argmax()))
    return kept


def _checked(distances: Tensor, count: int) -> Tensor:
    if distances.shape != (count,):
        raise ValueError(f"distance returned shape {tuple(distances.shape)}, must be ({count},)")
    distances = distances.double().cpu()
    unfit = ~(distances >= 0)
    if unfit.any():
        raise ValueError(f"distance is {float(distances[unfit][0])}, must be at least 0")
    return distances


def _first_of_each(values: Tensor) -> Tensor:
    """The indices of the first of each distinct value, in rising order."""
    order = values.argsort(stable=True)
    is_first = torch.ones_like(values, dtype=torch.bool)
    is_first[1:] = values[order][1:] != values[order][:-1]
    return order[is_first].sort()[0]
