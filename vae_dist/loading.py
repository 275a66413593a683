"""The images of a run, on each rank's device: downloaded where they are missing, and the same on all ranks."""

from collections.abc import Sequence

from accelerate import Accelerator

from vae_dist.config import DataConfig, InputError
from vae_dist.data import sources
from vae_dist.data.images import Images
from vae_dist.distributed import on_first_rank, require_same, together
from vae_dist.noise import Stream, derive_key


def load_images(config: DataConfig, accelerator: Accelerator, train: bool, shape: Sequence[int] | None = None) -> Images:
    """The training or the test images; what must be fetched or decoded first is, by one process of each machine.

    Binarised they are one data set, whatever the seed: training images by `static`, test images always, so that figures of
    different epochs and runs compare. `dynamic` training images stay grey until a step draws them.
    Raises the same InputError on all ranks where a rank cannot have them or has others than the rest, or they are not of the
    shape that is asked for.
    """
    on_first_rank(accelerator, lambda: sources.fetch_missing(config))
    together(accelerator, lambda: sources.fetch_missing(config) if accelerator.is_local_main_process else None)
    images = together(accelerator, lambda: sources.load(config, train))
    if shape is not None and images.shape != tuple(shape):
        sides = ("x".join(map(str, size)) for size in (images.shape, shape))
        raise InputError(f"--data.root {config.root}: images of {' pixels, where '.join(sides)} are expected")
    name = f"the SHA-256 of the {'training' if train else 'test'} images in --data.root"
    require_same(accelerator, lambda: {name: images.digest()[:16]})
    if config.binarize == "static" or (config.binarize == "dynamic" and not train):
        images = images.binarized(derive_key(0, Stream.BINARY_TRAIN if train else Stream.BINARY_TEST))
    return images.to(accelerator.device)
