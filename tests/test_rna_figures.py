"""RNA figures: what they draw is what ViennaRNA and the information content say, and they are safe, valid SVG."""

import math
import re
import xml.etree.ElementTree as ET
from collections import Counter

import numpy as np
import pytest

from headwater.sequences.figures import BASE_COLOURS, duplex_svg, logo_svg, structure_svg

SVG = "{http://www.w3.org/2000/svg}"
MIR155 = "UUAAUGCUAAUCGUGAUAGGGGUU"


def parse(svg: str) -> ET.Element:
    root = ET.fromstring(svg)
    assert root.tag == f"{SVG}svg"
    return root


def letters(root: ET.Element) -> list[tuple[float, float, str]]:
    bold = [text for text in root.iter(f"{SVG}text") if text.get("font-weight") == "700"]
    return [(float(text.get("x", "")), float(text.get("y", "")), text.text or "") for text in bold]


def bars(root: ET.Element) -> int:
    return sum(path.get("stroke-width") == "2" for path in root.iter(f"{SVG}path"))


def dots(root: ET.Element) -> int:
    return sum(circle.get("r") == "2.6" for circle in root.iter(f"{SVG}circle"))


def test_a_duplex_is_drawn_antiparallel_with_its_pairs_and_energy() -> None:
    pytest.importorskip("RNA")
    design = "CAGUCUGAUUAGCA"  # 12 pairs with miR-155, two of them wobbles, and a bulge
    root = parse(duplex_svg(design, MIR155, "hsa-miR-155-5p"))
    rows = letters(root)
    upper = "".join(base for x, y, base in sorted(rows) if y < 84)
    lower = "".join(base for x, y, base in sorted(rows) if y > 84)
    assert upper == MIR155
    assert lower == design[::-1]
    assert (bars(root), dots(root)) == (10, 2)
    texts = [text.text for text in root.iter(f"{SVG}text")]
    assert "hsa-miR-155-5p" in texts
    assert "−13.0 kcal/mol" in texts


def test_bars_stand_between_bases_that_pair() -> None:
    pytest.importorskip("RNA")
    for design in ("CAGUCUGAUUAGCA", "GCCCCUGAUUAGCA", "ACGUACGUACGUAC"):
        root = parse(duplex_svg(design, MIR155))
        column: dict[float, dict[bool, str]] = {}
        for x, y, base in letters(root):
            column.setdefault(x, {})[y < 84] = base
        joined = [
            float(re.match(r"M([\d.]+)", path.get("d", ""))[1])  # type: ignore[index]
            for path in root.iter(f"{SVG}path")
            if path.get("stroke-width") == "2"
        ]
        assert joined
        assert {column[x][True] + column[x][False] for x in joined} <= {"AU", "UA", "GC", "CG"}


def test_the_far_ends_of_a_long_target_are_left_out() -> None:
    pytest.importorskip("RNA")
    target = "A" * 60 + "GGCGCGGC" + "A" * 60
    root = parse(duplex_svg("GCCGCGCC", target))
    texts = [text.text for text in root.iter(f"{SVG}text")]
    assert "5′ …" in texts
    assert "… 3′" in texts
    assert {"61", "68", "1", "8"} <= set(texts)
    assert len(letters(root)) == 8 + 14 + 8 + 14


def test_strands_that_cannot_pair_are_drawn_without_pairs() -> None:
    pytest.importorskip("RNA")
    root = parse(duplex_svg("AAAAA", "AAA"))
    assert (bars(root), dots(root), len(letters(root))) == (0, 0, 8)
    assert "no base pair" in [text.text for text in root.iter(f"{SVG}text")]


def test_a_structure_shows_every_base_and_pair_without_overlap() -> None:
    pytest.importorskip("RNA")
    sequence = "GCGGAUUUAGCUCAGUUGGGAGAGCGCCAGACUGAAGAUCUGGAGGUCCUGUGUUCGAUCCACAGAAUUCGCACCA"
    structure = "(((((((..((((........)))).((((.........)))).....(((((.......))))))))))))...."
    root = parse(structure_svg(sequence, structure))
    drawn = letters(root)
    assert "".join(base for _, _, base in drawn) == sequence
    assert bars(root) + dots(root) == structure.count("(")
    assert dots(root) == 1  # G4-U69, the wobble of the acceptor stem
    distances = [math.dist(a[:2], b[:2]) for i, a in enumerate(drawn) for b in drawn[:i]]
    assert min(distances) > 17
    width, height = float(root.get("width", "")), float(root.get("height", ""))
    assert all(10 < x < width - 10 and 10 < y < height - 10 for x, y, _ in drawn)


def test_structures_of_one_base_and_without_pairs_can_be_drawn() -> None:
    pytest.importorskip("RNA")
    for sequence in ("A", "ACG"):
        assert len(letters(parse(structure_svg(sequence, "." * len(sequence))))) == len(sequence)


