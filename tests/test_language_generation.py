"""Generation: reported log-probabilities, the law of what is drawn, and every way in which a completion ends."""

from __future__ import annotations

import itertools

import pytest
import torch
from torch import Tensor

from headwater.language import generation
from headwater.language.backbone import Backbone
from headwater.language.generation import Generated, ModelGenerator, Sampling
from language_helpers import END, MODELS, SIZE, build_model, build_tokenizer, plain_log_probs

PROMPTS = [[5], [6, 7, 8], [9, 10, 11, 12, 13]]


@pytest.fixture(autouse=True)
def _one_thread() -> None:
    torch.set_num_threads(1)


def writer(name: str = "llama", ends: list[int] | None = None) -> ModelGenerator:
    model = build_model(name)
    if ends is not None:
        model.generation_config.eos_token_id = ends
    return ModelGenerator(Backbone(model), build_tokenizer())


def recomputed(made: ModelGenerator, prompts: list[list[int]], written: list[Generated], temperature: float) -> Tensor:
    tokens = torch.tensor([token for one in written for token in one.tokens])
    lengths = torch.tensor([len(one.tokens) for one in written])
    rows = [torch.tensor(prompt) for prompt in prompts]
    return plain_log_probs(made.backbone.model, rows, torch.arange(len(rows)), tokens, lengths, temperature)


@pytest.mark.parametrize("name", MODELS)
def test_log_probs_are_those_of_the_plain_model_and_ends_are_told_from_cuts(name: str) -> None:
    made, prompts = writer(name, [END, 3]), PROMPTS * 20
    made.backbone.model.generation_config.repetition_penalty = 1.7  # settings of the model's own stay out
    made.backbone.model.generation_config.top_k = 3
    sampling = Sampling(temperature=0.8, max_new_tokens=10)
    written = made.generate(prompts, sampling, seed=3)
    told = torch.tensor([value for one in written for value in one.log_probs])
    torch.testing.assert_close(told, recomputed(made, prompts, written, 0.8), atol=2e-4, rtol=1e-4)
    assert {one.finished for one in written} == {True, False}
    for one in written:
        assert not set(one.tokens[:-1]) & {END, 3}
        assert one.finished == (one.tokens[-1] in (END, 3))
        assert one.finished or len(one.tokens) == 10
    assert {one.tokens[-1] for one in written if one.finished} == {END, 3}
    assert written == made.generate(prompts, sampling, seed=3)
    assert written != made.generate(prompts, sampling, seed=4)


def test_the_seed_alone_decides_and_torchs_own_generator_is_left_alone() -> None:
    for name in ("llama", "mistral"):
        made = writer(name)
        torch.manual_seed(0)
        expected = torch.rand(3)
        torch.manual_seed(0)
        made.generate(PROMPTS, Sampling(max_new_tokens=4), seed=1)
        assert torch.equal(torch.rand(3), expected)


@pytest.mark.parametrize("name", ["llama", "mistral"])
@pytest.mark.parametrize("worth_dropping", [0.0, 0.8, 1.0])
def test_short_completions_have_the_exact_distribution(
    name: str, worth_dropping: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(generation, "_WORTH_DROPPING", worth_dropping)
    ends = [number for number in range(SIZE) if number not in (4, 6, 9)]  # so that there are few completions
    made, draws = writer(name, ends), 3000
    written = made.generate([PROMPTS[1]] * draws + [PROMPTS[0]] * 300, Sampling(1.3, 2), seed=11)[:draws]
    space = [(end,) for end in ends] + list(itertools.product((4, 6, 9), range(SIZE)))
    listed = [Generated(list(tokens), [], True) for tokens in space]
    expected = recomputed(made, [PROMPTS[1]] * len(space), listed, 1.3)
    lengths = torch.tensor([len(tokens) for tokens in space])
    expected = torch.zeros(len(space)).index_add(0, torch.repeat_interleave(lengths), expected).exp()
    assert abs(float(expected.sum()) - 1) < 1e-4
    number = {tokens: row for row, tokens in enumerate(space)}
    counts = torch.bincount(torch.tensor([number[tuple(one.tokens)] for one in written]), minlength=len(space))
    common = expected * draws >= 5
    counts = torch.cat([counts[common], counts[~common].sum()[None]]).double()
    mean = draws * torch.cat([expected[common], expected[~common].sum()[None]]).double()
    statistic, freedom = float(((counts - mean).square() / mean).sum()), len(mean) - 1
    assert freedom > 15
    # the 99.9 % quantile of chi-square, by Wilson and Hilferty
    assert statistic < freedom * (1 - 2 / (9 * freedom) + 3.09 * (2 / (9 * freedom)) ** 0.5) ** 3


@pytest.mark.parametrize("name", ["llama", "mistral"])
def test_a_stop_text_ends_a_completion_by_force(name: str) -> None:
    made = writer(name)
    free = made.generate(PROMPTS * 20, Sampling(max_new_tokens=10), seed=0)
    common = 4
    stopped = made.generate(PROMPTS * 20, Sampling(max_new_tokens=10, stop=(f"w{common}",)), seed=0)
    assert any(common in one.tokens for one in free)
    cut = [one for one in stopped if common in one.tokens]
    assert cut
    for one in cut:
        first = next(place for place, token in enumerate(one.tokens) if f"w{token}".startswith(f"w{common}"))
        assert len(one.tokens) == first + 1
        assert not one.finished


def test_there_may_be_one_token_and_no_prompt_at_all() -> None:
    made = writer()
    assert made.generate([], Sampling(), seed=0) == []
    written = made.generate(PROMPTS * 30, Sampling(max_new_tokens=1), seed=0)
    assert {len(one.tokens) for one in written} == {1}
    assert all(one.finished == (one.tokens == [END]) for one in written)


@pytest.mark.parametrize(
    ("settings", "named"),
    [
        ({"temperature": 0.0}, "temperature = 0.0"),
        ({"max_new_tokens": 0}, "max_new_tokens = 0"),
        ({"stop": ("",)}, "stop"),
    ],
)
def test_settings_that_make_no_sense_are_refused(settings: dict[str, object], named: str) -> None:
    with pytest.raises(ValueError, match=named):
        Sampling(**settings)  # type: ignore[arg-type]
