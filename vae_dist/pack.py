"""Pictures decoded once, into files that trainings map into memory, or stream.

python -m vae_dist.pack photos/ packed/ --size 64
"""

import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Literal

import tyro

from vae_dist.config import DataConfig, InputError
from vae_dist.data import folder, packed, packing
from vae_dist.data.packing import SIDES, Packing
from vae_dist.distributed import run_entry_point
from vae_dist.options import command_line


@dataclass(frozen=True)
class Options:
    """Decode a folder of pictures into packed images. Started again, it goes on where it was."""

    pictures: Annotated[Path | None, tyro.conf.Positional, tyro.conf.arg(metavar="PICTURES")] = None
    """Folder of JPEG, PNG and WebP files, nested or not; with folders train and test (or val), those are the two sides."""
    out: Annotated[Path | None, tyro.conf.Positional, tyro.conf.arg(metavar="OUT")] = None
    """Folder of the packed images: new, empty, or of this very job."""
    size: int = folder.IMAGE_SIZE
    """Side of the square images, pixels."""
    channels: Literal[1, 3] = 3
    """1 for grey, 3 for colour."""
    test_share: float = DataConfig.test_share
    """Share of the test images, drawn by file name, where there are no folders train and test."""
    unreadable: Literal["refuse", "skip"] = "refuse"
    """What to do where files are no whole pictures. All are tried, and listed, in any case."""
    workers: int | None = None
    """Threads that decode. None: one for each core."""
    data: Literal["folder", "celeba"] = "folder"
    """celeba: the folder holds CelebA as torchvision lays it."""
    verify: Path | None = None
    """Only read a finished pack, and compare each of its files with its SHA-256; no pictures are needed."""

    def __post_init__(self) -> None:
        given = [self.pictures is not None, self.out is not None]
        if any(given) if self.verify else not all(given):
            raise InputError("name the folder of the pictures and the folder to write, or --verify and a finished pack")
        if self.size < 1:
            raise InputError(f"--size {self.size}: must be at least 1")
        if not 0 < self.test_share < 1:
            raise InputError(f"--test_share {self.test_share}: must be between 0 and 1")
        if self.data == "celeba" and self.test_share != DataConfig.test_share:
            raise InputError(f"--test_share {self.test_share}: must be left out: CelebA has test images as it is published")
        if self.workers is not None and self.workers < 1:
            raise InputError(f"--workers {self.workers}: must be at least 1, or none")


def main(args: list[str] | None = None) -> int:
    options = command_line(Options, "vae_dist.pack", sys.argv[1:] if args is None else args)
    if options.pictures is not None and options.out is not None:
        way_out = "; make room, or name another folder; the same command goes on where it was"
        plan = folder.plan(data_config(options, options.pictures))
        done = packing.write(plan, options.out, options.unreadable, options.workers, way_out)
        print(summary(options.out, done))
    elif options.verify is not None:
        indexes = [packed.read_index(options.verify / side) for side in SIDES]
        for side, index in zip(SIDES, indexes, strict=True):
            packed.verify(options.verify / side, index)
        print(f"{options.verify}: whole: all {sum(len(index.shards) for index in indexes)} files are what was written")
    return 0


def data_config(options: Options, pictures: Path) -> DataConfig:
    """The data set of a training on the same images."""
    return DataConfig(
        name=options.data,
        root=str(pictures),
        image_size=options.size,
        channels=options.channels,
        test_share=options.test_share,
        unreadable=options.unreadable,
    )


def summary(out: Path, done: Packing) -> str:
    """What the pack holds, and how to train from it."""
    train, test = (done.sides[side] for side in SIDES)
    size = sum(shard.bytes for index in (train, test) for shard in index.shards)
    speed = f"decoded {done.decoded:,} files in {done.seconds:.1f} s, {done.decoded / done.seconds:,.0f} images/s"
    shape = "x".join(map(str, train.shape))
    lines = [
        f"{out}: {train.images:,} training and {test.images:,} test images of {shape}, {size:,} bytes",
        f"  {speed if done.decoded else 'it was there already'}",
        f"  train from it: --data.name packed --data.root {out}",
    ]
    if done.unreadable:
        lines.insert(1, f"  {len(done.unreadable):,} unreadable files were skipped; the index.json files name them")
    return "\n".join(lines)


if __name__ == "__main__":
    run_entry_point(main)
