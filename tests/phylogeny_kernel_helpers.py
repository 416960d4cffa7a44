"""Small alignments and trees for the tests of phylogeny's kernels, and the few lines that read real ones."""

import os
import re
from pathlib import Path

import numpy as np
import pytest

from headwater.phylogeny.models import SubstitutionModel, process, transition_matrices

DATA = Path(os.environ.get("HEADWATER_PHYLO_DATA", Path(__file__).resolve().parents[2] / "shared/data/phylo"))
needs_data = pytest.mark.skipif(not DATA.is_dir(), reason=f"no alignments in {DATA} (HEADWATER_PHYLO_DATA)")

STATES = {"A": 1, "C": 2, "G": 4, "T": 8, "-": 16, "?": 15, "N": 15} | dict(
    zip("RYMKSWHBVD", (5, 10, 3, 12, 6, 9, 11, 14, 7, 13), strict=True)
)

SMALL = {
    "Lemur": "GWTCCAAACCATTCTCCCTCTTATAGCCACCTG-TGACTACTCGCSAGCCTAACTMARCTAGCCCTACCCAC",
    "Homo": "MCTWCAAAMTVTACTCCCACTAATAGCTTTTTGATGACTTCTAGCAAGCCTCGCTAACCTCGCCTTACCCMC",
    "Pan": "ACTTCAAARTCT?CTCCCAC-----GCCTTTTGATGACTCCTAGCAAGCCTCGCTVACC?C-CCCTACCCCC",
    "Gorilla": "ACTCCAAACCCTASTCCC-CTAATAKCCCTTTGATGACTTCTGGCAAGCCTCGCCAACCTCHHCTTACCCCC",
    "Pongo": "CKTTCAAACTCTACTCCCCCTSATAGCCCTCTGATGACTTCTAGCAAGCCTCACTAVCCTWGCCCTACNACC",
    "Hylobates": "GCTCCAAGCCTBACTCCCAC-GDTAGCCTTCTGATKACTCGCAGCAAGCCTCGCTAAWCTCGCCCTACCCCC",
    "Macaca": "ACTTBAAATCNTACTTMCACTARCAGCCTTTTGATGATTAACAGCAAGCCTTACVAACCTTGCCCTACCCCC",
    "M": "ACTTCAWATCCTACTTCCACTVACAGCTTTCTGATGATTAACAGCAAGCCTTACTAACCT?GCCKTACCCCV",
}
"""Sites 121 to 192 of eight of the primates of Hayasaka, Gojobori & Horai 1988, with some cells made ambiguous."""
SMALL_TREE = (
    "(Lemur:0.2565999601,((Homo:0.0148785399,Gorilla:0.0923284735):0.0156753405,(Pan:0.0165292302,(Hylobates:0.1277768945,"
    "(Macaca:0.0168880644,M:0.0446371632):0.1419255289):0.0326023390):0.0142234336):0.1101781369,Pongo:0.0318556228);"
)
PRIMATES_TREE = (
    "(Tarsius_syrichta:0.1791231999,Lemur_catta:0.1335071460,((((((Homo_sapiens:0.0403869361,Pan:0.0533096981):0.0195662351,"
    "Gorilla:0.0546713852):0.0484876986,Pongo:0.0883536544):0.0278989123,Hylobates:0.1066846578):0.0522813662,"
    "(((Macaca_fuscata:0.0155898444,M_mulatta:0.0207915892):0.0292902110,M_fascicularis:0.0472037631):0.0305354391,"
    "M_sylvanus:0.0580602632):0.1147385167):0.0488285344,Saimiri_sciureus:0.1791739986):0.0847946587);"
)

PI = (0.32, 0.3, 0.11, 0.27)
EXCHANGE = (1.5, 4, 0.7, 0.9, 5, 1)
MODELS = {
    "JC69": process(SubstitutionModel()),
    "JC69+I": process(SubstitutionModel(invariant=True), invariant=0.2),
    "K80": process(SubstitutionModel("K80"), kappa=3.5),
    "HKY85+G4": process(SubstitutionModel("HKY85", 4), kappa=3.5, frequencies=PI, alpha=0.7),
    "GTR+G4+I": process(
        SubstitutionModel("GTR", 4, True), exchangeabilities=EXCHANGE, frequencies=PI, alpha=0.4, invariant=0.15
    ),
}


