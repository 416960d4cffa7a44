"""Priors are learned from data: the objective is the bound that it says it is, the recipe goes from file to prior."""

from __future__ import annotations

import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor

from headwater import jobs
from headwater.cli import main
from headwater.conditions import NoCondition
from headwater.diffusion.data import read_data
from headwater.diffusion.denoisers import ResidualMLP, TokenTransformer
from headwater.diffusion.fitting import PriorFitting, Unscored
from headwater.diffusion.prior_recipe import ChainSettings, NetworkSettings, PriorRecipe
from headwater.diffusion.priors import Prior, load_prior
from headwater.diffusion.process import BrownianProcess, GaussianProcess
from headwater.diffusion.tokens import MaskedProcess
from headwater.policies.base import Policy
from headwater.runs import Run
from headwater.search import Searcher
from headwater.settings import load_recipe
from headwater.training import ExplorationSettings, Training

NONE = torch.empty(4096, 0)


def expected(policy: PriorFitting, data: Tensor, generator: torch.Generator) -> tuple[float, float]:
    """The mean of what is maximised, and its standard error."""
    with torch.no_grad():
        said = policy.log_probs(policy.sample_to(data, NONE[: len(data)], generator)).forward.double()
    return float(said.mean()), float(said.std() / len(said) ** 0.5)


@pytest.mark.parametrize(("variance", "final_noise"), [("large", 0.0), ("small", 0.3), ("learned", 0.3)])
def test_evidence_is_the_mean_log_probability_of_a_chain_that_is_walked_back(variance: str, final_noise: float) -> None:
    torch.manual_seed(0)
    process = GaussianProcess.of((2,), 4, "linear", "velocity", variance, final_noise=final_noise)
    prior = Prior(process, ResidualMLP((2,), width=16, learned_variance=variance == "learned"))
    random = torch.Generator().manual_seed(0)
    data = torch.randn(4096, 2, generator=random)
    ours, error = expected(PriorFitting(prior, "evidence"), data, random)
    state = process.noised(data, torch.full((4096,), 4), random)
    walked = torch.zeros(4096)
    with torch.no_grad():
        for step in reversed(range(4)):
            number = torch.full((4096,), step)
            before = process.noise(state, number, random)
            law = process.law(prior.denoiser(before, process.time(number), NONE), before, number)
            walked, state = walked + law.log_prob(state), before
    other_error = float(walked.std() / 64)
    assert ours == pytest.approx(float(walked.mean()), abs=4 * (error + other_error))
    assert error + other_error < 0.1 * abs(ours)


def test_evidence_of_masked_tokens_is_the_bound_on_their_log_probability() -> None:
    torch.manual_seed(0)
    prior = Prior(MaskedProcess(4, 3, 5), TokenTransformer(4, 3, width=16))
    random = torch.Generator().manual_seed(0)
    data = torch.randint(3, (4096, 4), generator=random)
    ours, error = expected(PriorFitting(prior, "evidence"), data, random)
    bound = prior.log_prob_bound(data, NONE, random)
    other_error = float(bound.std() / 64)
    assert ours == pytest.approx(float(bound.mean()), abs=4 * (error + other_error))
    assert error + other_error < 0.1 * abs(ours)


@pytest.mark.parametrize("weighting", ["simple", "evidence"])
@pytest.mark.parametrize("parametrisation", ["noise", "data", "velocity"])
def test_the_best_prediction_is_the_mean_of_what_the_data_can_be(weighting, parametrisation: str) -> None:
    """Two data, -1 and 1: at the known mean the gradient of the objective, over both and all noise, is zero."""
    process = GaussianProcess.of((1,), 4, "linear", parametrisation)
    number = torch.full((200_001,), 2)
    alpha, sigma = process.alpha_sigma(torch.tensor(2))
    state = torch.linspace(-4, 4, 200_001)[:, None]
    weight = {one: (-0.5 * ((state - alpha * one) / sigma).square()).exp() for one in (-1.0, 1.0)}
    mean = (weight[1.0] - weight[-1.0]) / (weight[1.0] + weight[-1.0])
    said = process.prediction_of(mean, state, number).requires_grad_()
    policy = PriorFitting(Prior(process, ResidualMLP((1,), width=8)), weighting)
    total = sum(
        weight[one][:, 0] * policy._of_numbers(process, said, torch.full_like(state, one), state, number)
        for one in weight
    )
    assert isinstance(total, Tensor)
    (slope,) = torch.autograd.grad(total.sum(), said)
    assert slope.abs().max() < 1e-4
    (slope,) = torch.autograd.grad(
        (weight[1.0][:, 0] * policy._of_numbers(process, said, torch.ones_like(state), state, number)).sum(), said
    )
    assert slope.abs().max() > 1e-2  # of one of the data alone it is not


