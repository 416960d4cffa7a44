"""Compiling with numba, and keeping on disk what was compiled; keeping memory."""

from __future__ import annotations

import ctypes
from collections.abc import Callable
from typing import Any

from numba import njit

_TRIM_THRESHOLD, _MMAP_THRESHOLD = -1, -3  # of malloc.h in glibc


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


def keep_freed_memory() -> None:
    """Have the C library keep what is freed for the next time it is asked for memory, if it is one that can.

    A training iteration frees what it will ask for again. Given back to the system in between, every page of it comes
    back cleared, one fault at a time, which takes longer than what is computed there.
    """
    try:
        mallopt = ctypes.CDLL(None).mallopt
    except (AttributeError, OSError, TypeError):
        return
    mallopt(_TRIM_THRESHOLD, 2**31 - 1)
    mallopt(_MMAP_THRESHOLD, 32 << 20)  # the most that it takes
