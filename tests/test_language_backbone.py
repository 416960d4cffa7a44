"""Log-probabilities of completions and their gradients, of many architectures, against the plain forward of each."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor
from transformers import PreTrainedModel

from headwater.language.backbone import Backbone, _blocks
from helpers import seeded
from language_helpers import MODELS, SIZE, build_model, plain_log_probs

KEEP_ALL = {"llama", "qwen2", "qwen3", "gpt2", "gpt-neox", "opt", "phi"}
"""Whose every layer keeps all keys and values, and takes positions."""
HEADS_APART = set(MODELS) - {"gemma2"}
"""Whose logits are a plain function of the last state; Gemma 2 caps them."""

Batch = tuple[list[Tensor], Tensor, Tensor, Tensor]


@pytest.fixture(autouse=True)
def _one_thread() -> None:
    torch.set_num_threads(1)


def batch_of(count: int = 24, longest: int = 12) -> Batch:
    """Prompts of different lengths, one of a single token, and two that are equal; completions from one token on."""
    generator = seeded(1)
    prompts = [torch.randint(3, SIZE, (length,), generator=generator) for length in (1, 5, 9)]
    prompts.append(prompts[1].clone())
    prompt_of = torch.randint(len(prompts), (count,), generator=generator)
    lengths = torch.randint(1, longest + 1, (count,), generator=generator)
    lengths[0] = 1
    prompt_of[: len(prompts)] = torch.arange(len(prompts))[:count]
    return prompts, prompt_of, torch.randint(SIZE, (int(lengths.sum()),), generator=generator), lengths


def gradients(model: PreTrainedModel, loss: Tensor) -> list[Tensor]:
    found = torch.autograd.grad(loss, list(model.parameters()), allow_unused=True)
    return [torch.zeros(()) if gradient is None else gradient for gradient in found]


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize("temperature", [1.0, 0.6])
def test_log_probs_and_gradients_are_those_of_the_plain_model(name: str, temperature: float) -> None:
    model, (prompts, prompt_of, tokens, lengths) = build_model(name), batch_of()
    backbone = Backbone(model)
    assert backbone.shares_prompts == (name in KEEP_ALL)
    assert (backbone._head is not None) == (name in HEADS_APART)
    if name != "gemma2":  # whose masks overflow in float64
        model.double()
    weight = torch.randn(len(tokens), generator=seeded(2))
    expected = plain_log_probs(model, prompts, prompt_of, tokens, lengths, temperature)
    assert expected.std() > 0.3
    truth = gradients(model, (expected * weight).sum())
    states = None
    for shares in {backbone.shares_prompts, False}:
        backbone.shares_prompts = shares
        found, last = backbone.log_probs(prompts, prompt_of, tokens, lengths, temperature)
        torch.testing.assert_close(found, expected, atol=1e-5, rtol=1e-5)
        for ours, theirs in zip(gradients(model, (found * weight).sum()), truth, strict=True):
            torch.testing.assert_close(ours, theirs, atol=2e-4, rtol=1e-4)
        assert states is None or torch.allclose(states, last, atol=1e-5)
        states = last


@pytest.mark.parametrize("name", ["llama", "mistral"])
def test_a_single_completion_of_a_single_token_has_its_log_prob(name: str) -> None:
    model, prompt, token = build_model(name), torch.tensor([7]), torch.tensor([9])
    zero, one = torch.tensor([0]), torch.tensor([1])
    found, last = Backbone(model).log_probs([prompt], zero, token, one, 1.0)
    torch.testing.assert_close(found[0], model(prompt[None]).logits[0, 0].log_softmax(0)[9])
    assert last.shape == (1, 16)


@pytest.mark.parametrize("name", ["llama", "gpt2", "gemma3"])
def test_weights_in_bfloat16_give_float32_log_probs_close_to_the_plain_model(name: str) -> None:
    model, (prompts, prompt_of, tokens, lengths) = build_model(name).bfloat16(), batch_of()
    found, _ = Backbone(model).log_probs(prompts, prompt_of, tokens, lengths, 1.0)
    expected = plain_log_probs(model, prompts, prompt_of, tokens, lengths, 1.0)
    assert found.dtype == torch.float32
    assert (found - expected).abs().mean() < 0.03


@pytest.mark.parametrize("name", ["llama", "mistral", "mamba"])
def test_a_completions_log_prob_does_not_depend_on_what_else_is_in_the_batch(name: str) -> None:
    model, (prompts, prompt_of, tokens, lengths) = build_model(name).double(), batch_of()
    backbone = Backbone(model)
    together = torch.split(backbone.log_probs(prompts, prompt_of, tokens, lengths, 1.0)[0], lengths.tolist())
    for row, completion in enumerate(torch.split(tokens, lengths.tolist())):
        prompt = [prompts[int(prompt_of[row])]]
        alone, _ = backbone.log_probs(prompt, torch.tensor([0]), completion, lengths[row : row + 1], 1.0)
        torch.testing.assert_close(alone, together[row], atol=1e-6, rtol=1e-6)


@pytest.mark.parametrize("name", ["llama", "opt", "gpt2"])
def test_activations_that_are_computed_again_give_the_same_gradient_and_are_not_kept(name: str) -> None:
    prompts, prompt_of, tokens, lengths = batch_of()
    found, kept = [], []
    for recomputes in (False, True):
        model = build_model(name).double()
        if recomputes:
            model.gradient_checkpointing_enable({"use_reentrant": False})
        backbone = Backbone(model)
        backbone.shares_prompts = False
        sizes: list[int] = []

        def pack(tensor: Tensor, sizes: list[int] = sizes) -> Tensor:
            sizes.append(tensor.numel())
            return tensor

        with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
            log_probs, _ = backbone.log_probs(prompts, prompt_of, tokens, lengths, 1.0)
        kept.append(sum(sizes))
        found.append(gradients(model, log_probs.sum()))
        assert not any(module.training for module in model.modules())
    for ours, theirs in zip(*found, strict=True):
        torch.testing.assert_close(ours, theirs)
    assert kept[1] < kept[0] / 2


def test_prompts_are_shared_again_once_activations_are_kept() -> None:
    model, (prompts, prompt_of, tokens, lengths) = build_model(), batch_of()
    model.gradient_checkpointing_enable({"use_reentrant": False})
    expected, _ = Backbone(model).log_probs(prompts, prompt_of, tokens, lengths, 1.0)
    model.gradient_checkpointing_disable()
    found, _ = Backbone(model).log_probs(prompts, prompt_of, tokens, lengths, 1.0)
    torch.testing.assert_close(found, expected, atol=1e-5, rtol=1e-5)


def test_blocks_hold_every_row_once_with_little_padding() -> None:
    lengths = torch.cat(
        [torch.full((40,), 3), torch.randint(1, 400, (200,), generator=seeded(0)), torch.tensor([20_000])]
    )
    blocks = _blocks(lengths.argsort(descending=True), lengths)
    assert torch.cat(blocks).sort().values.tolist() == list(range(len(lengths)))
    padded = sum(len(block) * int(lengths[block].max()) for block in blocks)
    assert padded < 1.4 * int(lengths.sum())
    assert all(len(block) * int(lengths[block].max()) <= 16_384 for block in blocks[1:])
    assert blocks[0].tolist() == [240]  # longer than a block may be, so by itself