def test_what_cannot_be_learned_is_refused() -> None:
    with pytest.raises(ValueError, match="a BrownianProcess is not learned from data"):
        PriorFitting(Prior(BrownianProcess((2,), 3), ResidualMLP((2,), width=8)))
    learned = GaussianProcess.of((2,), 3, variance="learned", final_noise=0.1)
    with pytest.raises(ValueError, match="'simple' does not teach a learned variance"):
        PriorFitting(Prior(learned, ResidualMLP((2,), width=8, learned_variance=True)))


def test_a_policy_without_trajectories_to_given_objects_says_so() -> None:
    class Forward(Policy):
        pass

    searcher = Searcher(Forward(), Unscored(), NoCondition(), given=torch.zeros(3, 2))
    with pytest.raises(ValueError, match="Forward cannot learn from given objects"):
        searcher.draw(2, None, torch.Generator())


# The recipe


@pytest.fixture(scope="module")
def points(tmp_path_factory) -> Path:
    """Two clusters at (10, 20) and (30, 20), deviation 2."""
    random = np.random.default_rng(0)
    left = random.integers(0, 2, 2000) * 20 + 10
    rows = np.stack([left, np.full(2000, 20)], 1) + 2 * random.normal(size=(2000, 2))
    file = tmp_path_factory.mktemp("data") / "points.csv"
    np.savetxt(file, rows, delimiter=",", header="a,b", comments="")
    return file


def quick(data: Path, **settings) -> PriorRecipe:
    training = Training(
        iterations=settings.pop("iterations", 20), batch_size=128, learning_rate=3e-3, schedule="cosine",
        log_every=10, evaluate_every=1000, checkpoint_every=10,
    )  # fmt: skip
    average = ExplorationSettings(epsilon=0.0, average=settings.pop("average", 0.7))
    chain = settings.pop("chain", ChainSettings(steps=10))
    network = settings.pop("network", NetworkSettings(width=32, blocks=1))
    return PriorRecipe(
        data=data, training=training, chain=chain, network=network, samples=100, exploration=average, **settings
    )


def test_a_prior_learned_from_a_table_draws_its_clusters_in_its_units(points: Path, tmp_path: Path) -> None:
    recipe = quick(points, standardise=True, iterations=500, average=0.98, chain=ChainSettings("cosine", steps=30))
    jobs.train(recipe, "prior", tmp_path / "run", progress_bar=False)
    run = Run.open(tmp_path / "run")
    figures = run.evaluation()
    assert figures["sliced_wasserstein"] < 2.5 * figures["sliced_wasserstein_floor"] + 0.02
    assert figures["held_out_objects"] == 200
    drawn = np.load(tmp_path / "run" / "samples.npy")
    assert drawn.shape == (100, 2)
    for cluster in (10, 30):
        near = drawn[np.abs(drawn[:, 0] - cluster) < 8]
        assert 30 <= len(near) <= 70
        assert near.mean(0) == pytest.approx([cluster, 20], abs=1)
    samples = run.samples()
    assert samples is not None
    assert [float(number) for number in samples.objects[0].split()] == pytest.approx(drawn[0], rel=1e-4)
    prior = load_prior(tmp_path / "run")
    again, _ = prior.sample(torch.empty(200, 0), torch.Generator().manual_seed(0))
    assert prior.units.of_data(again).mean(0).tolist() == pytest.approx([20, 20], abs=2)
    page = (tmp_path / "run" / "report.html").read_text()
    assert "Samples beside data" in page
    # log-likelihood: below that of the truth, which knows the clusters and the unit of the prior's numbers
    truth = -np.log(2) - (1 + np.log(2 * np.pi * (2 / prior.units.factor) ** 2))
    assert truth - 0.6 < figures["log_likelihood_bound"] < truth + 0.1


