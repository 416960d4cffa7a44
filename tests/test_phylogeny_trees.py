"""Trees as arrays: canonical tables, Newick and NEXUS files against Biopython and DendroPy, and their errors."""

import io

import numpy as np
import pytest

from headwater.phylogeny.data import read_alignment
from headwater.phylogeny.neighbour_joining import distances, neighbour_joining
from headwater.phylogeny.nexus import unquoted
from headwater.phylogeny.pairs import FURTHEST
from headwater.phylogeny.summaries import robinson_foulds
from headwater.phylogeny.tree_files import TreeFileError, parse_trees, read_trees
from headwater.phylogeny.trees import Trees, concatenated, from_canonical
from phylogeny_tree_helpers import DATA, edges, names, needs_data, random_trees

QUARTET = "((a,b),(c,d));"


def rerooted_and_shuffled(trees, rng):
    """The same unrooted trees with the top on another edge, other orders of merges and of children."""
    n = len(trees.taxa)
    merges, lengths = np.empty_like(trees.merges), np.zeros_like(trees.lengths)
    for t in range(len(trees)):
        near = {}
        for k in range(n - 2):
            for side in range(2):
                near.setdefault(n + k, {})[int(trees.merges[t, k, side])] = trees.lengths[t, k, side]
                near.setdefault(int(trees.merges[t, k, side]), {})[n + k] = trees.lengths[t, k, side]
        a, b = map(int, trees.merges[t, -1])
        near.setdefault(a, {})[b] = near.setdefault(b, {})[a] = trees.lengths[t, -1, 0]
        a = int(rng.choice(list(near)))
        b = int(rng.choice(list(near[a])))
        rows = []

        def node(v, parent, near=near, rows=rows):
            children = [w for w in near[v] if w != parent]
            if not children:
                return v
            rng.shuffle(children)
            row = [node(w, v) for w in children], [near[v][w] for w in children]
            rows.append(row)
            return n + len(rows) - 1

        top = [node(a, b), node(b, a)]
        rows.append((top, [near[a][b], 0.0]))
        merges[t], lengths[t] = [row[0] for row in rows], [row[1] for row in rows]
    return Trees(trees.taxa, merges, lengths)


@pytest.mark.parametrize(("n", "topologies"), [(4, 3), (5, 15), (6, 105)])
def test_equal_canonical_tables_are_equal_unrooted_topologies(n, topologies):
    trees = random_trees(names(n), 60 * topologies)
    tables = trees.canonical()
    assert tables.dtype == np.int32
    assert tables.shape == (len(trees), 2 * (n - 1))
    by_table = {}
    for t, table in enumerate(tables):
        by_table.setdefault(table.tobytes(), set()).add(frozenset(edges(trees, t)))
    assert len(by_table) == topologies
    assert all(len(found) == 1 for found in by_table.values())


@pytest.mark.parametrize("n", [3, 4, 5, 12, 70])
def test_where_the_root_stands_and_the_order_of_merges_change_no_canonical_table(n):
    trees = random_trees(names(n), 50)
    other = rerooted_and_shuffled(trees, np.random.default_rng(1))
    assert not np.array_equal(other.merges, trees.merges)
    assert np.array_equal(other.canonical(), trees.canonical())
    assert np.allclose(other.canonical_lengths(), trees.canonical_lengths(), rtol=1e-14)
    # A root within its edge: the two parts are one length.
    parted = trees.lengths.copy()
    parted[:, -1] = trees.lengths[:, -1, :1] * [0.25, 0.75]
    assert np.allclose(Trees(trees.taxa, trees.merges, parted).canonical_lengths(), trees.canonical_lengths())


def test_a_canonical_table_names_each_node_by_its_larger_childs_smallest_leaf():
    # ((0, 3), (1, (2, 4))) at leaf 0: {1, 2, 4} joins 3, so 0 | (3, (1, (2, 4))).
    tree = Trees(names(5), np.array([[[2, 4], [0, 3], [1, 5], [6, 7]]], dtype=np.int32))
    # Node 5 = n is the root (0, rest); {2,4} is b = 4, node 8; {1,2,4} is b = 2, node 6; with 3 it is b = 3, node 7.
    assert tree.canonical().reshape(4, 2).tolist() == [[0, 7], [1, 8], [6, 3], [2, 4]]


