"""The W&B run of a run's folder. Whatever happens in W&B, training goes on: it is said once, and W&B is left alone then."""

import contextlib
import os
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

import torch
from accelerate import Accelerator

from vae_dist import __version__, charts
from vae_dist.charts import Closeup
from vae_dist.config import Config
from vae_dist.options import to_mapping
from vae_dist.run import RunFolder
from vae_dist.wandb_file import earlier
from vae_dist.wandb_server import wandb_mode

_START_SECONDS = 20.0  # for a server to answer before the run goes on offline
_END_SECONDS = 60.0  # for it to take the last figures; what it did not take lies in the run's folder
_WITHOUT_WANDB = "going on without it; metrics.jsonl and the pictures have everything"
_MODEL_FILES = ("model.safetensors", "config.json", "config.yaml")


class WandbRun:
    """Rank zero's hold on it."""

    def __init__(self, accelerator: Accelerator, run: RunFolder, config: Config, mode: str) -> None:
        self._accelerator, self._run, self._config = accelerator, run, config
        self._wandb: Any = None
        self._step = 0  # the last that W&B had when it started
        self._best: Mapping[str, Any] | None = None  # the test row that the summary has
        if mode == "online":
            with self._surviving("going on offline"):
                self._open("online")
        if self._wandb is None and mode != "disabled":
            with self._surviving():
                self._open("offline")

    def _open(self, mode: str) -> None:
        before = earlier(self._run.path / "wandb")
        tags = [*before.tags, *_tags(self._accelerator, self._config)]
        self._wandb = _opened(self._accelerator, self._run, self._config, mode, tags)
        # The optimizer step is W&B's step. Offline, a restart goes on in a file of its own, which knows of no other.
        self._step = before.step if self._wandb.offline else self._wandb.starting_step - 1
        self._wandb.define_metric("images_seen", hidden=True)
        self._wandb.define_metric("epoch", hidden=True)
        for group in charts.GROUPS:
            self._wandb.define_metric(f"{group}/*", step_metric="epoch" if group == "images" else "images_seen")

    def wants(self, step: int) -> bool:
        """Whether W&B is there, and has not that step from before a crash."""
        return self._wandb is not None and step > self._step

    def show(self, rows: Sequence[Mapping[str, Any]], closeup: Closeup | None, best: Mapping[str, Any] | None) -> None:
        """Records the rows of one optimizer step, and the pictures of a test row, which lie in the run's folder.

        `best` is the test row with the lowest loss so far.
        """
        with self._surviving():
            values = {name: value for row in rows for name, value in charts.figures(row).items()}
            values |= {key: rows[0][key] for key in ("epoch", "images_seen")}
            for test in (row for row in rows if row["split"] == "test"):
                values |= charts.pictures(test, self._run.images)
            if closeup is not None:
                values |= charts.closeup_charts(closeup)
            # Committed at once: a step that W&B holds back for more of it would be lost in a crash.
            self._accelerator.log(values, step=rows[0]["step"], log_kwargs={"wandb": {"commit": True}})
            if best is not None and best is not self._best:
                # Not by W&B's own minimum, which stays as it was when a run goes on (wandb #9684).
                self._wandb.summary.update({"best_test_loss": best["loss"], "best_test_epoch": best["epoch"]})
                self._best = best

    def alert(self, title: str, text: str) -> None:
        """Has W&B send word to whoever asked for it, by mail or chat."""
        with self._surviving():
            if self._wandb is not None:
                self._wandb.alert(title, f"{self._run.path.name}: {text}", level="ERROR")

    def keep_model(self, figures: Mapping[str, Any]) -> None:
        """Uploads the final model, where `tracking.artifact` wants that."""
        with self._surviving():
            if self._wandb is not None and self._config.tracking.artifact:
                _log_model(self._wandb, self._run, self._config, figures, _MODEL_FILES)

    def close(self, status: int) -> str:
        """Ends the W&B run of a job that exits with `status`. Returns where it is: its address, or the folders of an offline
        one; empty for none.
        """
        wandb = self._wandb
        with self._surviving():
            if wandb is not None:
                wandb.finish(exit_code=status)
        if wandb is None:
            return ""
        return f"{self._run.path / 'wandb'}/offline-run-*" if wandb.offline else str(wandb.url)

    @contextlib.contextmanager
    def _surviving(self, then: str = _WITHOUT_WANDB) -> Iterator[None]:
        try:
            yield
        except Exception as error:  # wandb raises its own errors, those of its transport, and OSError
            self._wandb = None
            print(f"{_failed(error)}; {then}", flush=True)


def summarise(accelerator: Accelerator, run: RunFolder, config: Config, figures: Mapping[str, Any]) -> None:
    """Puts the figures of evaluation.json into the summary of the run's W&B run, if it has one. Rank zero only.

    With `tracking.artifact` they also go with the model of a finished run, as a new version.
    """
    if not run.has_wandb():
        return
    try:
        mode = wandb_mode(config)
        if mode == "disabled":
            return
        wandb = _opened(accelerator, run, config, mode, earlier(run.path / "wandb").tags)
        wandb.summary.update({f"evaluation/{name}": value for name, value in figures.items()})
        if config.tracking.artifact and run.state() == "finished":
            _log_model(wandb, run, config, figures, (*_MODEL_FILES, run.evaluation.name))
        wandb.finish()
    except Exception as error:  # W&B's own, as above, or no key for an online run any more: evaluation.json is written
        print(f"{_failed(error)}; evaluation.json has everything", flush=True)


def _opened(accelerator: Accelerator, folder: RunFolder, config: Config, mode: str, tags: Iterable[str]) -> Any:
    """The W&B run of a run's folder, begun or gone on with."""
    import wandb  # costs a second: only where it is used

    options = {
        "id": folder.wandb_id(),
        "name": folder.path.name,
        "group": config.tracking.group or None,
        "tags": list(dict.fromkeys(tags)),
        "dir": str(folder.path),
        "mode": mode,
        "settings": wandb.Settings(silent=True, init_timeout=_START_SECONDS, finish_timeout=_END_SECONDS),
        "resume": "allow",
        "reinit": "create_new" if wandb.run else "default",  # a run of the program's own goes on beside it
    }
    # Tables and models wait there for their upload: else in the home, where a folder that is moved would leave them.
    os.environ["WANDB_DATA_DIR"] = str((folder.path / "wandb").absolute())
    if not wandb.run:
        wandb.teardown()  # an attempt that failed still holds the run's id
    accelerator.trackers.clear()
    accelerator.init_trackers(config.tracking.project, init_kwargs={"wandb": options})
    run = accelerator.get_tracker("wandb", unwrap=True)
    run.config.update(to_mapping(config), allow_val_change=True)
    return run


def _tags(accelerator: Accelerator, config: Config) -> list[str]:
    """On what a job runs, in what arithmetic."""
    device, processes = accelerator.device, accelerator.num_processes
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else device.type
    return [name, f"{processes} process{'es' if processes > 1 else ''}", config.trainer.precision]


def _log_model(wandb_run: Any, run: RunFolder, config: Config, figures: Mapping[str, Any], files: Sequence[str]) -> None:
    """A version of the artifact that is this run's model."""
    import wandb

    metadata = {"config": to_mapping(config), "figures": dict(figures), "vae_dist": __version__}
    artifact = wandb.Artifact(f"model-{run.wandb_id()}", "model", metadata=metadata)
    for name in files:
        artifact.add_file(str(run.path / name), name)
    wandb_run.log_artifact(artifact)


def _failed(error: Exception) -> str:
    return f"W&B failed ({type(error).__name__}: {' '.join(str(error).split())[:200]})"
