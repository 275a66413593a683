"""Where figures and pictures go: metrics.jsonl and Weights & Biases. Rank zero's tracker writes, the others' does nothing."""

import contextlib
import json
import netrc
import os
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any
from urllib.parse import urlparse

from accelerate import Accelerator

from vae_dist.checkpoint import naming, write_atomically
from vae_dist.config import Config, InputError
from vae_dist.options import to_mapping
from vae_dist.run import RunFolder

Row = dict[str, Any]

_WANDB_START_SECONDS = 20.0  # for a server to answer before the run goes on offline
_WANDB_END_SECONDS = 60.0  # for it to take the last figures; what it did not take lies in the run's folder


class Tracker:
    """The face that every rank sees. This one, the base, does nothing: it is what ranks other than zero get."""

    def log(self, group: str, row: Row, pictures: Mapping[str, Path] | None = None) -> None:
        """Records one row of figures, and picture files under their names. `group` heads their names in W&B."""

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
        self._best = min((row["loss"] for row in rows if row["split"] == "test"), default=float("inf"))
        self._accelerator = accelerator
        self._folder = run.path / "wandb"
        self._wandb: Any = None
        self._start_wandb(run, config, mode)

    def log(self, group: str, row: Row, pictures: Mapping[str, Path] | None = None) -> None:
        with naming(Path(self._metrics.name)):
            self._metrics.write(json.dumps(row, allow_nan=False) + "\n")
            self._metrics.flush()
        if row["split"] == "test":
            self._best = min(self._best, row["loss"])
        with self._surviving_wandb():
            if self._wandb is not None:
                self._log_wandb(group, row, pictures or {})

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
        import wandb  # costs a second: only where it is used

        settings = wandb.Settings(silent=True, init_timeout=_WANDB_START_SECONDS, finish_timeout=_WANDB_END_SECONDS)
        options = {
            "id": run.wandb_id(),
            "name": run.path.name,
            "dir": str(run.path),
            "mode": mode,
            "settings": settings,
        }
        wandb.teardown()  # an attempt that failed still holds the run's id
        self._accelerator.trackers.clear()
        self._accelerator.init_trackers(config.tracking.project, to_mapping(config), {"wandb": options | {"resume": "allow"}})
        self._wandb = self._accelerator.get_tracker("wandb", unwrap=True)

    def _log_wandb(self, group: str, row: Row, pictures: Mapping[str, Path]) -> None:
        import wandb

        values: dict[str, Any] = {f"{group}/{name}": value for name, value in row.items() if name not in ("split", "step")}
        values |= {f"images/{name}": wandb.Image(str(file)) for name, file in pictures.items()}
        values |= {"epoch": row["epoch"], "images_seen": row["images_seen"]}
        # The optimizer step is W&B's step: what a resumed run logs a second time, W&B drops.
        self._accelerator.log(values, step=row["step"])
        if row["split"] == "test":
            self._wandb.summary["best_test_loss"] = self._best

    @contextlib.contextmanager
    def _surviving_wandb(
        self, then: str = "going on without it; metrics.jsonl and the pictures have everything"
    ) -> Iterator[None]:
        """Whatever happens in W&B, training goes on: it is said once, and W&B is left alone from then on."""
        try:
            yield
        except Exception as error:  # wandb raises its own errors, those of its transport, and OSError
            self._wandb = None
            print(f"W&B failed ({type(error).__name__}: {' '.join(str(error).split())[:200]}); {then}", flush=True)


def wandb_mode(config: Config) -> str:
    """online, offline or disabled, decided without asking anybody. Raises InputError where online lacks a key."""
    mode = config.tracking.wandb
    has_key = bool(os.environ.get("WANDB_API_KEY")) or _netrc_has_key()
    if mode == "auto":
        wanted = os.environ.get("WANDB_MODE", "")
        return wanted if wanted in ("offline", "disabled") else "online" if has_key else "offline"
    if mode == "online" and not has_key:
        raise InputError("--tracking.wandb online: no key; run `wandb login`, set WANDB_API_KEY, or take offline")
    return mode


def _netrc_has_key() -> bool:
    host = urlparse(os.environ.get("WANDB_BASE_URL", "https://api.wandb.ai")).hostname or ""
    try:
        return netrc.netrc(os.environ.get("NETRC")).authenticators(host) is not None
    except (OSError, netrc.NetrcParseError):
        return False


def read_rows(metrics: Path) -> list[Row]:
    """The rows of a metrics.jsonl; a last line that a kill cut short is left out. Raises InputError where another is no row."""
    if not metrics.is_file():
        return []
    rows = []
    lines = metrics.read_bytes().splitlines(keepends=True)
    for number, line in enumerate(lines, start=1):
        try:
            row = json.loads(line)
            if not {"split", "epoch", "step", "loss"} <= row.keys():
                raise ValueError
            rows.append(row)
        except (ValueError, AttributeError, RecursionError):
            if number < len(lines) or line.endswith(b"\n"):
                raise InputError(f"{metrics}: line {number} is not a row of a run; mend or remove it") from None
    return rows