@pytest.mark.parametrize("n", [3, 5, 27, 70])
def test_a_canonical_table_makes_the_tree_again_children_before_parents(n):
    trees = random_trees(names(n), 40)
    again = from_canonical(trees.taxa, trees.canonical(), trees.canonical_lengths())
    assert (again.merges < n + np.arange(n - 1)[None, :, None]).all()
    assert np.array_equal(np.sort(again.merges.reshape(40, -1)), np.tile(np.arange(2 * n - 2), (40, 1)))
    for t in range(40):
        assert edges(again, t) == pytest.approx(edges(trees, t), rel=1e-14)
    assert (again.lengths[:, -1, 1] == 0).all()


def test_leaves_can_be_numbered_in_another_order():
    trees = random_trees(names(8), 20)
    order = np.random.default_rng(2).permutation(8)
    other = trees.relabelled([trees.taxa[i] for i in order])
    for t in range(20):
        # Sides without leaf 0 of the other numbering, in the names of the first.
        expected = {frozenset(trees.taxa[i] for i in side) for side in edges(trees, t)}
        found = {frozenset(other.taxa[i] for i in side) for side in edges(other, t)}
        everything = frozenset(trees.taxa)
        assert {min(side, everything - side, key=sorted) for side in expected} == {
            min(side, everything - side, key=sorted) for side in found
        }
    with pytest.raises(ValueError, match="must be the trees' own"):
        trees.relabelled([*trees.taxa[:-1], "other"])


def test_trees_of_another_shape_are_refused():
    with pytest.raises(ValueError, match=r"must be \(2, 3, 2\)"):
        Trees(names(4), np.zeros((2, 4, 2), dtype=np.int32))
    with pytest.raises(ValueError, match="lengths have shape"):
        Trees(names(4), np.zeros((2, 3, 2), dtype=np.int32), np.zeros((1, 3, 2)))


@pytest.mark.parametrize("n", [3, 4, 27, 70])
@pytest.mark.parametrize("with_lengths", [True, False])
def test_newick_and_nexus_files_give_the_same_trees_back(tmp_path, n, with_lengths):
    taxa = ("Homo sapiens", "O'Brien", "a;b", "x[1]", *names(n))[:n]
    trees = random_trees(taxa, 30)
    trees = trees if with_lengths else Trees(taxa, trees.merges)
    trees.write_newick(tmp_path / "newick")
    trees.write_nexus(tmp_path / "nexus", np.arange(30) / 435)
    for file in ("newick", "nexus"):
        sample = read_trees(tmp_path / file, taxa)
        assert sample.trees.taxa == taxa
        assert np.array_equal(sample.trees.canonical(), trees.canonical())
        if with_lengths:
            assert np.allclose(sample.trees.canonical_lengths(), trees.canonical_lengths(), rtol=1e-9)
        else:
            assert sample.trees.lengths is None
    assert np.allclose(sample.weights, np.arange(30) / 435, rtol=1e-5)
    assert sample.names[:2] == ("tree_1", "tree_2")
    # Without taxa the names are those of the file.
    assert read_trees(tmp_path / "nexus").trees.taxa == taxa
    assert set(read_trees(tmp_path / "newick").trees.taxa) == set(taxa)


def test_newick_is_unrooted_with_leaf_0_at_its_top():
    tree = Trees(
        ("a", "b", "c", "d"), np.array([[[1, 2], [4, 0], [5, 3]]], dtype=np.int32), np.ones((1, 3, 2)) * [1, 0]
    )
    assert tree.newick() == ["(a:0,(b:1,c:0):1,d:1);"]
    assert Trees(tree.taxa, tree.merges).newick() == ["(a,(b,c),d);"]


# Biopython refuses a hyphen in a translate block, where MrBayes refuses the quotation marks that would allow it.
@pytest.mark.parametrize("taxa", [names(9), ("Homo sapiens", "O'Brien", "y.2", *names(5))])
def test_biopython_reads_what_we_write(tmp_path, taxa):
    phylo = pytest.importorskip("Bio.Phylo")
    trees = random_trees(taxa, 3)
    trees.write_nexus(tmp_path / "nexus")
    trees.write_newick(tmp_path / "newick")
    for file in ("newick", "nexus"):
        for t, found in enumerate(phylo.parse(tmp_path / file, file)):
            sides = {}
            for clade in found.find_clades():
                leaves = frozenset(taxa.index(unquoted(leaf.name)) for leaf in clade.get_terminals())
                if len(leaves) < len(taxa):
                    leaves = frozenset(range(len(taxa))) - leaves if 0 in leaves else leaves
                    sides[leaves] = clade.branch_length
            assert sides == pytest.approx(edges(trees, t), rel=1e-5)


