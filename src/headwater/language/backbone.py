"""Runs a causal language model of `transformers` on what has to be computed, and on nothing else.

Completions that share a prompt share its keys and values: they are computed once, with their gradient. Completions are
batched by length, so that little is padding; logits are made of the tokens that are there.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor, nn
from torch.nn import functional
from transformers import PreTrainedModel
from transformers.cache_utils import Cache, DynamicCache, DynamicLayer
from transformers.modeling_layers import GradientCheckpointingLayer

_BLOCK = 16_384  # tokens that go through the network in one call, at most, if one sequence has no more


@dataclass(frozen=True)
class Prefill:
    """What U prompts leave behind.

    layers: keys and values of each layer, `[U, heads, P, d]`, of prompts padded on the right to P tokens.
    mask: bool `[U, P]`. lengths: int64 `[U]`. last: `[U, hidden]`, the state at each prompt's last token.
    """

    layers: list[tuple[Tensor, Tensor]]
    mask: Tensor
    lengths: Tensor
    last: Tensor


class Backbone:
    """A language model as functions of token numbers. It holds no state of its own.

    shares_prompts: whether a prompt's keys and values can be computed once for all its completions; not so where a
    layer forgets (sliding windows, recurrent states). Where activations are recomputed on the way back (gradient
    checkpointing), they are shared only where there is no way back.
    """

    def __init__(self, model: PreTrainedModel) -> None:
        self.model = model
        parameters = self._parameters = frozenset(inspect.signature(model.forward).parameters)
        self._cache_name = "cache" if "cache" in parameters else "past_key_values"
        cached = {"position_ids", self._cache_name} <= parameters
        layers = DynamicCache(config=model.config).layers if cached else []
        attends_to_all = all(type(layer) is DynamicLayer for layer in layers)
        self.shares_prompts = cached and attends_to_all
        self._head = self._separate_head()

    @property
    def device(self) -> torch.device:
        return self.model.device

    @property
    def context(self) -> int | None:
        """Most tokens of prompt and completion together, where the model says so."""
        return getattr(self.model.config.get_text_config(), "max_position_embeddings", None)

    def log_probs(
        self, prompts: Sequence[Tensor], prompt_of: Tensor, tokens: Tensor, lengths: Tensor, temperature: float
    ) -> tuple[Tensor, Tensor]:
        """log-probability of every token of T completions, end to end: float32 `[S]`; and the state at the last token
        of each prompt, `[U, hidden]`.

        prompts: U, of one token or more. prompt_of: `[T]`, each completion's prompt. tokens: `[S]`, lengths: `[T]`.
        """
        recomputes = torch.is_grad_enabled() and _recomputes(self.model)
        if self.shares_prompts and not recomputes:
            return self._log_probs_by_prefill(prompts, prompt_of, tokens, lengths, temperature)
        with _recomputing(self.model, recomputes):
            return self._log_probs_of_whole(prompts, prompt_of, tokens, lengths, temperature)

    def _log_probs_by_prefill(
        self, prompts: Sequence[Tensor], prompt_of: Tensor, tokens: Tensor, lengths: Tensor, temperature: float
    ) -> tuple[Tensor, Tensor]:
        prefill = self.prefill(prompts)
        starts = lengths.cumsum(0) - lengths
        at_start = self.logits(prefill.last)
        first = chosen_log_probs(at_start[prompt_of], tokens[starts], temperature)
        rows, values = [starts], [first]
        order = lengths.argsort(descending=True, stable=True)
        order = order[lengths[order] > 1]
        for block in _blocks(order, lengths - 1):
            size, steps = len(block), lengths[block] - 1
            longest = int(steps.max())
            offset = torch.arange(longest, device=tokens.device)
            valid = offset < steps[:, None]
            position = starts[block, None] + torch.where(valid, offset, 0)
            prompt = prompt_of[block]
            cache = DynamicCache()
            for index, (key, value) in enumerate(prefill.layers):
                cache.update(key[prompt], value[prompt], index)
            mask = torch.cat([prefill.mask[prompt], prefill.mask.new_ones(size, longest)], dim=1)
            hidden = self._hidden(tokens[position], mask, prefill.lengths[prompt, None] + offset, cache)
            target = (position + 1)[valid]
            rows.append(target)
            values.append(chosen_log_probs(self.logits(hidden[valid]), tokens[target], temperature))
        places = torch.cat(rows)
        return torch.zeros(len(tokens), device=tokens.device).index_copy(0, places, torch.cat(values)), prefill.last

    def _log_probs_of_whole(
        self, prompts: Sequence[Tensor], prompt_of: Tensor, tokens: Tensor, lengths: Tensor, temperature: float
    ) -> tuple[Tensor, Tensor]:
        before = torch.tensor([len(prompt) for prompt in prompts], device=tokens.device)
        starts, prompt_lengths = lengths.cumsum(0) - lengths, before[prompt_of]
        whole = prompt_lengths + lengths - 1  # the last token is predicted, not read
        last: list[Tensor | None] = [None] * len(prompts)
        rows, values = [], []
        for block in _blocks(whole.argsort(descending=True, stable=True), whole):
            read = [
                torch.cat([prompts[prompt], tokens[start : start + length - 1]])
                for prompt, start, length in zip(
                    prompt_of[block].tolist(), starts[block].tolist(), lengths[block].tolist(), strict=True
                )
            ]
            ids = nn.utils.rnn.pad_sequence(read, batch_first=True)
            offset = torch.arange(ids.shape[1], device=tokens.device)
            hidden = self._hidden(ids, offset < whole[block, None], offset.expand(len(block), -1), None)
            for row, prompt in enumerate(prompt_of[block].tolist()):
                last[prompt] = hidden[row, len(prompts[prompt]) - 1]
            is_target = (offset >= prompt_lengths[block, None] - 1) & (offset < whole[block, None])
            target = (starts[block, None] + offset - (prompt_lengths[block, None] - 1))[is_target]
            rows.append(target)
            values.append(chosen_log_probs(self.logits(hidden[is_target]), tokens[target], temperature))
        states = torch.stack([state for state in last if state is not None])
        return torch.zeros(len(tokens), device=tokens.device).index_copy(0, torch.cat(rows), torch.cat(values)), states

    def prefill(self, prompts: Sequence[Tensor]) -> Prefill:
        """Run prompts of one token or more."""
        lengths = torch.tensor([len(prompt) for prompt in prompts], device=self.device)
        ids = nn.utils.rnn.pad_sequence(list(prompts), batch_first=True)
        offset = torch.arange(ids.shape[1], device=self.device)
        mask = offset < lengths[:, None]
        cache = DynamicCache()
        hidden = self._hidden(ids, mask, offset.expand(len(prompts), -1), cache)
        last = hidden[torch.arange(len(prompts), device=self.device), lengths - 1]
        return Prefill([(layer.keys, layer.values) for layer in cache.layers], mask, lengths, last)

    @contextmanager
    def one_by_one(self) -> Iterator[None]:
        """For a while, queries are of one token each: on a CPU plain products are then faster than fused attention."""
        before = self.model.config._attn_implementation
        if self.device.type != "cpu" or before != "sdpa":
            yield
            return
        self.model.set_attn_implementation("eager")
        try:
            yield
        finally:
            self.model.set_attn_implementation(before)

    def step(self, tokens: Tensor, positions: Tensor, mask: Tensor, cache: Cache) -> Tensor:
        """Logits after one more token of each row: float32 `[B, vocabulary]`. mask: bool `[B, positions so far]`."""
        return self.logits(self._hidden(tokens[:, None], mask, positions[:, None], cache)[:, 0])

    def logits(self, hidden: Tensor) -> Tensor:
        """float32 `[N, vocabulary]`."""
        return (hidden if self._head is None else self._head(hidden)).float()

    def _hidden(self, ids: Tensor, mask: Tensor, positions: Tensor, cache: Cache | None) -> Tensor:
        """`[B, L, hidden]`; the logits themselves for a model whose head cannot be had by itself."""
        options: dict[str, object] = {"attention_mask": None if bool(mask.all()) else mask, "position_ids": positions}
        options |= {self._cache_name: cache, "use_cache": cache is not None}
        options = {name: value for name, value in options.items() if name in self._parameters}
        with torch.autocast(self.device.type, torch.bfloat16, enabled=self.device.type == "cuda"):
            if self._head is None:
                return self.model(ids, **options).logits
            return self.model.base_model(ids, **options).last_hidden_state

    def _separate_head(self) -> nn.Module | None:
        """The last layer, if it is a plain function of the last hidden state: not so where logits are scaled or capped
        after it."""
        head = self.model.get_output_embeddings()
        if head is None or self.model.base_model is self.model:
            return None
        training = self.model.training
        self.model.eval()
        with torch.no_grad():
            ids = torch.arange(min(8, self.model.config.get_text_config().vocab_size), device=self.device)[None]
            expected = self.model(ids).logits
            found = head(self.model.base_model(ids).last_hidden_state)
        self.model.train(training)
        return head if torch.equal(found, expected) else None


class RoomyLayer(DynamicLayer):  # type: ignore[misc]
    """A layer of a cache with room for `capacity` positions, so that a step writes one position and copies none."""

    def __init__(self, capacity: int) -> None:
        super().__init__()
        self.capacity = capacity
        self._rooms: tuple[Tensor, ...] | None = None

    def update(self, key_states: Tensor, value_states: Tensor, *_: object, **__: object) -> tuple[Tensor, Tensor]:
        if self._rooms is None:
            self.lazy_initialization(key_states, value_states)
            batch, heads, _length, size = key_states.shape
            self._rooms = (
                key_states.new_empty(batch, heads, self.capacity, size),
                value_states.new_empty(*value_states.shape[:2], self.capacity, value_states.shape[3]),
            )
        begin = self.get_seq_length()
        end = begin + key_states.shape[2]
        for room, states in zip(self._rooms, (key_states, value_states), strict=True):
            room[:, :, begin:end] = states
        self.keys, self.values = (room[:, :, :end] for room in self._rooms)
        return self.keys, self.values

    def keep(self, rows: Tensor) -> None:
        """Go on with these rows of the batch only."""
        assert self._rooms is not None
        end = self.get_seq_length()
        self._rooms = tuple(room[rows] for room in self._rooms)
        self.keys, self.values = (room[:, :, :end] for room in self._rooms)


def chosen_log_probs(logits: Tensor, tokens: Tensor, temperature: float) -> Tensor:
    """log softmax(logits / temperature) at `tokens` `[N]`: float32 `[N]`."""
    return -functional.cross_entropy(logits / temperature, tokens.long(), reduction="none")


def _recomputes(model: PreTrainedModel) -> bool:
    newer = hasattr(model, "is_activation_checkpointing")  # the other name is deprecated
    return bool(model.is_activation_checkpointing if newer else model.is_gradient_checkpointing)


@contextmanager
def _recomputing(model: PreTrainedModel, recomputes: bool) -> Iterator[None]:
    """Layers of `transformers` recompute only while they are in training, and some have dropout then: so they are put
    in training to be called, and out of it for what they compute, both times."""
    modules = model.modules() if recomputes else []
    layers = [module for module in modules if isinstance(module, GradientCheckpointingLayer)]
    before = [layer._gradient_checkpointing_func for layer in layers]
    for layer, checkpoint in zip(layers, before, strict=True):
        layer.training, layer._gradient_checkpointing_func = True, partial(_without_dropout, layer, checkpoint)
    try:
        yield
    finally:
        for layer, checkpoint in zip(layers, before, strict=True):
            layer.training, layer._gradient_checkpointing_func = False, checkpoint


def _without_dropout(
    layer: nn.Module, checkpoint: Callable[..., Tensor], forward: Callable[..., Tensor], *states: Tensor
) -> Tensor:
    def computed(*states: Tensor) -> Tensor:
        training, layer.training = layer.training, False
        try:
            return forward(*states)
        finally:
            layer.training = training

    return checkpoint(computed, *states)


def _blocks(order: Tensor, lengths: Tensor) -> list[Tensor]:
    """Cut rows that are sorted by falling length into blocks, each of few tokens and of little padding."""
    blocks, begin = [], 0
    sorted_lengths = lengths[order].tolist()
    for end in range(1, len(order) + 1):
        longest = sorted_lengths[begin]
        full = end < len(order) and (end - begin + 1) * longest > _BLOCK
        # shorter by a third than the first of its block, and enough of them to be worth a call of their own
        ragged = end < len(order) and end - begin >= 16 and sorted_lengths[end] * 3 < longest * 2
        if full or ragged or end == len(order):
            blocks.append(order[begin:end])
            begin = end
    return blocks
