"""Where images come from: found in every usual layout, read whole, and refused by name where they are damaged."""

import gzip
import hashlib
import pickle
import shutil
import time
from pathlib import Path

import pytest
import torch
from torch import Tensor

from tests.helpers import resident, write_idx_set
from vae_dist.config import DataConfig, InputError
from vae_dist.data import as_images, colour_glyphs, glyphs, sources
from vae_dist.data.idx import idx_bytes, read_idx

IMAGES, LABELS = torch.arange(5 * 4 * 3, dtype=torch.uint8).view(5, 1, 4, 3), torch.tensor([3, 1, 4, 1, 5])


@pytest.mark.parametrize("compressed", [False, True])
@pytest.mark.parametrize("layout", ["MNIST/raw", "MNIST", "raw", "."])
def test_idx_files_are_found_in_every_usual_layout(layout: str, compressed: bool, tmp_path: Path) -> None:
    write_idx_set(tmp_path / layout, IMAGES, LABELS, IMAGES[:2], LABELS[:2], compressed=compressed)
    data = DataConfig(root=str(tmp_path))
    sources.fetch_missing(data)
    train, test = resident(data, train=True), resident(data, train=False)
    assert torch.equal(train.pixels, IMAGES)
    assert train.labels is not None
    assert torch.equal(train.labels, LABELS)
    assert torch.equal(test.pixels, IMAGES[:2])
    assert train.pixels.dtype == torch.uint8


@pytest.mark.parametrize(("name", "folder"), [("fashion_mnist", "FashionMNIST"), ("kmnist", "KMNIST")])
def test_sets_of_mnists_kin_have_folders_of_their_own(name: str, folder: str, tmp_path: Path) -> None:
    write_idx_set(tmp_path / folder / "raw", IMAGES, LABELS, IMAGES[:2], LABELS[:2])
    assert torch.equal(resident(DataConfig(name=name, root=str(tmp_path)), train=True).pixels, IMAGES)  # type: ignore[arg-type]


def test_emnist_digits_stand_upright(tmp_path: Path) -> None:
    names = ("emnist-digits-train", "emnist-digits-test")
    write_idx_set(tmp_path / "EMNIST" / "raw", IMAGES, LABELS, IMAGES, LABELS, names)
    assert torch.equal(resident(DataConfig(name="emnist", root=str(tmp_path)), train=True).pixels, IMAGES.transpose(2, 3))


