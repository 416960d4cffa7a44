"""Points of a box: densities that integrate to 1, log-probabilities by hand, and the learned density by quadrature."""

from __future__ import annotations

import math
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor

from headwater import Sampler, jobs
from headwater.conditions import NoCondition
from headwater.environments.base import Objects
from headwater.environments.box import RingReward, cell_integrals
from headwater.evaluation import bounds, log_prob_of_objects
from headwater.objectives import Name, Objective
from headwater.policies import BoxPolicy, Exploration, Network
from headwater.policies.box import BoxBackward
from headwater.policies.densities import BoxMixture, Kind
from headwater.recipes.box import BoxRecipe
from headwater.replay import ReplaySettings
from headwater.runs import Run
from headwater.training import ExplorationSettings, Trainer, Training
from headwater.trajectories import Trajectories
from helpers import same, seeded

KINDS: list[Kind] = ["beta", "gaussian"]
NOTHING = torch.empty(1, 0)


@pytest.fixture(autouse=True)
def _one_thread() -> None:
    torch.set_num_threads(1)
    torch.manual_seed(0)


def random_box(
    dimensions: int, kind: Kind, backward: BoxBackward = "learned", steps: int = 3, scale: float = 0.7
) -> BoxPolicy:
    """A policy whose every step is a mixture of its own."""
    policy = BoxPolicy(dimensions, steps, kind, components=3, backward=backward, network=Network(width=32))
    torch.nn.init.normal_(policy.heads.weight, std=scale)
    torch.nn.init.normal_(policy.heads.bias, std=scale)
    return policy.requires_grad_(False)


def quadrature(cells: int = 400, nodes: int = 8) -> tuple[Tensor, Tensor]:
    """Gauss-Legendre nodes and weights over [0, 1], `[cells * nodes]` each."""
    offsets, weights = (torch.from_numpy(values) / 2 for values in np.polynomial.legendre.leggauss(nodes))
    return ((torch.arange(cells)[:, None] + 0.5 + offsets) / cells).flatten(), (weights / cells).repeat(cells)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("direction", ["forward", "backward"])
def test_every_step_density_integrates_to_one(kind: Kind, direction: str) -> None:
    policy = random_box(1, kind)
    axis, weight = quadrature()
    states = torch.tensor([[1e-6], [0.03], [0.5], [0.77], [1 - 1e-6]])
    for time in range(policy.n_steps) if direction == "forward" else range(1, policy.n_steps):
        step = policy.forward_step if direction == "forward" else policy.backward_step
        mixture = step(states, time)
        mass = [
            float(weight @ mixture_of(mixture, row, len(axis)).log_prob(axis[:, None]).double().exp())
            for row in range(len(states))
        ]
        np.testing.assert_allclose(mass, 1, atol=1e-5)


def mixture_of(mixture: BoxMixture, row: int, count: int) -> BoxMixture:
    """`count` copies of one of the mixtures."""
    rows = torch.full((count,), row)
    return replace(
        mixture, log_weight=mixture.log_weight[rows], location=mixture.location[rows], width=mixture.width[rows]
    )


@pytest.mark.parametrize("kind", KINDS)
def test_step_densities_of_two_coordinates_integrate_to_one(kind: Kind) -> None:
    policy = random_box(2, kind)
    axis, weight = quadrature(60, 5)
    grid, volume = torch.cartesian_prod(axis, axis), torch.outer(weight, weight).flatten()
    for mixture in (policy.forward_step(torch.tensor([[0.2, 0.9]]), 1), policy.backward_step(torch.rand(1, 2), 2)):
        density = mixture_of(mixture, 0, len(grid)).log_prob(grid).double().exp()
        assert float(volume @ density) == pytest.approx(1, abs=1e-4)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("width", [0.005, 0.05, 0.5, 3.0])
