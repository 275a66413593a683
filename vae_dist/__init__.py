"""vae_dist: train variational autoencoders on one CPU, one GPU or many GPUs, with the same numbers on all of them.

>>> import vae_dist
>>> result = vae_dist.fit(vae_dist.Config(...), train=images, test=others)  # trains, or goes on; see docs/library.md
>>> model = vae_dist.load("runs/mnist")  # what a run left, a torch.nn.Module
"""

from __future__ import annotations

from collections.abc import Callable
from importlib import import_module
from pathlib import Path
from typing import TYPE_CHECKING, Any

from vae_dist.config import (
    CheckpointConfig,
    Config,
    DataConfig,
    InputError,
    ModelConfig,
    ObjectiveConfig,
    OptimizerConfig,
    TrackingConfig,
    TrainerConfig,
)

if TYPE_CHECKING:
    from vae_dist.callbacks import Callback
    from vae_dist.distributed import TrainingFailed, run_entry_point
    from vae_dist.evaluate import measure
    from vae_dist.fitting import Result, fit
    from vae_dist.likelihoods import Likelihood
    from vae_dist.model import VAE

__version__ = "0.1.0"

__all__ = [
    "VAE",
    "Callback",
    "CheckpointConfig",
    "Config",
    "DataConfig",
    "InputError",
    "Likelihood",
    "ModelConfig",
    "ObjectiveConfig",
    "OptimizerConfig",
    "Result",
    "TrackingConfig",
    "TrainerConfig",
    "TrainingFailed",
    "fit",
    "load",
    "measure",
    "run_entry_point",
]

# Where the names are that need torch: it is imported with the first of them.
_HOMES = {
    "Callback": "callbacks",
    "Likelihood": "likelihoods",
    "Result": "fitting",
    "TrainingFailed": "distributed",
    "VAE": "model",
    "fit": "fitting",
    "measure": "evaluate",
    "run_entry_point": "distributed",
}


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module 'vae_dist' has no attribute {name!r}")
    return getattr(import_module(f"vae_dist.{_HOMES[name]}"), name)


def load(run: str | Path, build: Callable[[], VAE] | None = None) -> VAE:
    """The model of a run's folder, or of one of its checkpoints, in eval mode on the CPU.

    `encode(images)` gives the posterior of images in [0, 1], (batch, channels, height, width); `decode(latents)` the mean
    images of latents, (batch, latent_dim); `sample(n, seed=0)` images drawn from the prior. `build` is the function that was
    given to `fit`, if one was.
    Raises vae_dist.config.InputError, a ValueError, where there are no weights or they cannot be read.
    """
    from vae_dist.run import load_model  # imports torch

    return load_model(run, build)[0]
