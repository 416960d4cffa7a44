"""The recipe `sets`: subsets of given items, rewarded by weights and synergies from tables or by a function of the
user's own.

With weights w and synergies s, log R(S) = sum of w_i over the items in S, and of s_ij over the pairs in it: one's
prior inclination for each item, and how they go together.
"""

from __future__ import annotations

import csv
import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import cached_property
from html import escape
from pathlib import Path
from typing import ClassVar, cast

import torch
from torch import Tensor

from headwater.environments.base import Environment, Objects
from headwater.environments.sets import Sets
from headwater.policies import NO_EXPLORATION, Policy
from headwater.recipes.base import EnvironmentRecipe, listed
from headwater.report import Section
from headwater.reward import FunctionReward, Reward
from headwater.runs import Run
from headwater.training import Training

LARGEST_FILE = 10_000_000
"""Bytes of the largest table or list of items that is read."""
_DRAWS = 20_000
_MOST_ROWS = 100


@dataclass(frozen=True)
class SetsRecipe(EnvironmentRecipe):
    """Give weights of items (--weights w.csv), perhaps with synergies of pairs, or a function (--function module:name)
    that takes a list of sets, each a sorted tuple of items.
    """

    summary: ClassVar[str] = "subsets of items, rewarded by weights and synergies (CSV) or by your Python function"

    weights: Path | None = None
    """CSV with a line item,weight for each item: gives the items too."""
    synergies: Path | None = None
    """CSV with lines item,item,synergy for pairs of items; those not listed have none."""
    function: str | None = None
    """Your reward as module:function, a list of sets in, a list of numbers of at least 0 out."""
    timeout: float | None = None
    """Seconds that one call of the function may take; the set that takes longer counts as failed."""
    floor: float = 1e-12
    """Rewards of the function below it count as this."""
    items: int | Path = 10
    """With a function: how many items, numbered from 0, or a text file with one a line."""
    size: int = 5
    """Items in a set, at most."""
    exact: bool = False
    """Exactly so many items."""
    training: Training = field(default_factory=lambda: Training(iterations=3000, batch_size=32, learning_rate=2e-3))
    """How long and how fast to learn."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if (self.weights is None) == (self.function is None):
            raise ValueError("give either weights (a CSV file of items) or function (module:function)")
        if self.synergies is not None and self.weights is None:
            raise ValueError("synergies go with weights, not with a function")
        self.environment()
        if self.weights is not None:
            self.base_reward()

    @cached_property
    def names(self) -> int | list[str]:
        """The items, or how many. Raises ValueError naming the file at fault."""
        if self.weights is not None:
            return list(self.table)
        if isinstance(self.items, int):
            return self.items
        lines = [line.strip() for line in _text(self.items).splitlines() if line.strip()]
        repeated = next((line for place, line in enumerate(lines) if line in lines[:place]), None)
        if not lines or repeated is not None:
            raise ValueError(f"{self.items}: {'no items in it' if not lines else f'{repeated!r} is there twice'}")
        return lines

    @cached_property
    def table(self) -> dict[str, float]:
        """The weight of each item, in the order of the file."""
        assert self.weights is not None
        table: dict[str, float] = {}
        for where, names, value in _rows(self.weights, 1):
            if names[0] in table:
                raise ValueError(f"{where}: item {names[0]!r} has a weight already")
            table[names[0]] = value
        return table

    def environment(self) -> Environment:
        return Sets(self.names, self.size, self.exact)

    def base_reward(self) -> Reward:
        if self.function is not None:
            return FunctionReward(self.function, self.timeout, self.floor)
        number = {name: place for place, name in enumerate(self.table)}
        synergy = torch.zeros(len(number), len(number), dtype=torch.float64)
        listed_pairs: set[frozenset[str]] = set()
        for where, names, value in [] if self.synergies is None else _rows(self.synergies, 2):
            for name in names:
                if name not in number:
                    raise ValueError(f"{where}: {name!r} has no weight in {self.weights}")
            if names[0] == names[1] or frozenset(names) in listed_pairs:
                raise ValueError(f"{where}: {names[0]!r} and {names[1]!r} must be a pair that is not yet listed")
            listed_pairs.add(frozenset(names))
            synergy[number[names[0]], number[names[1]]] = value
        return SynergyReward(number, torch.tensor(list(self.table.values())), synergy)

    def text(self, objects: Objects) -> list[str]:
        return [", ".join(map(str, cast("tuple[object, ...]", chosen))) for chosen in listed(objects)]

    def objects(self, lines: Sequence[str]) -> Objects:
        chosen = [[name.strip() for name in line.split(",") if name.strip()] for line in lines]
        return [tuple(int(name) if isinstance(self.names, int) else name for name in names) for names in chosen]

    def distance(self, a: str, b: str) -> float:
        """Items that are in one of the two only."""
        first, second = (set(value.split(", ")) - {""} for value in (a, b))
        return len(first ^ second)

    def columns(self, objects: Sequence[str]) -> dict[str, list[object]]:
        return {"size": [len(cast("tuple[object, ...]", one)) for one in self.objects(objects)]}

    def sections(self, run: Run, policy: Policy) -> list[Section]:
        """How likely each item is to be in a set, learned and exact."""
        condition, target = self.default_condition(), self.exact_distribution()
        if target is not None:
            states = target.states.double()
            learned = target.log_probs(policy).exp() @ states
            exact = target.probabilities @ states
            words = "Probability that an item is in the set, under the sampler and under the target, both exact."
        else:
            asked = (torch.empty(1, 0) if condition is None else condition).expand(_DRAWS, -1)
            drawn = policy.sample(asked, NO_EXPLORATION, torch.Generator().manual_seed(self.seed + 3))
            learned = self.environment().states(policy.objects(drawn)).double().mean(0)
            exact = None
            words = f"Share of {_DRAWS:,} draws that the item is in."
        names = [str(name) for name in (range(self.names) if isinstance(self.names, int) else self.names)]
        order = learned.argsort(descending=True).tolist()
        rows = "".join(
            f"<tr><td>{escape(names[item])}</td><td>{float(learned[item]):.4f}</td>"
            + (f"<td>{float(exact[item]):.4f}</td>" if exact is not None else "")
            + "</tr>"
            for item in order[:_MOST_ROWS]
        )
        head = "<tr><th>item</th><th>learned</th>" + ("<th>exact</th>" if exact is not None else "") + "</tr>"
        return [Section("Items", f"<p>{words}</p><table>{head}{rows}</table>")]


class SynergyReward:
    """log R(S) = sum_i w_i + sum_ij s_ij over the items of a set and the pairs in it.

    number: the place of each item. weights: `[n]`. synergy: `[n, n]`, each pair in one of its two places.
    """

    def __init__(self, number: dict[str, int], weights: Tensor, synergy: Tensor) -> None:
        self.number, self.weights, self.synergy = number, weights.double(), synergy

    def __call__(self, objects: Objects, condition: Tensor) -> Tensor:
        """float32 `[T]`."""
        chosen = torch.zeros(len(objects), len(self.number), dtype=torch.float64)
        for row, one in enumerate(objects):
            chosen[row, [self.number[name] for name in cast("tuple[str, ...]", one)]] = 1
        return (chosen @ self.weights + ((chosen @ self.synergy) * chosen).sum(1)).float()


def _rows(path: Path, items: int) -> list[tuple[str, list[str], float]]:
    """Where each line of a CSV file without header is, the items that it names, and the number that it ends on."""
    rows = []
    reader = csv.reader(_text(path).splitlines())
    for row in reader:
        if not row:
            continue
        where = f"{path}, line {reader.line_num}"
        *names, text = (value.strip() for value in row)
        if len(names) != items or not all(names):
            raise ValueError(f"{where}: must be {'an item' if items == 1 else 'two items'} and a number")
        try:
            value = float(text)
        except ValueError:
            raise ValueError(f"{where}: {text!r} is not a number") from None
        if not math.isfinite(value):
            raise ValueError(f"{where}: {text!r} is not a finite number")
        if any("," in name for name in names):
            raise ValueError(f"{where}: an item's name must not hold a comma")
        rows.append((where, names, value))
    if not rows:
        raise ValueError(f"{path}: nothing in it")
    return rows


def _text(path: Path) -> str:
    if (size := path.stat().st_size) > LARGEST_FILE:
        raise ValueError(f"{path}: {size:,} bytes; at most {LARGEST_FILE:,} are read")
    try:
        return path.read_text(encoding="utf-8-sig")
    except UnicodeDecodeError as error:
        raise ValueError(f"{path}: not a text file ({error.reason} at byte {error.start})") from error
