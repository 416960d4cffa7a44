"""Rewards: what a user's function or table may do, and what happens when it does something else."""

from __future__ import annotations

import logging
import math
import os
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pyarrow
import pyarrow.parquet
import pytest
import torch
from torch import Tensor

from headwater.environments.base import Objects
from headwater.reward import CachedReward, FunctionReward, RewardError, TableReward, TemperedReward

NOTHING = torch.zeros(64, 0)

on_linux = pytest.mark.skipif(not Path("/proc/self/stat").exists(), reason="looks at processes in /proc")

MODULE = """
import os, subprocess, sys, time
import json as other

def length(objects):
    return [len(one) for one in objects]

def hangs_on_h(objects):
    if "h" in objects:
        time.sleep(60)
    return length(objects)

def leaves_a_child(objects):
    if "h" in objects:
        child = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(60)"])
        open("child", "w").write(str(child.pid))
        time.sleep(60)
    return length(objects)

def dies_on_d(objects):
    if "d" in objects:
        os._exit(3)
    return length(objects)

def raises_on_r(objects):
    if "r" in objects:
        raise KeyError("no r please")
    return length(objects)

def prints(objects):
    print("x" * 100_000, flush=True)
    os.write(1, b"noise")
    return [float(sys.stdin.read() == "")] * len(objects)

def kinds(objects):
    assert objects == [(1, 2), (1, (2, 0.5)), [1, 2], "a", 3, None], objects
    return [float(isinstance(one, tuple)) for one in objects]

def pid(objects):
    return [os.getpid()] * len(objects)

def modules(objects):
    return [float("torch" in sys.modules)]

def nothing(objects):
    return None

def nan(objects):
    return [float("nan")] * len(objects)
"""


