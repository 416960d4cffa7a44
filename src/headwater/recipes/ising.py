"""The recipe `ising`: Ising and Potts models on a torus, or any model of pairwise couplings from a file, with exact
log Z beside what was learned.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import ClassVar, Literal, cast

import numpy as np
import torch
from torch import Tensor

from headwater.environments.base import Environment, Objects
from headwater.environments.elimination import Elimination, TooWide
from headwater.environments.lattice import PairwiseReward, read_couplings, sites, torus
from headwater.objectives import Objective
from headwater.policies import NO_EXPLORATION, Policy
from headwater.recipes.base import EnvironmentRecipe, listed
from headwater.report import Section
from headwater.reward import Reward
from headwater.runs import Run
from headwater.training import ExplorationSettings, Training

_DRAWS = 5000
_PICTURES = 12
_ACROSS = 6


@dataclass(frozen=True)
class IsingRecipe(EnvironmentRecipe):
    """Spins on a torus (--height 6 --width 6 --coupling 0.1), or couplings of your own (--couplings J.csv)."""

    summary: ClassVar[str] = "spins that interact in pairs: Ising and Potts models, log Z known exactly"
    caches_reward: ClassVar[bool] = False

    height: int = 6
    """Rows of the torus."""
    width: int = 6
    """Columns of the torus."""
    coupling: float = 0.1
    """sigma: log R = sigma x^T A x with A the bonds, so each bond counts twice; above about 0.22 spins line up."""
    couplings: Path | None = None
    """CSV file of a symmetric matrix J, row by row, in the place of the torus: log R = x^T J x."""
    states: int = 2
    """2: spins -1 and +1 (Ising); more: equal neighbours are rewarded (Potts)."""
    magnetic_field: float = 0.0
    """Added to log R for each site in the last state; for two states, times its spin."""
    construction: Literal["append", "slots"] = "append"
    """append: sites are set row by row; slots: in any order, which takes many times the work."""
    objective: Objective = field(default_factory=lambda: Objective("vargrad"))
    """What to balance."""
    training: Training = field(
        default_factory=lambda: Training(iterations=2000, batch_size=64, learning_rate=3e-3, schedule="cosine")
    )
    """How long and how fast to learn."""
    exploration: ExplorationSettings = field(default_factory=lambda: ExplorationSettings(epsilon=0.0))
    """How the search departs from the policy."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if not (math.isfinite(self.coupling) and math.isfinite(self.magnetic_field)):
            raise ValueError(
                f"coupling = {self.coupling}, magnetic_field = {self.magnetic_field}: must be finite numbers"
            )
        self.environment()

    @cached_property
    def model(self) -> PairwiseReward:
        """The reward at inverse temperature 1. Raises ValueError naming the file of couplings if that is at fault."""
        if self.couplings is None:
            return self._model(self.coupling * torus(self.height, self.width))
        bonds = read_couplings(self.couplings)
        try:
            return self._model(bonds)
        except ValueError as error:
            raise ValueError(f"{self.couplings}: {error}") from error

    def _model(self, couplings: Tensor) -> PairwiseReward:
        fields = torch.zeros(len(couplings), self.states, dtype=torch.float64)
        fields[:, -1] = self.magnetic_field
        if self.states == 2:
            fields[:, 0] = -self.magnetic_field
        return PairwiseReward(couplings, self.states, fields)

    def environment(self) -> Environment:
        return sites(len(self.model.couplings), self.states, self.construction)

    def base_reward(self) -> Reward:
        return self.model

    def _elimination(self) -> Elimination | None:
        beta = 1.0 if (condition := self.default_condition()) is None else float(condition)
        try:
            return PairwiseReward(beta * self.model.couplings, self.states, beta * self.model.fields).elimination()
        except TooWide:
            return None

    def exact_log_z(self) -> float | None:
        found = self._elimination()
        return None if found is None else found.log_z

    def exact_draws(self) -> Elimination | None:
        found = self._elimination()
        return found if found is not None and found.can_draw else None

    @property
    def _symbols(self) -> str:
        return "-+" if self.states == 2 else "0123456789"[: self.states]

    def text(self, objects: Objects) -> list[str]:
        rows = cast("list[tuple[int, ...]]", listed(objects))
        return ["".join(self._symbols[state] for state in row) for row in rows]

    def objects(self, lines: Sequence[str]) -> Objects:
        """Raises ValueError naming a symbol that is none of a site's."""
        for line in lines:
            if strange := line.strip(self._symbols):
                raise ValueError(f"{line!r}: {strange[0]!r} is no state of a site; legal are {' '.join(self._symbols)}")
        return torch.tensor([[self._symbols.index(symbol) for symbol in line] for line in lines])

    def columns(self, objects: Sequence[str]) -> dict[str, list[object]]:
        states = torch.as_tensor(self.objects(objects))
        return {"magnetisation": [round(value, 4) for value in self.magnetisation(states).tolist()]}

    def magnetisation(self, states: Tensor) -> Tensor:
        """Of states `[T, n]`, float64 `[T]`: the mean spin of two states; of more, 0 for all alike often, 1 for one
        alone.
        """
        if self.states == 2:
            return 2.0 * states.double().mean(1) - 1
        share = torch.nn.functional.one_hot(states.long(), self.states).double().mean(1).amax(1)
        return (self.states * share - 1) / (self.states - 1)

    def sections(self, run: Run, policy: Policy) -> list[Section]:
        """Lattices as they were drawn; magnetisation, energy and correlation, learned beside exact."""
        from headwater.report.figures import histogram_figure, line_figure

        condition = self.default_condition()
        generator = torch.Generator().manual_seed(self.seed + 3)
        asked = (torch.empty(1, 0) if condition is None else condition).expand(_DRAWS, -1)
        drawn = {"learned": torch.as_tensor(policy.objects(policy.sample(asked, NO_EXPLORATION, generator)))}
        if (exact := self.exact_draws()) is not None:
            drawn["exact"] = exact.sample(_DRAWS, generator)
        nothing = torch.empty(_DRAWS, 0)
        figures = [
            histogram_figure(
                {name: self.magnetisation(states).numpy() for name, states in drawn.items()},
                x_label="magnetisation", title="Magnetisation",
            ),
            histogram_figure(
                {name: -self.model(states, nothing).numpy() for name, states in drawn.items()},
                x_label="energy, −log R", title="Energy",
            ),
        ]  # fmt: skip
        sections = []
        if self.couplings is None:
            lattices = drawn["learned"][:_PICTURES].view(-1, self.height, self.width)
            pictures = _pictures(lattices, self.states)
            sections.append(Section("Lattices drawn", f'<figure class="medium">{pictures}</figure>'))
            reach = self.width // 2
            if reach:
                curves = {
                    name: (np.arange(reach + 1), self._correlation(states, reach)) for name, states in drawn.items()
                }
                figures.append(line_figure(curves, x_label="distance along a row", title="Correlation of two sites"))
        html = "".join(f"<figure>{figure}</figure>" for figure in figures)
        words = f"{_DRAWS:,} draws of the sampler" + (f" and {_DRAWS:,} exact ones." if exact is not None else ".")
        sections.append(Section("Physics of the model", f'<p>{words}</p><div class="figures">{html}</div>'))
        return sections

    def _correlation(self, states: Tensor, reach: int) -> np.ndarray:
        """Mean s_i . s_j over all pairs of sites that lie 0, 1, ... `reach` apart along a row of the torus."""
        spins = self.model.spins[states.long()].view(len(states), self.height, self.width, -1)
        return np.array([float((spins * spins.roll(-far, 2)).sum(3).mean()) for far in range(reach + 1)])


def _pictures(lattices: Tensor, number: int) -> str:
    """Lattices `[count, height, width]` as one `<svg>`, a darker square for a higher state."""
    from headwater.report.figures import PALETTE

    count, height, width = lattices.shape
    across = min(count, _ACROSS)
    drawings = []
    for place, states in enumerate(lattices.tolist()):
        squares = "".join(
            f'<rect x="{column}" y="{row}" width="1" height="1" fill-opacity="{state / (number - 1):.2g}"/>'
            for row, line in enumerate(states)
            for column, state in enumerate(line)
            if state
        )
        frame = f'<rect width="{width}" height="{height}" fill="none" stroke="{PALETTE["rule"]}" stroke-width="0.1"/>'
        x, y = place % across * (width + 1), place // across * (height + 1)
        drawings.append(f'<g transform="translate({x} {y})">{frame}{squares}</g>')
    box = f"-0.1 -0.1 {across * (width + 1) - 0.8} {-(-count // across) * (height + 1) - 0.8}"
    return (
        f'<svg role="img" aria-label="{count} lattices of {height} rows and {width} columns" viewBox="{box}" '
        f'shape-rendering="crispEdges" fill="{PALETTE["water"]}">{"".join(drawings)}</svg>'
    )
