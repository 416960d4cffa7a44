"""Model parameters that are sampled with the tree: priors, coordinates, processes, and what a run says of them."""

from __future__ import annotations

import csv
import math
from pathlib import Path

import numpy as np
import pytest
import torch

from headwater.phylogeny.models import SubstitutionModel, process, transition_matrices
from headwater.phylogeny.parameters import FreeParameters, ParameterDensity
from headwater.phylogeny.recipe import PhylogenyRecipe
from headwater.phylogeny.settings import ModelSettings
from headwater.sampler import Sampler
from phylogeny_recipe_helpers import evolved, fasta, train

GTR = FreeParameters(SubstitutionModel("GTR", 4, True))
VALUES = {
    "kappa": 3.7,
    "frequencies": (0.35, 0.3, 0.1, 0.25),
    "exchangeabilities": (0.05, 0.45, 0.1, 0.05, 0.3, 0.05),
    "alpha": 0.42,
    "invariant": 0.13,
}
MODELS = [("K80", 1, False), ("HKY85", 4, False), ("JC69", 4, True), ("GTR", 4, True)]


def on_a_grid(model: SubstitutionModel, low: float, high: float, step: float) -> tuple[torch.Tensor, torch.Tensor]:
    """Coordinates of all of a model's parameters and their prior probabilities, a cell of a grid each."""
    free = FreeParameters(model)
    axis = torch.arange(low, high, step, dtype=torch.float64)
    grid = torch.cartesian_prod(*[axis] * free.size).view(-1, free.size)
    return grid, free.log_prior(grid).exp() * step**free.size


@pytest.mark.parametrize("model", [("K80", 1, False), ("JC69", 4, False), ("JC69", 1, True)])
def test_priors_of_single_parameters_integrate_to_one(model: tuple[str, int, bool]) -> None:
    _, mass = on_a_grid(SubstitutionModel(*model), -40, 40, 0.01)  # type: ignore[arg-type]
    assert float(mass.sum()) == pytest.approx(1, abs=1e-6)


def test_the_prior_of_kappa_is_uniform_in_kappa_over_one_plus_kappa() -> None:
    x, mass = on_a_grid(SubstitutionModel("K80"), -40, 40, 0.001)
    share = torch.sigmoid(x[:, 0])
    for quantile in (0.1, 0.5, 0.8):
        assert float(mass[share < quantile].sum()) == pytest.approx(quantile, abs=1e-3)


def test_the_prior_of_the_gamma_shape_is_exponential_of_rate_one() -> None:
    x, mass = on_a_grid(SubstitutionModel("JC69", 4), -40, 10, 0.001)
    for value in (0.1, 1.0, 3.0):
        assert float(mass[x[:, 0].exp() < value].sum()) == pytest.approx(1 - math.exp(-value), abs=2e-3)


def test_the_prior_of_frequencies_is_uniform_on_their_simplex() -> None:
    free = FreeParameters(SubstitutionModel("GTR"))
    axis = torch.arange(-16, 16, 0.5, dtype=torch.float64)
    grid = torch.cartesian_prod(axis, axis, axis)
    both = torch.cat([grid, torch.zeros(len(grid), 5, dtype=torch.float64)], 1)
    exchange = math.log(math.factorial(5)) - 6 * math.log(6)  # the density of the second simplex at its middle
    mass = (free.log_prior(both) - exchange).exp() * 0.5**3
    assert float(mass.sum()) == pytest.approx(1, abs=1e-4)
    share = free.values(both)["frequencies"]
    assert (mass[:, None] * share).sum(0).numpy() == pytest.approx(np.full(4, 1 / 4), abs=1e-4)
    assert (mass[:, None] * share.square()).sum(0).numpy() == pytest.approx(np.full(4, 2 / 20), abs=1e-4)


def test_the_prior_of_exchangeabilities_integrates_to_one() -> None:
    free, generator = FreeParameters(SubstitutionModel("GTR")), np.random.default_rng(0)
    x = torch.zeros(400_000, 8, dtype=torch.float64)
    x[:, 3:] = torch.from_numpy(generator.logistic(scale=1.5, size=(len(x), 5)))
    proposal = (-x[:, 3:] / 1.5 - 2 * torch.log1p((-x[:, 3:] / 1.5).exp()) - math.log(1.5)).sum(1)
    frequencies = math.log(math.factorial(3)) - 4 * math.log(4)
    ratio = (free.log_prior(x) - frequencies - proposal).exp()
    error = float(ratio.std()) / math.sqrt(len(x))
    assert error < 0.01
    assert float(ratio.mean()) == pytest.approx(1, abs=4 * error)


def test_coordinates_are_the_inverse_of_values_and_numbers() -> None:
    x = GTR.coordinates(**VALUES)
    assert x.shape == (GTR.size,) == (10,)
    found = GTR.values(x[None])
    assert all(found[name][0].numpy() == pytest.approx(np.array(VALUES[name]), rel=1e-5) for name in found)
    many = torch.randn(50, GTR.size, generator=torch.Generator().manual_seed(0)) * 2
    numbers = GTR.numbers(many)
    assert numbers.shape == (50, len(GTR.names)) == (50, 12)
    assert GTR.coordinates_of(numbers).numpy() == pytest.approx(many.numpy(), abs=1e-4)
    assert numbers[:, :4].sum(1).numpy() == pytest.approx(np.ones(50))
    assert GTR.names[:5] == ["pi(A)", "pi(C)", "pi(G)", "pi(T)", "r(AC)"]


