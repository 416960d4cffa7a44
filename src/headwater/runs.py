"""The run folder: everything about one run, in files that explain themselves and that other tools read.

    README.md          what is where, and the commands that go on from here
    settings.toml      the resolved settings; `headwater train RECIPE --config settings.toml` repeats the run
    provenance.json    command, versions, hardware, seed
    metrics.jsonl      one JSON object a logged iteration; events/ the same for TensorBoard
    checkpoints/       the newest checkpoints, each written whole or not at all
    objects.sqlite     every object ever scored, with its log-reward, when it was first scored and who asked
    inputs/            copies of the files that settings name
    samples.*          draws from the trained sampler; evaluation.json how good it is; figures/, report.html

Nothing here is pickled: tensors are safetensors, the rest JSON, TOML, Parquet and CSV.
"""

from __future__ import annotations

import csv
import json
import math
import os
import platform
import shutil
import sys
import tempfile
import tomllib
from collections.abc import Iterator, Mapping
from contextlib import closing, contextmanager
from dataclasses import dataclass, field
from datetime import UTC, datetime
from importlib import metadata
from pathlib import Path
from typing import TypeAlias

import numpy as np
import pyarrow as pa
import pyarrow.parquet as parquet
import tomli_w
import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from headwater.objects import ObjectTable

Setting: TypeAlias = "bool | int | float | str | list[Setting] | dict[str, Setting]"
Metrics: TypeAlias = dict[str, float | int]

CHECKPOINTS_KEPT = 2
_PARTIAL = ".partial-"
_OBJECTS = pa.schema(
    {"object": pa.string(), "log_reward": pa.float64(), "iteration": pa.int64(), "origin": pa.string()}
)
INPUTS = "inputs"
"""Folder of a run in which files that settings name are kept; in settings.toml they stand as inputs/NAME."""


class WriteError(RuntimeError):
    """A file of the run cannot be written, for one because the disk is full. What it held before is still there."""


@dataclass(frozen=True)
class Samples:
    """N drawn objects, as text.

    objects: N strings. log_reward: `[N]`. log_prob: `[N]`, the estimated log-probability of each object under the
    sampler.
    extra: further columns of N values each.
    names: what the first two are called in files and tables. Where the second is no logarithm, but a reward r whose
    target is exp(r / beta), it is "reward".
    """

    objects: list[str]
    log_reward: np.ndarray
    log_prob: np.ndarray
    extra: dict[str, list[object]] = field(default_factory=dict)
    names: tuple[str, str] = ("object", "log_reward")

    @property
    def is_logarithm(self) -> bool:
        return self.names[1] == "log_reward"

    def columns(self) -> dict[str, list[object]]:
        return {
            self.names[0]: list(self.objects),
            self.names[1]: self.log_reward.tolist(),
            "log_prob": self.log_prob.tolist(),
            **self.extra,
        }


@dataclass(frozen=True)
class Checkpoint:
    """What a run needs to go on: tensors by part (policy, optimizer, replay, ...) and plain values."""

    iteration: int
    tensors: dict[str, dict[str, Tensor]]
    state: dict[str, object]


