"""Search: who draws trajectories, scores them and puts them where the learner finds them."""

from __future__ import annotations

import torch

from headwater.replay import Replay
from headwater.search.base import Search, SearchError, SearchSettings
from headwater.search.inline import InlineSearch
from headwater.search.searcher import Drawn, Searcher

__all__ = ["Drawn", "InlineSearch", "Search", "SearchError", "SearchSettings", "Searcher", "build_search"]


def build_search(
    settings: SearchSettings, searcher: Searcher, replay: Replay | None, generator: torch.Generator
) -> Search:
    """The search of these settings, which runs `searcher` and fills `replay`."""
    if not settings.processes:
        return InlineSearch(searcher, replay, generator)
    from headwater.search.processes import process_search

    return process_search(settings, searcher, replay, generator)
