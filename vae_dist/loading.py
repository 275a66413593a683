"""The images of a run, on each rank's device: downloaded where they are missing, and the same on all ranks."""

from collections.abc import Sequence
from pathlib import Path

from accelerate import Accelerator
from accelerate.utils import gather_object

from vae_dist.config import DataConfig, InputError
from vae_dist.data import sources
from vae_dist.data.images import Images
from vae_dist.distributed import on_first_rank, require_same, together
from vae_dist.noise import Stream, derive_key


def load_images(config: DataConfig, accelerator: Accelerator, train: bool, shape: Sequence[int] | None = None) -> Images:
    """The training or the test images; what must be fetched or decoded first is, by one process of each machine.

    Raises the same InputError on all ranks where a rank cannot have them, and as `on_device` does.
    """
    home = _fetched(config, accelerator)
    images = together(accelerator, lambda: sources.load(config, train, home))
    return on_device(images, f"--data.root {config.root}", config, accelerator, train, shape)


def on_device(
    images: Images, source: str, config: DataConfig, accelerator: Accelerator, train: bool, shape: Sequence[int] | None = None
) -> Images:
    """The training or the test images as this rank takes them.

    Binarised they are one data set, whatever the seed: training images by `static`, test images always, so that figures of
    different epochs and runs compare. `dynamic` training images stay grey until a step draws them.
    Raises the same InputError on all ranks, naming `source`, where a rank has others than the rest, or they are not of the
    shape that is asked for.
    """
    together(accelerator, lambda: _require_shape(images, source, shape))
    name = f"the SHA-256 of the {'training' if train else 'test'} images in {source.split()[0]}"
    require_same(accelerator, lambda: {name: images.digest()[:16]})
    if config.binarize == "static" or (config.binarize == "dynamic" and not train):
        images = images.binarized(derive_key(0, Stream.BINARY_TRAIN if train else Stream.BINARY_TEST))
    return images.to(accelerator.device)


def _require_shape(images: Images, source: str, shape: Sequence[int] | None) -> None:
    if shape is not None and images.shape != tuple(shape):
        sides = ("x".join(map(str, size)) for size in (images.shape, shape))
        raise InputError(f"{source}: images of {' pixels, where '.join(sides)} are expected")


def _fetched(config: DataConfig, accelerator: Accelerator) -> Path | None:
    """Where this machine has its decoded pictures, on all of its ranks, of which only the first looks at the pictures.

    Rank zero goes first, alone: machines may share a disk.
    """
    of_first = on_first_rank(accelerator, lambda: sources.fetch_missing(config))
    goes_second = accelerator.is_local_main_process and not accelerator.is_main_process
    mine = together(accelerator, lambda: sources.fetch_missing(config) if goes_second else of_first)
    of_ranks: list[Path | None] = gather_object([mine])
    first_here: int = accelerator.process_index - accelerator.local_process_index
    return of_ranks[first_here]
