"""The table of scored objects: exact, shared by processes, safe from their ends, and never paid for twice."""

from __future__ import annotations

import math
import os
import random
import signal
import sqlite3
import struct
import time
from collections.abc import Callable, Sequence
from contextlib import closing
from dataclasses import dataclass, field
from pathlib import Path
from typing import ClassVar

import pytest
import torch
from torch import Tensor

from headwater import jobs
from headwater.conditions import NoCondition
from headwater.environments.base import Objects
from headwater.environments.sequences import Sequences
from headwater.evaluation import ExactDistribution
from headwater.objectives import Objective
from headwater.objects import ObjectTable, ObjectTableError
from headwater.policies import EnvironmentPolicy, Network
from headwater.recipes.base import EnvironmentRecipe, listed
from headwater.reward import CachedReward, Reward, TemperedReward
from headwater.runs import Run
from headwater.training import ExplorationSettings, Trainer, Training

NOTHING = torch.empty(0, 0)


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "objects.sqlite"


class Counting:
    """log R = the number of letters A; writes down what it is asked, in a file that outlasts the process."""

    def __init__(self, log: Path, seconds: float = 0.0) -> None:
        self.log, self.seconds = log, seconds

    def __call__(self, objects: Objects, condition: Tensor) -> Tensor:
        time.sleep(self.seconds)
        with self.log.open("a") as file:
            file.writelines(f"{one}\n" for one in objects)
        return torch.tensor([math.nan if one == "fail" else float(str(one).count("A")) for one in objects])

    @property
    def asked(self) -> list[str]:
        return self.log.read_text().split() if self.log.exists() else []


def words(objects: Objects) -> list[str]:
    return [str(one) for one in objects]


def kept(reward: Reward, table: ObjectTable, capacity: int = 1000) -> CachedReward:
    cached = CachedReward(reward, capacity)
    cached.keep_in(table, words)
    return cached


def in_a_fork(action: Callable[[], object]) -> int:
    """The child's pid."""
    child = os.fork()
    if child == 0:
        try:
            action()
            os._exit(0)
        finally:
            os._exit(1)
    return child


def rows(path: Path) -> list[tuple[str, float | None, int, str]]:
    """What another program sees."""
    with closing(sqlite3.connect(path)) as connection:
        return connection.execute("select * from objects order by object").fetchall()


def test_a_log_reward_comes_back_to_the_last_bit_with_when_and_who(path: Path) -> None:
    generator = random.Random(0)
    bits = [struct.unpack("f", struct.pack("I", generator.getrandbits(31)))[0] for _ in range(1000)]
    values = [value for value in [*bits, 0.0, -0.0, 1e-45, 3.4e38] if math.isfinite(value)]
    texts = [f"object {i}" for i in range(len(values))]
    with closing(ObjectTable(path, "inline", 7)) as table:
        table.record(texts, values)
        assert table.lookup([*texts, "another"]) == dict(zip(texts, values, strict=True))
    with closing(ObjectTable(path)) as table:
        found = table.lookup(texts)
        assert torch.tensor([found[text] for text in texts]).equal(torch.tensor(values))
    assert set(rows(path)) == {(text, value, 7, "inline") for text, value in zip(texts, values, strict=True)}


@pytest.mark.parametrize("seconds", [0.0, math.inf], ids=["not yet committed", "committed"])
def test_the_first_log_reward_stays_and_a_failure_gives_way(path: Path, seconds: float) -> None:
    with closing(ObjectTable(path, "inline", 1)) as table:
        table.record(["a", "b", "c"], [1.0, math.nan, math.inf], seconds)
        assert table.lookup(["a", "b", "c"]) == {"a": 1.0}
        table.origin, table.iteration = "worker 1", 2
        table.record(["a", "b"], [5.0, 6.0], seconds)
        assert table.lookup(["a", "b"]) == {"a": 1.0, "b": 6.0}
    assert rows(path) == [("a", 1.0, 1, "inline"), ("b", 6.0, 2, "worker 1"), ("c", None, 1, "inline")]


