"""Reward models: the score is the model's own, whatever it is batched with; a model that cannot score is refused."""

from __future__ import annotations

import math
from pathlib import Path

import pytest
import torch
from tokenizers import Tokenizer, models, pre_tokenizers, processors, trainers
from torch import Tensor
from transformers import (
    BertConfig,
    BertForSequenceClassification,
    LlamaConfig,
    LlamaForCausalLM,
    LlamaForSequenceClassification,
    PreTrainedModel,
    PreTrainedTokenizerFast,
)

from headwater.language.data import Completion, Prompt
from headwater.language.preference import PreferenceReward
from headwater.language.reward import build_reward, chosen_completions, win_rate
from headwater.reward import RewardError

PROMPTS = [
    Prompt("tell me of the sea ", None, {"prompt": "tell me of the sea ", "chosen": "it is wide and blue"}),
    Prompt("why ", None, {"prompt": "why ", "chosen": "so"}),
]
TEXTS = ["it is wide", "because of the moon and of the sun", "so", "", "blue blue blue"]
ROWS = torch.tensor([0, 1, 1, 0, 1], dtype=torch.float32)[:, None]
TEMPLATE = "{% for m in messages %}<{{ m['role'] }}>{{ m['content'] }}{% endfor %}"


def tokenizer(**settings: str) -> PreTrainedTokenizerFast:
    """A byte-level tokenizer with a first token, trained here."""
    made = Tokenizer(models.BPE())
    made.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    special = ["<s>", "</s>", "<pad>"]
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    made.train_from_iterator(
        [prompt.text for prompt in PROMPTS] + TEXTS, trainers.BpeTrainer(vocab_size=300, special_tokens=special,
        initial_alphabet=alphabet, show_progress=False),
    )  # fmt: skip
    made.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 0)])
    return PreTrainedTokenizerFast(tokenizer_object=made, bos_token="<s>", eos_token="</s>", **settings)


def llama(labels: int = 1, **settings: object) -> LlamaForSequenceClassification:
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=300, hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=2,
        max_position_embeddings=64, num_labels=labels, initializer_range=0.5, **settings,
    )  # fmt: skip
    return LlamaForSequenceClassification(config).eval()


def saved(folder: Path, model: PreTrainedModel, words: PreTrainedTokenizerFast | None = None) -> Path:
    model.save_pretrained(folder)
    if words is not None:
        words.save_pretrained(folder)
    return folder


def completions() -> list[Completion]:
    return [Completion(text) for text in TEXTS]


def one_by_one(model: PreTrainedModel, ids: list[list[int]]) -> Tensor:
    with torch.no_grad():
        return torch.cat([model(input_ids=torch.tensor([each])).logits for each in ids])


def joined() -> list[str]:
    return [PROMPTS[int(row)].text + text for row, text in zip(ROWS[:, 0].tolist(), TEXTS, strict=True)]


@pytest.mark.parametrize("pad", ["tokenizer", "model", "none"])
@pytest.mark.parametrize("tokens", [16_384, 40, 1])
def test_the_score_is_the_models_logit_however_texts_are_batched(tmp_path: Path, pad: str, tokens: int) -> None:
    words = tokenizer(**({"pad_token": "<pad>"} if pad == "tokenizer" else {}))
    model = llama(**({"pad_token_id": 2} if pad == "model" else {}))
    reward = PreferenceReward(PROMPTS, saved(tmp_path, model, words), tokens=tokens, device=torch.device("cpu"))
    found = reward(completions(), ROWS)
    expected = one_by_one(model, [words(text)["input_ids"] for text in joined()])[:, 0]
    assert found.dtype == torch.float32
    assert not found.requires_grad
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)
    assert expected.std() > 0.1
    assert reward.truncated == 0


def test_a_chat_template_makes_turns_of_prompt_and_completion(tmp_path: Path) -> None:
    words, model = tokenizer(pad_token="<pad>"), llama()
    words.chat_template = TEMPLATE
    reward = build_reward("preference", PROMPTS, str(saved(tmp_path, model, words)))
    chats = [
        f"<user>{PROMPTS[int(row)].text}<assistant>{text}" for row, text in zip(ROWS[:, 0].tolist(), TEXTS, strict=True)
    ]
    expected = one_by_one(model, [words(chat, add_special_tokens=False)["input_ids"] for chat in chats])[:, 0]
    torch.testing.assert_close(reward(completions(), ROWS).cpu(), expected, rtol=1e-4, atol=1e-5)


def test_what_is_too_long_loses_its_beginning_and_is_counted(tmp_path: Path) -> None:
    words, model = tokenizer(pad_token="<pad>"), llama()
    reward = PreferenceReward(PROMPTS, saved(tmp_path, model, words), device=torch.device("cpu"))
    long = Completion("the moon and the sun " * 40)
    found = reward([long, Completion("so")], torch.ones(2, 1))
    ids = words("why " + long, add_special_tokens=False)["input_ids"]
    expected = one_by_one(model, [[0, *ids[-63:]], words("why so")["input_ids"]])[:, 0]
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)
    assert reward.truncated == 1


