"""The run folder: everything about one run, in files that explain themselves and that other tools read.

    README.md          what is where, and the commands that go on from here
    settings.toml      the resolved settings; `headwater train RECIPE --config settings.toml` repeats the run
    provenance.json    command, versions, hardware, seed
    metrics.jsonl      one JSON object a logged iteration; events/ the same for TensorBoard
    checkpoints/       the newest checkpoints, each written whole or not at all
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
from contextlib import contextmanager
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

Setting: TypeAlias = "bool | int | float | str | list[Setting] | dict[str, Setting]"
Metrics: TypeAlias = dict[str, float | int]

CHECKPOINTS_KEPT = 2


@dataclass(frozen=True)
class Samples:
    """N drawn objects, as text.

    objects: N strings. log_reward: `[N]`. log_prob: `[N]`, the estimated log-probability of each object under the
    sampler.
    extra: further columns of N values each.
    """

    objects: list[str]
    log_reward: np.ndarray
    log_prob: np.ndarray
    extra: dict[str, list[object]] = field(default_factory=dict)

    def columns(self) -> dict[str, list[object]]:
        return {
            "object": list(self.objects),
            "log_reward": self.log_reward.tolist(),
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
    def create(folder: Path, recipe: str, settings: dict[str, Setting], command: list[str], seed: int) -> Run:
        """Make the folder with its settings and provenance. Raises FileExistsError if it holds a run already."""
        if (folder / "settings.toml").exists():
            raise FileExistsError(
                f"{folder} already holds a run; give another --out, or go on with: headwater resume {folder}"
            )
        folder.mkdir(parents=True, exist_ok=True)
        run = Run(folder)
        run.write_settings(recipe, settings)
        run.write_json("provenance.json", provenance(command, seed))
        run._write_text("README.md", _README.format(folder=folder, recipe=recipe))
        return run

    @staticmethod
    def open(folder: Path) -> Run:
        """Raises FileNotFoundError if there is no run in the folder."""
        if not (folder / "settings.toml").is_file():
            raise FileNotFoundError(f"{folder} holds no run: it has no settings.toml")
        return Run(folder)

    def write_settings(self, recipe: str, settings: dict[str, Setting]) -> None:
        self._write_text("settings.toml", tomli_w.dumps({"recipe": recipe, **settings}))

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
        with (self.folder / "metrics.jsonl").open("a") as file:
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
        columns = samples.columns()
        with atomic(self.folder / "samples.parquet") as partial:
            parquet.write_table(pa.table(columns), partial)
        with atomic(self.folder / "samples.csv") as partial, partial.open("w", newline="") as file:
            writer = csv.writer(file)
            writer.writerow(columns)
            writer.writerows(zip(*columns.values(), strict=True))
        return [self.folder / "samples.parquet", self.folder / "samples.csv"]

    def samples(self) -> Samples | None:
        """The written samples, or None before there are any."""
        path = self.folder / "samples.parquet"
        if not path.exists():
            return None
        columns = parquet.read_table(path).to_pydict()
        return Samples(
            objects=columns.pop("object"),
            log_reward=np.array(columns.pop("log_reward"), dtype=np.float64),
            log_prob=np.array(columns.pop("log_prob"), dtype=np.float64),
            extra=columns,
        )

    def save_checkpoint(self, checkpoint: Checkpoint) -> Path:
        """Write one checkpoint whole or not at all, then drop all but the newest few."""
        parent = self.folder / "checkpoints"
        parent.mkdir(exist_ok=True)
        target = parent / f"iteration-{checkpoint.iteration:09d}"
        partial = Path(tempfile.mkdtemp(prefix=".partial-", dir=parent))
        try:
            for part, tensors in checkpoint.tensors.items():
                contiguous = {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}
                save_file(contiguous, str(partial / f"{part}.safetensors"))
            state = {"iteration": checkpoint.iteration, **checkpoint.state}
            (partial / "state.json").write_text(json.dumps(state, indent=2) + "\n")
            for path in partial.iterdir():
                _flush(path)
            if target.exists():
                shutil.rmtree(target)
            partial.rename(target)
        except BaseException:
            shutil.rmtree(partial, ignore_errors=True)
            raise
        for old in self._checkpoints()[:-CHECKPOINTS_KEPT]:
            shutil.rmtree(old)
        return target

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

    def _write_text(self, name: str, text: str) -> None:
        with atomic(self.folder / name) as partial:
            partial.write_text(text)


@contextmanager
def atomic(path: Path) -> Iterator[Path]:
    """Yield a path beside `path` to write to; it takes `path`'s place when the block ends well, and vanishes
    otherwise.
    """
    partial = path.with_name(f".{path.name}.partial")
    try:
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


def _flush(path: Path) -> None:
    with path.open("rb") as file:
        os.fsync(file.fileno())


_README = """# A Headwater run: {recipe}

| file | what it is |
|---|---|
| `report.html` | the report: open it in a browser |
| `settings.toml` | every setting, resolved |
| `provenance.json` | command, versions, hardware, seed |
| `metrics.jsonl`, `events/` | the course of training (`events/` is for TensorBoard) |
| `checkpoints/` | the newest checkpoints |
| `samples.parquet`, `samples.csv` | draws from the trained sampler |
| `evaluation.json` | how good the sampler is |
| `figures/` | the report's figures |

    headwater resume {folder}               # go on after an interruption
    headwater sample {folder} --count 1000  # more draws
    headwater evaluate {folder}             # the figures again
    headwater report {folder}               # the report again

In Python: `from headwater import Sampler; Sampler.load("{folder}").sample(1000)`
"""