@pytest.mark.parametrize("location", [0.0, 0.2, 1.0])
def test_draws_follow_the_density_at_every_location_and_width(kind: Kind, width: float, location: float) -> None:
    count = 4000
    one = BoxMixture(kind, torch.zeros(1, 1), torch.full((1, 1, 1), location), torch.full((1, 1, 1), width))
    axis, weight = quadrature(1000, 4)
    density = weight * one.log_densities(axis[:, None, None]).exp().flatten()
    assert float(density.sum()) == pytest.approx(1, abs=1e-5)
    drawn = mixture_of(one, 0, count).sample(seeded(0))[:, 0].double().sort().values
    cumulative = np.interp(drawn, axis, density.cumsum(0) - density / 2)
    empirical = (np.arange(count) + 0.5) / count
    assert float(np.abs(cumulative - empirical).max()) < 1.95 / math.sqrt(count) + 1e-3  # Kolmogorov, 0.1 %
    deviation = float((density * (axis - density @ axis) ** 2).sum().sqrt())
    if 0.01 < width < 0.1:
        assert deviation == pytest.approx(width, rel=0.45)  # a half-normal has 0.6 of it


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("backward", ["learned", "fixed"])
def test_log_probs_are_those_of_the_steps_one_by_one(kind: Kind, backward: BoxBackward) -> None:
    policy = random_box(2, kind, backward, steps=4)
    batch = policy.sample(NOTHING.expand(5, 0), generator=seeded(1))
    batch.validate()
    said = policy.log_probs(batch)
    paths = batch.steps["point"].view(5, 4, 2)
    forward, undone = said.forward.view(5, 4), said.backward.view(5, 4)
    for time in range(4):
        left = paths[:, time - 1] if time else paths[:, 0]
        expected = policy.forward_step(left, time).log_prob(paths[:, time])
        torch.testing.assert_close(forward[:, time], expected, atol=2e-3, rtol=1e-4)
        if time:
            expected = policy.backward_step(paths[:, time], time).log_prob(left)
            torch.testing.assert_close(undone[:, time], expected, atol=2e-3, rtol=1e-4)
    assert (undone[:, 0] == 0).all()  # the source is an atom
    torch.testing.assert_close(batch.log_behaviour, batch.sum(said.forward), atol=5e-3, rtol=1e-4)
    part = batch.select(torch.tensor([3, 1]))
    torch.testing.assert_close(policy.log_probs(part).forward.view(2, 4), forward[[3, 1]], atol=2e-3, rtol=1e-4)


def test_a_walk_backward_ends_in_the_same_points_and_knows_its_probability() -> None:
    policy = random_box(2, "gaussian")
    drawn = policy.sample(NOTHING.expand(6, 0), generator=seeded(1)).with_log_reward(torch.arange(6.0))
    walked = policy.sample_backward(drawn, seeded(2))
    assert torch.equal(torch.as_tensor(policy.objects(walked)), torch.as_tensor(policy.objects(drawn)))
    assert torch.equal(walked.identity, drawn.identity)
    assert torch.equal(walked.log_reward, drawn.log_reward)
    assert not torch.equal(walked.steps["point"], drawn.steps["point"])
    backward = walked.sum(policy.log_probs(walked).backward)
    torch.testing.assert_close(walked.log_behaviour, backward, atol=2e-3, rtol=1e-4)
    assert drawn.identity.unique().numel() == 6
    assert same(policy.sample_backward(drawn, seeded(2)), walked)


def test_exploration_is_part_of_the_behaviour_probability() -> None:
    policy = random_box(1, "gaussian", steps=1)
    drawn = policy.sample(NOTHING.expand(500, 0), Exploration(epsilon=0.3, temperature=2.0), seeded(1))
    points = drawn.steps["point"]
    density = policy.forward_step(points, 0).tempered(2.0).log_prob(points).exp()
    torch.testing.assert_close(drawn.log_behaviour.exp(), 0.3 + 0.7 * density, rtol=1e-3, atol=1e-4)
    uniform = policy.sample(NOTHING.expand(2000, 0), Exploration(epsilon=1.0), seeded(1))
    assert (uniform.log_behaviour == 0).all()
    assert float(uniform.steps["point"].mean()) == pytest.approx(0.5, abs=0.03)


