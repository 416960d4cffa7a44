"""Parsimony and likelihood of trees against plain references, every tree of small data, and other programs' results."""

import gzip
import math
import re
from pathlib import Path

import numpy as np
import pytest

from headwater.phylogeny import felsenstein, fitch, pruning
from headwater.phylogeny.models import (
    SubstitutionModel,
    empirical_frequencies,
    gamma_rates,
    process,
    transition_matrices,
)
from phylogeny_kernel_helpers import (
    DATA,
    MODELS,
    PRIMATES_TREE,
    SMALL,
    SMALL_TREE,
    alignment,
    matrices,
    needs_data,
    newick,
    patterns,
    random_patterns,
    random_trees,
    rerooted,
)

# Log-likelihoods by IQ-TREE 2.0.7 of SMALL, of the primates (PRIMATES_TREE) and of DS5 (its tree under JC):
#   iqtree2 -s ALIGNMENT -m "MODEL" -te TREE -blfix -T 1 -seed 1
IQTREE = {
    "JC": (-339.3674, -6424.2024, -7878.5302),
    "K2P{3.5}": (-326.2985, -6151.4805, -7534.0278),
    "HKY{3.5}+F{0.32,0.3,0.11,0.27}": (-317.4626, -6001.2787, -7589.7941),
    "HKY{3.5}+F": (-314.1073, -6002.3457, -7573.3463),
    "GTR{1.5,4,0.7,0.9,5}+F{0.32,0.3,0.11,0.27}": (-314.7812, -5970.2410, -7586.7321),
    "JC+G4{0.5}": (-330.5190, -6287.1078, -7145.8387),
    "JC+I{0.2}": (-334.2542, -6319.0204, -7506.2083),
    "JC+I{0.2}+G4{0.5}": (-331.0736, -6328.4890, -7143.7546),
    "K2P{3.5}+G4{0.1}": (-322.8568, -6298.8311, -7034.8591),
    "HKY{3.5}+F{0.32,0.3,0.11,0.27}+G4{0.7}": (-308.0007, -5819.8360, -6849.1063),
    "GTR{1.5,4,0.7,0.9,5}+F{0.32,0.3,0.11,0.27}+I{0.15}+G4{0.4}": (-305.0556, -5835.2676, -6831.4120),
    "GTR{1.5,4,0.7,0.9,5}+F{0.32,0.3,0.11,0.27}+G8{2.5}": (-309.8029, -5855.9148, -7049.7919),
}


@pytest.fixture
def rng():
    return np.random.default_rng(7)


# Parsimony


@pytest.mark.parametrize("planes", [4, 5])
@pytest.mark.parametrize("informative_only", [True, False])
def test_parsimony_equals_the_reference_and_knows_no_root_or_order(rng, planes, informative_only):
    masks, weights = random_patterns(rng, 13, 700, planes)
    merges, lengths = random_trees(rng, 13, 40)
    leaves, constant = fitch.pack(masks, weights, planes, informative_only)
    expected = fitch.reference_scores(masks, weights, merges)
    assert len(set(expected)) > 10
    np.testing.assert_array_equal(fitch.scores(leaves, merges) + constant, expected)
    turned, _ = rerooted(rng, merges, lengths)
    assert (turned != merges).any()
    np.testing.assert_array_equal(fitch.scores(leaves, turned) + constant, expected)
    order = rng.permutation(13)
    leaves, constant = fitch.pack(masks[order], weights, planes, informative_only)
    name = np.concatenate((np.argsort(order), np.arange(13, 25)))
    np.testing.assert_array_equal(fitch.scores(leaves, name[merges]) + constant, expected)


def test_sites_left_out_cost_the_same_on_every_tree(rng):
    masks, _ = random_patterns(rng, 5, 400, 5)
    merges, _ = random_trees(rng, 5, 60)
    costs = np.array([fitch.reference_scores(masks[:, [p]], np.ones(1), merges) for p in range(masks.shape[1])])
    left_out = 0
    for column, cost in zip(masks.T[:, :, None], costs, strict=True):
        leaves, constant = fitch.pack(column, np.ones(1), 5)
        if (leaves == leaves[0]).all():
            left_out += 1
            assert (cost == constant).all()
    assert left_out > 0.8 * (costs == costs[:, :1]).all(1).sum() > 50


