"""Discrete energy models: published log Z, elimination against brute force, exact draws, training, and clear errors."""

from __future__ import annotations

import itertools
import math
from pathlib import Path
from typing import Literal

import pytest
import torch
from torch import Tensor

from headwater import jobs
from headwater.conditions import NoCondition
from headwater.environments import Slots, check_environment
from headwater.environments.elimination import Elimination, TooWide
from headwater.environments.lattice import PairwiseReward, Sites, read_couplings, sites, torus
from headwater.evaluation import ExactDistribution, bounds
from headwater.objectives import Objective
from headwater.policies import EnvironmentPolicy, Network
from headwater.recipes.ising import IsingRecipe
from headwater.reward import TemperedReward
from headwater.runs import Run
from headwater.training import ExplorationSettings, Trainer, Training
from helpers import seeded

NOTHING = torch.empty(1, 0)


@pytest.fixture(autouse=True)
def _one_thread() -> None:
    torch.set_num_threads(1)
    torch.manual_seed(0)


def random_model(n: int, states: int, density: float = 1.0, seed: int = 0) -> PairwiseReward:
    generator = seeded(seed)
    upper = torch.randn(n, n, generator=generator).double() * 0.4
    upper = upper * (torch.rand(n, n, generator=generator) < density)
    fields = torch.randn(n, states, generator=generator).double()
    return PairwiseReward(upper.triu() + upper.triu(1).T, states, fields)


def every_state(n: int, states: int) -> Tensor:
    return torch.tensor(list(itertools.product(range(states), repeat=n)), dtype=torch.int32)


@pytest.mark.parametrize(
    ("side", "sigma", "log_z"),
    [
        (4, 0.1, 11.771470),
        (6, 0.1, 26.444949),
        (9, 0.1, 59.497050),
        (10, 0.1, 73.453098),
        (10, 0.2, 88.187701),
    ],
)
def test_log_z_of_the_torus_is_the_published_one(side: int, sigma: float, log_z: float) -> None:
    assert PairwiseReward(sigma * torus(side, side)).elimination().log_z == pytest.approx(log_z, abs=2e-6)


def test_the_reward_is_x_j_x_over_ordered_pairs() -> None:
    couplings = torch.tensor([[0.5, 0.1, 0.0], [0.1, 0.0, -0.3], [0.0, -0.3, 0.0]])
    states = every_state(3, 2)
    spins = 2.0 * states - 1
    expected = torch.stack([x @ couplings @ x for x in spins])
    torch.testing.assert_close(PairwiseReward(couplings)(states, NOTHING), expected)
    potts = PairwiseReward(couplings, 3, torch.tensor([[0.0, 1.0, 2.0]] * 3))
    # sites 1 and 2 alike: 2 * 0.1, site 3 apart: 0; the diagonal adds 0.5; fields of states 1, 1, 2
    value = potts(torch.tensor([[1, 1, 2]]), NOTHING)
    assert float(value) == pytest.approx(0.2 + 0.5 + 1 + 1 + 2)


def test_bonds_of_the_torus() -> None:
    bonds = torus(4, 5)
    assert torch.equal(bonds, bonds.T)
    assert (bonds.sum(1) == 4).all()
    assert bonds[0].nonzero()[:, 0].tolist() == [1, 4, 5, 15]
    assert (torus(2, 2).sum(1) == 2).all()  # a bond counts once, though it leads round either way
    assert torus(1, 3).sum() == 6


@pytest.mark.parametrize(
    ("n", "states", "density"), [(7, 2, 1.0), (7, 2, 0.3), (6, 3, 0.5), (5, 4, 1.0), (1, 3, 1.0), (6, 2, 0.0)]
)
def test_elimination_agrees_with_the_sum_over_all_states(n: int, states: int, density: float) -> None:
    model = random_model(n, states, density)
    values = model(every_state(n, states), NOTHING).double()
    exact = model.elimination()
    assert exact.log_z == pytest.approx(float(values.logsumexp(0)), abs=1e-5)
    count = 20_000
    drawn = exact.sample(count, seeded(1)).long()
    place = (drawn * states ** torch.arange(n - 1, -1, -1)).sum(1)
    shares = torch.bincount(place, minlength=states**n) / count
    probabilities = values.softmax(0)
    error = (shares - probabilities).abs() / (probabilities * (1 - probabilities) / count).sqrt().clamp(min=1 / count)
    assert float(error.max()) < 5.5


