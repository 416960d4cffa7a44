"""A small Llama and its tokenizer, trained from scratch on worked answers of word problems, and stopped at an accuracy.

It stands in for the supervised model from which post-training starts: it knows the form of an answer, solves some
questions, and has room to learn. How many steps that takes differs from seed to seed, so the stop is by accuracy on
held-out questions. Matrices are trained by Muon (Jordan et al. 2024, as `torch.optim.Muon` has it), all else by
AdamW.
"""

from __future__ import annotations

import random
import re
import sys
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import islice
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import pad_sequence
from tqdm import tqdm

from headwater.language.word_problems import PROMPT_TEMPLATE, WordProblem, generate_word_problems, write_gsm8k

try:
    from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, processors, trainers
    from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast
except ImportError as error:
    raise ImportError("language models need transformers: pip install 'headwater[language]'") from error

_BEGIN, _END, _PAD = "<s>", "</s>", "<pad>"
# A word with the space before it, one digit, one space character, or a run of other characters.
_PIECES = r" ?\p{L}+|\p{N}|\s|[^\s\p{L}\p{N}]+"
_ANSWER = re.compile(r"#### (\d+)\Z")
_STRETCH = 16  # batches that are cut from one sorted stretch of examples
_NO_LOSS = -100  # the label that `transformers` leaves out
_LONGEST_ANSWER = 40  # tokens; the longest worked answer has 31


class WarmStartError(RuntimeError):
    """The model did not reach the accuracy in the steps that it was given."""


@dataclass(frozen=True)
class WarmStart:
    """Data, size and training of the small model. The defaults make a Llama of 1.1 million parameters."""

    accuracy: float = 0.35
    """Share of held-out questions answered right by greedy decoding at which training stops."""
    train_questions: int = 8000
    test_questions: int = 500
    validation_questions: int = 400
    """Held-out questions by which training stops; they are not among those of test.jsonl."""
    in_order: float = 0.75
    """Probability that a step of a worked answer follows the story; with less, the model knows more solutions."""
    width: int = 128
    layers: int = 4
    heads: int = 4
    batch: int = 32
    learning_rate: float = 0.004
    warm_up: int = 50
    """Steps over which the learning rate rises; it is constant from then on, until accuracy stops the training."""
    evaluate_every: int = 50
    """Steps between evaluations; a third of them once half the accuracy is reached."""
    most_steps: int = 2000

    def __post_init__(self) -> None:
        if not 0 <= self.in_order <= 1:
            raise ValueError(f"in_order = {self.in_order}: must be from 0 to 1")
        for name in ("accuracy", "learning_rate"):
            if not 0 < (value := getattr(self, name)) < 1:
                raise ValueError(f"{name} = {value}: must be between 0 and 1")
        counts = ("train_questions", "test_questions", "validation_questions", "width", "layers", "heads", "batch")
        for name in (*counts, "warm_up", "evaluate_every", "most_steps"):
            if (value := getattr(self, name)) < 1:
                raise ValueError(f"{name} = {value}: must be at least 1")
        if self.width % (2 * self.heads):
            raise ValueError(f"width = {self.width}: must be a multiple of twice heads = {self.heads}")
        if self.train_questions < self.batch * _STRETCH:
            raise ValueError(f"train_questions = {self.train_questions}: must be at least {_STRETCH} * batch")


