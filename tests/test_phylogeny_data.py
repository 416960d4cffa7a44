"""Alignments: every format reads the same, every fault is an error that says where, patterns lose nothing."""

import sys

import numpy as np
import pytest

from headwater.phylogeny.alignment_files import AlignmentError
from headwater.phylogeny.data import GAP, Alignment, Partition, primates, read_alignment, taxa_difference
from phylogeny_tree_helpers import DATA, needs_data

TAXA = ("Homo_sapiens", "Pan", "Gorilla", "Pongo_p.", "Mus")
SEQUENCES = ("ACGTRYKMSW-?", "ACGTNNBDHVXA", "acgtuacgtacg", "A-G-A-G-A-G-", "TTTTGGGGCCCC")
# By hand: A 1, C 2, G 4, T 8; R = AG, Y = CT, K = GT, M = AC, S = CG, W = AT; B, D, H, V = all but A, C, G, T.
STATES = np.array(
    [
        [1, 2, 4, 8, 5, 10, 12, 3, 6, 9, 16, 15],
        [1, 2, 4, 8, 15, 15, 14, 13, 11, 7, 15, 1],
        [1, 2, 4, 8, 8, 1, 2, 4, 8, 1, 2, 4],
        [1, 16, 4, 16, 1, 16, 4, 16, 1, 16, 4, 16],
        [8, 8, 8, 8, 4, 4, 4, 4, 2, 2, 2, 2],
    ],
    dtype=np.uint8,
)


def fasta(names=TAXA, sequences=SEQUENCES):
    return "".join(f">{name} some words\n{text[:7]}\n{text[7:]}\n" for name, text in zip(names, sequences, strict=True))


def phylip(interleaved, strict):
    width = 10 if strict else 14
    names = [name[:10] for name in TAXA] if strict else TAXA
    lines = [f" {len(TAXA)} 12"]
    for name, text in zip(names, SEQUENCES, strict=True):
        first = f"{name:{width}}{text[:4]} {text[4:8]}"
        lines += [first] if interleaved else [first, f"   {text[8:]}"]
    return "\n".join(lines + ([""] + [f"   {text[8:]}" for text in SEQUENCES] if interleaved else [])) + "\n"


def nexus(rows, options="datatype=dna gap=- missing=?", sites=12, more=""):
    start = f"#NEXUS\n[made by ; hand]\nBegin data;\n dimensions ntax=5 nchar={sites};\n format {options};\n"
    return f"{start} matrix\n{rows}\n;\nend;\n{more}"


def with_fourth(text):
    return fasta(sequences=(*SEQUENCES[:3], text, SEQUENCES[4]))


def plain_rows(names=TAXA, sequences=SEQUENCES):
    return "\n".join(f"{name}  {text}" for name, text in zip(names, sequences, strict=True))


def read(tmp_path, text, **options):
    path = tmp_path / "alignment"
    path.write_bytes(text if isinstance(text, bytes) else text.encode())
    return read_alignment(path, **options)


def error(tmp_path, text, **options):
    with pytest.raises(AlignmentError) as caught:
        read(tmp_path, text, **options)
    assert str(tmp_path / "alignment") in str(caught.value)
    return str(caught.value)


@pytest.mark.parametrize(
    "text",
    [
        fasta(),
        "\ufeff" + fasta().replace("\n", "\r\n"),
        phylip(False, False),
        phylip(True, False),
        nexus(plain_rows()),
        nexus("\n".join(f"{name}\n {text[:5]}\n {text[5:]}" for name, text in zip(TAXA, SEQUENCES, strict=True))),
        nexus(
            plain_rows(sequences=[s[:5] for s in SEQUENCES])
            + "\n\n"
            + plain_rows(sequences=[s[5:] for s in SEQUENCES]),
            "interleave datatype=dna",
        ),
        nexus(plain_rows(sequences=[s.replace("-", "!").replace("?", "*") for s in SEQUENCES]), "gap=! missing=*"),
        nexus(plain_rows().replace("ACGTRY", "ACGT{AG}(CT)").replace("Pan  A", "Pan [a comment]  A")),
    ],
    ids=["fasta", "windows", "sequential", "interleaved", "nexus", "wrapped", "blocks", "symbols", "sets"],
)
def test_one_alignment_reads_the_same_from_every_format(tmp_path, text):
    found = read(tmp_path, text)
    assert found.taxa == TAXA
    assert np.array_equal(found.states, STATES)
    assert found.source == tmp_path / "alignment"