@pytest.mark.parametrize("taxa", [names(9), ("Homo sapiens", "O'Brien", "x-1", "y.2", *names(5))])
def test_dendropy_reads_what_we_write_and_we_what_it_writes(tmp_path, taxa):
    dendropy = pytest.importorskip("dendropy")
    trees = random_trees(taxa, 5)
    trees.write_nexus(tmp_path / "nexus")
    trees.write_newick(tmp_path / "newick")
    for schema in ("newick", "nexus"):
        found = dendropy.TreeList.get(path=tmp_path / schema, schema=schema, preserve_underscores=True)
        assert {taxon.label for taxon in found.taxon_namespace} == set(taxa)
        if schema == "nexus":
            assert all(tree.is_rooted is False for tree in found)
        back = parse_trees(found.as_string(schema), taxa)
        assert np.array_equal(back.trees.canonical(), trees.canonical())
        assert np.allclose(back.trees.canonical_lengths(), trees.canonical_lengths(), rtol=1e-9)


def test_a_rooted_tree_is_unrooted_by_joining_the_two_edges_at_its_root():
    rooted = parse_trees("(((a:1,b:2):3,c:4):5,(d:6,e:7):8);", list("abcde")).trees
    unrooted = parse_trees("((a:1,b:2):3,c:4,(d:6,e:7):13);", list("abcde")).trees
    assert edges(rooted, 0) == edges(unrooted, 0)
    assert rooted.lengths.sum() == 36


MRBAYES = """#NEXUS
[ID: 1234]
[Param: tree]
begin trees;
   translate
       1 Tarsius_syrichta,
       2 'Lemur catta',
       3 Homo-sapiens,
       4 Pan;
   tree gen.0 = [&U] (2:2.0e-02,(4:1.000000e-01,3:3.0E-1):.05,1:2.e-2);
   tree gen.100 = [&U] (3:2.0e-02[&prob=1.0],(4:1.0e-01,2:0.3):0.05[a (comment), with signs],1:0.02);
   UTREE * 'last one' [p = 0.2, P = 1.0] = [&R] [&W 1/4] ((3:0.1,4:0.1)0.98:0.1,(2:0.1,1:0.1)[&prob=9.9e-01]:0.2);
end;
"""


def test_a_mrbayes_file_reads_with_translation_burn_in_comments_and_weights():
    sample = parse_trees(MRBAYES, ("Pan", "Homo-sapiens", "Lemur catta", "Tarsius_syrichta"))
    assert sample.trees.newick() == [
        "(Pan:0.1,Homo-sapiens:0.3,('Lemur catta':0.02,Tarsius_syrichta:0.02):0.05);",
        "(Pan:0.1,(Homo-sapiens:0.02,Tarsius_syrichta:0.02):0.05,'Lemur catta':0.3);",
        "(Pan:0.1,Homo-sapiens:0.1,('Lemur catta':0.1,Tarsius_syrichta:0.1):0.3);",
    ]
    assert sample.weights.tolist() == [1, 1, 0.25]
    assert sample.names == ("gen.0", "gen.100", "last one")
    assert parse_trees(MRBAYES, burn_in=0.5).names == ("gen.100", "last one")
    with pytest.raises(ValueError, match="at least 0 and below 1"):
        parse_trees(MRBAYES, burn_in=1.0)