@pytest.mark.parametrize("kind", KINDS)
def test_cell_probabilities_by_quadrature_are_those_of_draws(kind: Kind) -> None:
    policy, cells, count = random_box(2, kind, steps=3), 4, 20_000
    exact = policy.cell_probabilities(cells, nodes=24)
    assert float(exact.sum()) == pytest.approx(1, abs=5e-3)
    points = torch.as_tensor(policy.objects(policy.sample(NOTHING.expand(count, 0), generator=seeded(3))))
    place = (points * cells).long()
    drawn = torch.bincount(place[:, 0] * cells + place[:, 1], minlength=cells**2).view(cells, cells) / count
    assert float((drawn - exact).abs().max()) < 4.5 * math.sqrt(0.25 / count)


def test_log_densities_of_points_are_estimated_by_walks_back() -> None:
    policy, cells = random_box(1, "gaussian", "fixed", steps=2, scale=0.2), 40
    points = (torch.arange(cells)[:, None] + 0.5) / cells
    drawn = policy.sample(NOTHING.expand(cells, 0), generator=seeded(0))
    drawn.steps["point"][drawn.last] = points
    estimate = log_prob_of_objects(policy, drawn, 4000, seeded(1)).exp() / cells
    exact = policy.cell_probabilities(cells, nodes=20)
    assert float((estimate - exact).abs().sum()) < 0.05
    assert float((estimate - exact.mean()).abs().sum()) > 0.09  # they do differ


def sine_reward(objects: Objects, condition: Tensor) -> Tensor:
    """R(x) = 1 + 0.9 sin(6 pi x) in each coordinate: three humps an axis."""
    return (1 + 0.9 * (6 * math.pi * torch.as_tensor(objects)).sin()).log().sum(1)


def trained(
    policy: BoxPolicy, objective: Name, iterations: int = 500, replay: ReplaySettings | None = None, replayed: int = 0
) -> BoxPolicy:
    training = Training(
        iterations=iterations, batch_size=64, learning_rate=3e-3, log_z_learning_rate=0.02, schedule="cosine",
        replayed=replayed, replay_backward=replayed > 0,
    )  # fmt: skip
    quiet = ExplorationSettings(epsilon=0.0)
    Trainer(policy, sine_reward, NoCondition(), Objective(objective), training, quiet, replay).run(progress_bar=False)
    return policy


def distance(policy: BoxPolicy, cells: int = 40) -> float:
    true = cell_integrals(sine_reward, policy.dimensions, cells)
    return float((policy.cell_probabilities(cells) - true / true.sum()).abs().sum() / 2)


def test_an_untrained_policy_over_the_box_is_far_from_the_target() -> None:
    assert distance(BoxPolicy(1, 2)) > 0.25


@pytest.mark.parametrize(
    ("objective", "kind", "backward"),
    [
        ("tb", "beta", "fixed"),
        ("tb", "gaussian", "learned"),
        ("vargrad", "gaussian", "fixed"),
        ("db", "gaussian", "fixed"),
        ("subtb", "beta", "fixed"),
    ],
)
def test_training_reaches_the_density_and_its_integral(objective: Name, kind: Kind, backward: BoxBackward) -> None:
    policy = trained(BoxPolicy(1, 2, kind, 8, backward, Network(width=64)), objective)
    assert distance(policy) < 0.1
    log_z = float(cell_integrals(sine_reward, 1, 40).sum().log())
    figures = bounds(policy, sine_reward, None, 4000, seeded(1))
    assert figures["log_z_estimate"] == pytest.approx(log_z, abs=0.05)
    assert figures["elbo"] < log_z + 0.02
    if objective == "tb":
        assert float(policy.log_z.detach()) == pytest.approx(log_z, abs=0.05)


def test_replayed_points_are_walked_back_and_learnt_from() -> None:
    policy = trained(BoxPolicy(1, 2, network=Network(width=64)), "tb", 300, ReplaySettings(500), 32)
    assert distance(policy) < 0.15


