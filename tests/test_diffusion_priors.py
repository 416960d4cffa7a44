"""Networks, posteriors made from priors, and priors on disk."""

from __future__ import annotations

import json
import math
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from headwater.diffusion.adapters import Adapter, Corrected, with_adapters
from headwater.diffusion.denoisers import Denoiser, Network, ResidualMLP, TokenTransformer, of_times, time_features
from headwater.diffusion.policy import DiffusionPolicy
from headwater.diffusion.priors import Prior, Units, load_prior, save_prior
from headwater.diffusion.process import BrownianProcess, GaussianProcess, Process
from headwater.diffusion.tokens import FREE, MaskedProcess, OneByOneProcess, UniformProcess

NOTHING = torch.empty(5, 0)


def image_prior(variance: str = "large") -> Prior:
    torch.manual_seed(0)
    process = GaussianProcess.of((1, 3, 3), 6, "cosine", "velocity", variance, clip=1.5, final_noise=0.1)
    return Prior(process, ResidualMLP((1, 3, 3), width=16, learned_variance=variance == "learned"))


def token_prior() -> Prior:
    torch.manual_seed(0)
    return Prior(MaskedProcess(4, 3, 4), TokenTransformer(4, 3, width=16), alphabet="abc")


def one_by_one_prior() -> Prior:
    torch.manual_seed(0)
    return Prior(OneByOneProcess(4, 3, given=(FREE, FREE, 2, FREE)), TokenTransformer(4, 3, width=16), alphabet="abc")


PRIORS = (image_prior, lambda: image_prior("learned"), token_prior, one_by_one_prior)


def inputs(prior: Prior) -> tuple[Tensor, Tensor, Tensor]:
    random = torch.Generator().manual_seed(1)
    number = torch.arange(5) % prior.process.n_steps
    data = prior.process.start(5, random) if prior.alphabet == "" else torch.randint(3, (5, 4), generator=random)
    state = prior.process.noised(data, number, random)
    return state, prior.process.time(number), torch.randn(5, 2, generator=random)


@pytest.mark.parametrize("make", PRIORS)
@pytest.mark.parametrize(
    ("adapter", "columns"),
    [(Adapter(), 0), (Adapter(), 2), (Adapter("lora", rank=3), 0), (Adapter("correction", width=8, blocks=1), 2)],
)
def test_a_posterior_says_at_first_what_the_prior_says_and_then_learns_alone(
    make, adapter: Adapter, columns: int
) -> None:
    if adapter.kind == "lora":
        pytest.importorskip("peft")
    prior = make()
    state, time, y = inputs(prior)
    before = {name: weight.clone() for name, weight in prior.denoiser.state_dict().items()}
    posterior = adapter.posterior(prior, columns)
    said = prior.denoiser(state, time, y)
    at_first, channels = posterior(state, time, y), said.shape[1]
    assert torch.equal(at_first[:, :channels], said)
    assert not at_first[:, channels:].any()  # a Gaussian step is as wide as the prior's
    learnt = [weight for weight in posterior.parameters() if weight.requires_grad]
    optimizer = torch.optim.SGD(learnt, lr=0.1)
    for _ in range(2):  # the layers behind a silent one learn from the second step on
        optimizer.zero_grad()
        (posterior(state, time, y)[:, :channels] * torch.linspace(-1, 1, said.numel()).view_as(said)).sum().backward()
        optimizer.step()
    assert not torch.equal(posterior(state, time, y), said)
    assert all(torch.equal(weight, before[name]) for name, weight in prior.denoiser.state_dict().items())
    if columns:
        assert not torch.equal(posterior(state, time, y), posterior(state, time, y + 1))
    if adapter.kind != "copy":
        assert not any(weight.requires_grad for weight in prior.denoiser.parameters())


@pytest.mark.parametrize("make", PRIORS)
def test_a_chain_is_as_likely_under_a_new_posterior_as_under_the_prior(make) -> None:
    """So the residual of balance is -log r at first, whatever drew the chain."""
    pytest.importorskip("peft")
    prior = make()
    random = torch.Generator().manual_seed(2)
    for adapter, columns in ((Adapter(), 2), (Adapter("lora"), 0), (Adapter("correction", width=8), 2)):
        policy = DiffusionPolicy(prior.process, prior.denoiser, adapter.posterior(prior, columns))
        drawn = policy.sample(torch.randn(5, columns), generator=random)
        for chains in (drawn, policy.sample_backward(drawn, random)):
            said = policy.log_probs(chains)
            assert torch.equal(said.forward, said.backward)
            assert said.forward.requires_grad