@pytest.mark.parametrize(
    "text",
    [
        "0",
        "1",
        "0.1",
        ".5",
        "2.",
        "1e-3",
        "1.25E+2",
        "0.000000123456789",
        "3.0000000000000004",
        "9" * 30,
        "1e-320",
        "7e200",
    ],
)
def test_branch_lengths_read_as_python_reads_them(text):
    tree = parse_trees(f"(a:{text},b:0.5,(c:1,d:1):1);", list("abcd")).trees
    assert edges(tree, 0)[frozenset([1, 2, 3])] == pytest.approx(float(text), rel=1e-15, abs=1e-322)


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("", "no trees"),
        ("((a,b),(c,d),e)", "line 1: a tree without a ';'"),
        ("#NEXUS\nbegin data; end;", "without a TREES block"),
        ("#NEXUS\nbegin trees; end;", "no trees"),
        ("((a,b),(c,d),e);((a,c),(c,d),e);", "line 1, tree 2: 'c' comes twice"),
        ("((a,b),(c,d),e);\n\n((a,b),(c,x),e);", "line 3, tree 2: 'x' is none of the taxa"),
        ("((a,b),(c,d),e);((a,b),c,d);", "tree 2: 4 taxa of 5"),
        ("((a,b),(c,d,e));", "tree 1: a multifurcation: a node of 3 children"),
        ("(a,b,c,d,e);", "tree 1: a multifurcation: a node of 5 children"),
        ("((a,b),(c),d,e);", "tree 1: a node with one child"),
        ("((a,b),(c,d),e;", "not Newick"),
        ("((a,b),(c,d),e));", "not Newick"),
        ("((a,b),(c,,d),e);", "not Newick"),
        ("((a,b),(c,d),e)(a,b);", "not Newick"),
        ("a,b,c,d,e;", "taxa"),
        ("((a:1,b:1):1,(c:1,d:1),e:1);", "6 branch lengths; all edges must have one, or none"),
        ("((a,b),(c,d),e);((a:1,b:1):1,(c:1,d:1):1,e:1);", "tree 1: no branch lengths, where other trees have them"),
        ("((a:1,b:-1):1,(c:1,d:1):1,e:1);", "a branch length that is not a number, or is negative"),
        ("((a:1,b:1x):1,(c:1,d:1):1,e:1);", "a branch length that is not a number"),
        ("((a:1,b:):1,(c:1,d:1):1,e:1);", "a branch length that is not a number"),
        ("((a:1,b:nan):1,(c:1,d:1):1,e:1);", "a branch length that is not a number"),
        ("((a:1,b:1e999):1,(c:1,d:1):1,e:1);", "a branch length that is not a number"),
        ("((a,b),('c,d),e);\n((a,b),(c,d),e);", "without a ';' at its end, or a quotation mark too many"),
        ("((a,b),(c,d),e);\n((a,b),(c,d),e)", "line 1: a tree without a ';'"),
        ("#NEXUS\nbegin trees;\ntree x = ((a,b),('c,d),e);\ntree y = (a,b,c);\nend;", "line 3: a tree without"),
        ("(" * 500 + "a,b),c),d,e);", "not Newick"),
        (b"((a,b),(c,\0d),e);", "not a text file"),
    ],
)  # fmt: skip
def test_a_bad_tree_file_is_an_error_that_says_which_tree_and_why(tmp_path, text, said):
    path = tmp_path / "trees"
    path.write_bytes(text if isinstance(text, bytes) else text.encode())
    with pytest.raises(TreeFileError) as caught:
        read_trees(path, list("abcde"))
    assert said in str(caught.value)
    assert str(path) in str(caught.value)


def test_other_taxa_than_the_alignments_are_listed_both_ways():
    with pytest.raises(TreeFileError) as caught:
        parse_trees("((Homo_sapien,b),(c,d),zz);", ["Homo_sapiens", "b", "c", "d", "e"])
    assert "only in the trees: 'Homo_sapien', 'zz'" in str(caught.value)
    assert "only in the alignment: 'Homo_sapiens', 'e'" in str(caught.value)
    assert "near matches: 'Homo_sapien' and 'Homo_sapiens'" in str(caught.value)


def test_an_underscore_in_a_tree_file_may_stand_for_a_blank_unless_it_is_a_name_of_its_own():
    assert parse_trees("((a_b,b),(c,d),e);", ["a b", "b", "c", "d", "e"]).trees.merges[0, 0].tolist() == [0, 1]
    assert parse_trees("((a_b,'a b'),(c,d),e);", ["a b", "a_b", "c", "d", "e"]).trees.merges[0, 0].tolist() == [1, 0]


def test_a_number_of_the_translate_block_goes_before_a_taxon_of_that_name():
    text = "#NEXUS\nbegin trees;\ntranslate 1 2, 2 1, 3 c, 4 d;\ntree t = ((1,c),2,4);\nend;"
    assert parse_trees(text, ["1", "2", "c", "d"]).trees.merges[0, 0].tolist() == [1, 2]


