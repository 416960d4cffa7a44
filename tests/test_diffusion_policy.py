"""Relative trajectory balance over chains: its identities, its gradients, and the distribution that it ends in."""

from __future__ import annotations

import itertools

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional

from headwater.conditions import NoCondition
from headwater.diffusion.adapters import Adapter, Corrected
from headwater.diffusion.chains import GaussianChain, QuadraticReward
from headwater.diffusion.denoisers import Denoiser, ResidualMLP, TokenTransformer
from headwater.diffusion.estimators import resample
from headwater.diffusion.laws import GaussianLaw
from headwater.diffusion.likelihoods import GaussianLikelihood
from headwater.diffusion.operators import Identity
from headwater.diffusion.policy import STATE, DiffusionPolicy
from headwater.diffusion.priors import Prior
from headwater.diffusion.process import BrownianProcess, GaussianProcess, Process
from headwater.diffusion.tokens import MaskedProcess, UniformProcess
from headwater.evaluation import bounds, log_prob_of_objects
from headwater.objectives import Objective, path_log_ratio, trajectory_residual
from headwater.policies.base import NO_EXPLORATION, Exploration
from headwater.replay import ReplaySettings
from headwater.search import LocalSearch
from headwater.training import ExplorationSettings, Trainer, Training
from headwater.trajectories import Trajectories


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


class Still(Denoiser):
    """No drift, or no preference."""

    condition = 0

    def forward(self, state: Tensor, time: Tensor, condition: Tensor) -> Tensor:
        return torch.zeros_like(state)


def network_policy(n_steps: int = 6, **settings: int) -> DiffusionPolicy:
    """A posterior that has learned something else than its prior."""
    torch.manual_seed(0)
    prior = Prior(GaussianProcess.of((2,), n_steps, final_noise=0.1), ResidualMLP((2,), 0, 16, 1))
    with torch.no_grad():
        for parameter in prior.denoiser.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    policy = DiffusionPolicy(prior.process, prior.denoiser, Adapter("copy").posterior(prior), **settings)
    with torch.no_grad():
        for parameter in policy.posterior.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    return policy


def scored(policy: DiffusionPolicy, count: int, seed: int = 0, exploration: Exploration = NO_EXPLORATION):  # type: ignore[no-untyped-def]
    drawn = policy.sample(torch.empty(count, 0), exploration, generator(seed))
    return drawn.with_log_reward(torch.as_tensor(policy.objects(drawn)).sum(1))


def gradients(policy: DiffusionPolicy) -> Tensor:
    return torch.cat([p.grad.flatten() for p in policy.posterior.parameters() if p.grad is not None])


def gradient_of(policy: DiffusionPolicy, batch: Trajectories, objective: str = "vargrad") -> Tensor:
    policy.zero_grad()
    Objective(objective)(policy.log_probs(batch), batch).backward()  # type: ignore[arg-type, no-untyped-call]
    return gradients(policy)


@pytest.mark.parametrize("kind", ["copy", "lora", "correction"])
def test_at_the_start_the_residual_is_minus_the_log_reward(kind: str) -> None:
    torch.manual_seed(0)
    prior = Prior(GaussianProcess.of((2,), 5), ResidualMLP((2,), 0, 16, 1))
    posterior = Adapter(kind).posterior(prior)  # type: ignore[arg-type]
    policy = DiffusionPolicy(prior.process, prior.denoiser, posterior)
    batch = scored(policy, 8)
    torch.testing.assert_close(trajectory_residual(policy.log_probs(batch), batch), -batch.log_reward, atol=0, rtol=0)
    walked = policy.sample_backward(batch, generator(1))
    torch.testing.assert_close(trajectory_residual(policy.log_probs(walked), walked), -batch.log_reward, atol=0, rtol=0)


def test_the_best_steps_of_a_gaussian_chain_balance_along_every_chain() -> None:
    process, reward = BrownianProcess((2,), 8, 1.5), QuadraticReward(torch.tensor([1.0, -0.5]), torch.zeros(2))
    chain = GaussianChain(process, Still(), reward)
    policy = DiffusionPolicy(process, Still(), chain.denoiser())
    for exploration in (NO_EXPLORATION, Exploration(1.0), Exploration(0.0, 3.0)):
        drawn = policy.sample(torch.empty(50, 0), exploration, generator())
        drawn = drawn.with_log_reward(reward(policy.objects(drawn), drawn.condition))
        balance = path_log_ratio(policy.log_probs(drawn), drawn) - drawn.log_reward
        torch.testing.assert_close(balance, torch.full((50,), -chain.log_z), atol=1e-4, rtol=0)


