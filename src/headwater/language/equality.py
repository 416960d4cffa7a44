"""Whether two mathematical answers are equal, by math-verify (Kydlicek, Hugging Face). `MathReward` runs this file's
`equal` in a process of its own: an answer can make a computer algebra system think for ever, or take all memory, and
math-verify's own time-outs are signals, which work in a main thread only and pass for "not equal".
"""

from __future__ import annotations

import logging
import resource
from itertools import product
from typing import cast

from math_verify import parse, verify

MEMORY_LIMIT = 8 << 30
"""Bytes of address space of the process that decides."""
_UNDECIDED = (MemoryError, RecursionError)  # of this process, not of what it reads

logging.getLogger("math_verify").setLevel(logging.CRITICAL)  # it warns that its time-outs are off, and of each answer


class UnreadableReference(ValueError):
    """The reference answer is no mathematics, so that an answer in other words may be right or wrong."""


def equal(pairs: list[object]) -> list[float]:
    """1 or 0 for each pair (reference, answer) of texts. An answer that is no mathematics is not equal.

    Raises UnreadableReference, and whatever math-verify raises where it cannot compare: neither says anything about
    the answer.
    """
    resource.setrlimit(resource.RLIMIT_AS, (MEMORY_LIMIT, resource.getrlimit(resource.RLIMIT_AS)[1]))
    return [float(_equal(*cast("tuple[str, str]", pair))) for pair in pairs]


def _equal(reference: str, answer: str) -> bool:
    try:
        wanted = _parsed(reference)
    except _UNDECIDED:
        raise
    except Exception as error:
        raise UnreadableReference(f"{type(error).__name__}: {error}") from error
    try:
        given = _parsed(answer)
    except _UNDECIDED:
        raise
    except Exception:
        given = []
    failed: Exception | None = None
    for one, other in product(wanted, given):
        try:
            if verify(one, other, timeout_seconds=None, raise_on_error=True):
                return True
        except Exception as error:  # what follows may be equal, as plain text
            failed = error
    if failed is not None:
        raise failed
    if all(isinstance(one, str) for one in wanted):
        raise UnreadableReference("no mathematics that math-verify can read")
    return False


def _parsed(text: str) -> list[object]:
    """What it may mean: an expression, if it is one, and plain text."""
    return parse(f"\\boxed{{{text}}}", parsing_timeout=None, raise_on_error=True)
