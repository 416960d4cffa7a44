"""Placeholder until prompts are merged."""

from __future__ import annotations


class Completion(str):
    """A completion's text, and whether the model ended it itself."""

    finished: bool

    def __new__(cls, text: str, finished: bool = True) -> Completion:
        made = super().__new__(cls, text)
        made.finished = finished
        return made