def test_adapters_share_the_weights_of_the_prior_and_name_the_layers_there_are() -> None:
    pytest.importorskip("peft")
    prior = image_prior()
    adapted = with_adapters(prior.denoiser, 2, 2.0, ("last",))
    memory = {weight.data_ptr() for weight in prior.denoiser.parameters()}
    own = [weight for weight in adapted.parameters() if weight.data_ptr() not in memory]
    assert sorted(tuple(weight.shape) for weight in own) == [(2, 16), (9, 2)]
    assert all(weight.requires_grad for weight in own)
    with pytest.raises(ValueError, match=r"targets = attention: must be all or names of layers, such as enter"):
        with_adapters(prior.denoiser, 2, 2.0, ("attention",))


def test_a_langevin_correction_can_follow_the_gradient_of_the_likelihood_and_is_clipped() -> None:
    prior = image_prior("learned")
    state, time, y = inputs(prior)

    def log_likelihood(x: Tensor, condition: Tensor) -> Tensor:
        return -(1e3 * x - condition[:, :1, None, None]).square().flatten(1).sum(1) / 2

    posterior = Adapter("correction", langevin=True, largest_gradient=2.0).posterior(prior, 2, log_likelihood)
    assert isinstance(posterior, Corrected)
    said = prior.denoiser(state, time, y)
    assert torch.equal(posterior(state, time, y), said)
    assert posterior.gradient is not None
    posterior.gradient.last.bias.data.fill_(0.5)
    change = posterior(state, time, y) - said
    slope = (-1e3 * (1e3 * state - y[:, :1, None, None])).clamp(-2, 2)
    torch.testing.assert_close(change[:, :1], 0.5 * slope)
    assert not change[:, 1:].any()  # what says the variance is left alone
    with pytest.raises(ValueError, match="langevin: needs a likelihood"):
        Adapter("correction", langevin=True).posterior(prior)
    with pytest.raises(ValueError, match="strings of tokens"):
        Adapter("correction", langevin=True).posterior(token_prior(), 0, log_likelihood)


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ({"kind": "full"}, "kind = 'full'"),
        ({"rank": 0}, "rank = 0"),
        ({"largest_gradient": 0.0}, "largest_gradient = 0.0"),
    ],
)
def test_an_adapter_that_makes_no_sense_is_refused(settings: dict, said: str) -> None:
    with pytest.raises(ValueError, match=said):
        Adapter(**settings)
    with pytest.raises(ValueError, match=r"'lora'.*2 more columns"):
        Adapter("lora").posterior(image_prior(), 2)


def test_a_network_reads_every_coordinate_the_time_and_its_own_columns_of_the_condition() -> None:
    torch.manual_seed(0)
    vectors = ResidualMLP((3,), condition=2, width=16)
    strings = TokenTransformer(3, 5, condition=2, width=16)
    for network, state in ((vectors, torch.randn(1, 3)), (strings, torch.tensor([[0, 5, 2]]))):
        time, condition = torch.tensor([0.4]), torch.randn(1, 3)
        said = network(state, time, condition)
        for position in range(3):
            other = state.clone()
            other[0, position] = (other[0, position] + 1) % 5
            assert (network(other, time, condition) - said).abs().amax() > 1e-4
        assert not torch.equal(network(state, time + 0.01, condition), said)
        for column, seen in ((0, True), (1, True), (2, False)):
            other = condition.index_add(1, torch.tensor([column]), torch.ones(1, 1))
            assert torch.equal(network(state, time, other), said) != seen
    assert strings(torch.tensor([[0, 5, 2]]), torch.tensor([0.4]), torch.zeros(1, 2)).shape == (1, 3, 5)


def test_what_depends_on_time_alone_is_asked_once_for_each_time_with_the_same_gradient() -> None:
    torch.manual_seed(0)
    layer, time, weight = torch.nn.Linear(64, 3), torch.tensor([0.5, 1.0, 0.5, 0.25, 1.0]), torch.randn(5, 3)
    asked = []

    def function(features: Tensor) -> Tensor:
        asked.append(len(features))
        return layer(features).tanh()

    of_each, at_once = function(time_features(time)), of_times(function, time)
    assert asked == [5, 3]
    torch.testing.assert_close(at_once, of_each)
    expected, found = (torch.autograd.grad((said * weight).sum(), layer.weight)[0] for said in (of_each, at_once))
    torch.testing.assert_close(found, expected)
    assert of_times(function, time[:0]).shape == (0, 3)


