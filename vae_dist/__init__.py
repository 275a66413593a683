"""vae_dist: train variational autoencoders on one CPU, one GPU or many GPUs, with the same numbers on all of them."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from vae_dist.model import VAE

__version__ = "0.1.0"


def load(run: str | Path) -> VAE:
    """The model of a run's folder, or of one of its checkpoints, in eval mode on the CPU.

    `encode(images)` gives the posterior of images in [0, 1], (batch, channels, height, width); `decode(latents)` the mean
    images of latents, (batch, latent_dim); `sample(n, seed=0)` images drawn from the prior.
    Raises vae_dist.config.InputError, a ValueError, where there are no weights or they cannot be read.
    """
    from vae_dist.run import load_model  # imports torch

    return load_model(run)[0]
