"""Likelihoods and measurements: log-densities against torch's, gradients against differences, and what is refused."""

from __future__ import annotations

import math
import pickle
import struct
import sys
import zlib
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor, distributions, nn

from headwater.diffusion import measurements
from headwater.diffusion.likelihoods import (
    ClassifierLikelihood,
    FunctionLikelihood,
    GaussianLikelihood,
    Likelihood,
    PoissonLikelihood,
    Product,
    Tempered,
    require_support,
)
from headwater.diffusion.measurements import MeasurementError, read_array, read_measurements
from headwater.diffusion.operators import Blur, Identity, Mask, Matrix, box_mask, gaussian_kernel
from headwater.diffusion.transforms import PhaseRetrieval
from headwater.reward_worker import RewardError

NOTHING = torch.zeros(5, 0)
NAN = pytest.approx(math.nan, nan_ok=True)
IMAGE = (1, 4, 5)


def seeded(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def normal(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=seeded(seed))


BLUR = Blur(IMAGE, gaussian_kernel(3, 1.0))


def classifier() -> nn.Module:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return nn.Sequential(nn.Flatten(), nn.Dropout(), nn.Linear(20, 4))


# Densities


def test_gaussian_noise_has_its_normalised_density() -> None:
    x, y = normal(5, *IMAGE), normal(*IMAGE, seed=1)
    expected = distributions.Normal(BLUR(x), 0.3).log_prob(y).flatten(1).sum(1)
    torch.testing.assert_close(GaussianLikelihood(BLUR, 0.3, y)(x, NOTHING), expected)
    sigma = torch.rand(IMAGE, generator=seeded(2)) + 0.1
    expected = distributions.Normal(BLUR(x), sigma).log_prob(y).flatten(1).sum(1)
    torch.testing.assert_close(GaussianLikelihood(BLUR, sigma, y)(x, NOTHING), expected)


def test_the_mean_over_the_prior_is_the_evidence() -> None:
    operator, y = Matrix((3,), normal(2, 3)), torch.tensor([0.5, -1.0])
    covariance = operator.entries @ operator.entries.T + 0.49 * torch.eye(2)
    evidence = distributions.MultivariateNormal(torch.zeros(2), covariance).log_prob(y)
    log_r = GaussianLikelihood(operator, 0.7, y)(normal(200_000, 3, seed=3), torch.zeros(200_000, 0))
    assert log_r.logsumexp(0).item() - math.log(200_000) == pytest.approx(evidence.item(), abs=0.01)


def test_poisson_counts_have_their_density() -> None:
    x = normal(5, *IMAGE)
    rate = (20 * BLUR(x) + 15).clamp(min=1e-3)
    counts = torch.poisson(rate[0], generator=seeded(1))
    expected = distributions.Poisson(rate).log_prob(counts).flatten(1).sum(1)
    likelihood = PoissonLikelihood(BLUR, gain=20, background=15, y=counts)
    torch.testing.assert_close(likelihood(x, NOTHING), expected)
    # As a condition a count that is none is a failure of that object alone.
    rows = counts.flatten().expand(5, -1).clone()
    rows[2, 7] += 0.5
    log_r = PoissonLikelihood(BLUR, gain=20, background=15)(x, rows)
    assert log_r.isnan().tolist() == [False, False, True, False, False]


def test_a_measurement_in_the_condition_counts_as_one_that_is_known() -> None:
    x, y = normal(5, *IMAGE), normal(5, *IMAGE, seed=1)
    amortized = GaussianLikelihood(BLUR, 0.3)
    assert amortized.condition_size == 20
    one_by_one = [GaussianLikelihood(BLUR, 0.3, y[i])(x[i : i + 1], torch.zeros(1, 0)) for i in range(5)]
    torch.testing.assert_close(amortized(x, y.flatten(1)), torch.cat(one_by_one))


def test_drawn_measurements_have_the_law_that_is_scored() -> None:
    x = normal(1, *IMAGE).expand(20_000, -1, -1, -1)
    y = GaussianLikelihood(BLUR, 0.3).draw(x, seeded(1))
    assert (y - BLUR(x)).std().item() == pytest.approx(0.3, rel=0.02)
    torch.testing.assert_close(y.mean(0), BLUR(x)[0], atol=0.015, rtol=0)
    likelihood = PoissonLikelihood(BLUR, gain=20, background=15)
    torch.testing.assert_close(likelihood.draw(x, seeded(1)).mean(0), likelihood.rate(BLUR(x)[0]), atol=0.3, rtol=0)


def test_a_classifier_gives_the_probability_of_a_class_or_a_group() -> None:
    x, network = normal(5, *IMAGE), classifier()
    single = ClassifierLikelihood(network, group=2)
    log_p = network(x).log_softmax(1)  # in evaluation mode by now: no dropout
    torch.testing.assert_close(single(x, NOTHING), log_p[:, 2].detach())
    groups = ((0, 2), (1, 3))
    even = ClassifierLikelihood(network, 0, groups, "maximum")
    torch.testing.assert_close(even(x, NOTHING), torch.maximum(log_p[:, 0], log_p[:, 2]).detach())
    odd = ClassifierLikelihood(network, 1, groups)
    torch.testing.assert_close(odd(x, NOTHING), torch.logaddexp(log_p[:, 1], log_p[:, 3]).detach())
    asked = torch.tensor([[1.0], [0], [1], [1], [0]])
    both = torch.where(asked[:, 0] == 1, odd(x, NOTHING), ClassifierLikelihood(network, 0, groups)(x, NOTHING))
    torch.testing.assert_close(ClassifierLikelihood(network, None, groups)(x, asked), both)


def test_a_product_adds_and_each_factor_takes_its_own_columns() -> None:
    x, y, counts = normal(5, *IMAGE), normal(5, *IMAGE, seed=1), torch.ones(5, *IMAGE)
    parts: list[Likelihood] = [
        GaussianLikelihood(BLUR, 0.3),
        ClassifierLikelihood(classifier(), 1),
        PoissonLikelihood(BLUR, background=3.0),
    ]
    expected = parts[0](x, y.flatten(1)) + parts[1](x, NOTHING) + parts[2](x, counts.flatten(1))
    product = Product(parts)
    assert product.condition_size == 40
    torch.testing.assert_close(product(x, torch.cat([y.flatten(1), counts.flatten(1)], 1)), expected)
    torch.testing.assert_close(Tempered(parts[1], 0.5)(x, NOTHING), 0.5 * parts[1](x, NOTHING))
    nowhere = FunctionLikelihood(lambda x: torch.full((len(x),), -math.inf))
    assert Tempered(nowhere, 0)(x, NOTHING).tolist() == [0] * 5


@pytest.mark.parametrize(
    "likelihood",
    [
        GaussianLikelihood(BLUR, 0.3, normal(*IMAGE, seed=1)),
        GaussianLikelihood(PhaseRetrieval(IMAGE), 0.5, normal(1, 8, 10, seed=1)),
        PoissonLikelihood(BLUR, gain=2, background=9, y=torch.full(IMAGE, 7.0)),
        ClassifierLikelihood(classifier(), 0, ((0, 2), (1, 3))),
        Product([ClassifierLikelihood(classifier(), 1), Tempered(GaussianLikelihood(BLUR, 0.3, normal(*IMAGE)), 0.2)]),
        FunctionLikelihood(lambda x: -x.pow(4).flatten(1).sum(1)),
    ],
    ids=["gaussian", "phase", "poisson", "classifier", "product", "function"],
)
def test_gradients_are_differences(likelihood: Likelihood) -> None:
    x, along = normal(5, *IMAGE), normal(5, *IMAGE, seed=7)
    with torch.no_grad():  # as in a rollout
        log_r, gradient = likelihood.gradient(x, NOTHING)
    torch.testing.assert_close(log_r, likelihood(x, NOTHING))
    difference = (likelihood(x + 1e-2 * along, NOTHING) - likelihood(x - 1e-2 * along, NOTHING)) / 2e-2
    torch.testing.assert_close((gradient * along).flatten(1).sum(1), difference, rtol=1e-2, atol=2e-2)


def test_a_reward_without_gradient_says_so() -> None:
    for function in (lambda x: (x > 0).float().flatten(1).sum(1), lambda x: nn.Parameter(torch.ones(len(x)))):
        with pytest.raises(TypeError, match="not differentiable"):
            FunctionLikelihood(function).gradient(normal(5, 3), NOTHING)


# A user's function


def test_a_function_that_fails_on_one_object_leaves_that_one_out() -> None:
    def careful(x: Tensor) -> Tensor:
        if (x[:, 0] > 9).any():
            raise KeyError("too large")
        return x.sum(1)

    likelihood = FunctionLikelihood(careful)
    x = torch.tensor([[1.0, 2], [10, 0], [3, 4]])
    assert likelihood(x, NOTHING[:3]).tolist() == [3, NAN, 7]
    assert likelihood.failed == 1
    for _ in range(2):  # 29 in a row, and then a good one
        likelihood(torch.full((29, 2), 10.0), torch.zeros(29, 0)), likelihood(x[:1], NOTHING[:1])
    assert likelihood.failed == 1 + 2 * 29
    with pytest.raises(
        RewardError, match="failed on each of the last 30 objects; the last time: KeyError: 'too large'"
    ):
        likelihood(torch.full((40, 2), 10.0), torch.zeros(40, 0))


def test_a_function_sees_the_condition_where_there_is_one() -> None:
    likelihood = FunctionLikelihood(lambda x, condition: (x * condition).sum(1), condition_size=3)
    x, rows = normal(5, 3), normal(5, 3, seed=1)
    torch.testing.assert_close(likelihood(x, rows), (x * rows).sum(1))


@pytest.mark.parametrize("function", [lambda x: x, lambda x: [0.0] * len(x), lambda x: x.sum(1).long()])
def test_a_function_that_returns_something_else_is_an_error(function: Callable[[Tensor], Tensor]) -> None:
    with pytest.raises(RewardError, match=r"must return a float tensor \(5,\), it returned"):
        FunctionLikelihood(function)(normal(5, 3), NOTHING)


# What is refused


def test_a_likelihood_says_what_does_not_fit() -> None:
    y = torch.zeros(IMAGE)
    for sigma in (0.0, -1.0, math.nan, math.inf):
        with pytest.raises(ValueError, match=r"sigma is .*must be above 0"):
            GaussianLikelihood(BLUR, sigma, y)
    with pytest.raises(ValueError, match=r"sigma has shape \(3,\), the operator measures \(1, 4, 5\)"):
        GaussianLikelihood(BLUR, torch.ones(3), y)
    with pytest.raises(
        MeasurementError, match=r"the measurement has shape \(7,\), but .*Blur measures shape \(1, 4, 5\)"
    ):
        GaussianLikelihood(BLUR, 1.0, torch.zeros(7))
    with pytest.raises(MeasurementError, match=r"has 1 values that are NaN or infinite, .* at \(0, 2, 3\)"):
        GaussianLikelihood(BLUR, 1.0, y.index_put(tuple(map(torch.tensor, (0, 2, 3))), torch.tensor(math.nan)))
    with pytest.raises(ValueError, match="y holds 5 measurements, this likelihood is of one"):
        GaussianLikelihood(BLUR, 1.0, torch.zeros(5, *IMAGE))
    with pytest.raises(ValueError, match=r"y holds 0.5, .*: 20 values that are no counts"):
        PoissonLikelihood(BLUR, y=y + 0.5)
    with pytest.raises(ValueError, match=r"takes objects of shape \(1, 4, 5\), these have \(20,\)"):
        GaussianLikelihood(BLUR, 1.0, y)(torch.zeros(5, 20), NOTHING)
    with pytest.raises(ValueError, match=r"condition has shape \(5, 0\), GaussianLikelihood needs \(5, 20\)"):
        GaussianLikelihood(BLUR, 1.0)(torch.zeros(5, *IMAGE), NOTHING)
    with pytest.raises(ValueError, match="the classifier has the classes 0 to 3"):
        ClassifierLikelihood(classifier(), 0, [[0, 4]])(torch.zeros(5, *IMAGE), NOTHING)
    with pytest.raises(ValueError, match="group is 4, 4, 4, 4, 4, must be whole numbers from 0 below 4"):
        ClassifierLikelihood(classifier(), 4)(torch.zeros(5, *IMAGE), NOTHING)
    with pytest.raises(TypeError, match="tensors of objects, not of list"):
        GaussianLikelihood(BLUR, 1.0, y)(["x"], NOTHING)


def test_a_reward_that_is_zero_everywhere_is_an_error_with_the_count() -> None:
    zero, nan = -math.inf, math.nan
    with pytest.raises(RewardError, match=r"r\(x\) = 0 on all 3 draws of the prior"):
        require_support(torch.tensor([zero, zero, zero]))
    with pytest.raises(RewardError, match=r"r\(x\) = 0 on 1 and has failed on 2 of all 3 draws"):
        require_support(torch.tensor([nan, zero, nan]))
    some = torch.tensor([zero, -5000.0, nan])
    assert require_support(some) is some


# Files


def picture(values: np.ndarray) -> bytes:
    """A PNG file, grey or RGB, written here so that the test needs no Pillow to write it."""

    def chunk(name: bytes, body: bytes) -> bytes:
        return struct.pack(">I", len(body)) + name + body + struct.pack(">I", zlib.crc32(name + body))

    colour = 0 if values.ndim == 2 else 2
    header = struct.pack(">IIBBBBB", values.shape[1], values.shape[0], 8, colour, 0, 0, 0)
    rows = b"".join(b"\0" + row.tobytes() for row in values.astype(np.uint8))
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(rows)) + chunk(b"IEND", b"")


