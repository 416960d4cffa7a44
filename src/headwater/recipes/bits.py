"""The recipe `bits`: bit sequences with hidden modes (Malkin et al. 2022, arXiv 2201.13259), autoregressive or in
any order.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import ClassVar, Literal, cast

import torch

from headwater.environments.base import Environment, Objects
from headwater.environments.bits import BitReward, bit_sequences, hidden_modes, modes_found
from headwater.policies import Network
from headwater.recipes.base import EnvironmentRecipe, listed
from headwater.reward import Reward
from headwater.runs import Samples
from headwater.training import ExplorationSettings, Training


@dataclass(frozen=True)
class BitsRecipe(EnvironmentRecipe):
    """Bit sequences rewarded by their distance to the closest of 60 hidden modes."""

    summary: ClassVar[str] = "bit sequences of n bits in words of k, rewarded near hidden modes"
    caches_reward: ClassVar[bool] = False

    bits: int = 120
    """Bits in a sequence, n."""
    word: int = 8
    """Bits placed by one action, k; divides n."""
    construction: Literal["append", "slots"] = "append"
    """append: left to right; slots: words placed in any order."""
    reward: Literal["gfnx", "gflownet-rl", "torchgfn"] = "gfnx"
    """Which of the three published forms: exp(-beta d / n), exp(-beta d), exp(-d / temperature)."""
    strength: float | None = None
    """beta, or the temperature, of that form; its published default if not given."""
    mode_seed: int = 0
    """Seed of the hidden modes."""
    network: Network = field(default_factory=lambda: Network("transformer", width=64, layers=3, heads=8))
    """The network over the environment's states."""
    training: Training = field(
        default_factory=lambda: Training(iterations=5000, batch_size=16, learning_rate=1e-3, log_z_learning_rate=0.05)
    )
    """How long and how fast to learn."""
    exploration: ExplorationSettings = field(default_factory=lambda: ExplorationSettings(epsilon=1e-3, decay=1.0))
    """How the search departs from the policy."""

    def environment(self) -> Environment:
        return bit_sequences(self.bits, self.word, self.construction)

    def base_reward(self) -> Reward:
        return BitReward(hidden_modes(self.bits, seed=self.mode_seed), self.reward, self.strength)

    def objects(self, lines: Sequence[str]) -> Objects:
        return torch.tensor([[int(bit) for bit in line] for line in lines])

    def __post_init__(self) -> None:
        super().__post_init__()
        self.environment()
        self.base_reward()

    def measures(self, samples: Samples) -> dict[str, float]:
        """Modes with a sample within a quarter of the bits, which is 30 of 120."""
        modes = torch.unique(hidden_modes(self.bits, seed=self.mode_seed), dim=0)
        drawn = torch.as_tensor(self.objects(samples.objects))
        return {"modes": modes_found(drawn, modes, self.bits // 4), "modes_total": len(modes)}

    def text(self, objects: Objects) -> list[str]:
        return ["".join(map(str, bits)) for bits in cast("list[tuple[int, ...]]", listed(objects))]