def test_elimination_refuses_what_would_not_fit() -> None:
    with pytest.raises(TooWide, match="at most"):
        random_model(40, 2).elimination()
    wide = PairwiseReward(0.1 * torus(10, 10)).elimination()
    assert not wide.can_draw
    with pytest.raises(TooWide, match="none were kept"):
        wide.sample(1, seeded(0))


def test_a_chain_of_hundreds_of_sites_is_summed_whatever_their_order() -> None:
    n = 300
    order = torch.randperm(n, generator=seeded(0))
    couplings = torch.zeros(n, n)
    couplings[order[:-1], order[1:]] = couplings[order[1:], order[:-1]] = 0.3
    expected = n * math.log(2) + (n - 1) * math.log(math.cosh(0.6))
    assert PairwiseReward(couplings).elimination().log_z == pytest.approx(expected, abs=1e-5)
    assert isinstance(PairwiseReward(couplings).elimination(), Elimination)


def test_sites_keep_the_contract_and_their_states() -> None:
    report = check_environment(sites(4, 3))
    assert report.ok, str(report)
    assert report.n_objects == report.n_trajectories == 81
    states = every_state(3, 3)
    assert torch.equal(torch.as_tensor(Sites(3, 3).objects(Sites(3, 3).states(states))), states)
    twelve = Sites(2, 12)
    assert torch.as_tensor(twelve.objects(twelve.states([(11, 10)]))).tolist() == [[11, 10]]
    assert isinstance(sites(4, 2, "slots"), Slots)


def trained(model: PairwiseReward, construction: Literal["append", "slots"], iterations: int) -> EnvironmentPolicy:
    policy = EnvironmentPolicy(sites(len(model.couplings), model.q, construction), Network(width=64))
    training = Training(iterations=iterations, batch_size=64, learning_rate=5e-3, schedule="cosine")
    quiet = ExplorationSettings(epsilon=0.0)
    Trainer(policy, model, NoCondition(), Objective("vargrad"), training, quiet).run(progress_bar=False)
    return policy


@pytest.mark.parametrize("construction", ["append", "slots"])
@pytest.mark.parametrize("model", [PairwiseReward(0.15 * torus(3, 3)), random_model(4, 3)], ids=["Ising", "Potts"])
def test_small_models_reach_the_exact_distribution(
    model: PairwiseReward, construction: Literal["append", "slots"]
) -> None:
    policy = trained(model, construction, 500)
    exact = ExactDistribution(policy.environment, model)
    figures = exact.compare(policy)
    assert figures["total_variation"] < 0.05
    assert figures["log_z_exact"] == pytest.approx(model.elimination().log_z, abs=1e-5)
    blank = EnvironmentPolicy(policy.environment, Network(width=64))
    assert exact.compare(blank)["total_variation"] > 0.25


def test_log_z_of_a_lattice_too_large_to_enumerate_is_matched_within_its_interval() -> None:
    model = PairwiseReward(0.1 * torus(4, 5))
    exact = model.elimination()
    figures = bounds(trained(model, "append", 400), model, None, 4000, seeded(2), exact)
    assert abs(figures["log_z_estimate"] - exact.log_z) < 2 * figures["log_z_interval"] < 0.1
    assert exact.log_z - 0.3 < figures["elbo"] < exact.log_z < figures["eubo"] < exact.log_z + 0.3


def test_the_recipe_knows_log_z_at_its_default_temperature() -> None:
    recipe = IsingRecipe(height=3, width=3, coupling=0.2, magnetic_field=0.1, states=3)
    states = every_state(9, 3)
    values = recipe.base_reward()(states, NOTHING).double()
    assert recipe.exact_log_z() == pytest.approx(float(values.logsumexp(0)), abs=1e-5)
    hot = IsingRecipe(
        height=3, width=3, coupling=0.2, states=3, inverse_temperatures=(0.1, 0.5), objective=Objective("tb")
    )
    beta = hot.default_condition()
    assert beta is not None
    values = TemperedReward(hot.base_reward())(states, beta.expand(len(states), -1)).double()
    assert hot.exact_log_z() == pytest.approx(float(values.logsumexp(0)), abs=1e-5)
    assert hot.exact_draws() is not None
    assert IsingRecipe(height=12, width=12).exact_log_z() is None


