"""Grids of images, as tensors and PNG files."""

import io
from pathlib import Path

import torch
from PIL import Image
from torch import Tensor

from vae_dist.checkpoint import write_atomically
from vae_dist.model import VAE

GAP = 2  # black pixels between images
RECONSTRUCTIONS = 8
_SAMPLES = 64
_COLUMNS = 11  # of traversals and interpolations
_REACH = 3.0  # of traversals, in standard deviations of the prior
_MOST_DIMENSIONS = 32  # of traversals


def grid(images: Tensor, columns: int) -> Tensor:
    """Images in [0, 1], (n, channels, height, width), row by row as one uint8 picture (rows, columns, channels)."""
    n, channels, height, width = images.shape
    rows = -(-n // columns)
    cells = images.new_zeros(rows * columns, channels, height + GAP, width + GAP)
    cells[:n, :, :height, :width] = images
    picture = cells.view(rows, columns, channels, height + GAP, width + GAP).permute(0, 3, 1, 4, 2)
    picture = picture.reshape(rows * (height + GAP), columns * (width + GAP), channels)[:-GAP, :-GAP]
    return picture.mul(255).round().clamp(0, 255).to(torch.uint8).cpu()


def as_pil(picture: Tensor) -> Image.Image:
    """A uint8 picture (rows, columns, 1 or 3 channels) as Pillow has it."""
    return Image.fromarray(picture.squeeze(-1).contiguous().numpy())


def save_png(file: Path, picture: Tensor) -> None:
    """Writes a uint8 picture (rows, columns, 1 or 3 channels)."""
    content = io.BytesIO()
    as_pil(picture).save(content, format="png")
    write_atomically(file, content.getvalue())


@torch.no_grad()
def reconstructed(model: VAE, images: Tensor) -> Tensor:
    """Images in [0, 1], (n, *image_shape), decoded from the mean of their posterior."""
    return model.decode(model.encode(images).mean)


def reconstructions(model: VAE, images: Tensor) -> Tensor:
    """Images in [0, 1], (n, *image_shape), over their reconstructions, as a grid of two rows."""
    return grid(torch.cat([images, reconstructed(model, images)]), columns=len(images))


def samples(model: VAE, n: int, seed: int) -> Tensor:
    """n samples from the prior, as a square grid."""
    return grid(model.sample(n, seed), columns=max(1, round(n**0.5)))


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


def of_epoch(model: VAE, images: Tensor, seed: int) -> dict[str, Tensor]:
    """The pictures that a run keeps of each epoch, by the names of their files; `images` are the first of the test images."""
    return {
        "reconstruction": reconstructions(model, images),
        "sample": samples(model, _SAMPLES, seed),
        "traversal": traversals(model, images[:1]),
    }
