"""Generation of completions: who writes the tokens that a language policy's trajectories are made of."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor
from transformers import GenerationConfig, PreTrainedTokenizerBase
from transformers.cache_utils import Cache

from headwater.language.backbone import Backbone, RoomyLayer, chosen_log_probs

_WORTH_DROPPING = 0.8  # share of rows still being written below which the others are dropped


@dataclass(frozen=True)
class Sampling:
    """How completions are drawn. There is no top-p and no top-k: trajectory balance needs every completion possible."""

    temperature: float = 1.0
    """All logits are divided by it, in drawing and in learning: the sampler is the model at this temperature."""
    max_new_tokens: int = 64
    """Tokens after which a completion is cut off. The cut is no choice of the model's and has no probability."""
    stop: tuple[str, ...] = ()
    """Texts that end a completion, besides the model's own end of sequence; no choice of the model's either."""

    def __post_init__(self) -> None:
        if not 0 < self.temperature < math.inf:
            raise ValueError(f"temperature = {self.temperature}: must be positive")
        if self.max_new_tokens < 1:
            raise ValueError(f"max_new_tokens = {self.max_new_tokens}: must be at least 1")
        if "" in self.stop:
            raise ValueError("stop: an empty text would end every completion at once")


@dataclass(frozen=True)
class Generated:
    """One completion.

    tokens: with the end of sequence, where the model ended by itself. log_probs: of each token under the distribution
    that it was drawn from. finished: not so where the length limit or a stop text ended it: a forced end.
    """

    tokens: list[int]
    log_probs: list[float]
    finished: bool


class Generator(Protocol):
    """Writes completions. It may be anywhere, with weights that it is given from time to time."""

    def generate(self, prompts: Sequence[Sequence[int]], sampling: Sampling, seed: int) -> list[Generated]:
        """One completion for each entry of `prompts`; equal prompts are simply repeated."""
        ...

    def load(self, weights: Mapping[str, Tensor], version: int) -> None:
        """Go on with these weights, of this version."""
        ...