def test_a_tree_file_too_large_is_not_read(tmp_path, monkeypatch):
    monkeypatch.setattr("headwater.phylogeny.tree_files.LARGEST_FILE", 10)
    (tmp_path / "trees").write_text(QUARTET)
    with pytest.raises(TreeFileError, match="at most 10 are read"):
        read_trees(tmp_path / "trees")


def test_batches_of_trees_are_chosen_from_and_put_together():
    trees = random_trees(names(6), 10)
    assert np.array_equal(concatenated([trees[:4], trees[4:]]).merges, trees.merges)
    assert np.array_equal(trees[np.array([3, 1])].lengths, trees.lengths[[3, 1]])
    order = trees.taxa[::-1]
    both = concatenated([trees, trees.relabelled(order)])
    assert np.array_equal(both.canonical()[:10], both.canonical()[10:])


def joined(taxa, away):
    merges, lengths = neighbour_joining(away[None])
    return Trees(tuple(taxa), merges.numpy(), lengths.double().numpy())


@pytest.mark.parametrize("n", [4, 12, 40])
def test_neighbour_joining_finds_the_tree_of_distances_that_fit_one(n):
    trees = random_trees(names(n), 5, seed=n)
    for t in range(5):
        away = np.zeros((n, n))
        for side, length in edges(trees, t).items():
            inside = np.isin(np.arange(n), list(side))
            away += length * (inside[:, None] != inside)
        assert edges(joined(trees.taxa, away), 0) == pytest.approx(edges(trees, t), abs=1e-6)


def test_neighbour_joining_agrees_with_biopython_and_has_no_negative_length():
    construction = pytest.importorskip("Bio.Phylo.TreeConstruction")
    phylo = pytest.importorskip("Bio.Phylo")
    rng = np.random.default_rng(5)
    away = rng.uniform(0.5, 1, (10, 10))
    away = away + away.T
    np.fill_diagonal(away, 0)
    matrix = construction.DistanceMatrix(list(names(10)), [away[i, : i + 1].tolist() for i in range(10)])
    text = io.StringIO()
    their = construction.DistanceTreeConstructor().nj(matrix)
    for clade in their.find_clades():
        clade.branch_length, clade.name = None, clade.name if clade.is_terminal() else None
    phylo.write(their, text, "newick", plain=True)
    found = joined(names(10), away)
    assert robinson_foulds(found, parse_trees(text.getvalue(), names(10)).trees).item() == 0
    inner = np.delete(found.lengths.reshape(-1), -1)
    assert inner.min() > 0


def test_distances_count_the_sites_where_both_leaves_say_something():
    masks = np.array([[1, 1, 1, 1, 15], [1, 1, 2, 15, 1], [8, 8, 8, 8, 8], [15, 15, 15, 15, 15]], np.uint8)
    away = distances(masks, np.array([[1, 1, 1, 1, 1], [1, 1, 4, 1, 1]], np.float64))
    assert away[0, 0, 1] == pytest.approx(-3 / 4 * np.log(1 - 4 / 3 * (1 / 3)))
    assert away[1, 0, 1] == pytest.approx(-3 / 4 * np.log(1 - 4 / 3 * (4 / 6)))
    assert away[0, 0, 2] == away[0, 0, 3] == pytest.approx(-3 / 4 * np.log(1 - 4 / 3 * FURTHEST))  # or as far as that
    assert (np.diagonal(away[:, :3, :3], axis1=1, axis2=2) == 0).all()


@needs_data
@pytest.mark.parametrize(("name", "total"), [("DS1", 0.41), ("DS3", 4.03), ("DS6", 0.72), ("DS8", 1.42)])
def test_maximum_likelihood_trees_of_iqtree_read_with_their_length(name, total):
    taxa = read_alignment(DATA / f"{name}.nex").taxa
    trees = read_trees(DATA / "peer_runs" / "ml" / f"iq_{name}.treefile", taxa).trees
    assert trees.lengths.sum() == pytest.approx(total, abs=0.006)


@needs_data
def test_neighbour_joining_comes_near_the_maximum_likelihood_tree_of_real_data():
    for name, most in (("DS1", 24), ("DS3", 12)):
        alignment = read_alignment(DATA / f"{name}.nex")
        patterns = alignment.patterns()
        found = joined(alignment.taxa, distances(patterns.masks, patterns.weights[None])[0])
        best = read_trees(DATA / "peer_runs" / "ml" / f"iq_{name}.treefile", alignment.taxa).trees
        assert robinson_foulds(found, best).item() <= most