def alignment(name):
    """Taxa and their rows, of a NEXUS file with a row a taxon."""
    text = re.sub(r"\[.*?\]", "", (DATA / name).read_text(), flags=re.S)
    rows = re.search(r"matrix(.*?);", text, re.S | re.I).group(1).split("\n")
    return dict(row.split() for row in rows if row.strip())


def patterns(rows, gap_is_state=False):
    masks = np.array([[STATES[cell] for cell in row.upper()] for row in rows.values()], dtype=np.uint8)
    if not gap_is_state:
        masks[masks == 16] = 15
    masks, counts = np.unique(masks, axis=1, return_counts=True)
    return np.ascontiguousarray(masks), counts.astype(np.float64)


def random_patterns(rng, n, count, planes=4):
    """Patterns that resemble an alignment: most cells of a site are of one state, some of sets, some missing."""
    masks = np.broadcast_to(1 << rng.integers(0, 4, count), (n, count)).copy()
    changed = rng.random((n, count)) < rng.random(count) * 0.6
    masks[changed] = 1 << rng.integers(0, planes, changed.sum())
    vague = rng.random((n, count)) < 0.1
    masks[vague] = rng.integers(1, 16, vague.sum())
    masks[rng.random((n, count)) < 0.05] = 15
    return masks.astype(np.uint8), rng.integers(1, 5, count).astype(np.float64)


def random_trees(rng, n, count, mean=0.1):
    merges = np.empty((count, n - 1, 2), dtype=np.int32)
    for tree in merges:
        live = list(range(n))
        for k in range(n - 1):
            tree[k] = [live.pop(rng.integers(len(live))) for _ in range(2)]
            live.append(n + k)
    lengths = rng.exponential(mean, merges.shape)
    lengths[:, -1, 1] = 0
    return merges, lengths


def rerooted(rng, merges, lengths):
    """The same unrooted trees with the root on another edge, children and merges in another order."""
    out_merges, out_lengths = np.empty_like(merges), np.zeros_like(lengths)
    n = merges.shape[1] + 1
    for t, (tree, along) in enumerate(zip(merges, lengths, strict=True)):
        edges = [(n + k, int(tree[k, c]), along[k, c]) for k in range(n - 2) for c in range(2)]
        edges.append((int(tree[-1, 0]), int(tree[-1, 1]), along[-1].sum()))
        joined, made = [], []

        def below(node, origin, edges=edges, joined=joined, made=made):
            if node < n:
                return node
            ways = [(a + b - node, length) for a, b, length in edges if node in (a, b) and a + b - node != origin]
            rng.shuffle(ways)
            joined.append([below(int(child), node) for child, _ in ways])
            made.append([length for _, length in ways])
            return n + len(joined) - 1

        a, b, length = edges[rng.integers(len(edges))]
        joined.append([below(a, b), below(b, a)])
        made.append([length, 0])
        out_merges[t], out_lengths[t] = joined, made
    return out_merges, out_lengths


def newick(text, taxa):
    """Merges and lengths, `[1, n-1, 2]`, of one tree; a node of more children is resolved by edges of length 0."""
    tokens = re.findall(r"[(),]|:[^(),:]+|[^(),:;\s]+", text.replace("\n", "").split(";")[0])
    merges, lengths, stack = [], [], [[]]
    for token in tokens:
        if token == "(":
            stack.append([])
        elif token == ")":
            children = stack.pop()
            while len(children) > 2 or (len(stack) > 1 and len(children) == 2):
                (a, x), (b, y) = children.pop(), children.pop()
                merges.append((a, b))
                lengths.append((x, y))
                children.append((len(taxa) + len(merges) - 1, 0.0))
            if len(children) == 2:
                (a, x), (b, y) = children
                merges.append((a, b))
                lengths.append((x + y, 0.0))
            else:
                stack[-1].append(children[0])
        elif token.startswith(":"):
            stack[-1][-1] = (stack[-1][-1][0], float(token[1:]))
        elif token != ",":
            stack[-1].append((taxa.index(token), 0.0))
    return np.array([merges], dtype=np.int32), np.array([lengths])


def matrices(model, lengths):
    flat = transition_matrices(model, lengths.reshape(len(lengths), -1))
    return flat.reshape(*lengths.shape, *flat.shape[2:])
