"""Where images come from, how they lie in memory, and which image belongs to which step and rank."""

import torch
from torch import Tensor


def as_images(pixels: Tensor) -> Tensor:
    """Pixels as the network takes them: uint8 in 0 … 255 to float32 in [0, 1]."""
    return pixels.to(torch.float32).div_(255)


def gather(pixels: Tensor, indices: Tensor) -> Tensor:
    """The images at some places of a data set, int64 (n,), as the network takes them; a filler gets the first image."""
    # Rows of two dimensions: index_select copies those twice as fast as advanced indexing does images.
    rows = pixels.flatten(1).index_select(0, indices.clamp(min=0))
    return as_images(rows.view(-1, *pixels.shape[1:]))
