"""The training loop: stopped and resumed, refused, failing and logged."""

from __future__ import annotations

import contextlib
import errno
import math
import os
import re
import signal
import struct
import subprocess
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Literal

import pytest
import torch
from safetensors import SafetensorError
from tensorboardX.proto.event_pb2 import Event
from torch import Tensor

from headwater import objects, runs
from headwater.conditions import NoCondition
from headwater.environments.base import Objects
from headwater.environments.hypergrid import Hypergrid, HypergridReward
from headwater.objectives import Objective
from headwater.objects import ObjectTable, ObjectTableError
from headwater.policies import EnvironmentPolicy, Network
from headwater.policies.base import Exploration, LogProbs
from headwater.policies.environment_policy import Backward
from headwater.replay import ReplaySettings
from headwater.reward import CachedReward, Reward
from headwater.runs import Run, WriteError
from headwater.training import ExplorationSettings, NonFiniteLoss, Trainer, Training
from headwater.trajectories import Trajectories
from helpers import seeded

LOOP = Training(iterations=40, batch_size=8, replayed=8, checkpoint_every=7, log_every=10, learning_rate=1e-2)


@pytest.fixture(autouse=True)
def _one_thread() -> None:
    torch.set_num_threads(1)


def grid_policy(backward: Backward = "uniform", side: int = 6, width: int = 64) -> EnvironmentPolicy:
    return EnvironmentPolicy(Hypergrid(2, side), Network(width=width), backward)


def grid_reward() -> HypergridReward:
    return HypergridReward(6, r0=0.05)


def new_run(folder: Path) -> Run:
    return Run.create(folder, "test", {}, ["test"], seed=0)


def plain(training: Training, policy: EnvironmentPolicy | None = None) -> Trainer:
    """Trajectory balance without a run folder or a moving average."""
    return Trainer(policy or grid_policy(), grid_reward(), NoCondition(), Objective(), training)


def loop_trainer(
    run: Run | None = None, reward: Reward | None = None, seed: int = 0, training: Training = LOOP
) -> Trainer:
    """With all that a checkpoint can hold: moving average, replay, learned backward policy."""
    torch.manual_seed(seed)
    average, replay = ExplorationSettings(average=0.9), ReplaySettings(50, "rank")
    reward = reward or grid_reward()
    return Trainer(grid_policy("learned"), reward, NoCondition(), Objective(), training, average, replay, seed, run)


class Watched:
    """A reward that does something at one of its calls, before it answers."""

    def __init__(self, at_call: int, action: Callable[[Tensor], Tensor]) -> None:
        self.calls, self.at_call, self.action = 0, at_call, action

    def __call__(self, objects: Objects, condition: Tensor) -> Tensor:
        self.calls += 1
        log_reward = grid_reward()(objects, condition)
        return self.action(log_reward) if self.calls == self.at_call else log_reward


def interrupt(log_reward: Tensor) -> Tensor:
    os.kill(os.getpid(), signal.SIGINT)
    return log_reward


def everything(trainer: Trainer) -> dict[str, Tensor]:
    """All that a checkpoint holds, by flat name."""
    parts = trainer.checkpoint().tensors
    return {f"{part}/{name}": tensor.clone() for part, tensors in parts.items() for name, tensor in tensors.items()}


def assert_identical(left: dict[str, Tensor], right: dict[str, Tensor]) -> None:
    assert left.keys() == right.keys()
    assert [name for name in left if not torch.equal(left[name], right[name])] == []