def test_on_policy_the_gradient_is_that_of_reinforce_with_divergence() -> None:
    policy = network_policy()
    batch = scored(policy, 16)
    balance = gradient_of(policy, batch)
    policy.zero_grad()
    log_probs = policy.log_probs(batch)
    score = batch.log_reward - path_log_ratio(log_probs, batch).detach()
    reinforce = -((score - score.mean()) * batch.sum(log_probs.forward)).mean()
    reinforce.backward()  # type: ignore[no-untyped-call]
    torch.testing.assert_close(balance, 2 * gradients(policy), atol=1e-5, rtol=1e-4)


def test_trust_pcl_is_the_same_loss_in_units_of_the_reward() -> None:
    policy, alpha = network_policy(), 0.25
    batch = scored(policy, 16)
    log_probs = policy.log_probs(batch)
    value, divergence = alpha * log_probs.log_z, alpha * path_log_ratio(log_probs, batch)
    consistency = (value + divergence - batch.log_reward).square().mean()
    balance = Objective("tb")(log_probs, batch.with_log_reward(batch.log_reward / alpha))
    torch.testing.assert_close(consistency, alpha**2 * balance)


@pytest.mark.parametrize("at_once", [1, 7, 1000])
def test_steps_computed_again_on_the_way_back_give_the_same_gradient(at_once: int) -> None:
    plain, in_parts = network_policy(), network_policy(steps_at_once=at_once)
    batch = scored(plain, 10)
    torch.testing.assert_close(gradient_of(in_parts, batch), gradient_of(plain, batch), atol=1e-3, rtol=1e-3)


def test_a_gradient_through_some_steps_is_unbiased_and_the_loss_exact() -> None:
    plain, some = network_policy(4), network_policy(4, learned_steps=1)
    batch = scored(plain, 6)
    whole = gradient_of(plain, batch)
    loss = Objective("vargrad")
    torch.testing.assert_close(loss(some.log_probs(batch), batch), loss(plain.log_probs(batch), batch))
    drawn = []
    for some.version in range(1500):
        drawn.append(gradient_of(some, batch))
    each = torch.stack(drawn)
    error = each.std(0) / len(each) ** 0.5
    assert float(each.std(0).max()) > 0
    assert float(((each.mean(0) - whole).abs() / (error + 1e-6)).max()) < 5.5


def test_walking_back_gives_the_density_of_objects() -> None:
    """Without drift a Brownian chain ends in a normal distribution, and its bridge is its exact reversal."""
    policy = DiffusionPolicy(BrownianProcess((3,), 5, 2.0), Still(), Still())
    drawn = policy.sample(torch.empty(20, 0), NO_EXPLORATION, generator())
    objects = torch.as_tensor(policy.objects(drawn))
    exact = GaussianLaw(torch.zeros(20, 3), torch.full((20,), 2.0**0.5)).log_prob(objects)
    found = log_prob_of_objects(policy, policy.remembered(drawn), 3, generator(1))
    torch.testing.assert_close(found.float(), exact, atol=1e-4, rtol=1e-5)


def test_a_replay_remembers_ends_and_walks_back_from_them() -> None:
    policy = network_policy()
    training = Training(iterations=3, batch_size=8, replayed=4, replay_backward=True, learning_rate=1e-3)
    trainer = Trainer(
        policy, lambda objects, _: torch.as_tensor(objects).sum(1), NoCondition(), Objective("vargrad"), training,
        ExplorationSettings(epsilon=0.0), ReplaySettings(rule="uniform"),
    )  # fmt: skip
    for _ in range(3):
        trainer.update()
    assert trainer.replay is not None
    entry = trainer.replay.sample(5, generator())
    assert entry.lengths.tolist() == [1] * 5
    walked = policy.sample_backward(entry, generator())
    assert walked.lengths.tolist() == [policy.process.n_steps + 1] * 5
    torch.testing.assert_close(torch.as_tensor(policy.objects(walked)), entry.steps[STATE])
    torch.testing.assert_close(walked.log_reward, entry.log_reward)


