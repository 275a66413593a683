"""Packed images: shards of raw pixels that are mapped into memory, and that LitData streams from afar as they are.

A shard is a chunk of LitData whose items have one leaf of bytes: uint32 n; n + 1 uint32 offsets of the items from the file's
start; then each item, its length as uint32 before its pixels (little-endian all). So images lie at even distances. `index.json`
is LitData's too, with a SHA-256 for each shard and a section of this package.
"""

import hashlib
import json
import math
import mmap
import os
import re
import resource
import struct
from abc import abstractmethod
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple, TypeAlias

import numpy as np
import torch
from torch import Tensor
from tqdm import tqdm

from vae_dist.checkpoint import write_atomically
from vae_dist.config import InputError
from vae_dist.data.images import HostImages
from vae_dist.progress import no_bar

Mapped: TypeAlias = "np.ndarray[Any, Any]"  # images, (n,) of void
Numbers: TypeAlias = "np.ndarray[tuple[int], np.dtype[np.int64]]"

FORMAT = 1
INDEX = "index.json"
SHARD_BYTES = 32 << 20
_SECTION = "vae_dist"
_REMEDY = "copy it again, or pack the pictures anew with vae-dist pack"
_SPARE_FILES = 256  # that may be opened later on
_NAME = re.compile(r"[\w.-]+\.bin")  # of a shard; none leads out of the folder
_SHA256 = re.compile(r"[0-9a-f]{64}")  # it becomes a file's name where shards are kept


class Shard(NamedTuple):
    """A file of an index."""

    filename: str
    images: int
    bytes: int
    sha256: str


class Index(NamedTuple):
    """What a folder of shards holds."""

    shape: tuple[int, int, int]
    shards: list[Shard]
    source: dict[str, Any]  # where the images come from; plain JSON

    @property
    def images(self) -> int:
        return sum(shard.images for shard in self.shards)