def test_the_rings_integral_is_that_of_quadrature() -> None:
    ring = RingReward(0.1, 0.5, 2.0)
    for dimensions in (1, 2):
        integral = cell_integrals(ring, dimensions, 20)
        assert float(integral.sum().log()) == pytest.approx(ring.log_z(dimensions), abs=1e-6)
    points = torch.tensor([[0.5, 0.5], [0.1, 0.5], [0.1, 0.95], [0.15, 0.85], [0.12, 0.2]])
    expected = torch.tensor([0.1, 0.1, 0.6, 2.6, 0.6])
    torch.testing.assert_close(ring(points[:4], NOTHING).exp(), expected[:4])
    assert float(ring(torch.tensor([[0.12, 0.15]]), NOTHING).exp()) == pytest.approx(2.6)


@pytest.mark.parametrize(
    ("make", "said"),
    [
        (lambda: BoxPolicy(0), "dimensions = 0"),
        (lambda: BoxPolicy(1, steps=0), "steps = 0"),
        (lambda: BoxPolicy(1, density="cauchy"), "beta, gaussian"),  # type: ignore[arg-type]
        (lambda: BoxPolicy(1, backward="uniform"), "learned, fixed"),  # type: ignore[arg-type]
        (lambda: BoxPolicy(1, network=Network("transformer")), "tokens"),
        (lambda: BoxPolicy(3).cell_probabilities(4), "dimensions = 3"),
        (lambda: BoxPolicy(1).sample(torch.zeros(2, 1)), r"expected \[T, 0\]"),
        (lambda: RingReward(r0=0.0), "r0 = 0.0"),
        (lambda: RingReward(r1=-1.0), "r1 = -1.0"),
        (lambda: BoxRecipe(objective=Objective("mdb")), "objective.name = 'mdb': over a box, one of tb"),
        (lambda: BoxRecipe(quadrature=-1), "quadrature = -1"),
    ],
)
def test_a_mistake_about_a_box_is_named(make: object, said: str) -> None:
    with pytest.raises(ValueError, match=said):
        make()  # type: ignore[operator]


def test_trajectories_of_points_survive_a_file(tmp_path: object) -> None:
    drawn = BoxPolicy(3).sample(NOTHING.expand(4, 0), generator=seeded(0))
    drawn.save(f"{tmp_path}/points.safetensors")
    assert same(Trajectories.load(f"{tmp_path}/points.safetensors"), drawn)


@pytest.mark.parametrize(("dimensions", "said"), [(1, "over 20 cells"), (2, "over 20 × 20 cells"), (3, "axis by axis")])
def test_a_run_over_a_box_reports_density_and_integral(dimensions: int, said: str, tmp_path: Path) -> None:
    training = Training(iterations=20, batch_size=16)
    recipe = BoxRecipe(dimensions=dimensions, training=training, network=Network(width=16), samples=50)
    jobs.train(recipe, "box", tmp_path / "run", progress_bar=False)
    figures = Run.open(tmp_path / "run").evaluation()
    assert figures["log_z_exact"] == pytest.approx(math.log(0.1 + 0.5 * 0.5**dimensions + 2 * 0.2**dimensions))
    assert {"elbo", "log_z_gap", "pearson", "modes"} <= figures.keys()
    assert said in (tmp_path / "run" / "report.html").read_text()
    first, second = (Sampler.load(tmp_path / "run").sample(30, seed=3) for _ in range(2))
    assert first.objects == second.objects
    np.testing.assert_array_equal(first.log_prob, second.log_prob)


def test_a_function_of_points_is_integrated_and_learnt(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "ramp.py").write_text("def height(points):\n    return [2 * x + 0.5 for (x,) in points]\n")
    recipe = BoxRecipe(dimensions=1, function="ramp:height", network=Network(width=16), samples=10)
    assert recipe.exact_log_z() == pytest.approx(math.log(1.5), abs=1e-5)
    jobs.train(replace(recipe, training=Training(iterations=5)), "box", tmp_path / "run", progress_bar=False)
    assert Run.open(tmp_path / "run").evaluation()["log_z_exact"] == pytest.approx(math.log(1.5), abs=1e-5)
    assert replace(recipe, quadrature=0).exact_log_z() is None
    assert recipe.distance("0.1 0.2", "0.4 0.6") == pytest.approx(0.5)
