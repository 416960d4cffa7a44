"""Search: who draws trajectories, scores them and puts them where the learner finds them."""

from __future__ import annotations

import torch

from headwater.replay import Replay
from headwater.search.base import Search, SearchError, SearchSettings
from headwater.search.exploration import ExplorationSettings
from headwater.search.explorer import Explorer
from headwater.search.inline import InlineSearch
from headwater.search.local import LocalSearch
from headwater.search.searcher import Drawn, Searcher
from headwater.search.teacher import Teacher, TeacherSettings
from headwater.search.thompson import Thompson, ThompsonSettings
from headwater.search.virtual import VirtualSearch

__all__ = [
    "Drawn",
    "ExplorationSettings",
    "Explorer",
    "InlineSearch",
    "LocalSearch",
    "Search",
    "SearchError",
    "SearchSettings",
    "Searcher",
    "Teacher",
    "TeacherSettings",
    "Thompson",
    "ThompsonSettings",
    "VirtualSearch",
    "build_search",
]


def build_search(
    settings: SearchSettings, searcher: Searcher, replay: Replay | None, generator: torch.Generator
) -> Search:
    """The search of these settings, which runs `searcher` and fills `replay`."""
    if not settings.searchers:
        return InlineSearch(searcher, replay, generator)
    if settings.runtime == "virtual":
        return VirtualSearch(searcher, replay, generator, settings.searchers, settings.lag)
    if settings.runtime == "ray":
        from headwater.search.rays import ray_search

        return ray_search(settings, searcher, replay, generator)
    from headwater.search.processes import process_search

    return process_search(settings, searcher, replay, generator)