def make_word_problem_model(folder: Path, seed: int = 0, settings: WarmStart = WarmStart()) -> float:
    """Write a folder of `transformers` (config.json, model.safetensors, tokenizer), and train.jsonl and test.jsonl in
    GSM8K's format beside them. Returns the accuracy on the held-out questions.

    The same seed gives the same files on the same machine. Raises WarmStartError if `settings.most_steps` do not reach
    `settings.accuracy`.
    """
    counts = (settings.validation_questions, settings.test_questions, settings.train_questions)
    problems = generate_word_problems(sum(counts), seed)
    validation, test, train = problems[: counts[0]], problems[counts[0] : sum(counts[:2])], problems[sum(counts[:2]) :]
    generator = random.Random(seed)
    answers = [problem.solution(generator, settings.in_order) for problem in train]
    tokenizer = train_tokenizer([problem.question for problem in train] + answers)
    model = new_model(tokenizer, settings.width, settings.layers, settings.heads, seed)
    prompts = [PROMPT_TEMPLATE.format(question=problem.question) for problem in train]
    batches = length_sorted_batches(labelled(tokenizer, prompts, answers), settings.batch, generator)
    reached = _train_to_accuracy(model, tokenizer, batches, validation, settings)
    folder.mkdir(parents=True, exist_ok=True)
    write_gsm8k(folder / "train.jsonl", train, answers)
    write_gsm8k(folder / "test.jsonl", test, [problem.solution(generator, settings.in_order) for problem in test])
    tokenizer.save_pretrained(folder)
    model.save_pretrained(folder)
    return reached


def train_tokenizer(texts: Sequence[str], size: int = 512) -> PreTrainedTokenizerFast:
    """Byte-level byte-pair encoding of at most `size` tokens: any text can be written, and numbers are digits."""
    tokenizer = Tokenizer(models.BPE())
    byte_level = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    pieces = pre_tokenizers.Split(Regex(_PIECES), behavior="isolated")
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence([pieces, byte_level])
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=size,
        special_tokens=[_BEGIN, _END, _PAD],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    begin = tokenizer.token_to_id(_BEGIN)
    tokenizer.post_processor = processors.TemplateProcessing(single=f"{_BEGIN} $A", special_tokens=[(_BEGIN, begin)])
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        bos_token=_BEGIN,
        eos_token=_END,
        pad_token=_PAD,
        padding_side="left",
        clean_up_tokenization_spaces=False,
    )


def new_model(tokenizer: PreTrainedTokenizerFast, width: int, layers: int, heads: int, seed: int) -> LlamaForCausalLM:
    """A Llama with random weights, which depend on the seed only."""
    config = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=width,
        intermediate_size=4 * width,
        num_hidden_layers=layers,
        num_attention_heads=heads,
        max_position_embeddings=256,
        tie_word_embeddings=True,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return LlamaForCausalLM(config)


@torch.no_grad()
def greedy_accuracy(
    model: LlamaForCausalLM, tokenizer: PreTrainedTokenizerFast, problems: Sequence[WordProblem]
) -> float:
    """Share of problems whose greedy completion ends in `#### ` and the answer."""
    prompts = tokenizer([PROMPT_TEMPLATE.format(question=problem.question) for problem in problems]).input_ids
    order = sorted(range(len(problems)), key=lambda index: len(prompts[index]))
    right, was_training = 0, model.training
    model.train(False)
    for begin in range(0, len(order), 256):
        block = order[begin : begin + 256]
        padded = tokenizer.pad({"input_ids": [prompts[index] for index in block]}, return_tensors="pt")
        written = model.generate(**padded, max_new_tokens=_LONGEST_ANSWER, do_sample=False)
        texts = tokenizer.batch_decode(written[:, padded["input_ids"].shape[1] :], skip_special_tokens=True)
        for index, text in zip(block, texts, strict=True):
            found = _ANSWER.search(text)
            right += found is not None and int(found[1]) == problems[index].answer
    model.train(was_training)
    return right / len(problems)


def labelled(
    tokenizer: PreTrainedTokenizerFast, prompts: Sequence[str], answers: Sequence[str]
) -> list[tuple[Tensor, Tensor]]:
    """Tokens of each prompt and its answer, int64 `[L]`, and labels, which leave the prompt out."""
    before = tokenizer(list(prompts)).input_ids
    written = tokenizer(list(answers), add_special_tokens=False).input_ids
    examples = []
    for prompt, answer in zip(before, written, strict=True):
        answer = [*answer, tokenizer.eos_token_id]
        examples.append((torch.tensor(prompt + answer), torch.tensor([_NO_LOSS] * len(prompt) + answer)))
    return examples


