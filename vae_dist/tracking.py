"""Where figures and pictures go: metrics.jsonl and Weights & Biases. Rank zero's tracker writes, the others' does nothing."""

import base64
import contextlib
import json
import math
import netrc
import os
import urllib.error
import urllib.request
from collections.abc import Iterator, Sequence
from itertools import groupby
from pathlib import Path
from typing import Any
from urllib.parse import urlparse

from accelerate import Accelerator

from vae_dist.checkpoint import naming, write_atomically
from vae_dist.config import Config, InputError
from vae_dist.options import to_mapping
from vae_dist.run import RunFolder
from vae_dist.wandb_file import last_step

Row = dict[str, Any]

_WANDB_START_SECONDS = 20.0  # for a server to answer before the run goes on offline
_WANDB_END_SECONDS = 60.0  # for it to take the last figures; what it did not take lies in the run's folder
_WITHOUT_WANDB = "going on without it; metrics.jsonl and the pictures have everything"


class Tracker:
    """The face that every rank sees. This one, the base, does nothing: it is what ranks other than zero get."""

    def log(self, *rows: Row) -> None:
        """Records rows of one optimizer step; with a test row, the epoch's pictures, which lie in the run's folder already."""

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
        self._best = float("inf")
        self._accelerator = accelerator
        self._images = run.images
        self._folder = run.path / "wandb"
        self._wandb: Any = None
        self._wandb_step = 0  # the last that W&B had when it started
        self._start_wandb(run, config, mode)
        for _, of_step in groupby(rows, key=lambda row: row["step"]):
            self._show(list(of_step))  # what a crash kept from W&B

    def log(self, *rows: Row) -> None:
        with naming(Path(self._metrics.name)):
            self._metrics.write("".join(json.dumps(row, allow_nan=False) + "\n" for row in rows))
            self._metrics.flush()
        self._show(rows)

    def sync(self) -> None:
        with naming(Path(self._metrics.name)):
            os.fsync(self._metrics.fileno())

    def close(self, status: int) -> str:
        self._metrics.close()
        run = self._wandb
        with self._surviving_wandb():
            if run is not None:
                run.finish(exit_code=status)
        if run is None:
            return ""
        return f"{self._folder}/offline-run-*" if run.offline else str(run.url)

    def _start_wandb(self, run: RunFolder, config: Config, mode: str) -> None:
        if mode == "disabled":
            return
        if mode == "online":
            with self._surviving_wandb("going on offline"):
                self._init_wandb(run, config, mode)
                return
        with self._surviving_wandb():
            self._init_wandb(run, config, "offline")

    def _init_wandb(self, run: RunFolder, config: Config, mode: str) -> None:
        self._wandb = _opened(self._accelerator, run, config, mode)
        # The optimizer step is W&B's step. Offline, a restart goes on in a file of its own, which knows of no other.
        self._wandb_step = last_step(self._folder) if self._wandb.offline else self._wandb.starting_step - 1

    def _show(self, rows: Sequence[Row]) -> None:
        """Gives W&B the rows of a step, unless it has that step from before a crash."""
        step = rows[0]["step"]
        tests = [row for row in rows if row["split"] == "test"]
        self._best = min([self._best, *(row["loss"] for row in tests)])
        if self._wandb is None or step <= self._wandb_step:
            return
        with self._surviving_wandb():
            values = {f"{_group(row)}/{key}": row[key] for row in rows for key in row if key not in ("split", "step")}
            values |= {key: rows[0][key] for key in ("epoch", "images_seen")}
            values |= self._pictures(tests)
            # Committed at once: a step that W&B holds back for more of it would be lost in a crash.
            self._accelerator.log(values, step=step, log_kwargs={"wandb": {"commit": True}})
            if tests:
                self._wandb.summary["best_test_loss"] = self._best

    def _pictures(self, tests: Sequence[Row]) -> dict[str, Any]:
        import wandb

        names = ("reconstruction", "sample")
        files = [(name, self._images / f"{name}_{row['epoch']}.png") for row in tests for name in names]
        return {f"images/{name}": wandb.Image(str(file)) for name, file in files if file.is_file()}

    @contextlib.contextmanager
    def _surviving_wandb(self, then: str = _WITHOUT_WANDB) -> Iterator[None]:
        """Whatever happens in W&B, training goes on: it is said once, and W&B is left alone from then on."""
        try:
            yield
        except Exception as error:  # wandb raises its own errors, those of its transport, and OSError
            self._wandb = None
            print(f"{_wandb_failed(error)}; {then}", flush=True)


