"""Small language models of many architectures, made with the real classes, and log-probabilities without any trick."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from torch import Tensor
from transformers import (
    FalconMambaConfig,
    FalconMambaForCausalLM,
    Gemma2Config,
    Gemma2ForCausalLM,
    Gemma3ForCausalLM,
    Gemma3TextConfig,
    GPT2Config,
    GPT2LMHeadModel,
    GPTNeoXConfig,
    GPTNeoXForCausalLM,
    LlamaConfig,
    LlamaForCausalLM,
    Mamba2Config,
    Mamba2ForCausalLM,
    MambaConfig,
    MambaForCausalLM,
    MistralConfig,
    MistralForCausalLM,
    OPTConfig,
    OPTForCausalLM,
    PhiConfig,
    PhiForCausalLM,
    PreTrainedModel,
    PreTrainedTokenizerFast,
    Qwen2Config,
    Qwen2ForCausalLM,
    Qwen3Config,
    Qwen3ForCausalLM,
)

from headwater.language.generation import Sampling
from headwater.language.policy import LanguagePolicy

SIZE, END = 24, 2
_COMMON = {"vocab_size": SIZE, "eos_token_id": END, "bos_token_id": 0, "pad_token_id": 1}
_SHAPE = {
    **_COMMON, "hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4,
    "max_position_embeddings": 64, "initializer_range": 0.3,
}  # fmt: skip
_GROUPED = {**_SHAPE, "num_key_value_heads": 2}

MODELS: dict[str, Callable[[], PreTrainedModel]] = {
    "llama": lambda: LlamaForCausalLM(LlamaConfig(**_GROUPED)),
    "qwen2": lambda: Qwen2ForCausalLM(Qwen2Config(**_GROUPED)),
    "qwen3": lambda: Qwen3ForCausalLM(Qwen3Config(**_GROUPED, head_dim=8, tie_word_embeddings=True)),
    "gpt2": lambda: GPT2LMHeadModel(
        GPT2Config(**_COMMON, n_embd=16, n_layer=2, n_head=4, n_positions=64, initializer_range=0.3)
    ),
    "gpt-neox": lambda: GPTNeoXForCausalLM(GPTNeoXConfig(**_SHAPE)),
    "opt": lambda: OPTForCausalLM(
        OPTConfig(**_COMMON, hidden_size=16, ffn_dim=32, num_hidden_layers=2, num_attention_heads=4, init_std=0.3,
                  word_embed_proj_dim=16, max_position_embeddings=64)
    ),
    "phi": lambda: PhiForCausalLM(PhiConfig(**_SHAPE)),
    "mistral": lambda: MistralForCausalLM(MistralConfig(**_GROUPED, sliding_window=4)),
    "gemma2": lambda: Gemma2ForCausalLM(
        Gemma2Config(**_GROUPED, head_dim=8, sliding_window=4, final_logit_softcapping=5.0)
    ),
    "gemma3": lambda: Gemma3ForCausalLM(Gemma3TextConfig(**_GROUPED, head_dim=8, sliding_window=4)),
    "mamba": lambda: MambaForCausalLM(
        MambaConfig(**_COMMON, hidden_size=16, state_size=4, num_hidden_layers=2, initializer_range=0.3)
    ),
    "falcon-mamba": lambda: FalconMambaForCausalLM(
        FalconMambaConfig(**_COMMON, hidden_size=16, state_size=4, num_hidden_layers=2, initializer_range=0.3)
    ),
    "mamba2": lambda: Mamba2ForCausalLM(
        Mamba2Config(**_COMMON, hidden_size=16, state_size=4, num_hidden_layers=2, num_heads=4, head_dim=8, n_groups=1,
                     chunk_size=4, initializer_range=0.3)
    ),
}  # fmt: skip


def build_model(name: str = "llama", seed: int = 0) -> PreTrainedModel:
    """A model of random weights, large enough that nothing that it says is uniform."""
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        return MODELS[name]().eval()


def build_tokenizer(size: int = SIZE) -> PreTrainedTokenizerFast:
    """Words w0, w1, ... by number; w2 ends a sequence and w1 pads."""
    words = {f"w{number}": number for number in range(size)}
    tokenizer = Tokenizer(WordLevel(words, unk_token="w0"))
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token=f"w{END}", pad_token="w1")


def build_policy(
    model: PreTrainedModel | None = None,
    prompts: Sequence[Sequence[int]] = ((5,), (6, 7, 8)),
    sampling: Sampling = Sampling(max_new_tokens=8),  # noqa: B008 (frozen)
    reset_every: int = 0,
    learns_log_z: bool = False,
) -> LanguagePolicy:
    model = build_model() if model is None else model
    return LanguagePolicy(model, build_tokenizer(), prompts, sampling, reset_every, learns_log_z)


def with_adapters(model: PreTrainedModel, seed: int | None = None) -> PreTrainedModel:
    """With low-rank adapters; random ones under a seed, else those that change nothing yet."""
    from headwater.language.loading import Lora, _with_adapters

    with torch.random.fork_rng():
        torch.manual_seed(0 if seed is None else seed)
        adapted = _with_adapters(model, Lora(rank=4))
        if seed is not None:
            for name, parameter in adapted.named_parameters():
                if "lora_B" in name:
                    torch.nn.init.normal_(parameter, std=0.3)
    return adapted


def plain_log_probs(
    model: PreTrainedModel, prompts: Sequence[Tensor], prompt_of: Tensor, tokens: Tensor, lengths: Tensor,
    temperature: float,
) -> Tensor:  # fmt: skip
    """Of every token `[S]`: each completion by itself, the whole of it read by the model as it is."""
    found = []
    for prompt, completion in zip(prompt_of.tolist(), torch.split(tokens, lengths.tolist()), strict=True):
        whole = torch.cat([prompts[prompt], completion])
        logits = model(whole[None]).logits[0, len(prompts[prompt]) - 1 : -1].float() / temperature
        found.append(logits.log_softmax(-1).gather(1, completion[:, None])[:, 0])
    return torch.cat(found)