def test_chains_of_the_prior_among_ours_have_the_probability_of_the_mixture() -> None:
    policy = network_policy()
    drawn = policy.sample(torch.empty(40, 0), Exploration(0.3), generator())
    log_probs = policy.log_probs(drawn)
    ours, theirs = drawn.sum(log_probs.forward), drawn.sum(log_probs.backward)
    mixture = (0.7 * ours.double().exp() + 0.3 * theirs.double().exp()).log()
    torch.testing.assert_close(drawn.log_behaviour.double(), mixture, atol=1e-4, rtol=1e-5)


def test_only_what_learns_is_published_and_the_prior_stays() -> None:
    policy = network_policy()
    before = [parameter.clone() for parameter in policy.prior.parameters()]
    assert all(name.startswith(("posterior.", "log_z")) for name in policy.published())
    batch = scored(policy, 8)
    gradient_of(policy, batch)
    torch.optim.SGD(policy.parameters(), 0.1).step()
    for old, new in zip(before, policy.prior.parameters(), strict=True):
        assert torch.equal(old, new)


class Preference(Denoiser):
    """What independent tokens with these logits were, as Bayes' rule has it from a state."""

    condition = 0

    def __init__(self, process: Process) -> None:
        super().__init__()
        self.process, self.logits = process, nn.Buffer(torch.tensor([0.5, 0.0, -0.5]))

    def forward(self, state: Tensor, time: Tensor, condition: Tensor) -> Tensor:
        logits = self.logits.expand(*state.shape, -1)
        if isinstance(self.process, UniformProcess):
            kept = (1 - time)[:, None, None]
            logits = logits + (kept * functional.one_hot(state, 3) + (1 - kept) / 3).log()
        return logits


def ends(policy: DiffusionPolicy, symbols: int) -> tuple[Tensor, Tensor]:
    """Every state, and the exact probability of ending in it: by the chain's transition matrices."""
    process = policy.process
    states = torch.tensor(list(itertools.product(range(symbols), repeat=process.shape[0])))
    start = process.start_log_prob(states).exp()
    if isinstance(process, MaskedProcess):
        start = (states == process.mask).all(1).float()
    before, after = (part.flatten() for part in torch.meshgrid(*[torch.arange(len(states))] * 2, indexing="ij"))
    mass = start.double()
    with torch.no_grad():
        for step in range(process.n_steps):
            number = torch.full((len(states),), step)
            said = policy.posterior(states, process.time(number), torch.empty(len(states), 0))
            law = process.law(said[before], states[before], number[0].expand(len(before)))
            mass = mass @ law.log_prob(states[after]).double().exp().view(len(states), -1)
    return states, mass


def strings_reward(objects: object, condition: Tensor) -> Tensor:
    """Not a product of positions: both tokens want to differ."""
    x = torch.as_tensor(objects)
    return 2.0 * (x[:, 0] != x[:, 1]) - 1.0 * (x[:, 0] == 0)


@pytest.mark.parametrize(("process", "symbols"), [(MaskedProcess(2, 3, 12), 4), (UniformProcess(2, 3, 12), 3)])
def test_strings_end_in_prior_times_reward(process: Process, symbols: int) -> None:
    """Within what steps that draw their tokens independently can do: the more steps, the nearer."""
    torch.manual_seed(0)
    prior = Preference(process)
    policy = DiffusionPolicy(process, prior, Corrected(prior, TokenTransformer(2, 3, 0, 16, 1)))
    training = Training(iterations=300, batch_size=64, learning_rate=3e-3)
    exploration = ExplorationSettings(epsilon=0.3)
    trainer = Trainer(policy, strings_reward, NoCondition(), Objective("vargrad"), training, exploration)
    states, before = ends(policy, symbols)
    for _ in range(training.iterations):
        trainer.update()
    target = before * strings_reward(states, states).double().exp() * (states < 3).all(1)
    log_z, target = float(target.sum().log()), target / target.sum()
    after = ends(policy, symbols)[1]
    assert float(after.sum()) == pytest.approx(1, abs=1e-5)
    assert float((before - target).abs().sum() / 2) > 0.3
    assert float((after - target).abs().sum() / 2) < 0.05
    found = bounds(policy, strings_reward, None, 2000, generator())
    assert found["log_z_estimate"] == pytest.approx(log_z, abs=0.06)


