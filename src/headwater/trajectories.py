"""The packed batch of trajectories: all the data that flows between search, replay and learning, on one page.

A batch holds its trajectories end to end. Per-step tensors are flat, `[S, ...]` for S steps in all, and a trajectory
owns `lengths[i]` consecutive rows of them, so no network ever runs on padding and a sum over a trajectory is one
`index_add`. Which per-step tensors there are is the policy's affair: a discrete environment stores states and actions,
a language model tokens, a diffusion model its noisy states.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, fields, replace
from functools import cached_property
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

_FORMAT = "headwater.trajectories.1"


@dataclass(frozen=True)
class Trajectories:
    """T finished trajectories of S steps in all.

    steps:         per-step tensors by name, each `[S, ...]`, trajectories end to end in time order.
    lengths:       `[T]` int64, the number of steps of each trajectory, at least 1; they add up to S.
    condition:     `[T, C]`, what the trajectory was asked for (a temperature, a prompt, ...); C = 0 for nothing.
    log_reward:    `[T]` float32, log R(x | condition); NaN until a reward has scored it.
    log_behaviour: `[T]` float32, log-probability of the trajectory under what drew it, exploration included.
    version:       `[T]` int64, the version of the policy that drew it.
    identity:      `[T]` int64, a hash of the finished object: equal for equal objects, whatever path built them.
    """

    steps: dict[str, Tensor]
    lengths: Tensor
    condition: Tensor
    log_reward: Tensor
    log_behaviour: Tensor
    version: Tensor
    identity: Tensor

    def __len__(self) -> int:
        return self.lengths.shape[0]

    @property
    def n_steps(self) -> int:
        """S, the number of steps of all trajectories together."""
        return next(iter(self.steps.values())).shape[0]

    @property
    def device(self) -> torch.device:
        return self.lengths.device

    @cached_property
    def starts(self) -> Tensor:
        """`[T]` int64, the row of each trajectory's first step."""
        return self.lengths.cumsum(0) - self.lengths

    @cached_property
    def last(self) -> Tensor:
        """`[T]` int64, the row of each trajectory's last step."""
        return self.lengths.cumsum(0) - 1

    @cached_property
    def index(self) -> Tensor:
        """`[S]` int64, the trajectory that each step belongs to."""
        return torch.repeat_interleave(self.lengths, output_size=self.n_steps)

    @cached_property
    def group(self) -> Tensor:
        """`[T]` int64, equal for trajectories of equal condition, numbered from 0."""
        if self.condition.shape[1] == 0:
            return torch.zeros_like(self.lengths)
        return torch.unique(self.condition, dim=0, return_inverse=True)[1]

    def sum(self, per_step: Tensor) -> Tensor:
        """Sum `[S]` per-step values over each trajectory: `[T]`."""
        total = torch.zeros(len(self), dtype=per_step.dtype, device=per_step.device)
        return total.index_add(0, self.index, per_step)

    def with_log_reward(self, log_reward: Tensor) -> Trajectories:
        """The same trajectories, scored: `log_reward` is `[T]`."""
        if log_reward.shape != self.lengths.shape:
            raise ValueError(f"log_reward has shape {tuple(log_reward.shape)}, expected ({len(self)},)")
        return replace(self, log_reward=log_reward.to(self.device, torch.float32))

    def select(self, chosen: Tensor) -> Trajectories:
        """The trajectories at `chosen` (`[K]` indices, repeats allowed, or a `[T]` bool mask), in that order."""
        if chosen.dtype == torch.bool:
            chosen = chosen.nonzero()[:, 0]
        lengths = self.lengths[chosen]
        rows = rows_of(self.starts[chosen], lengths)
        return self._map(lambda per_step: per_step[rows], lambda per_trajectory: per_trajectory[chosen])

    def split(self, sizes: Sequence[int]) -> list[Trajectories]:
        """Cut into consecutive batches of `sizes` trajectories; the sizes add up to T."""
        if sum(sizes) != len(self):
            raise ValueError(
                f"split sizes {list(sizes)} add up to {sum(sizes)}, the batch has {len(self)} trajectories"
            )
        ends = torch.tensor(sizes, dtype=torch.int64).cumsum(0).tolist()
        everything = torch.arange(len(self), device=self.device)
        return [self.select(everything[end - size : end]) for size, end in zip(sizes, ends, strict=True)]

    def to(self, device: torch.device | str) -> Trajectories:
        """The same trajectories on another device."""
        return self._map(lambda tensor: tensor.to(device), lambda tensor: tensor.to(device))

    @staticmethod
    def concatenate(batches: Sequence[Trajectories]) -> Trajectories:
        """One batch with the trajectories of all `batches`, which must have the same per-step tensors."""
        batches = [batch for batch in batches if len(batch)] or list(batches[:1])
        if not batches:
            raise ValueError("nothing to concatenate")
        if len(batches) == 1:
            return batches[0]
        names = batches[0].steps.keys()
        for batch in batches[1:]:
            if batch.steps.keys() != names:
                raise ValueError(f"cannot concatenate steps {sorted(names)} with steps {sorted(batch.steps)}")
        return Trajectories(
            steps={name: torch.cat([batch.steps[name] for batch in batches]) for name in names},
            **{name: torch.cat([getattr(batch, name) for batch in batches]) for name in _PER_TRAJECTORY},
        )

    def tensors(self) -> dict[str, Tensor]:
        """Every tensor under a flat name, `steps.<name>` for the per-step ones; `from_tensors` is the inverse."""
        flat = {f"steps.{name}": tensor for name, tensor in self.steps.items()}
        return flat | {name: getattr(self, name) for name in _PER_TRAJECTORY}

    @staticmethod
    def from_tensors(tensors: dict[str, Tensor]) -> Trajectories:
        """Rebuild from `tensors()`; raises ValueError naming what is missing or does not fit."""
        missing = [name for name in _PER_TRAJECTORY if name not in tensors]
        steps = {name.removeprefix("steps."): tensor for name, tensor in tensors.items() if name.startswith("steps.")}
        if missing or not steps:
            raise ValueError(f"not a batch of trajectories: missing {', '.join(missing) or 'every per-step tensor'}")
        batch = Trajectories(steps=steps, **{name: tensors[name] for name in _PER_TRAJECTORY})
        batch.validate()
        return batch

    def validate(self) -> None:
        """Raise ValueError, naming the tensor, unless all shapes fit together."""
        count, total = len(self), int(self.lengths.sum())
        if count and int(self.lengths.min()) < 1:
            raise ValueError("lengths: every trajectory needs at least one step")
        for name in _PER_TRAJECTORY:
            if getattr(self, name).shape[0] != count:
                raise ValueError(f"{name} has {getattr(self, name).shape[0]} rows, expected {count}")
        for name, tensor in self.steps.items():
            if tensor.shape[0] != total:
                raise ValueError(f"steps.{name} has {tensor.shape[0]} rows, expected {total}")

    def save(self, path: str | Path) -> None:
        """Write one safetensors file, whole or not at all."""
        tensors = {name: tensor.contiguous().cpu() for name, tensor in self.tensors().items()}
        partial = Path(f"{path}.partial")
        save_file(tensors, str(partial), metadata={"format": _FORMAT})
        partial.replace(path)

    @staticmethod
    def load(path: str | Path) -> Trajectories:
        """Read a file that `save` wrote; raises ValueError, naming the file, on anything else."""
        try:
            with safe_open(str(path), framework="pt") as file:
                if (file.metadata() or {}).get("format") != _FORMAT:
                    raise ValueError("no trajectories in it")
                return Trajectories.from_tensors({name: file.get_tensor(name) for name in file.keys()})  # noqa: SIM118
        except (SafetensorError, ValueError) as error:
            raise ValueError(f"{path}: not a saved batch of trajectories: {error}") from error

    def _map(self, per_step, per_trajectory) -> Trajectories:  # type: ignore[no-untyped-def]
        return Trajectories(
            steps={name: per_step(tensor) for name, tensor in self.steps.items()},
            **{name: per_trajectory(getattr(self, name)) for name in _PER_TRAJECTORY},
        )


_PER_TRAJECTORY = tuple(field.name for field in fields(Trajectories) if field.name != "steps")


def rows_of(starts: Tensor, lengths: Tensor) -> Tensor:
    """The rows `starts[i] .. starts[i] + lengths[i]` of every i, end to end."""
    total = int(lengths.sum())
    shift = starts - (lengths.cumsum(0) - lengths)
    return torch.arange(total, device=starts.device) + torch.repeat_interleave(shift, lengths, output_size=total)