@pytest.mark.parametrize("problem", [None, "multi_label_classification"])
def test_a_classifier_gives_the_log_probability_of_the_label_that_is_named(tmp_path: Path, problem: str | None) -> None:
    words, model = (
        tokenizer(pad_token="<pad>"),
        llama(3, id2label={0: "bad", 1: "good", 2: "odd"}, problem_type=problem),
    )
    folder = saved(tmp_path, model, words)
    with pytest.raises(RewardError, match="it has 3 labels, name the one that counts: bad, good, odd"):
        PreferenceReward(PROMPTS, folder)
    with pytest.raises(RewardError, match="it has no label 'best'; the labels are bad, good, odd"):
        PreferenceReward(PROMPTS, folder, "best")
    logits = one_by_one(model, [words(text)["input_ids"] for text in joined()])
    expected = (logits.log_softmax(1) if problem is None else torch.nn.functional.logsigmoid(logits))[:, 1]
    for label in ("good", "1"):
        found = PreferenceReward(PROMPTS, folder, label, device=torch.device("cpu"))(completions(), ROWS)
        torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)


def test_an_encoder_is_a_reward_model_too(tmp_path: Path) -> None:
    words = tokenizer(pad_token="<pad>")
    torch.manual_seed(0)
    config = BertConfig(
        vocab_size=300, hidden_size=32, intermediate_size=64, num_hidden_layers=1, num_attention_heads=2, num_labels=1,
        max_position_embeddings=64, pad_token_id=2, initializer_range=0.5,
    )  # fmt: skip
    model = BertForSequenceClassification(config).eval()
    reward = PreferenceReward(PROMPTS, saved(tmp_path, model, words), device=torch.device("cpu"))
    expected = one_by_one(model, [words(text)["input_ids"] for text in joined()])[:, 0]
    torch.testing.assert_close(reward(completions(), ROWS), expected, rtol=1e-4, atol=1e-5)


def test_a_score_that_is_not_finite_is_nan_and_one_that_always_is_ends_the_run(tmp_path: Path) -> None:
    words, model = tokenizer(pad_token="<pad>"), llama()
    with torch.no_grad():
        model.model.embed_tokens.weight[words("so", add_special_tokens=False)["input_ids"][-1]] = math.nan
    reward = PreferenceReward(PROMPTS, saved(tmp_path, model, words), device=torch.device("cpu"))
    found = reward([Completion("so"), Completion("blue")], torch.ones(2, 1))
    assert found.isnan().tolist() == [True, False]
    assert reward.failures == {"no number": 1}
    for _ in range(2):
        reward([Completion("so")] * 20, torch.ones(20, 1))
    with pytest.raises(RewardError, match="failed on each of the last 60 completions"):
        reward([Completion("so")] * 20, torch.ones(20, 1))


def test_an_infinite_score_is_nan(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    reward = PreferenceReward(PROMPTS, saved(tmp_path, llama(), tokenizer(pad_token="<pad>")))
    monkeypatch.setattr(reward, "_scores", lambda texts: torch.tensor([torch.inf, -torch.inf, 1.0]))
    assert reward([Completion("so")] * 3, torch.ones(3, 1)).isnan().tolist() == [True, True, False]
    assert reward.failures == {"no number": 2}


def test_a_folder_that_is_no_reward_model_is_refused(tmp_path: Path) -> None:
    words = tokenizer(pad_token="<pad>")
    language_model = LlamaForCausalLM(llama().config)
    with pytest.raises(RewardError, match=r"has no weights for score.weight; it must be a sequence classifier"):
        PreferenceReward(PROMPTS, saved(tmp_path / "language", language_model, words))
    with pytest.raises(RewardError, match="no tokenizer can be loaded"):
        PreferenceReward(PROMPTS, saved(tmp_path / "mute", llama()))
    with pytest.raises(RewardError, match="there is no such folder"):
        PreferenceReward(PROMPTS, tmp_path / "nowhere")
    pickled = saved(tmp_path / "pickled", llama(), words)
    weights = pickled / "model.safetensors"
    torch.save(llama().state_dict(), pickled / "pytorch_model.bin")
    weights.unlink()
    with pytest.raises(RewardError, match="cannot be loaded as a sequence classifier"):
        PreferenceReward(PROMPTS, pickled)
    with pytest.raises(RewardError, match="one score, and no label 'good'"):
        PreferenceReward(PROMPTS, saved(tmp_path / "one", llama(), words), "good")


def test_a_chosen_completion_ties_with_itself(tmp_path: Path) -> None:
    reward = PreferenceReward(PROMPTS, saved(tmp_path, llama(), tokenizer(pad_token="<pad>")))
    baseline = chosen_completions(PROMPTS, ROWS)
    assert win_rate(reward, baseline, ROWS, baseline) == 0.5
    assert win_rate(reward, completions(), ROWS, baseline) + win_rate(reward, baseline, ROWS, completions()) == 1
