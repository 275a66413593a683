"""Images that a program of one's own hands over: tensors, or the items of a Dataset."""

from typing import Any, Protocol, TypeAlias

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torch.utils.data import IterableDataset

from vae_dist.config import InputError
from vae_dist.data.images import Images, Resident

_MODES = ("L", "RGB", "RGBA")  # of Pillow's images: the pixels' values are what is seen
_MOST_CHANNELS = 4  # of a PNG file


class Dataset(Protocol):
    """A map-style data set, as torch and torchvision have them: its items are images, or tuples that begin with one."""

    def __len__(self) -> int: ...

    def __getitem__(self, index: int) -> Any: ...


OwnImages: TypeAlias = Tensor | Images | Dataset


def own_images(given: OwnImages, name: str) -> Images:
    """Images as training takes them; `name` is what errors call them.

    A tensor is (n, channels, height, width), or (n, height, width) of grey ones: uint8, or floats in [0, 1], which are rounded
    to 256 grey levels, as the picture files are that they mostly come from. A Dataset is read once, by each process, into
    memory; its items are such tensors of one image, Pillow's images, or tuples of one of these and a label. Images stay as
    they are.
    Raises InputError where they are something else.
    """
    if isinstance(given, Images):
        return given
    if isinstance(given, np.ndarray):
        raise InputError(f"{name}: must be a tensor, not an array; give torch.from_numpy of it")
    if isinstance(given, Tensor):
        return _resident(_pixels(given, name, dimensions=4), name)
    has_items = hasattr(given, "__len__") and hasattr(given, "__getitem__") and not isinstance(given, IterableDataset)
    if not has_items or len(given) == 0:
        raise InputError(f"{name}: must be a tensor of images, or a data set with a length, not {type(given).__name__}")
    items = [_item(given[i], f"{name}[{i}]") for i in range(len(given))]
    shapes = {tuple(pixels.shape) for pixels, _ in items}
    if len(shapes) > 1:
        raise InputError(f"{name}: images of one shape are needed, but there are {sorted(shapes)}")
    labels = [label for _, label in items]
    is_class = [isinstance(label, int) and abs(label) < 2**63 for label in labels]
    known = torch.tensor(labels) if all(is_class) else None
    return _resident(torch.stack([pixels for pixels, _ in items]), name, known)


def is_black_and_white(images: Images) -> bool:
    """Whether every pixel of every image is black or white."""
    return all(bool(((block == 0) | (block == 255)).all()) for block in images.blocks())


def _resident(pixels: Tensor, name: str, labels: Tensor | None = None) -> Resident:
    """Raises InputError for what would train, but hardly be what is meant."""
    if pixels.shape[1] > _MOST_CHANNELS:
        raise InputError(
            f"{name}: images of {pixels.shape[1]} channels cannot be drawn, up to {_MOST_CHANNELS} can; channels come first, "
            "are these (height, width, channels)?"
        )
    if pixels.max() == 1:
        raise InputError(f"{name}: no pixel is brighter than 1 of 255; give black and white ones as floats, or times 255")
    return Resident(pixels, labels)


def _item(item: Any, name: str) -> tuple[Tensor, Any]:
    image, *rest = item if isinstance(item, (tuple, list)) and item else (item,)
    if isinstance(image, Image.Image) and image.mode not in _MODES:
        raise InputError(f"{name}: is a picture of mode {image.mode}; .convert('L') makes it grey, .convert('RGB') colour")
    if not isinstance(image, Tensor):
        array = np.array(image)  # of Pillow's images (height, width) or (height, width, channels)
        if array.dtype != np.uint8 or array.ndim not in (2, 3):
            raise InputError(f"{name}: must be an image or a tensor, not {type(image).__name__}")
        image = torch.from_numpy(array if array.ndim == 2 else array.transpose(2, 0, 1).copy())
    label = rest[0] if rest else None
    if isinstance(label, np.generic) or (isinstance(label, Tensor) and label.numel() == 1):
        label = label.item()
    return _pixels(image, name, dimensions=3), label


def _pixels(images: Tensor, name: str, dimensions: int) -> Tensor:
    """uint8 with channels, whatever it was."""
    if images.ndim == dimensions - 1:
        images = images.unsqueeze(-3)
    if images.ndim != dimensions or 0 in images.shape:
        raise InputError(f"{name}: must be (n, channels, height, width) or (n, height, width), but is {tuple(images.shape)}")
    if images.dtype == torch.uint8:
        return images.contiguous()
    if not images.is_floating_point():
        raise InputError(f"{name}: must be uint8, or floats in [0, 1], not {images.dtype}")
    levels = images.mul(255).round()
    if not (levels.min() >= 0 and levels.max() <= 255):  # a rounding error beyond them is none
        low, high = images.min().item(), images.max().item()
        raise InputError(f"{name}: floats must be in [0, 1], but are from {low:g} to {high:g}. Leave out what normalises them")
    return levels.to(torch.uint8).contiguous()