def test_a_network_without_condition_says_the_same_whether_columns_are_handed_to_it_or_not() -> None:
    torch.manual_seed(0)
    network, state, time = ResidualMLP((2,), width=16), torch.randn(6, 2), torch.tensor([0.5, 1.0, 0.5]).repeat(2)
    torch.testing.assert_close(network(state, time, torch.randn(6, 3)), network(state, time, torch.empty(6, 0)))


def test_a_network_sees_how_large_the_states_of_an_exploding_chain_are() -> None:
    torch.manual_seed(0)
    network, time = ResidualMLP((2,), width=16), torch.tensor([0.9])
    near, far = (network(size * torch.tensor([[3.0, 4.0]]), time, NOTHING[:1]) for size in (100.0, 200.0))
    assert far.abs().max() < 10
    assert (near - far).abs().max() > 1e-3


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ({"shape": (2,), "width": 0}, "width = 0"),
        ({"shape": (2,), "blocks": 10**9}, "blocks = 1000000000"),
        ({"shape": (2, 0)}, r"shape\[1\] = 0"),
        ({"shape": (2,), "width": "wide"}, "width = 'wide'"),
        ({"shape": 3}, "shape = 3"),
    ],
)
def test_a_size_of_a_network_that_makes_no_sense_is_refused(settings: dict, said: str) -> None:
    with pytest.raises(ValueError, match=said):
        ResidualMLP(**settings)
    with pytest.raises(ValueError, match="width = 10: must be a multiple of heads = 4"):
        TokenTransformer(3, 3, width=10)


class Known(Denoiser):
    """E[x | state] of data that are N(mean, deviation^2) in each coordinate."""

    def __init__(self, process: GaussianProcess, mean: float, deviation: float) -> None:
        super().__init__()
        self.process, self.mean, self.deviation = process, mean, deviation

    def forward(self, state: Tensor, time: Tensor, condition: Tensor) -> Tensor:
        number = ((1 - time) * self.process.n_steps).round().long()
        alpha, sigma = (one[:, None] for one in self.process.alpha_sigma(number))
        gain = alpha * self.deviation**2 / (alpha**2 * self.deviation**2 + sigma**2)
        return self.process.prediction_of(self.mean + gain * (state - alpha * self.mean), state, number)


def test_what_a_prior_draws_and_says_of_it_is_that_of_a_known_gaussian() -> None:
    process = GaussianProcess.of((2,), 200, "linear", "data")
    prior, random = Prior(process, Known(process, 0.5, 0.3)), torch.Generator().manual_seed(0)
    drawn, _ = prior.sample(torch.empty(4000, 0), random)
    assert drawn.mean() == pytest.approx(0.5, abs=0.02)
    assert drawn.std() == pytest.approx(0.3, abs=0.02)
    known = 0.5 + 0.3 * torch.randn(1000, 2, generator=random)
    exact = torch.distributions.Normal(0.5, 0.3).log_prob(known).sum(1)
    bound = prior.log_prob_bound(known, torch.empty(1000, 0), random)
    gap = float((exact - bound).mean())
    assert 0 <= gap < 0.2  # the steps of q are not quite the chain's
    # the mean of p(path) / q(path | x) is the chain's own density, close to the known one
    weights = torch.stack([prior.log_prob_bound(known[:50], torch.empty(50, 0), random) for _ in range(30)])
    estimate = weights.logsumexp(0) - math.log(30)
    assert float((estimate - exact[:50]).mean()) == pytest.approx(0, abs=0.12)


def test_what_one_path_says_of_a_drawn_string_is_exact_where_paths_do_not_matter() -> None:
    """A denoiser that ignores the state draws independent tokens: every path says their log-probability."""

    class Independent(Denoiser):
        def forward(self, state: Tensor, time: Tensor, condition: Tensor) -> Tensor:
            return torch.tensor([0.2, 0.3, 0.5]).log().expand(*state.shape, 3)

    prior = Prior(MaskedProcess(4, 3, 3), Independent())
    random = torch.Generator().manual_seed(0)
    drawn, log_prob = prior.sample(torch.empty(500, 0), random)
    exact = torch.tensor([0.2, 0.3, 0.5]).log()[drawn].sum(1)
    torch.testing.assert_close(log_prob, exact)
    torch.testing.assert_close(prior.log_prob_bound(drawn, torch.empty(500, 0), random), exact)