@pytest.mark.parametrize("interleaved", [False, True])
def test_strict_phylip_names_fill_ten_columns_and_may_hold_blanks(tmp_path, interleaved):
    found = read(tmp_path, phylip(interleaved, True).replace("Homo_sapie", "Homo sapie"))
    assert found.taxa == ("Homo sapie", "Pan", "Gorilla", "Pongo_p.", "Mus")
    assert np.array_equal(found.states, STATES)


def test_a_match_character_stands_for_the_first_taxons_letter(tmp_path):
    rows = plain_rows(sequences=["ACGTACGTACGT", *["..A.-....?.."] * 4])
    expected = [1, 2, 1, 8, 16, 2, 4, 8, 1, 15, 4, 8]
    assert (read(tmp_path, nexus(rows, "datatype=dna matchchar=.")).states[1:] == expected).all()
    assert "matchchar" in error(tmp_path, nexus(rows))


def test_quoted_names_keep_blanks_and_quotation_marks(tmp_path):
    names = ("'Homo sapiens'", "'O''Brien; (x)'", "Gorilla", "Pongo", "Mus")
    assert read(tmp_path, nexus(plain_rows(names))).taxa[:2] == ("Homo sapiens", "O'Brien; (x)")


def test_partitions_and_character_sets_divide_the_sites(tmp_path):
    sets = "begin sets; charset first = 1-12\\3; charset 'second one' = 2-.\\3; charset third=3-12\\3; end;"
    found = read(tmp_path, nexus(plain_rows(), more=sets))
    assert [(part.name, part.sites.tolist()) for part in found.partitions] == [
        ("first", [0, 3, 6, 9]),
        ("second one", [1, 4, 7, 10]),
        ("third", [2, 5, 8, 11]),
    ]
    more = "begin mrbayes; charset a=1-4; charset b=5-12; charset c=2; partition p = 2: a, b; set partition=p; end;"
    assert [part.name for part in read(tmp_path, nexus(plain_rows(), more=more)).partitions] == ["a", "b"]
    partial = more.replace("b=5-12", "b=6-12")
    assert "partition into a, b: its sets must be disjoint and together be all 12" in error(
        tmp_path, nexus(plain_rows(), more=partial)
    )
    overlapping = "begin sets; charset a = 1-8; charset b = 5-12; end;"
    assert [part.name for part in read(tmp_path, nexus(plain_rows(), more=overlapping)).partitions] == ["all"]


def test_of_a_mixed_matrix_the_dna_part_is_taken(tmp_path):
    rows = plain_rows(sequences=["01{01}2" + text for text in SEQUENCES])
    more = "begin mrbayes; charset shape = 1-4; charset a=5-8; charset b=9-16; partition p=3:shape,a,b; end;"
    found = read(tmp_path, nexus(rows, "datatype=mixed(standard:1-4,DNA:5-16)", 16, more))
    assert np.array_equal(found.states, STATES)
    assert [(part.name, part.sites.tolist()) for part in found.partitions] == [
        ("a", [*range(4)]),
        ("b", [*range(4, 12)]),
    ]
    assert "without a DNA part" in error(tmp_path, nexus(rows, "datatype=mixed(standard:1-4,protein:5-16)", 16))


