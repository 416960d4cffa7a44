"""Search: who draws trajectories, scores them and puts them where the learner finds them."""

from headwater.search.exploration import ExplorationSettings
from headwater.search.explorer import Explorer
from headwater.search.inline import InlineSearch
from headwater.search.local import LocalSearch
from headwater.search.teacher import Teacher, TeacherSettings
from headwater.search.thompson import Thompson, ThompsonSettings

__all__ = [
    "ExplorationSettings",
    "Explorer",
    "InlineSearch",
    "LocalSearch",
    "Teacher",
    "TeacherSettings",
    "Thompson",
    "ThompsonSettings",
]