class ModelGenerator:
    """Writes with a model of this process, whose weights are whatever they are at the time.

    Each distinct prompt is read once; finished completions leave the batch. Models whose layers do not keep everything
    write by `transformers`' own `generate`.
    """

    def __init__(self, backbone: Backbone, tokenizer: PreTrainedTokenizerBase) -> None:
        self.backbone, self.tokenizer = backbone, tokenizer
        ends = backbone.model.generation_config.eos_token_id
        ends = ends if isinstance(ends, list) else [ends]
        self.ends = sorted({end for end in [*ends, tokenizer.eos_token_id] if end is not None})

    def load(self, weights: Mapping[str, Tensor], version: int) -> None:
        """Nothing to do: the model is the one that learns."""

    @torch.no_grad()
    def generate(self, prompts: Sequence[Sequence[int]], sampling: Sampling, seed: int) -> list[Generated]:
        if not prompts:
            return []
        device = self.backbone.device
        generator = torch.Generator(device).manual_seed(seed)
        training = self.backbone.model.training
        self.backbone.model.eval()
        try:
            if not self.backbone.shares_prompts:
                return self._generate_by_library(prompts, sampling, seed)
            return self._generate(prompts, sampling, generator)
        finally:
            self.backbone.model.train(training)

    def _generate(
        self, prompts: Sequence[Sequence[int]], sampling: Sampling, generator: torch.Generator
    ) -> list[Generated]:
        device, count = self.backbone.device, len(prompts)
        distinct = {tuple(prompt): None for prompt in prompts}
        number = {prompt: index for index, prompt in enumerate(distinct)}
        prefill = self.backbone.prefill([torch.tensor(prompt, device=device) for prompt in distinct])
        prompt_of = torch.tensor([number[tuple(prompt)] for prompt in prompts], device=device)
        room = prefill.mask.shape[1] + sampling.max_new_tokens
        cache = Cache(layers=[RoomyLayer(room) for _ in prefill.layers])
        for index, (key, value) in enumerate(prefill.layers):
            cache.update(key[prompt_of], value[prompt_of], index)
        mask = torch.ones(count, room, dtype=torch.bool, device=device)
        mask[:, : prefill.mask.shape[1]] = prefill.mask[prompt_of]
        ends = torch.tensor(self.ends, device=device)
        tokens = torch.zeros(count, sampling.max_new_tokens, dtype=torch.int64, device=device)
        log_probs = torch.zeros(count, sampling.max_new_tokens, device=device)
        lengths = torch.full((count,), sampling.max_new_tokens, device=device)
        finished = torch.zeros(count, dtype=torch.bool, device=device)

        logits = self.backbone.logits(prefill.last)[prompt_of]
        rows = torch.arange(count, device=device)  # who is in the batch
        writing = torch.ones(count, dtype=torch.bool, device=device)  # who of them is not done
        positions, end = prefill.lengths[prompt_of], prefill.mask.shape[1]
        for step in range(sampling.max_new_tokens):
            drawn = _drawn(torch.softmax(logits / sampling.temperature, 1), generator)
            tokens[rows, step] = drawn
            log_probs[rows, step] = chosen_log_probs(logits, drawn, sampling.temperature)
            ended = torch.isin(drawn, ends) & writing
            stopped = self._stopped(tokens[rows, : step + 1], writing & ~ended, sampling.stop)
            finished[rows[ended]] = True
            lengths[rows[ended | stopped]] = step + 1
            writing = writing & ~(ended | stopped)
            left = int(writing.sum())
            if not left or step + 1 == sampling.max_new_tokens:
                break
            if left < _WORTH_DROPPING * len(rows):
                kept = writing.nonzero()[:, 0]
                for layer in cache.layers:
                    layer.keep(kept)
                rows, mask, positions, drawn = rows[kept], mask[kept], positions[kept], drawn[kept]
                writing = writing[kept]
            end += 1
            with self.backbone.one_by_one():
                logits = self.backbone.step(drawn, positions, mask[:, :end], cache)
            positions = positions + 1
        return _packed(tokens, log_probs, lengths, finished)

    def _stopped(self, tokens: Tensor, writing: Tensor, stop: tuple[str, ...]) -> Tensor:
        """Which rows' texts contain a stop text."""
        stopped = torch.zeros_like(writing)
        if stop:
            chosen = writing.nonzero()[:, 0]
            texts = self.tokenizer.batch_decode(tokens[chosen], skip_special_tokens=True)
            found = [any(one in text for one in stop) for text in texts]
            stopped[chosen] = torch.tensor(found, dtype=torch.bool, device=tokens.device)
        return stopped

    def _generate_by_library(self, prompts: Sequence[Sequence[int]], sampling: Sampling, seed: int) -> list[Generated]:
        """By `transformers`, whose draws come from torch's global generator, set for the time of the call."""
        device, longest = self.backbone.device, max(map(len, prompts))
        padding = self.tokenizer.pad_token_id if self.tokenizer.pad_token_id is not None else self.ends[0]
        ids = torch.full((len(prompts), longest), padding, device=device)
        mask = torch.zeros_like(ids)
        for row, prompt in enumerate(prompts):
            ids[row, longest - len(prompt) :] = torch.tensor(prompt, device=device)
            mask[row, longest - len(prompt) :] = 1
        devices = [device] if device.type == "cuda" else []
        settings = GenerationConfig(
            do_sample=True, temperature=sampling.temperature, top_p=1.0, top_k=0, eos_token_id=self.ends or None,
            pad_token_id=padding, max_new_tokens=sampling.max_new_tokens, return_dict_in_generate=True,
            output_scores=True,
        )  # fmt: skip
        model = self.backbone.model
        own, model.generation_config = model.generation_config, GenerationConfig()  # its penalties and cuts stay out
        try:
            with torch.random.fork_rng(devices):
                torch.manual_seed(seed)
                out = model.generate(ids, attention_mask=mask, generation_config=settings)
        finally:
            model.generation_config = own
        tokens = out.sequences[:, longest:]
        log_probs = torch.stack([
            chosen_log_probs(scores.float(), tokens[:, step], 1.0) for step, scores in enumerate(out.scores)
        ], 1)  # fmt: skip
        is_end = torch.isin(tokens, torch.tensor(self.ends, device=device))
        finished = is_end.any(1)
        lengths = torch.where(finished, is_end.int().argmax(1) + 1, tokens.shape[1])
        for step in range(tokens.shape[1] if sampling.stop else 0):
            open_still = (lengths > step + 1).nonzero()[:, 0]
            stopped = self._stopped(tokens[:, : step + 1], lengths > step + 1, sampling.stop)
            finished[open_still] &= ~stopped[open_still]
            lengths[stopped] = step + 1
        return _packed(tokens, log_probs, lengths, finished)


def _drawn(probabilities: Tensor, generator: torch.Generator) -> Tensor:
    """One column of each row `[B, V]` in proportion, by one uniform number a row."""
    cumulative = probabilities.cumsum(1, dtype=torch.float64)
    uniform = torch.rand(len(probabilities), 1, dtype=torch.float64, device=probabilities.device, generator=generator)
    found = torch.searchsorted(cumulative, uniform * cumulative[:, -1:], right=True)[:, 0]
    return found.clamp(max=probabilities.shape[1] - 1)


def _packed(tokens: Tensor, log_probs: Tensor, lengths: Tensor, finished: Tensor) -> list[Generated]:
    rows = zip(tokens.tolist(), log_probs.tolist(), lengths.tolist(), finished.tolist(), strict=True)
    return [Generated(row[:length], values[:length], done) for row, values, length, done in rows]
