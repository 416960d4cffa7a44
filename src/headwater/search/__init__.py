"""Search: who draws trajectories, scores them and puts them where the learner finds them."""

from headwater.search.inline import InlineSearch

__all__ = ["InlineSearch"]