class Run:
    """One run folder. `Run.create` makes a new one, `Run.open` reads an existing one."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    @staticmethod
    def create(
        folder: Path,
        recipe: str,
        settings: dict[str, Setting],
        command: list[str],
        seed: int,
        inputs: Mapping[str, Path] | None = None,
    ) -> Run:
        """Make the folder with its settings, its provenance and copies of the files `inputs`, by the settings that name
        them. Raises FileExistsError if it holds a run already.
        """
        if (folder / "settings.toml").exists():
            raise FileExistsError(
                f"{folder} already holds a run; give another --out, or go on with: headwater resume {folder}"
            )
        folder.mkdir(parents=True, exist_ok=True)
        run = Run(folder)
        run.write_json("provenance.json", provenance(command, seed))
        run._write_text("README.md", _README.format(folder=folder, recipe=recipe))
        kept = {setting: f"{INPUTS}/{path.name}" for setting, path in (inputs or {}).items()}
        made = f"{folder}/{INPUTS}/"  # by the recipe, for this run
        within = {
            name: f"{INPUTS}/{value[len(made) :]}"
            for name, value in settings.items()
            if isinstance(value, str) and value.startswith(made)
        }
        for setting, path in (inputs or {}).items():
            if path.resolve() == (folder / kept[setting]).resolve():  # made there, for this run
                continue
            (folder / INPUTS).mkdir(exist_ok=True)
            with writing(folder / kept[setting]):
                shutil.copyfile(path, folder / kept[setting])
        # Last: a folder with settings is a run, and all that it needs is there.
        run._write_text("settings.toml", tomli_w.dumps({"recipe": recipe, **settings, **within, **kept}))
        return run

    @staticmethod
    def open(folder: Path) -> Run:
        """Raises FileNotFoundError if there is no run in the folder."""
        if not (folder / "settings.toml").is_file():
            raise FileNotFoundError(f"{folder} holds no run: it has no settings.toml")
        return Run(folder)

    @property
    def settings(self) -> dict[str, Setting]:
        """The resolved settings, without the recipe's name."""
        return {name: value for name, value in self._toml().items() if name != "recipe"}

    @property
    def recipe_name(self) -> str:
        return str(self._toml().get("recipe", ""))

    @property
    def provenance(self) -> dict[str, object]:
        return self.read_json("provenance.json")

    def evaluation(self) -> dict[str, object]:
        """The figures of evaluation.json; empty before there are any."""
        return self.read_json("evaluation.json")

    def metrics(self) -> list[dict[str, float]]:
        """The logged rows, oldest first. A line cut off by a crash is left out."""
        path = self.folder / "metrics.jsonl"
        if not path.exists():
            return []
        rows = []
        for line in path.read_text().splitlines():
            try:
                rows.append(json.loads(line))
            except json.JSONDecodeError:
                continue
        return rows

    def append_metrics(self, row: Mapping[str, float]) -> None:
        finite = {name: value if math.isfinite(value) else str(value) for name, value in row.items()}
        path = self.folder / "metrics.jsonl"
        with writing(path), path.open("a") as file:
            file.write(json.dumps(finite) + "\n")

    def forget_metrics_after(self, iteration: int) -> None:
        """Drop the rows that a resumed run will write again."""
        rows = [row for row in self.metrics() if row["iteration"] <= iteration]
        self._write_text("metrics.jsonl", "".join(json.dumps(row) + "\n" for row in rows))

    def read_json(self, name: str) -> dict[str, object]:
        path = self.folder / name
        return json.loads(path.read_text()) if path.exists() else {}

    def write_json(self, name: str, content: Mapping[str, object]) -> None:
        strict = {
            key: None if isinstance(value, float) and not math.isfinite(value) else value
            for key, value in content.items()
        }
        self._write_text(name, json.dumps(strict, indent=2) + "\n")

    def write_samples(self, samples: Samples) -> list[Path]:
        """Write samples.parquet and samples.csv."""
        return self._write_table("samples", pa.table(samples.columns()))

    def samples(self) -> Samples | None:
        """The written samples, or None before there are any."""
        path = self.folder / "samples.parquet"
        if not path.exists():
            return None
        columns = parquet.read_table(path).to_pydict()
        what, reward, log_prob = list(columns)[:3]
        return Samples(
            objects=columns.pop(what),
            log_reward=np.array(columns.pop(reward), dtype=np.float64),
            log_prob=np.array(columns.pop(log_prob), dtype=np.float64),
            extra=columns,
            names=(what, reward),
        )

    @property
    def objects_path(self) -> Path:
        """Where the table of scored objects is, see `headwater.objects`."""
        return self.folder / "objects.sqlite"

    def objects(self, count: int | None = None) -> pa.Table:
        """The best objects ever scored, best first: columns object, log_reward, iteration, origin.

        count: how many; None for all. Raises FileNotFoundError if the run keeps no table of them.
        """
        if not self.objects_path.exists():
            raise FileNotFoundError(
                f"{self.folder} has no objects.sqlite: the run has scored nothing yet, or kept none"
            )
        with closing(ObjectTable(self.objects_path)) as table:
            rows = table.best(count)
        return pa.table([[row[column] for row in rows] for column in range(len(_OBJECTS))], schema=_OBJECTS)

    def write_objects(self, count: int | None = None) -> list[Path]:
        """Write objects.parquet and objects.csv, the best `count` objects ever scored, as `objects` returns them."""
        return self._write_table("objects", self.objects(count))

    def scored(self) -> dict[str, int]:
        """How many distinct objects were scored, by who first asked for them; empty if no table of them is kept."""
        if not self.objects_path.exists():
            return {}
        with closing(ObjectTable(self.objects_path)) as table:
            return table.counts()

    def save_checkpoint(self, checkpoint: Checkpoint) -> Path:
        """Write one checkpoint whole or not at all, then drop all but the newest few. Raises WriteError."""
        parent = self.folder / "checkpoints"
        target = parent / f"iteration-{checkpoint.iteration:09d}"
        with writing(target):
            parent.mkdir(exist_ok=True)
            partial = Path(tempfile.mkdtemp(prefix=_PARTIAL, dir=parent))
            try:
                for part, tensors in checkpoint.tensors.items():
                    save_file(_apart(tensors), str(partial / f"{part}.safetensors"))
                state = {"iteration": checkpoint.iteration, **checkpoint.state}
                (partial / "state.json").write_text(json.dumps(state, indent=2) + "\n")
                for path in (*partial.iterdir(), partial, *parent.parent.glob("metrics.jsonl")):
                    _flush(path)
                if target.exists():
                    target.rename(f"{partial}-replaced")
                partial.rename(target)
                _flush(parent)
            finally:
                self.tidy()
        return target

    def tidy(self) -> None:
        """Drop all but the newest checkpoints, and what a failure left here or in a process that was killed."""
        partial = (self.folder / "checkpoints").glob(f"{_PARTIAL}*")
        for folder in (*partial, *self._checkpoints()[:-CHECKPOINTS_KEPT]):
            shutil.rmtree(folder, ignore_errors=True)

    def latest_checkpoint(self) -> Checkpoint | None:
        """The newest checkpoint, or None. Raises ValueError naming a file that does not read."""
        folders = self._checkpoints()
        if not folders:
            return None
        folder = folders[-1]
        try:
            tensors = {path.stem: load_file(path) for path in sorted(folder.glob("*.safetensors"))}
            state = json.loads((folder / "state.json").read_text())
            return Checkpoint(iteration=int(state.pop("iteration")), tensors=tensors, state=state)
        except (OSError, SafetensorError, ValueError, KeyError) as error:
            raise ValueError(f"{folder}: not a readable checkpoint: {error}") from error

    def _checkpoints(self) -> list[Path]:
        return sorted((self.folder / "checkpoints").glob("iteration-*"))

    def _toml(self) -> dict[str, Setting]:
        return tomllib.loads((self.folder / "settings.toml").read_text())

    def _write_table(self, name: str, table: pa.Table) -> list[Path]:
        """Write the table as Parquet and as CSV."""
        columns = table.to_pydict()
        with atomic(self.folder / f"{name}.parquet") as partial:
            parquet.write_table(table, partial)
        with atomic(self.folder / f"{name}.csv") as partial, partial.open("w", newline="") as file:
            writer = csv.writer(file)
            writer.writerow(columns)
            writer.writerows(zip(*columns.values(), strict=True))
        return [self.folder / f"{name}.parquet", self.folder / f"{name}.csv"]

    def _write_text(self, name: str, text: str) -> None:
        with atomic(self.folder / name) as partial:
            partial.write_text(text)


