"""Strings: Markov conditionals by enumeration, masked chains that reveal one token a step, and what chains end in."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import Tensor

from diffusion_strings import TokenMLP
from headwater.conditions import NoCondition
from headwater.diffusion.adapters import Corrected
from headwater.diffusion.denoisers import TokenTransformer
from headwater.diffusion.fitting import PriorFitting, Unscored
from headwater.diffusion.policy import DiffusionPolicy
from headwater.diffusion.prior_recipe import ChainSettings, NetworkSettings, PriorRecipe
from headwater.diffusion.priors import Prior, load_prior, save_prior
from headwater.diffusion.strings import MarkovDenoiser, MarkovStrings, end_probabilities, every_string
from headwater.diffusion.tokens import FREE, MaskedProcess, OneByOneProcess, RevealingProcess
from headwater.evaluation import bounds
from headwater.objectives import Objective
from headwater.replay import ReplaySettings
from headwater.training import ExplorationSettings, Trainer, Training


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


MARKOV = MarkovStrings.random(3, 4, generator(), 1.5)
DENOISER = MarkovDenoiser(MARKOV)


def total_variation(one: Tensor, other: Tensor) -> float:
    return float((one.double() - other.double()).abs().sum() / 2)


def test_the_law_of_a_token_given_others_is_that_of_the_strings_which_agree_with_them() -> None:
    strings = every_string(OneByOneProcess(4, 3))
    probability = MARKOV.log_prob(strings).double().exp()
    assert float(probability.sum()) == pytest.approx(1, abs=1e-5)
    for state in ((3, 3, 3, 3), (3, 1, 3, 3), (0, 3, 3, 2), (1, 2, 3, 0)):
        said = MARKOV.log_conditionals(torch.tensor([state]))[0].exp()
        for position in range(4):
            others = [place for place in range(4) if place != position and state[place] != 3]
            agrees = (strings[:, others] == torch.tensor(state)[others]).all(1)
            known = torch.zeros(3, dtype=torch.float64).index_add(0, strings[agrees, position], probability[agrees])
            torch.testing.assert_close(said[position].double(), known / known.sum(), atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("given", [(), (2, FREE, FREE, 0)])
def test_revealing_one_token_a_step_draws_exactly_what_the_conditionals_say(given: tuple[int, ...]) -> None:
    process = OneByOneProcess(4, 3, given)
    strings = every_string(process)
    exact = MARKOV.log_prob(strings).double().softmax(0)
    ends = end_probabilities(process, DENOISER)
    assert total_variation(ends, exact) < 1e-5
    # and steps that reveal several do not, the less the more of them there are
    coarse, fine = (end_probabilities(MaskedProcess(4, 3, steps, given), DENOISER) for steps in (2, 12))
    assert float(coarse.sum()) == pytest.approx(1, abs=1e-5)
    assert total_variation(coarse, exact) > total_variation(fine, exact) > 0.01


@pytest.mark.parametrize("process", [OneByOneProcess(4, 3, (FREE, 2, FREE, FREE)), MaskedProcess(4, 3, 3)])
def test_drawn_chains_end_where_the_probabilities_say(process: RevealingProcess) -> None:
    policy = DiffusionPolicy(process, DENOISER, DENOISER)
    policy.register_parameter("anything", torch.nn.Parameter(torch.zeros(1)))
    drawn = torch.as_tensor(policy.objects(policy.sample(torch.empty(60_000, 0), generator=generator())))
    strings, ends = every_string(process), end_probabilities(process, DENOISER)
    place = torch.tensor([27, 9, 3, 1])
    shares = torch.bincount((drawn * place).sum(1), minlength=81)[(strings * place).sum(1)] / 60_000
    assert float(shares.sum()) == pytest.approx(1)
    assert total_variation(shares, ends) < 0.02


def test_walked_back_chains_are_as_likely_as_the_noise_says() -> None:
    """With the exact conditionals the noising process is the chain's own reversal: the ratio is the string's own
    log-probability, whatever the order."""
    process = OneByOneProcess(4, 3)
    prior = Prior(process, DENOISER)  # type: ignore[arg-type]
    strings = every_string(process)
    for seed in range(3):
        walked = prior.log_prob_bound(strings, torch.empty(len(strings), 0), generator(seed))
        torch.testing.assert_close(walked, MARKOV.log_prob(strings), atol=1e-4, rtol=1e-5)
    drawn, log_prob = prior.sample(torch.empty(50, 0), generator())
    torch.testing.assert_close(log_prob, MARKOV.log_prob(drawn), atol=1e-4, rtol=1e-5)


def test_noise_at_once_hides_as_many_tokens_as_steps_are_left() -> None:
    process, count = OneByOneProcess(5, 3, (FREE, 1, FREE, FREE, 0)), 20_000
    data = torch.tensor([2, 1, 0, 2, 0]).expand(count, -1)
    for number in range(process.n_steps + 1):
        noised = process.noised(data, torch.full((count,), number), generator(number))
        hidden = noised == process.mask
        assert bool((hidden.sum(1) == process.n_steps - number).all())
        assert not hidden[:, [1, 4]].any()
        torch.testing.assert_close(hidden[:, [0, 2, 3]].float().mean(0), torch.full((3,), 1 - number / 3), atol=0.015,
                                   rtol=0)  # fmt: skip
        torch.testing.assert_close(torch.where(hidden, data, noised), data)


def test_a_denoiser_is_told_the_share_that_is_masked_whatever_is_given() -> None:
    whole, part = OneByOneProcess(4, 3), OneByOneProcess(4, 3, (FREE, 2, FREE, FREE))
    assert whole.time(torch.arange(4)).tolist() == [1, 0.75, 0.5, 0.25]
    assert part.time(torch.arange(3)).tolist() == [0.75, 0.5, 0.25]


def test_the_temperature_changes_tokens_and_not_the_order() -> None:
    state = torch.tensor([[3, 1, 3]])
    logits = torch.tensor([2.0, 0.0, -2.0]).expand(1, 3, 3)
    law = OneByOneProcess(3, 3).law(logits, state, torch.zeros(1))
    following = torch.tensor([[0, 1, 3]])
    assert float(law.log_prob(following)) == pytest.approx(float(logits[0, 0].log_softmax(0)[0]) - 0.6931, abs=1e-3)
    cool = law.tempered(0.5).log_prob(following)
    assert float(cool) == pytest.approx(float((2 * logits[0, 0]).log_softmax(0)[0]) - 0.6931, abs=1e-3)
    for impossible in ([0, 1, 0], [3, 1, 3], [0, 2, 3], [3, 1, 1]):
        said = float(law.log_prob(torch.tensor([impossible])))
        assert (said == -torch.inf) == (impossible != [3, 1, 1])


def test_all_given_or_a_wrong_token_is_refused() -> None:
    with pytest.raises(ValueError, match="all 2 tokens are, none is left"):
        OneByOneProcess(2, 3, (0, 1))
    with pytest.raises(ValueError, match=r"given\[1\] = 3: must be from 0 to 2"):
        OneByOneProcess(2, 3, (FREE, 3))
    with pytest.raises(ValueError, match="initial: must be probabilities"):
        MarkovStrings(torch.ones(3), torch.full((3, 3), 1 / 3), 4)
    with pytest.raises(ValueError, match="steps between states: at most"):
        end_probabilities(OneByOneProcess(8, 26), DENOISER)


def test_a_posterior_of_tokens_that_depend_on_each_other_is_learned() -> None:
    process = OneByOneProcess(4, 3)
    strings = every_string(process)

    def reward(objects: object, condition: Tensor) -> Tensor:
        x = torch.as_tensor(objects)
        return 2.0 * (x[:, 0] != x[:, 3]) + 2.0 * (x.sum(1) % 3 == 1)

    joint = MARKOV.log_prob(strings).double() + reward(strings, strings)
    target = joint.softmax(0)
    torch.manual_seed(0)
    policy = DiffusionPolicy(process, DENOISER, Corrected(DENOISER, TokenMLP(4, 3, 64, 1)))  # type: ignore[arg-type]
    trainer = Trainer(
        policy, reward, NoCondition(), Objective("vargrad"),
        Training(iterations=300, batch_size=32, replayed=32, replay_backward=True, learning_rate=5e-3, warm_up=128),
        ExplorationSettings(epsilon=0.0), ReplaySettings(rule="uniform"),
    )  # fmt: skip
    trainer.run(progress_bar=False)
    assert total_variation(end_probabilities(process, DENOISER), target) > 0.4
    assert total_variation(end_probabilities(process, policy.posterior), target) < 0.06
    found = bounds(policy, reward, None, 2000, generator())
    assert found["log_z_estimate"] == pytest.approx(float(joint.logsumexp(0)), abs=0.03)


def test_a_prior_of_one_token_a_step_is_learned_by_name_and_fills_in_what_is_left_open(tmp_path: Path) -> None:
    lines = ["abba", "cddc", "acca"] * 8
    (tmp_path / "lines.txt").write_text("\n".join(lines) + "\n")
    recipe = PriorRecipe(
        data=tmp_path / "lines.txt", chain=ChainSettings("one-by-one"), network=NetworkSettings(width=32),
        training=Training(iterations=300, batch_size=32, learning_rate=3e-3), held_out=0.05,
        exploration=ExplorationSettings(epsilon=0.0), device="cpu",
    )  # fmt: skip
    problem = recipe.problem()
    assert isinstance(problem.policy, PriorFitting)
    Trainer(
        problem.policy, Unscored(), NoCondition(), recipe.objective, recipe.training, recipe.exploration,
        given=recipe.given_states(),
    ).run(progress_bar=False)  # fmt: skip
    save_prior(problem.policy.prior, tmp_path / "prior")
    prior = load_prior(tmp_path / "prior")
    assert prior.process == OneByOneProcess(4, 4)
    assert isinstance(prior.denoiser, TokenTransformer)
    ends = end_probabilities(prior.process, prior.denoiser)
    words = ["".join("abcd"[token] for token in row) for row in every_string(prior.process).tolist()]
    assert float(sum(ends[words.index(word)] for word in set(lines))) > 0.8
    open_ends = OneByOneProcess(4, 4, (0, FREE, FREE, FREE))
    filled = end_probabilities(open_ends, prior.denoiser)
    among = {words[i] for i in range(len(words)) if words[i].startswith("a")}
    found = dict(zip(sorted(among), filled.tolist(), strict=True))
    assert found["abba"] + found["acca"] > 0.8
