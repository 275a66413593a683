"""Where figures and pictures go: metrics.jsonl and Weights & Biases. Rank zero's tracker writes, the others' does nothing."""

import json
import math
import os
from collections.abc import Callable, Sequence
from itertools import groupby
from pathlib import Path
from typing import Any

from accelerate import Accelerator

from vae_dist.charts import Closeup
from vae_dist.checkpoint import naming, write_atomically
from vae_dist.config import Config
from vae_dist.posterior import COLLAPSED
from vae_dist.run import RunFolder, read_lines
from vae_dist.wandb_run import WandbRun

Row = dict[str, Any]


class Tracker:
    """The face that every rank sees. This one, the base, does nothing: it is what ranks other than zero get."""

    def log(self, *rows: Row, closeup: Callable[[], Closeup] | None = None) -> None:
        """Records rows of one optimizer step; with a test row, the epoch's pictures, which lie in the run's folder already.

        `closeup` is asked for what only W&B shows, if it is there.
        """

    def alert(self, title: str, text: str) -> None:
        """Has W&B send word."""

    def keep_model(self) -> None:
        """Gives W&B the final model, which lies in the run's folder already, if the config wants that."""

    def sync(self) -> None:
        """Returns when the rows are on the disk."""

    def close(self, status: int) -> str:
        """Ends the records of a job that exits with `status`. Returns where its W&B run is: its address, or the folders of an
        offline one; empty for none.
        """
        return ""


class RunTracker(Tracker):
    """Rank zero's."""

    def __init__(self, accelerator: Accelerator, run: RunFolder, config: Config, mode: str, step: int) -> None:
        """Goes on after optimizer step `step`: rows beyond it, of a run that was cut off, are about to be made again."""
        rows = [row for row in read_rows(run.metrics) if row["step"] <= step]
        write_atomically(run.metrics, "".join(json.dumps(row) + "\n" for row in rows))
        self._metrics = run.metrics.open("a")
        self._tests: list[Row] = []
        self._wandb = WandbRun(accelerator, run, config, mode)
        for _, of_step in groupby(rows, key=lambda row: row["step"]):
            self._show(list(of_step))  # what a crash kept from W&B

    def log(self, *rows: Row, closeup: Callable[[], Closeup] | None = None) -> None:
        with naming(Path(self._metrics.name)):
            self._metrics.write("".join(json.dumps(row, allow_nan=False) + "\n" for row in rows))
            self._metrics.flush()
        self._show(rows, closeup)
        if self._has_just_collapsed(rows):
            print(f"ALARM, epoch {rows[0]['epoch']}: {COLLAPSED}", flush=True)

    def alert(self, title: str, text: str) -> None:
        self._wandb.alert(title, text)

    def keep_model(self) -> None:
        self._wandb.keep_model(self._tests[-1])

    def sync(self) -> None:
        with naming(Path(self._metrics.name)):
            os.fsync(self._metrics.fileno())

    def close(self, status: int) -> str:
        self._metrics.close()
        return self._wandb.close(status)

    def _show(self, rows: Sequence[Row], closeup: Callable[[], Closeup] | None = None) -> None:
        """Gives W&B the rows of a step, unless it has that step from before a crash."""
        self._tests += [row for row in rows if row["split"] == "test"]
        if not self._wandb.wants(rows[0]["step"]):
            return
        best = min(self._tests, key=lambda row: row["loss"], default=None)
        self._wandb.show(rows, closeup() if closeup else None, best)
        if self._has_just_collapsed(rows):
            self._wandb.alert("posterior collapse", f"epoch {rows[0]['epoch']}: {COLLAPSED}")

    def _has_just_collapsed(self, rows: Sequence[Row]) -> bool:
        """Whether these rows, the newest, are the run's first to tell of it."""
        first = next((row for row in self._tests if row.get("active_units") == 0), None)
        return first in rows


def read_rows(metrics: Path) -> list[Row]:
    """The rows of a metrics.jsonl. Raises InputError as `read_lines` does."""
    return read_lines(metrics, _checked_row, "is not a row of a run")


def _checked_row(row: Any) -> Row:
    if type(row["step"]) is not int or type(row["epoch"]) is not int or not math.isfinite(row["loss"]):
        raise ValueError
    return {**row, "split": str(row["split"])}
