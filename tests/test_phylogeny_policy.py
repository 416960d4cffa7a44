"""The policy over trees: what it draws is what it says, over all trajectories of a few leaves probabilities sum to one,
and the native kernels say what plain operations do.
"""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from headwater.conditions import NoCondition
from headwater.evaluation import ExactDistribution, sampling_floor
from headwater.objectives import Objective
from headwater.phylogeny.environment import Forests
from headwater.phylogeny.lengths import BinnedLengths, LengthDensity, MixtureLengths
from headwater.phylogeny.network import Lengths
from headwater.phylogeny.pair_score import pair_scores, plain_pair_scores
from headwater.phylogeny.pairs import FURTHEST, PAIR_FEATURES, Apart, describe
from headwater.phylogeny.reward import ParsimonyReward
from headwater.phylogeny.walks import forests_on_the_way, tables_of
from headwater.policies.base import NO_EXPLORATION, Exploration
from headwater.training import Trainer, Training
from helpers import seeded
from phylogeny_helpers import (
    Kind,
    every_tree_trajectory,
    patterns,
    random_tree_policy,
    states_on_the_way,
    trajectories,
)

NOTHING = torch.empty(1, 0)


@pytest.fixture(autouse=True)
def _one_thread() -> None:
    torch.set_num_threads(1)


def parsimony_reward(n: int) -> ParsimonyReward:
    return ParsimonyReward(*patterns(n), constant=60.0)


# Drawing and log-probabilities


@pytest.mark.parametrize("condition_size", [0, 2])
@pytest.mark.parametrize(
    ("kind", "lengths"), [("parsimony", "mixture"), ("likelihood", "mixture"), ("likelihood", "binned")]
)
@pytest.mark.parametrize("n", [3, 8])
def test_drawn_trajectories_have_the_log_probability_that_they_were_drawn_with(
    kind: Kind, lengths: Lengths, n: int, condition_size: int
) -> None:
    policy = random_tree_policy(kind, n, condition_size=condition_size, lengths=lengths)
    condition = torch.randn(90, condition_size, generator=seeded(1))
    drawn = policy.sample(condition, NO_EXPLORATION, seeded(2))
    said = policy.log_probs(drawn)
    torch.testing.assert_close(drawn.sum(said.forward), drawn.log_behaviour, rtol=1e-4, atol=2e-4)
    assert len(drawn.identity.unique()) == 1 if n == 3 and kind == "parsimony" else 90
    assert (said.log_z != policy.log_z).any() == (condition_size > 0)


def test_exploration_is_in_the_recorded_log_probability() -> None:
    policy = random_tree_policy("parsimony", 5)
    uniform = policy.sample(torch.empty(7, 0), Exploration(epsilon=1.0), seeded(0))
    torch.testing.assert_close(uniform.log_behaviour, torch.full((7,), -math.log(10 * 6 * 3)))


def test_no_trajectories_at_all_are_drawn_where_none_are_asked_for() -> None:
    drawn = random_tree_policy("likelihood", 4).sample(torch.empty(0, 0), NO_EXPLORATION, seeded(0))
    assert len(drawn) == 0


