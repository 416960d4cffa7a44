"""The digits as a prior: what the package holds, and the posterior where only the top row is seen."""

from __future__ import annotations

import pytest
import torch

from headwater.diffusion.digits import CLASSES, digits_prior, load_digits, view_matrix
from headwater.diffusion.estimators import resampling_estimates
from headwater.diffusion.measures import class_shares, effective_number

pytest.importorskip("sklearn", reason="the digits are part of scikit-learn")


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def test_images_are_those_of_the_package_each_once_within_their_range() -> None:
    train, held_out = load_digits()
    assert (len(train), len(held_out)) == (1347, 450)
    every = torch.cat((train.images, held_out.images))
    assert every.shape == (1797, 1, 8, 8)
    assert (float(every.min()), float(every.max())) == (-1, 1)
    counts = torch.bincount(torch.cat((train.label, held_out.label)))
    assert counts.tolist() == [178, 182, 177, 183, 181, 182, 181, 179, 174, 180]
    assert abs(float(every.sum()) - 8 * -64 * 1797 / 8 - 561718 / 8) < 20  # sum of all pixels, 0 to 16


def test_views_see_what_they_say() -> None:
    image = load_digits()[0].images[0]
    torch.testing.assert_close(view_matrix("top row") @ image.flatten(), image[0, 0])
    blocks = torch.nn.functional.avg_pool2d(image[None], 4).flatten()
    torch.testing.assert_close(view_matrix("block average") @ image.flatten(), blocks)
    rows = view_matrix("random projections", generator())
    torch.testing.assert_close(rows.norm(dim=1), torch.ones(8))
    with pytest.raises(ValueError, match="view = 'side'"):
        view_matrix("side")  # type: ignore[arg-type]


def test_with_the_top_row_seen_many_digits_remain_and_resampling_fails() -> None:
    train, held_out = load_digits()
    prior, matrix, draws = digits_prior(train), view_matrix("top row"), generator()
    effective = []
    for image in held_out.images[:5]:
        y = matrix @ image.flatten() + 0.1 * torch.randn(8, generator=draws)
        posterior = prior.posterior(matrix, y, 0.1)
        classes = class_shares(posterior.weight, train.label, CLASSES)
        x = prior.sample(2000, draws)
        log_r = torch.distributions.Normal(x @ matrix.T, 0.1).log_prob(y).sum(1)
        size = resampling_estimates(log_r).effective_sample_size
        effective.append((effective_number(posterior.weight), effective_number(classes), size))
        # what the samples say of the classes is what the posterior says
        said = class_shares(prior.responsibilities(posterior.sample(2000, draws)).mean(0), train.label, CLASSES)
        assert float((said - classes).abs().sum() / 2) < 0.05
    modes, classes_left, size = torch.tensor(effective).median(0).values.tolist()
    assert 80 < modes < 250
    assert 2.5 < classes_left < 9
    assert size < 4


def test_a_width_of_nothing_is_refused() -> None:
    with pytest.raises(ValueError, match="width = 0"):
        digits_prior(load_digits()[0], 0.0)
