"""Chains and noising processes: steps compose to what the whole process says, and laws are what they claim to be."""

from __future__ import annotations

import itertools
import math

import pytest
import torch
from torch import Tensor

from headwater.diffusion.laws import CategoricalLaw, GaussianLaw
from headwater.diffusion.process import BrownianProcess, GaussianProcess, Process, Variance
from headwater.diffusion.tokens import FREE, MaskedProcess, OneByOneProcess, RevealingProcess, UniformProcess

GAUSSIAN = {
    "linear": GaussianProcess.of((2,), 20),
    "cosine, some noise left": GaussianProcess.of((2,), 12, "cosine", variance="small", final_noise=0.05),
    "exploding": GaussianProcess.of((2,), 10, "exploding", variance="small"),
    "Brownian": BrownianProcess((2,), 20, 5.0),
}


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def at(number: int, count: int) -> Tensor:
    return torch.full((count,), number)


@pytest.mark.parametrize("name", GAUSSIAN)
def test_noising_step_by_step_ends_where_noising_at_once_does(name: str) -> None:
    process, count = GAUSSIAN[name], 40_000
    data = torch.tensor([1.5, -0.5]).expand(count, -1)
    state = process.noised(data, at(process.n_steps, count), generator())
    for step in reversed(range(process.n_steps)):
        state = process.noise(state, at(step, count), generator(step))
        if step in (0, 1, process.n_steps // 2):
            at_once = process.noised(data, at(step, count), generator(99))
            scale = max(float(at_once.std(0).max()), 1e-6)
            torch.testing.assert_close(state.mean(0), at_once.mean(0), atol=0.03 * scale, rtol=0.02)
            torch.testing.assert_close(state.std(0), at_once.std(0), atol=0.01 * scale, rtol=0.02)


@pytest.mark.parametrize("name", ["cosine, some noise left", "exploding"])
def test_small_variance_is_exact_for_data_that_are_one_point(name: str) -> None:
    """The law of x_k+1 given x_k and x, against Bayes' rule on the noising densities."""
    process, data, count = GAUSSIAN[name], torch.tensor([0.3, -0.8]), 7
    assert isinstance(process, GaussianProcess)
    for step in (1, process.n_steps // 2, process.n_steps - 1):
        state = process.noised(data.expand(count, -1), at(step, count), generator(step))
        law = process.law(process.prediction_of(data, state, at(step, count)), state, at(step, count))
        grid = law.mean[:, None, :] + torch.linspace(-4, 4, 9)[None, :, None] * law.deviation[:, None, None]
        following = grid.flatten(0, 1)
        states, numbers = state.repeat_interleave(9, 0), at(step, 9 * count)
        alpha, sigma = process.alpha_sigma(numbers + 1)
        marginal = GaussianLaw(alpha[:, None] * data, sigma).log_prob(following)
        bayes = (marginal + process.noise_log_prob(states, following, numbers)).view(count, 9)
        ours = GaussianLaw(law.mean.repeat_interleave(9, 0), law.deviation.repeat_interleave(9)).log_prob(following)
        differences = bayes - ours.view(count, 9)
        assert float((differences - differences[:, :1]).abs().max()) < 2e-3


@pytest.mark.parametrize("parametrisation", ["noise", "data", "velocity"])
def test_a_prediction_is_turned_into_data_and_back(parametrisation: str) -> None:
    process = GaussianProcess.of((3,), 15, "cosine", parametrisation)  # type: ignore[arg-type]
    number, data = torch.arange(15), torch.randn(15, 3, generator=generator())
    state = process.noised(data, number, generator(1))
    prediction = process.prediction_of(data, state, number)
    torch.testing.assert_close(process.predicted_data(prediction, state, number), data, atol=2e-2, rtol=1e-3)
    if parametrisation == "noise":
        alpha, sigma = process.alpha_sigma(number)
        torch.testing.assert_close(alpha[:, None] * data + sigma[:, None] * prediction, state)


def test_clipping_bounds_the_predicted_data() -> None:
    process = GaussianProcess.of((2,), 10, parametrisation="data", clip=1.0)
    data = process.predicted_data(torch.tensor([[3.0, -0.2]]), torch.zeros(1, 2), at(4, 1))
    assert data.tolist() == [[1.0, pytest.approx(-0.2)]]


def test_a_learned_variance_lies_between_small_and_large() -> None:
    process = GaussianProcess.of((1, 2, 2), 10, variance="learned", final_noise=0.1)
    state = torch.randn(3, 1, 2, 2, generator=generator())
    number = torch.tensor([0, 4, 9])
    for span, name in ((-1.0, "small"), (1.0, "large")):
        prediction = torch.cat([torch.zeros_like(state), torch.full_like(state, span)], 1)
        learned = process.law(prediction, state, number).deviation
        fixed = GaussianProcess.of((1, 2, 2), 10, variance=name, final_noise=0.1)  # type: ignore[arg-type]
        expected = fixed.law(torch.zeros_like(state), state, number).deviation
        torch.testing.assert_close(learned, expected[:, None, None, None].expand_as(state))
        said, whole = (process.predicted_data(each, state, number) for each in (prediction[:, :1], prediction))
        torch.testing.assert_close(whole, said)


def test_log_probabilities_are_sums_over_all_coordinates() -> None:
    mean, deviation = torch.zeros(2, 1, 8, 8), torch.tensor([1.0, 2.0])
    following = torch.ones_like(mean)
    each = [-0.5 - 0.5 * math.log(2 * math.pi), -0.125 - math.log(2.0) - 0.5 * math.log(2 * math.pi)]
    expected = torch.tensor([64 * value for value in each])
    torch.testing.assert_close(GaussianLaw(mean, deviation).log_prob(following), expected)


@pytest.mark.parametrize("schedule", ["linear", "cosine", "exploding"])
def test_noise_falls_at_every_one_of_many_steps(schedule: str) -> None:
    assert GaussianProcess.of((2,), 1000, schedule).n_steps == 1000  # type: ignore[arg-type]


def test_a_deterministic_last_step_is_refused() -> None:
    with pytest.raises(ValueError, match=r"variance = 'small': the last step would be deterministic.*final_noise"):
        GaussianProcess.of((2,), 10, variance="small")


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ({"n_steps": 0}, "n_steps = 0"),
        ({"schedule": "quadratic"}, "schedule = 'quadratic': must be one of linear, cosine, exploding"),
        ({"parametrisation": "x0"}, "parametrisation = 'x0'"),
        ({"final_noise": 0.7}, "final_noise = 0.7"),
        ({"schedule": "exploding", "smallest_noise": 60.0}, "smallest_noise = 60.0"),
    ],
)
def test_wrong_settings_are_named(settings: dict[str, object], said: str) -> None:
    with pytest.raises(ValueError, match=said):
        GaussianProcess.of(**{"shape": (2,), "n_steps": 10} | settings)  # type: ignore[arg-type]


