"""Derivatives of the likelihood by branch lengths, and the lengths that fit best."""

import numpy as np
import pytest

from headwater.phylogeny import felsenstein
from headwater.phylogeny.branch_lengths import LONGEST, SHORTEST, fit_lengths, log_likelihood_gradients
from phylogeny_kernel_helpers import (
    DATA,
    MODELS,
    SMALL,
    SMALL_TREE,
    alignment,
    matrices,
    needs_data,
    newick,
    patterns,
    random_patterns,
    random_trees,
)


@pytest.fixture
def rng():
    return np.random.default_rng(7)


@pytest.mark.parametrize("name", MODELS)
def test_derivatives_are_those_of_small_differences(rng, name):
    masks, weights = random_patterns(rng, 8, 100)
    merges, lengths = random_trees(rng, 8, 5, 0.2)
    tips, model = felsenstein.tips(masks, weights), MODELS[name]
    got = log_likelihood_gradients(tips, model, merges, lengths)
    exact = felsenstein.reference_log_likelihoods(masks, weights, model, matrices(model, lengths), merges)
    np.testing.assert_allclose(got.log_likelihood, exact, rtol=1e-9)
    for k, c in [(edge // 2, edge % 2) for edge in range(13)]:
        shift = np.zeros_like(lengths)
        shift[:, k, c] = 1e-4 * lengths[:, k, c]
        up, down = (log_likelihood_gradients(tips, model, merges, lengths + sign * shift) for sign in (1, -1))
        width = 2 * shift[:, k, c]
        slope = (up.log_likelihood - down.log_likelihood) / width
        np.testing.assert_allclose(got.first[:, k, c], slope, rtol=1e-5, atol=1e-3)
        curve = (up.first - down.first)[:, k, c] / width
        np.testing.assert_allclose(got.second[:, k, c], curve, rtol=1e-5, atol=1e-2)


def test_derivatives_do_not_underflow_along_a_thousand_merges(rng):
    n = 1200
    masks, weights = random_patterns(rng, n, 20)
    ladder = np.array([[[0, 1], *([k + n - 1, k + 1] for k in range(1, n - 1))]], dtype=np.int32)
    merges, lengths = random_trees(rng, n, 2, 3.0)
    merges = np.concatenate((merges[:1], ladder))
    tips = felsenstein.tips(masks, weights)
    got = log_likelihood_gradients(tips, MODELS["JC69"], merges, lengths)
    plain = felsenstein.log_likelihoods(tips, MODELS["JC69"], merges, lengths)
    assert (plain < -20 * n).all()  # far less than the smallest number, at every pattern
    np.testing.assert_allclose(got.log_likelihood, plain, rtol=1e-6)
    assert np.isfinite(got.first).all()
    np.testing.assert_allclose(got.first[:, -1, 0], got.first[:, -1, 1], rtol=1e-6)


@pytest.mark.parametrize("name", ["JC69", "GTR+G4+I"])
@pytest.mark.parametrize("rate", [0.0, 10.0])
def test_fitted_lengths_leave_no_slope(rng, name, rate):
    masks, weights = patterns(SMALL)
    merges, _ = random_trees(rng, 8, 6)
    half = np.arange(len(weights)) % 2
    parts = [(tips, MODELS[name]) for tips in felsenstein.partition_tips(masks, weights, half)]
    lengths, likelihood = fit_lengths(parts, merges, np.full(merges.shape, 0.05), rate, 60, 1e-8)
    got = log_likelihood_gradients(*parts[0], merges, lengths) + log_likelihood_gradients(*parts[1], merges, lengths)
    np.testing.assert_allclose(got.log_likelihood, likelihood, rtol=1e-12)
    slope = (got.first - rate) * lengths
    inside = (lengths > 2 * SHORTEST) & (lengths < LONGEST / 2)
    assert inside.mean() > 0.6
    np.testing.assert_allclose(slope[inside], 0, atol=2e-3)
    assert (got.first[lengths == SHORTEST] <= rate).all()
    assert (lengths[:, -1, 1] == 0).all()


def test_fitted_lengths_are_those_of_iqtree():
    masks, weights = patterns(SMALL)
    merges, lengths = newick(SMALL_TREE, list(SMALL))
    fitted, likelihood = fit_lengths([(felsenstein.tips(masks, weights), MODELS["JC69"])], merges, 0 * lengths + 0.05)
    assert likelihood[0] == pytest.approx(-339.3674, abs=1e-3)
    seen = lengths > 1e-5
    np.testing.assert_allclose(fitted[seen], lengths[seen], rtol=0.02)


@needs_data
@pytest.mark.parametrize(
    ("data", "best"),
    [("DS1", -6884.601), ("DS2", -26153.02), ("DS3", -33455.71), ("DS4", -13007.61), ("DS5", -7878.53),
     ("DS6", -6264.35), ("DS7", -36786.71), ("DS8", -8077.44)],
)  # fmt: skip
def test_maximum_likelihood_of_iqtrees_trees_is_found(data, best):
    rows = alignment(f"{data}.nex")
    tips = felsenstein.tips(*patterns(rows))
    merges, lengths = newick((DATA / f"peer_runs/ml/iq_{data}.treefile").read_text(), list(rows))
    given = felsenstein.log_likelihoods(tips, MODELS["JC69"], merges, lengths)
    assert given[0] == pytest.approx(best, abs=6e-3)
    _, likelihood = fit_lengths([(tips, MODELS["JC69"])], merges, 0 * lengths + 0.05)
    assert likelihood[0] > best - 0.01