@pytest.mark.parametrize("model", MODELS)
def test_the_process_at_coordinates_is_that_of_the_same_values(model: tuple[str, int, bool]) -> None:
    substitution = SubstitutionModel(*model)  # type: ignore[arg-type]
    free, lengths = FreeParameters(substitution), np.array([[0.01, 0.3, 2.0]])
    given = process(substitution, **VALUES)  # type: ignore[arg-type]
    found = free.process(free.coordinates(**VALUES)[None])
    assert transition_matrices(found, lengths) == pytest.approx(transition_matrices(given, lengths), abs=1e-5)
    assert found.invariant == pytest.approx(given.invariant, abs=1e-6)
    assert found.frequencies == pytest.approx(given.frequencies, abs=1e-6)


def test_coordinates_however_far_out_have_a_process() -> None:
    for far in (-50.0, 50.0):
        found = GTR.process(torch.full((2, GTR.size), far))
        assert np.isfinite(transition_matrices(found, np.full((2, 1), 0.1))).all()


def test_the_density_of_parameters_is_what_it_draws_from() -> None:
    factor = torch.tensor([[0.3, 0.0], [-0.1, 0.2]])
    density, generator = ParameterDensity(torch.tensor([1.0, -2.0]), factor), torch.Generator().manual_seed(0)
    with torch.no_grad():
        density.mixed[1, 0], density.log_width[0] = 0.8, 0.5
        density.shift.copy_(density.standardised(torch.tensor([[3.0, -2.0]]))[0])
        drawn = density.sample(20_000, generator)
        covariance = torch.cov(drawn.t())
        exact = torch.distributions.MultivariateNormal(torch.tensor([3.0, -2.0]), covariance)
        assert (density.log_prob(drawn) - exact.log_prob(drawn)).abs().mean() < 0.03
        assert drawn.mean(0).numpy() == pytest.approx(np.array([3.0, -2.0]), abs=0.02)


def test_a_run_samples_parameters_and_says_what_they_are(tmp_path: Path) -> None:
    rows = evolved(((("a", "b"), "c"), ("d", "e")), 60, 0.15, seed=4)
    model = ("--model.name", "HKY85", "--model.gamma-categories", 2, "--model.sampled")
    run = train(
        tmp_path / "run", "--alignment", fasta(tmp_path / "five.fasta", rows), *model, "--training.iterations", 60,
        "--training.batch-size", 32, "--training.log-every", 5, "--samples", 200, "--chains.pool", 32,
        "--chains.warm-up", 50,
    )  # fmt: skip
    losses = [row["loss"] for row in run.metrics()]
    assert np.mean(losses[-3:]) < 0.8 * losses[0]
    samples, recipe = run.samples(), Sampler.load(run.folder).recipe
    assert isinstance(recipe, PhylogenyRecipe)
    assert samples is not None
    names = ["kappa", "pi(A)", "pi(C)", "pi(G)", "pi(T)", "alpha"]
    assert recipe.parameters == names
    with (run.folder / "samples.csv").open() as file:
        row = next(csv.DictReader(file))
    assert float(row["kappa"]) == samples.extra["kappa"][0] > 0
    assert np.sum([samples.extra[name] for name in names[1:5]], 0) == pytest.approx(np.ones(200), abs=1e-5)

    # the first draw by itself: the same log-likelihood with its parameters given as fixed ones
    first = {name: samples.extra[name][0] for name in names}
    fixed = PhylogenyRecipe(
        alignment=recipe.alignment,
        model=ModelSettings(
            "HKY85", 2, kappa=first["kappa"], alpha=first["alpha"],  # type: ignore[arg-type]
            frequencies=tuple(first[name] for name in names[1:5]),  # type: ignore[arg-type]
        ),
    )  # fmt: skip
    assert fixed.columns(samples.objects[:1])["log_likelihood"] == pytest.approx(
        samples.extra["log_likelihood"][:1], abs=2e-3
    )
    page = (run.folder / "report.html").read_text()
    assert "<h2>Model parameters</h2>" in page
    assert "<td>kappa</td>" in page
    assert set(recipe.columns(samples.objects[:3])) == {"log_likelihood", "tree_length", *names}
    with pytest.raises(ValueError, match="no kappa"):
        recipe.columns(["(a:1,b:1,(c:1,(d:1,e:1):1):1);"])


def test_the_first_guess_at_a_posterior_is_near_it() -> None:
    recipe = PhylogenyRecipe()  # the primates; -6489.12 by importance sampling of each topology
    assert recipe.guess.log_marginal == pytest.approx(-6489.12, abs=1)
    assert recipe.guess.coordinates.shape == (0,)


def test_the_first_guess_at_parameters_is_a_maximum_with_its_curvature() -> None:
    guess = PhylogenyRecipe(model=ModelSettings("HKY85", 4, sampled=True)).guess
    again = PhylogenyRecipe(model=ModelSettings("HKY85", 4, kappa=20.0, alpha=2.0, sampled=True)).guess
    torch.testing.assert_close(again.coordinates, guess.coordinates, atol=0.05, rtol=0)  # wherever it starts
    torch.testing.assert_close(again.factor, guess.factor, atol=0.02, rtol=0.1)
    assert guess.log_marginal == pytest.approx(-5795.5, abs=4)  # MrBayes' stepping stones: -5795.2 and -5796.2