@pytest.mark.parametrize("stop", ["killed", "interrupted", "finished"])
def test_a_run_that_was_stopped_and_resumed_ends_as_one_that_never_was(tmp_path: Path, stop: str) -> None:
    whole = loop_trainer()
    whole.run(progress_bar=False)
    first = loop_trainer(new_run(tmp_path / "run"), Watched(17, interrupt) if stop == "interrupted" else None)
    if stop == "killed":
        for _ in range(17):
            first.update()
            if first.iteration == 14:
                first.save()
    else:
        first.run(progress_bar=False)
    checkpoint = Run.open(tmp_path / "run").latest_checkpoint()
    assert checkpoint is not None
    assert checkpoint.iteration == {"killed": 14, "interrupted": 17, "finished": 40}[stop]
    second = loop_trainer(seed=99)  # other weights, other random numbers: all must come from the checkpoint
    second.restore(checkpoint)
    second.run(progress_bar=False)
    assert second.iteration == 40
    assert_identical(everything(second), everything(whole))
    assert second.policy.version == second.sampler.version == whole.policy.version == 40
    assert (second.search.drawn, second.search.failed) == (320, 0)


def test_ctrl_c_ends_the_iteration_with_a_checkpoint_and_gives_the_signal_back(tmp_path: Path) -> None:
    before = signal.getsignal(signal.SIGINT), signal.getsignal(signal.SIGTERM)
    run = new_run(tmp_path / "run")
    trainer = loop_trainer(run, Watched(9, interrupt))
    trainer.run(progress_bar=False)
    assert trainer.interrupted
    assert trainer.iteration == 9
    checkpoint = run.latest_checkpoint()
    assert checkpoint is not None
    assert checkpoint.iteration == 9
    assert (signal.getsignal(signal.SIGINT), signal.getsignal(signal.SIGTERM)) == before


def test_a_second_ctrl_c_stops_at_once() -> None:
    before = signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell's background jobs ignore Ctrl-C
    trainer = loop_trainer(reward=Watched(9, lambda log_reward: interrupt(interrupt(log_reward))))
    try:
        with pytest.raises(KeyboardInterrupt):
            trainer.run(progress_bar=False)
    finally:
        signal.signal(signal.SIGINT, before)
    assert trainer.iteration == 8


@pytest.mark.parametrize(
    "other",
    [
        lambda: plain(LOOP, grid_policy("learned", width=32)),
        lambda: plain(LOOP, grid_policy("learned", side=7)),
        lambda: plain(LOOP, grid_policy("uniform")),
    ],
    ids=["width", "side", "backward"],
)
def test_a_checkpoint_of_other_settings_is_refused(other: Callable[[], Trainer]) -> None:
    trainer = other()
    with pytest.raises(ValueError, match="does not fit"):
        trainer.restore(loop_trainer().checkpoint())
    assert trainer.iteration == 0


@pytest.mark.parametrize("part", ["average", "replay", "optimizer", "random"])
def test_a_checkpoint_that_lacks_a_part_is_refused_by_its_name(part: str) -> None:
    checkpoint = loop_trainer().checkpoint()
    del checkpoint.tensors[part]
    with pytest.raises(ValueError, match=f"does not fit.*{part}"):
        loop_trainer().restore(checkpoint)


def test_a_warm_up_fills_the_replay_with_random_draws_before_the_first_update(monkeypatch: pytest.MonkeyPatch) -> None:
    trainer = loop_trainer(training=replace(LOOP, warm_up=20, iterations=1))
    asked: list[tuple[int, float, int]] = []
    collect = trainer.search.collect

    def watched(count: int, exploration: Exploration) -> Trajectories:
        asked.append((count, exploration.epsilon, trainer.policy.version))
        return collect(count, exploration)

    monkeypatch.setattr(trainer.search, "collect", watched)
    trainer.run(progress_bar=False)
    assert asked == [(8, 1.0, 0), (8, 1.0, 0), (4, 1.0, 0), (8, trainer.exploration.epsilon, 0)]
    assert trainer.replay is not None
    assert len(trainer.replay) > LOOP.batch_size


def test_a_resumed_run_is_not_warmed_up_again(tmp_path: Path) -> None:
    trainer = loop_trainer(new_run(tmp_path / "run"), training=replace(LOOP, warm_up=100, iterations=7))
    trainer.run(progress_bar=False)
    checkpoint = Run.open(tmp_path / "run").latest_checkpoint()
    assert checkpoint is not None
    again = loop_trainer(training=replace(LOOP, warm_up=100, iterations=8))
    again.restore(checkpoint)
    again.run(progress_bar=False)
    assert again.search.drawn == 100 + 8 * LOOP.batch_size