# On disk


@pytest.mark.parametrize("make", PRIORS)
def test_a_prior_that_is_written_and_read_says_the_same(make, tmp_path: Path) -> None:
    prior = make()
    prior.units = Units(0.5, 3.0)
    save_prior(prior, tmp_path)
    read = load_prior(tmp_path)
    state, time, _ = inputs(prior)
    assert torch.equal(read.denoiser(state, time, NOTHING), prior.denoiser(state, time, NOTHING))
    assert (read.process, read.units, read.alphabet) == (prior.process, prior.units, prior.alphabet)
    assert not any(weight.requires_grad for weight in read.denoiser.parameters())


@pytest.mark.parametrize(
    ("process", "network"),
    [
        (BrownianProcess((2,), 5, 2.0), ResidualMLP((2,), condition=3, width=8)),
        (UniformProcess(3, 4, 5), TokenTransformer(3, 4, width=8)),
        (GaussianProcess((2,), (0.1, 0.5, 0.9), (1.0, 0.8, 0.2), times=(0.9, 0.5)), ResidualMLP((2,), width=8)),
    ],
)
def test_every_process_is_kept(process: Process, network: Network, tmp_path: Path) -> None:
    save_prior(Prior(process, network), tmp_path)
    read = load_prior(tmp_path)
    assert read.process == process
    assert isinstance(read.denoiser, Network)
    assert read.denoiser.settings() == network.settings()


def test_a_prior_of_a_network_that_is_not_headwaters_is_not_written(tmp_path: Path) -> None:
    process = GaussianProcess.of((2,), 3)
    with pytest.raises(ValueError, match="a Known cannot be written"):
        save_prior(Prior(process, Known(process, 0, 1)), tmp_path)


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"format": "headwater.prior.9"}, r"prior.json: format is 'headwater.prior.9'"),
        ({"process": 3}, "process is 3, must be a table"),
        ({"process": {"kind": "levy"}}, "process.kind is 'levy', must be one of gaussian"),
        ({"process": {"kind": "brownian", "shape": [9], "steps": 0}}, "process: steps = 0"),
        ({"process": {"kind": "brownian", "shape": [9], "jumps": 1}}, "process: .*jumps"),
        ({"process": {"kind": "brownian", "shape": [4], "steps": 3}}, "the network does not fit the process"),
        ({"network": {"kind": "mlp", "shape": [1, 3, 3], "width": -4}}, "network: width = -4"),
        (
            {"network": {"kind": "mlp", "shape": [1, 3, 3], "width": 60000, "blocks": 1000}},
            "safetensors: enter.bias has",
        ),
        ({"network": {"kind": "transformer", "length": 4, "vocabulary": 3, "width": 16}}, r"safetensors: blocks.*None"),
        ({"units": {"offset": 0, "factor": 0}}, "factor = 0"),
        ({"alphabet": 7}, "alphabet is 7"),
    ],
)
def test_a_broken_prior_folder_names_file_and_field(change: dict, said: str, tmp_path: Path) -> None:
    save_prior(image_prior(), tmp_path)
    file = tmp_path / "prior.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | change))
    with pytest.raises(ValueError, match=said) as error:
        load_prior(tmp_path)
    assert str(tmp_path) in str(error.value)


def test_what_is_no_prior_says_so(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="there is no such folder"):
        load_prior(tmp_path / "nowhere")
    pytest.importorskip("diffusers")
    with pytest.raises(ValueError, match=r"not a prior; a prior is a folder with prior.json"):
        load_prior(tmp_path)
    (tmp_path / "settings.toml").write_text("")
    with pytest.raises(ValueError, match=r"a run without prior/prior.json"):
        load_prior(tmp_path)


def test_broken_weights_name_the_file(tmp_path: Path) -> None:
    save_prior(image_prior(), tmp_path)
    file = tmp_path / "model.safetensors"
    weights = load_file(file)
    save_file(weights | {"last.bias": weights["last.bias"] * torch.nan}, file)
    with pytest.raises(ValueError, match=r"model.safetensors: last.bias has a number that is not finite"):
        load_prior(tmp_path)
    file.write_bytes(b"\x80\x04.")
    with pytest.raises(ValueError, match=r"model.safetensors: cannot be read as safetensors"):
        load_prior(tmp_path)
    (tmp_path / "prior.json").write_text("{" * 100_000)
    with pytest.raises(ValueError, match=r"prior.json: cannot be read as JSON"):
        load_prior(tmp_path)