@pytest.fixture
def functions(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """A folder with the module `my_functions`, made the current one."""
    (tmp_path / "my_functions.py").write_text(MODULE)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", list(sys.path))
    yield tmp_path
    sys.modules.pop("my_functions", None)


@pytest.fixture
def in_worker(functions: Path) -> Iterator[Callable[..., FunctionReward]]:
    made: list[FunctionReward] = []

    def make(name: str, timeout: float = 30.0) -> FunctionReward:
        made.append(FunctionReward(f"my_functions:{name}", timeout=timeout))
        return made[-1]

    yield make
    for reward in made:
        reward.close()


def raises_on_r(objects: list[object]) -> list[float]:
    if "r" in objects:
        raise KeyError("no r please")
    return [len(str(one)) for one in objects]


def test_a_reward_is_the_logarithm_of_what_the_function_returns_and_zero_is_the_floor() -> None:
    reward = FunctionReward(lambda objects: [0.0, 1e-30, 2.5], floor=1e-9)(["a", "b", "c"], NOTHING)
    assert reward.dtype == torch.float32
    assert reward.tolist() == pytest.approx([math.log(1e-9), math.log(1e-9), math.log(2.5)])


def test_rows_of_a_tensor_reach_the_function_as_tuples() -> None:
    seen: list[object] = []

    def function(objects: list[object]) -> list[float]:
        seen.extend(objects)
        return [1.0] * len(objects)

    FunctionReward(function)(torch.tensor([[1, 2], [3, 4]]), NOTHING)
    FunctionReward(function)(torch.tensor([5]), NOTHING)
    FunctionReward(function)(torch.tensor([[[6], [7]]]), NOTHING)
    assert seen == [(1, 2), (3, 4), 5, ((6,), (7,))]


def test_an_empty_batch_does_not_call_the_function() -> None:
    assert FunctionReward(lambda objects: [1 / 0])([], NOTHING).shape == (0,)


def test_one_object_that_raises_fails_alone_and_is_reported_once(caplog: pytest.LogCaptureFixture) -> None:
    reward = FunctionReward(raises_on_r)
    with caplog.at_level(logging.WARNING):
        values = [reward(["aa", "r", "bbb"], NOTHING) for _ in range(3)]
    assert values[0].isnan().tolist() == [False, True, False]
    assert values[0][[0, 2]].tolist() == pytest.approx([math.log(2), math.log(3)])
    assert reward.failed == 3
    assert [record.getMessage().count("'r' (KeyError: 'no r please')") for record in caplog.records] == [1]


@pytest.mark.parametrize("value", [float("nan"), -0.5, float("inf")])
def test_a_value_that_no_reward_can_have_is_an_error_that_names_the_object(value: float) -> None:
    with pytest.raises(RewardError, match=rf"the reward of 'bad' is {value}"):
        FunctionReward(lambda objects: [1.0, value])(["good", "bad"], NOTHING)


def test_another_number_of_rewards_than_of_objects_is_an_error() -> None:
    with pytest.raises(RewardError, match="returned 1 rewards for 2 objects"):
        FunctionReward(lambda objects: [1.0])(["a", "b"], NOTHING)
    with pytest.raises(RewardError, match="it returned None"):
        FunctionReward(lambda objects: None)(["a"], NOTHING)  # type: ignore[arg-type, return-value]
    with pytest.raises(RewardError, match=r"it returned \['high'\]"):
        FunctionReward(lambda objects: ["high"])(["a"], NOTHING)  # type: ignore[list-item]


def broken(objects: list[object]) -> list[float]:
    raise RuntimeError("model file not found")


def test_a_function_that_fails_on_everything_stops_the_run() -> None:
    reward = FunctionReward(broken)
    batch = [str(number) for number in range(16)]
    assert reward(batch, NOTHING).isnan().all()
    assert reward(batch, NOTHING).isnan().all()
    with pytest.raises(RewardError, match="the last 48 objects, in 3 batches; the last time: RuntimeError: model file"):
        reward(batch, NOTHING)


def test_failures_in_small_batches_or_between_successes_do_not_stop_the_run() -> None:
    reward = FunctionReward(raises_on_r)
    for _ in range(29):
        assert reward(["r"], NOTHING).isnan().all()
    reward(["fine"], NOTHING)
    for _ in range(29):
        reward(["r"], NOTHING)
    with pytest.raises(RewardError, match="30 objects"):
        reward(["r"], NOTHING)


# In a worker process


def test_only_the_object_that_hangs_fails(in_worker: Callable[..., FunctionReward]) -> None:
    reward = in_worker("hangs_on_h", timeout=0.5)
    begin = time.monotonic()
    values = reward(["aa", "h", "bbb"], NOTHING)
    assert time.monotonic() - begin < 10
    assert values.isnan().tolist() == [False, True, False]
    assert values[2].item() == pytest.approx(math.log(3))
    assert reward.failed == 1


@on_linux
def test_what_a_hanging_function_started_ends_with_it(
    in_worker: Callable[..., FunctionReward], functions: Path
) -> None:
    in_worker("leaves_a_child", timeout=0.5)(["h"], NOTHING)
    child = int((functions / "child").read_text())
    assert ends(child)


def is_running(process: int) -> bool:
    try:
        return Path(f"/proc/{process}/stat").read_text().rsplit(")", 1)[1].split()[0] != "Z"
    except (FileNotFoundError, ProcessLookupError):
        return False


def ends(process: int) -> bool:
    deadline = time.monotonic() + 5
    while is_running(process) and time.monotonic() < deadline:
        time.sleep(0.05)
    return not is_running(process)


@on_linux
def test_a_hanging_worker_does_not_outlive_the_process_that_started_it(functions: Path) -> None:
    script = """
from headwater.reward_worker import Worker
worker = Worker("my_functions:hangs_on_h", 60.0)
print(worker.call(["pid"])[0], worker._process.pid, flush=True)
worker.call(["h"])
"""
    with subprocess.Popen([sys.executable, "-c", script], stdout=subprocess.PIPE, text=True) as parent:
        assert parent.stdout is not None
        worker = int(parent.stdout.readline().split()[1])
        assert is_running(worker)
        parent.kill()
    assert ends(worker)


def test_only_the_object_that_ends_the_process_fails(
    in_worker: Callable[..., FunctionReward], caplog: pytest.LogCaptureFixture
) -> None:
    values = in_worker("dies_on_d")(["aa", "d", "bbb"], NOTHING)
    assert values.isnan().tolist() == [False, True, False]
    assert "its process ended with status 3" in caplog.text


def test_a_function_that_raises_in_the_worker_fails_as_it_would_here(
    in_worker: Callable[..., FunctionReward], caplog: pytest.LogCaptureFixture
) -> None:
    values = in_worker("raises_on_r")(["aa", "r", "bbb"], NOTHING)
    assert values.isnan().tolist() == [False, True, False]
    assert "'r' (KeyError: 'no r please')" in caplog.text
    with pytest.raises(RewardError, match="it returned None"):
        in_worker("nothing")(["a"], NOTHING)
    with pytest.raises(RewardError, match="the reward of 'a' is nan"):
        in_worker("nan")(["a"], NOTHING)


def test_the_worker_is_one_light_process_that_serves_every_call(in_worker: Callable[..., FunctionReward]) -> None:
    reward = in_worker("pid")
    first, second = (reward(["a"], NOTHING).exp().item() for _ in range(2))
    assert first == second
    assert round(first) != os.getpid()
    assert in_worker("modules")(["a"], NOTHING).item() < -20


def test_objects_arrive_in_the_worker_as_they_were(in_worker: Callable[..., FunctionReward]) -> None:
    values = in_worker("kinds")([(1, 2), (1, (2, 0.5)), [1, 2], "a", 3, None], NOTHING)
    assert values[:2].tolist() == [0.0, 0.0]
    assert not values.isnan().any()
    with pytest.raises(RewardError, match="not a set"):
        in_worker("length")([{1}], NOTHING)


def test_what_the_function_prints_does_not_disturb_its_answers(in_worker: Callable[..., FunctionReward]) -> None:
    assert in_worker("prints")(["a", "b"], NOTHING).tolist() == [0.0, 0.0]


def test_a_large_batch_crosses_the_pipe(in_worker: Callable[..., FunctionReward]) -> None:
    assert in_worker("length")(["é" * 1000] * 2000, NOTHING).exp().tolist() == pytest.approx([1000.0] * 2000, rel=1e-5)


def test_closing_ends_the_worker_and_a_later_call_starts_another(in_worker: Callable[..., FunctionReward]) -> None:
    reward = in_worker("pid")
    first = round(reward(["a"], torch.zeros(1, 0)).double().exp().item())
    reward.close()
    reward.close()
    second = round(reward(["a"], NOTHING).double().exp().item())
    assert first != second


def test_a_function_is_found_in_the_current_directory_and_what_is_missing_is_named(functions: Path) -> None:
    assert FunctionReward("my_functions:length")(["aaa"], NOTHING).item() == pytest.approx(math.log(3))
    (functions / "my_broken.py").write_text("import surely_not_installed")
    (functions / "my_typo.py").write_text("1 / 0")
    cases = {
        "my_functions": "must be written as 'module:function'",
        "my_functions:lenght": "has no function lenght; it has dies_on_d, hangs_on_h, kinds, leaves_a_child, length,",
        "my_absent:length": "there is no module my_absent",
        "my_broken:length": "module my_broken needs surely_not_installed",
        "my_typo:length": "importing my_typo raised ZeroDivisionError",
    }
    for name, message in cases.items():
        with pytest.raises(RewardError, match=message):
            FunctionReward(name)
    for name in ("my_functions:lenght", "my_typo:length"):
        with pytest.raises(RewardError, match=cases[name]):
            FunctionReward(name, timeout=5.0)


def test_a_function_that_a_worker_cannot_import_is_refused() -> None:
    with pytest.raises(ValueError, match="must be defined at the top level"):
        FunctionReward(lambda objects: [1.0], timeout=1.0)
    with pytest.raises(ValueError, match=r"timeout is 0\.0"):
        FunctionReward(broken, timeout=0.0)
    with pytest.raises(ValueError, match="floor is 0"):
        FunctionReward(broken, floor=0)


# Tables


def write(path: Path, text: str) -> Path:
    path.write_text(text)
    return path


@pytest.mark.parametrize("kind", ["csv", "tsv", "parquet"])
def test_a_table_gives_its_rewards_in_every_format(tmp_path: Path, kind: str) -> None:
    path = tmp_path / "table"
    if kind == "parquet":
        pyarrow.parquet.write_table(
            pyarrow.table({"dna": ["AC", "GT", "AA"], "note": ["", "", ""], "score": [0.5, 2.0, 0.0]}), path
        )
    else:
        rows = ["dna,note,score", 'AC,"x; y",0.5', "GT,,2", "AA,,0"]
        path.write_text("\n".join(rows).replace(",", "\t" if kind == "tsv" else ","))
    reward = TableReward(path, object_column="dna", reward_column="score", floor=1e-3)
    expected = [math.log(0.5), math.log(2), math.log(1e-3)]
    assert reward.objects == ["AC", "GT", "AA"]
    assert reward.log_reward().dtype == torch.float64
    assert reward.log_reward().tolist() == pytest.approx(expected, abs=1e-12)
    assert reward(["AA", "AC", "AA"], NOTHING).tolist() == pytest.approx([expected[2], expected[0], expected[2]])


def test_a_table_takes_the_power_then_scales_then_clips(tmp_path: Path) -> None:
    path = write(tmp_path / "table.csv", "sequence,reward\na,0.8\nb,0.4\nc,0.01\n")
    reward = TableReward(path, exponent=3, scale_maximum_to=10, floor=1e-3)
    assert reward.log_reward().exp().tolist() == pytest.approx([10, 1.25, 1e-3])
    unscaled = TableReward(path, exponent=2, floor=0.05)
    assert unscaled.log_reward().exp().tolist() == pytest.approx([0.64, 0.16, 0.05])


def test_an_object_that_the_table_lacks_gets_the_default_or_is_named(tmp_path: Path) -> None:
    path = write(tmp_path / "table.csv", "sequence,reward\na,4\nb,2\n")
    with pytest.raises(RewardError, match="no reward for 'zz'"):
        TableReward(path)(["a", "zz"], NOTHING)
    reward = TableReward(path, default=1.0, exponent=2, scale_maximum_to=8)
    assert reward(["zz", "a"], NOTHING).exp().tolist() == pytest.approx([0.5, 8.0])
    assert len(reward.log_reward()) == 2


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("sequence,reward\na,1\nb,high\n", r"table\.csv, line 3, column 'reward': 'high' is not a number"),
        ("sequence,reward\na,1\n\nb,\n", r"line 4, column 'reward': '' is not a number"),
        ("sequence,reward\na,-2\n", r"line 2, .*the reward of 'a' is -2\.0"),
        ("sequence,reward\na,nan\n", r"line 2, .*the reward of 'a' is nan"),
        ("sequence,reward\na,1\nb,1\na,2\n", r"line 4, .*'a' is 2\.0, but 1\.0 in line 2"),
        ("sequence,reward\na,1\nb\n", r"line 3: 1 fields, the header has 2"),
        ("name,score\na,1\n", r"no column 'sequence'; the columns are 'name', 'score'"),
        ("sequence,reward\n", "the table is empty"),
        ("", "no column 'sequence'"),
    ],
)
def test_a_table_that_makes_no_sense_is_an_error_that_says_where(tmp_path: Path, text: str, message: str) -> None:
    with pytest.raises(RewardError, match=message):
        TableReward(write(tmp_path / "table.csv", text))