@pytest.mark.parametrize("replayed", [0, 8])
@pytest.mark.parametrize("bad", [math.inf, -math.inf])
def test_a_loss_that_is_not_finite_stops_the_run_and_writes_the_batch_down(
    tmp_path: Path, bad: float, replayed: int
) -> None:
    def spoil(log_reward: Tensor) -> Tensor:
        return log_reward.index_fill(0, torch.tensor([3]), bad)

    run, training = new_run(tmp_path / "run"), replace(LOOP, replayed=replayed)
    trainer = loop_trainer(run, Watched(17, spoil), training=training)
    with pytest.raises(NonFiniteLoss, match=r"iteration 17.*non-finite-batch\.safetensors"):
        trainer.run(progress_bar=False)
    batch = Trajectories.load(run.folder / "non-finite-batch.safetensors")
    assert float(batch.log_reward[3]) == bad
    assert int((~batch.log_reward.isfinite()).sum()) == 1
    checkpoint = run.latest_checkpoint()
    assert checkpoint is not None
    assert checkpoint.iteration == 14
    good = loop_trainer(training=training)
    for _ in range(16):
        good.update()
    assert_identical(trainer.policy.state_dict(), good.policy.state_dict())  # the bad step was not taken


def test_an_object_whose_reward_fails_is_left_out_and_counted(tmp_path: Path) -> None:
    seen: list[int] = []

    def picky(objects: Objects, condition: Tensor) -> Tensor:
        failing = torch.as_tensor(objects)[:, 0] == 2
        seen.append(int(failing.sum()))
        return grid_reward()(objects, condition).masked_fill(failing, math.nan)

    run = new_run(tmp_path / "run")
    trainer = loop_trainer(run, picky)
    trainer.run(progress_bar=False)
    assert trainer.search.failed == sum(seen) > 0
    assert trainer.search.drawn == 320
    assert run.metrics()[-1]["failed"] == sum(seen)
    assert trainer.replay is not None
    assert not trainer.replay.sample(50, seeded(0)).log_reward.isnan().any()


def test_a_batch_on_which_every_reward_fails_teaches_nothing_and_the_run_goes_on() -> None:
    trainer = loop_trainer(reward=Watched(1, lambda log_reward: torch.full_like(log_reward, math.nan)))
    before = [p.detach().clone() for p in trainer.policy.parameters()]
    trainer.update()
    assert all(torch.equal(old, new) for old, new in zip(before, trainer.policy.parameters(), strict=True))
    trainer.run(progress_bar=False)
    assert trainer.iteration == 40
    assert trainer.search.failed == 8


@pytest.mark.parametrize("replayed", [0, 8])
def test_a_reward_that_fails_on_a_state_on_the_way_leaves_that_trajectory_out(replayed: int) -> None:
    def picky(objects: Objects, condition: Tensor) -> Tensor:
        failing = (torch.as_tensor(objects) == torch.tensor([1, 1])).all(1)
        return grid_reward()(objects, condition).masked_fill(failing, math.nan)

    training = replace(LOOP, replayed=replayed, replay_backward=True)
    trainer = Trainer(grid_policy(), picky, NoCondition(), Objective("fldb"), training)
    trainer.run(progress_bar=False)
    assert 0 < trainer.search.failed < 320
    assert all(torch.isfinite(p).all() for p in trainer.policy.parameters())


def assert_goes_on_to_the_same_end(run: Run, after: int) -> None:
    """From the newest checkpoint, which is that of iteration `after`."""
    checkpoint = run.latest_checkpoint()
    assert checkpoint is not None
    assert checkpoint.iteration == after
    whole, second = loop_trainer(), loop_trainer(run, seed=99)
    whole.run(progress_bar=False)
    second.restore(checkpoint)
    second.run(progress_bar=False)
    assert_identical(everything(second), everything(whole))
    assert not list(run.folder.rglob("*partial*"))


