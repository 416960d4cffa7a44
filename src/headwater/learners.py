"""Learning by several processes at once, one a GPU: each takes a share of every batch.

The first process, the leader, searches and keeps the books; the others follow. All know the whole batch, but each runs
the policy on its own trajectories only. Log-probabilities are put together before the loss, so that groups may lie
across processes, and gradients are summed after it: the update is that of one process, whatever the share of each.
"""

from __future__ import annotations

import importlib
import os
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import timedelta

import torch
from safetensors.torch import load, save
from torch import Tensor, distributed, nn

from headwater.trajectories import Trajectories

_PATIENCE = timedelta(hours=12)  # the leader may be busy with an evaluation


class Learners:
    """This process among those that learn. rank: its number, 0 for the leader. size: how many there are."""

    def __init__(self) -> None:
        self.rank, self.size = distributed.get_rank(), distributed.get_world_size()

    @staticmethod
    @contextmanager
    def joined() -> Iterator[Learners | None]:
        """Among the others, where `torchrun` has started several processes; None where this one is alone."""
        if int(os.environ.get("WORLD_SIZE", "1")) < 2:
            yield None
            return
        if torch.cuda.is_available():
            torch.cuda.set_device(int(os.environ.get("LOCAL_RANK", "0")))
        # Functions of torch.distributed.nn hold the group of the moment of their import as a default argument. Imported
        # after it, as other libraries do, they would keep it to the interpreter's end, where its threads may abort.
        importlib.import_module("torch.distributed.nn")
        distributed.init_process_group("cpu:gloo,cuda:nccl" if torch.cuda.is_available() else "gloo", timeout=_PATIENCE)
        try:
            yield Learners()
        finally:
            distributed.destroy_process_group()

    @property
    def leads(self) -> bool:
        return self.rank == 0

    def announce(self, text: str | None = None) -> str:
        """The leader's text, to all."""
        return self._from_leader(None if text is None else text.encode()).decode()

    def tell(self, batch: Trajectories, beta: float, progress: float) -> None:
        """By the leader: all are to learn from this batch."""
        numbers = torch.tensor([beta, progress], dtype=torch.float64)
        self._from_leader(save({name: tensor.contiguous() for name, tensor in batch.to("cpu").tensors().items()}))
        distributed.broadcast(numbers, 0)

    def dismiss(self) -> None:
        """By the leader: there is no more to learn."""
        self._from_leader(b"")

    def listen(self) -> tuple[Trajectories, float, float] | None:
        """By a follower: the next batch with its beta and progress; None when dismissed."""
        told = self._from_leader(None)
        if not told:
            return None
        numbers = torch.zeros(2, dtype=torch.float64)
        distributed.broadcast(numbers, 0)
        return Trajectories.from_tensors(load(told)), float(numbers[0]), float(numbers[1])

    def sum(self, tensors: list[Tensor]) -> None:
        """Each tensor becomes the sum over all processes, in place."""
        for tensor in tensors:
            distributed.all_reduce(tensor)

    def sum_gradients(self, module: nn.Module) -> None:
        """A parameter that has no gradient here counts as zero."""
        for parameter in module.parameters():
            if parameter.requires_grad:
                if parameter.grad is None:
                    parameter.grad = torch.zeros_like(parameter)
                distributed.all_reduce(parameter.grad)

    def _from_leader(self, data: bytes | None) -> bytes:
        length = torch.tensor([len(data or b"")])
        distributed.broadcast(length, 0)
        count = int(length)
        content = torch.empty(count, dtype=torch.uint8)
        if self.leads and count:
            content = torch.frombuffer(bytearray(data or b""), dtype=torch.uint8)
        if count:
            distributed.broadcast(content, 0)
        return content.numpy().tobytes()
