"""Arithmetic word problems with worked answers, made from a seed in the manner of GSM8K (Cobbe et al. 2021,
arXiv 2110.14168): a short story, and steps such as `4*2=8` down to a last line `#### 11`.

What is asked for is a sum of signed terms, each a number or a product. Whoever works it out is free in the order: every
way to combine the terms two at a time, never below zero, is a right solution. All of them can be listed, so the
diversity of what a model writes can be measured against what there is.
"""

from __future__ import annotations

import json
import random
import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from itertools import permutations
from math import prod
from pathlib import Path

LARGEST_NUMBER = 99
MOST_STEPS = 3
PROMPT_TEMPLATE = "{question}\n"
"""What a model is given; the worked answer follows."""

_NAMES = ("Ann", "Ben", "Carla", "David", "Emma", "Frank", "Grace", "Hugo", "Iris", "Jack", "Kim", "Leo")
_THINGS = ("apples", "books", "cards", "coins", "eggs", "flowers", "marbles", "pens", "shells", "stamps")
_CONTAINERS = ("bags", "boxes", "jars", "packs")
_VERBS = {+1: ("buys", "finds", "wins", "collects"), -1: ("loses", "sells", "gives away", "uses")}
_STEP = re.compile(r"(\d{1,9})([-+*])(\d{1,9})=(\d{1,9})")


@dataclass(frozen=True)
class Term:
    """One part of a sum: sign * the product of one or two factors."""

    sign: int
    factors: tuple[int, ...]

    @property
    def value(self) -> int:
        return self.sign * prod(self.factors)


@dataclass(frozen=True)
class WordProblem:
    """A question, and the terms whose sum answers it."""

    question: str
    terms: tuple[Term, ...]

    @property
    def answer(self) -> int:
        return sum(term.value for term in self.terms)

    @property
    def steps(self) -> int:
        """Arithmetic steps of every solution."""
        return sum(len(term.factors) for term in self.terms) - 1

    def solutions(self) -> list[str]:
        """Every worked answer, each once, in lexical order: one step a line, then `#### ` and the answer."""
        ways: set[str] = set()
        going_on: set[tuple[tuple[str, ...], tuple[Term, ...]]] = {((), self.terms)}
        while going_on:
            steps, terms = going_on.pop()
            moves = _moves(terms)
            going_on |= {((*steps, step), left) for step, left in moves}
            if not moves:
                ways.add(self._worked(steps))
        return sorted(ways)

    def solution(self, generator: random.Random, in_order: float = 0.75) -> str:
        """One worked answer: each step is the first that can be taken as the story is told with probability `in_order`,
        otherwise any that can be taken now."""
        steps: list[str] = []
        terms = self.terms
        while moves := _moves(terms):
            step, terms = moves[0] if generator.random() < in_order else generator.choice(moves)
            steps.append(step)
        return self._worked(steps)

    def _worked(self, steps: Iterable[str]) -> str:
        return "\n".join([*steps, f"#### {self.answer}"])


def generate_word_problems(count: int, seed: int) -> list[WordProblem]:
    """`count` problems, all questions different, of one to `MOST_STEPS` steps in equal shares, in random order.

    No number in any solution is above `LARGEST_NUMBER`. Raises ValueError for a count below 1.
    """
    if count < 1:
        raise ValueError(f"count = {count}: must be at least 1")
    generator = random.Random(seed)
    problems: dict[str, WordProblem] = {}
    while len(problems) < count:
        problem = _problem(generator, steps=1 + len(problems) % MOST_STEPS)
        largest = sum(term.value for term in problem.terms if term.sign > 0)
        if problem.answer > 0 and largest <= LARGEST_NUMBER:
            problems.setdefault(problem.question, problem)
    shuffled = list(problems.values())
    generator.shuffle(shuffled)
    return shuffled


def write_gsm8k(path: Path, problems: Sequence[WordProblem], answers: Sequence[str]) -> None:
    """Write problems as GSM8K's files have them: lines with `question`, and a worked answer as `answer`."""
    lines = [
        json.dumps({"question": problem.question, "answer": answer})
        for problem, answer in zip(problems, answers, strict=True)
    ]
    path.write_text("".join(f"{line}\n" for line in lines), encoding="utf-8")