def test_other_tables_that_make_no_sense_are_named_too(tmp_path: Path) -> None:
    pyarrow.parquet.write_table(pyarrow.table({"sequence": ["a", "b"], "reward": [1.0, None]}), tmp_path / "gap")
    with pytest.raises(RewardError, match=r"gap, row 2, column 'reward': None is not a number"):
        TableReward(tmp_path / "gap")
    (tmp_path / "cut").write_bytes((tmp_path / "gap").read_bytes()[:-20])
    (tmp_path / "bytes").write_bytes(b"sequence,reward\n\xff\xfe,1\n")
    for name in ("cut", "bytes"):
        with pytest.raises(RewardError, match=f"{name}: cannot be read as a table"):
            TableReward(tmp_path / name)
    with pytest.raises(RewardError, match="every reward is 0"):
        TableReward(write(tmp_path / "zero", "sequence,reward\na,0\n"), scale_maximum_to=10)
    with pytest.raises(ValueError, match="exponent is 0"):
        TableReward(tmp_path / "zero", exponent=0)


def test_equal_duplicates_count_once(tmp_path: Path) -> None:
    reward = TableReward(write(tmp_path / "table.csv", "sequence,reward\na,1\nb,2\na,1.0\n"))
    assert reward.objects == ["a", "b"]
    assert reward.log_reward().exp().tolist() == pytest.approx([1, 2])


