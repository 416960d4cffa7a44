"""Compiled functions that are kept on disk, or not where there is no place."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numba
import pytest

from headwater import native


def twice(x: int) -> int:
    return 2 * x


def test_what_was_compiled_is_kept() -> None:
    compiled = native.kept_njit()(twice)
    assert compiled(3) == 6
    assert compiled.stats.cache_path


def test_where_nothing_can_be_written_it_is_compiled_all_the_same(monkeypatch: pytest.MonkeyPatch) -> None:
    def no_place(cache: bool = False, **options: Any) -> Callable[..., Any]:
        if cache:
            raise RuntimeError("cannot cache function: no locator available")
        return numba.njit(**options)

    monkeypatch.setattr(native, "njit", no_place)
    compiled = native.kept_njit()(twice)
    assert compiled(3) == 6
    assert compiled.stats.cache_path is None
