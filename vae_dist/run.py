"""A run's folder: claimed by one job at a time, never by another config, and telling how the run ended."""

import fcntl
import hashlib
import json
import operator
import secrets
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, Literal, TextIO

import torch
import yaml
from torch import Tensor

from vae_dist import checkpoint
from vae_dist.averaging import averages_in
from vae_dist.config import Config, InputError
from vae_dist.model import VAE, from_program
from vae_dist.options import from_mapping, require_same_run, to_mapping, to_yaml

State = Literal["running", "finished", "interrupted", "failed"]
_OF_A_START = {"time": str, "step": int, "command": list, "processes": int, "places": list, "versions": dict, "data": dict}
TIME_FORMAT = "%Y-%m-%dT%H:%M:%SZ"  # of UTC


class RunFolder:
    """Names of the files in a run's folder, and the few operations on it as a whole. Rank zero writes, every rank reads."""

    def __init__(self, path: str | Path) -> None:
        self.path = Path(path)
        self.checkpoints = self.path / "checkpoints"
        self.metrics = self.path / "metrics.jsonl"
        self.starts = self.path / "starts.jsonl"
        self.images = self.path / "images"
        self.evaluation = self.path / "evaluation.json"
        self.evaluation_so_far = self.path / "evaluation.safetensors"
        self._config = self.path / "config.yaml"
        self._status = self.path / "status.json"
        self._wandb_id = self.path / "wandb" / "run_id"
        self._lock: TextIO | None = None

    def claim(self, config: Config) -> None:
        """Makes the folder this job's, or takes up the run that lies there. Rank zero only.

        Raises InputError as `require_fit` does, and where another job is running there.
        """
        self.require_fit(config)
        self.path.mkdir(parents=True, exist_ok=True)
        self._take_lock()
        self.require_fit(config)  # another job may have been there

    def require_fit(self, config: Config) -> None:
        """Raises InputError where the folder holds a run of another config, or something that is no run, and where
        `--resume never` meets a run. It changes nothing.
        """
        if self.path.exists() and not self.path.is_dir():
            raise InputError(f"--output {self.path}: is a file; name a folder")
        if self.path.is_dir() and not self._config.is_file() and any(p.name[0] != "." for p in self.path.iterdir()):
            raise InputError(f"--output {self.path}: holds files but no run; name a new or empty folder")
        holds_run = self._config.is_file()
        if holds_run and config.resume == "never":
            raise InputError(f"--output {self.path}: holds a run, and --resume never would overwrite it; name another folder")
        if holds_run:
            require_same_run(self.config(), config, f"--output {self.path}")

    def _take_lock(self) -> None:
        """A lock that goes with the process, however it ends."""
        self._lock = (self.path / ".lock").open("w")
        try:
            fcntl.flock(self._lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise InputError(f"--output {self.path}: another job is running there; wait for it, or name another") from None

    def release(self) -> None:
        """Lets other jobs have the folder."""
        if self._lock is not None:
            self._lock.close()

    def config(self) -> Config:
        """The config of the run. Raises InputError where there is none that can be read."""
        try:
            values = yaml.safe_load(self._config.read_text())
        except OSError as error:
            raise InputError(f"{self._config}: {error.strerror}; is {self.path} the folder of a run?") from None
        except (yaml.YAMLError, ValueError, RecursionError):
            raise InputError(f"{self._config}: not YAML") from None
        if not isinstance(values, dict):
            raise InputError(f"{self._config}: not a run's config")
        return from_mapping(values, self._config)

    def save_config(self, config: Config) -> None:
        checkpoint.write_atomically(self._config, to_yaml(config))

    def set_status(self, state: State, reason: str, **figures: int) -> None:
        """Says how the run stands, for schedulers: a launcher of several processes turns every exit status into 1."""
        moment = time.strftime(TIME_FORMAT, time.gmtime())
        status = {"state": state, "reason": reason, **figures, "time": moment}
        checkpoint.write_atomically(self._status, json.dumps(status) + "\n")

    def status(self) -> dict[str, Any]:
        """What `set_status` last said; empty where nothing was said, or it cannot be read."""
        try:
            status = json.loads(self._status.read_text())
        except (OSError, ValueError, RecursionError):
            return {}
        return status if isinstance(status, dict) else {}

    def state(self) -> str:
        """The state last set; empty where none was."""
        return str(self.status().get("state", ""))

    def was_enough(self, step: int, steps: int) -> bool:
        """Whether a run of so many steps was finished after fewer, since a callback had enough."""
        status = self.status()
        return (status.get("state"), status.get("step"), status.get("steps")) == ("finished", step, steps)

    def read_starts(self) -> list[dict[str, Any]]:
        """What each job was, the first first; empty for a run that was trained before there was such a file.

        Raises InputError as `read_lines` does.
        """
        return read_lines(self.starts, _checked_start, "does not tell of a start")

    def read_evaluation(self) -> dict[str, Any]:
        """What evaluation.json holds; empty where there is none. Raises InputError where it is not what evaluate writes."""
        try:
            found = json.loads(self.evaluation.read_text())
        except FileNotFoundError:
            return {}
        except (ValueError, RecursionError):
            found = None
        if not isinstance(found, dict):
            raise InputError(f"{self.evaluation}: not what vae_dist.evaluate writes; remove it and evaluate again")
        return found

    def save_model(self, config: Config, model: VAE) -> None:
        """Writes the final weights and their description: all that anybody needs to use the model."""
        weights = checkpoint.to_bytes(model.state_dict())
        description = describe(config, model.image_shape) | {"sha256": hashlib.sha256(weights).hexdigest()}
        checkpoint.write_atomically(self.path / "config.json", json.dumps(description, indent=2) + "\n")
        checkpoint.write_atomically(self.path / "model.safetensors", weights)

    def wandb_id(self) -> str:
        """The id of this folder's W&B run, made up at its first use."""
        if not self.has_wandb():
            checkpoint.write_atomically(self._wandb_id, secrets.token_hex(4))
        return self._wandb_id.read_text()

    def has_wandb(self) -> bool:
        return self._wandb_id.is_file()


def read_lines(file: Path, checked: Callable[[Any], dict[str, Any]], complaint: str) -> list[dict[str, Any]]:
    """What `checked` makes of the JSON in each line, but for a last one that a kill cut short; empty where there is no file.

    Raises InputError, with the complaint, at another line that is no JSON, or for which `checked` raises a ValueError, KeyError
    or TypeError.
    """
    if not file.is_file():
        return []
    found = []
    lines = file.read_bytes().splitlines(keepends=True)
    for number, line in enumerate(lines, start=1):
        try:
            found.append(checked(json.loads(line)))
        except (ValueError, KeyError, TypeError, RecursionError):
            if number < len(lines) or line.endswith(b"\n"):
                raise InputError(f"{file}: line {number} {complaint}; mend or remove it") from None
    return found


def _checked_start(start: Any) -> dict[str, Any]:
    images = [start["data"]["train"], start["data"]["test"]]
    is_known = all(type(each["n"]) is int and isinstance(each["sha256"], str) for each in images)
    if not is_known or not all(isinstance(start[name], kind) for name, kind in _OF_A_START.items()):
        raise ValueError
    return dict(start)


def evaluation_of(run: RunFolder, model: VAE) -> dict[str, Any]:
    """What evaluation.json holds; empty, which is said, where it does not say that it is of this model's weights."""
    found = run.read_evaluation()
    if found and found.get("weights_sha256") != weights_digest(model):
        words = "does not say that it is of the run's weights, and is left out; evaluate the run again"
        print(f"{run.evaluation}: {words}", flush=True)
        return {}
    return found


def weights_digest(model: VAE) -> str:
    """SHA-256 of the file that a model's weights are saved in."""
    return hashlib.sha256(checkpoint.to_bytes(model.state_dict())).hexdigest()


def describe(config: Config, image_shape: Sequence[int]) -> dict[str, Any]:
    """What `config.json` says beside saved weights: enough to build the model again."""
    return {"format": checkpoint.FORMAT, "image_shape": list(image_shape), "config": to_mapping(config)}


def described_config(description: dict[str, Any], source: Path) -> Config:
    """The config that `describe` put down. Raises InputError, naming `source`, where it is not there."""
    config = description.get("config") if isinstance(description, dict) else None
    if not isinstance(config, dict):
        raise InputError(f"{source}: cannot be read: it describes no config")
    return from_mapping(config, source)


def load_model(path: str | Path, build: Callable[[], VAE] | None = None) -> tuple[VAE, Config]:
    """The model of a run, or of one checkpoint, in eval mode on the CPU, and its config.

    A model of a program's own modules takes the function that built it.

    Of a run: the final weights, or its newest whole checkpoint while it is not finished. Raises InputError where there is
    neither, or they are damaged. With `optimizer.ema` a checkpoint gives the average of the weights, as a finished run does.
    """
    run = RunFolder(path)
    folder = run.path
    is_final = (folder / "model.safetensors").is_file() and run.state() in ("", "finished")
    if not is_final and run.checkpoints.is_dir():
        newest, _ = checkpoint.newest_whole(run.checkpoints)
        folder = newest or folder
    if not (folder / "model.safetensors").is_file():
        raise InputError(f"{folder}: no weights there: neither model.safetensors nor a checkpoint")
    try:
        description, weights, averages = _read_checkpoint(folder) if is_checkpoint(folder) else _read_final(folder)
        config = described_config(description, folder / "config.json")
        channels, height, width = (operator.index(side) for side in description["image_shape"])
        if build is None:
            with torch.device("meta"):  # takes no memory, whatever sizes a damaged description claims
                model = VAE.from_config(config.model, (channels, height, width))
    except InputError:
        raise
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RuntimeError) as error:
        raise InputError(f"{folder / 'config.json'}: cannot be read: {error}") from None
    if build is not None:
        model = from_program(build)
        if model.image_shape != (channels, height, width):
            raise InputError(f"{folder}: of images of {(channels, height, width)}, but the model is one of {model.image_shape}")
    what = "averaged weights" if config.optimizer.ema else "weights"
    restore_weights(model, averages if config.optimizer.ema else weights, folder, assign=build is None, what=what)
    return model.eval(), config