# Cache and temperature


class Recording:
    """log R = the length of a string or the sum of a row; remembers what it was asked."""

    def __init__(self) -> None:
        self.asked: list[object] = []
        self.shapes: list[tuple[int, ...]] = []

    def __call__(self, objects: Objects, condition: Tensor) -> Tensor:
        rows = objects.tolist() if isinstance(objects, Tensor) else list(objects)
        self.asked.extend(rows)
        self.shapes.append(tuple(condition.shape))
        return torch.tensor([self.value(one) for one in rows])

    def value(self, one: object) -> float:
        if one == "r":
            return math.nan
        return float(len(one) if isinstance(one, str) else sum(one))  # type: ignore[call-overload]


def test_a_cached_reward_asks_for_each_distinct_object_once() -> None:
    inner = Recording()
    reward = CachedReward(inner)
    assert reward(["aa", "b", "aa", "b"], NOTHING).tolist() == [2, 1, 2, 1]
    assert reward(["b", "ccc", "aa"], torch.zeros(3, 5)).tolist() == [1, 3, 2]
    assert inner.asked == ["aa", "b", "ccc"]
    assert inner.shapes == [(2, 0), (1, 0)]
    assert (reward.requested, reward.evaluated, reward.failed) == (7, 3, 0)


def test_a_failed_object_is_not_asked_for_again() -> None:
    inner = Recording()
    reward = CachedReward(inner)
    for _ in range(3):
        assert reward(["r", "a", "r"], NOTHING).isnan().tolist() == [True, False, True]
    assert inner.asked == ["r", "a"]
    assert (reward.requested, reward.evaluated, reward.failed) == (9, 2, 1)


