"""Pictures from a trained model: samples, reconstructions, latent traversals and interpolations.

python -m vae_dist.generate runs/mnist
"""

import sys
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Annotated

import tyro

from vae_dist.config import InputError
from vae_dist.data import as_images
from vae_dist.data.images import first_images
from vae_dist.distributed import run_entry_point
from vae_dist.loading import load_images
from vae_dist.options import command_line
from vae_dist.pictures import interpolations, reconstructions, samples, save_png, traversals
from vae_dist.run import load_model, run_of
from vae_dist.starting import start

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
    out = options.out or run_of(options.run) / "generated"  # checkpoints are sealed
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


if __name__ == "__main__":
    run_entry_point(main)