@pytest.mark.parametrize("kind", ["parsimony", "likelihood"])
def test_what_is_drawn_and_said_does_not_depend_on_the_batch(kind: Kind) -> None:
    policy = random_tree_policy(kind, 7)
    one_by_one, generator = [], seeded(3)
    together = policy.sample(torch.empty(130, 0), NO_EXPLORATION, seeded(3))
    for count in (64, 64, 2):  # as many as are drawn at once
        one_by_one.append(policy.sample(torch.empty(count, 0), NO_EXPLORATION, generator))
    assert torch.equal(together.identity, torch.cat([part.identity for part in one_by_one]))
    chosen = torch.tensor([129, 3, 77])
    said, alone = policy.log_probs(together), policy.log_probs(together.select(chosen))
    for ours, theirs in ((alone.forward, said.forward), (alone.log_flow, said.log_flow)):
        assert ours is not None
        assert theirs is not None
        torch.testing.assert_close(ours.view(3, -1), theirs.view(130, -1)[chosen], rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("backward", ["uniform", "learned"])
def test_probabilities_of_all_trajectories_sum_to_one_forwards_and_backwards(backward: str) -> None:
    policy = random_tree_policy("parsimony", 5, backward, condition_size=1)  # type: ignore[arg-type]
    merges = every_tree_trajectory(5)
    batch = trajectories(merges, torch.tensor([[0.7]]))
    said = policy.log_probs(batch)
    assert float(batch.sum(said.forward.detach()).exp().sum()) == pytest.approx(1, abs=1e-5)
    trees, which = tables_of(merges)[0].unique(dim=0, return_inverse=True)
    assert len(trees) == 15
    into_each = torch.zeros(15).index_add(0, which, batch.sum(said.backward).exp())
    torch.testing.assert_close(into_each, torch.ones(15))
    choices = said.backward.neg().exp()  # how many, where all are as probable
    assert bool(((choices - choices.round()).abs() < 1e-4).all()) == (backward == "uniform")


@pytest.mark.parametrize("backward", ["uniform", "learned"])
def test_probabilities_of_the_parents_of_every_forest_sum_to_one(backward: str) -> None:
    policy = random_tree_policy("parsimony", 5, backward)  # type: ignore[arg-type]
    environment, merges = Forests(5), every_tree_trajectory(5)
    states, _ = states_on_the_way(environment, merges)
    said = policy.log_probs(trajectories(merges)).backward.view(-1, 4)
    # One step may be taken by several trajectories, whose orders before it differ: they all say the same of it.
    steps = torch.cat([states[:, :-1], states[:, 1:]], 2).flatten(0, 1)
    steps, which = steps.unique(dim=0, return_inverse=True)
    of_step = torch.zeros(len(steps)).index_copy(0, which, said.detach().flatten())
    torch.testing.assert_close(of_step[which], said.detach().flatten())
    children, child = steps[:, environment.width :].unique(dim=0, return_inverse=True)
    torch.testing.assert_close(torch.zeros(len(children)).index_add(0, child, of_step.exp()), torch.ones(len(children)))
    assert len(steps) > len(children) > 15


def test_actions_of_every_forest_sum_to_one_and_are_those_of_the_trajectories() -> None:
    policy = random_tree_policy("parsimony", 5, condition_size=1)
    condition, environment, merges = torch.tensor([[1.3]]), Forests(5), every_tree_trajectory(5)
    states, actions = states_on_the_way(environment, merges)
    with torch.no_grad():
        said = policy.action_log_probs(states.flatten(0, 1), condition)
        forward = policy.log_probs(trajectories(merges, condition)).forward
    torch.testing.assert_close(said.logsumexp(1), torch.zeros(len(said)), atol=1e-5, rtol=0)
    assert (said[~environment.forward_mask(states.flatten(0, 1))] < -1e8).all()
    by_step = said.view(len(merges), 5, -1)[:, :-1].gather(2, actions[:, :, None])[:, :, 0]
    torch.testing.assert_close(by_step.flatten(), forward, atol=1e-4, rtol=1e-4)
    exact = ExactDistribution(environment, parsimony_reward(5), condition)
    probabilities = exact.log_probs(policy).exp()
    assert float(probabilities.sum()) == pytest.approx(1, abs=1e-5)
    drawn = policy.sample(condition.expand(4000, -1), NO_EXPLORATION, seeded(4))
    rows = exact.graph.rows(policy.objects(drawn))  # type: ignore[arg-type]
    counts = torch.bincount(rows, minlength=len(exact.graph))[exact.graph.terminal]
    assert float((counts / 4000 - probabilities).abs().sum() / 2) < 2 * sampling_floor(probabilities, 4000)
    assert probabilities.max() < 0.9


def test_the_exact_flows_of_the_uniform_backward_policy_balance_every_trajectory() -> None:
    environment, reward, merges = Forests(5), parsimony_reward(5), every_tree_trajectory(5)
    exact = ExactDistribution(environment, reward)
    graph = exact.graph
    backward = 1 / environment.backward_mask(graph.states).sum(1).double()
    flow = torch.zeros(len(graph), dtype=torch.float64)
    flow[graph.terminal] = exact.log_reward.exp()
    for source, target in reversed(list(zip(graph.source.tolist(), graph.target.tolist(), strict=True))):
        flow[source] += flow[target] * backward[target]
    states, _ = states_on_the_way(environment, merges)
    rows = graph.rows(states.flatten(0, 1)).view(len(merges), 5)
    before, after = rows[:, :-1], rows[:, 1:]
    log_forward = (flow[after] * backward[after] / flow[before]).log()
    said = random_tree_policy("parsimony", 5).log_probs(trajectories(merges)).backward.view(-1, 4)
    log_reward = reward(tables_of(merges)[0], NOTHING).double()
    residual = exact.log_z + log_forward.sum(1) - log_reward - said.double().sum(1)
    torch.testing.assert_close(residual, torch.zeros_like(residual), atol=1e-5, rtol=0)


# Walking back


@pytest.mark.parametrize("kind", ["parsimony", "likelihood"])
@pytest.mark.parametrize("backward", ["uniform", "learned"])
def test_walks_end_in_the_objects_asked_for_and_know_their_log_probability(kind: Kind, backward: str) -> None:
    policy = random_tree_policy(kind, 7, backward)  # type: ignore[arg-type]
    drawn = policy.sample(torch.empty(50, 0), NO_EXPLORATION, seeded(6))
    objects = policy.objects(drawn)
    assert isinstance(objects, Tensor)
    scored = drawn.select(torch.arange(50))
    scored.log_reward[:] = torch.arange(50.0)
    walks = [policy.sample_backward(scored, seeded(7)), policy.sample_to(objects, torch.empty(50, 0), seeded(8))]
    for walked in walks:
        again = policy.objects(walked)
        assert isinstance(again, Tensor)
        torch.testing.assert_close(again, objects)
        assert (walked.steps["merge"] != drawn.steps["merge"]).any()
        said = policy.log_probs(walked)
        assert said.forward.isfinite().all()
        if backward == "uniform":
            torch.testing.assert_close(walked.sum(said.backward), walked.log_behaviour)
    assert torch.equal(walks[0].identity, drawn.identity)
    assert torch.equal(walks[0].log_reward, scored.log_reward)
    assert walks[1].log_reward.isnan().all()


def test_walks_back_are_as_frequent_as_they_say() -> None:
    policy, merges = random_tree_policy("parsimony", 5), every_tree_trajectory(5)
    table = tables_of(merges)[0]
    to_first = merges[(table == table[:1]).all(1)]
    count = 8000
    walked = policy.sample_to(table[:1].expand(count, -1), torch.empty(count, 0), seeded(9))
    ours = walked.steps["merge"].view(count, 1, -1) == to_first.view(1, len(to_first), -1)
    counts = ours.all(2).sum(0)
    assert counts.sum() == count
    expected = policy.log_probs(trajectories(to_first)).backward.view(-1, 4).sum(1).exp() * count
    assert float(((counts - expected) ** 2 / expected).sum()) < 2 * len(to_first)


# Learning


def test_a_learned_backward_policy_learns_the_distribution() -> None:
    torch.manual_seed(0)
    policy, reward = random_tree_policy("parsimony", 5, "learned"), parsimony_reward(5)
    exact = ExactDistribution(policy.environment, reward)
    with torch.no_grad():
        policy.log_z.fill_(exact.log_z)
    training = Training(iterations=250, batch_size=32, learning_rate=5e-3, schedule="cosine")
    before = exact.compare(policy)["total_variation"]
    assert policy.undo is not None
    undo = policy.undo.weight.detach().clone()
    Trainer(policy, reward, NoCondition(), Objective("tb"), training).run(progress_bar=False)
    assert before > 0.3
    assert exact.compare(policy)["total_variation"] < 0.05
    assert (policy.undo.weight - undo).abs().max() > 1e-3


def test_a_state_dict_gives_the_policy_back() -> None:
    policy = random_tree_policy("likelihood", 6, "learned", condition_size=1, seed=1)
    other = random_tree_policy("likelihood", 6, "learned", condition_size=1, seed=2)
    drawn = policy.sample(torch.randn(9, 1, generator=seeded(1)), NO_EXPLORATION, seeded(2))
    assert (policy.log_probs(drawn).forward != other.log_probs(drawn).forward).any()
    other.load_state_dict(policy.state_dict())
    ours, theirs = policy.log_probs(drawn), other.log_probs(drawn)
    for a, b in ((ours.forward, theirs.forward), (ours.backward, theirs.backward), (ours.log_z, theirs.log_z)):
        assert torch.equal(a, b)


# Kernels


@pytest.mark.parametrize("width", [16, 64])
def test_native_pair_scores_and_gradients_are_those_of_plain_operations(width: int) -> None:
    blocks = [(1, 9), (3, 8), (3, 3), (3, 2)]
    rows = sum(count * size for count, size in blocks)
    pairs = sum(count * size * (size - 1) // 2 for count, size in blocks)
    trees, features = (
        torch.randn(rows + 5, width, generator=seeded(0)),
        torch.randn(pairs, PAIR_FEATURES, generator=seeded(1)),
    )
    inputs = [trees, torch.randn(PAIR_FEATURES, width, generator=seeded(2)), torch.randn(width, generator=seeded(3))]
    inputs = [one.requires_grad_() for one in inputs]
    seen = torch.randn(pairs, generator=seeded(4))
    found = []
    for function in (pair_scores, plain_pair_scores):
        logits = function(inputs[0], features, *inputs[1:], blocks)
        found.append([logits.detach(), *torch.autograd.grad(logits, inputs, seen)])
    assert "PairScores" in type(pair_scores(inputs[0], features, *inputs[1:], blocks).grad_fn).__name__
    for native, plain in zip(*found, strict=True):
        torch.testing.assert_close(native, plain, rtol=1e-4, atol=1e-4)
    with torch.no_grad():
        assert torch.equal(pair_scores(inputs[0], features, *inputs[1:], blocks), found[0][0])


@pytest.mark.parametrize("size", [2, 3, 7, 20])
def test_pairs_are_described_by_neighbour_joining_and_changes(size: int) -> None:
    count, n = 4, 20
    nodes = 2 * n - 1
    changes = torch.randint(60, (count, nodes, nodes), generator=seeded(0)).int()
    changes = torch.maximum(changes, changes.transpose(1, 2))
    comparable = torch.randint(80, (count, nodes, nodes), generator=seeded(1)).int()
    comparable = torch.maximum(comparable, comparable.transpose(1, 2))
    apart = Apart(*torch.zeros(3, count, nodes, nodes))
    every = torch.arange(nodes).repeat(count, 1)
    for node in range(nodes):
        apart.note(node, every, changes[:, node].numpy().copy(), comparable[:, node].numpy().copy(), 100.0)
    roots = torch.stack([torch.randperm(nodes, generator=seeded(t))[:size] for t in range(count)])
    features, guesses = describe(apart, roots)
    i, j = torch.triu_indices(size, size, 1)
    for t in range(count):
        changed = changes[t][roots[t]][:, roots[t]].double()
        known = comparable[t][roots[t]][:, roots[t]].double() + 100
        distance = (-0.75 * torch.log1p(-4 / 3 * (changed / known).clamp(max=FURTHEST))).fill_diagonal_(0)
        mean_away = distance.sum(1) / max(size - 2, 1)
        criterion = (distance - mean_away[:, None] - mean_away)[i, j]
        worse = (criterion - criterion.min()) * known[i, j].mean()
        more = changed[i, j] - changed[i, j].min()
        expected = [distance[i, j] / distance[i, j].mean(), worse.log1p(), *((-worse / s).exp() for s in (1, 4, 16))]
        expected += [more.log1p(), (-more).exp(), (-more / 4).exp(), torch.full((len(i),), size / n)]
        torch.testing.assert_close(features[t].double(), torch.stack(expected, 1), rtol=1e-3, atol=1e-4)
        tilt = mean_away[:, None] - mean_away if size > 2 else torch.zeros(2, 2)
        guess = ((distance + tilt) * (1.0 if size == 2 else 0.5)).clamp(min=0.3 / float(known[i, j].mean()))
        torch.testing.assert_close(guesses[t].double().fill_diagonal_(0), guess.fill_diagonal_(0), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("density", [MixtureLengths(3, 500.0), BinnedLengths(20)])
def test_lengths_are_drawn_from_the_density_and_know_it(density: LengthDensity) -> None:
    count = 20000
    output = torch.randn(1, density.outputs, generator=seeded(0)).expand(count, -1).contiguous()
    guess = torch.full((count,), 0.08)
    drawn, log_density = density.draw(output, guess, seeded(1))
    torch.testing.assert_close(log_density, density.log_prob(output, guess, drawn), rtol=1e-4, atol=1e-3)
    grid = torch.logspace(-9, 1, count)
    at_grid = density.log_prob(output, guess, grid).exp()
    cumulative = torch.cat([torch.zeros(1), torch.cumulative_trapezoid(at_grid.double(), grid.double())])
    assert float(cumulative[-1]) == pytest.approx(1, abs=5e-3)
    below = torch.searchsorted(drawn.sort().values, grid) / count
    assert (below - cumulative).abs().max() < 1.63 / count**0.5  # Kolmogorov's bound at 1 in 100


def test_the_forests_on_the_way_are_those_of_the_environment() -> None:
    merges = every_tree_trajectory(5)
    environment = Forests(5)
    states, _ = states_on_the_way(environment, merges)
    roots, places, internal = forests_on_the_way(merges)
    here = torch.arange(len(merges))
    for t in range(4):
        assert torch.equal(roots[t, here[:, None], places[:, t]], merges[:, t].long())
        assert ((roots[t, :, : 5 - t] >= 0) & (roots[t, :, : 5 - t] < 5 + t)).all()
        if t < 3:
            assert torch.equal(environment.backward_mask(states[:, t + 1]).sum(1), internal[:, t])
