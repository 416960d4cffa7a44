"""Summaries of tree samples: against sets of leaves counted in Python, DendroPy, MrBayes, and published runs."""

import io
import shutil
import subprocess

import numpy as np
import pytest

from headwater.phylogeny.data import primates, read_alignment
from headwater.phylogeny.summaries import compare, consensus, robinson_foulds, split_frequencies, topologies
from headwater.phylogeny.tree_files import parse_trees, read_trees
from headwater.phylogeny.trees import Trees
from phylogeny_tree_helpers import DATA, edges, names, needs_data, peaked, random_trees


def inner(trees, t):
    return {side for side in edges(trees, t) if 1 < len(side) < len(trees.taxa) - 1}


@pytest.mark.parametrize("n", [4, 9, 64, 65, 130])
def test_split_frequencies_and_mean_lengths_are_those_counted_tree_by_tree(n):
    trees, weights = peaked(n, 60)
    share = weights / weights.sum()
    frequency, length = {}, {}
    for t in range(len(trees)):
        for side, size in edges(trees, t).items():
            frequency[side] = frequency.get(side, 0) + share[t]
            length[side] = length.get(side, 0) + share[t] * size
    table = split_frequencies(trees, weights)
    found = {
        frozenset(i for i in range(n) if int(split[i // 64]) >> (i % 64) & 1): (f, size)
        for split, f, size in zip(table.splits, table.frequencies, table.lengths, strict=True)
    }
    expected = {side: f for side, f in frequency.items() if 1 < len(side) < n - 1}
    assert {side: f for side, (f, _) in found.items()} == pytest.approx(expected)
    assert {side: size for side, (_, size) in found.items()} == pytest.approx(
        {side: length[side] / frequency[side] for side in expected}
    )
    leaves = [length[frozenset([i]) if i else frozenset(range(1, n))] for i in range(n)]
    assert table.leaf_lengths == pytest.approx(leaves)
    assert (np.diff(table.frequencies) <= 0).all()
    assert set(table.members(0)) == {trees.taxa[i] for i in next(iter(found))}


@pytest.mark.parametrize("n", [4, 20, 70])
def test_robinson_foulds_distances_are_the_splits_that_one_of_two_trees_has(n):
    trees, _ = peaked(n, 25)
    expected = [[len(inner(trees, t) ^ inner(trees, u)) for u in range(25)] for t in range(25)]
    assert robinson_foulds(trees).tolist() == expected
    assert np.array_equal(robinson_foulds(trees[:5], trees[5:]), np.array(expected)[:5, 5:])


def test_robinson_foulds_distances_are_dendropys():
    dendropy = pytest.importorskip("dendropy")
    treecompare = pytest.importorskip("dendropy.calculate.treecompare")
    trees = random_trees(names(16), 8)
    text = "[&U] " + "\n[&U] ".join(trees.newick())
    theirs = dendropy.TreeList.get(data=text, schema="newick", preserve_underscores=True)
    assert robinson_foulds(trees).tolist() == [[treecompare.symmetric_difference(a, b) for b in theirs] for a in theirs]


@pytest.mark.parametrize("threshold", [0.5, 0.7, 1.0])
def test_the_consensus_has_the_splits_above_the_threshold_with_support_and_mean_lengths(threshold):
    trees, weights = peaked(12, 80)
    tree = consensus(trees, weights, threshold)
    table = split_frequencies(trees, weights)
    n = 12
    below = {}

    def leaves(node):
        if node not in below:
            parts = [leaves(child) for child in tree.children[node - n]] if node >= n else [{node}]
            below[node] = frozenset().union(*parts)
        return below[node]

    assert leaves(n) == frozenset(range(n))
    found = {leaves(n + i): (tree.support[i], tree.lengths[n + i]) for i in range(1, len(tree.children))}
    expected = {
        frozenset(trees.taxa.index(name) for name in table.members(k)): (table.frequencies[k], table.lengths[k])
        for k in range(len(table.splits))
        if table.frequencies[k] > min(threshold, 1 - 1e-9)
    }
    assert found.keys() == expected.keys()
    assert 0 < len(found) < n - 3 or threshold == 1
    for side, values in found.items():
        assert values == pytest.approx(expected[side])
    assert tree.lengths[:n] == pytest.approx(table.leaf_lengths)


def test_the_consensus_is_dendropys_with_its_support_and_biopython_reads_it():
    dendropy = pytest.importorskip("dendropy")
    trees, _ = peaked(14, 40)
    text = "[&U] " + "\n[&U] ".join(trees.newick())
    sample = dendropy.TreeList.get(data=text, schema="newick", preserve_underscores=True)
    theirs = sample.consensus(min_freq=0.5 + 1e-9, set_support_as_node_label=True)
    ours = dendropy.Tree.get(
        data="[&U] " + consensus(trees).newick(), schema="newick", preserve_underscores=True,
        taxon_namespace=sample.taxon_namespace,
    )  # fmt: skip
    support = []
    for tree in (ours, theirs):
        tree.encode_bipartitions()
        support.append({
            edge.bipartition.split_bitmask: float(edge.head_node.label)
            for edge in tree.postorder_internal_edge_iter()
            if edge.head_node.label and edge.tail_node is not None
        })  # fmt: skip
    assert len(support[0]) > 3
    assert support[0] == pytest.approx(support[1], abs=1e-4)
    phylo = pytest.importorskip("Bio.Phylo")
    read = phylo.read(io.StringIO(consensus(trees).newick()), "newick")
    assert {leaf.name for leaf in read.get_terminals()} == set(trees.taxa)
    assert {round(clade.confidence, 4) for clade in read.get_nonterminals()[1:]} <= {
        round(value, 4) for value in support[0].values()
    }


def test_a_consensus_below_one_half_is_refused():
    with pytest.raises(ValueError, match="must be from"):
        consensus(random_trees(names(5), 3), threshold=0.4)


def test_a_consensus_without_majority_splits_is_a_star_and_of_one_tree_is_that_tree():
    star = parse_trees("((a,b),(c,d),e);((a,c),(b,d),e);((a,d),(b,e),c);").trees
    assert consensus(star).newick() == "(a,b,c,d,e);"
    tree = random_trees(names(30), 1)
    again = parse_trees(consensus(tree).newick(), tree.taxa).trees
    assert edges(again, 0) == pytest.approx(edges(tree, 0), rel=1e-8)


def test_the_topology_table_holds_each_topology_once_with_its_share_and_mean_lengths():
    trees, weights = peaked(8, 200)
    table = topologies(trees, weights)
    share = weights / weights.sum()
    groups = {}
    for t in range(200):
        groups.setdefault(frozenset(edges(trees, t)), []).append(t)
    assert len(table.trees) == len(groups)
    assert table.probabilities == pytest.approx(sorted((share[g].sum() for g in groups.values()), reverse=True))
    assert np.array_equal(table.trees.canonical()[table.index], trees.canonical())
    for k in range(len(groups)):
        members = groups[frozenset(edges(table.trees, k))]
        assert set(np.flatnonzero(table.index == k)) == set(members)
        mean = {
            side: sum(share[t] * edges(trees, t)[side] for t in members) / share[members].sum()
            for side in edges(table.trees, k)
        }
        assert edges(table.trees, k) == pytest.approx(mean)
    assert table.cumulative == pytest.approx(np.cumsum(table.probabilities))
    assert table.simpson == pytest.approx(1 - (table.probabilities**2).sum())


def test_the_credible_set_is_the_fewest_topologies_that_hold_the_share():
    trees = parse_trees("((a,b),c,d);((a,c),b,d);((a,d),b,c);").trees
    table = topologies(trees, [5, 3, 2])
    assert table.probabilities.tolist() == pytest.approx([0.5, 0.3, 0.2])
    assert [table.credible(share) for share in (0.4, 0.5, 0.51, 0.8, 0.95, 1.0)] == [1, 1, 2, 2, 3, 3]


def test_two_samples_are_compared_as_by_hand():
    # Splits (leaf 0 = a on the other side): cd.. in sample 1 with 0.6, 0.35, 0.05; in sample 2 with 0.2, 0.8, 0.
    trees = parse_trees("((a,b),c,d);((a,c),b,d);((a,d),b,c);").trees
    found = compare(trees, trees[:2], [0.6, 0.35, 0.05], [1, 4])
    assert found.split_deviation == pytest.approx((0.4 + 0.45) / 2 / np.sqrt(2))  # 0.05 is below 0.1 in both
    assert found.largest_deviation == pytest.approx(0.45 / np.sqrt(2))
    assert found.topology_distance == pytest.approx((0.4 + 0.45 + 0.05) / 2)
    assert found.covered == pytest.approx(1.0)
    assert compare(trees[:1], trees, [1], [0.6, 0.35, 0.05]).covered == pytest.approx(0.6)
    expected = np.corrcoef([0.6, 0.35, 0.05], [0.2, 0.8, 0])[0, 1]
    assert found.split_correlation == pytest.approx(expected)
    assert found.topology_correlation == pytest.approx(expected)
    same = compare(trees, trees, [3, 2, 1], [6, 4, 2])
    assert (same.split_deviation, same.topology_distance) == pytest.approx((0, 0), abs=1e-12)
    assert np.isnan(compare(trees[:1], trees[:1]).split_correlation)


def test_samples_with_taxa_in_another_order_compare_equal():
    trees, weights = peaked(10, 50)
    other = trees.relabelled(trees.taxa[::-1])
    assert compare(trees, other, weights, weights).topology_distance == pytest.approx(0, abs=1e-12)


@pytest.mark.parametrize("weights", [[1.0, 2], [1, -1, 3], [0, 0, 0], [1, np.nan, 1]])
def test_weights_that_are_none_are_refused(weights):
    with pytest.raises(ValueError, match="3 finite numbers"):
        topologies(random_trees(names(5), 3), weights)


@pytest.mark.skipif(shutil.which("mb") is None, reason="MrBayes (mb) is not installed")
def test_mrbayes_reads_our_trees_and_finds_the_same_deviation_of_split_frequencies(tmp_path):
    taxa = primates().taxa
    trees, _ = peaked(len(taxa), 60)
    trees = Trees(taxa, trees.merges, trees.lengths)
    trees[:30].write_nexus(tmp_path / "run.run1.t")
    trees[30:].write_nexus(tmp_path / "run.run2.t")
    rows = "\n".join(f"{name} {'ACGT' * 2}" for name in taxa)
    (tmp_path / "data.nex").write_text(
        f"#NEXUS\nbegin data;\ndimensions ntax=12 nchar=8;\nformat datatype=dna;\nmatrix\n{rows}\n;\nend;\n"
    )
    commands = (
        "set autoclose=yes nowarn=yes\nexecute data.nex\n"
        "sumt filename=run nruns=2 relburnin=no burnin=0 minpartfreq=0.1\nquit\n"
    )
    done = subprocess.run(["mb"], input=commands, cwd=tmp_path, capture_output=True, text=True, timeout=60, check=False)
    found = compare(trees[:30], trees[30:])
    assert f"Average standard deviation of split frequencies = {found.split_deviation:.6f}" in done.stdout
    assert f"Maximum standard deviation of split frequencies = {found.largest_deviation:.6f}" in done.stdout
    # And what it writes, we read: the table of topologies and their probabilities.
    theirs = read_trees(tmp_path / "run.trprobs", taxa)
    assert compare(trees, theirs.trees, None, theirs.weights).topology_distance < 1e-5


@needs_data
def test_the_published_posterior_of_ds1_reads_with_its_numbers():
    folder = DATA / "mrbayes_reference"
    lines = (folder / "DS1.topo_posterior.tsv").read_text().splitlines()
    taxa = lines[1].split()[2:]
    rows = [line.split("\t") for line in lines if not line.startswith("#")]
    translate = ", ".join(f"{i} {name}" for i, name in enumerate(taxa, start=1))
    statements = "\n".join(f"tree t{i} = {row[1]}" for i, row in enumerate(rows))
    sample = parse_trees(f"#NEXUS\nbegin trees;\ntranslate {translate};\n{statements}\nend;")
    assert set(taxa) == set(read_alignment(DATA / "DS1.nex").taxa)
    weights = [float(row[0]) for row in rows]
    table = topologies(sample.trees, weights)
    assert (len(table.trees), table.credible()) == (2784, 42)
    assert table.simpson == pytest.approx(0.868, abs=5e-4)
    assert table.probabilities[0] == pytest.approx(0.278, abs=5e-4)
    found = split_frequencies(sample.trees, weights)
    frequency = {int(split[0]): share for split, share in zip(found.splits, found.frequencies, strict=True)}
    splits = [line.split() for line in (folder / "DS1.split_freq.tsv").read_text().splitlines() if line[0] != "#"]
    assert frequency == pytest.approx({int(row[0], 16): float(row[1]) for row in splits}, abs=1e-6)
    # A short run of ours against it: total variation .096, covered .977 and largest split error .076 were published.
    short = read_trees(DATA / "peer_runs" / "mrbayes" / "ds1_short_150cpus.trprobs", taxa)
    result = compare(short.trees, sample.trees, short.weights, weights)
    assert result.topology_distance == pytest.approx(0.096, abs=5e-4)
    assert result.covered == pytest.approx(0.977, abs=5e-4)
    assert result.largest_deviation * np.sqrt(2) == pytest.approx(0.076, abs=5e-4)
