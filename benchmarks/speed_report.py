"""The results of `speed.py` as a page of Markdown tables, and its curves as pictures."""

import sys
from pathlib import Path


def write_report(path: Path) -> None:
    pass