def test_joins_add_up_and_write_fitchs_sets(rng):
    masks, weights = random_patterns(rng, 9, 600, 5)
    merges, _ = random_trees(rng, 9, 30)
    leaves, constant = fitch.pack(masks, weights, 5, informative_only=False)
    tables = np.empty((30, 8, *leaves.shape[1:]), dtype=np.uint64)
    changes = sum(fitch.join(leaves, tables, merges[:, k, 0], merges[:, k, 1], k) for k in range(8))
    np.testing.assert_array_equal(changes + constant, fitch.reference_scores(masks, weights, merges))
    bits = np.unpackbits(np.concatenate((np.broadcast_to(leaves, (30, *leaves.shape)), tables), 1).view(np.uint8),
                         axis=-1, bitorder="little")  # fmt: skip
    x, y = (np.take_along_axis(bits, merges[:, :, c, None, None], 1) for c in range(2))
    shared = (x & y).any(2, keepdims=True)
    np.testing.assert_array_equal(bits[:, 9:], np.where(shared, x & y, x | y))


@pytest.mark.parametrize("planes", [4, 5])
def test_pair_costs_are_what_joining_would_add_and_where_both_are_known(rng, planes):
    masks, weights = random_patterns(rng, 9, 600, planes)
    merges, _ = random_trees(rng, 9, 12)
    leaves, _ = fitch.pack(masks, weights, planes, informative_only=False)
    tables = np.zeros((12, 8, *leaves.shape[1:]), dtype=np.uint64)
    for k in range(4):
        fitch.join(leaves, tables, merges[:, k, 0], merges[:, k, 1], k)
    node, others = rng.integers(0, 13, 12).astype(np.int32), rng.integers(0, 13, (12, 7)).astype(np.int32)
    changes, comparable = np.empty((2, 12, 7), dtype=np.int32)
    fitch.pair_costs(leaves, tables, node, others, changes, comparable)
    nodes = np.concatenate((np.broadcast_to(leaves, (12, *leaves.shape)), tables), 1)
    for k in range(7):
        added = fitch.join(leaves, tables.copy(), node, others[:, k].copy(), 7)
        np.testing.assert_array_equal(changes[:, k], added)
        full = [np.bitwise_and.reduce(nodes[np.arange(12), which, :4], axis=1) for which in (node, others[:, k])]
        unknown = np.unpackbits((full[0] | full[1]).view(np.uint8), axis=-1)
        np.testing.assert_array_equal(comparable[:, k], unknown.shape[1] - unknown.sum(1))
    assert 0 < changes.max() < comparable.max()


@pytest.mark.parametrize(
    ("masks", "weights", "planes", "says"),
    [([[1, 2]], [1, 1], 3, "planes = 3"), ([[1, 16]], [1, 1], 4, "from 1 to 15"), ([[1, 0]], [1, 1], 4, "from 0 to 1"),
     ([[1, 2]], [1, 0.5], 4, "whole numbers"), ([[1, 2]], [1], 4, "weights")],
)  # fmt: skip
def test_what_parsimony_cannot_take_is_named(masks, weights, planes, says):
    with pytest.raises(ValueError, match=says):
        fitch.pack(np.array(masks, dtype=np.uint8), np.array(weights, dtype=float), planes)


@needs_data
@pytest.mark.parametrize("gaps", ["gap5", "gapmiss"])
@pytest.mark.parametrize("name", ["DS1_n5", "DS5_n5", "DS5_n6", "DS5_n7", "DS5_n8"])
def test_parsimony_of_every_tree_of_a_few_taxa(name, gaps):
    path = DATA / "exact" / f"{name}_{gaps}.tsv"
    text = path.read_text() if path.exists() else gzip.decompress(Path(f"{path}.gz").read_bytes()).decode()
    lines = text.splitlines()
    rows = alignment(name.split("_")[0] + ".nex")
    known = {taxon: rows[taxon] for taxon in re.findall(r"[^(),;]+", lines[0].split("\t")[1])}
    masks, weights = patterns(known, gaps == "gap5")
    leaves, constant = fitch.pack(masks, weights, 5 if gaps == "gap5" else 4)
    merges = np.concatenate([newick(line.split("\t")[1], list(known))[0] for line in lines])
    assert len(merges) == math.prod(range(1, 2 * len(known) - 4, 2))
    expected = [int(line.split("\t")[0]) for line in lines]
    np.testing.assert_array_equal(fitch.scores(leaves, merges) + constant, expected)


