"""Compiling with numba, and keeping on disk what was compiled."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from numba import njit


def kept_njit(fastmath: bool = False) -> Any:
    """`numba.njit` without the interpreter's lock, whose machine code is kept on disk for the next process, beside the
    source or in the user's cache. Where neither can be written it is compiled anew each time.

    For functions that are the same in every process: one that is made inside another belongs to that one's arguments.
    """

    def decorate(function: Callable[..., object]) -> Any:
        try:
            return njit(cache=True, nogil=True, fastmath=fastmath)(function)
        except RuntimeError:  # no place to keep it
            return njit(nogil=True, fastmath=fastmath)(function)

    return decorate