def length_sorted_batches(
    examples: Sequence[tuple[Tensor, Tensor]], size: int, generator: random.Random
) -> Iterator[tuple[Tensor, Tensor]]:
    """Batches without end, of examples of about one length, so that little is padding. It is on the right, which a
    causal model does not look at from the left."""
    order = list(range(len(examples)))
    while True:
        generator.shuffle(order)
        for begin in range(0, len(order) - size * _STRETCH + 1, size * _STRETCH):
            stretch = sorted(order[begin : begin + size * _STRETCH], key=lambda index: len(examples[index][0]))
            batches = [stretch[start : start + size] for start in range(0, len(stretch), size)]
            generator.shuffle(batches)
            for batch in batches:
                tokens, labels = zip(*(examples[index] for index in batch), strict=True)
                yield (
                    pad_sequence(list(tokens), batch_first=True, padding_value=0),
                    pad_sequence(list(labels), batch_first=True, padding_value=_NO_LOSS),
                )


def fit(
    model: LlamaForCausalLM, batches: Iterable[tuple[Tensor, Tensor]], learning_rate: float, warm_up: int
) -> Iterator[None]:
    """Train on batches of tokens and labels `[B, L]`; comes back after every step: the caller says when it is enough.

    The learning rate rises over `warm_up` steps and is constant from then on.
    """
    optimizers = _optimizers(model, learning_rate)
    for step, (tokens, labels) in enumerate(batches, start=1):
        for optimizer in optimizers:
            for group in optimizer.param_groups:
                group["lr"] = learning_rate * min(1.0, step / warm_up)
        model(input_ids=tokens, labels=labels).loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        for optimizer in optimizers:
            optimizer.step()
            optimizer.zero_grad()
        yield


def _train_to_accuracy(
    model: LlamaForCausalLM,
    tokenizer: PreTrainedTokenizerFast,
    batches: Iterable[tuple[Tensor, Tensor]],
    validation: Sequence[WordProblem],
    settings: WarmStart,
) -> float:
    best, until_evaluation = 0.0, settings.evaluate_every
    steps = islice(fit(model, batches, settings.learning_rate, settings.warm_up), settings.most_steps)
    pause = 0.2 if sys.stderr.isatty() else 10
    with tqdm(steps, desc="warm start", unit="step", total=settings.most_steps, mininterval=pause) as bar:
        for _ in bar:
            until_evaluation -= 1
            if until_evaluation == 0:
                accuracy = greedy_accuracy(model, tokenizer, validation)
                if accuracy >= settings.accuracy:
                    return accuracy
                best = max(best, accuracy)
                bar.set_postfix(refresh=False, accuracy=f"{accuracy:.2f}")
                near = best >= settings.accuracy / 2
                until_evaluation = max(1, settings.evaluate_every // (3 if near else 1))
    raise WarmStartError(
        f"accuracy {best:.2f} after most_steps = {settings.most_steps}, below {settings.accuracy}: "
        "allow more steps, or another learning rate"
    )


def _optimizers(model: LlamaForCausalLM, learning_rate: float) -> list[torch.optim.Optimizer]:
    embeddings = {id(parameter) for parameter in model.get_input_embeddings().parameters()}
    hidden: list[nn.Parameter] = []
    others: list[nn.Parameter] = []
    for parameter in model.parameters():
        is_matrix = parameter.ndim == 2 and id(parameter) not in embeddings
        (hidden if is_matrix else others).append(parameter)
    return [
        torch.optim.Muon(hidden, lr=learning_rate, weight_decay=0.01, adjust_lr_fn="match_rms_adamw"),
        torch.optim.AdamW(others, lr=learning_rate, betas=(0.9, 0.98), weight_decay=0.01, fused=True),
    ]