def test_a_run_that_is_stopped_and_resumed_learns_the_same_prior(points: Path, tmp_path: Path) -> None:
    recipe = quick(points, standardise=True)
    jobs.train(recipe, "prior", tmp_path / "run", progress_bar=False)
    whole = load_prior(tmp_path / "run").denoiser.state_dict()
    shutil.rmtree(tmp_path / "run" / "checkpoints" / "iteration-000000020")
    shutil.rmtree(tmp_path / "run" / "prior")
    jobs.resume(tmp_path / "run", progress_bar=False)
    resumed = load_prior(tmp_path / "run").denoiser.state_dict()
    assert all(torch.equal(weight, whole[name]) for name, weight in resumed.items())


def test_a_prior_of_pictures_keeps_them_in_the_run_and_draws_a_grid(tmp_path: Path) -> None:
    folder = tmp_path / "pictures"
    folder.mkdir()
    for number in range(12):
        Image.fromarray(np.full((4, 6, 3), 20 * number, dtype=np.uint8)).save(folder / f"{number:02d}.png")
    command = ["train", "prior", "--data", str(folder), "--out", str(tmp_path / "run"), "--chain.steps", "4"]
    command += ["--training.iterations", "5", "--exploration.average", "0.3", "--network.width", "8", "--samples", "9"]
    with pytest.raises(SystemExit) as ended:
        main(command)
    assert ended.value.code in (0, None)
    shutil.rmtree(folder)
    recipe = load_recipe(Run.open(tmp_path / "run"))
    assert isinstance(recipe, PriorRecipe)
    assert recipe.read.shape == (3, 4, 6)
    assert float(recipe.read.objects.min()) == -1
    assert np.load(tmp_path / "run" / "samples.npy").shape == (9, 3, 4, 6)
    assert "data:image/png;base64," in (tmp_path / "run" / "report.html").read_text()


def test_a_prior_over_strings_draws_strings_of_its_alphabet(tmp_path: Path) -> None:
    lines = tmp_path / "lines.txt"
    lines.write_text("abba\nbaab\n" * 50)
    recipe = quick(
        lines,
        iterations=400,
        average=0.98,
        chain=ChainSettings("masked", steps=40),
        network=NetworkSettings(width=16, blocks=1),
    )
    jobs.train(recipe, "prior", tmp_path / "run", progress_bar=False)
    run = Run.open(tmp_path / "run")
    samples = run.samples()
    assert samples is not None
    assert {len(one) for one in samples.objects} == {4}
    right = sum(one in ("abba", "baab") for one in samples.objects) / len(samples.objects)
    assert right > 0.9
    assert run.evaluation()["log_likelihood_bound"] == pytest.approx(-np.log(2), abs=0.15)
    assert load_prior(tmp_path / "run").alphabet == "ab"
    assert "abba" in (tmp_path / "run" / "report.html").read_text()


def test_settings_that_do_not_go_together_are_refused(points: Path) -> None:
    with pytest.raises(ValueError, match="data: name an array"):
        PriorRecipe()
    for settings, said in (
        ({"held_out": 1.0}, "held_out = 1.0"),
        ({"average": 0.999}, "exploration.average = 0.999: after 20 .* at most 0.86"),
        ({"keep_objects": True}, "keep_objects"),
        ({"chain": ChainSettings(clip=0.5), "standardise": True}, "chain.clip = 0.5: the largest number"),
        ({"network": NetworkSettings("transformer"), "standardise": True}, "network.kind = 'transformer'"),
        ({"network": NetworkSettings("unet"), "standardise": True}, r"shape = \[2\]: the convolutional network"),
        ({"device": "abacus", "standardise": True}, "device = 'abacus'"),
        ({}, "the largest number is 3.* add --standardise"),
        ({"chain": ChainSettings("masked")}, "tokens are whole numbers"),
    ):
        if said.startswith("shape"):
            pytest.importorskip("diffusers")
        with pytest.raises(ValueError, match=said):
            quick(points, **settings).check()
    for wrong, said in (({"steps": 0}, "n_steps = 0"), ({"variance": "small"}, "variance = 'small'")):
        with pytest.raises(ValueError, match=said):
            ChainSettings(**wrong)


