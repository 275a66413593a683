"""What a run must remember: packed into a checkpoint, and taken out again."""

import math
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch

from vae_dist.averaging import Averages, averages_in
from vae_dist.checkpoint import Checkpoint
from vae_dist.config import Config, InputError
from vae_dist.model import VAE
from vae_dist.objective import Sums
from vae_dist.optimizer import load_optimizer_tensors, optimizer_tensors
from vae_dist.run import describe, restore_weights

Scaler = torch.amp.GradScaler | None

_SCALER_STATE = ("scale", "_growth_tracker")


@dataclass
class Progress:
    """All that a run must remember besides tensors: since randomness is derived, counters and sums."""

    step: int = 0  # optimizer steps done
    images: int = 0  # of the training set
    data: str = ""  # its digest; empty where a checkpoint of an earlier version does not tell
    test: str = ""  # the digest of the test set; empty likewise
    epoch_sums: Sums = field(default_factory=Sums)  # of the epoch so far
    window_sums: Sums = field(default_factory=Sums)  # since the last row of the training curve

    @classmethod
    def from_json(cls, values: dict[str, Any]) -> "Progress":
        """Raises KeyError or TypeError where the values are not what `asdict` gave."""
        sums = (Sums(*values[name]) for name in ("epoch_sums", "window_sums"))
        progress = cls(values["step"], values["images"], values.get("data", ""), values.get("test", ""), *sums)
        for digest in (progress.data, progress.test):
            if not isinstance(digest, str):
                raise TypeError(f"{digest!r} is no digest")
        for count in (progress.step, progress.images):
            if type(count) is not int or count < 0:
                raise TypeError(f"{count!r} is no count")
        for figure in (*progress.epoch_sums, *progress.window_sums):
            if type(figure) not in (int, float) or not math.isfinite(figure):
                raise TypeError(f"{figure!r} is no sum")
        return progress


def pack(
    config: Config,
    model: VAE,
    optimizer: torch.optim.Optimizer,
    scaler: Scaler,
    progress: Progress,
    averages: Averages | None = None,
) -> Checkpoint:
    """The state of a run at this moment."""
    tensors = optimizer_tensors(optimizer, model)
    if averages is not None:
        tensors |= averages.tensors()
    if scaler is not None:
        state = scaler.state_dict()
        tensors |= {f"scaler.{name}": torch.tensor(float(state[name]), dtype=torch.float64) for name in _SCALER_STATE}
    return Checkpoint(
        config=describe(config, model.image_shape),
        model=model.state_dict(),
        trainer=tensors,
        progress={"seed": config.seed, **asdict(progress)},
    )


def unpack(
    saved: Checkpoint,
    source: Path,
    model: VAE,
    optimizer: torch.optim.Optimizer,
    scaler: Scaler,
    averages: Averages | None = None,
) -> Progress:
    """Puts a packed state back. Raises InputError where it is of another model or lacks something."""
    restore_weights(model, saved.model, source)
    if averages is not None:
        restore_weights(averages.model, averages_in(saved.trainer), source, what="averaged weights")
    try:
        load_optimizer_tensors(optimizer, model, saved.trainer)
        if scaler is not None:
            restored = {name: saved.trainer[f"scaler.{name}"].item() for name in _SCALER_STATE}
            if not 0 < restored["scale"] < math.inf:
                raise TypeError(f"{restored['scale']} is no loss scale")
            scaler.load_state_dict(scaler.state_dict() | restored)
        return Progress.from_json(saved.progress)
    except InputError as error:
        raise InputError(f"{source}: {error}") from None
    except (KeyError, TypeError, RuntimeError) as error:
        raise InputError(f"{source}: not a checkpoint of this version: {error}") from None
