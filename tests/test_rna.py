"""RNA design: rewards against ViennaRNA itself, the FLEXS definition, FASTA files, diversity, inverse folding."""

from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
import torch

from headwater.environments.checker import check_environment
from headwater.sequences.data import (
    LARGEST_FILE,
    FastaError,
    Record,
    landscape,
    mirna_targets,
    read_fasta,
    write_fasta,
)
from headwater.sequences.diversity import distinct, edit_distances, mean_pairwise_distance
from headwater.sequences.environment import InverseFolding, pair_table
from headwater.sequences.reward import BindingReward, InverseFoldingReward, best_duplex, viennarna

MIR21, MIR155 = "UAGCUUAUCAGACUGAUGUUGA", "UUAAUGCUAAUCGUGAUAGGGGUU"
NO_CONDITION = torch.zeros(1, 0)


def random_rna(count: int, length: int, seed: int = 0) -> list[str]:
    letters = np.random.default_rng(seed).choice(list("ACGU"), size=(count, length))
    return ["".join(row) for row in letters]


# Binding


def test_energies_are_those_of_duplexfold() -> None:
    rna = pytest.importorskip("RNA")
    sequences = [*random_rna(50, 14), "CAGUCUGAUUAGCA"]
    energies = BindingReward([MIR21, MIR155]).energies(sequences)
    assert energies.shape == (51, 2)
    assert energies.tolist() == [[rna.duplexfold(t, s).energy for t in (MIR21, MIR155)] for s in sequences]


def test_known_duplex_energies() -> None:
    pytest.importorskip("RNA")
    energies = BindingReward([MIR21, MIR155]).energies(["CAGUCUGAUUAGCA"])
    assert energies == pytest.approx(np.array([[-18.8, -13.0]]), abs=0.05)


def test_the_norm_is_the_full_complement_scaled_to_the_length_of_a_design() -> None:
    rna = pytest.importorskip("RNA")
    reverse_complement = "UCAACAUCAGUCUGAUAAGCUA"
    reward = BindingReward([MIR21], length=14)
    assert reward.norms[0] == rna.duplexfold(reverse_complement, MIR21).energy * 14 / 22
    assert reward.norms[0] == pytest.approx(-22.718, abs=0.05)
    full_length = BindingReward([MIR21], length=22)
    assert full_length.fitness([reverse_complement]) == pytest.approx([1.0])


def test_fitness_is_the_mean_over_targets_of_normalised_energies() -> None:
    rna = pytest.importorskip("RNA")
    targets, length = landscape("L14_RNA1+2")
    reward = BindingReward([target.sequence for target in targets], length)
    complement = str.maketrans("ACGU", "UGCA")
    for sequence in [*random_rna(10, 14), "GCCCCGCCGGAAUG"]:
        expected = [
            rna.duplexfold(target.sequence, sequence).energy
            / (rna.duplexfold(target.sequence.translate(complement)[::-1], target.sequence).energy * 14 / 100)
            for target in targets
        ]
        assert reward.fitness([sequence])[0] == pytest.approx(np.mean(expected), rel=1e-12)


def test_log_reward_is_fitness_over_temperature() -> None:
    pytest.importorskip("RNA")
    sequences = random_rna(5, 14)
    reward = BindingReward([MIR21, MIR155], temperature=0.05)
    log_reward = reward(sequences, NO_CONDITION)
    assert log_reward.dtype == torch.float32
    assert log_reward.numpy() == pytest.approx(reward.fitness(sequences) / 0.05, rel=1e-6)


def test_no_possible_base_pair_is_no_energy_rather_than_an_astronomical_one() -> None:
    pytest.importorskip("RNA")
    reward = BindingReward(["GGGGAGGAGGGGG"], length=4)
    assert reward.energies(["AAAA", "CCCC"])[0, 0] == 0.0
    assert reward.energies(["AAAA", "CCCC"])[1, 0] < -3
    assert best_duplex("AAAA", "AAAA") == (0.0, [])


