"""The language policy: its trajectories, its reference in every form, checkpoints, copies, and what it refuses."""

from __future__ import annotations

import copy
import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import Tensor
from transformers import BertConfig, BertModel

from headwater.conditions import ConditionTable
from headwater.environments.base import Objects
from headwater.language.generation import Generated, Sampling
from headwater.language.loading import load_model, load_tokenizer, save_model
from headwater.language.policy import LanguagePolicy
from headwater.objectives import STEP_BEHAVIOUR, Objective
from headwater.policies.base import NO_EXPLORATION, Exploration
from headwater.replay import ReplaySettings
from headwater.runs import Run
from headwater.training import ExplorationSettings, Sharpness, Trainer, Training
from headwater.trajectories import Trajectories
from helpers import seeded
from language_helpers import END, build_model, build_policy, build_tokenizer, with_adapters

FORMS = ["full", "full, reset", "lora", "lora, reset"]


@pytest.fixture(autouse=True)
def _one_thread() -> None:
    torch.set_num_threads(1)
    torch.manual_seed(0)


def policy_of(form: str, name: str = "llama", learns_log_z: bool = False) -> LanguagePolicy:
    model = build_model(name)
    if form.startswith("lora"):
        model = with_adapters(model)
    return build_policy(model, reset_every=5 if form.endswith("reset") else 0, learns_log_z=learns_log_z)


def drawn(policy: LanguagePolicy, count: int = 24, seed: int = 1) -> Trajectories:
    condition = (torch.arange(count) % len(policy.prompts)).float()[:, None]
    return policy.sample(condition, NO_EXPLORATION, seeded(seed))


def reward(objects: Objects, condition: Tensor) -> Tensor:
    return torch.tensor([float(text.count("w1")) + (not text.finished) for text in objects])


def shaken(policy: LanguagePolicy) -> LanguagePolicy:
    """With other weights than it began with, in what it learns."""
    with torch.no_grad():
        for parameter in policy.parameters():
            if parameter.requires_grad:
                parameter.add_(0.2 * torch.randn(parameter.shape, generator=seeded(parameter.numel())))
    return policy


def trainer_of(policy: LanguagePolicy, objective: Objective, run: Run | None = None) -> Trainer:
    training = Training(
        iterations=12, batch_size=8, group_size=4, replayed=8, learning_rate=1e-2, checkpoint_every=7, log_every=6
    )
    conditions = ConditionTable(torch.tensor([[0.0], [1.0]]))
    return Trainer(
        policy, reward, conditions, objective, training, ExplorationSettings(epsilon=0), ReplaySettings(capacity=50),
        seed=3, run=run, sharpness=Sharpness(0.5),
    )  # fmt: skip


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("name", ["llama", "gpt2"])
def test_at_the_start_the_policy_is_its_reference_exactly(form: str, name: str) -> None:
    policy = policy_of(form, name)
    batch = drawn(policy)
    said = policy.log_probs(batch)
    assert torch.equal(said.forward, said.backward)
    assert torch.equal(said.forward, policy.reference_log_probs(batch))
    torch.testing.assert_close(batch.steps[STEP_BEHAVIOUR], said.forward.detach(), atol=1e-4, rtol=1e-4)
    torch.testing.assert_close(batch.log_behaviour, batch.sum(said.forward.detach()), atol=1e-4, rtol=1e-4)


def test_dropout_of_a_model_that_comes_in_training_is_off_in_policy_and_reference() -> None:
    policy = build_policy(build_model("gpt2").train())
    policy.train()
    batch = drawn(policy)
    assert torch.equal(policy.reference_log_probs(batch), policy.reference_log_probs(batch))
    assert torch.equal(policy.log_probs(batch).forward, policy.reference_log_probs(batch))


@pytest.mark.parametrize("form", FORMS)
def test_the_reference_stays_while_the_policy_learns_until_it_is_reset(form: str) -> None:
    policy = policy_of(form)
    batch, plain = drawn(policy), drawn(policy_of("full"))
    before = policy.reference_log_probs(batch)
    torch.testing.assert_close(before, policy_of("full").log_probs(plain).forward.detach(), atol=1e-5, rtol=1e-5)
    shaken(policy)
    said = policy.log_probs(batch)
    assert torch.equal(said.backward, before)
    assert (said.forward - before).abs().max() > 0.1
    said.forward.sum().backward()  # what was asked of the reference leaves the policy's gradient alone
    gradient = [parameter.grad for parameter in policy.parameters() if parameter.requires_grad]
    assert sum(float(one.abs().sum()) for one in gradient if one is not None) > 0
    if not form.endswith("reset"):
        return
    policy.version = 5
    policy.after_update()
    again = policy.log_probs(batch)  # carries log-probabilities of the reference before
    torch.testing.assert_close(again.backward, said.forward.detach(), atol=1e-6, rtol=1e-6)
    torch.testing.assert_close(again.backward, again.forward.detach(), atol=1e-6, rtol=1e-6)
    assert torch.equal(drawn(policy).steps["reference_version"].unique(), torch.tensor([1], dtype=torch.int32))
    policy.version = 6
    policy.after_update()
    assert int(policy.reference_version) == 1