@needs_data
@pytest.mark.parametrize(
    ("file", "data", "planes", "best", "worst"),
    [("ds1.tre", 1, 5, 4026, 4026), ("ds2.tre", 2, 5, 6223, 6223), ("ds3.tre", 3, 5, 6659, 6659),
     ("ds4.tre", 4, 5, 2424, 2424), ("ds5.tre", 5, 5, 1491, 1491), ("ds6.tre", 6, 5, 879, 879),
     ("ds6_2.txt", 6, 5, 879, 880), ("ds8.tre", 8, 5, 1461, 1461)],
)  # fmt: skip
def test_parsimony_of_paup_trees(file, data, planes, best, worst):
    masks, weights = patterns(alignment(f"DS{data}.nex"), gap_is_state=True)
    trees = re.findall(r"^tree.*?\[&U\]\s*(.*?;)", (DATA / "paup_results" / file).read_text(), re.M)
    merges = np.concatenate([newick(tree, [str(i + 1) for i in range(len(masks))])[0] for tree in trees])
    leaves, constant = fitch.pack(masks, weights, planes)
    scores = fitch.scores(leaves, merges) + constant
    assert (scores.min(), scores.max()) == (best, worst)


@needs_data
@pytest.mark.parametrize(
    ("name", "length"),
    [("DS1_gap5", 4026), ("DS1_gapmiss", 649), ("DS2_gap5", 6223), ("DS2_gapmiss", 5091), ("DS3_gap5", 6659),
     ("DS3_gapmiss", 6658), ("DS4_gap5", 2424), ("DS4_gapmiss", 2235), ("DS5_gap5", 1493), ("DS5_gapmiss", 1487),
     ("DS6_gap5", 880), ("DS6_gapmiss", 743), ("DS7_gap5_7150", 7150), ("DS7_gapmiss", 7153), ("DS8_gap5", 1461),
     ("DS8_gapmiss", 1100)],
)  # fmt: skip
def test_parsimony_of_dnapars_trees(name, length):
    gap_is_state = "gap5" in name
    masks, weights = patterns(alignment(f"{name[:3]}.nex"), gap_is_state)
    trees = [t for t in (DATA / "peer_runs/dnapars" / f"{name}.tre").read_text().split(";") if "(" in t]
    taxa = [f"t{i:03d}" for i in range(len(masks))]
    merges = np.concatenate([newick(re.sub(r"\[.*?\]", "", tree), taxa)[0] for tree in trees])
    leaves, constant = fitch.pack(masks, weights, 5 if gap_is_state else 4)
    np.testing.assert_array_equal(fitch.scores(leaves, merges) + constant, length)


# Substitution models


def test_gamma_rates_are_yangs_means():
    # Yang 1994, table 1 and PAML: shape 0.5, four categories.
    np.testing.assert_allclose(gamma_rates(0.5, 4), [[0.033388, 0.251916, 0.820268, 2.894428]], rtol=1e-5)
    rates = gamma_rates(np.geomspace(0.02, 200, 60), 4)
    np.testing.assert_allclose(rates.mean(1), 1, rtol=1e-12)
    assert (np.diff(rates, axis=1) > 0).all()
    assert np.ptp(rates[-1]) < 0.25


@pytest.mark.parametrize("name", MODELS)
def test_transition_matrices_are_those_of_a_reversible_chain_of_rate_one(name):
    model = MODELS[name]
    lengths = np.array([[0.05, 0.3, 0.35, 0, 1e-6, 300]])
    p = transition_matrices(model, lengths)[0]
    pi = model.frequencies[0]
    np.testing.assert_allclose(p.sum(-1), 1, rtol=1e-12)
    np.testing.assert_allclose(p[0] @ p[1], p[2], rtol=1e-9)
    np.testing.assert_allclose(pi[:, None] * p[:3], (pi[:, None] * p[:3]).swapaxes(-1, -2), rtol=1e-9)
    np.testing.assert_array_equal(p[3], np.broadcast_to(np.eye(4), p[3].shape))
    moved = (pi[:, None] * (p[4] - np.eye(4) * p[4])).sum((1, 2)).mean()
    assert moved * (1 - model.invariant[0]) == pytest.approx(1e-6, rel=1e-4)
    if model.invariant[0] == 0 and len(p[5]) == 1:
        np.testing.assert_allclose(p[5], np.broadcast_to(pi, p[5].shape), rtol=1e-9)