def test_arrays_are_read_from_their_files(tmp_path: Path) -> None:
    np.save(tmp_path / "a.npy", np.arange(6).reshape(2, 3))
    np.save(tmp_path / "c.npy", np.array([[1 + 2j, 3 - 1j]]))
    (tmp_path / "a.csv").write_text("u,v\n1,2.5\n\n-3,4e1\n")
    assert read_array(tmp_path / "a.npy").tolist() == [[0, 1, 2], [3, 4, 5]]
    assert read_array(tmp_path / "c.npy").tolist() == [[[1, 3], [2, -1]]]
    assert read_array(tmp_path / "a.csv").tolist() == [[1, 2.5], [-3, 40]]


def test_pictures_are_channels_first_in_the_range_of_the_data(tmp_path: Path) -> None:
    pytest.importorskip("PIL")
    (tmp_path / "grey.png").write_bytes(picture(np.array([[0, 255, 51]])))
    assert read_array(tmp_path / "grey.png").tolist() == [[[-1, 1, pytest.approx(-0.6)]]]
    colours = np.arange(12).reshape(2, 2, 3)
    (tmp_path / "colour.png").write_bytes(picture(colours))
    read = read_array(tmp_path / "colour.png", (0.0, 255.0))
    torch.testing.assert_close(read, torch.from_numpy(colours).permute(2, 0, 1).float())