@pytest.mark.parametrize(
    ("text", "said"),
    [
        (b"", "empty"),
        (b" \n\n", "empty"),
        (b"\x1f\x8b\x08\x00abc", "not a text file"),
        (b">a\nAC\0T\n", "not a text file"),
        (b"\xff\xfe>\xc3\x28", "not a text file"),
        ("ACGT\nACGT\n", "line 1: starts with 'ACGT'; legal are FASTA"),
        ("ACGT\n>a\nACGT\n", "line 1: starts with 'ACGT'"),
        (fasta().replace(">Pan some words", ">"), "line 4: a record without a name"),
        (fasta(TAXA[:3], SEQUENCES[:3]), "3 taxa; an unrooted tree to infer needs at least 4"),
        (fasta(("a", "b", "a", "c", "d")), "line 7, taxon 'a': this name was already given in line 1"),
        (fasta(sequences=(*SEQUENCES[:4], "TTTTGGGG")), "line 13, taxon 'Mus': 8 sites; 12 has the first taxon"),
        (with_fourth("ACGTACGTAJGT"), "line 12, taxon 'Pongo_p.', position 10: letter 'J'"),
        (with_fourth("ACGTΩCGTACGT"), "line 11, taxon 'Pongo_p.', position 5: letter 'Ω'"),
        (with_fourth("--NN??XX----"), "line 10, taxon 'Pongo_p.': gaps and unknown"),
        (fasta(sequences=["MKVLEEFPQILW"] * 5), "protein alignment"),
        (nexus(plain_rows(), "datatype=protein"), "line 5: datatype=protein; DNA is what is supported"),
        (nexus(plain_rows(), "datatype=dna transpose"), "line 5: a matrix with taxa in columns"),
        (nexus(plain_rows()).replace("matrix", "other"), "no MATRIX"),
        (nexus(plain_rows(), sites=13), "taxon 'Homo_sapiens': 12 sites; 13 are declared"),
        (nexus(plain_rows().replace("ACGTRY", "ACGTZY")), "line 7, taxon 'Homo_sapiens', position 5: letter 'Z'"),
        (nexus(plain_rows().replace("TTTT", "T{AZ}TT")), "line 11, taxon 'Mus': set {AZ}"),
        ("5 12\nPan ACGT\n", "line 1: 5 taxa are declared, 1 lines of data follow"),
        (phylip(True, False).replace("5 12", "5 13"), "taxon 'Homo_sapiens': 12 sites; 13 are declared"),
        (phylip(True, False).replace("TTTT GGGG", "TTTT GJGG"), "line 6, taxon 'Mus', position 6: letter 'J'"),
        (phylip(False, False).replace("Pan ", "Mus "), "line 10, taxon 'Mus': this name was already given in line 4"),
    ],
)  # fmt: skip
def test_a_bad_file_is_an_error_that_says_where_and_what_is_legal(tmp_path, text, said):
    assert said in error(tmp_path, text)


def test_a_letter_error_lists_the_legal_letters(tmp_path):
    said = error(tmp_path, fasta(sequences=(*SEQUENCES[:4], "J" + SEQUENCES[4][1:])))
    assert "legal are A, C, G, T, U, the ambiguity codes R Y S W K M B D H V N X, '?' and '-'" in said


def test_a_file_too_large_is_not_read(tmp_path, monkeypatch):
    monkeypatch.setattr("headwater.phylogeny.data.LARGEST_FILE", 100)
    assert "at most 100 are read" in error(tmp_path, fasta())


def test_other_formats_are_read_with_biopython(tmp_path, monkeypatch):
    align_io = pytest.importorskip("Bio.AlignIO")
    (tmp_path / "source").write_text(fasta())
    align_io.convert(tmp_path / "source", "fasta", tmp_path / "alignment", "clustal")
    assert np.array_equal(read_alignment(tmp_path / "alignment", "clustal").states, STATES)
    assert "as 'stockholm'" in error(tmp_path, fasta(), format="stockholm")
    monkeypatch.setitem(sys.modules, "Bio", None)
    with pytest.raises(ImportError, match=r"pip install 'headwater\[phylogeny\]'"):
        read_alignment(tmp_path / "source", "clustal")


def test_nexus_as_biopython_writes_and_reads_it(tmp_path):
    align_io = pytest.importorskip("Bio.AlignIO")
    source = tmp_path / "source"
    source.write_text(fasta())
    records = align_io.read(source, "fasta")
    for record in records:
        record.annotations["molecule_type"] = "DNA"
    align_io.write([records], tmp_path / "alignment", "nexus")
    assert np.array_equal(read_alignment(tmp_path / "alignment").states, STATES)


