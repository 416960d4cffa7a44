"""Word problems and their solutions, the palindrome task, and the small models that are trained on them."""

from __future__ import annotations

import json
import random
from dataclasses import replace
from itertools import product
from pathlib import Path

import pytest
import torch

from headwater.language.word_problems import (
    LARGEST_NUMBER,
    MOST_STEPS,
    PROMPT_TEMPLATE,
    Term,
    WordProblem,
    generate_word_problems,
    is_sound,
)

pytest.importorskip("transformers")

from transformers import AutoModelForCausalLM, AutoTokenizer

import palindromes
from headwater.language import warm_start
from headwater.language.warm_start import WarmStart, WarmStartError, make_word_problem_model

TINY = WarmStart(
    accuracy=0.005,
    train_questions=600,
    test_questions=20,
    validation_questions=60,
    width=32,
    layers=2,
    heads=2,
    batch=16,
    learning_rate=0.01,
    warm_up=10,
    evaluate_every=10,
    most_steps=200,
)


@pytest.fixture(scope="module", autouse=True)
def one_thread():
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def by_expressions(terms: tuple[Term, ...]) -> int:
    """How many sequences of steps there are, counted from another definition: signed values in a bag, merged two at a
    time, with a step recorded as (operator, left, right)."""
    found = set()

    def go_on(bag: list[tuple[int, int]], steps: tuple[str, ...]) -> None:
        # an entry is (value, other factor or 0)
        if len(bag) == 1 and bag[0][1] == 0:
            found.add(steps)
        for i, (value, factor) in enumerate(bag):
            rest = bag[:i] + bag[i + 1 :]
            if factor:
                for a, b in ((abs(value), factor), (factor, abs(value))):
                    go_on([*rest, (value * factor, 0)], (*steps, f"{a}*{b}"))
                continue
            for j, (other, other_factor) in enumerate(rest):
                if other_factor:
                    continue
                left = rest[:j] + rest[j + 1 :]
                if (value >= 0) == (other >= 0):  # what is left of nothing counts as a gain
                    go_on([*left, (value + other, 0)], (*steps, f"{abs(value)}+{abs(other)}"))
                elif value > 0 and value + other >= 0:
                    go_on([*left, (value + other, 0)], (*steps, f"{value}-{-other}"))

    bag = [(t.sign * t.factors[0], t.factors[1] if len(t.factors) == 2 else 0) for t in terms]
    go_on(bag, ())
    return len(found)


def test_every_solution_is_sound_and_they_are_as_many_as_counted_another_way():
    for problem in generate_word_problems(300, seed=1):
        solutions = problem.solutions()
        assert len(solutions) == by_expressions(problem.terms)
        for solution in solutions:
            assert is_sound(solution)
            assert solution.endswith(f"#### {problem.answer}")
            assert solution.count("=") == problem.steps


def test_solutions_of_a_known_problem_are_all_four():
    problem = WordProblem("", (Term(+1, (3,)), Term(+1, (4, 2))))
    assert problem.solutions() == [f"{a}\n{b}\n#### 11" for a in ("2*4=8", "4*2=8") for b in ("3+8=11", "8+3=11")]


def test_an_amount_is_never_below_zero_on_the_way():
    problem = WordProblem("", (Term(+1, (3,)), Term(-1, (5,)), Term(+1, (4,))))
    assert problem.solutions() == ["3+4=7\n7-5=2\n#### 2", "4+3=7\n7-5=2\n#### 2"]


def test_drawn_solutions_follow_the_story_or_take_any_order():
    generator = random.Random(0)
    for problem in generate_word_problems(50, seed=2):
        assert len({problem.solution(generator, in_order=1.0) for _ in range(5)}) == 1
        drawn = {problem.solution(generator, in_order=0.0) for _ in range(1000)}
        assert drawn <= set(problem.solutions())
        assert len(drawn) > 0.8 * len(problem.solutions())
    story = WordProblem("", (Term(+1, (35,)), Term(+1, (3, 4)), Term(-1, (10,))))
    assert story.solution(generator, in_order=1.0) == "3*4=12\n35+12=47\n47-10=37\n#### 37"


@pytest.mark.parametrize(
    "text",
    [
        "3+4=8\n#### 8",  # a step that does not hold
        "3+4=7\n#### 8",  # an answer that is not the last result
        "#### 7",
        "3+4=7",
        "3+4=7\nso\n#### 7",
        "",
        "3+4=7\n#### 7\n",
    ],
)
def test_what_does_not_hold_is_not_sound(text: str):
    assert is_sound("3+4=7\n#### 7")
    assert not is_sound(text)