def test_the_best_come_first_and_are_counted_by_origin(path: Path) -> None:
    with closing(ObjectTable(path, "inline")) as table:
        table.record(["low", "high", "failed"], [-1.0, 2.0, math.nan], 0.0)
        table.origin, table.iteration = "evaluation", 9
        table.record(["middle"], [0.5], 0.0)
        assert [row[0] for row in table.best()] == ["high", "middle", "low", "failed"]
        assert [row[0] for row in table.best(2)] == ["high", "middle"]
        assert table.counts() == {"inline": 3, "evaluation": 1}
        assert table.trained_on_from(0) == ["high", "low"]
        assert table.trained_on_from(1) == []


def test_what_costs_time_is_committed_at_once_and_the_rest_soon(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    now = [100.0]
    monkeypatch.setattr("headwater.objects.time.monotonic", lambda: now[0])
    with closing(ObjectTable(path)) as table:
        table.record(["slow"], [1.0], 0.06)
        assert len(rows(path)) == 1
        for i in range(4):
            table.record([f"cheap {i}"], [1.0], 0.011)
            assert len(rows(path)) == 1
        table.record(["cheap 4"], [1.0], 0.011)  # 55 ms of reward time together
        assert len(rows(path)) == 6
        table.record(["free"], [1.0], 0.0)
        assert len(rows(path)) == 6
        now[0] += 1.0
        table.record(["free too"], [1.0], 0.0)
        assert len(rows(path)) == 8
        table.record(["last"], [1.0], 0.0)
    assert len(rows(path)) == 9


def test_nothing_that_a_killed_process_scored_is_paid_for_again(path: Path, tmp_path: Path) -> None:
    reward = Counting(tmp_path / "log", seconds=0.06)

    def score_and_die() -> None:
        with closing(ObjectTable(path, "worker 0", 3)) as table:
            kept(reward, table)(["A", "AA", "fail"], NOTHING)
            os.kill(os.getpid(), signal.SIGKILL)

    assert os.waitpid(in_a_fork(score_and_die), 0)[1] == signal.SIGKILL
    with closing(ObjectTable(path, "inline", 5)) as table:
        cached = kept(reward, table)
        values = cached(["AAA", "AA", "A", "fail"], NOTHING)
        assert values[:3].tolist() == [3.0, 2.0, 1.0]
        assert values[3].isnan()
        assert (cached.requested, cached.evaluated, cached.failed) == (4, 2, 1)
    assert reward.asked == ["A", "AA", "fail", "AAA", "fail"]  # a failure is no verdict: it was asked for again
    assert ("AA", 2.0, 3, "worker 0") in rows(path)


def test_processes_that_share_a_table_do_not_repeat_each_others_calls(path: Path, tmp_path: Path) -> None:
    reward = Counting(tmp_path / "log")
    names = [f"A{i}" for i in range(60)]

    def work(number: int) -> None:
        with closing(ObjectTable(path, f"worker {number}")) as table:
            cached = kept(reward, table)
            for first in range(0, 60, 20):
                cached(names[first : first + 20], NOTHING)

    with closing(ObjectTable(path)) as table:  # carried over the forks, and used on both sides of them
        table.record(["before"], [0.0], 0.0)
        for number in range(3):  # one after the other: each finds what the one before it has scored
            assert os.waitpid(in_a_fork(lambda number=number: work(number)), 0)[1] == 0  # type: ignore[misc]
        assert table.lookup(names) == dict.fromkeys(names, 1.0)
    assert sorted(reward.asked) == sorted(names)


def test_processes_that_write_at_once_lose_nothing(path: Path) -> None:
    table = ObjectTable(path)

    def write(number: int) -> None:
        assert table._connection is None  # a connection must not cross a fork
        table.origin = f"worker {number}"
        for i in range(100):
            table.record([f"{number} {i}", f"shared {i}"], [float(number), 1.0])

    children = [in_a_fork(lambda number=number: write(number)) for number in range(4)]  # type: ignore[misc]
    write(4)
    assert [os.waitpid(child, 0)[1] for child in children] == [0] * 4
    found = rows(path)
    assert len(found) == 600
    assert {text: value for text, value, _, _ in found if "shared" not in text} == {
        f"{number} {i}": float(number) for number in range(5) for i in range(100)
    }
    table.close()


def test_a_reward_that_costs_nothing_is_recorded_without_look_ups(path: Path, tmp_path: Path) -> None:
    reward = Counting(tmp_path / "log")
    with closing(ObjectTable(path, "inline")) as table:
        cached = kept(reward, table, capacity=0)
        assert cached(["A", "AA", "A"], NOTHING).tolist() == [1.0, 2.0, 1.0]
        assert cached(["A"], NOTHING).tolist() == [1.0]
        assert (cached.requested, cached.evaluated) == (4, 4)
    assert [row[0] for row in rows(path)] == ["A", "AA"]


def test_of_a_tempered_reward_the_reward_itself_is_kept(path: Path, tmp_path: Path) -> None:
    with closing(ObjectTable(path)) as table:
        tempered = TemperedReward(kept(Counting(tmp_path / "log"), table))
        assert tempered(["AA", "A"], torch.tensor([[3.0], [0.5]])).tolist() == [6.0, 0.5]
    assert [row[:2] for row in rows(path)] == [("A", 1.0), ("AA", 2.0)]


@pytest.mark.parametrize("broken", ["text", "other database", "cut", "overwritten"])
def test_a_file_that_is_no_table_of_objects_is_refused_and_named(path: Path, broken: str) -> None:
    if broken == "text":
        path.write_text("object,log_reward\n" * 100)
    elif broken == "other database":
        with closing(sqlite3.connect(path)) as connection:
            connection.execute("create table objects (object, log_reward, iteration, origin)")
    else:
        with closing(ObjectTable(path)) as table:
            table.record([f"object {i}" for i in range(5000)], [1.0] * 5000)
        content = path.read_bytes()
        path.write_bytes(content[:8192] if broken == "cut" else content[:4096] + b"\xff" * (len(content) - 4096))
    before = path.read_bytes()
    with pytest.raises(ValueError, match=r"objects\.sqlite.*(no|not a readable) table of scored objects"):
        ObjectTable(path).lookup([f"object {i}" for i in range(5000)])
    assert path.read_bytes() == before


def test_a_full_disk_is_an_error_that_says_so_and_keeps_what_was_there(path: Path) -> None:
    table = ObjectTable(path)
    table.record(["first"], [1.0])
    table._connect().execute("pragma max_page_count = 8")
    with pytest.raises(ObjectTableError, match=r"objects\.sqlite: database or disk is full"):
        table.record([f"object {i}" for i in range(10_000)], [1.0] * 10_000)
    table._disconnect()
    assert rows(path) == [("first", 1.0, 0, "")]


# In training

LOOP = Training(iterations=30, batch_size=8, checkpoint_every=7, log_every=5, learning_rate=1e-2)


def trainer(reward: Reward, run: Run | None = None) -> Trainer:
    torch.manual_seed(0)
    policy = EnvironmentPolicy(Sequences("ACG", 4), Network(width=16))
    return Trainer(policy, reward, NoCondition(), Objective(), LOOP, run=run)


def test_a_resumed_run_pays_for_nothing_twice_and_counts_as_one_that_never_stopped(tmp_path: Path) -> None:
    torch.set_num_threads(1)
    logs = Counting(tmp_path / "whole log"), Counting(tmp_path / "log", seconds=0.06)
    whole_run, run = (Run.create(tmp_path / name, "test", {}, [], 0) for name in ("whole", "run"))
    with closing(ObjectTable(whole_run.objects_path)) as table:
        trainer(kept(logs[0], table), whole_run).run(progress_bar=False)

    def die() -> None:
        with closing(ObjectTable(run.objects_path)) as table:
            first = trainer(kept(logs[1], table), run)
            while True:
                first.update()
                if first.iteration == 14:
                    first.save()
                if first.iteration == 17:
                    os.kill(os.getpid(), signal.SIGKILL)

    # A fork after a backward pass in this process is safe on the CPU only.
    assert os.waitpid(in_a_fork(die), 0)[1] == signal.SIGKILL
    with closing(ObjectTable(run.objects_path)) as table:
        cached = CachedReward(logs[1])
        second = trainer(cached, run)
        checkpoint = run.latest_checkpoint()
        assert checkpoint is not None
        second.restore(checkpoint)
        cached.keep_in(table, words, second.policy.version)
        logs[1].seconds = 0.0
        second.run(progress_bar=False)
    assert sorted(logs[1].asked) == sorted(logs[0].asked) == sorted(set(logs[0].asked))
    names = ("iteration", "reward_calls", "reward_calls_saved", "loss")
    later = [[row[name] for name in names] for row in whole_run.metrics() if row["iteration"] > 14]
    assert [[row[name] for name in names] for row in run.metrics()] == later
    assert later[-1][1:3] == [len(logs[0].asked), 240 - len(logs[0].asked)]
    assert rows(run.objects_path) == rows(whole_run.objects_path)


ASKED: list[str] = []


@dataclass(frozen=True)
class Letters(EnvironmentRecipe):
    """Words whose exact distribution nobody asks for."""

    summary: ClassVar[str] = "words"
    network: Network = field(default_factory=lambda: Network(width=16))

    def environment(self) -> Sequences:
        return Sequences("ACG", 6)

    def exact_distribution(self) -> ExactDistribution | None:
        return None

    def base_reward(self) -> Reward:
        def score(objects: Objects, condition: Tensor) -> Tensor:
            ASKED.extend(map(str, objects))
            return torch.tensor([float(str(one).count("A")) for one in objects])

        return score

    def columns(self, objects: Sequence[str]) -> dict[str, list[object]]:
        return {"letters": [len(set(one)) for one in listed(objects)]}  # type: ignore[arg-type]


def test_training_sampling_and_evaluation_never_ask_for_an_object_twice(tmp_path: Path) -> None:
    ASKED.clear()
    training = Training(iterations=30, batch_size=8, log_every=10, evaluate_every=10, checkpoint_every=10)
    recipe = Letters(training=training, samples=100, exploration=ExplorationSettings(epsilon=0.2))
    name, folder = f"{__name__}:Letters", tmp_path / "run"
    jobs.train(recipe, name, folder, progress_bar=False)
    run = Run.open(folder)
    scored = run.scored()
    assert len(ASKED) == len(set(ASKED)) == sum(scored.values()) <= 729
    assert scored.keys() == {"inline", "evaluation", "sample"}
    assert run.metrics()[-1]["reward_calls"] == scored["inline"]  # what others asked for first was known, and is saved
    assert scored["inline"] + run.metrics()[-1]["reward_calls_saved"] == 240
    jobs.sample(folder, 200, seed=7)
    jobs.evaluate(folder)
    assert len(ASKED) == len(set(ASKED)) == sum(run.scored().values())
    report = (folder / "report.html").read_text()
    assert "distinct objects scored in training" in report.lower()
    assert f"{scored['inline']}" in report
    best = run.objects(3)
    assert best.column("object").to_pylist()[0] == "AAAAAA"
    assert best.num_rows == 3
    assert [path.name for path in jobs.objects(folder, 5)] == ["objects.parquet", "objects.csv"]
    assert len((folder / "objects.csv").read_text().splitlines()) == 6


def test_a_run_is_trained_by_one_process_at_a_time(tmp_path: Path) -> None:
    run = Run.create(tmp_path / "run", "test", {}, [], 0)

    def hold_too() -> None:
        with pytest.raises(RuntimeError, match="another process is training"), jobs._held(run):
            pass

    with jobs._held(run):
        assert os.waitpid(in_a_fork(hold_too), 0)[1] == 0
    with jobs._held(run):
        pass


def test_a_run_of_before_the_table_and_one_that_keeps_none_go_on(tmp_path: Path) -> None:
    training = Training(iterations=4, batch_size=8, checkpoint_every=2)
    name, folder = f"{__name__}:Letters", tmp_path / "run"
    jobs.train(Letters(training=training, samples=5, keep_objects=False), name, folder, progress_bar=False)
    assert not (folder / "objects.sqlite").exists()
    with pytest.raises(FileNotFoundError, match=r"no objects\.sqlite"):
        Run.open(folder).objects()
    text = (folder / "settings.toml").read_text()
    (folder / "settings.toml").write_text(
        text.replace("keep_objects = false\n", "").replace("iterations = 4", "iterations = 6")
    )
    jobs.resume(folder, progress_bar=False)
    assert Run.open(folder).scored()["inline"] > 0