def test_cifar10_is_read_through_torchvision(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A small set in CIFAR-10's files, whose checksums stand in for the published ones."""
    from torchvision.datasets import CIFAR10

    folder = tmp_path / CIFAR10.base_folder
    folder.mkdir()
    pixels = torch.randint(0, 256, (12, 3, 32, 32), dtype=torch.uint8)

    def write(name: str, rows: Tensor) -> tuple[str, str]:
        content = pickle.dumps({"data": rows.flatten(1).numpy(), "labels": [7] * len(rows)})
        (folder / name).write_bytes(content)
        return name, hashlib.md5(content).hexdigest()

    meta = pickle.dumps({"label_names": ["plane"]})
    (folder / "batches.meta").write_bytes(meta)
    monkeypatch.setattr(
        CIFAR10, "meta", {"filename": "batches.meta", "key": "label_names", "md5": hashlib.md5(meta).hexdigest()}
    )
    monkeypatch.setattr(CIFAR10, "train_list", [write("data_batch_1", pixels[:6]), write("data_batch_2", pixels[6:10])])
    monkeypatch.setattr(CIFAR10, "test_list", [write("test_batch", pixels[10:])])
    data = DataConfig(name="cifar10", root=str(tmp_path))
    assert torch.equal(resident(data, train=True).pixels, pixels[:10])
    assert torch.equal(resident(data, train=False).pixels, pixels[10:])
    (folder / "data_batch_1").write_bytes(b"not what was published")
    with pytest.raises(InputError, match="not the published CIFAR-10"):
        resident(data, train=True)


GOOD = idx_bytes(IMAGES[:, 0])


@pytest.mark.parametrize(
    ("name", "content", "told"),
    [
        ("truncated", GOOD[:-1], "truncated: the header promises 60 bytes of data, there are 59"),
        ("no header", GOOD[:5], "truncated: 5 bytes"),
        ("nothing", b"", "truncated: 0 bytes"),
        ("too long", GOOD + b"x", "corrupt"),
        ("labels", idx_bytes(LABELS.byte()), "wrong magic number 00000801, expected 00000803"),
        ("html", b"<!DOCTYPE html><html>", "wrong magic number"),
        ("huge", GOOD[:4] + b"\xff" * 12 + GOOD[16:], "truncated: the header promises"),
        ("no images", idx_bytes(torch.zeros(0, 28, 28, dtype=torch.uint8)), "empty data set"),
        ("truncated.gz", gzip.compress(GOOD)[:-9], "truncated or corrupt"),
        ("corrupt.gz", gzip.compress(GOOD)[:20] + b"\0\1\2\3" + gzip.compress(GOOD)[24:], "truncated or corrupt"),
        ("no.gz", GOOD, "truncated or corrupt"),
    ],
    ids=lambda value: value if isinstance(value, str) and len(value) < 15 else "",
)
def test_a_damaged_idx_file_is_refused_by_name(name: str, content: bytes, told: str, tmp_path: Path) -> None:
    (tmp_path / name).write_bytes(content)
    with pytest.raises(InputError, match=told) as error:
        read_idx(tmp_path / name, 3)
    assert str(tmp_path / name) in str(error.value)


def test_images_and_labels_of_different_length_are_refused(tmp_path: Path) -> None:
    write_idx_set(tmp_path, IMAGES, LABELS[:3], IMAGES, LABELS)
    with pytest.raises(InputError, match=r"has 5 images, but .* has 3 labels"):
        resident(DataConfig(root=str(tmp_path)), train=True)


@pytest.mark.parametrize("name", ["mnist", "emnist", "cifar10"])
def test_missing_data_without_network_names_the_ways_out_in_time(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("http_proxy", "http://127.0.0.1:9")
    monkeypatch.setenv("https_proxy", "http://127.0.0.1:9")
    started = time.monotonic()
    with pytest.raises(InputError) as error:
        sources.fetch_missing(DataConfig(name=name, root=str(tmp_path / "nowhere")))  # type: ignore[arg-type]
    assert time.monotonic() - started < 15
    told = str(error.value)
    assert all(words in told for words in (f"--data.name {name}", "--data.root DIR", "--data.name glyphs", str(tmp_path)))
    assert not (tmp_path / "nowhere").exists()


def test_glyphs_are_the_same_wherever_they_are_made() -> None:
    """The drawing's hash: whoever changes it makes a new data set, and raises its VERSION."""
    images, digits = glyphs.draw(0, 700)
    assert (
        hashlib.sha256(bytes(images.flatten().tolist())).hexdigest()
        == "f5b6fcabcc03c85e1a5421cc2496d939662266c0d1264871e795ec53e0a9bd60"
    )
    assert images.shape == (700, 1, 28, 28)
    assert digits[:10].tolist() == [8, 0, 7, 1, 7, 2, 2, 0, 6, 0]


def test_coloured_glyphs_are_the_same_wherever_they_are_made_and_all_different() -> None:
    images, digits = colour_glyphs.draw(0, 300)
    assert (
        hashlib.sha256(images.numpy().tobytes()).hexdigest()
        == "77b36a8f498b48d1c1a7a8828c1effe10e3fe0d6c631e7f79bbdc11318bcace4"
    )
    assert images.shape == (300, 3, 64, 64)
    assert digits[:10].tolist() == [2, 2, 9, 7, 4, 6, 5, 8, 2, 5]
    assert torch.equal(colour_glyphs.draw(98, 105)[0], images[98:105])
    assert len({image.numpy().tobytes() for image in images}) == 300
    # Every digit stands out: the middle of the picture has pixels far from what its frame is on average.
    frame = torch.cat([images[..., :6, :].flatten(2), images[..., -6:, :].flatten(2)], dim=2).float().mean(2)
    away = (images[..., 16:48, 16:48].flatten(2).float() - frame[:, :, None]).abs().sum(1).amax(1)
    assert away.min() > 90


def test_a_glyph_does_not_depend_on_what_is_drawn_with_it() -> None:
    images, digits = glyphs.draw(490, 520)
    assert torch.equal(glyphs.draw(505, 506)[0], images[15:16])
    assert torch.equal(glyphs.draw(505, 506)[1], digits[15:16])


def test_glyphs_are_balanced_and_varied() -> None:
    images, digits = glyphs.draw(0, 2000)
    assert torch.bincount(digits).min() > 150
    assert len({bytes(image.flatten().tolist()) for image in images}) == 2000
    assert 0.1 < as_images(images).mean() < 0.3
    assert images[:, :, 0].float().mean() < 2, "the digits lie inside the picture"


def test_pixels_become_images_in_the_unit_interval() -> None:
    images = as_images(torch.tensor([0, 51, 255], dtype=torch.uint8))
    assert torch.equal(images, torch.tensor([0.0, 0.2, 1.0]))


def test_the_real_mnist_is_read(mnist_root: Path, tmp_path: Path) -> None:
    train = resident(DataConfig(root=str(mnist_root)), train=True)
    assert train.pixels.shape == (60_000, 1, 28, 28)
    assert abs(as_images(train.pixels).mean().item() - 0.1307) < 1e-4
    assert train.labels is not None
    assert train.labels[:5].tolist() == [5, 0, 4, 1, 9]
    for file in (mnist_root / "MNIST" / "raw").glob("t10k*ubyte"):
        with gzip.open(tmp_path / f"{file.name}.gz", "wb", compresslevel=1) as packed, file.open("rb") as raw:
            shutil.copyfileobj(raw, packed)
    test = resident(DataConfig(root=str(tmp_path)), train=False)
    assert torch.equal(test.pixels, resident(DataConfig(root=str(mnist_root)), train=False).pixels)
