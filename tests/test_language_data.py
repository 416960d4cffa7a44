"""Prompts: the formats that are read, and what is said of a file that is none of them."""

from __future__ import annotations

import copy
import json
import pickle
from pathlib import Path

import pytest

from headwater.language.answers import boxed, last_number, marked, plain_number
from headwater.language.data import LONGEST_LINE, Completion, read_prompts


def written(folder: Path, *lines: object, name: str = "prompts.jsonl") -> Path:
    path = folder / name
    path.write_text("".join(f"{line if isinstance(line, str) else json.dumps(line)}\n" for line in lines))
    return path


def test_gsm8k_lines_give_the_question_and_what_follows_the_hashes(tmp_path: Path) -> None:
    line = {"question": "How many?", "answer": "20*60=<<20*60=1200>>1200\n#### 1,200"}
    (prompt,) = read_prompts(written(tmp_path, line))
    assert (prompt.text, prompt.answer, prompt.fields) == ("How many?", "1,200", line)


def test_math_lines_give_the_last_box_with_its_braces(tmp_path: Path) -> None:
    line = {
        "problem": "Solve.", "solution": "First \\boxed{3}, so \\boxed{\\frac{1}{2}}.", "level": "Level 5",
        "type": "Algebra",
    }  # fmt: skip
    (prompt,) = read_prompts(written(tmp_path, line))
    assert prompt.answer == "\\frac{1}{2}"
    assert prompt.fields["level"] == "Level 5"


def test_a_problem_may_have_its_answer_alone(tmp_path: Path) -> None:
    (prompt,) = read_prompts(written(tmp_path, {"problem": "1 + 1?", "answer": 2}))
    assert prompt.answer == "2"


def test_generic_and_preference_lines_are_prompts_with_and_without_answers(tmp_path: Path) -> None:
    turns = [{"role": "user", "content": "c"}, {"role": "assistant", "content": "good"}]
    path = written(
        tmp_path,
        {"prompt": "a"},
        {"prompt": "b", "answer": 0.5},
        "   ",
        {"prompt": "c", "chosen": turns, "rejected": "bad", "score": None},
    )
    prompts = read_prompts(path)
    assert [prompt.text for prompt in prompts] == ["a", "b", "c"]
    assert [prompt.answer for prompt in prompts] == [None, "0.5", None]
    assert prompts[2].fields == {"prompt": "c", "chosen": "good", "rejected": "bad"}


def test_a_json_list_reads_as_its_lines_would(tmp_path: Path) -> None:
    lines = [{"prompt": "a", "answer": "é"}, {"prompt": "b"}]
    whole = written(tmp_path, json.dumps(lines, indent=1), name="prompts.json")
    assert read_prompts(whole) == read_prompts(written(tmp_path, *lines))


def test_a_template_is_filled_with_the_fields_of_the_line(tmp_path: Path) -> None:
    path = written(tmp_path, {"question": "Why {this}?", "answer": "#### 1", "topic": "x"})
    assert read_prompts(path, "{{{topic}}} {question}\\n")[0].text == "{x} Why {this}?\n"


@pytest.mark.parametrize(
    ("template", "message"),
    [
        ("{question.__class__}", "must be the name of a field"),
        ("{question!r}", "must be the name of a field"),
        ("{0}", "must be the name of a field"),
        ("no field", "must name a field"),
        ("{question", "braces"),
        ("{answers}", "line 1: the template asks for 'answers'; the fields are question, answer"),
    ],
)
def test_a_template_takes_names_of_fields_and_nothing_else(tmp_path: Path, template: str, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        read_prompts(written(tmp_path, {"question": "a", "answer": "#### 1"}), template)


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("{not json}", r"prompts.jsonl, line 2: no JSON: .* \(column 2\)"),
        ("[" * 100_000, r"line 2: no JSON"),
        ("3", "line 2: must be a JSON object with question"),
        ({"text": "a"}, "line 2: has text; must have question and answer .*problem and solution.*prompt"),
        ({"question": "a"}, "line 2: a question must have 'answer'; it has question"),
        ({"question": "a", "answer": "42"}, "line 2: answer lacks .####"),
        ({"question": "a", "answer": "so\n####\n"}, "line 2: answer lacks .####"),
        ({"problem": "a", "solution": "so \\boxed{1"}, r"line 2: solution lacks the answer in"),
        ({"problem": "a"}, "line 2: a problem must have a solution or an answer; it has problem"),
        ({"prompt": "  "}, "line 2: prompt must be text, and not empty"),
        ({"prompt": ["a"]}, "line 2: prompt must be text"),
        ({"prompt": "x" * LONGEST_LINE}, "line 2: longer than 1,048,576 bytes"),
    ],
)
def test_a_line_that_is_no_prompt_is_an_error_that_names_file_and_line(
    tmp_path: Path, line: object, message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        read_prompts(written(tmp_path, {"prompt": "fine"}, line))


def test_a_file_without_prompts_or_of_other_bytes_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="there are no prompts in it"):
        read_prompts(written(tmp_path, ""))
    with pytest.raises(ValueError, match="there are no prompts in it"):
        read_prompts(written(tmp_path, "[]", name="prompts.json"))
    with pytest.raises(ValueError, match="must hold one JSON list"):
        read_prompts(written(tmp_path, {"prompt": "a"}, name="prompts.json"))
    with pytest.raises(ValueError, match="item 2: has text"):
        read_prompts(written(tmp_path, [{"prompt": "a"}, {"text": "a"}], name="prompts.json"))
    path = tmp_path / "latin.jsonl"
    path.write_bytes('{"prompt": "é"}\n'.encode("latin-1"))
    with pytest.raises(ValueError, match="line 1: no UTF-8"):
        read_prompts(path)


def test_a_completion_is_text_that_remembers_whether_it_ended_itself() -> None:
    cut = Completion("half a", finished=False)
    assert cut == "half a"
    assert Completion("whole").finished
    assert not pickle.loads(pickle.dumps(cut)).finished
    assert not copy.deepcopy(cut).finished


@pytest.mark.parametrize(
    ("text", "found"),
    [
        ("so \\boxed{x_{1}}", "x_{1}"),
        ("\\boxed{\\{1,2\\}}", "\\{1,2\\}"),
        ("$\\boxed 7$ apples", "7"),
        ("\\boxed{1} and \\boxed{2", "1"),
        ("\\fbox{a}", "a"),
        ("boxed{1}", None),
        ("\\boxed{}", None),
    ],
)
def test_a_box_ends_where_its_brace_closes(text: str, found: str | None) -> None:
    assert boxed(text) == found


def test_marks_come_before_numbers_and_numbers_are_read_exactly() -> None:
    assert marked("#### 3\nor \\boxed{4}") == "3"
    assert marked("#### 3\n#### -5 \n") == "-5"
    assert marked("#### " + "9" * 2000) is None
    assert last_number("of 3 apples and 1,200.50 pears.") == "1,200.50"
    assert last_number("from -2 to 3/4") == "3/4"
    assert last_number("x2 is no number") is None
    assert plain_number("$1,200.") == plain_number("1200.00") == 1200
    assert plain_number("0.1") != plain_number("0.1000001")
    assert plain_number("1/2") is plain_number("12,34") is plain_number("") is plain_number("1e5") is None
