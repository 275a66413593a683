"""The data sets by name: found under a folder, downloaded where they are missing, and read."""

import socket
import threading
import urllib.error
import urllib.request
from pathlib import Path
from typing import Any, NamedTuple

import torch

from vae_dist.config import DataConfig, InputError
from vae_dist.data import cache, colour_glyphs, glyphs
from vae_dist.data.folder import IMAGE_SIZE
from vae_dist.data.idx import read_idx
from vae_dist.data.images import Images, Resident
from vae_dist.data.packed import Packed
from vae_dist.data.stream import Streamed

_STALL_SECONDS = 60.0  # without a byte from a server that answered
_PROBE_SECONDS = 6.0  # for a first answer of the servers; a missing network must not cost more


class _IdxSet(NamedTuple):
    """A data set of IDX files, as torchvision names and lays them."""

    torchvision: str  # its class, and its folder under the root
    train: str  # what the file names begin with
    test: str
    transposed: bool = False  # EMNIST stores columns before rows


_IDX_SETS = {
    "mnist": _IdxSet("MNIST", "train", "t10k"),
    "fashion_mnist": _IdxSet("FashionMNIST", "train", "t10k"),
    "kmnist": _IdxSet("KMNIST", "train", "t10k"),
    "emnist": _IdxSet("EMNIST", "emnist-digits-train", "emnist-digits-test", transposed=True),
}
_EMBEDDED = {"glyphs": glyphs, "glyphs64": colour_glyphs}
_READ_AS_THEY_ARE = (*_EMBEDDED, "packed", "stream", "own")  # nothing is fetched first
_CIFAR_FOLDER = "cifar-10-batches-py"
_SHAPES = dict.fromkeys((*_IDX_SETS, "glyphs"), (1, 28, 28)) | {"cifar10": (3, 32, 32), "glyphs64": (3, 64, 64)}


def load(config: DataConfig, train: bool, home: Path | None = None) -> Images:
    """The training or the test images. Raises InputError where they are missing, damaged or empty.

    `home` is what `fetch_missing` returned on this machine.
    """
    if config.name in _EMBEDDED:
        drawn = _EMBEDDED[config.name]
        start, n = (0, drawn.TRAIN_IMAGES) if train else (drawn.TRAIN_IMAGES, drawn.TEST_IMAGES)
        return Resident(*drawn.draw(start, start + n))
    if config.name in ("folder", "celeba", "packed"):
        return Packed((home or Path(config.root)) / ("train" if train else "test"))
    if config.name == "stream":
        return Streamed(config, "train" if train else "test")
    if config.name == "own":
        raise InputError(
            "--data.name own: these images are a program's own, and not in any file that this command knows; in Python "
            "vae_dist.fit(config, train, test) takes them, and vae_dist.measure(model, images)"
        )
    if config.name == "cifar10":
        return _load_cifar10(Path(config.root), train)
    return _load_idx(_IDX_SETS[config.name], Path(config.root), train)


def is_embedded(config: DataConfig) -> bool:
    """Whether the images are drawn by this package, from no file."""
    return config.name in _EMBEDDED


def known_shape(config: DataConfig) -> tuple[int, int, int] | None:
    """The shape of an image, without reading any; None where it cannot be told."""
    if config.name in ("folder", "celeba"):
        side = config.image_size or IMAGE_SIZE
        return config.channels, side, side
    if config.name in _SHAPES:
        return _SHAPES[config.name]
    try:
        channels, height, width = load(config, train=True).shape
    except InputError:
        return None
    return channels, height, width


def to_be_fetched(config: DataConfig) -> str:
    """What `fetch_missing` has to do, in words; empty where all is there. Raises InputError where it could not."""
    root = Path(config.root)
    if config.name in ("folder", "celeba"):
        return cache.to_be_decoded(config)
    if config.name in _READ_AS_THEY_ARE or not (missing := _missing(config.name, root)):
        return ""
    if not _any_answers(_mirrors(config.name)):
        raise InputError(_way_out(config, missing, "no server answers; is there a network?"))
    return f"{missing} is missing in {root}, and will first be downloaded"