def test_questions_differ_numbers_are_bounded_and_steps_are_in_equal_shares():
    problems = generate_word_problems(3000, seed=0)
    assert len({problem.question for problem in problems}) == 3000
    for problem in problems:
        assert all(int(number) <= LARGEST_NUMBER for number in _numbers(problem.solutions()[0]))
        assert problem.answer > 0
        assert all(number in problem.question for term in problem.terms for number in map(str, term.factors))
    for steps in range(1, MOST_STEPS + 1):
        assert sum(problem.steps == steps for problem in problems) == 1000
    assert problems == generate_word_problems(3000, seed=0)
    assert problems != generate_word_problems(3000, seed=1)
    with pytest.raises(ValueError, match="count = 0"):
        generate_word_problems(0, seed=0)


def test_a_folder_loads_with_the_ordinary_classes_and_is_the_same_for_a_seed(tmp_path: Path):
    first = make_word_problem_model(tmp_path / "a", seed=3, settings=TINY)
    second = make_word_problem_model(tmp_path / "b", seed=3, settings=TINY)
    assert first == second >= TINY.accuracy
    names = {path.name for path in (tmp_path / "a").iterdir()}
    assert {"config.json", "model.safetensors", "tokenizer.json", "train.jsonl", "test.jsonl"} <= names
    for name in ("model.safetensors", "tokenizer.json", "train.jsonl", "test.jsonl"):
        assert (tmp_path / "a" / name).read_bytes() == (tmp_path / "b" / name).read_bytes()

    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "a")
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "a")
    lines = [json.loads(line) for line in (tmp_path / "a" / "train.jsonl").read_text().splitlines()]
    tested = [json.loads(line)["question"] for line in (tmp_path / "a" / "test.jsonl").read_text().splitlines()]
    assert (len(lines), len(tested)) == (TINY.train_questions, TINY.test_questions)
    assert not {line["question"] for line in lines} & set(tested)
    for line in lines[:50]:
        assert is_sound(line["answer"])
        text = PROMPT_TEMPLATE.format(question=line["question"]) + line["answer"]
        assert tokenizer.decode(tokenizer(text).input_ids, skip_special_tokens=True) == text
    assert tokenizer("127").input_ids == [tokenizer.bos_token_id, *tokenizer.convert_tokens_to_ids(["1", "2", "7"])]
    for ids in (tokenizer.bos_token_id, tokenizer.eos_token_id, tokenizer.pad_token_id):
        assert ids is not None
    assert model.generation_config.eos_token_id == tokenizer.eos_token_id


def test_text_of_any_kind_survives_the_tokenizer():
    tokenizer = warm_start.train_tokenizer(["Ann has 3 apples."])
    for text in ("Zoë pays 12.50 €\n\n\tper  kilo", " leading", "trailing ", "#### 1"):
        ids = tokenizer(text).input_ids
        assert ids[0] == tokenizer.bos_token_id
        assert tokenizer.decode(ids, skip_special_tokens=True) == text


def test_batches_hold_every_example_once_leave_prompts_out_of_the_loss_and_are_hardly_padded():
    problems = generate_word_problems(512, seed=0)
    answers = [problem.solutions()[0] for problem in problems]
    tokenizer = warm_start.train_tokenizer([problem.question for problem in problems] + answers)
    examples = warm_start.labelled(tokenizer, [problem.question + "\n" for problem in problems], answers)
    drawn = warm_start.length_sorted_batches(examples, 32, random.Random(0))
    batches = [next(drawn) for _ in range(16)]
    learnt = []
    for tokens, labels in batches:
        for row, label in zip(tokens, labels, strict=True):
            assert torch.equal(row[label >= 0], label[label >= 0])
            learnt.append(tokenizer.decode(label[label >= 0]))
    assert sorted(learnt) == sorted(answer + tokenizer.eos_token for answer in answers)
    in_all = sum(tokens.numel() for tokens, _ in batches)
    assert sum(len(tokens) for tokens, _ in examples) > 0.93 * in_all