def test_parameters_of_each_tree_are_those_of_that_tree_alone(rng):
    masks, weights = random_patterns(rng, 7, 50)
    merges, lengths = random_trees(rng, 7, 5)
    model = SubstitutionModel("GTR", 4, True)
    given = {
        "exchangeabilities": rng.uniform(0.5, 4, (5, 6)),
        "frequencies": rng.dirichlet(np.full(4, 9.0), 5),
        "alpha": rng.uniform(0.2, 2, 5),
        "invariant": rng.uniform(0, 0.3, 5),
        "rate": rng.uniform(0.5, 2, 5),
    }
    tips = felsenstein.tips(masks, weights)
    together = felsenstein.log_likelihoods(tips, process(model, **given), merges, lengths)
    for t in range(5):
        alone = process(model, **{name: values[t] for name, values in given.items()})
        one = felsenstein.log_likelihoods(tips, alone, merges[[t]], lengths[[t]])
        np.testing.assert_allclose(together[t], one[0], rtol=1e-12)
        for mine, theirs in zip(process(model, **given).select(np.array([t])), alone, strict=True):
            np.testing.assert_allclose(mine, theirs, rtol=1e-12)


@pytest.mark.parametrize(
    ("build", "says"),
    [(lambda: SubstitutionModel("F81"), "name = 'F81'"), (lambda: SubstitutionModel("GTR", 0), "gamma_categories = 0"),
     (lambda: process(SubstitutionModel("K80"), kappa=0), "kappa = 0: must be finite and above 0"),
     (lambda: process(SubstitutionModel("HKY85"), frequencies=[0.5, 0.5, 0.5, 0.5]), "must sum to 1"),
     (lambda: process(SubstitutionModel(invariant=True), invariant=1.0), "invariant = 1.0"),
     (lambda: process(SubstitutionModel("GTR"), exchangeabilities=[1, 2]), "exchangeabilities of shape"),
     (lambda: process(SubstitutionModel("K80", 4), kappa=[1, 2], alpha=[1, 2, 3]), r"of \[2, 3\] trees")],
)  # fmt: skip
def test_a_wrong_model_or_parameter_is_named(build, says):
    with pytest.raises(ValueError, match=says):
        build()


# Likelihood


@pytest.mark.parametrize("name", MODELS)
def test_likelihood_in_single_precision_is_that_in_double_for_64_taxa(rng, name):
    masks, weights = random_patterns(rng, 64, 150)
    merges, lengths = random_trees(rng, 64, 6, 0.2)
    ladder = np.array([[0, 1], *([k + 63, k + 1] for k in range(1, 63))], dtype=np.int32)
    merges[0] = ladder  # the deepest tree
    lengths[1, :40] = 1e-7
    expected = felsenstein.reference_log_likelihoods(
        masks, weights, MODELS[name], matrices(MODELS[name], lengths), merges
    )
    got = felsenstein.log_likelihoods(felsenstein.tips(masks, weights), MODELS[name], merges, lengths)
    np.testing.assert_allclose(got, expected, rtol=1e-6)


@pytest.mark.parametrize("name", MODELS)
def test_likelihood_knows_no_root_or_order(rng, name):
    masks, weights = random_patterns(rng, 11, 90)
    merges, lengths = random_trees(rng, 11, 10)
    expected = felsenstein.log_likelihoods(felsenstein.tips(masks, weights), MODELS[name], merges, lengths)
    turned = felsenstein.log_likelihoods(
        felsenstein.tips(masks, weights), MODELS[name], *rerooted(rng, merges, lengths)
    )
    np.testing.assert_allclose(turned, expected, rtol=1e-6)
    order = rng.permutation(11)
    node = np.concatenate((np.argsort(order), np.arange(11, 21))).astype(np.int32)
    shuffled = felsenstein.tips(masks[order], weights)
    np.testing.assert_allclose(felsenstein.log_likelihoods(shuffled, MODELS[name], node[merges], lengths), expected,
                               rtol=1e-6)  # fmt: skip


@pytest.mark.parametrize("name", MODELS)
def test_joins_add_up_to_the_likelihood(rng, name):
    masks, weights = random_patterns(rng, 9, 70)
    merges, lengths = random_trees(rng, 9, 8)
    model, tips = MODELS[name], felsenstein.tips(masks, weights)
    categories = model.rates.shape[1]
    tables = np.full((8, 8, categories, 4, tips.partials.shape[2]), np.nan, dtype=np.float32)
    sites = np.zeros((8, tips.partials.shape[2]))
    logs = 0
    for k in range(8):
        logs = logs + felsenstein.join(tips, model, tables, merges[:, k, 0], merges[:, k, 1], lengths[:, k], k, sites)
    np.testing.assert_allclose(sites @ tips.weights, logs, rtol=1e-9)
    np.testing.assert_allclose(np.einsum("tkcip,i->tkp", tables, model.frequencies[0]) / categories, 1, rtol=1e-5)
    if model.invariant[0] > 0:
        correction = felsenstein.invariant_correction(tips, model, sites)
        assert (abs(correction) > 1).all()
        logs = logs + correction
    np.testing.assert_allclose(logs, felsenstein.log_likelihoods(tips, model, merges, lengths), rtol=1e-6)


