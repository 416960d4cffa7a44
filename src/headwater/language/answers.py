"""Where a worked solution says its answer: after `####` (GSM8K, Cobbe et al. 2021, arXiv 2110.14168), in \\boxed{...}
(MATH, Hendrycks et al. 2021, arXiv 2103.03874), or, marked by neither, its last number.
"""

from __future__ import annotations

import re
from fractions import Fraction

LONGEST_ANSWER = 1000
"""Characters; what is longer is no answer."""

_HASHES = re.compile(r"####[ \t]*([^\n]*)")
_BOX = re.compile(r"\\(?:boxed|fbox)(?:[ \t]*(?=\{)|[ \t]+)")
_NUMBER = re.compile(r"(?<![\w.])-?(?:\d{1,3}(?:,\d{3})+|\d+)(?:\.\d+)?(?:/\d+)?|-?(?<!\w)\.\d+")
_PLAIN = re.compile(r"[-+]?(?:\d{1,3}(?:,\d{3})+|\d{1,60})(?:\.\d{0,60})?|[-+]?\.\d{1,60}")


def hashed(text: str) -> str | None:
    """What follows the last `####` on its line, without space around it; None if there is none, or nothing follows."""
    found = _HASHES.findall(text)
    return found[-1].strip() or None if found else None


def boxed(text: str) -> str | None:
    """The contents of the last \\boxed{...} or \\fbox{...} whose braces close, or of \\boxed 7, if there is one."""
    for start in reversed(list(_BOX.finditer(text))):
        inside = (
            _braced(text, start.end()) if text[start.end() : start.end() + 1] == "{" else _unbraced(text, start.end())
        )
        if inside:
            return inside
    return None


def last_number(text: str) -> str | None:
    """The last number, such as -1,200.5 or 3/4; None if there is none."""
    found = _NUMBER.findall(text)
    return found[-1] if found else None


def marked(text: str) -> str | None:
    """The answer where the formats say, after #### or in a box; None if there is none, or it is too long."""
    answer = hashed(text) or boxed(text)
    return answer if answer is not None and len(answer) <= LONGEST_ANSWER else None


def plain_number(text: str) -> Fraction | None:
    """The exact value of an integer or decimal number, in digits with or without commas, with or without $ before it
    or a full stop after it; None for anything else.
    """
    bare = text.strip().removeprefix("\\").removeprefix("$").removesuffix(".").strip()
    return Fraction(bare.replace(",", "").rstrip(".")) if _PLAIN.fullmatch(bare) else None


def _braced(text: str, opening: int) -> str | None:
    depth = 0
    for place in range(opening, len(text)):
        if text[place] in "{}" and (text[place - 1] != "\\"):
            depth += 1 if text[place] == "{" else -1
            if depth == 0:
                return text[opening + 1 : place].strip() or None
    return None


def _unbraced(text: str, start: int) -> str | None:
    return re.split(r"[$\n]", text[start:], maxsplit=1)[0].strip() or None
