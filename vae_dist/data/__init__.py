"""Where images come from, how they lie in memory, and which image belongs to which step and rank."""

import torch
from torch import Tensor


def as_images(pixels: Tensor) -> Tensor:
    """Pixels as the network takes them: uint8 in 0 … 255 to float32 in [0, 1]."""
    return pixels.to(torch.float32).div_(255)
