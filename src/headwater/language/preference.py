"""A reward model as a reward: any sequence classifier of `transformers`, as trained on pairs of completions of which a
person has preferred one (Ouyang et al. 2022, arXiv 2203.02155).
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, cast

import torch
from torch import Tensor
from torch.nn import functional

from headwater.environments.base import Objects
from headwater.language.data import Completion, Prompt
from headwater.language.failures import Judge
from headwater.reward_worker import RewardError

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase


class PreferenceReward(Judge):
    """What a reward model thinks of a completion: its one logit, or, of a classifier, the log-probability of `label`.

    prompts: what condition rows are indices of.
    path:    a Hugging Face folder with safetensors and a tokenizer, or a name on the hub. None of its code is run.
    label:   the label that counts, by name or index, of a model with several.
    longest: tokens of prompt and completion together; what is longer loses its beginning, and is counted in
        `truncated`. None for as many as the model takes.
    tokens:  tokens of a forward pass, those that fill up the shorter of its texts included.
    device:  where the model is; None for a GPU if there is one.

    Prompt and completion go through the tokenizer's chat template, as the user's and the assistant's turn, if it has
    one; otherwise they are one text. A call returns float32 `[T]`; a score that is not finite is NaN, counted in
    `failures` as "no number". Raises RewardError for a model that cannot be loaded, has no tokenizer, no head that
    scores, or several labels and none named.
    """

    def __init__(
        self,
        prompts: Sequence[Prompt],
        path: str | Path,
        label: str | None = None,
        longest: int | None = None,
        tokens: int = 16_384,
        device: torch.device | None = None,
    ) -> None:
        for name, value in (("longest", longest), ("tokens", tokens)):
            if value is not None and value < 1:
                raise ValueError(f"{name} is {value}, must be at least 1")
        self.truncated = 0
        super().__init__(prompts)
        self._tokens = tokens
        self._tokenizer = _load_tokenizer(str(path))
        self._model = _load_model(str(path))
        self._label = _label(self._model, label, str(path))
        self._device = device or torch.device("cuda" if torch.cuda.is_available() else "cpu")
        self._model = self._model.to(self._device).eval()
        config = self._model.config.get_text_config()
        self._pad: int | None = config.pad_token_id
        if self._pad is None and self._tokenizer.pad_token_id is not None:
            self._pad = config.pad_token_id = self._tokenizer.pad_token_id
        most = getattr(config, "max_position_embeddings", None) or self._tokenizer.model_max_length
        most = min(most, self._tokenizer.model_max_length)
        self._longest = min(longest or most, most)

    def __call__(self, objects: Objects, condition: Tensor) -> Tensor:
        completions, prompts = self._asked(objects, condition)
        texts = self._tokenized(prompts, completions) if completions else []
        scores = torch.empty(len(texts), dtype=torch.float32)
        for places in self._batches(texts):
            scores[places] = self._scores([texts[place] for place in places]).cpu()
        for place in (~scores.isfinite()).nonzero()[:, 0].tolist():
            self._count.add("no number", f"the score is {scores[place].item()}", prompts[place], completions[place])
            scores[place] = torch.nan
        self._count.end_batch(len(texts), int(scores.isnan().sum()))
        return scores.to(condition.device)

    def _tokenized(self, prompts: Sequence[Prompt], completions: Sequence[Completion]) -> list[list[int]]:
        """Token ids of each prompt with its completion, at most `longest`, the last ones."""
        tokenizer = self._tokenizer
        chat = bool(tokenizer.chat_template)
        if chat:
            texts = [
                str(tokenizer.apply_chat_template(_turns(prompt, completion), tokenize=False))
                for prompt, completion in zip(prompts, completions, strict=True)
            ]
        else:
            texts = [prompt.text + completion for prompt, completion in zip(prompts, completions, strict=True)]
        tokenizer.truncation_side = "left"  # the completion is what is judged
        whole = tokenizer(texts, add_special_tokens=not chat, verbose=False)["input_ids"]
        long = [place for place, ids in enumerate(whole) if len(ids) > self._longest]
        if long:
            self.truncated += len(long)
            cut = tokenizer(
                [texts[place] for place in long],
                add_special_tokens=not chat, truncation=True, max_length=self._longest,
            )["input_ids"]  # fmt: skip
            for place, ids in zip(long, cut, strict=True):
                whole[place] = ids
        for place, ids in enumerate(whole):
            if not ids:
                raise RewardError(f"the reward model's tokenizer makes nothing of {texts[place]!r}")
        return whole

    def _batches(self, texts: list[list[int]]) -> list[list[int]]:
        """Places of texts of about one length, as many as one forward pass takes. A model without a padding token reads
        texts one by one."""
        batches: list[list[int]] = []
        for place in sorted(range(len(texts)), key=lambda place: -len(texts[place])):
            first = batches[-1][0] if batches else place
            if batches and self._pad is not None and len(texts[first]) * (len(batches[-1]) + 1) <= self._tokens:
                batches[-1].append(place)
            else:
                batches.append([place])
        return batches

    @torch.inference_mode()
    def _scores(self, texts: list[list[int]]) -> Tensor:
        """Float32 `[T]` of T texts, the longest first."""
        width = len(texts[0])
        pad = self._pad or 0
        ids = torch.tensor([text + [pad] * (width - len(text)) for text in texts], device=self._device)
        lengths = torch.tensor([len(text) for text in texts], device=self._device)
        mask = (torch.arange(width, device=self._device) < lengths[:, None]).long()
        logits = self._model(input_ids=ids, attention_mask=mask).logits.float()
        if self._label is None:
            return logits[:, 0]
        several = self._model.config.problem_type == "multi_label_classification"
        log_probs = functional.logsigmoid(logits) if several else logits.log_softmax(1)
        return log_probs[:, self._label]


def _turns(prompt: Prompt, completion: str) -> list[dict[str, str]]:
    return [{"role": "user", "content": prompt.text}, {"role": "assistant", "content": str(completion)}]


def _load_tokenizer(path: str) -> PreTrainedTokenizerBase:
    try:
        from transformers import AutoTokenizer
    except ImportError as error:
        raise RewardError("the reward preference needs transformers: pip install 'headwater[language]'") from error
    if not path:
        raise RewardError("the reward preference needs reward_model: a folder, or a name on the hub")
    if os.sep in path and not Path(path).is_dir() and not path.count("/") == 1:
        raise RewardError(f"reward model {path!r}: there is no such folder")
    try:
        return AutoTokenizer.from_pretrained(path, trust_remote_code=False)
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise RewardError(f"reward model {path!r}: no tokenizer can be loaded from there: {_line(error)}") from error


def _load_model(path: str) -> PreTrainedModel:
    from transformers import AutoModelForSequenceClassification

    try:
        model, report = AutoModelForSequenceClassification.from_pretrained(
            path, trust_remote_code=False, use_safetensors=True, output_loading_info=True
        )
    except (OSError, ValueError, KeyError, RuntimeError) as error:
        raise RewardError(
            f"reward model {path!r}: cannot be loaded as a sequence classifier: {_line(error)}"
        ) from error
    missing = sorted(report["missing_keys"])
    if missing:  # transformers would fill them with random numbers, and say so in a warning
        raise RewardError(
            f"reward model {path!r}: has no weights for {', '.join(missing[:4])}; it must be a sequence classifier, "
            "not a language model without a head that scores"
        )
    return model


def _label(model: PreTrainedModel, label: str | None, path: str) -> int | None:
    """The index of the label that counts; None where there is one score."""
    names = cast("dict[int, str]", model.config.id2label)
    offered = ", ".join(names[index] for index in sorted(names))
    if model.config.num_labels == 1:
        if label is not None:
            raise RewardError(f"reward model {path!r}: it has one score, and no label {label!r}")
        return None
    if label is None:
        raise RewardError(
            f"reward model {path!r}: it has {model.config.num_labels} labels, name the one that counts: {offered}"
        )
    for index, name in names.items():
        if label in (name, str(index)):
            return index
    raise RewardError(f"reward model {path!r}: it has no label {label!r}; the labels are {offered}")


def _line(error: Exception) -> str:
    return str(error).strip().split("\n")[0]
