"""Pictures from a trained model: samples, reconstructions, latent traversals and interpolations.

python -m vae_dist.generate runs/mnist
"""

import sys
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Annotated

import torch
import tyro
from torch import Tensor

from vae_dist.config import InputError
from vae_dist.data import as_images
from vae_dist.data.images import first_images
from vae_dist.distributed import run_entry_point
from vae_dist.loading import load_images
from vae_dist.model import VAE
from vae_dist.options import command_line
from vae_dist.pictures import grid, reconstructions, samples, save_png
from vae_dist.run import is_checkpoint, load_model
from vae_dist.starting import start

_COLUMNS = 11  # of traversals and interpolations
_REACH = 3.0  # of traversals, in standard deviations of the prior
_MOST_DIMENSIONS = 32  # of traversals
_TEST_IMAGES = 8


@dataclass(frozen=True)
class Options:
    """Draw pictures from a trained model, as PNG files."""

    run: tyro.conf.Positional[Path]
    """Folder of the run, or of one of its checkpoints."""
    out: Path | None = None
    """Folder of the pictures; default: `generated` in the run's folder."""
    samples: int = 64
    """How many samples to draw from the prior."""
    seed: int = 0
    """Of the samples."""
    root: Annotated[str | None, tyro.conf.arg(name="data.root")] = None
    """Where the data set lies, if elsewhere than in training."""

    def __post_init__(self) -> None:
        if self.samples < 1:
            raise InputError(f"--samples {self.samples}: must be at least 1")
        if not 0 <= self.seed < 2**63:
            raise InputError(f"--seed {self.seed}: must be in 0 … 2^63 - 1")


def main(args: list[str] | None = None) -> int:
    options = command_line(Options, "vae_dist.generate", sys.argv[1:] if args is None else args)
    model, config = load_model(options.run)
    data = replace(config.data, root=options.root or config.data.root)
    test = load_images(data, start(), train=False, shape=model.image_shape)
    images = as_images(first_images(test, _TEST_IMAGES)).cpu()
    run = options.run.parent.parent if is_checkpoint(options.run) else options.run  # checkpoints are sealed
    out = options.out or run / "generated"
    drawn = {
        "samples": samples(model, options.samples, options.seed),
        "reconstructions": reconstructions(model, images),
        "traversals": traversals(model, images[:1]),
        "interpolations": interpolations(model, images),
    }
    for name, picture in drawn.items():
        save_png(out / f"{name}.png", picture)
        print(out / f"{name}.png")
    return 0


@torch.no_grad()
def traversals(model: VAE, image: Tensor) -> Tensor:
    """A grid with a row for a latent dimension, moved alone from -3 to 3 around one image's (1, …) posterior mean.

    The rows begin with the dimension in which that image's posterior tells most (largest KL); there are 32 at most.
    """
    mean, logvar = model.encode(image)
    kl = 0.5 * (mean.square() + logvar.exp() - 1 - logvar).squeeze(0)
    dimensions = kl.argsort(descending=True)[:_MOST_DIMENSIONS].tolist()
    latents = mean.repeat(len(dimensions), _COLUMNS, 1)  # (dimension, column, latent_dim)
    for row, dimension in enumerate(dimensions):
        latents[row, :, dimension] = torch.linspace(-_REACH, _REACH, _COLUMNS)
    return grid(model.decode_all(latents.flatten(0, 1)), _COLUMNS)


@torch.no_grad()
def interpolations(model: VAE, images: Tensor) -> Tensor:
    """A grid with a row for each image, on straight lines from its posterior mean to the next image's."""
    start = model.encode(images).mean.unsqueeze(1)
    way = torch.linspace(0, 1, _COLUMNS).unsqueeze(1)
    latents = start + (start.roll(-1, dims=0) - start) * way
    return grid(model.decode_all(latents.flatten(0, 1)), _COLUMNS)


if __name__ == "__main__":
    run_entry_point(main)