def test_adapters_need_no_second_copy_of_the_model_and_alone_learn() -> None:
    policy, plain = policy_of("lora"), policy_of("full")
    assert policy._reference is None
    assert plain._reference is not None
    assert plain._reference.model is not plain.model
    assert all("lora_" in name for name, parameter in policy.named_parameters() if parameter.requires_grad)
    assert set(policy.published()) == {name for name, parameter in policy.named_parameters() if parameter.requires_grad}


@pytest.mark.parametrize("form", FORMS)
def test_published_weights_make_a_fresh_policy_the_same(form: str) -> None:
    policy, other = shaken(policy_of(form)), policy_of(form)
    if form.endswith("reset"):
        policy.reset_reference()
        shaken(policy)
    batch = drawn(policy)
    other.load_state_dict(policy.published(), strict=False)
    ours, theirs = policy.log_probs(batch), other.log_probs(batch)
    assert torch.equal(ours.forward, theirs.forward)
    assert torch.equal(policy.reference_log_probs(batch), other.reference_log_probs(batch))


@pytest.mark.parametrize("form", FORMS)
def test_a_copy_and_a_restored_state_say_the_same_and_are_their_own(form: str) -> None:
    policy = shaken(policy_of(form, learns_log_z=True))
    batch = drawn(policy)
    expected = policy.log_probs(batch)
    copied, restored = copy.deepcopy(policy), policy_of(form, learns_log_z=True)
    restored.load_state_dict(policy.state_dict())
    with torch.no_grad():
        for parameter in policy.parameters():
            parameter.zero_()
    for other in (copied, restored):
        said = other.log_probs(batch)
        assert torch.equal(said.forward, expected.forward)
        assert torch.equal(other.reference_log_probs(batch), expected.backward)
        assert torch.equal(said.log_z, expected.log_z)
        assert torch.equal(drawn(other).steps["token"], batch.steps["token"])


@pytest.mark.parametrize("form", FORMS)
def test_what_casts_the_policy_casts_its_reference(form: str) -> None:
    policy = policy_of(form).double()
    batch = drawn(policy)
    assert torch.equal(policy.log_probs(batch).forward, policy.reference_log_probs(batch))
    if policy._reference is not None:
        assert policy._reference.model.dtype == torch.float64


@pytest.mark.parametrize("form", FORMS)
def test_a_run_that_is_stopped_and_resumed_ends_where_one_that_was_not_does(form: str, tmp_path: Path) -> None:
    objective = Objective("tb" if form == "full" else "vargrad")

    def fresh() -> LanguagePolicy:
        return policy_of(form, learns_log_z=form == "full")

    whole = trainer_of(fresh(), objective)
    whole.run(progress_bar=False)
    first = trainer_of(fresh(), objective, Run.create(tmp_path / "run", "test", {}, ["test"], seed=0))
    for _ in range(7):
        first.update()
    first.save()
    second = trainer_of(fresh(), objective)
    checkpoint = Run.open(tmp_path / "run").latest_checkpoint()
    assert checkpoint is not None
    second.restore(checkpoint)
    second.run(progress_bar=False)
    ours, theirs = second.checkpoint().tensors, whole.checkpoint().tensors
    assert ours.keys() == theirs.keys()
    for part, tensors in theirs.items():
        assert ours[part].keys() == tensors.keys()
        assert all(torch.equal(ours[part][name], tensor) for name, tensor in tensors.items()), part
    assert int(second.policy.reference_version) == (2 if form.endswith("reset") else 0)  # type: ignore[arg-type]
    batch = drawn(whole.policy)  # type: ignore[arg-type]
    assert torch.equal(
        whole.policy.reference_log_probs(batch),  # type: ignore[operator]
        second.policy.reference_log_probs(batch),  # type: ignore[operator]
    )