def test_a_target_that_is_missed_ends_with_the_accuracy_reached(tmp_path: Path):
    with pytest.raises(WarmStartError, match=r"accuracy 0\.\d\d after most_steps = 10, below 0.9"):
        make_word_problem_model(tmp_path / "m", seed=0, settings=_changed(accuracy=0.9, most_steps=10))
    assert not (tmp_path / "m").exists()


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"accuracy": 0.0}, "accuracy = 0.0: must be between 0 and 1"),
        ({"in_order": 1.5}, "in_order = 1.5: must be from 0 to 1"),
        ({"batch": 0}, "batch = 0: must be at least 1"),
        ({"width": 30, "heads": 4}, "width = 30: must be a multiple of twice heads = 4"),
        ({"train_questions": 100}, "train_questions = 100: must be at least 16"),
    ],
)
def test_settings_out_of_range_are_named(changed: dict[str, float], message: str):
    with pytest.raises(ValueError, match=message):
        _changed(**changed)


def test_greedy_accuracy_counts_right_final_answers(monkeypatch: pytest.MonkeyPatch):
    problems = generate_word_problems(40, seed=0)
    tokenizer = warm_start.train_tokenizer([problem.question for problem in problems])
    model = warm_start.new_model(tokenizer, width=16, layers=1, heads=1, seed=0)
    by_question = {problem.question: index for index, problem in enumerate(problems)}

    def write(input_ids: torch.Tensor, **_: object) -> torch.Tensor:
        """What a model would do that answers every second question right."""
        questions = tokenizer.batch_decode(input_ids, skip_special_tokens=True)
        indices = [by_question[question.rstrip("\n")] for question in questions]
        texts = [f"1+1=2\n#### {problems[index].answer + index % 2}" for index in indices]
        return torch.cat(
            [
                input_ids,
                tokenizer.pad(
                    {
                        "input_ids": [
                            [*tokenizer(text, add_special_tokens=False).input_ids, tokenizer.eos_token_id]
                            for text in texts
                        ]
                    },
                    return_tensors="pt",
                    padding_side="right",
                )["input_ids"],
            ],
            dim=1,
        )

    monkeypatch.setattr(model, "generate", write)
    assert warm_start.greedy_accuracy(model, tokenizer, problems) == 0.5


def test_palindromes_are_exactly_the_strings_that_the_reward_accepts():
    strings = ["".join(symbols) for symbols in product(palindromes.SYMBOLS, repeat=palindromes.LENGTH)]
    for remainder in range(6):
        fields = {"prompt": palindromes.prompts()[remainder], "answer": str(remainder)}
        right = [text for text in strings if palindromes.palindrome_reward(fields, text) == 1.0]
        assert right == palindromes.palindromes(remainder)
        assert len(right) == 36
    fields = {"answer": "0"}
    assert all(
        palindromes.palindrome_reward(fields, text) == 0.0
        for text in ("", "00", "0000000", "006600", "00 00 ", "٠٠٠٠٠٠")
    )


def test_palindrome_model_starts_close_to_uniform_over_all_strings(tmp_path: Path):
    palindromes.make_palindrome_model(tmp_path, seed=1)
    tokenizer = AutoTokenizer.from_pretrained(tmp_path)
    model = AutoModelForCausalLM.from_pretrained(tmp_path)
    lines = [json.loads(line) for line in (tmp_path / "prompts.jsonl").read_text().splitlines()]
    assert [line["answer"] for line in lines] == list("012345")
    digits = tokenizer.convert_tokens_to_ids(list(palindromes.SYMBOLS))
    prompt = torch.tensor(tokenizer(lines[4]["prompt"]).input_ids)
    prefixes = torch.cartesian_prod(*[torch.tensor(digits)] * (palindromes.LENGTH - 1))
    read = torch.cat([prompt.expand(len(prefixes), -1), prefixes], dim=1)
    with torch.no_grad():
        log_probs = torch.cat([model(block).logits[:, len(prompt) - 1 :].log_softmax(-1) for block in read.split(2048)])
        ended = model(torch.cat([read[::100], read[::100, -1:]], dim=1)).logits[:, -1].softmax(-1)
    of_prefix = log_probs[:, :-1].gather(2, prefixes[..., None]).sum((1, 2))
    probabilities = (of_prefix[:, None] + log_probs[:, -1, digits]).exp().double()
    assert probabilities.numel() == 6**6
    outside = 1 - probabilities.sum()
    assert 0 <= outside < 0.05
    assert 0.5 * ((probabilities - 6**-6).abs().sum() + outside) < 0.15
    assert ended[:, tokenizer.eos_token_id].min() > 0.9


def _changed(**changed: float) -> WarmStart:
    return replace(TINY, **changed)


def _numbers(solution: str) -> list[str]:
    return [number for number in "".join(c if c.isdigit() else " " for c in solution).split() if number]
