"""Targets with exact draws and exact log Z."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from headwater.diffusion.targets import (
    DensityRatio,
    Energy,
    Funnel,
    ManyWell,
    OverNormal,
    lattice,
    nine_of_twenty_five,
    random_measurement,
    twenty_five,
)


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def nothing(points: Tensor) -> Tensor:
    return torch.empty(len(points), 0)


def test_the_prior_times_its_ratio_is_the_nine_with_log_z_0() -> None:
    prior, nine = twenty_five(), nine_of_twenty_five()
    ratio = DensityRatio(nine, prior)
    draws = prior.sample(40_000, generator())
    log_r = ratio(draws, nothing(draws)).double()
    assert abs(float(log_r.logsumexp(0)) - math.log(40_000)) < 0.03
    # all mass of the nine is on modes that the prior has, and each mode has its published weight
    held = prior.responsibilities(nine.sample(20_000, generator())).mean(0)
    assert int((held > 1e-3).sum()) == int((nine.weight > 0).sum()) == 9
    torch.testing.assert_close(held, nine.weight, atol=0.01, rtol=0)
    assert abs(float(held.max()) - 15 / 61) < 0.01
    assert prior.mean[held.argmax()].tolist() == [5.0, 0.0]
    # as a perfect sampler's shares differ from the prior's: 1 - 9 / 25
    assert abs(float((held - prior.weight).abs().sum() / 2) - 0.64) < 0.01


def test_a_lattice_repeats_its_plane_and_its_measurements_have_more_signal_than_noise() -> None:
    one = lattice(8, generator())
    assert (len(one), one.dimensions) == (25, 8)
    assert bool((one.mean[:, 2:4] == one.mean[:, :2]).all())
    assert sorted(set(one.mean[:, 0].tolist())) == [-16, -8, 0, 8, 16]
    matrix, deviation = random_measurement(8, 3, generator())
    values = torch.linalg.svdvals(matrix)
    assert matrix.shape == (3, 8)
    assert 0 < deviation < float(values.max()) < 1
    with pytest.raises(ValueError, match="dimensions = 3"):
        lattice(3, generator())
    with pytest.raises(ValueError, match="measured = 9"):
        random_measurement(8, 9, generator())


def test_many_wells_have_the_published_log_z() -> None:
    assert abs(ManyWell(16).log_z - 164.695753) < 1e-4


@pytest.mark.parametrize("energy", [Funnel(3), Funnel(2, 3.0), ManyWell(1)], ids=["funnel", "wide funnel", "wells"])
def test_log_z_is_the_integral_and_draws_follow_the_density(energy: Energy) -> None:
    """By importance: E over draws of g / density is the integral of g, for a normal g of integral 1 within the bulk."""
    draws = energy.sample(100_000, generator())
    density = energy(draws, nothing(draws)).double() - energy.log_z
    centre = torch.zeros(energy.dimensions)
    centre[0] = 1.7 if isinstance(energy, ManyWell) else 1.0
    inner = torch.distributions.Normal(centre, 0.3).log_prob(draws).sum(1).double()
    assert abs(float((inner - density).exp().mean()) - 1) < 0.04


def test_draws_of_wells_fall_into_both_with_their_weight() -> None:
    wells = ManyWell(4)
    draws = wells.sample(20_000, generator())
    assert draws.shape == (20_000, 8)
    assert abs(float((draws[:, ::2] > 0).double().mean()) - wells.right) < 0.01
    assert 0.8 < wells.right < 0.9
    assert abs(float(draws[:, 1::2].var()) - 1) < 0.03
    # in the middle of a well's curvature: E[x^2] of the quadrature
    axis = torch.linspace(-4, 4, 4001, dtype=torch.float64)
    weight = (-axis.pow(4) + 6 * axis.square() + axis / 2).softmax(0)
    assert abs(float(draws[:, ::2].double().square().mean() - weight @ axis.square())) < 0.02


def test_over_a_normal_prior_the_mean_reward_is_the_energys_integral() -> None:
    energy, variance = ManyWell(1), 4.0
    draws = math.sqrt(variance) * torch.randn(200_000, 2, generator=generator())
    log_r = OverNormal(energy, variance)(draws, nothing(draws)).double()
    assert abs(float(log_r.logsumexp(0)) - math.log(200_000) - energy.log_z) < 0.03


@pytest.mark.parametrize(
    ("build", "said"),
    [
        (lambda: Funnel(1), "dimensions = 1"),
        (lambda: Funnel(10, 0.0), "first = 0"),
        (lambda: ManyWell(0), "pairs = 0"),
        (lambda: OverNormal(ManyWell(1), -1.0), "variance = -1"),
    ],
)
def test_settings_that_make_no_sense_are_named(build: object, said: str) -> None:
    with pytest.raises(ValueError, match=said):
        build()  # type: ignore[operator]
