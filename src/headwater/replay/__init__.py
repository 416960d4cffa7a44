"""The replay buffer: remembers finished trajectories and hands them out again.

There is one entry for each pair of (identity, condition), the newest kept. `rules` decide what a draw returns, `store`
keeps the entries, packed.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, cast

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Generator, Tensor

from headwater.replay.diverse import Diverse, ObjectsOf, Pairwise, final_states, hamming
from headwater.replay.entries import Entries
from headwater.replay.rules import (
    Mixture,
    PerCondition,
    Recent,
    RewardRank,
    RewardSoftmax,
    Rule,
    Stratified,
    Uniform,
    require,
)
from headwater.replay.store import Store
from headwater.reward_worker import load_function
from headwater.trajectories import Trajectories

__all__ = [
    "Diverse",
    "Entries",
    "Mixture",
    "Pairwise",
    "PerCondition",
    "Recent",
    "Replay",
    "ReplaySettings",
    "RewardRank",
    "RewardSoftmax",
    "Rule",
    "Stratified",
    "Uniform",
    "final_states",
    "hamming",
]

_FORMAT = "headwater.replay.1"

Keep = Callable[[Trajectories], Trajectories]


class Replay:
    """Remembers up to `capacity` trajectories, and of one condition up to `per_condition_capacity` (0 for no limit), on
    the CPU; the oldest leave first. Not to be shared between threads.

    There is one entry for each pair of (identity, condition): a newer trajectory takes the place of the older, and
    counts as newest. keep: what of trajectories is worth remembering.
    """

    def __init__(self, capacity: int, rule: Rule, per_condition_capacity: int = 0, keep: Keep = lambda it: it) -> None:
        require(capacity >= 1, "capacity", capacity, "at least 1")
        require(per_condition_capacity >= 0, "per_condition_capacity", per_condition_capacity, "at least 0")
        self.capacity, self.per_condition_capacity = capacity, per_condition_capacity
        self.rule, self._keep = rule, keep
        self._store = Store(capacity, per_condition_capacity)

    def __len__(self) -> int:
        return self._store.count

    def add(self, trajectories: Trajectories) -> None:
        """Remember scored trajectories.

        Raises ValueError, and changes nothing, if a log-reward is not finite or the tensors are not like those here.
        """
        if len(trajectories):
            self._store.add(self._keep(trajectories).to("cpu"))

    def sample(self, count: int, generator: Generator) -> Trajectories:
        """`count` trajectories by the rule. Raises ValueError if the replay is empty."""
        require(count >= 1, "count", count, "at least 1")
        if not len(self):
            raise ValueError("cannot draw from an empty replay: add trajectories first")
        entries = self._store.entries
        return entries.trajectories(self.rule.draw(count, entries, generator))

    def state(self) -> dict[str, Tensor]:
        """Everything that future draws and evictions depend on, by name; `load_state` is the inverse."""
        recent = {"recent": torch.tensor(self._store.recent)}
        return recent | (self._store.gather(self._store.slots).tensors() if len(self) else {})

    def load_state(self, tensors: dict[str, Tensor]) -> None:
        """Become the replay whose `state` this is; raises ValueError, and changes nothing, if it is no such state."""
        if "recent" not in tensors:
            raise ValueError("not the state of a replay: missing recent")
        store = Store(self.capacity, self.per_condition_capacity)
        if len(tensors) > 1:
            batch = Trajectories.from_tensors({name: tensors[name] for name in tensors if name != "recent"})
            store.add(batch, int(tensors["recent"]))
        self._store = store

    def save(self, path: str | Path) -> None:
        """Write the state to one safetensors file, atomically: the file is the old or the new one, never a part."""
        part = Path(f"{path}.part")
        save_file({name: tensor.contiguous() for name, tensor in self.state().items()}, part, {"format": _FORMAT})
        os.replace(part, path)

    def load(self, path: str | Path) -> None:
        """Become the replay that `save` wrote; raises ValueError, naming the file, and changes nothing, on another."""
        try:
            with safe_open(str(path), framework="pt") as file:
                if (file.metadata() or {}).get("format") != _FORMAT:
                    raise ValueError("no replay in it")
                self.load_state({name: file.get_tensor(name) for name in file.keys()})  # noqa: SIM118
        except (SafetensorError, ValueError) as error:
            raise ValueError(f"{path}: not a saved replay: {error}") from error

    def summary(self, version: int) -> dict[str, float]:
        """What is in it, for a log: how many entries, of how many conditions, the share of positive log-rewards, and
        how many versions before `version` they were drawn, in the mean. Takes time in proportion to the entries.
        """
        entries, count = self._store.entries, len(self)
        if not count:
            return {"replay/entries": 0.0}
        return {
            "replay/entries": float(count),
            "replay/conditions": float(len(torch.unique(entries.condition_key))),
            "replay/positive": float(entries.n_above(torch.zeros(1))) / count,
            "replay/mean_age": version - float(entries.version.double().mean()),
        }


@dataclass(frozen=True)
class ReplaySettings:
    """A replay by name."""

    capacity: int = 100_000
    """Trajectories remembered; the oldest leave first."""
    rule: Literal["recent", "uniform", "softmax", "rank", "stratified"] = "stratified"
    """How they are drawn: the newest, uniformly, by softmax of log-reward, by rank, or a set share of high rewards."""
    temperature: float = 1.0
    """Of the softmax over log-rewards."""
    rank_weight: float = 1e-3
    """k of the rank rule: the smaller, the more the best are drawn."""
    share: float = 0.5
    """Share of a stratified draw that has a reward at or above the quantile."""
    quantile: float = 0.9
    """Quantile of reward that separates the strata."""
    recent_probability: float = 0.0
    """Probability that a draw is from the most recent batch, whatever the rule; with per_condition, a whole group."""
    per_condition: int = 0
    """Draw this many entries of each condition that is drawn, different ones where there are so many; 0 draws without
    regard to conditions."""
    per_condition_capacity: int = 0
    """Trajectories of one condition remembered, the oldest leave first; 0 for no limit of its own."""
    candidates: int = 1
    """Candidates for each trajectory drawn, by the rule; above 1 the most different are kept, the best among them."""
    distance: str = "hamming"
    """How different two objects are: hamming, of final states, or your function of two objects as module:function."""

    def __post_init__(self) -> None:
        require(self.capacity >= 1, "capacity", self.capacity, "at least 1")
        require(self.rule in self._rules(), "rule", self.rule, "one of " + ", ".join(self._rules()))
        require(0 <= self.recent_probability <= 1, "recent_probability", self.recent_probability, "from 0 to 1")
        for name in ("per_condition", "per_condition_capacity"):
            require(getattr(self, name) >= 0, name, getattr(self, name), "at least 0")
        group, room = self.per_condition, self.per_condition_capacity
        legal = f"0, for no limit, or at least per_condition = {group}: a group is of one condition"
        require(not room or room >= group, "per_condition_capacity", room, legal)
        require(self.candidates >= 1, "candidates", self.candidates, "at least 1")
        named = self.distance == "hamming" or ":" in self.distance
        require(named, "distance", self.distance, "hamming or module:function")

    def build(self, objects: ObjectsOf = final_states, keep: Keep = lambda it: it) -> Replay:
        """An empty replay of these settings. objects: how trajectories give the objects that `distance` takes, such as
        `Policy.objects`. keep: see `Replay`. Raises ValueError where the distance cannot be found."""
        rule = self._rules()[self.rule]
        if self.recent_probability and not self.per_condition:
            rule = Mixture(self.recent_probability, rule)
        if self.candidates > 1 and self.distance == "hamming":
            rule = Diverse(rule, self.candidates)
        elif self.candidates > 1:
            function = cast(Callable[[object, object], float], load_function(self.distance, "distance"))
            rule = Diverse(rule, self.candidates, Pairwise(function), objects)
        if self.per_condition:
            rule = PerCondition(rule, self.per_condition, self.recent_probability)
        return Replay(self.capacity, rule, self.per_condition_capacity, keep)

    def _rules(self) -> dict[str, Rule]:
        require(0 < self.rank_weight < float("inf"), "rank_weight", self.rank_weight, "above 0")
        return {
            "recent": Recent(),
            "uniform": Uniform(),
            "softmax": RewardSoftmax(self.temperature),
            "rank": RewardRank(self.rank_weight),
            "stratified": Stratified(self.share, self.quantile),
        }
