"""Loads a causal language model and its tokenizer: an ordinary Hugging Face folder, or a name on the hub."""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import torch
from safetensors import SafetensorError
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, PreTrainedModel, PreTrainedTokenizerBase
from transformers.utils.logging import disable_progress_bar

disable_progress_bar()  # of loading weights; the run has its own

Precision = Literal["float32", "bfloat16"]


@dataclass(frozen=True)
class Lora:
    """Low-rank adapters (Hu et al. 2021, arXiv 2106.09685): they alone learn, and without them the model is the
    reference."""

    rank: int = 0
    """Rank of every adapter; 0 to learn all weights of the model."""
    alpha: float = 32.0
    """The adapters' output is scaled by alpha / rank."""
    targets: tuple[str, ...] = ("all-linear",)
    """Names of the layers that get one, or all-linear."""

    def __post_init__(self) -> None:
        if self.rank < 0:
            raise ValueError(f"rank = {self.rank}: must not be negative")
        if not self.alpha > 0:
            raise ValueError(f"alpha = {self.alpha}: must be positive")


def load_tokenizer(path: str) -> PreTrainedTokenizerBase:
    """Raises ValueError where there is none."""
    _require_folder(path)
    try:
        tokenizer = AutoTokenizer.from_pretrained(path, trust_remote_code=False)
    except (OSError, ValueError, KeyError) as error:
        said = " ".join(str(error).split())  # the library tells in lines what all it has looked for
        raise ValueError(f"model = {path!r}: no tokenizer can be loaded from there: {said}") from error
    if tokenizer.eos_token_id is None:
        raise ValueError(f"model = {path!r}: its tokenizer has no end-of-sequence token, so no completion could end")
    return tokenizer


def load_model(
    path: str, device: torch.device, precision: Precision = "float32", lora: Lora | None = None, recompute: bool = False
) -> PreTrainedModel:
    """A causal language model from safetensors; no code of the folder or the hub is run.

    recompute: gradient checkpointing. Raises ValueError naming what is missing or does not fit. Weights that the folder
    lacks are such an error: the library would draw them at random.
    """
    _require_folder(path)
    try:
        config = AutoConfig.from_pretrained(path, trust_remote_code=False)
        model, report = AutoModelForCausalLM.from_pretrained(
            path, config=config, dtype=getattr(torch, precision), trust_remote_code=False, use_safetensors=True,
            output_loading_info=True,
        )  # fmt: skip
    except (OSError, ValueError, KeyError, RuntimeError, SafetensorError) as error:
        raise ValueError(
            f"model = {path!r}: cannot be loaded as a causal language model: {_first_line(error)}"
        ) from error
    missing = sorted(report["missing_keys"])
    if missing:
        raise ValueError(
            f"model = {path!r}: must be a causal language model; as one it lacks the weights {', '.join(missing[:4])}"
        )
    model = model.to(device)
    if recompute:
        model.gradient_checkpointing_enable({"use_reentrant": False})
    if lora is None or not lora.rank:
        return model
    return _with_adapters(model, lora)


def _with_adapters(model: PreTrainedModel, lora: Lora) -> PreTrainedModel:
    try:
        from peft import LoraConfig, get_peft_model
    except ImportError as error:
        raise ImportError("lora.rank: needs the extra language: pip install headwater[language]") from error
    targets = "all-linear" if lora.targets == ("all-linear",) else list(lora.targets)
    settings = LoraConfig(
        r=lora.rank, lora_alpha=lora.alpha, target_modules=targets, lora_dropout=0.0, task_type="CAUSAL_LM"
    )
    try:
        return get_peft_model(model, settings)
    except ValueError as error:
        linear = {name.rpartition(".")[2] for name, module in model.named_modules() if isinstance(module, nn.Linear)}
        raise ValueError(
            f"lora.targets = {', '.join(lora.targets)}: must be all-linear or names of layers, which in this model are "
            f"{', '.join(sorted(linear))}: {_first_line(error)}"
        ) from error


def save_model(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, folder: Path) -> None:
    """An ordinary Hugging Face folder: the whole model, adapters merged into it."""
    if hasattr(model, "peft_config"):
        import copy

        model = copy.deepcopy(model).merge_and_unload()
    model.save_pretrained(folder, safe_serialization=True)
    tokenizer.save_pretrained(folder)


def _require_folder(path: str) -> None:
    """A name on the hub has one slash at most, inside."""
    if (path.startswith((".", os.sep, "~")) or path.count(os.sep) > 1) and not Path(path).is_dir():
        raise ValueError(f"model = {path!r}: there is no such folder")


def _first_line(error: Exception) -> str:
    return str(error).strip().split("\n")[0]