@pytest.mark.parametrize("gaps", ["missing", "state"])
def test_patterns_are_the_distinct_columns_of_each_partition_with_their_counts(gaps):
    rng = np.random.default_rng(3)
    states = rng.choice(np.array([1, 2, 15, GAP], dtype=np.uint8), (4, 400))
    parts = (Partition("even", np.arange(0, 400, 2)), Partition("odd", np.arange(1, 400, 2)))
    found = Alignment(("a", "b", "c", "d"), states, parts).patterns(gaps)
    expected: dict[tuple[int, ...], int] = {}
    for site in range(400):
        column = [15 if gaps == "missing" and x == GAP else int(x) for x in states[:, site]]
        if set(column) != {15}:
            expected[(site % 2, *column)] = expected.get((site % 2, *column), 0) + 1
    keys = [(int(part), *map(int, column)) for part, column in zip(found.partition, found.masks.T, strict=True)]
    assert dict(zip(keys, found.weights, strict=True)) == expected
    assert len(set(keys)) == len(keys)
    assert found.masks.dtype == np.uint8
    assert found.weights.dtype == np.float64


def test_patterns_refuse_another_word_for_gaps():
    with pytest.raises(ValueError, match="must be 'missing' or 'state'"):
        primates().patterns("fifth")


def test_partitions_that_leave_sites_out_are_refused():
    with pytest.raises(ValueError, match="together be all sites"):
        Alignment(("a", "b"), np.ones((2, 3), dtype=np.uint8), (Partition("a", np.arange(2)),))


def test_the_difference_of_two_sets_of_taxa_is_listed_both_ways_with_near_matches():
    said = taxa_difference({"Homo sapiens", "Pan"}, {"Homo_sapiens", "Pan", "Mus"})
    assert "only in the trees: 'Homo sapiens'" in said
    assert "only in the alignment: 'Homo_sapiens', 'Mus'" in said
    assert "near matches: 'Homo sapiens' and 'Homo_sapiens'" in said
    assert taxa_difference({"a"}, {"a"}) == ""


def test_the_primates_come_with_the_package():
    found = primates()
    assert (len(found.taxa), found.sites, found.patterns().masks.shape) == (12, 898, (12, 413))
    assert found.taxa[0] == "Tarsius_syrichta"


@needs_data
@pytest.mark.parametrize(
    ("name", "taxa", "sites", "patterns"),
    [
        ("DS1", 27, 1949, 934), ("DS2", 29, 2520, 1246), ("DS3", 36, 1812, 1020), ("DS4", 41, 1137, 768),
        ("DS5", 50, 378, 256), ("DS6", 50, 1133, 489), ("DS7", 59, 1824, 1037), ("DS8", 64, 1008, 406),
        ("primates", 12, 898, 413),
    ],
)  # fmt: skip
def test_the_published_alignments_have_the_published_sizes(name, taxa, sites, patterns):
    found = read_alignment(DATA / f"{name}.nex")
    distinct = found.patterns()
    # MrBayes counts the column of unknown nucleotides alone as a pattern; it carries nothing and we leave it out.
    unknown = int(distinct.weights.sum() < found.sites)
    assert (len(found.taxa), found.sites, distinct.masks.shape[1] + unknown) == (taxa, sites, patterns)


@needs_data
def test_published_nexus_files_read_as_in_biopython():
    align_io = pytest.importorskip("Bio.AlignIO")
    for name in ("DS1", "DS6", "primates"):
        found = read_alignment(DATA / f"{name}.nex")
        records = align_io.read(DATA / f"{name}.nex", "nexus")
        assert [record.id for record in records] == list(found.taxa)
        gaps = np.array([[letter == "-" for letter in record.seq] for record in records])
        assert np.array_equal(gaps, found.states == GAP)


@needs_data
def test_the_primates_that_come_with_the_package_are_the_published_ones():
    found = read_alignment(DATA / "primates.nex")
    assert found.taxa == primates().taxa
    assert np.array_equal(found.states, primates().states)
