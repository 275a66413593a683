"""Grids of images, as tensors and PNG files."""

import io
from pathlib import Path

import torch
from PIL import Image
from torch import Tensor

from vae_dist.checkpoint import write_atomically
from vae_dist.model import VAE

_GAP = 2  # black pixels between images
RECONSTRUCTIONS, SAMPLES = 8, 64


def grid(images: Tensor, columns: int) -> Tensor:
    """Images in [0, 1], (n, channels, height, width), row by row as one uint8 picture (rows, columns, channels)."""
    n, channels, height, width = images.shape
    rows = -(-n // columns)
    cells = images.new_zeros(rows * columns, channels, height + _GAP, width + _GAP)
    cells[:n, :, :height, :width] = images
    picture = cells.view(rows, columns, channels, height + _GAP, width + _GAP).permute(0, 3, 1, 4, 2)
    picture = picture.reshape(rows * (height + _GAP), columns * (width + _GAP), channels)[:-_GAP, :-_GAP]
    return picture.mul(255).round().clamp(0, 255).to(torch.uint8).cpu()


def save_png(file: Path, picture: Tensor) -> None:
    """Writes a uint8 picture (rows, columns, 1 or 3 channels)."""
    array = picture.squeeze(-1).contiguous()
    content = io.BytesIO()
    Image.fromarray(array.numpy()).save(content, format="png")
    write_atomically(file, content.getvalue())


@torch.no_grad()
def reconstructions(model: VAE, images: Tensor) -> Tensor:
    """Images in [0, 1], (n, *image_shape), over their reconstructions from the posterior's mean, as a grid of two rows."""
    return grid(torch.cat([images, model.decode(model.encode(images).mean)]), columns=len(images))


def samples(model: VAE, n: int, seed: int) -> Tensor:
    """n samples from the prior, as a square grid."""
    return grid(model.sample(n, seed), columns=max(1, round(n**0.5)))
