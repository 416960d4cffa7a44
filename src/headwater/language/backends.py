"""Which generation backend writes a run's completions."""

from __future__ import annotations

import os
from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from headwater.language.backbone import Backbone
from headwater.language.generation import Generator, ModelGenerator
from headwater.language.vllm_server import Server


@dataclass(frozen=True)
class VLLM:
    """A vLLM server, in an environment of its own, that writes the completions (see docs/language-vllm.md)."""

    url: str = ""
    """Its address, such as http://localhost:8000; empty to write with transformers, in the searcher's own process."""
    weights: str = ""
    """A folder that both sides see, through which new weights reach the server; empty to broadcast them by NCCL."""
    pause: Literal["keep", "wait", "abort"] = "keep"
    """What becomes of completions under way when new weights come: they go on, end first, or begin anew."""
    concurrency: int = 64
    """Requests at once."""
    every: int = 1
    """Updates between two deliveries of weights, at least."""
    start: float = 60.0
    """Seconds that the server may take to come up."""

    def __post_init__(self) -> None:
        for name in ("concurrency", "every"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} = {getattr(self, name)}: must be at least 1")
        if not self.start > 0:
            raise ValueError(f"start = {self.start}: must be above 0 seconds")
        if self.url:
            Server(self.url)

    def connect(self, backbone: Backbone, tokenizer: PreTrainedTokenizerBase) -> Generator:
        """A client; raises ServerError if the server does not come up. Its key is taken from VLLM_API_KEY."""
        from headwater.language.vllm import VLLMGenerator
        from headwater.language.vllm_weights import CheckpointTransfer, NCCLTransfer

        server = Server(self.url, key=os.environ.get("VLLM_API_KEY"))
        return VLLMGenerator(
            server,
            CheckpointTransfer(self.weights) if self.weights else NCCLTransfer(),
            vocabulary=backbone.model.config.get_text_config().vocab_size,
            ends=ModelGenerator(backbone, tokenizer).ends,
            concurrency=self.concurrency,
            pause=self.pause,
            start=self.start,
        )


@dataclass
class Remote:
    """A generator somewhere else, connected to when it is first needed, and kept up to date.

    every: updates between two deliveries of weights, at least.
    """

    connect: Callable[[], Generator]
    every: int
    _connected: Generator | None = None
    _delivered: int | None = None

    def up_to_date(self, model: PreTrainedModel, version: int) -> Generator:
        """The generator, with weights of `version` or less than `every` updates older."""
        if self._connected is None:
            self._connected = self.connect()
        if self._delivered is None or version < self._delivered or version - self._delivered >= self.every:
            self._connected.load(whole_weights(model), version)
            self._delivered = version
        return self._connected


def whole_weights(model: PreTrainedModel) -> dict[str, Tensor]:
    """The weights under the names of an ordinary checkpoint, with adapters merged into them."""
    if not hasattr(model, "peft_config"):
        return dict(model.state_dict())
    model.merge_adapter()
    try:
        merged = model.get_base_model().state_dict()
        plain = {name.replace(".base_layer.", "."): tensor for name, tensor in merged.items() if "lora_" not in name}
        return {name: tensor.detach().clone() for name, tensor in plain.items()}
    finally:
        model.unmerge_adapter()