def fetch_missing(config: DataConfig) -> Path | None:
    """Downloads the data set with torchvision where it is not under the root, or decodes it where it is a folder of pictures.

    Run by one process of each machine. Returns where decoded pictures are, and None of other sets. Raises InputError, within 15
    seconds where there is no network, with the ways out.
    """
    if config.name in ("folder", "celeba"):
        return cache.prepare(config)
    root = Path(config.root)
    if config.name in _READ_AS_THEY_ARE or not (missing := _missing(config.name, root)):
        return None
    try:
        if not _any_answers(_mirrors(config.name)):
            raise ConnectionError("no server answers; is there a network?")
        root.mkdir(parents=True, exist_ok=True)
        socket.setdefaulttimeout(_STALL_SECONDS)  # torchvision sets none
        options = {"split": "digits"} if config.name == "emnist" else {"train": True}
        _torchvision(config.name)(str(root), download=True, **options)
    except (OSError, RuntimeError) as error:
        raise InputError(_way_out(config, missing, str(error))) from None
    return None


def _torchvision(name: str) -> Any:
    """Its class of a data set."""
    from torchvision import datasets  # costs seconds: only where it is needed

    return getattr(datasets, _IDX_SETS[name].torchvision if name in _IDX_SETS else "CIFAR10")


def _mirrors(name: str) -> list[str]:
    kind = _torchvision(name)
    return list(getattr(kind, "mirrors", None) or [kind.url])


def _way_out(config: DataConfig, missing: str, why: str) -> str:
    return (
        f"--data.name {config.name}: {missing} is missing, and downloading it failed ({why}). "
        f"Put the files into {_home(config.name, Path(config.root))}, or name the folder that has them with --data.root DIR, "
        "or train on the embedded set with --data.name glyphs"
    )


def _home(name: str, root: Path) -> Path:
    """Where torchvision lays a data set."""
    return root / _IDX_SETS[name].torchvision / "raw" if name in _IDX_SETS else root / _CIFAR_FOLDER


def _missing(name: str, root: Path) -> str:
    """The first file that is not there; empty where none is missing."""
    if name == "cifar10":
        return "" if (root / _CIFAR_FOLDER).is_dir() else _CIFAR_FOLDER
    kind = _IDX_SETS[name]
    files = [file for split in (kind.train, kind.test) for file in _idx_names(split)]
    return next((file for file in files if _find(kind, root, file) is None), "")


def _idx_names(split: str) -> tuple[str, str]:
    return f"{split}-images-idx3-ubyte", f"{split}-labels-idx1-ubyte"


def _find(kind: _IdxSet, root: Path, file: str) -> Path | None:
    """An IDX file or its .gz: in torchvision's layout under the root, or in the root itself."""
    folders = (root / kind.torchvision / "raw", root / kind.torchvision, root / "raw", root)
    candidates = (folder / f"{file}{suffix}" for folder in folders for suffix in ("", ".gz"))
    return next((path for path in candidates if path.is_file()), None)


def _load_idx(kind: _IdxSet, root: Path, train: bool) -> Resident:
    paths = [_find(kind, root, file) or root / file for file in _idx_names(kind.train if train else kind.test)]
    pixels, labels = read_idx(paths[0], 3), read_idx(paths[1], 1)
    if len(pixels) != len(labels):
        raise InputError(f"{paths[0]} has {len(pixels)} images, but {paths[1]} has {len(labels)} labels; fetch both again")
    if kind.transposed:
        pixels = pixels.transpose(1, 2)
    return Resident(pixels.unsqueeze(1).contiguous(), labels.long())


def _load_cifar10(root: Path, train: bool) -> Resident:
    from torchvision import datasets  # costs seconds: only where it is needed

    try:
        # torchvision compares each file's checksum with the published one before it unpickles it.
        data = datasets.CIFAR10(str(root), train=train)
    except (OSError, RuntimeError) as error:
        raise InputError(f"{root / _CIFAR_FOLDER}: not the published CIFAR-10 ({error}); fetch it again") from None
    return Resident(torch.from_numpy(data.data).permute(0, 3, 1, 2).contiguous(), torch.tensor(data.targets))


def _any_answers(urls: list[str]) -> bool:
    """Whether a server gives any answer in time. In threads: looking a name up has no time limit of its own."""
    answered = threading.Event()

    def ask(url: str) -> None:
        try:
            urllib.request.build_opener().open(url, timeout=_PROBE_SECONDS).close()
            answered.set()
        except urllib.error.HTTPError:
            answered.set()
        except OSError:
            pass

    threads = [threading.Thread(target=ask, args=(url,), daemon=True) for url in urls]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(_PROBE_SECONDS / len(threads))
    return answered.is_set()
