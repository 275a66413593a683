"""Folders of pictures: which files belong to which side, in an order that is the same wherever the folder lies."""

import hashlib
import json
import os
from collections.abc import Iterable
from pathlib import Path
from typing import NamedTuple

from vae_dist.config import DataConfig, InputError
from vae_dist.data.photos import SUFFIXES, Decoding

VERSION = 2  # raised by whoever changes order or decoding: nothing decoded before is then taken for it
IMAGE_SIZE = 64  # where `--data.image_size` does not say
_TEST_FOLDERS = ("test", "val", "valid")  # the first that there is
_CELEBA_LIST, _CELEBA_PICTURES = "list_eval_partition.txt", "img_align_celeba"
_CELEBA_CROP = 140  # of 178 x 218: the face, as Tolstikhin et al. 2018 cut it
_CELEBA_TRAIN, _CELEBA_TEST = "0", "2"  # 1 are for validation


class Picture(NamedTuple):
    """A file, and what shows that it changed."""

    path: str  # from the root
    size: int  # bytes; -1 where there is no such file
    mtime: int  # nanoseconds


class Plan(NamedTuple):
    """What is to be decoded, and how."""

    root: Path
    train: list[Picture]
    test: list[Picture]
    decoding: Decoding
    split: str  # how the two were told apart, for a reader

    def fingerprint(self) -> str:
        """A SHA-256, in hex, of all that the decoded images depend on, but for where the folder lies."""
        return fingerprint(self.decoding, [*self.train, Picture("", 0, 0), *self.test])


def fingerprint(decoding: Decoding, pictures: Iterable[Picture]) -> str:
    """A SHA-256, in hex, of some files in their order, and of how they are decoded."""
    digest = hashlib.sha256(json.dumps([VERSION, decoding]).encode())
    for path, size, mtime in pictures:
        digest.update(os.fsencode(f"{path}\0{size}\0{mtime}\n"))
    return digest.hexdigest()


def plan(config: DataConfig) -> Plan:
    """Looks through the folder of `folder` or `celeba`. Raises InputError where it is missing, or a side has no picture."""
    size = config.image_size or IMAGE_SIZE
    if config.name == "celeba":
        return _celeba(Path(config.root), Decoding(size, config.channels, _CELEBA_CROP))
    return _folder(Path(config.root), Decoding(size, config.channels), config.test_share)


def _folder(root: Path, decoding: Decoding, test_share: float) -> Plan:
    if not root.is_dir():
        raise InputError(f"{root}: no such folder; name the one that holds the pictures")
    found = _pictures(root)
    if not found:
        raise InputError(f"{root}: no picture in it or below: no file ends in {', '.join(SUFFIXES)}")
    below = {folder: [p for p in found if p.path.startswith(f"{folder}/")] for folder in ("train", *_TEST_FOLDERS)}
    test_folder = next((folder for folder in _TEST_FOLDERS if below[folder]), None)
    if below["train"] and test_folder:
        return Plan(root, below["train"], below[test_folder], decoding, f"its folders train and {test_folder}")
    train = [picture for picture in found if _rank(picture) >= test_share]
    test = [picture for picture in found if _rank(picture) < test_share]
    for side, pictures in (("training", train), ("test", test)):
        if not pictures:
            raise InputError(
                f"{root}: a test_share of {test_share:g} leaves no {side} image of the {len(found)}; "
                "give another share, or sort them into folders train and test"
            )
    return Plan(root, train, test, decoding, f"a share of {test_share:g} for testing, drawn by file name")


def _pictures(root: Path) -> list[Picture]:
    """All pictures below a folder, in the order of their paths' hashes.

    So whatever neighbours on the disk have in common, a shard is a fair sample of all, and so are the first few images.
    Hidden files are left out: some systems lay one beside every picture.
    """
    found, seen = [], set[str]()
    for folder, below, names in os.walk(root, onerror=_told, followlinks=True):
        if (real := os.path.realpath(folder)) in seen:  # links may run in a circle
            below.clear()
            continue
        seen.add(real)
        below[:] = sorted(name for name in below if not name.startswith("."))
        shown = [name for name in names if name.lower().endswith(SUFFIXES) and not name.startswith(".")]
        found += [_stat(root, os.path.relpath(os.path.join(folder, name), root)) for name in shown]
    return sorted(found, key=lambda picture: _hash(picture.path))


def _told(error: OSError) -> None:
    raise error


def _stat(root: Path, path: str) -> Picture:
    try:
        stat = os.stat(os.path.join(root, path))
    except OSError:
        return Picture(path, -1, 0)  # decoding it tells why
    return Picture(path, stat.st_size, stat.st_mtime_ns)


def _hash(path: str) -> bytes:
    return hashlib.sha256(os.fsencode(path)).digest()


def _rank(picture: Picture) -> float:
    """Where in [0, 1) a file's path falls: other files have no part in it."""
    return int.from_bytes(_hash(picture.path)[:6], "big") / 2**48


def _celeba(root: Path, decoding: Decoding) -> Plan:
    """CelebA as torchvision lays it under the root, or in the root itself: its training and its test images."""
    home = next((folder for folder in (root / "celeba", root) if (folder / _CELEBA_LIST).is_file()), root / "celeba")
    for missing in (home / _CELEBA_LIST, home / _CELEBA_PICTURES):
        if not missing.exists():
            raise InputError(
                f"--data.name celeba: {missing} is missing, and cannot be downloaded by a program. Fetch {_CELEBA_LIST} and "
                f"{_CELEBA_PICTURES}.zip from https://mmlab.ie.cuhk.edu.hk/projects/CelebA.html and unpack them into {home}, "
                "or name the folder that has them with --data.root DIR, or train on the embedded set with --data.name glyphs64"
            )
    sides: dict[str, list[Picture]] = {}
    for number, line in enumerate((home / _CELEBA_LIST).read_text().splitlines(), 1):
        match line.split():
            case [name, ("0" | "1" | "2") as side] if "/" not in name:
                sides.setdefault(side, []).append(_stat(home, f"{_CELEBA_PICTURES}/{name}"))
            case []:
                pass
            case _:
                raise InputError(f"{home / _CELEBA_LIST}, line {number}: not a file name and 0, 1 or 2; fetch the file again")
    if not sides.get(_CELEBA_TRAIN) or not sides.get(_CELEBA_TEST):
        raise InputError(f"{home / _CELEBA_LIST}: lists no training or no test images; fetch the file again")
    split = "the published partition, without its validation images"
    return Plan(home, sides[_CELEBA_TRAIN], sides[_CELEBA_TEST], decoding, split)