def test_chains_that_were_cut_to_their_ends_cannot_be_learned_from() -> None:
    policy = network_policy()
    with pytest.raises(ValueError, match="only the ends of these have been remembered"):
        policy.log_probs(policy.remembered(scored(policy, 3)))


def test_more_learned_steps_than_there_are_is_an_error() -> None:
    with pytest.raises(ValueError, match="learned_steps = 9: must be from 0 to the 6 steps"):
        network_policy(learned_steps=9)


def test_local_search_leaves_the_target_as_it_is() -> None:
    """Chains of the prior, weighed by r, are chains of the target; a round of proposals by any posterior and their
    acceptance keep them so."""
    process = MaskedProcess(3, 2, 3)
    torch.manual_seed(0)
    prior, posterior = (TokenTransformer(3, 2, 0, 16, 1) for _ in range(2))
    for network in (prior, posterior):
        torch.nn.init.normal_(network.last.weight, std=0.5)
    policy = DiffusionPolicy(process, prior, posterior)
    rng, count = generator(1), 6_000

    def log_reward(chains: Trajectories) -> Tensor:
        tokens = policy.objects(chains)
        assert isinstance(tokens, Tensor)
        return 1.5 * (tokens[:, 0] == tokens[:, 2]).float() - tokens[:, 1].float()

    drawn = policy.sample(torch.empty(count, 0), Exploration(epsilon=1.0), rng)
    chosen = resample(log_reward(drawn).double(), count, rng)
    current = drawn.select(chosen)
    current = current.with_log_reward(log_reward(current))

    def shares(chains: Trajectories) -> Tensor:
        tokens = policy.objects(chains)
        assert isinstance(tokens, Tensor)
        return torch.bincount(tokens @ torch.tensor([4, 2, 1]), minlength=8) / count

    expected = shares(current)
    walked, candidate, log_ratio = policy.back_and_forth(current, 1.0, Exploration(temperature=1.3), rng)
    candidate = candidate.with_log_reward(log_reward(candidate))
    moved = LocalSearch(1).moved(walked, candidate, log_ratio, rng)
    assert 0.5 * float((shares(moved) - expected).abs().sum()) < 0.03
    assert 0.5 * float((shares(candidate) - expected).abs().sum()) > 0.1  # the proposals by themselves are not of it
    assert float((moved.identity != current.identity).float().mean()) > 0.05


def test_a_proposal_keeps_the_first_steps_of_a_chain_and_says_how_likely_all_of_it_was() -> None:
    process = GaussianProcess.of((2,), 8, "cosine", final_noise=0.1)
    torch.manual_seed(0)
    posterior = ResidualMLP((2,), width=8, blocks=1)
    policy = DiffusionPolicy(process, ResidualMLP((2,), width=8, blocks=1), posterior)
    rng = generator(2)
    drawn = policy.sample(torch.empty(300, 0), generator=rng)
    walked, candidate, _ = policy.back_and_forth(drawn, 0.5, Exploration(), rng)
    old, new = (chains.steps["state"].view(300, 9, 2) for chains in (walked, candidate))
    same = (old == new).all(2).sum(1)
    assert set(same.tolist()) == {5, 6, 7, 8}  # the start, and 4 to 7 of 8 steps
    expected = candidate.sum(policy.log_probs(candidate).forward).detach()
    torch.testing.assert_close(candidate.log_behaviour, expected, atol=1e-3, rtol=1e-4)


def test_a_run_with_local_search_learns_from_its_candidates() -> None:
    process = GaussianProcess.of((2,), 4, "cosine", final_noise=0.1)
    policy = DiffusionPolicy(process, ResidualMLP((2,), width=8, blocks=1), ResidualMLP((2,), width=8, blocks=1))
    trainer = Trainer(
        policy, GaussianLikelihood(Identity((2,)), 0.5, torch.zeros(2)), NoCondition(), Objective("vargrad"),
        Training(iterations=2, batch_size=12), ExplorationSettings(epsilon=0.0, local_search=LocalSearch(2, 0.5)),
    )  # fmt: skip
    trainer.run(progress_bar=False)
    assert trainer.search.drawn == 24
