"""`headwater train posterior`: what it draws, what it leaves behind, and what it refuses."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor

from headwater import jobs
from headwater.diffusion.adapters import Adapter
from headwater.diffusion.amortized_recipe import AmortizedRecipe
from headwater.diffusion.baselines import draw_by
from headwater.diffusion.chains import GaussianChain, QuadraticReward
from headwater.diffusion.denoisers import ResidualMLP, TokenTransformer
from headwater.diffusion.digits_recipe import DigitsRecipe
from headwater.diffusion.latent import Autoencoder, LatentPrior, save_latent_prior
from headwater.diffusion.likelihood_settings import LikelihoodSettings
from headwater.diffusion.operator_settings import OperatorSettings
from headwater.diffusion.posterior_recipe import PosteriorRecipe
from headwater.diffusion.posterior_report import findings_of
from headwater.diffusion.priors import Prior, Units, save_prior
from headwater.diffusion.process import GaussianProcess
from headwater.diffusion.tokens import MaskedProcess
from headwater.objectives import Objective
from headwater.recipes.base import Recipe
from headwater.replay import ReplaySettings
from headwater.reward_worker import RewardError
from headwater.runs import Run
from headwater.sampler import Sampler
from headwater.training import ExplorationSettings, Sharpness, Training
from helpers import seeded

SHORT = Training(iterations=4, batch_size=8, replayed=8, warm_up=16, replay_backward=True, log_every=2)
UPPER = OperatorSettings("inpaint", rows="0:1")


@pytest.fixture(autouse=True)
def _one_thread() -> None:
    torch.set_num_threads(1)


def blank_prior(shape: tuple[int, ...], units: Units | None = None, steps: int = 6) -> Prior:
    """Of which all is known: the network says that the data are 0, so that the chain is Gaussian."""
    process = GaussianProcess.of(shape, steps, "cosine", "data", "learned", final_noise=0.2)
    denoiser = ResidualMLP(shape, width=16, blocks=1, learned_variance=True)
    denoiser.silence()
    return Prior(process, denoiser, units or Units())


def chain_of(measured: float) -> GaussianChain:
    """All that there is to know of that prior, of which the first value was measured with noise of deviation 0.1."""
    prior, gain = blank_prior((2,)), torch.tensor([1.0, 0.0])
    assert isinstance(prior.process, GaussianProcess)
    reward = QuadraticReward.of_measurement(gain, gain * measured, 0.1)
    return GaussianChain(prior.process, prior.denoiser, reward)


@pytest.fixture
def prior(tmp_path: Path) -> Path:
    save_prior(blank_prior((2,)), tmp_path / "prior")
    return tmp_path / "prior"


@pytest.fixture
def images(tmp_path: Path) -> Path:
    save_prior(blank_prior((1, 4, 4)), tmp_path / "images")
    return tmp_path / "images"


def measured(folder: Path, values: object) -> Path:
    np.save(folder / "y.npy", np.asarray(values, dtype=np.float32))
    return folder / "y.npy"


def test_it_finds_the_evidence_and_the_mean_of_a_gaussian_posterior(prior: Path, tmp_path: Path) -> None:
    recipe = PosteriorRecipe(
        prior=prior, operator=UPPER, measurement=measured(tmp_path, [0.3]), likelihood=LikelihoodSettings(noise=0.1),
        training=replace(SHORT, iterations=400, batch_size=64, replayed=64, warm_up=1000, learning_rate=3e-3),
        baselines=("resampling",), samples=2000,
    )  # fmt: skip
    jobs.train(recipe, "posterior", tmp_path / "run", progress_bar=False)
    chain = chain_of(0.3)
    figures = Run.open(tmp_path / "run").evaluation()
    assert float(str(figures["log_z_estimate"])) == pytest.approx(chain.log_z, abs=0.05)
    assert float(str(figures["elbo"])) <= chain.log_z + 0.01
    assert float(str(figures["eubo"])) >= chain.log_z - 0.01
    assert float(str(figures["effective_sample_size"])) > 0.8
    assert float(str(figures["resampling_log_z"])) == pytest.approx(chain.log_z, abs=0.1)
    assert figures["resampling_is_enough"] is True
    objects, _ = blank_prior((2,)).sample(torch.empty(100_000, 0), seeded(0))
    prior_variance = float(objects.var())
    variance = 1 / (1 / prior_variance + 1 / 0.1**2)
    drawn = np.load(tmp_path / "run" / "samples.npy")
    assert drawn[:, 0].mean() == pytest.approx(variance * 0.3 / 0.1**2, abs=0.02)
    assert drawn[:, 0].std() == pytest.approx(variance**0.5, abs=0.015)
    assert drawn[:, 1].std() == pytest.approx(prior_variance**0.5, abs=0.02)


def test_a_run_of_images_leaves_arrays_and_a_report_behind_and_keeps_its_prior(images: Path, tmp_path: Path) -> None:
    truth = tmp_path / "truth.npy"
    np.save(truth, np.zeros((1, 4, 4)))
    recipe = PosteriorRecipe(
        prior=images, operator=OperatorSettings("inpaint", rows="0:2"), measurement=measured(tmp_path, np.ones(8)),
        truth=truth, training=SHORT, samples=20, baselines=("resampling", "twisted-smc", "dps"),
    )  # fmt: skip
    folder = tmp_path / "run"
    jobs.train(recipe, "posterior", folder, progress_bar=False)
    drawn = np.load(folder / "samples.npy")
    assert drawn.shape == (20, 1, 4, 4)
    np.testing.assert_allclose(np.load(folder / "mean.npy"), drawn.mean(0), atol=1e-6)
    np.testing.assert_allclose(np.load(folder / "deviation.npy"), drawn.std(0), atol=1e-6)
    assert all((folder / f"{name}.png").read_bytes().startswith(b"\x89PNG") for name in ("samples", "mean"))
    figures = json.loads((folder / "evaluation.json").read_text())
    assert {one["name"] for one in figures["baselines"]} == {"resampling", "twisted-smc", "dps"}
    assert {"coverage_of_90", "error_of_mean", "chi_squared"} <= figures.keys()
    report = (folder / "report.html").read_text()
    for shown in ("Measurement", "Truth", "Mean of the samples", "Deviation of the samples", "By twisted-smc",
                  "Residuals over noise", "Coverage of the truth"):  # fmt: skip
        assert shown in report
    shutil.rmtree(images)  # the run has all that it needs
    truth.unlink(), (tmp_path / "y.npy").unlink()
    shutil.move(folder, tmp_path / "moved")
    again = Sampler.load(tmp_path / "moved").sample(20)
    np.testing.assert_allclose([float(one.split()[0]) for one in again.objects], drawn[:, 0, 0, 0], rtol=1e-4)


def test_the_weights_of_its_samples_are_those_of_the_paths_that_drew_them(prior: Path, tmp_path: Path) -> None:
    recipe = PosteriorRecipe(
        prior=prior, operator=UPPER, measurement=measured(tmp_path, [0.1]), training=SHORT, baselines=()
    )
    jobs.train(recipe, "posterior", tmp_path / "run", progress_bar=False)
    samples = Sampler.load(tmp_path / "run").sample(4000, seed=3)
    weight = samples.log_reward - samples.log_prob
    chain = chain_of(0.1)
    assert np.log(np.exp(weight).mean()) == pytest.approx(chain.log_z, abs=0.1)


def test_measurements_are_in_the_units_of_the_data(tmp_path: Path) -> None:
    save_prior(blank_prior((2,), Units(5.0, 2.0)), tmp_path / "prior")
    recipe = PosteriorRecipe(
        prior=tmp_path / "prior", operator=UPPER, measurement=measured(tmp_path, [6.0]),
        likelihood=LikelihoodSettings(noise=0.5, beta=0.7),
    )  # fmt: skip
    problem = recipe.problem()
    objects = torch.tensor([[0.5, 9.0], [1.0, -3.0]])  # 6 and 7 in the data's units
    expected = torch.distributions.Normal(torch.tensor([6.0, 7.0]), 0.5).log_prob(torch.tensor(6.0))
    torch.testing.assert_close(problem.reward(objects, torch.empty(2, 0)), 0.7 * expected)


def near_two(objects: Tensor) -> Tensor:
    return -((objects - 2) ** 2).sum(1)


def counts_ones(objects: Tensor) -> Tensor:
    return (objects == 1).sum(1).float()


def impossible(objects: Tensor) -> Tensor:
    return torch.full((len(objects),), -torch.inf)


def test_a_function_can_stand_beside_a_measurement_or_alone(prior: Path, tmp_path: Path) -> None:
    function = LikelihoodSettings(noise=0.5, function=f"{__name__}:near_two")
    alone = PosteriorRecipe(prior=prior, likelihood=function)
    both = replace(alone, operator=UPPER, measurement=measured(tmp_path, [0.1]))
    objects, nothing = torch.tensor([[0.3, 1.0], [2.0, 2.0]]), torch.empty(2, 0)
    torch.testing.assert_close(alone.problem().reward(objects, nothing), near_two(objects))
    measurement = torch.distributions.Normal(objects[:, 0], 0.5).log_prob(torch.tensor(0.1))
    torch.testing.assert_close(both.problem().reward(objects, nothing), near_two(objects) + measurement)


def test_a_latent_prior_draws_decoded_objects(tmp_path: Path) -> None:
    torch.manual_seed(0)
    autoencoder = Autoencoder((1, 4, 4), 2, width=8)
    save_latent_prior(LatentPrior(blank_prior((2,), Units(1.0, 3.0)), autoencoder), tmp_path / "prior")
    recipe = PosteriorRecipe(
        prior=tmp_path / "prior", operator=OperatorSettings("inpaint", rows="0:2"),
        measurement=measured(tmp_path, np.ones(8)), likelihood=LikelihoodSettings(noise=0.5), training=SHORT,
        samples=20, baselines=("resampling", "dps"),
    )  # fmt: skip
    latents = torch.randn(5, 2, generator=seeded(0))
    decoded = 1 + 3 * autoencoder.decode(latents)
    expected = torch.distributions.Normal(decoded[:, 0, :2].flatten(1), 0.5).log_prob(torch.tensor(1.0)).sum(1)
    torch.testing.assert_close(recipe.problem().reward(latents, torch.empty(5, 0)), expected.detach())
    jobs.train(recipe, "posterior", tmp_path / "run", progress_bar=False)
    shutil.rmtree(tmp_path / "prior")
    assert np.load(tmp_path / "run" / "samples.npy").shape == (20, 1, 4, 4)
    assert np.load(tmp_path / "run" / "baseline-dps.npy").shape[1:] == (1, 4, 4)
    again = Sampler.load(tmp_path / "run").sample(20)
    assert len(again.objects[0].split()) == 16


def test_strings_of_tokens_are_written_as_text(tmp_path: Path) -> None:
    torch.manual_seed(0)
    save_prior(Prior(MaskedProcess(3, 2, 3), TokenTransformer(3, 2, 0, 16, 1), alphabet="ab"), tmp_path / "prior")
    recipe = PosteriorRecipe(
        prior=tmp_path / "prior", likelihood=LikelihoodSettings(function=f"{__name__}:counts_ones"),
        adapter=Adapter("correction", width=16, blocks=1), training=SHORT, samples=30,
    )  # fmt: skip
    jobs.train(recipe, "posterior", tmp_path / "run", progress_bar=False)
    samples = Run.open(tmp_path / "run").samples()
    assert samples is not None
    assert all(set(one) <= {"a", "b"} and len(one) == 3 for one in samples.objects)
    np.testing.assert_allclose(samples.log_reward, [one.count("b") for one in samples.objects])
    twisted = json.loads((tmp_path / "run" / "evaluation.json").read_text())["baselines"][1]
    assert "MaskedProcess" in twisted["problem"]
    assert "not possible here" in (tmp_path / "run" / "report.html").read_text()


def test_annealing_starts_flat_and_ends_at_the_posterior(prior: Path, tmp_path: Path) -> None:
    recipe = PosteriorRecipe(
        prior=prior, operator=UPPER, measurement=measured(tmp_path, [0.1]), annealing=Sharpness(9.0, 1.0, 0.5),
        training=replace(SHORT, iterations=4, log_every=1), samples=5, baselines=(),
    )  # fmt: skip
    jobs.train(recipe, "posterior", tmp_path / "run", progress_bar=False)
    assert [row["beta"] for row in Run.open(tmp_path / "run").metrics() if "beta" in row] == [9, 5, 1, 1]


@pytest.mark.parametrize(
    ("wrong", "said"),
    [
        ({"prior": None}, "prior: name a folder"),
        ({"baselines": ("magic",)}, "baselines: 'magic'"),
        ({"annealing": Sharpness(2.0)}, "annealing.beta_end = 2.0: must be 1"),
        ({"truth": Path("x.npy"), "measurement": None}, "truth"),
        ({"objective": Objective("db")}, "objective.name = 'db'"),
    ],
)
def test_settings_that_make_no_sense_are_refused(prior: Path, wrong: dict[str, object], said: str) -> None:
    with pytest.raises(ValueError, match=said):
        PosteriorRecipe(**{"prior": prior, **wrong})  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("values", "said"),
    [
        ([np.nan], r"y\.npy has 1 values that are NaN"),
        (
            [[1.0, 2.0], [3.0, 4.0]],
            r"y\.npy has shape \(2, 2\), but .* measures shape \(1,\) of objects of shape \(2,\)",
        ),
        ([[1.0], [2.0]], r"y\.npy: holds 2 measurements"),
    ],
)
def test_a_measurement_that_does_not_fit_is_refused_by_its_file(
    prior: Path, tmp_path: Path, values: object, said: str
) -> None:
    recipe = PosteriorRecipe(prior=prior, operator=OperatorSettings("downsample", factor=2),
                             measurement=measured(tmp_path, values))  # fmt: skip
    with pytest.raises(ValueError, match=said):
        recipe.check()


def test_a_reward_that_is_nothing_everywhere_is_refused_before_there_is_a_run(prior: Path, tmp_path: Path) -> None:
    recipe = PosteriorRecipe(prior=prior, likelihood=LikelihoodSettings(function=f"{__name__}:impossible"))
    with pytest.raises(RewardError, match="r\\(x\\) = 0 on all 256 of 256 draws of the prior"):
        jobs.train(recipe, "posterior", tmp_path / "run", progress_bar=False)
    assert not (tmp_path / "run" / "settings.toml").exists()


def test_a_prior_without_anything_known_of_the_object_is_refused(prior: Path) -> None:
    with pytest.raises(ValueError, match="nothing is known of the objects: give a measurement"):
        PosteriorRecipe(prior=prior).check()


def test_a_folder_that_is_no_prior_is_refused_on_the_command_line(tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    command = [sys.executable, "-m", "headwater.cli", "train", "posterior", "--prior", str(tmp_path / "empty"),
               "--measurement", str(measured(tmp_path, [1.0])), "--out", str(tmp_path / "run")]  # fmt: skip
    done = subprocess.run(command, text=True, capture_output=True)
    assert done.returncode == 2
    assert "scheduler" in done.stderr
    assert "Traceback" not in done.stderr


def test_a_baseline_that_cannot_be_used_says_why(prior: Path) -> None:
    recipe = PosteriorRecipe(prior=prior, likelihood=LikelihoodSettings(function=f"{__name__}:impossible"))
    with pytest.raises(ValueError, match="r\\(x\\) = 0"):
        draw_by("resampling", recipe.given, recipe.target, torch.empty(1, 0), 50, torch.Generator().manual_seed(0))


def test_the_report_says_when_training_was_not_needed() -> None:
    figures = {"effective_sample_size": 0.9, "log_z_estimate": 1.0, "log_z_interval": 0.1, "pareto_k": 0.2,
               "resampling_reward_calls": 1000, "resampling_effective_draws": 900.0}  # fmt: skip
    needless = findings_of(figures | {"resampling_is_enough": True}).verdict
    assert any("needs no training" in one for one in needless)
    assert not any("heavy tail" in one for one in needless)
    assert any("heavy tail" in one for one in findings_of(figures | {"pareto_k": 0.9}).verdict)


def test_one_sampler_learns_the_posteriors_of_all_measurements(prior: Path, tmp_path: Path) -> None:
    recipe = AmortizedRecipe(
        prior=prior, operator=UPPER, likelihood=LikelihoodSettings(noise=0.1), simulations=2000, baselines=(),
        training=Training(iterations=300, batch_size=64, group_size=4, learning_rate=3e-3, log_every=50),
    )  # fmt: skip
    jobs.train(recipe, "amortized", tmp_path / "run", progress_bar=False)
    figures = Run.open(tmp_path / "run").evaluation()
    assert float(str(figures["mean_effective_sample_size"])) > 0.8
    assert float(str(figures["mean_gap"])) < 0.1
    assert float(str(figures["coverage_largest"])) < 2 * float(str(figures["coverage_largest_expected"]))
    assert "Residuals over noise" in (tmp_path / "run" / "report.html").read_text()  # of the simulated measurement
    assert "coverage_of_90" in figures  # of the simulated object that the samples are asked about
    sampler = Sampler.load(tmp_path / "run")
    for seen in (-0.3, 0.4):
        samples = sampler.sample(1000, condition=[seen])
        weight = samples.log_reward - samples.log_prob
        assert np.log(np.exp(weight).mean()) == pytest.approx(chain_of(seen).log_z, abs=0.1)


def test_a_sampler_of_all_measurements_can_be_asked_for_one_that_was_made(tmp_path: Path) -> None:
    save_prior(blank_prior((2,), Units(5.0, 2.0)), tmp_path / "prior")
    recipe = AmortizedRecipe(
        prior=tmp_path / "prior", operator=UPPER, measurement=measured(tmp_path, [6.0]), simulations=10,
        likelihood=LikelihoodSettings(noise=0.5),
    )  # fmt: skip
    objects = torch.tensor([[0.5, 9.0]])  # its first value is 6 in the data's units
    expected = torch.distributions.Normal(6.0, 0.5).log_prob(torch.tensor([6.0]))
    torch.testing.assert_close(recipe.problem().reward(objects, recipe.default_condition()), expected)


@pytest.mark.parametrize(
    ("wrong", "said"),
    [
        ({"training": Training()}, "training.group_size = 1"),
        ({"simulations": 0}, "simulations = 0"),
        ({"likelihood": LikelihoodSettings(beta=2.0)}, "likelihood.beta"),
    ],
)
def test_what_does_not_go_with_all_measurements_is_refused(prior: Path, wrong: dict[str, object], said: str) -> None:
    with pytest.raises(ValueError, match=said):
        AmortizedRecipe(**{"prior": prior, "operator": UPPER, **wrong})  # type: ignore[arg-type]


def test_a_stopped_run_is_resumed_to_the_same_weights(prior: Path, tmp_path: Path) -> None:
    recipe = PosteriorRecipe(
        prior=prior, operator=UPPER, measurement=measured(tmp_path, [0.1]), samples=5, baselines=(),
        training=replace(SHORT, iterations=6, checkpoint_every=3), replay=ReplaySettings(100, "softmax"),
    )  # fmt: skip
    for name in ("whole", "stopped"):
        jobs.train(recipe, "posterior", tmp_path / name, progress_bar=False)
    shutil.rmtree(max((tmp_path / "stopped" / "checkpoints").iterdir()))
    jobs.resume(tmp_path / "stopped", progress_bar=False)
    whole, resumed = (Run.open(tmp_path / name).latest_checkpoint() for name in ("whole", "stopped"))
    assert whole is not None
    assert resumed is not None
    for name, tensor in whole.tensors["policy"].items():
        assert torch.equal(tensor, resumed.tensors["policy"][name])


def test_the_digits_recipe_makes_its_prior_and_its_measurement(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("sklearn")
    made: list[Training] = []
    train = jobs.train

    def shortened(recipe: Recipe, name: str, folder: Path, *rest: object) -> object:
        made.append(recipe.training)
        few = replace(recipe.training, iterations=4, batch_size=8)
        short = replace(recipe, training=few, samples=4, exploration=ExplorationSettings(epsilon=0.0))
        return train(short, name, folder, progress_bar=False)

    recipe = DigitsRecipe(training=replace(SHORT, replayed=0, warm_up=0), samples=4, baselines=())
    monkeypatch.setattr(jobs, "train", shortened)
    prepared = recipe.prepared(tmp_path / "run")
    monkeypatch.undo()
    assert made[0].iterations == 3000
    jobs.train(prepared, "digits", tmp_path / "run", progress_bar=False)
    run = Run.open(tmp_path / "run")
    assert str(run.settings["prior"]) == "inputs/prior"
    assert np.load(run.folder / "inputs" / "measurement.npy").shape == (32,)
    assert "coverage_of_90" in run.evaluation()
    assert (run.folder / "inputs" / "prior" / "report.html").is_file()
    assert len(Sampler.load(run.folder).sample(3).objects) == 3


def test_the_digits_recipe_knows_its_images() -> None:
    with pytest.raises(ValueError, match="digit = 450"):
        DigitsRecipe(digit=450)
    with pytest.raises(ValueError, match="prior_iterations = 10"):
        DigitsRecipe(prior_iterations=10)