def images_per_shard(image_bytes: int) -> int:
    return max(1, SHARD_BYTES // (image_bytes + 8))


def shard_bytes(images: int, image_bytes: int) -> int:
    """Bytes of a shard."""
    return _first_item(images) + images * (4 + image_bytes)


def _first_item(images: int) -> int:
    """Where the first item of a shard begins."""
    return 4 + 4 * (images + 1)


def shard_content(images: Sequence[bytes]) -> bytes:
    """The file of some images of one size."""
    n, length = len(images), len(images[0])
    offsets = range(_first_item(n), shard_bytes(n, length) + 1, 4 + length)
    word = struct.pack("<I", length)
    return b"".join([struct.pack(f"<{n + 2}I", n, *offsets), *(part for image in images for part in (word, image))])


def write_index(folder: Path, index: Index) -> None:
    """Writes `index.json`, which makes the shards beside it a whole set."""
    chunks = [
        {
            "chunk_bytes": shard.bytes,
            "chunk_size": shard.images,
            "dim": None,
            "filename": shard.filename,
            "sha256": shard.sha256,
        }
        for shard in index.shards
    ]
    leaf = json.dumps([1, {"type": None, "context": None, "children_spec": []}])
    config: dict[str, Any] = {"data_format": ["bytes"], "data_spec": leaf, "item_loader": "PyTreeLoader", "types": "bytes"}
    config |= {"chunk_bytes": SHARD_BYTES, "chunk_size": None, "compression": None, "compression_batch_size": None}
    config |= {"compression_level": None, "ipc_compression": None, "encryption": None}
    ours = {"format": FORMAT, "shape": index.shape, "images": index.images, "source": index.source}
    # By `updated_at` LitData knows a changed set.
    content = {"chunks": chunks, "config": config, "updated_at": _digest(index), _SECTION: ours}
    write_atomically(folder / INDEX, json.dumps(content, indent=1) + "\n")


def read_index(folder: Path) -> Index:
    """The index of a folder. Raises InputError where it is missing, damaged, or not of this package."""
    file = folder / INDEX
    try:
        content = json.loads(file.read_bytes())
        ours = content[_SECTION]
        if ours["format"] != FORMAT:
            raise InputError(f"{file}: format {ours['format']}, this version reads {FORMAT}; {_REMEDY}")
        channels, height, width = (int(side) for side in ours["shape"])
        shards = [
            Shard(str(chunk["filename"]), int(chunk["chunk_size"]), int(chunk["chunk_bytes"]), str(chunk["sha256"]))
            for chunk in content["chunks"]
        ]
        index, images = Index((channels, height, width), shards, dict(ours["source"])), ours["images"]
        is_sound = content["updated_at"] == _digest(index) and _is_sound(index, images)
    except OSError as error:
        raise InputError(f"{file}: {error.strerror}; name a folder that vae-dist pack wrote to its end") from None
    except InputError:
        raise
    except (ValueError, KeyError, TypeError, AttributeError, OverflowError, RecursionError):
        raise InputError(f"{file}: not an index that vae-dist pack wrote; {_REMEDY}") from None
    if not is_sound:
        raise InputError(f"{file}: damaged: its figures contradict each other; {_REMEDY}")
    return index


def _is_sound(index: Index, images: object) -> bool:
    size = math.prod(index.shape)
    sizes = (shard.images > 0 and shard.bytes == shard_bytes(shard.images, size) < 1 << 32 for shard in index.shards)
    names = (_NAME.fullmatch(shard.filename) and _SHA256.fullmatch(shard.sha256) for shard in index.shards)
    return min(index.shape) > 0 and 0 < index.images == images and all(sizes) and all(names)


def _digest(index: Index) -> str:
    """A SHA-256, in hex, of all images: that of their shards' checksums and their shape."""
    parts = [f"{side}" for side in index.shape] + [shard.sha256 for shard in index.shards]
    return hashlib.sha256(" ".join(parts).encode()).hexdigest()


def verify(folder: Path, index: Index) -> None:
    """Reads all shards. Raises InputError, naming the first that is not what was written."""
    for shard in tqdm(index.shards, desc=f"verifying {folder}", unit="file", leave=False, disable=no_bar()):
        require_size(folder, shard)
        if sha256_of(folder / shard.filename) != shard.sha256:
            raise InputError(f"{folder / shard.filename}: damaged: its SHA-256 is not the one in {INDEX}; {_REMEDY}")


def sha256_of(file: Path) -> str:
    digest = hashlib.sha256()
    with file.open("rb") as stream:
        while block := stream.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()


def require_size(folder: Path, shard: Shard) -> None:
    file = folder / shard.filename
    try:
        size = file.stat().st_size
    except OSError as error:
        raise InputError(f"{file}: {error.strerror}; {_REMEDY}") from None
    if size != shard.bytes:
        state = "truncated" if size < shard.bytes else "of another pack"
        raise InputError(f"{file}: {state}: it has {size} bytes, {INDEX} promises {shard.bytes}; {_REMEDY}")


class Sharded(HostImages):
    """Images of an index, wherever its shards are."""

    def __init__(self, index: Index) -> None:
        self._index = index
        self.shape, self._image_bytes = index.shape, math.prod(index.shape)
        self._ends = np.cumsum([shard.images for shard in index.shards])

    @abstractmethod
    def shard(self, number: int) -> Mapped:
        """The images of a shard."""

    def _ask_for(self, numbers: Numbers, shards: Numbers) -> None:
        """Says which images are about to be copied, of which shards."""

    def __len__(self) -> int:
        return int(self._ends[-1])

    def digest(self) -> str:
        return _digest(self._index)

    def fetch(self, indices: Tensor) -> Tensor:
        numbers = indices.numpy()
        shards = np.searchsorted(self._ends, numbers, side="right")
        self._ask_for(numbers, shards)
        order = np.argsort(shards, kind="stable")
        found = np.empty((len(numbers), self._image_bytes), np.uint8)
        rows = found.view(f"V{self._image_bytes}")[:, 0]  # whole images as single values: numpy copies those fastest
        of_shard, begins = np.unique(shards[order], return_index=True)
        for shard, where in zip(of_shard.tolist(), np.split(order, begins[1:]), strict=True):
            rows[where] = self.shard(shard)[numbers[where] - self._ends[shard]]  # counted from the shard's end
        return torch.from_numpy(found).view(-1, *self.shape)


class Packed(Sharded):
    """A folder of shards, mapped: its images take no memory but what the system lends to files, shared by all processes."""

    def __init__(self, folder: Path) -> None:
        """Raises InputError where index or shards are missing, or have not the sizes that were written."""
        super().__init__(read_index(folder))
        for shard in self._index.shards:
            require_size(folder, shard)
        _allow_open_files(len(self._index.shards))
        self._shards = [mapped(folder / shard.filename, shard.images, self._image_bytes) for shard in self._index.shards]
        self._files: list[mmap.mmap] = [shard.base for shard in self._shards]  # type: ignore[misc]  # what each array maps
        for file in self._files:
            file.madvise(mmap.MADV_RANDOM)  # no readahead: an image's neighbours are not wanted next
        self._file_bytes = np.array([shard.bytes for shard in self._index.shards])

    def shard(self, number: int) -> Mapped:
        return self._shards[number]

    def _ask_for(self, numbers: Numbers, shards: Numbers) -> None:
        """Has the system read these images at once, where they are on the disk; copying them meets one page after the other.

        Of a set 2.5 times the memory this fetched 31,000 images of 12 KiB a second; 3,000 without, 250 with readahead.
        """
        ends = self._file_bytes[shards] + (numbers + 1 - self._ends[shards]) * (4 + self._image_bytes)
        pages = ends - self._image_bytes & -mmap.PAGESIZE
        for shard, page, length in zip(shards.tolist(), pages.tolist(), (ends - pages).tolist(), strict=True):
            self._files[shard].madvise(mmap.MADV_WILLNEED, page, length)


def mapped(file: Path, images: int, image_bytes: int) -> Mapped:
    """The images of a shard, each at its place in the file."""
    with file.open("rb") as stream:
        try:
            content = mmap.mmap(stream.fileno(), 0, access=mmap.ACCESS_READ)
        except OSError as error:  # it names no file: too many are open, or mapped
            raise OSError(error.errno, error.strerror, str(file)) from None
    return np.ndarray((images,), f"V{image_bytes}", content, offset=_first_item(images) + 4, strides=(4 + image_bytes,))


def _allow_open_files(shards: int) -> None:
    """Each mapped file stays open, and so do those of other sets. Raises InputError where there may not be so many."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    needed = len(os.listdir("/proc/self/fd")) + shards + _SPARE_FILES
    if soft != resource.RLIM_INFINITY and soft < needed:
        if hard != resource.RLIM_INFINITY and hard < needed:
            raise InputError(f"{shards} shards are more files than may be open at once; raise `ulimit -Hn` to {needed}")
        resource.setrlimit(resource.RLIMIT_NOFILE, (needed, hard))