def summarise(accelerator: Accelerator, run: RunFolder, config: Config, figures: Row) -> None:
    """Puts figures into the summary of the run's W&B run, if it has one. Rank zero only."""
    if not run.has_wandb():
        return
    try:
        mode = wandb_mode(config)
        if mode == "disabled":
            return
        wandb_run = _opened(accelerator, run, config, mode)
        wandb_run.summary.update({f"evaluation/{name}": value for name, value in figures.items()})
        wandb_run.finish()
    except Exception as error:  # W&B's own, as above, or no key for an online run any more: evaluation.json is written
        print(f"{_wandb_failed(error)}; evaluation.json has everything", flush=True)


def _opened(accelerator: Accelerator, run: RunFolder, config: Config, mode: str) -> Any:
    """The W&B run of a run's folder, begun or gone on with."""
    import wandb  # costs a second: only where it is used

    settings = wandb.Settings(silent=True, init_timeout=_WANDB_START_SECONDS, finish_timeout=_WANDB_END_SECONDS)
    options = {
        "id": run.wandb_id(),
        "name": run.path.name,
        "dir": str(run.path),
        "mode": mode,
        "settings": settings,
        "resume": "allow",
    }
    wandb.teardown()  # an attempt that failed still holds the run's id
    accelerator.trackers.clear()
    accelerator.init_trackers(config.tracking.project, to_mapping(config), {"wandb": options})
    return accelerator.get_tracker("wandb", unwrap=True)


def _wandb_failed(error: Exception) -> str:
    return f"W&B failed ({type(error).__name__}: {' '.join(str(error).split())[:200]})"


def _group(row: Row) -> str:
    """The chart that a row belongs to: an epoch's training figure is not a point of the training curve."""
    return "train_epoch" if row["split"] == "train" and "train_seconds" in row else str(row["split"])


def wandb_mode(config: Config) -> str:
    """online, offline or disabled, decided without asking anybody. Raises InputError where online lacks a key."""
    mode = config.tracking.wandb
    has_key = bool(_wandb_key())
    if mode == "auto":
        wanted = os.environ.get("WANDB_MODE", "")
        return wanted if wanted in ("offline", "disabled") else "online" if has_key else "offline"
    if mode == "online" and not has_key:
        raise InputError("--tracking.wandb online: no key; run `wandb login`, set WANDB_API_KEY, or take offline")
    return mode


def _wandb_url() -> str:
    return os.environ.get("WANDB_BASE_URL", "https://api.wandb.ai").rstrip("/")


def _wandb_key() -> str:
    """Empty where none is configured."""
    if key := os.environ.get("WANDB_API_KEY"):
        return key
    try:
        found = netrc.netrc(os.environ.get("NETRC")).authenticators(urlparse(_wandb_url()).hostname or "")
    except (OSError, netrc.NetrcParseError):
        return ""
    return found[2] if found else ""


def ask_wandb(seconds: float) -> str:
    """What keeps W&B's server from taking a run with the key that is configured; empty where it answers and knows the key."""
    credentials = base64.b64encode(f"api:{_wandb_key()}".encode()).decode()
    headers = {"Content-Type": "application/json", "Authorization": f"Basic {credentials}"}
    question = urllib.request.Request(f"{_wandb_url()}/graphql", b'{"query": "{ viewer { id } }"}', headers)
    try:
        with urllib.request.build_opener().open(question, timeout=seconds) as answer:
            viewer = json.loads(answer.read())["data"]["viewer"]
        return "" if viewer else f"{_wandb_url()} does not know the key"
    except urllib.error.HTTPError as error:
        return f"{_wandb_url()} refuses the key" if error.code in (401, 403) else f"{_wandb_url()} answers {error}"
    except (OSError, ValueError, KeyError, TypeError) as error:
        return f"{_wandb_url()} does not answer ({error})"


def read_rows(metrics: Path) -> list[Row]:
    """The rows of a metrics.jsonl; a last line that a kill cut short is left out. Raises InputError where another is no row."""
    if not metrics.is_file():
        return []
    rows = []
    lines = metrics.read_bytes().splitlines(keepends=True)
    for number, line in enumerate(lines, start=1):
        try:
            row = json.loads(line)
            if type(row["step"]) is not int or type(row["epoch"]) is not int or not math.isfinite(row["loss"]):
                raise ValueError
            rows.append(row | {"split": str(row["split"])})
        except (ValueError, KeyError, TypeError, RecursionError):
            if number < len(lines) or line.endswith(b"\n"):
                raise InputError(f"{metrics}: line {number} is not a row of a run; mend or remove it") from None
    return rows
