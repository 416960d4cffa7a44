"""Where the metrics of training go: the progress bar, metrics.jsonl and TensorBoard."""

from __future__ import annotations

import sys

from tqdm import tqdm

from headwater.events import Events
from headwater.runs import Metrics, Run


class TrainingLog:
    """run: whose folder the metrics go to, or None. total, done: iterations of the whole run, and of those before."""

    def __init__(self, run: Run | None, total: int, done: int, progress_bar: bool) -> None:
        self.run = run
        self.events = Events(run.folder / "events", done) if run else None
        self.bar = tqdm(
            total=total, initial=done, disable=not progress_bar, unit="it", dynamic_ncols=True,
            mininterval=0.2 if sys.stderr.isatty() else 10,
        )  # fmt: skip

    def __enter__(self) -> TrainingLog:
        return self

    def __exit__(self, *error: object) -> None:
        self.bar.close()
        if self.events is not None:
            self.events.close()

    def advance(self) -> None:
        self.bar.update()

    def write(self, metrics: Metrics) -> None:
        shown = {"loss": "loss", "log_z": "log Z", "mean_log_reward": "log R", "mean_reward": "reward"}
        shown["trajectories_per_second"] = "traj/s"
        self.bar.set_postfix_str(", ".join(f"{label} {metrics[k]:.4g}" for k, label in shown.items() if k in metrics))
        if self.run is not None and self.events is not None:
            self.run.append_metrics(metrics)
            self.events.write(metrics)