def test_magnetisation_and_text_of_lattices() -> None:
    ising, potts = IsingRecipe(height=2, width=2), IsingRecipe(height=2, width=2, states=3)
    assert ising.text(torch.tensor([[1, 1, 0, 1]])) == ["++-+"]
    assert torch.as_tensor(ising.objects(["++-+"])).tolist() == [[1, 1, 0, 1]]
    assert ising.magnetisation(torch.tensor([[1, 1, 0, 1]])).tolist() == [0.5]
    assert potts.magnetisation(torch.tensor([[2, 2, 2, 2], [0, 0, 1, 2]])).tolist() == [1.0, 0.25]
    with pytest.raises(ValueError, match="'x' is no state"):
        ising.objects(["+x--"])


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("0,1\n1,0,2\n", "line 2: 3 numbers, the first line has 2"),
        ("0,1\n1,zero\n", "line 2, column 2: 'zero' is not a number"),
        ("0,nan\nnan,0\n", "line 1, column 2: 'nan' is not a finite number"),
        ("0,1\n", "1 lines of 2 numbers"),
        ("", "0 lines"),
        ("0,1\n0.5,0\n", "row 1, column 2 has 1, row 2, column 1 has 0.5"),
    ],
)
def test_a_broken_file_of_couplings_is_named_with_its_fault(text: str, said: str, tmp_path: Path) -> None:
    (tmp_path / "J.csv").write_text(text)
    with pytest.raises(ValueError, match=r"J\.csv") as error:
        IsingRecipe(couplings=tmp_path / "J.csv")
    assert said in str(error.value)


def test_a_file_of_couplings_is_the_model(tmp_path: Path) -> None:
    (tmp_path / "J.csv").write_text("0,0.5,0\n0.5,0,-0.2\n0,-0.2,0\n")
    recipe = IsingRecipe(couplings=tmp_path / "J.csv")
    assert recipe.exact_log_z() == pytest.approx(3 * math.log(2) + math.log(math.cosh(1.0) * math.cosh(0.4)), abs=1e-6)
    (tmp_path / "binary.csv").write_bytes(b"\xff\xfe\x00")
    with pytest.raises(ValueError, match="cannot be read as CSV"):
        read_couplings(tmp_path / "binary.csv")


@pytest.mark.parametrize(
    ("make", "said"),
    [
        (lambda: PairwiseReward(torch.zeros(2, 3)), "square"),
        (lambda: PairwiseReward(torch.full((2, 2), torch.inf)), "finite"),
        (lambda: PairwiseReward(torch.zeros(2, 2), states=1), "states = 1: must lie between 2 and 10"),
        (lambda: PairwiseReward(torch.zeros(2, 2), 2, torch.zeros(3, 2)), r"\[2, 2\]"),
        (lambda: torus(0, 3), "height = 0"),
        (lambda: torus(1, 1), "two sites"),
        (lambda: sites(3, 2, "spiral"), "must be 'append' or 'slots'"),  # type: ignore[arg-type]
        (lambda: IsingRecipe(coupling=math.nan), "coupling = nan"),
    ],
)
def test_a_mistake_about_a_model_is_named(make: object, said: str) -> None:
    with pytest.raises(ValueError, match=said):
        make()  # type: ignore[operator]


@pytest.mark.parametrize("states", [2, 3])
def test_a_run_reports_lattices_and_their_physics_beside_exact_draws(states: int, tmp_path: Path) -> None:
    training = Training(iterations=10, batch_size=16)
    recipe = IsingRecipe(height=4, width=5, states=states, training=training, network=Network(width=16), samples=30)
    jobs.train(recipe, "ising", tmp_path / "run", progress_bar=False)
    figures = Run.open(tmp_path / "run").evaluation()
    log_z = PairwiseReward(0.1 * torus(4, 5), states).elimination().log_z
    assert figures["log_z_exact"] == pytest.approx(log_z)
    assert float(str(figures["elbo"])) < log_z < float(str(figures["eubo"]))
    report = (tmp_path / "run" / "report.html").read_text()
    assert "12 lattices of 4 rows and 5 columns" in report
    assert "5,000 exact ones" in report


def test_a_model_without_a_lattice_is_reported_too(tmp_path: Path) -> None:
    (tmp_path / "J.csv").write_text("0,0.5,0\n0.5,0,-0.2\n0,-0.2,0\n")
    training = Training(iterations=5)
    recipe = IsingRecipe(couplings=tmp_path / "J.csv", training=training, network=Network(width=16), samples=10)
    jobs.train(recipe, "ising", tmp_path / "run", progress_bar=False)
    (tmp_path / "J.csv").unlink()
    assert "total_variation" in jobs.evaluate(tmp_path / "run")
    assert "Magnetisation" in jobs.report(tmp_path / "run").read_text()