def test_a_picture_without_pillow_names_what_to_install(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "y.png").write_bytes(picture(np.zeros((2, 2))))
    monkeypatch.setitem(sys.modules, "PIL", None)
    with pytest.raises(MeasurementError, match=r"y\.png: reading pictures needs Pillow: pip install pillow"):
        read_array(tmp_path / "y.png")


def test_measurements_are_one_or_many(tmp_path: Path) -> None:
    for shape, count in (((4, 5), 1), ((1, 1, 4, 5), 1), ((3, 4, 5), 3), ((3, 1, 4, 5), 3)):
        np.save(tmp_path / "y.npy", normal(*shape).numpy())
        y = read_measurements(tmp_path / "y.npy", BLUR)
        torch.testing.assert_close(y, normal(*shape).reshape(count, *IMAGE))


def test_hidden_values_of_a_whole_object_do_not_matter(tmp_path: Path) -> None:
    operator = Mask(IMAGE, box_mask(IMAGE, slice(1, 3)))
    whole = np.full((4, 5), math.nan)
    whole[1:3] = np.arange(10).reshape(2, 5)
    np.save(tmp_path / "y.npy", whole)
    assert read_measurements(tmp_path / "y.npy", operator).tolist() == [list(range(10))]
    np.save(tmp_path / "y.npy", whole[1:3].flatten())
    assert read_measurements(tmp_path / "y.npy", operator).tolist() == [list(range(10))]
    whole[1, 4] = math.inf
    np.save(tmp_path / "y.npy", whole)
    with pytest.raises(MeasurementError, match=r"y\.npy has 1 values that are NaN or infinite, .* at \(4,\)"):
        read_measurements(tmp_path / "y.npy", operator)


