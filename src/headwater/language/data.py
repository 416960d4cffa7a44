"""Prompts of language models: JSON lines, or one JSON list, of GSM8K (Cobbe et al. 2021, arXiv 2110.14168), of MATH
(Hendrycks et al. 2021, arXiv 2103.03874), of preference pairs, or of any prompts. And what a model makes of a prompt,
a completion.
"""

from __future__ import annotations

import json
import string
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path

from headwater.language.answers import boxed, hashed

LONGEST_LINE = 1 << 20
"""Bytes of one prompt's JSON."""
LARGEST_LIST = 1 << 30
"""Bytes of a file that holds one JSON list, which must be read at once."""

_KINDS = (("question", "answer"), ("problem", "solution"), ("prompt",))
_LEGAL = "question and answer (GSM8K), problem and solution or answer (MATH), or prompt, maybe with answer or chosen"


@dataclass(frozen=True)
class Prompt:
    """One thing to ask a model.

    text:   what the model is given, the template filled in.
    answer: the reference answer, for a verifier; None where there is none.
    fields: everything that its line says: strings as they are, other values as JSON.
    place:  file and line, for errors to name; two prompts are the same wherever they stand.
    """

    text: str
    answer: str | None
    fields: dict[str, str]
    place: str = field(default="", compare=False)


class Completion(str):
    """A completion's text. `finished` is False where a length limit or a stop string cut it off."""

    finished: bool

    def __new__(cls, text: str, finished: bool = True) -> Completion:
        made = super().__new__(cls, text)
        made.finished = finished
        return made


def read_prompts(path: str | Path, template: str | None = None) -> list[Prompt]:
    """The prompts of a file, in its order.

    A line has a question and an answer that ends in `#### 42`; a problem and a solution with \\boxed{42} in it, or an
    answer; or a prompt, maybe with an answer, or with a chosen and a rejected completion. template: what the model is
    given, with names of fields in braces, as in "{question}\\n" (the two characters \\n are a new line too); {{ and }}
    are braces. Without it the model gets the question, problem or prompt alone.

    Raises ValueError, naming file and line, for a line that does not parse, lacks a field or an answer, or is longer
    than `LONGEST_LINE`, and for a file without prompts or a folder.
    """
    path = Path(path)
    if path.is_dir():
        raise ValueError(f"{path}: must be a file of prompts, and is a folder")
    pieces = None if template is None else _pieces(template)
    prompts = [_prompt(value, place, pieces) for place, value in _values(path)]
    if not prompts:
        raise ValueError(f"{path}: there are no prompts in it")
    return prompts


def _values(path: Path) -> Iterator[tuple[str, object]]:
    """What the file holds, value by value, each with its place in words."""
    if path.suffix == ".json":
        yield from _values_of_list(path)
        return
    with path.open("rb") as file:
        number = 0
        while line := file.readline(LONGEST_LINE + 1):
            number += 1
            place = f"{path}, line {number}"
            if len(line) > LONGEST_LINE:
                raise ValueError(f"{place}: longer than {LONGEST_LINE:,} bytes, the most that a line may have")
            if line.strip():
                yield place, _parsed(line, place)


def _values_of_list(path: Path) -> Iterator[tuple[str, object]]:
    if path.stat().st_size > LARGEST_LIST:
        raise ValueError(f"{path}: larger than {LARGEST_LIST:,} bytes; give JSON lines (.jsonl)")
    values = _parsed(path.read_bytes(), str(path))
    if not isinstance(values, list):
        raise ValueError(f"{path}: must hold one JSON list of objects; one object a line is called .jsonl")
    for number, value in enumerate(values, 1):
        yield f"{path}, item {number}", value


def _parsed(data: bytes, place: str) -> object:
    try:
        return json.loads(data.decode("utf-8-sig"))
    except json.JSONDecodeError as error:
        where = f"line {error.lineno}, column {error.colno}" if error.lineno > 1 else f"column {error.colno}"
        raise ValueError(f"{place}: no JSON: {error.msg} ({where})") from None
    except UnicodeDecodeError as error:
        raise ValueError(f"{place}: no UTF-8: {error.reason} at byte {error.start}") from None
    except (RecursionError, ValueError) as error:  # nested too deeply; an integer of too many digits
        raise ValueError(f"{place}: no JSON that can be read: {error}") from None


def _prompt(value: object, place: str, pieces: list[tuple[str, str | None]] | None) -> Prompt:
    if not isinstance(value, dict):
        raise ValueError(f"{place}: must be a JSON object with {_LEGAL}")
    fields = {name: _text(name, each) for name, each in value.items() if each is not None}
    kind = next((names for names in _KINDS if names[0] in fields), None)
    if kind is None:
        raise ValueError(f"{place}: has {_listed(fields)}; must have {_LEGAL}")
    text = fields[kind[0]] if pieces is None else _filled(pieces, fields, place)
    if not isinstance(value[kind[0]], str) or not text.strip():
        raise ValueError(f"{place}: {kind[0] if pieces is None else 'the prompt'} must be text, and not empty")
    return Prompt(text, _answer(kind[0], fields, place), fields, place)


def _answer(kind: str, fields: Mapping[str, str], place: str) -> str | None:
    """The reference answer of a line whose question is in the field `kind`."""
    if kind == "prompt":
        return fields.get("answer")
    if kind == "problem" and "solution" not in fields:
        if "answer" not in fields:
            raise ValueError(f"{place}: a problem must have a solution or an answer; it has {_listed(fields)}")
        return fields["answer"]
    name = "answer" if kind == "question" else "solution"
    if name not in fields:
        raise ValueError(f"{place}: a {kind} must have {name!r}; it has {_listed(fields)}")
    answer = hashed(fields[name]) if kind == "question" else boxed(fields[name])
    if answer is None:
        mark = "'####' and the answer after it" if kind == "question" else "the answer in \\boxed{...}"
        raise ValueError(f"{place}: {name} lacks {mark}")
    return answer


def _text(name: str, value: object) -> str:
    """A field as text. Preference pairs may hold whole conversations: their last message is the completion."""
    if isinstance(value, str):
        return value
    if name in ("chosen", "rejected") and isinstance(value, list) and value and isinstance(value[-1], dict):
        return str(value[-1].get("content", ""))
    return json.dumps(value, ensure_ascii=False)


def _pieces(template: str) -> list[tuple[str, str | None]]:
    """The template's texts, each with the name of the field that follows it. Only names: no attributes, no formats."""
    try:
        parsed = list(string.Formatter().parse(template.replace("\\n", "\n")))
    except ValueError as error:
        raise ValueError(
            f"template is {template!r}: {error}; braces that are no field are written {{{{ and }}}}"
        ) from None
    for _, name, form, conversion in parsed:
        if name is not None and (form or conversion or not name.isidentifier()):
            raise ValueError(f"template is {template!r}: {{{name}}} must be the name of a field in braces, no more")
    if all(name is None for _, name, _, _ in parsed):
        raise ValueError(f"template is {template!r}: must name a field in braces, such as {{question}}")
    return [(text, name) for text, name, _, _ in parsed]


def _filled(pieces: list[tuple[str, str | None]], fields: Mapping[str, str], place: str) -> str:
    for _, name in pieces:
        if name is not None and name not in fields:
            raise ValueError(f"{place}: the template asks for {name!r}; the fields are {_listed(fields)}")
    return "".join(text + ("" if name is None else fields[name]) for text, name in pieces)


def _listed(fields: Mapping[str, str]) -> str:
    return ", ".join(fields) or "no fields"