@pytest.mark.parametrize("part", ["policy", "replay", "state"])
def test_a_checkpoint_that_does_not_fit_on_the_disk_stops_the_run_and_the_one_before_it_stays(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, part: str
) -> None:
    run, save_file, write_text = new_run(tmp_path / "run"), runs.save_file, Path.write_text

    def full_for_tensors(tensors: dict[str, Tensor], path: str) -> None:
        save_file(tensors, path)
        if trainer.iteration == 21 and Path(path).stem == part:
            Path(path).write_bytes(Path(path).read_bytes()[:100])
            raise SafetensorError("I/O error: No space left on device (os error 28)")

    def full_for_text(self: Path, text: str) -> int:
        if trainer.iteration == 21 and self.stem == part:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        return write_text(self, text)

    trainer = loop_trainer(run)
    with monkeypatch.context() as patched:
        patched.setattr(runs, "save_file", full_for_tensors)
        patched.setattr(Path, "write_text", full_for_text)
        with pytest.raises(
            WriteError, match=r"run/checkpoints/iteration-000000021: cannot be written: .*No space left"
        ):
            trainer.run(progress_bar=False)
    assert_goes_on_to_the_same_end(run, after=14)


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A file system of 4 MB."""
    folder = tmp_path / "disk"
    folder.mkdir()
    done = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=4m", "none", str(folder)], capture_output=True)
    if done.returncode:
        pytest.skip(f"no file system can be mounted here: {done.stderr.decode().strip()}")
    yield folder
    subprocess.run(["umount", "--lazy", str(folder)], check=True)


@pytest.mark.parametrize("keeps_objects", [False, True])
def test_a_disk_that_fills_up_stops_the_run_with_the_reason_and_it_goes_on_when_there_is_room(
    small_disk: Path, keeps_objects: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(objects, "WORTH_A_COMMIT", 0.0)
    run = new_run(small_disk / "run")

    def fill(log_reward: Tensor) -> Tensor:
        with contextlib.suppress(OSError), (small_disk / "filler").open("wb", buffering=0) as file:
            while file.write(b"x" * 4096):
                pass
        return log_reward

    cached, table = CachedReward(Watched(16, fill), capacity=0), ObjectTable(run.objects_path)
    if keeps_objects:
        texts = iter(range(10**9))
        cached.keep_in(table, lambda found: [f"{next(texts)} {'x' * 500}" for _ in found])
    trainer = loop_trainer(run, cached)
    with pytest.raises((WriteError, ObjectTableError)) as stopped:
        trainer.run(progress_bar=False)
    if keeps_objects:
        assert isinstance(stopped.value, ObjectTableError)
        assert "objects.sqlite: database or disk is full" in str(stopped.value)
        assert trainer.iteration < 20
    else:  # the row of iteration 20, or the checkpoint of iteration 21
        assert re.search(r"run/[\w./-]+: cannot be written: .*No space left on device", str(stopped.value))
    (small_disk / "filler").unlink()
    run.forget_metrics_after(14)
    assert_goes_on_to_the_same_end(run, after=14)
    assert [row["iteration"] for row in run.metrics()] == [10, 20, 30, 40]


def test_a_loss_that_raises_leaves_a_run_that_goes_on(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run = new_run(tmp_path / "run")
    trainer, whole_loss = loop_trainer(run), Objective.__call__

    def loss(self: Objective, log_probs: LogProbs, batch: Trajectories) -> Tensor:
        if trainer.iteration == 17:
            raise ZeroDivisionError("in the loss")
        return whole_loss(self, log_probs, batch)

    with monkeypatch.context() as patched:
        patched.setattr(Objective, "__call__", loss)
        with pytest.raises(ZeroDivisionError, match="in the loss"):
            trainer.run(progress_bar=False)
    assert_goes_on_to_the_same_end(run, after=14)


def test_tensorboard_is_told_to_forget_what_a_resumed_run_says_again(tmp_path: Path) -> None:
    run = new_run(tmp_path / "run")
    first = loop_trainer(run, Watched(17, interrupt))
    first.run(progress_bar=False)
    checkpoint = run.latest_checkpoint()
    assert checkpoint is not None
    second = loop_trainer(run)
    second.restore(checkpoint)
    second.run(progress_bar=False)
    heard = []
    for path in sorted((run.folder / "events").iterdir()):
        data = path.read_bytes()
        while data:
            (length,) = struct.unpack_from("<Q", data)
            event, data = Event.FromString(data[12 : 12 + length]), data[16 + length :]
            if event.HasField("session_log"):
                heard.append(("from", event.step))
            elif event.HasField("summary"):
                assert {"loss", "seconds"} <= {value.tag for value in event.summary.value}
                heard.append(("row", event.step))
    assert heard == [("from", 1), ("row", 10), ("from", 18), ("row", 20), ("row", 30), ("row", 40)]


def test_metrics_are_logged_with_every_evaluation_among_them(tmp_path: Path) -> None:
    run, figure = new_run(tmp_path / "run"), {"figure": 1.5}
    training, problem = replace(LOOP, evaluate_every=15), (grid_policy(), grid_reward(), NoCondition())
    trainer = Trainer(*problem, Objective(), training, run=run, evaluate=lambda policy: dict(figure))
    trainer.run(progress_bar=False)
    rows = run.metrics()
    assert [row["iteration"] for row in rows] == [10, 15, 20, 30, 40]
    assert [row["iteration"] for row in rows if row.get("eval/figure") == 1.5] == [15, 30, 40]
    wanted = {"loss", "log_z", "mean_log_reward", "mean_length", "gradient_norm", "epsilon"}
    wanted |= {"trajectories", "trajectories_per_second", "seconds", "failed", "reward_calls"}
    assert all(wanted <= row.keys() for row in rows)
    assert [row["trajectories"] for row in rows] == [80, 120, 160, 240, 320]
    assert list((run.folder / "events").iterdir())


def test_log_z_learns_at_a_rate_of_its_own() -> None:
    log_z = []
    for rate in (0.0, 0.01, 0.1):
        trainer = plain(replace(LOOP, replayed=0, log_z_learning_rate=rate, schedule="constant"))
        trainer.update()
        log_z.append(abs(float(trainer.policy.log_z_parameters()[0].detach())))
    assert log_z == pytest.approx([0.0, 0.01, 0.1], rel=1e-3)  # Adam's first step is its rate


def test_schedules_fall_from_their_start_to_their_end() -> None:
    names: list[Literal["constant", "linear", "cosine"]] = ["constant", "linear", "cosine"]
    rates = {name: [Training(schedule=name).rate(share) for share in (0.0, 0.25, 0.5, 1.0)] for name in names}
    assert rates["constant"] == [1, 1, 1, 1]
    assert rates["linear"] == [1, 0.75, 0.5, 0]
    assert rates["cosine"] == pytest.approx([1, 0.5 + 0.5 * math.cos(math.pi / 4), 0.5, 0])
    exploration = ExplorationSettings(epsilon=0.4, epsilon_end=0.1, decay=0.5, temperature=2.0)
    assert [exploration.at(share).epsilon for share in (0.0, 0.25, 0.5, 0.9)] == pytest.approx([0.4, 0.25, 0.1, 0.1])
    assert exploration.at(0.3).temperature == 2.0
    assert ExplorationSettings(epsilon=0.4, decay=0.0).at(0.0).epsilon == 0


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("iterations", 0),
        ("batch_size", 0),
        ("group_size", 0),
        ("replayed", -1),
        ("clip_gradient", -1.0),
        ("learning_rate", 0.0),
    ],
)
def test_an_illegal_training_setting_is_named(field: str, value: float) -> None:
    with pytest.raises(ValueError, match=field):
        Training(**{field: value})  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("field", "value"), [("epsilon", 1.5), ("decay", -0.1), ("average", 1.0), ("temperature", 0.0)]
)
def test_an_illegal_exploration_setting_is_named(field: str, value: float) -> None:
    with pytest.raises(ValueError, match=field):
        ExplorationSettings(**{field: value})