class Harmful:
    def __reduce__(self) -> tuple[Callable[..., object], tuple[str]]:
        return Path.touch, (Path("harm"),)  # type: ignore[return-value]


def test_files_that_are_no_measurement_are_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)

    def refused(name: str, match: str) -> None:
        with pytest.raises(MeasurementError, match=match):
            read_measurements(name, Identity((2,)))

    np.save("pickle.npy", np.array([Harmful()], dtype=object), allow_pickle=True)
    refused("pickle.npy", "pickle.npy: not an array of numbers")
    assert not Path("harm").exists()
    Path("raw.npy").write_bytes(pickle.dumps(Harmful()))
    refused("raw.npy", "raw.npy: not an array of numbers")
    assert not Path("harm").exists()
    np.save("text.npy", np.array(["a"]))
    refused("text.npy", "text.npy: not an array of numbers: <U1")
    np.save("cube.npy", np.zeros((2, 2, 2)))
    refused("cube.npy", r"cube.npy has shape \(2, 2, 2\), but the operator Identity measures shape \(2,\)")
    Path("broken.npy").write_bytes(b"\x93NUMPY\x01\x00")
    refused("broken.npy", "broken.npy: not an array of numbers")
    Path("ragged.csv").write_text("1,2\n3\n")
    refused("ragged.csv", "ragged.csv, line 2: 1 numbers, the lines before have 2")
    Path("words.csv").write_text("a,b\n1,2\n3,four\n")
    refused("words.csv", "words.csv, line 3: could not convert string to float: 'four'")
    Path("empty.csv").write_text("a,b\n")
    refused("empty.csv", "empty.csv: an empty array")
    Path("y.txt").write_text("1")
    refused("y.txt", "y.txt: .txt; what can be read is .npy")
    pytest.importorskip("PIL")
    Path("y.png").write_bytes(b"GIF89a")
    refused("y.png", "y.png: not a PNG picture")


def test_large_files_are_refused_before_they_are_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    np.save(tmp_path / "y.npy", np.zeros(1000))
    monkeypatch.setattr(measurements, "LARGEST_ARRAY", 999)
    with pytest.raises(MeasurementError, match="1,000 values; at most 999"):
        read_array(tmp_path / "y.npy")
    monkeypatch.setattr(measurements, "LARGEST_FILE", 100)
    with pytest.raises(MeasurementError, match="8,128 bytes; at most 100"):
        read_array(tmp_path / "y.npy")
