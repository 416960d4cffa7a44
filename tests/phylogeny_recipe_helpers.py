"""What tests of the recipe `phylogeny` need: alignments that evolved along a known tree, and the command."""

import math
from pathlib import Path

import numpy as np
import pytest

from headwater.cli import main
from headwater.runs import Run

BASES = "ACGT"


def evolved(topology, sites, length, seed, gaps=0.0):
    """Rows of an alignment that evolved along nested pairs of names, every edge as long (Jukes & Cantor 1969)."""
    rng = np.random.default_rng(seed)
    rows = {}

    def down(node, states):
        changed = rng.random(sites) < 0.75 * (1 - math.exp(-4 / 3 * length))
        states = np.where(changed, (states + rng.integers(1, 4, sites)) % 4, states)
        if isinstance(node, str):
            letters = np.array(list(BASES))[states]
            rows[node] = "".join(np.where(rng.random(sites) < gaps, "-", letters))
            return
        for child in node:
            down(child, states)

    down(topology, rng.integers(0, 4, sites))
    return dict(sorted(rows.items()))


def fasta(path: Path, rows) -> Path:
    path.write_text("".join(f">{name}\n{row}\n" for name, row in rows.items()))
    return path


def train(folder: Path, *flags: object) -> Run:
    """Run the command to its end."""
    with pytest.raises(SystemExit) as ended:
        main(["train", "phylogeny", "--quiet", "--out", str(folder), *map(str, flags)])
    assert ended.value.code == 0
    return Run.open(folder)
