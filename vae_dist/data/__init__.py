"""Where images come from, how they lie in memory, and which image belongs to which step and rank."""

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from vae_dist.noise import hashed_words, uniform16

_BLOCK = 256  # images drawn at once


def as_images(pixels: Tensor) -> Tensor:
    """Pixels as the network takes them: uint8 in 0 … 255 to float32 in [0, 1]."""
    return pixels.to(torch.float32).div_(255)


def binary(rows: Tensor, indices: Tensor, key: int | Tensor) -> Tensor:
    """Which pixels are white, bool (n, pixels): each with the probability of its grey value, uint8 (n, pixels) in 0 … 255.

    In integers: black never is and white always, and all devices draw the same. `indices`, int64 (n,), name the images. A key
    may lie on the device, where it can change without a new kernel or graph.
    """
    return uniform16(key, indices, rows.shape[1]).mul_(255) < rows.to(torch.int32).mul_(1 << 16)


def white(pixels: Tensor, indices: Tensor, key: int | Tensor) -> Tensor:
    """Images, uint8 (n, *image_shape), made black and white by `binary`: 0 or 255."""
    return binary(pixels.flatten(1), indices, key).to(torch.uint8).mul_(255).view_as(pixels)


def binarized(pixels: Tensor, key: int) -> Tensor:
    """A whole data set, uint8 (n, *image_shape), made black and white once."""
    blocks = zip(torch.split(pixels, _BLOCK), torch.split(torch.arange(len(pixels)), _BLOCK), strict=True)
    return torch.cat([white(block, indices, key) for block, indices in blocks])


def augmented(pixels: Tensor, indices: Tensor, key: Tensor, flip: bool, shift: int) -> Tensor:
    """Images, uint8 (n, channels, height, width), mirrored left to right or not, and moved by up to `shift` pixels each way.

    Edges are repeated. What happens to an image follows from its number, int64 (n,), and the key, as `signed` has it, int64 ().
    """
    height, width = pixels.shape[2:]
    word = hashed_words(key, indices, 1)  # (n, 1): of its bits some for each purpose
    y, x = (((word >> first & 0xFFFF) * (2 * shift + 1) >> 16) - shift for first in (0, 16))
    rows = (torch.arange(height, device=pixels.device) + y).clamp_(0, height - 1)
    columns = (torch.arange(width, device=pixels.device) + x).clamp_(0, width - 1)
    if flip:
        columns = torch.where((word >> 32 & 1).bool(), width - 1 - columns, columns)
    places = (rows.unsqueeze(2) * width + columns.unsqueeze(1)).view(-1, 1, height * width)
    return pixels.flatten(2).gather(2, places.expand(-1, pixels.shape[1], -1)).view_as(pixels)


def rows_at_once(shape: Sequence[int], most: int) -> int:
    """Images of one forward pass outside training, `most` of small ones and fewer of large ones, to bound its memory.

    It must never depend on the number of ranks: the last bits of an image's figure may depend on it.
    """
    return max(1, min(most, most * 4096 // math.prod(shape)))