TOKENS: dict[str, Process] = {
    "masked": MaskedProcess(2, 3, 4),
    "masked, one given": MaskedProcess(2, 3, 4, given=(FREE, 1)),
    "one by one": OneByOneProcess(2, 3),
    "one by one, one given": OneByOneProcess(2, 3, given=(FREE, 1)),
    "uniform": UniformProcess(2, 3, 4),
}


def strings(process: Process) -> Tensor:
    """All states that a chain may be in."""
    symbols = range(4 if isinstance(process, RevealingProcess) else 3)
    rows = torch.tensor(list(itertools.product(symbols, repeat=2)))
    if isinstance(process, RevealingProcess) and process.given:
        rows = rows[rows[:, 1] == 1]
    return rows


@pytest.mark.parametrize("name", TOKENS)
@pytest.mark.parametrize("step", range(4))
def test_laws_of_tokens_and_their_noise_sum_to_one(name: str, step: int) -> None:
    process = TOKENS[name]
    states = strings(process)
    before, after = (part.flatten() for part in torch.meshgrid(*[torch.arange(len(states))] * 2, indexing="ij"))
    number = at(step, len(before))
    prediction = torch.randn(len(states), 2, 3, generator=generator())[before]
    forward = process.law(prediction, states[before], number).log_prob(states[after]).exp()
    torch.testing.assert_close(forward.view(len(states), -1).sum(1), torch.ones(len(states)))
    if isinstance(process, RevealingProcess) and step == 3:  # nothing is masked any more
        keep = (states != process.mask).all(1)
        after_rows = torch.arange(len(states))[keep]
    else:
        after_rows = torch.arange(len(states))
    for row in after_rows.tolist():
        log_prob = process.noise_log_prob(states, states[row].expand(len(states), -1), at(step, len(states)))
        reachable = log_prob.exp()
        if isinstance(process, RevealingProcess):  # what is known never changes, only hides
            reachable = reachable * ((states == states[row]) | (states == process.mask)).all(1)
        assert float(reachable.sum()) == pytest.approx(1, abs=1e-5)