def test_data_are_read_as_what_they_are(tmp_path: Path) -> None:
    def saved(values: np.ndarray) -> Path:
        np.save(tmp_path / "data.npy", values)
        return tmp_path / "data.npy"

    random = np.random.default_rng(0)
    assert read_data(saved(random.normal(size=(5, 3)))).shape == (3,)
    assert read_data(saved(random.normal(size=(5, 3, 4)))).shape == (1, 3, 4)
    last = random.integers(0, 256, (5, 6, 4, 3), dtype=np.uint8)
    colours = read_data(saved(last))
    assert colours.shape == (3, 6, 4)
    assert float(colours.objects[1, 2, 3, 1]) == pytest.approx(last[1, 3, 1, 2] / 127.5 - 1)
    torch.testing.assert_close(colours.units.of_data(colours.objects)[:, 0], torch.from_numpy(last[..., 0]).float())
    tokens = read_data(saved(np.array([[0, 4, 1], [2, 2, 2]])), tokens=True)
    assert (tokens.is_tokens, tokens.vocabulary) == (True, 5)
    standard = read_data(saved(random.normal(3, 9, (1000, 2))), standardise=True)
    assert float(standard.objects.mean()) == pytest.approx(0, abs=1e-5)
    assert float(standard.objects.std()) == pytest.approx(1, abs=1e-5)


def test_bad_data_name_the_file_and_the_row(tmp_path: Path) -> None:
    def array(values: np.ndarray) -> Path:
        np.save(tmp_path / "bad.npy", values, allow_pickle=True)
        return tmp_path / "bad.npy"

    def text(name: str, content: str) -> Path:
        (tmp_path / name).write_text(content)
        return tmp_path / name

    hole = np.zeros((6, 2))
    hole[4, 1] = np.nan
    huge = np.zeros((6, 2))
    huge[3, 0] = 1e9
    pictures = tmp_path / "pictures"
    pictures.mkdir()
    for values, said in (
        (hole, "row 4: a number that is not finite"),
        (huge, "row 3: a number beyond"),
        (np.zeros(6), r"shape \(6,\)"),
        (np.array([{}, {}]), "cannot be read as an array"),
        (np.zeros((1, 2)), "1 objects; at least 2"),
        (np.full((3, 2), 1j), "must be one array of real numbers"),
    ):
        with pytest.raises(ValueError, match=f"bad.npy.*{said}"):
            read_data(array(values))
    with pytest.raises(ValueError, match=r"bad.npy, row 1: tokens must be from 0"):
        read_data(array(np.array([[1, 2], [0, -1]])), tokens=True)
    for file, said, tokens in (
        (text("a.csv", "x,y\n1,2\n3\n"), "a.csv, line 3: 1 numbers, the first has 2", False),
        (text("b.csv", "1,2\n3,four\n"), "b.csv, line 2: .*not all numbers", False),
        (text("c.csv", "1,2\n3,inf\n"), "c.csv, line 2: .*not all finite", False),
        (text("d.txt", "abc\nab\n"), "d.txt, line 2: 2 characters, the first line has 3", True),
        (text("e.txt", "abc\nabd\n"), "e.txt: lines of text are tokens", False),
        (text("f.pkl", ""), "f.pkl: must be .npy", False),
        (tmp_path / "nowhere.npy", "nowhere.npy: there is no such file", False),
        (pictures, "pictures: no pictures", False),
    ):
        with pytest.raises(ValueError, match=said):
            read_data(file, tokens)
    Image.fromarray(np.zeros((2, 2), dtype=np.uint8)).save(pictures / "a.png")
    Image.fromarray(np.zeros((3, 2), dtype=np.uint8)).save(pictures / "b.png")
    with pytest.raises(ValueError, match=r"b.png: 3 x 2 pixels, but a.png has 2 x 2"):
        read_data(pictures)
    (pictures / "b.png").write_text("no picture")
    with pytest.raises(ValueError, match=r"b.png: cannot identify"):
        read_data(pictures)