def is_checkpoint(folder: Path) -> bool:
    """Whether a folder is one checkpoint, rather than a run."""
    return (folder / "trainer.json").is_file()


def run_of(folder: Path) -> Path:
    """The run whose folder it is, or one of whose checkpoints."""
    return folder.parent.parent if is_checkpoint(folder) else folder


def _read_checkpoint(folder: Path) -> tuple[dict[str, Any], dict[str, Tensor], dict[str, Tensor]]:
    """The description of a model, its weights, and those of its average, if it has one."""
    try:
        saved = checkpoint.read(folder)
    except checkpoint.Damaged as error:
        raise InputError(str(error)) from None
    return saved.config, saved.model, averages_in(saved.trainer)


def _read_final(folder: Path) -> tuple[dict[str, Any], dict[str, Tensor], dict[str, Tensor]]:
    """As `_read_checkpoint`; where there is an average, the final weights are the average's."""
    description = json.loads((folder / "config.json").read_text())
    weights = folder / "model.safetensors"
    tensors = checkpoint.read_tensors(weights)
    if description["sha256"] != hashlib.sha256(weights.read_bytes()).hexdigest():
        raise InputError(f"{weights}: damaged: its SHA-256 is not the one in config.json")
    return description, tensors, tensors


def restore_weights(model: VAE, tensors: dict[str, Tensor], source: Path, assign: bool = False, what: str = "weights") -> None:
    """Loads weights by name, into the model's memory or in its place. Raises InputError where they are not this model's."""
    if any(tensor.dtype != torch.float32 for tensor in tensors.values()):
        raise InputError(f"{source}: the {what} are not float32")
    try:
        model.load_state_dict(tensors, assign=assign)
    except RuntimeError as error:
        raise InputError(f"{source}: the {what} do not fit the model: {' '.join(str(error).split())}") from None