def test_partitions_add_and_missing_sites_count_for_nothing(rng):
    masks, weights = random_patterns(rng, 6, 40)
    merges, lengths = random_trees(rng, 6, 4)
    whole = felsenstein.log_likelihoods(felsenstein.tips(masks, weights), MODELS["JC69"], merges, lengths)
    parts = felsenstein.partition_tips(masks, weights, np.arange(40) % 3)
    assert len(parts) == 3
    sums = sum(felsenstein.log_likelihoods(part, MODELS["JC69"], merges, lengths) for part in parts)
    np.testing.assert_allclose(sums, whole, rtol=1e-9)
    wider = felsenstein.tips(
        np.pad(masks, ((0, 0), (0, 9)), constant_values=15), np.pad(weights, (0, 9), constant_values=5)
    )
    np.testing.assert_allclose(felsenstein.log_likelihoods(wider, MODELS["JC69"], merges, lengths), whole, rtol=1e-7)


def test_logarithms_of_patterns_are_exact(rng):
    roots, powers = rng.uniform(1, 2, 999).astype(np.float32), rng.integers(-900, 5, 999).astype(np.float32)
    for w in range(len(roots)):
        got = pruning.weighted_logs(roots[w : w + 1], powers[w : w + 1], np.ones(1))
        assert got == pytest.approx(math.log(float(roots[w])) + float(powers[w]) * math.log(2), abs=1e-12, rel=1e-15)


def test_what_cannot_have_happened_has_likelihood_zero():
    tips = felsenstein.tips(np.array([[1], [1], [2], [1]], dtype=np.uint8), np.ones(1))
    merges = np.array([[[0, 1], [2, 3], [4, 5]]], dtype=np.int32)
    for name in ("JC69", "HKY85+G4"):
        assert felsenstein.log_likelihoods(tips, MODELS[name], merges, np.zeros((1, 3, 2))) == -np.inf
        tiny = felsenstein.log_likelihoods(tips, MODELS[name], merges, np.full((1, 3, 2), 1e-25))
        assert -130 < tiny[0] < -50


def test_a_gap_as_a_state_is_refused():
    with pytest.raises(ValueError, match="15 for a gap"):
        felsenstein.tips(np.array([[1, 16]], dtype=np.uint8), np.ones(2))


def of_iqtree(model, masks, weights):
    """The process that IQ-TREE's name for it says."""
    braces = {key: [float(x) for x in values.split(",")] for key, values in re.findall(r"([A-Z0-9]+)\{(.*?)\}", model)}
    base = re.match("[A-Z0-9]+", model).group()
    gamma = next((key for key in braces if re.fullmatch(r"G\d+", key)), "G1")
    frequencies = empirical_frequencies(masks, weights) if "+F" in model else (0.25,) * 4
    names = {"JC": "JC69", "K2P": "K80", "HKY": "HKY85", "GTR": "GTR"}
    values = braces.get(base, [1.0])
    return process(
        SubstitutionModel(names[base], int(gamma[1:]), "I" in braces),
        kappa=values[0],
        exchangeabilities=[*values, 1] if base == "GTR" else [1] * 6,
        frequencies=braces.get("F", frequencies),
        alpha=braces.get(gamma, [1.0])[0],
        invariant=braces.get("I", [0.0])[0],
    )


@pytest.mark.parametrize("model", IQTREE)
@pytest.mark.parametrize(
    "data", ["small", pytest.param("primates", marks=needs_data), pytest.param("DS5", marks=needs_data)]
)
def test_likelihood_is_that_of_iqtree(model, data):
    rows = SMALL if data == "small" else alignment(f"{data}.nex")
    tree = {"small": SMALL_TREE, "primates": PRIMATES_TREE}.get(data) or (
        DATA / "peer_runs/ml/iq_DS5.treefile"
    ).read_text()
    masks, weights = patterns(rows)
    got = felsenstein.log_likelihoods(
        felsenstein.tips(masks, weights), of_iqtree(model, masks, weights), *newick(tree, list(rows))
    )
    assert got[0] == pytest.approx(IQTREE[model][["small", "primates", "DS5"].index(data)], rel=5e-7)
