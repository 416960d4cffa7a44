"""Headwater: learn to draw many different good answers, in proportion to how good they are."""

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from headwater.sampler import Sampler

__all__ = ["Sampler", "__version__"]
__version__ = "0.1.0"


def __getattr__(name: str) -> object:
    """`headwater.Sampler`, imported when it is first asked for: reward workers import this package too, and must
    start fast.
    """
    if name == "Sampler":
        from headwater.sampler import Sampler

        return Sampler
    raise AttributeError(f"module 'headwater' has no attribute {name!r}")
