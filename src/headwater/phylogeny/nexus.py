"""The grammar that NEXUS files share, whatever is in them: comments, quoted names, commands (Maddison, Swofford &
Maddison 1997, Systematic Biology 46).
"""

from __future__ import annotations

import re

_QUOTED_OR_COMMENT = re.compile(r"'(?:[^'\n]|'')*'|\[[^\]]*\]")
_QUOTED_OR_END = re.compile(r"'(?:[^'\n]|'')*'|;")
_BREAKS_A_NAME = re.compile(r"[\s()\[\]{},;:='\"]")


def commands(text: str) -> list[tuple[int, str, str]]:
    """The commands of a NEXUS file as (line where it starts, word in lower case, the rest), comments left out."""
    clean = without_comments(text)
    clean = re.sub(r"^\s*#nexus", lambda match: re.sub(r"\S", " ", match[0]), clean, count=1, flags=re.IGNORECASE)
    found: list[tuple[int, str, str]] = []
    start, line = 0, 1
    for match in _QUOTED_OR_END.finditer(clean):
        if match[0] != ";":
            continue
        command = clean[start : match.start()]
        start = match.end()
        body = command.lstrip()
        first = line + command[: len(command) - len(body)].count("\n")
        line += command.count("\n")
        if body:
            word = body.split(maxsplit=1)[0]
            found.append((first, word.lower(), body[len(word) :]))
    return found


def without_comments(text: str) -> str:
    """The text with blanks for comments outside quoted names."""
    return _QUOTED_OR_COMMENT.sub(lambda m: m[0] if m[0][0] == "'" else re.sub(r"[^\n]", " ", m[0]), text)


def quoted(name: str) -> str:
    """A taxon name as Newick and NEXUS files write it: in quotes where it holds a blank, a bracket or punctuation."""
    return "'" + name.replace("'", "''") + "'" if _BREAKS_A_NAME.search(name) or not name else name


def unquoted(word: str) -> str:
    """The name that a word of a file stands for. An underscore stays one: programs differ on it, and files agree."""
    return word[1:-1].replace("''", "'") if len(word) > 1 and word[0] == word[-1] == "'" else word


def first_word(line: str) -> tuple[str, str]:
    """A line's first word, which may be a quoted name, and what follows it."""
    line = line.strip()
    match = re.match(r"'(?:[^']|'')*'|\S+", line)
    return (match[0], line[match.end() :]) if match else ("", "")
