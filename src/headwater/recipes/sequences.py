"""The recipe `sequences`: sequences over any alphabet, rewarded by a table of scores or by a Python function of the
user's own.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import ClassVar, Literal

from headwater.environments.base import Environment
from headwater.environments.sequences import Sequences
from headwater.recipes.base import EnvironmentRecipe
from headwater.reward import FunctionReward, Reward, TableReward
from headwater.training import Training


@dataclass(frozen=True)
class SequencesRecipe(EnvironmentRecipe):
    """Give a table of scores (--table scores.csv) or a function (--function module:name) that takes a list of
    strings.
    """

    summary: ClassVar[str] = (
        "sequences over any alphabet, rewarded by your table (CSV, Parquet) or your Python function"
    )

    table: Path | None = None
    """CSV or Parquet with every sequence and its score: gives alphabet and lengths too."""
    object_column: str = "sequence"
    """The table's column of sequences."""
    reward_column: str = "reward"
    """The table's column of scores."""
    default: float | None = None
    """Score of a sequence that is not in the table; without it such a sequence is an error."""
    exponent: float = 1.0
    """R = score ** exponent ..."""
    scale_maximum_to: float | None = None
    """... then scaled so that the table's largest is this ..."""
    floor: float = 1e-3
    """... then at least this."""
    function: str | None = None
    """Your reward as module:function, a list of strings in, a list of numbers of at least 0 out."""
    timeout: float | None = None
    """Seconds that one call of the function may take; the object that takes longer counts as failed."""
    alphabet: str = "ACGT"
    """The symbols, one character each."""
    length: int = 8
    """Length of a sequence, or the largest where min_length is given."""
    min_length: int | None = None
    """Smallest length; the same as length if not given."""
    construction: Literal["append", "prepend-append"] = "append"
    """append: left to right; prepend-append: grow at both ends."""
    training: Training = field(default_factory=lambda: Training(iterations=5000, batch_size=32, learning_rate=1e-3))
    """How long and how fast to learn."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if (self.table is None) == (self.function is None):
            raise ValueError("give either table (a CSV or Parquet file of scores) or function (module:function)")
        self.environment()

    def environment(self) -> Environment:
        return Sequences(list(self.alphabet), self.length, self.min_length, self.construction)

    def base_reward(self) -> Reward:
        if self.function is not None:
            return FunctionReward(self.function, timeout=self.timeout, floor=self.floor)
        assert self.table is not None
        return TableReward(
            self.table, self.object_column, self.reward_column, default=self.default, exponent=self.exponent,
            scale_maximum_to=self.scale_maximum_to, floor=self.floor,
        )  # fmt: skip