def test_rows_of_tensors_lists_and_tuples_are_cached_by_value() -> None:
    inner = Recording()
    reward = CachedReward(inner)
    assert reward(torch.tensor([[1, 2], [3, 4], [1, 2]]), NOTHING).tolist() == [3, 7, 3]
    assert reward(torch.tensor([[3, 4], [1, 9]]), NOTHING).tolist() == [7, 10]
    assert inner.asked == [[1, 2], [3, 4], [1, 9]]
    assert reward([[9, 1], (9, 1), [9, 1]], NOTHING).tolist() == [10, 10, 10]
    assert inner.asked[3:] == [[9, 1]]


def test_a_full_cache_forgets_what_was_asked_for_longest_ago() -> None:
    inner = Recording()
    reward = CachedReward(inner, capacity=2)
    assert reward(["a", "bb", "ccc", "a"], NOTHING).tolist() == [1, 2, 3, 1]
    inner.asked.clear()
    reward(["a"], NOTHING)
    reward(["bb"], NOTHING)
    assert len(inner.asked) == 1
    with pytest.raises(ValueError, match="capacity is -1"):
        CachedReward(inner, capacity=-1)


def test_a_tempered_reward_multiplies_log_reward_by_the_condition() -> None:
    reward = TemperedReward(CachedReward(Recording()), column=1)
    condition = torch.tensor([[9.0, 2.0], [9.0, 0.5], [9.0, 3.0]])
    values = reward(["aa", "aa", "r"], condition)
    assert values[:2].tolist() == [4.0, 1.0]
    assert values[2].isnan()
    with pytest.raises(ValueError, match="column is 1, the condition has 1 columns"):
        reward(["a"], torch.ones(1, 1))
    with pytest.raises(ValueError, match="the condition has 0 columns"):
        CachedReward(TemperedReward(Recording()))(["a"], condition[:1])
