"""Which images a run learns, and in which batches."""

from dataclasses import dataclass
from typing import Literal

from vae_dist.config.checks import require


@dataclass(frozen=True)
class DataConfig:
    """Images and batches."""

    name: Literal[
        "mnist",
        "fashion_mnist",
        "kmnist",
        "emnist",
        "cifar10",
        "celeba",
        "folder",
        "packed",
        "stream",
        "glyphs",
        "glyphs64",
        "own",
    ] = "mnist"
    """Data set. `glyphs` (grey) and `glyphs64` (colour) are embedded; `folder` is any folder of JPEG, PNG and WebP pictures,
    `packed` one that `vae-dist pack` wrote, `stream` the same in a bucket. `own` are images that a Python program hands to
    vae_dist.fit. The others are read from `root`, or downloaded to it where they are missing, but for celeba."""
    root: str = "data"
    """Folder of the data sets: torchvision's layout, or the raw files themselves (.gz or not); of `folder` and `packed`, that
    very folder; of `stream`, s3://bucket/prefix, or a folder on a slow disk."""
    image_size: int | None = None
    """Of folder and celeba: the pictures' middle squares are resized to so many pixels a side. None: 64."""
    channels: Literal[1, 3] = 3
    """Of folder and celeba: 1 for grey, 3 for colour."""
    test_share: float = 0.1
    """Of folder, where its pictures are not in folders train and test (or val): the share for testing, drawn by file name, so
    that a new file moves no other."""
    unreadable: Literal["refuse", "skip"] = "refuse"
    """Of folder and celeba: what to do where files are no whole pictures. All are found, and listed, before any step."""
    cache_gb: float = 20.0
    """Of stream from s3:// roots: disk space of a machine for fetched shards, 10^9 bytes, in the folder that LITDATA_CACHE_DIR
    names, if any."""
    batch_size: int = 128
    """Images of one optimizer step, over all processes (the global batch)."""
    binarize: Literal["none", "static", "dynamic"] = "none"
    """Black or white pixels, white with their grey value's probability: drawn once, or anew in each epoch of training."""
    flip: bool = False
    """Mirror training images left to right, half of them, drawn anew in each epoch."""
    shift: int = 0
    """Move training images by up to so many pixels along each axis, drawn anew in each epoch; their edges are repeated."""

    def __post_init__(self) -> None:
        for name in ("image_size", "channels", "test_share", "unreadable"):
            names, value = ("folder",) if name == "test_share" else ("folder", "celeba"), getattr(self, name)
            wanted = f"left out: only --data.name {' or '.join(names)} has it; the images of {self.name} are as they are"
            require(self.name in names or value == getattr(type(self), name), f"--data.{name}", value, wanted)
        wanted = "a folder; of all sets only --data.name stream is read from a bucket"
        require("://" not in self.root or self.name == "stream", "--data.root", self.root, wanted)
        require(self.image_size is None or self.image_size >= 1, "--data.image_size", self.image_size, "at least 1, or none")
        require(0 < self.test_share < 1, "--data.test_share", self.test_share, "between 0 and 1")
        require(0 < self.cache_gb < float("inf"), "--data.cache_gb", self.cache_gb, "a positive number")
        wanted = "left out: only --data.name stream has a cache of shards"
        require(self.name == "stream" or self.cache_gb == type(self).cache_gb, "--data.cache_gb", self.cache_gb, wanted)
        require(self.batch_size >= 1, "--data.batch_size", self.batch_size, "at least 1")
        require(0 <= self.shift < 1 << 15, "--data.shift", self.shift, "0 or more pixels, as many as images may have")