@pytest.mark.parametrize("name", TOKENS)
def test_a_perfect_denoiser_undoes_the_noise_of_one_token(name: str) -> None:
    """For strings of independent tokens the chain with the true logits ends in the data's own distribution."""
    process, count = TOKENS[name], 60_000
    data = torch.tensor([0.6, 0.3, 0.1])
    state = process.start(count, generator())
    for step in range(process.n_steps):
        number = at(step, count)
        prediction = data.log().expand(count, 2, 3)
        if isinstance(process, UniformProcess):  # p(x | x_k) by Bayes' rule
            kept = step / process.steps
            here = torch.nn.functional.one_hot(state, 3)
            prediction = prediction + (kept * here + (1 - kept) / 3).log()
        state = process.law(prediction, state, number).sample(generator(step + 1))
    shares = torch.bincount(state[:, 0], minlength=3) / count
    torch.testing.assert_close(shares, data, atol=0.01, rtol=0)
    if isinstance(process, RevealingProcess) and process.given:
        assert bool((state[:, 1] == 1).all())


def test_what_is_drawn_has_the_probability_that_the_law_says() -> None:
    law = CategoricalLaw(torch.tensor([0.2, 0.0, 0.8]).log().expand(50_000, 1, 3))
    drawn = law.sample(generator())
    torch.testing.assert_close(torch.bincount(drawn[:, 0], minlength=3) / 50_000, torch.tensor([0.2, 0.0, 0.8]),
                               atol=0.01, rtol=0)  # fmt: skip
    wide = GaussianLaw(torch.zeros(50_000, 1), torch.ones(50_000)).tempered(4.0).sample(generator())
    assert float(wide.std()) == pytest.approx(2, abs=0.03)


@pytest.mark.parametrize("variance", ["small", "large"])
def test_a_second_half_of_a_prediction_makes_steps_narrower(variance: Variance) -> None:
    process = GaussianProcess.of((1, 2, 2), 5, "cosine", "data", variance, final_noise=0.1)
    state, number = torch.randn(3, 1, 2, 2, generator=torch.Generator().manual_seed(0)), torch.tensor([0, 2, 4])
    said = torch.zeros_like(state)
    plain = process.law(said, state, number)
    half = process.law(torch.cat([said, torch.full_like(said, math.log(0.5))], 1), state, number)
    same = process.law(torch.cat([said, torch.zeros_like(said)], 1), state, number)
    torch.testing.assert_close(half.mean, plain.mean)
    torch.testing.assert_close(half.deviation, 0.5 * plain.deviation.view(3, 1, 1, 1).expand_as(state))
    torch.testing.assert_close(same.log_prob(state), plain.log_prob(state))
