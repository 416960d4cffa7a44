"""Whether two mathematical answers are equal, by math-verify (Kydlicek, Hugging Face). `MathReward` runs this file's
`equal` in a process of its own: an answer can make a computer algebra system think for ever, or take all memory, and
math-verify's own time-outs are signals, which work in a main thread only and pass for "not equal".
"""

from __future__ import annotations

import logging
import resource
from typing import cast

from math_verify import parse, verify

MEMORY_LIMIT = 8 << 30
"""Bytes of address space of the process that decides."""

logging.getLogger("math_verify").setLevel(logging.CRITICAL)  # it warns that its time-outs are off, and of each answer


def equal(pairs: list[object]) -> list[float]:
    """1 or 0 for each pair (reference, answer) of texts. What cannot be parsed or compared is not equal."""
    resource.setrlimit(resource.RLIMIT_AS, (MEMORY_LIMIT, resource.getrlimit(resource.RLIMIT_AS)[1]))
    return [float(_equal(*cast("tuple[str, str]", pair))) for pair in pairs]


def _equal(reference: str, answer: str) -> bool:
    return any(_same(one, other) for one in _parsed(reference) for other in _parsed(answer))


def _same(one: object, other: object) -> bool:
    try:
        return bool(verify(one, other, timeout_seconds=None, raise_on_error=True))
    except (MemoryError, RecursionError):  # it could not be decided
        raise
    except Exception:
        return False


def _parsed(text: str) -> list[object]:
    try:
        return parse(f"\\boxed{{{text}}}", parsing_timeout=None, raise_on_error=True)
    except (MemoryError, RecursionError):
        raise
    except Exception:
        return []