def is_sound(solution: str) -> bool:
    """Whether all lines but the last are steps that hold, and the last gives the result of the step before it.

    This looks at the solution alone, which may be sound and no answer to the question.
    """
    *steps, last = solution.split("\n")
    matches = [match for step in steps if (match := _STEP.fullmatch(step))]
    if not matches or len(matches) < len(steps) or last != f"#### {matches[-1][4]}":
        return False
    return all(_apply(int(match[1]), match[2], int(match[3])) == int(match[4]) for match in matches)


def _moves(terms: tuple[Term, ...]) -> list[tuple[str, tuple[Term, ...]]]:
    """Every step that can be taken now and the terms that it leaves. First comes what can be worked out first when one
    follows the story: the step whose last operand is told earliest."""
    moves: dict[str, tuple[Term, ...]] = {}
    for last, term in enumerate(terms):
        if len(term.factors) == 2:
            for left, right in permutations(term.factors):
                step, result = _step(left, "*", right)
                moves.setdefault(step, (*terms[:last], Term(term.sign, (result,)), *terms[last + 1 :]))
            continue
        for first in range(last):
            if len(terms[first].factors) == 1:
                rest = (*terms[first + 1 : last], *terms[last + 1 :])
                for step, combined in _combined(terms[first], term):
                    moves.setdefault(step, (*terms[:first], combined, *rest))
    return list(moves.items())


def _combined(first: Term, second: Term) -> list[tuple[str, Term]]:
    """The steps that make one term of two numbers."""
    steps = []
    for one, other in ((first, second), (second, first)):
        left, right = one.factors[0], other.factors[0]
        if one.sign == other.sign or (one.sign > 0 and left >= right):
            step, result = _step(left, "+" if one.sign == other.sign else "-", right)
            steps.append((step, Term(one.sign, (result,))))
    return steps


def _step(left: int, operator: str, right: int) -> tuple[str, int]:
    result = _apply(left, operator, right)
    return f"{left}{operator}{right}={result}", result


def _apply(left: int, operator: str, right: int) -> int:
    return left * right if operator == "*" else left + right if operator == "+" else left - right


def _problem(generator: random.Random, steps: int) -> WordProblem:
    name, friend = generator.sample(_NAMES, 2)
    things = generator.choice(_THINGS)
    sentence, terms, together = _beginning(generator, steps, name, friend, things)
    story = [sentence]
    while (left := steps + 1 - sum(len(term.factors) for term in terms)) > 0:
        sign = generator.choice((+1, -1))
        verb = generator.choice(_VERBS[sign])
        if left >= 2 and generator.random() < 0.5:
            times, each = _factors(generator)
            terms.append(Term(sign, (times, each)))
            story.append(f"{name} {verb} {times} {generator.choice(_CONTAINERS)} of {each}.")
        else:
            amount = generator.randint(2, 12)
            terms.append(Term(sign, (amount,)))
            story.append(f"{name} {verb} {amount}.")
    asked = f"do {name} and {friend} have together" if together else f"does {name} have now"
    return WordProblem(" ".join([*story, f"How many {things} {asked}?"]), tuple(terms))


def _beginning(
    generator: random.Random, steps: int, name: str, friend: str, things: str
) -> tuple[str, list[Term], bool]:
    """The first sentence, its terms, and whether two people's things are asked for."""
    amount = generator.randint(2, 30)
    kind = generator.choice(
        ("some", "some", "containers", "more", "times") if steps > 1 else ("some", "some", "containers")
    )
    if kind == "containers":
        times, each = _factors(generator)
        container = generator.choice(_CONTAINERS)
        return f"{name} has {times} {container} of {each} {things}.", [Term(+1, (times, each))], False
    if kind == "more":
        more = generator.randint(2, 12)
        terms = [Term(+1, (amount,)), Term(+1, (more,)), Term(+1, (amount,))]
        return f"{name} has {amount} {things} and {friend} has {more} more.", terms, True
    if kind == "times":
        amount, times = _factors(generator)
        terms = [Term(+1, (amount,)), Term(+1, (times, amount))]
        return f"{name} has {amount} {things} and {friend} has {times} times as many.", terms, True
    return f"{name} has {amount} {things}.", [Term(+1, (amount,))], False


def _factors(generator: random.Random) -> tuple[int, int]:
    return generator.randint(2, 9), generator.randint(2, 9)