@contextmanager
def atomic(path: Path) -> Iterator[Path]:
    """Yield a path beside `path` to write to; it takes `path`'s place when the block ends well, and vanishes
    otherwise. Raises WriteError.
    """
    partial = path.with_name(f".{path.name}.partial")
    try:
        with writing(path):
            yield partial
            _flush(partial)
            partial.replace(path)
    finally:
        partial.unlink(missing_ok=True)


def provenance(command: list[str], seed: int) -> dict[str, object]:
    """Where and with what a run was made."""
    return {
        "command": command,
        "started": datetime.now(UTC).isoformat(timespec="seconds"),
        "seed": seed,
        "versions": {"python": platform.python_version()}
        | {name: metadata.version(name) for name in ("headwater", "torch", "numpy", "numba") if _installed(name)},
        "hardware": {
            "cpu": _cpu_name(),
            "cores": len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count(),
            "memory_gib": _memory_gib(),
            "gpu": torch.cuda.get_device_name() if torch.cuda.is_available() else None,
            "system": platform.platform(),
        },
        "argv0": Path(sys.argv[0]).name,
    }


def _apart(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Contiguous tensors on the CPU, no two of one memory (as tied weights are), which safetensors would not write."""
    apart, known = {}, set()
    for name, tensor in tensors.items():
        here = tensor.detach().cpu().contiguous()
        memory = here.untyped_storage().data_ptr()
        apart[name] = here.clone() if memory in known else here
        known.add(memory)
    return apart


def _installed(name: str) -> bool:
    try:
        metadata.version(name)
    except metadata.PackageNotFoundError:
        return False
    return True


def _cpu_name() -> str:
    info = Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if info.exists() else []
    names = [line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor() or platform.machine()


def _memory_gib() -> float | None:
    try:
        return round(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30, 1)
    except (ValueError, OSError, AttributeError):
        return None


@contextmanager
def writing(path: Path) -> Iterator[None]:
    """Say what could not be written, and why: errors of a full disk often name no file."""
    try:
        yield
    except (OSError, SafetensorError) as error:
        reason = error.strerror if isinstance(error, OSError) and error.strerror else error
        raise WriteError(f"{path}: cannot be written: {reason}; what was there before is kept") from error


def _flush(path: Path) -> None:
    """Make a file, or the names in a folder, outlast a power cut."""
    if path.is_dir() and os.name != "posix":
        return
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


_README = """# A Headwater run: {recipe}

| file | what it is |
|---|---|
| `report.html` | the report: open it in a browser |
| `settings.toml` | every setting, resolved |
| `provenance.json` | command, versions, hardware, seed |
| `metrics.jsonl`, `events/` | the course of training (`events/` is for TensorBoard) |
| `checkpoints/` | the newest checkpoints |
| `objects.sqlite` | every object ever scored: its log-reward, the iteration it was first scored at, and who asked |
| `samples.parquet`, `samples.csv` | draws from the trained sampler |
| `evaluation.json` | how good the sampler is |
| `figures/` | the report's figures |

    headwater resume {folder}               # go on after an interruption
    headwater sample {folder} --count 1000  # more draws
    headwater evaluate {folder}             # the figures again
    headwater report {folder}               # the report again
    headwater objects {folder} --count 100  # the best objects ever scored, as Parquet and CSV

    sqlite3 {folder}/objects.sqlite "select object, log_reward from objects order by log_reward desc limit 10"

In Python: `from headwater import Sampler; Sampler.load("{folder}").sample(1000)`
"""