def test_a_completion_that_was_cut_off_has_no_step_for_its_end() -> None:
    policy = build_policy(sampling=Sampling(max_new_tokens=2))
    condition = torch.zeros(3, 1)
    written = [
        Generated([4, END], [0.0, 0.0], True),
        Generated([4, 5], [0.0, 0.0], False),
        Generated([4], [0.0], False),
    ]
    batch = policy.trajectories(condition, written)
    assert batch.lengths.tolist() == [2, 2, 1]
    assert [text.finished for text in policy.objects(batch)] == [True, False, False]
    assert policy.objects(batch) == ["w4", "w4 w5", "w4"]
    log_probs = torch.split(policy.log_probs(batch).forward, batch.lengths.tolist())
    torch.testing.assert_close(log_probs[0][0], log_probs[2][0])
    assert len(set(batch.identity.tolist())) == 3
    same = policy.trajectories(condition[:1], [replace(written[0], log_probs=[-1.0, -1.0])])
    assert same.identity[0] == batch.identity[0]


def test_every_completion_of_an_enumerated_space_together_has_probability_one() -> None:
    policy = build_policy(sampling=Sampling(temperature=0.7, max_new_tokens=2))
    written = [Generated([END], [0.0], True)]
    written += [Generated([a, b], [0.0, 0.0], b == END) for a in range(24) if a != END for b in range(24)]
    batch = policy.trajectories(torch.ones(len(written), 1), written)
    assert abs(float(batch.sum(policy.log_probs(batch).forward).exp().sum()) - 1) < 1e-5


def test_temperature_of_exploration_multiplies_and_epsilon_is_refused() -> None:
    policy = build_policy()
    condition = torch.zeros(20, 1)
    warm = policy.sample(condition, Exploration(temperature=2.0), seeded(0))
    other = build_policy(sampling=Sampling(temperature=2.0, max_new_tokens=8))
    assert torch.equal(warm.steps["token"], drawn_at(other, condition).steps["token"])
    with pytest.raises(ValueError, match="epsilon"):
        policy.sample(condition, Exploration(epsilon=0.1), seeded(0))


def drawn_at(policy: LanguagePolicy, condition: Tensor) -> Trajectories:
    return policy.sample(condition, NO_EXPLORATION, seeded(0))


def test_measures_tell_divergence_staleness_and_cuts() -> None:
    policy = build_policy()
    batch = drawn(policy)
    policy.version = 4
    found = policy.measures(policy.log_probs(batch), batch)
    assert found["divergence"] == 0
    assert found["staleness_mean"] == found["staleness_max"] == 4
    assert found["truncated"] == pytest.approx(1 - float(policy.finished(batch).float().mean()))
    twice = Trajectories.concatenate([batch, batch])
    assert policy.measures(policy.log_probs(twice), twice)["distinct_in_batch"] == found["distinct_in_batch"] / 2


def test_prompts_that_do_not_fit_or_are_empty_are_refused() -> None:
    with pytest.raises(ValueError, match="prompt 2 has no tokens"):
        build_policy(prompts=[[4], []])
    with pytest.raises(ValueError, match=r"prompt 1 has 60 tokens and max_new_tokens = 8: .* context of 64"):
        build_policy(prompts=[[4] * 60])
    build_policy(prompts=[[4] * 56])


def test_a_saved_folder_loads_again_with_adapters_merged(tmp_path: Path) -> None:
    adapted = with_adapters(build_model(), seed=1)
    policy = build_policy(adapted)
    batch = drawn(policy)
    save_model(adapted, build_tokenizer(), tmp_path / "model")
    again = load_model(str(tmp_path / "model"), torch.device("cpu"))
    assert load_tokenizer(str(tmp_path / "model")).eos_token_id == END
    found = build_policy(again).log_probs(batch).forward
    torch.testing.assert_close(found, policy.log_probs(batch).forward, atol=1e-4, rtol=1e-4)


def test_folders_that_are_no_language_model_are_refused_by_name(tmp_path: Path) -> None:
    cpu = torch.device("cpu")
    with pytest.raises(ValueError, match="there is no such folder"):
        load_model(str(tmp_path / "missing"), cpu)
    bare = tmp_path / "bare"
    build_model().save_pretrained(bare)
    with pytest.raises(ValueError, match=r"bare.*no tokenizer"):
        load_tokenizer(str(bare))
    (bare / "model.safetensors").unlink()
    torch.save({}, bare / "pytorch_model.bin")
    with pytest.raises(ValueError, match=r"bare.*cannot be loaded as a causal language model"):
        load_model(str(bare), cpu)
    encoder = tmp_path / "encoder"
    BertModel(BertConfig(vocab_size=10, hidden_size=8, num_hidden_layers=1, num_attention_heads=1,
                         intermediate_size=8)).save_pretrained(encoder)  # fmt: skip
    settings = json.loads((encoder / "config.json").read_text())
    (encoder / "config.json").write_text(json.dumps({**settings, "model_type": "vit"}))
    with pytest.raises(ValueError, match=r"encoder.*cannot be loaded as a causal language model"):
        load_model(str(encoder), cpu)