def test_a_sequence_of_another_length_than_the_structure_is_an_error() -> None:
    with pytest.raises(ValueError, match="sequence has 3 bases, structure 11 positions"):
        structure_svg("ACG", "((((...))))")


def stacks(svg: str) -> dict[float, dict[str, float]]:
    """Letter heights in bits by column."""
    found: dict[float, dict[str, float]] = {}
    for use in parse(svg).iter(f"{SVG}use"):
        x, height = re.match(
            r"translate\(([\d.]+) [\d.]+\) scale\([\d.]+ ([\d.]+)\)", use.get("transform", "")
        ).groups()  # type: ignore[union-attr]
        found.setdefault(float(x), {})[use.get("href", "")[-1]] = float(height) / 62
    return found


def test_logo_heights_are_the_information_with_small_sample_correction() -> None:
    sequences = ["AC", "AG", "AC", "AU"] * 25
    correction = 3 / (2 * 100 * math.log(2))
    first, second = stacks(logo_svg(sequences)).values()
    assert first == {"A": pytest.approx(2 - correction, abs=1e-3)}
    information = 2 - 1.5 - correction
    expected = {"C": information / 2, "G": information / 4, "U": information / 4}
    assert second == pytest.approx(expected, abs=1e-3)


def test_logo_weights_count_like_repeats_and_shrink_the_sample() -> None:
    sequences, weights = ["A"] * 10 + ["C"] * 10, [3.0] * 10 + [1.0] * 10
    (column,) = stacks(logo_svg(sequences, weights)).values()
    effective = 40**2 / (10 * 3**2 + 10 * 1**2)  # 16 of 20
    entropy = -(0.75 * math.log2(0.75) + 0.25 * math.log2(0.25))
    information = 2 - entropy - 3 / (2 * effective * math.log(2))
    assert column == pytest.approx({"A": 0.75 * information, "C": 0.25 * information}, abs=1e-3)
    (equal,) = stacks(logo_svg(["A"] * 30 + ["C"] * 10, weights=np.ones(40))).values()
    assert equal["A"] / equal["C"] == pytest.approx(3, abs=0.01)


@pytest.mark.parametrize(
    ("sequences", "weights", "message"),
    [
        ([], None, "at least one sequence"),
        ([""], None, "at least one sequence"),
        (["AC", "A"], None, "all of one length"),
        (["AX"], None, "letters A, C, G, U only"),
        (["A", "C"], [1.0], "weights"),
        (["A", "C"], [1.0, -1.0], "weights"),
        (["A", "C"], [0.0, 0.0], "weights"),
        (["A", "C"], [1.0, math.nan], "weights"),
    ],
)
def test_a_logo_of_nothing_sensible_is_an_error(sequences: list, weights: list | None, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        logo_svg(sequences, weights)


def test_untrusted_names_are_text_and_every_figure_says_what_it_shows() -> None:
    pytest.importorskip("RNA")
    name = "<script>alert(\"1\")</script> & 'more'"
    for svg in (
        duplex_svg("CAGUCUGAUUAGCA", MIR155, name),
        structure_svg("GGGGAAACCCC", "((((...))))", name),
        logo_svg(["ACGU"] * 9, name=name),
    ):
        root = parse(svg)
        assert "<script" not in svg
        title, description = root.find(f"{SVG}title"), root.find(f"{SVG}desc")
        assert title is not None
        assert name in (title.text or "")
        assert description is not None
        assert description.text
        assert root.get("aria-labelledby") == f"{title.get('id')} {description.get('id')}"
        assert root.get("role") == "img"
        assert not re.search(r"(href|src)=\"(?!#)|url\(|@import", svg)


def test_ids_differ_between_figures_on_one_page() -> None:
    logos = [logo_svg(["ACGU"] * count) for count in (9, 10)]
    ids = [element.get("id") for svg in logos for element in parse(svg).iter() if element.get("id")]
    assert max(Counter(ids).values()) == 1


def contrast(a: str, b: str) -> float:
    def luminance(colour: str) -> float:
        parts = [int(colour[i : i + 2], 16) / 255 for i in (1, 3, 5)]
        linear = [v / 12.92 if v <= 0.04045 else ((v + 0.055) / 1.055) ** 2.4 for v in parts]
        return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]

    low, high = sorted((luminance(a), luminance(b)))
    return (high + 0.05) / (low + 0.05)


def test_bases_stand_out_on_white_and_their_letters_on_them() -> None:
    pytest.importorskip("RNA")
    for base, colour in BASE_COLOURS.items():
        svg = structure_svg(base, ".")
        letter = re.search(r"font-weight=\"700\" fill=\"(#\w+)\"", svg)
        assert letter is not None
        assert contrast(colour, "#ffffff") > 2.8
        assert contrast(colour, letter[1]) > 4.5
