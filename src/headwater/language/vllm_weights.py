"""How new weights reach a vLLM server. `CheckpointTransfer` writes them as a file that the server reads again;
`NCCLTransfer` broadcasts them from the learner's GPU, by vLLM's weight-transfer protocol
(https://docs.vllm.ai/en/latest/training/weight_transfer/), for which the learner needs no vLLM.
"""

from __future__ import annotations

import base64
import os
import queue
import re
import shutil
import threading
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Protocol

import torch
from torch import Tensor
from torch.cuda import nccl

from headwater.language.vllm_server import Server, ServerError, ServerUnavailable


class WeightTransfer(Protocol):
    """Brings weights into a server. They have the names and shapes of the model's Hugging Face checkpoint."""

    def prepare(self, server: Server, weights: Mapping[str, Tensor], version: int) -> None:
        """All that can be done while the server still draws with the weights before."""
        ...

    def send(self, server: Server, weights: Mapping[str, Tensor], version: int) -> None:
        """Replace the weights of the server, which is paused. Raises ServerError if they did not arrive whole."""
        ...


class CheckpointTransfer:
    """Through a folder that the learner writes and every worker of the server reads under the same path.

    The server loads it by its workers' `reload_weights` (`/collective_rpc`), with no group of GPUs between the two.
    It must not have been started with `--load-format dummy`, whose loader reads no files. The folder is this
    transfer's own: it holds the newest version alone.
    """

    def __init__(self, folder: str | os.PathLike[str]) -> None:
        self.folder = Path(folder).absolute()

    def prepare(self, server: Server, weights: Mapping[str, Tensor], version: int) -> None:
        from safetensors.torch import save_file

        target = self._path(version)
        target.mkdir(parents=True, exist_ok=True)
        partial = target / "model.safetensors.partial"
        save_file(separate(weights), partial, metadata={"format": "pt"})
        os.replace(partial, target / "model.safetensors")

    def send(self, server: Server, weights: Mapping[str, Tensor], version: int) -> None:
        path = self._path(version)
        server.post("/collective_rpc", {"method": "reload_weights", "kwargs": {"weights_path": str(path)}})
        for other in self.folder.iterdir():
            if other != path and re.fullmatch(r"weights-\d+", other.name):
                shutil.rmtree(other, ignore_errors=True)

    def _path(self, version: int) -> Path:
        return self.folder / f"weights-{version}"


def separate(weights: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Contiguous tensors with storage of their own. Of tied weights the first name stays, as in a checkpoint."""
    seen: set[tuple[int, torch.Size, tuple[int, ...]]] = set()
    kept = {}
    for name, tensor in weights.items():
        tensor = tensor.detach()
        place = tensor.data_ptr(), tensor.shape, tensor.stride()
        if tensor.numel() and place in seen:
            continue
        seen.add(place)
        alone = tensor.is_contiguous() and tensor.untyped_storage().nbytes() == tensor.numel() * tensor.element_size()
        kept[name] = tensor if alone else tensor.clone(memory_format=torch.contiguous_format)
    return kept


class Group(Protocol):
    """The learner, rank 0, and every worker of the server. `join` and `broadcast` return when the others took part."""

    def unique_id(self) -> bytes:
        """What the others need to join."""
        ...

    def join(self, unique_id: bytes, size: int) -> None: ...

    def broadcast(self, tensors: Iterable[Tensor]) -> None: ...


class NCCLGroup:
    """A group by the NCCL that is in torch, on one GPU of the learner.

    The workers' communicator makes one `all_reduce` of one float32 when it opens, which every peer must match (vLLM,
    `NCCLWeightTransferInitInfo`). NCCL wants the same version on both sides.
    """

    def __init__(self, device: str | torch.device = "cuda") -> None:
        if not hasattr(torch._C, "_nccl_init_rank"):
            raise RuntimeError("NCCLTransfer needs a GPU and a torch built with NCCL; there is also CheckpointTransfer")
        self.device = torch.device(device)
        self._communicator: object = None

    def unique_id(self) -> bytes:
        return bytes(nccl.unique_id())  # type: ignore[no-untyped-call]

    def join(self, unique_id: bytes, size: int) -> None:
        with torch.cuda.device(self.device):
            self._communicator = nccl.init_rank(size, unique_id, 0)  # type: ignore[no-untyped-call]
            warm = [torch.zeros(1, device=self.device)]
            nccl.all_reduce(warm, comms=[self._communicator])  # type: ignore[no-untyped-call]
            torch.cuda.synchronize()

    def broadcast(self, tensors: Iterable[Tensor]) -> None:
        with torch.cuda.device(self.device):
            for tensor in tensors:
                nccl.broadcast([tensor.to(self.device)], comms=[self._communicator])
            torch.cuda.synchronize()


class NCCLTransfer:
    """By broadcast over NCCL, from a GPU that the server does not use (vLLM 0.30 or later, which lets a peer bring the
    group's identifier). Start the server with `--weight-transfer-config '{"backend": "nccl"}'`.

    The group opens with the first weights and stays. When a broadcast fails, workers may wait in it for ever: the
    server has to be started again.
    """

    def __init__(self, group: Callable[[], Group] = NCCLGroup) -> None:
        self._open = group
        self._group: Group | None = None

    def prepare(self, server: Server, weights: Mapping[str, Tensor], version: int) -> None:
        if self._group is not None:
            return
        answer = server.get("/get_world_size")
        workers = answer.get("world_size") if isinstance(answer, dict) else None
        if not isinstance(workers, int) or workers < 1:
            raise ServerError(f"{server.url}/get_world_size: world_size must be at least 1, not {workers!r}")
        group = self._open()
        name = group.unique_id()
        start = {
            "nccl_unique_id_b64": base64.b64encode(name).decode(), "rank_offset": 1, "world_size": 1 + workers,
        }  # fmt: skip
        _both(
            server.timeout,
            lambda: server.post("/init_weight_transfer_engine", {"init_info": start}, once=True),
            lambda: group.join(name, 1 + workers),
        )
        self._group = group

    def send(self, server: Server, weights: Mapping[str, Tensor], version: int) -> None:
        group, self._group = self._group, None  # a group in which something failed cannot go on
        assert group is not None, "prepare opens the group"
        contents = separate(weights)
        update = {
            "names": list(contents),
            "dtype_names": [str(tensor.dtype).removeprefix("torch.") for tensor in contents.values()],
            "shapes": [list(tensor.shape) for tensor in contents.values()],
        }
        server.post("/start_weight_update", {"is_checkpoint_format": True}, once=True)
        _both(
            server.timeout,
            lambda: server.post("/update_weights", {"update_info": update}, once=True),
            lambda: group.broadcast(contents.values()),
        )
        server.post("/finish_weight_update", {"weight_version": str(version)}, once=True)
        self._group = group


def _both(seconds: float, *actions: Callable[[], object]) -> None:
    """Run them at the same time, for each waits for the other. Raises the first error without waiting for whoever would
    wait for ever after it, and ServerUnavailable when they are not done in time."""
    ended: queue.SimpleQueue[BaseException | None] = queue.SimpleQueue()

    def run(action: Callable[[], object]) -> None:
        try:
            action()
            ended.put(None)
        except BaseException as error:
            ended.put(error)

    for action in actions:
        threading.Thread(target=run, args=(action,), daemon=True).start()
    for _ in actions:
        try:
            error = ended.get(timeout=seconds + 1)
        except queue.Empty:
            raise ServerUnavailable(f"learner and server did not end a transfer within {seconds:g} s") from None
        if error is not None:
            raise error