@pytest.mark.parametrize("sequence", ["CAGUCUGAUUAGC", "CAGUCUGAUUAGCN", "CAGTCTGATTAGCA", ""])
def test_a_design_of_wrong_length_or_letters_is_named(sequence: str) -> None:
    pytest.importorskip("RNA")
    with pytest.raises(ValueError, match=f"{sequence!r} is not 14 letters"):
        BindingReward([MIR21]).energies(["CAGUCUGAUUAGCA", sequence])


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"targets": []}, "targets = "),
        ({"targets": MIR21}, "in a list"),
        ({"targets": [""]}, "targets: ''"),
        ({"targets": ["ACGN"]}, "targets: 'ACGN'"),
        ({"targets": [MIR21], "length": 0}, "length = 0"),
        ({"targets": [MIR21], "temperature": 0.0}, "temperature = 0.0"),
        ({"targets": [MIR21], "temperature": float("nan")}, "temperature = nan"),
    ],
)
def test_illegal_binding_settings_name_the_field(settings: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        BindingReward(**settings)


def test_a_target_that_nothing_binds_is_an_error() -> None:
    pytest.importorskip("RNA")
    with pytest.raises(ValueError, match="forms no stable duplex"):
        BindingReward(["AU"]).fitness(["A" * 14])


def test_pairs_of_the_best_duplex_are_antiparallel_and_can_pair() -> None:
    pytest.importorskip("RNA")
    for design in random_rna(200, 14, seed=3):
        energy, pairs = best_duplex(MIR155, design)
        assert all(a < c and b > d for (a, b), (c, d) in pairwise(pairs))
        assert {MIR155[t - 1] + design[d - 1] for t, d in pairs} <= {"AU", "UA", "GC", "CG", "GU", "UG"}
        assert energy == BindingReward([MIR155]).energies([design])[0, 0]


def test_the_reverse_complement_pairs_with_every_base() -> None:
    pytest.importorskip("RNA")
    assert best_duplex(MIR21, "UCAACAUCAGUCUGAUAAGCUA")[1] == [(i, 23 - i) for i in range(1, 23)]


def test_without_viennarna_the_error_names_the_extra(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(__import__("sys").modules, "RNA", None)
    with pytest.raises(ImportError, match=r"headwater\[rna\]"):
        viennarna()


# Inverse folding


def test_ensemble_defect_agrees_with_base_pair_probabilities() -> None:
    rna = pytest.importorskip("RNA")
    structure, sequence = "((((...(((...)))..))))", "GGCAUAAGCCAAAGGCAAUGCC"
    compound = rna.fold_compound(sequence)
    compound.pf()
    probability = np.array(compound.bpp())[1:, 1:]
    probability = probability + probability.T
    partners = pair_table(structure)
    right = [probability[i, j] if j >= 0 else 1 - probability[i].sum() for i, j in enumerate(partners)]
    reward = InverseFoldingReward(structure, temperature=0.1)
    assert reward.defect([sequence])[0] == pytest.approx(1 - np.mean(right), abs=1e-4)
    assert reward([sequence], NO_CONDITION)[0].item() == pytest.approx((np.mean(right) - 1) / 0.1, abs=1e-3)


def test_a_stable_hairpin_folds_into_its_structure_and_poly_a_does_not() -> None:
    pytest.importorskip("RNA")
    reward = InverseFoldingReward("((((((....))))))")
    hairpin, poly_a = "GCGCGCUUCGGCGCGC", "A" * 16
    good, bad = reward.defect([hairpin, poly_a])
    assert good < 0.05
    assert bad == pytest.approx(12 / 16)
    assert reward.mfe_structure(hairpin) == reward.structure
    assert reward.mfe_structure(poly_a) == "." * 16
    assert reward.target_probability(hairpin) > 0.9
    assert reward.target_probability(poly_a) < 1e-6


def test_a_long_and_very_stable_design_does_not_overflow() -> None:
    pytest.importorskip("RNA")
    arm = "GC" * 200
    reward = InverseFoldingReward("(" * 400 + "...." + ")" * 400)
    assert 0 <= reward.defect([arm + "UUCG" + arm])[0] < 0.2


def test_inverse_folding_settings_are_checked() -> None:
    with pytest.raises(ValueError, match="temperature = -1"):
        InverseFoldingReward("((((...))))", temperature=-1)
    with pytest.raises(ValueError, match="never closed"):
        InverseFoldingReward("((((...)))")
    pytest.importorskip("RNA")
    with pytest.raises(ValueError, match="'ACGU' is not 11 letters"):
        InverseFoldingReward("((((...))))").defect(["ACGU"])


def all_finished(environment: InverseFolding) -> torch.Tensor:
    """Every finished state, by taking every legal action from every state; proves backward steps on the way."""
    states = environment.initial(1)
    for _ in range(environment.width):
        rows, actions = environment.forward_mask(states).nonzero(as_tuple=True)
        children = environment.step(states[rows], actions)
        back = environment.backward_action(states[rows], actions)
        assert environment.backward_mask(children).all()
        assert torch.equal(environment.backward_step(children, back), states[rows])
        assert torch.equal(environment.forward_action(children, back), actions)
        states = children
    return states


def test_inverse_folding_builds_each_compatible_sequence_once() -> None:
    environment = InverseFolding("(.(...)).")
    finished = all_finished(environment)
    sequences = list(environment.objects(finished))
    assert len(sequences) == len(set(sequences)) == 4**5 * 6**2
    assert torch.equal(environment.states(sequences), finished)
    canonical = {"AU", "UA", "GC", "CG", "GU", "UG"}
    assert all({s[0] + s[7], s[2] + s[6]} <= canonical and len(s) == 9 for s in map(str, sequences))


def test_inverse_folding_ends_only_when_every_slot_is_filled() -> None:
    environment = InverseFolding("((...))")
    assert environment.width == 5
    states = environment.initial(1)
    assert not environment.backward_mask(states).any()
    for action in (4, 8, 0, 1, 2):
        assert not environment.forward_mask(states)[0, environment.exit_action]
        states = environment.step(states, torch.tensor([action]))
    assert environment.forward_mask(states)[0].nonzero().flatten().tolist() == [environment.exit_action]
    assert environment.objects(states) == ["GGACGUC"]
    with pytest.raises(ValueError, match="not finished"):
        environment.objects(environment.initial(1))


def test_inverse_folding_passes_the_checker_and_counts_its_sequences() -> None:
    report = check_environment(InverseFolding("(.(...))"))
    assert report.ok, str(report)
    assert report.n_objects == report.n_trajectories == 4**4 * 6**2


@pytest.mark.parametrize(
    ("sequence", "message"),
    [
        ("GGACGU", "has 6 bases, the structure 7 positions"),
        ("GGACGUA", "'GA' at the pair of positions 1 and 7"),
        ("GGANGUC", "'N' at position 4"),
    ],
)
def test_a_sequence_that_inverse_folding_cannot_build_is_named(sequence: str, message: str) -> None:
    with pytest.raises(ValueError, match=f"{sequence!r}.*{message}"):
        InverseFolding("((...))").states([sequence])


def test_pair_table_of_a_multiloop() -> None:
    assert pair_table("((...)).(...)") == [6, 5, -1, -1, -1, 1, 0, -1, 12, -1, -1, -1, 8]


@pytest.mark.parametrize(
    ("structure", "message"),
    [
        ("", "empty"),
        ("(((...))", r"'\(' at position 1 is never closed"),
        ("...(...", r"'\(' at position 4 is never closed"),
        ("(...))", r"'\)' at position 6 closes nothing"),
        ("((..))", "positions 2 and 5 encloses 2 bases; a hairpin loop needs at least 3"),
        ("()", "encloses 0 bases"),
        ("((.x.))", "'x' at position 4"),
        ("(([[..))]]", r"'\[' at position 3.*pseudoknots"),
        ("((...)) ", "' ' at position 8"),
    ],
)
def test_an_illegal_structure_says_what_is_wrong_and_where(structure: str, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        pair_table(structure)


# Targets and files


def test_the_demo_targets_are_the_two_micrornas() -> None:
    assert [(record.name, record.sequence) for record in mirna_targets()] == [
        ("hsa-miR-21-5p", MIR21),
        ("hsa-miR-155-5p", MIR155),
    ]
    assert "MIMAT0000076" in mirna_targets()[0].description
    assert "MIMAT0000646" in mirna_targets()[1].description


def test_landscapes_by_name() -> None:
    (first, third), length = landscape("L50_RNA1+3")
    assert length == 50
    assert (first.name, third.name) == ("RNA1", "RNA3")
    assert first.sequence.startswith("GAACGAGGCACAUUCC")
    assert third.sequence.startswith("CCGGUGAUACUGUUAG")
    every = [landscape(f"L14_RNA{i}") for i in range(1, 5)]
    assert [len(targets[0].sequence) for targets, _ in every] == [100] * 4
    for name in ("L14_RNA5", "L14_RNA2+1", "L14_RNA1+1", "L15_RNA1", "RNA1", "L14_RNA1 "):
        with pytest.raises(ValueError, match="landscape"):
            landscape(name)


def test_fasta_reads_dna_lower_case_wrapped_lines_and_windows_line_ends(tmp_path: Path) -> None:
    path = tmp_path / "targets.fasta"
    path.write_bytes(b"\xef\xbb\xbf>one  the first\r\nacgt\r\nTTGG\r\n\r\n> two\r\nACGU")
    assert read_fasta(path) == [Record("one", "ACGUUUGG", "the first"), Record("two", "ACGU", "")]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (">a\nACGU\n>b\nACGU\nACNGU\n", "line 5, record 'b', position 7: letter 'N'; legal are A, C, G, U and T"),
        (">a\nAC-GU\n", "line 2, record 'a', position 3: letter '-'"),
        (">a\nACGß\n", "position 4: letter 'ß'"),
        ("ACGU\n", "line 1: sequence before the first header"),
        (">\nACGU\n", "line 1: a record without a name"),
        (">a\nACGU\n>a other\nACGU\n", "line 3: record 'a' was already given in line 1"),
        (">a\n>b\nACGU\n", "line 1: record 'a' has no sequence"),
        ("", "no records"),
        ("\n\n", "no records"),
    ],
)
def test_a_faulty_fasta_says_what_is_wrong_and_where(tmp_path: Path, text: str, message: str) -> None:
    path = tmp_path / "faulty.fasta"
    path.write_text(text, encoding="utf-8")
    with pytest.raises(FastaError, match="faulty.fasta.*" + message):
        read_fasta(path)


def test_a_binary_or_huge_file_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "file.fasta"
    path.write_bytes(b">a\n\xff\xfe\x00")
    with pytest.raises(FastaError, match="not a text file"):
        read_fasta(path)
    with path.open("wb") as file:
        file.truncate(LARGEST_FILE + 1)
    with pytest.raises(FastaError, match="10,000,001 bytes; at most 10,000,000"):
        read_fasta(path)


def test_fasta_written_is_fasta_read(tmp_path: Path) -> None:
    path = tmp_path / "designs.fasta"
    records = [Record("design-1", "ACGU" * 50, "log_reward=3.1"), Record("design-2", "GGGG")]
    write_fasta(path, records)
    assert max(map(len, path.read_text().splitlines())) == 70
    assert read_fasta(path) == records
    for name, description in (("two words", ""), ("", ""), ("ok", "line\nbreak")):
        with pytest.raises(ValueError, match="one word"):
            write_fasta(path, [Record(name, "ACGU", description)])


# Diversity


def test_edit_distances() -> None:
    distances = edit_distances("KITTEN", ["SITTING", "KITTEN", "", "ITTENK"])
    assert distances.tolist() == [3, 0, 6, 2]


def test_distinct_takes_the_best_and_skips_what_is_close_to_it() -> None:
    sequences = ["AAAA", "AAAC", "CCCC", "GGGG", "GGGA", "UUUU"]
    assert distinct(sequences, [3.0, 5.0, 4.0, 1.0, 2.0, float("nan")], count=3, min_distance=2) == [1, 2, 4]
    assert distinct(sequences, [3.0, 5.0, 4.0, 1.0, 2.0, float("nan")], count=9, min_distance=1) == [1, 2, 0, 4, 3]
    assert distinct([], [], count=3, min_distance=2) == []
    with pytest.raises(ValueError, match="expected"):
        distinct(sequences, [1.0], count=3, min_distance=2)
    with pytest.raises(ValueError, match="count = 0"):
        distinct(sequences, [0.0] * 6, count=0, min_distance=2)


def test_mean_pairwise_distance() -> None:
    assert mean_pairwise_distance(["AAAA", "AAAC", "CCC"]) == pytest.approx((1 + 4 + 3) / 3)
    sequences = random_rna(30, 14)
    expected = np.mean([edit_distances(sequences[i], sequences[:i]).mean() for i in range(1, 30) for _ in range(i)])
    assert mean_pairwise_distance(sequences) == pytest.approx(expected)
    with pytest.raises(ValueError, match="at least 2"):
        mean_pairwise_distance(["A"])
