"""Where images come from, how they lie in memory, and which image belongs to which step and rank."""

import torch
from torch import Tensor

from vae_dist.noise import uniform16

_BLOCK = 256  # images drawn at once


def as_images(pixels: Tensor) -> Tensor:
    """Pixels as the network takes them: uint8 in 0 … 255 to float32 in [0, 1]."""
    return pixels.to(torch.float32).div_(255)


def gather(pixels: Tensor, indices: Tensor, binary_key: Tensor | None = None) -> Tensor:
    """The images at some places of a data set, int64 (n,), as the network takes them; a filler gets the first image.

    With a key of randomness, on the device, they are `binary`.
    """
    # Rows of two dimensions: index_select copies those twice as fast as advanced indexing does images.
    rows = pixels.flatten(1).index_select(0, indices.clamp(min=0))
    images = as_images(rows) if binary_key is None else binary(rows, indices, binary_key).to(torch.float32)
    return images.view(-1, *pixels.shape[1:])


def binary(rows: Tensor, indices: Tensor, key: int | Tensor) -> Tensor:
    """Which pixels are white, bool (n, pixels): each with the probability of its grey value, uint8 (n, pixels) in 0 … 255.

    In integers: black never is and white always, and all devices draw the same. `indices`, int64 (n,), name the images.
    """
    return uniform16(key, indices, rows.shape[1]).mul_(255) < rows.to(torch.int32).mul_(1 << 16)


def binarized(pixels: Tensor, key: int) -> Tensor:
    """A data set, uint8 (n, *image_shape), made black and white once: 0 or 255 by `binary`."""
    blocks = zip(torch.split(pixels.flatten(1), _BLOCK), torch.split(torch.arange(len(pixels)), _BLOCK), strict=True)
    white = torch.cat([binary(rows, indices, key) for rows, indices in blocks])
    return white.to(torch.uint8).mul_(255).view_as(pixels)
