"""Packed images: written whole or gone on with, read as they were decoded, and refused by name where they are damaged."""

import errno
import hashlib
import json
import math
import mmap
import os
import resource
import shutil
import signal
import struct
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor

from tests.helpers import ROOT, Outcome, environment, everything, records, refused
from vae_dist.config import DataConfig, InputError
from vae_dist.data import cache, folder, packed, packing, sources
from vae_dist.data.images import Images, Resident
from vae_dist.data.packed import Packed
from vae_dist.data.photos import Decoding, decode

Command = Callable[..., Outcome]

PICTURES, SIZE, IN_SHARD = 60, 4, 7
IMAGE_BYTES = 3 * SIZE**2
SHARD_BYTES = IN_SHARD * (IMAGE_BYTES + 8)


@pytest.fixture(scope="module")
def pictures(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder of small pictures, each another, of two sizes."""
    root = tmp_path_factory.mktemp("pictures")
    random = np.random.default_rng(0)
    for number in range(PICTURES):
        (root / f"{number % 2}").mkdir(exist_ok=True)
        pixels = random.integers(0, 256, (5, 6 + number % 3, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(root / f"{number % 2}" / f"{number}.png")
    return root


@pytest.fixture(scope="module")
def whole(pictures: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A pack of them that nobody touches."""
    out = tmp_path_factory.mktemp("packs") / "whole"
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(packed, "SHARD_BYTES", SHARD_BYTES)
        packing.write(folder.plan(config(pictures)), out, "refuse")
    return out


@pytest.fixture(autouse=True)
def small(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Shards of seven images, a cache of one's own, and a folder looked at anew."""
    monkeypatch.setattr(packed, "SHARD_BYTES", SHARD_BYTES)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    cache.prepare.cache_clear()


@pytest.fixture
def pack(whole: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(whole, tmp_path / "pack"))


def config(root: Path, **options: Any) -> DataConfig:
    return DataConfig(name="folder", root=str(root), image_size=SIZE, **options)


def expected(root: Path, side: str) -> Tensor:
    """The images of a side, decoded one by one."""
    found = folder.plan(config(root))
    files = found.train if side == "train" else found.test
    content = b"".join(decode(root / picture.path, Decoding(SIZE, 3)) for picture in files)
    return torch.frombuffer(bytearray(content), dtype=torch.uint8).view(-1, 3, SIZE, SIZE)


def test_a_shard_is_laid_out_as_litdata_reads_it(pack: Path, pictures: Path) -> None:
    """uint32 n; n + 1 uint32 offsets from the file's start; each item its length as uint32 and its bytes."""
    index = json.loads((pack / "train" / "index.json").read_text())
    images = []
    for chunk in index["chunks"]:
        content = (pack / "train" / chunk["filename"]).read_bytes()
        n = struct.unpack_from("<I", content)[0]
        offsets = struct.unpack_from(f"<{n + 1}I", content, 4)
        assert (n, len(content)) == (chunk["chunk_size"], chunk["chunk_bytes"])
        assert (offsets[0], offsets[-1]) == (4 * (n + 2), len(content))
        items = [content[start:end] for start, end in pairwise(offsets)]
        assert {item[:4] for item in items} == {struct.pack("<I", IMAGE_BYTES)}
        images += [item[4:] for item in items]
        assert chunk["sha256"] == hashlib.sha256(content).hexdigest()
    assert b"".join(images) == expected(pictures, "train").numpy().tobytes()
    assert len(index["chunks"]) == -(-len(images) // IN_SHARD) > 5
    assert index["config"]["data_format"] == ["bytes"]
    assert (index["vae_dist"]["shape"], index["vae_dist"]["images"]) == ([3, SIZE, SIZE], len(images))


def test_litdata_reads_the_same_images(pack: Path, pictures: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    from litdata import StreamingDataset  # costs seconds

    monkeypatch.setenv("HOME", str(tmp_path))
    streamed = StreamingDataset(str(pack / "test"))
    assert b"".join(bytes(streamed[i]) for i in range(len(streamed))) == expected(pictures, "test").numpy().tobytes()


@pytest.mark.parametrize("side", ["train", "test"])
def test_images_come_by_their_numbers_across_shards_and_threads(side: str, pack: Path, pictures: Path) -> None:
    images, right = Packed(pack / side), expected(pictures, side)
    assert len(images) == len(right)
    assert torch.equal(images.fetch(torch.arange(len(images))), right)
    some = torch.tensor([len(right) - 1, 0, 3, 3, len(right) // 2])
    assert torch.equal(images.fetch(some), right[some])
    assert torch.equal(images.rows(torch.tensor([[2, -1]])), right[torch.tensor([[2, 0]])])
    steps = torch.randint(0, len(right), (40, 1, 9), generator=torch.Generator().manual_seed(0))
    assert torch.equal(torch.stack(list(images.stream(steps))), right[steps])


def test_the_disk_is_asked_for_every_byte_of_a_batch_at_once(pack: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    images = Packed(pack / "train")
    asked: list[tuple[int, int, int]] = []

    class File:
        def __init__(self, number: int) -> None:
            self.number = number

        def madvise(self, option: int, start: int, length: int) -> None:
            assert option == mmap.MADV_WILLNEED
            assert start % mmap.PAGESIZE == 0
            asked.append((self.number, start, start + length))

    files = [(pack / "train" / f"shard-{number:05d}.bin").read_bytes() for number in range(-(-len(images) // IN_SHARD))]
    monkeypatch.setattr(images, "_files", [File(number) for number in range(len(files))])
    numbers = torch.tensor([IN_SHARD, 0, len(images) - 1, IN_SHARD - 1, 3])
    for image, (number, start, stop) in zip(images.fetch(numbers), asked, strict=True):
        at = files[number].find(image.numpy().tobytes())
        assert start <= at
        assert stop == at + IMAGE_BYTES


def test_the_shards_of_a_batch_are_looked_up_once(pack: Path) -> None:
    class Ends:
        looked_up = 0

        def __array__(self, *_: object, **__: object) -> "np.ndarray[Any, Any]":
            self.looked_up += 1
            return ends

        def __getitem__(self, shard: Any) -> Any:
            return ends[shard]

    images = Packed(pack / "train")
    ends = images._ends
    images.__dict__["_ends"] = counted = Ends()
    images.fetch(torch.arange(20))
    assert counted.looked_up == 1


def test_two_sets_may_be_open_whose_files_only_together_are_too_many(pack: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    limits = resource.getrlimit(resource.RLIMIT_NOFILE)
    monkeypatch.setattr(packed, "_SPARE_FILES", 4)
    resource.setrlimit(resource.RLIMIT_NOFILE, (len(os.listdir("/proc/self/fd")) + 12, limits[1]))
    try:
        held = [Packed(pack / side) for side in ("train", "train", "test")]
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, limits)
    assert len(held) == 3


def test_a_file_that_cannot_be_mapped_is_named(pack: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: object, **__: object) -> None:
        raise OSError(errno.EMFILE, os.strerror(errno.EMFILE))

    monkeypatch.setattr(mmap, "mmap", full)
    with pytest.raises(OSError, match=r"Too many open files: '.*shard-00000\.bin'"):
        packed.mapped(pack / "test" / "shard-00000.bin", 1, IMAGE_BYTES)


def test_a_pack_says_what_it_holds_and_how_to_train_from_it(pictures: Path, command: Command, tmp_path: Path) -> None:
    out = tmp_path / "pack"
    first = command("pack", pictures, out, "--size", SIZE)
    train, test = len(expected(pictures, "train")), len(expected(pictures, "test"))
    assert f"decoding {PICTURES} pictures of {pictures} ({train} for training, {test} for testing" in first.out
    assert f"{train} training and {test} test images of 3x{SIZE}x{SIZE}" in first.out
    assert f"--data.name packed --data.root {out}" in first.out
    before = everything(out)
    assert "it was there already" in command("pack", pictures, out, "--size", SIZE).out
    assert everything(out) == before
    assert set(before) == {
        f"{side}/{name}"
        for side in ("train", "test")
        for shard in (out / side).glob("shard-*.bin")
        for name in ("index.json", shard.name, f".{shard.stem}.json")
    }


def test_packed_folder_and_memory_are_one_data_set(
    pack: Path, pictures: Path, command: Command, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    options = ["--data.batch_size", 16, "--trainer.epochs", 1, "--model.hidden", 8, "--tracking.wandb", "disabled"]
    of_folder = ["--data.name", "folder", "--data.root", pictures, "--data.image_size", SIZE]
    load = sources.load

    def in_memory(config: DataConfig, train: bool, home: Path | None) -> Images:
        images = load(config, train, home)
        return Resident(images.rows(torch.arange(len(images))))

    assert command("train", *options, *of_folder, "--output", tmp_path / "folder").status == 0
    assert command("train", *options, "--data.name", "packed", "--data.root", pack, "--output", tmp_path / "packed").status == 0
    monkeypatch.setattr(sources, "load", in_memory)
    assert command("train", *options, *of_folder, "--output", tmp_path / "memory").status == 0
    assert records(tmp_path / "folder") == records(tmp_path / "packed") == records(tmp_path / "memory")
    weights = {(tmp_path / run / "model.safetensors").read_bytes() for run in ("folder", "packed", "memory")}
    assert len(weights) == 1


def damage_index(change: Callable[[dict[str, Any]], object]) -> Callable[[Path], None]:
    def damage(side: Path) -> None:
        index = json.loads((side / "index.json").read_text())
        change(index)
        (side / "index.json").write_text(json.dumps(index))

    return damage


def rename(name: str) -> Callable[[dict[str, Any]], object]:
    return lambda index: index["chunks"][0].update(filename=name)


def other_checksum(word: str) -> Callable[[dict[str, Any]], object]:
    """The index of somebody who means harm: its own digest is right."""

    def change(index: dict[str, Any]) -> None:
        index["chunks"][0]["sha256"] = word
        parts = [*map(str, index["vae_dist"]["shape"]), *(chunk["sha256"] for chunk in index["chunks"])]
        index["updated_at"] = hashlib.sha256(" ".join(parts).encode()).hexdigest()

    return change


def write_shard(change: Callable[[bytes], bytes]) -> Callable[[Path], object]:
    return lambda side: (side / "shard-00001.bin").write_bytes(change((side / "shard-00001.bin").read_bytes()))


@pytest.mark.parametrize(
    ("damage", "told"),
    [
        (write_shard(lambda content: content[:-1]), "shard-00001.bin: truncated: it has"),
        (write_shard(lambda content: content + b"\0"), "shard-00001.bin: of another pack: it has"),
        (lambda side: (side / "shard-00001.bin").unlink(), "shard-00001.bin: No such file or directory"),
        (lambda side: (side / "index.json").unlink(), r"index.json: No such file or directory; name a folder"),
        (lambda side: (side / "index.json").write_text('{"chunks": ['), "index.json: not an index"),
        (lambda side: (side / "index.json").write_text("[]"), "index.json: not an index"),
        (damage_index(lambda index: index.pop("vae_dist")), "index.json: not an index"),
        (damage_index(lambda index: index["vae_dist"].update(format=9)), "index.json: format 9, this version reads 1"),
        (damage_index(lambda index: index["vae_dist"].update(images=3)), "index.json: damaged"),
        (damage_index(lambda index: index["vae_dist"].update(shape=[3, 4, 5])), "index.json: damaged"),
        (damage_index(lambda index: index["chunks"].pop()), "index.json: damaged"),
        (damage_index(lambda index: index["chunks"][0].update(sha256="0")), "index.json: damaged"),
        (damage_index(lambda index: index["chunks"][0].update(chunk_bytes=9)), "index.json: damaged"),
        *((damage_index(rename(name)), "index.json: damaged") for name in ("../../x.bin", "..", "", "a\0.bin", "x", "a/b.bin")),
        (damage_index(lambda index: index["chunks"][0].update(chunk_size=math.inf)), "index.json: not an index"),
        (damage_index(other_checksum("../../../x")), "index.json: damaged"),
        (damage_index(other_checksum("A" * 64)), "index.json: damaged"),
    ],
)
def test_a_damaged_pack_is_refused_by_file(damage: Callable[[Path], object], told: str, pack: Path) -> None:
    damage(pack / "train")
    with pytest.raises(InputError, match=told) as error:
        Packed(pack / "train")
    assert str(pack / "train") in str(error.value)
    assert "vae-dist pack" in str(error.value), "the way out"


def test_verification_reads_every_byte(pack: Path, command: Command) -> None:
    assert "whole: all" in command("pack", "--verify", pack).out
    shard = pack / "test" / "shard-00000.bin"
    content = bytearray(shard.read_bytes())
    content[-1] ^= 1
    shard.write_bytes(content)
    assert len(Packed(pack / "test")) > 0, "a start does not read the whole set"
    refused(command("pack", "--verify", pack), str(shard), "SHA-256")
    refused(command("pack", "--verify", pack.parent), "index.json")


def test_unreadable_files_are_all_found_and_refused_or_skipped(pictures: Path, command: Command, tmp_path: Path) -> None:
    root, out = tmp_path / "pictures", tmp_path / "pack"
    for name, content in everything(pictures).items():
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_bytes(content)
    whole = (root / "0" / "0.png").read_bytes()
    bad = {f"{number}.png": content for number, content in enumerate([b"", b"text", whole[:60]] * 3)}
    for name, content in bad.items():
        (root / name).write_bytes(content)
    outcome = command("pack", root, out, "--size", SIZE)
    refused(outcome, f"{len(bad)} of {PICTURES + len(bad)} files cannot be read", "unreadable.txt", "--unreadable skip")
    assert sum(f"{name}: " in outcome.err for name in bad) == 5
    listed = (out / "unreadable.txt").read_text().splitlines()
    assert sorted(line.split(": ")[0] for line in listed) == sorted(bad)
    refused(command("train", "--data.name", "packed", "--data.root", out), "index.json")
    skipped = command("pack", root, out, "--size", SIZE, "--unreadable", "skip")
    assert f"{len(bad)} unreadable files were skipped" in skipped.out
    assert "decoding" not in skipped.out, "what was decoded is kept"
    held = [Packed(out / side) for side in ("train", "test")]
    assert sum(map(len, held)) == PICTURES
    refused(command("pack", root, out, "--size", SIZE), "cannot be read")
    train = ["--data.name", "folder", "--data.root", root, "--data.image_size", SIZE, "--tracking.wandb", "disabled"]
    refused(command("train", *train, "--output", tmp_path / "run"), "cannot be read", "--data.unreadable skip")
    skip = ["--data.unreadable", "skip", "--trainer.epochs", 1]
    assert command("train", *train, "--output", tmp_path / "run", *skip).status == 0


def test_pictures_that_changed_under_an_unfinished_pack_are_decoded_anew(
    pictures: Path, command: Command, tmp_path: Path
) -> None:
    root, out = tmp_path / "pictures", tmp_path / "pack"
    shutil.copytree(pictures, root)
    (root / "bad.png").touch()
    refused(command("pack", root, out, "--size", SIZE + 1), "1 of 61 files")
    refused(command("pack", root, out, "--size", SIZE), "1 of 61 files")
    (root / "bad.png").unlink()
    Image.new("RGB", (6, 6), (255, 0, 0)).save(root / "0" / "0.png")
    assert command("pack", root, out, "--size", SIZE).status == 0
    for side in ("train", "test"):
        assert torch.equal(torch.cat(list(Packed(out / side).blocks())), expected(root, side))


def test_a_side_that_has_only_unreadable_files_is_refused(command: Command, tmp_path: Path) -> None:
    for side in ("train", "test"):
        (tmp_path / "pictures" / side).mkdir(parents=True)
    Image.new("RGB", (4, 4)).save(tmp_path / "pictures" / "train" / "a.png")
    (tmp_path / "pictures" / "test" / "b.png").touch()
    outcome = command("pack", tmp_path / "pictures", tmp_path / "out", "--unreadable", "skip")
    refused(outcome, "none of the 1 test pictures can be read, such as test/b.png")


def test_a_folder_of_something_else_is_left_alone(pack: Path, pictures: Path, command: Command, tmp_path: Path) -> None:
    before = everything(pack)
    refused(command("pack", pictures, pack, "--size", 5), str(pack), "holds a pack of other pictures or options")
    refused(command("pack", pictures, pictures), str(pictures), "which is no part of a pack")
    assert everything(pack) == before
    (pack / "train" / "notes").touch()
    refused(command("pack", pictures, pack, "--size", SIZE), "holds train/notes, which is no part of a pack")
    (tmp_path / "file").touch()
    refused(command("pack", pictures, tmp_path / "file"), "is a file")
    refused(command("pack", pictures, tmp_path / "file" / "below"), str(tmp_path / "file"))


@pytest.mark.parametrize(
    "name", [".notes", "train/.notes", "train/.ipynb_checkpoints/a", "test/shard-00009.bin/a", "train/index"]
)
def test_hidden_files_of_somebody_else_are_neither_removed_nor_taken_for_ours(
    name: str, pack: Path, pictures: Path, command: Command
) -> None:
    (pack / name).parent.mkdir(exist_ok=True)
    (pack / name).touch()
    (pack / "train" / "index.json").unlink()
    refused(command("pack", pictures, pack, "--size", SIZE), f"{pack}: holds {name.removesuffix('/a')}, which is no part")
    assert (pack / name).exists()


def test_what_a_kill_leaves_half_written_is_ours(whole: Path, pack: Path, pictures: Path, command: Command) -> None:
    (pack / "train" / "index.json").unlink()
    for name in ("shard-00001.bin", ".shard-00001.json", "index.json"):
        (pack / "train" / f".{name}.unfinished").touch()
    (pack / ".unreadable.txt.unfinished").touch()
    assert command("pack", pictures, pack, "--size", SIZE).status == 0
    assert everything(pack) == everything(whole)


@pytest.mark.parametrize("damage", [Path.unlink, lambda file: file.write_bytes(b"")])
def test_a_lost_shard_is_written_again(
    damage: Callable[[Path], object], whole: Path, pack: Path, pictures: Path, command: Command
) -> None:
    damage(pack / "train" / "shard-00001.bin")
    outcome = command("pack", pictures, pack, "--size", SIZE)
    assert f"decoding the last {IN_SHARD} of {PICTURES} pictures" in outcome.out
    assert everything(pack) == everything(whole)


def test_an_index_of_something_else_is_left_alone(pictures: Path, command: Command, tmp_path: Path) -> None:
    for side in ("train", "test"):
        (tmp_path / "out" / side).mkdir(parents=True)
        (tmp_path / "out" / side / "index.json").write_text("{}")
    refused(command("pack", pictures, tmp_path / "out"), "index.json: damaged, or of no pack; name a new folder, or remove it")
    assert (tmp_path / "out" / "train" / "index.json").read_text() == "{}"


def test_a_pipe_among_the_pictures_is_told_like_any_unreadable_file(pictures: Path, command: Command, tmp_path: Path) -> None:
    root = tmp_path / "pictures"
    shutil.copytree(pictures, root)
    os.mkfifo(root / "pipe.png")
    refused(command("pack", root, tmp_path / "out", "--size", SIZE), "pipe.png: not a regular file")


SLOW = """
import sys, time
from vae_dist.data import packed, packing
packed.SHARD_BYTES = {bytes}
decode = packing.decode
packing.decode = lambda *args: (time.sleep(0.02), decode(*args))[1]
from vae_dist import pack
pack.main(sys.argv[1:])
"""


def test_a_killed_pack_goes_on_and_ends_with_the_same_bytes(
    whole: Path, pictures: Path, command: Command, tmp_path: Path
) -> None:
    out = tmp_path / "killed"
    script = SLOW.format(bytes=SHARD_BYTES)
    arguments = [sys.executable, "-c", script, str(pictures), str(out), "--size", str(SIZE), "--workers", "1"]
    job = subprocess.Popen(arguments, cwd=ROOT, env=environment(), stdout=subprocess.DEVNULL)
    while job.poll() is None and not (out / "train" / ".shard-00002.json").exists():
        time.sleep(0.005)
    job.send_signal(signal.SIGKILL)
    assert job.wait() == -signal.SIGKILL
    assert not list(out.rglob("index.json")), "a pack is whole or absent"
    left = len(list(out.rglob(".shard-*.json")))
    assert 3 <= left <= 7
    first = out / "train" / "shard-00000.bin"
    first.write_bytes(first.read_bytes()[:-1] + b"x")  # as a disk that lost power may leave it
    outcome = command("pack", pictures, out, "--size", SIZE)
    decoded = PICTURES - (left - 1) * IN_SHARD
    assert f"decoding the last {decoded} of {PICTURES} pictures" in outcome.out
    assert everything(out) == everything(whole)


def test_a_full_disk_is_one_error_with_a_way_out(
    pictures: Path, command: Command, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    tried = []

    def full(file: Path, content: object) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(file))

    def slow(*args: Any) -> bytes:
        tried.append(args)
        time.sleep(0.02)
        return decode(*args)

    monkeypatch.setattr(packing, "write_atomically", full)
    monkeypatch.setattr(packing, "decode", slow)
    options = ["--size", SIZE, "--workers", 1]
    refused(command("pack", pictures, tmp_path / "out", *options), "shard-00000.bin: No space left on device; make room")
    assert len(tried) < 2 * IN_SHARD, "nothing is decoded that cannot be written"
    train = ["--data.name", "folder", "--data.root", pictures, "--data.image_size", SIZE, "--output", tmp_path / "run"]
    refused(command("train", *train), "No space left on device; set XDG_CACHE_HOME")
    assert not [thread for thread in threading.enumerate() if thread.name.startswith("decode")]
    monkeypatch.setattr(os, "statvfs", lambda _: os.statvfs_result([1] * 10))
    refused(command("train", *train), f"no room: {PICTURES} images take 0.0 MiB, and 0.0 MiB are free; set XDG_CACHE_HOME")


def test_celeba_is_cut_and_decoded_like_any_folder(tmp_path: Path) -> None:
    home = tmp_path / "celeba"
    (home / "img_align_celeba").mkdir(parents=True)
    (home / "list_eval_partition.txt").write_text("a.jpg 0\nb.jpg 1\nc.jpg 2\n")
    for name, colour in (("a", (255, 0, 0)), ("b", (0, 255, 0)), ("c", (0, 0, 255))):
        face = Image.new("RGB", (178, 218), "white")
        face.paste(colour, (19, 39, 159, 179))  # the 140 x 140 in the middle
        face.save(home / "img_align_celeba" / f"{name}.jpg", quality=100, subsampling=0)
    celeba = DataConfig(name="celeba", root=str(tmp_path))
    decoded = sources.fetch_missing(celeba)
    train, test = sources.load(celeba, True, decoded), sources.load(celeba, False, decoded)
    assert (len(train), len(test), train.shape) == (1, 1, (3, 64, 64))
    for images, channel in ((train, 0), (test, 2)):
        colours = images.rows(torch.tensor([0]))[0].float().mean(dim=(1, 2))
        assert colours[channel] > 250
        assert colours.sum() - colours[channel] < 5


@pytest.mark.parametrize(
    ("options", "told"),
    [
        ([], "name the folder of the pictures"),
        (["one"], "name the folder of the pictures"),
        (["one", "two", "--verify", "three"], "name the folder of the pictures"),
        (["one", "--verify", "three"], "name the folder of the pictures"),
        (["one", "two", "--data", "celeba", "--test_share", 0.2], "--test_share 0.2: must be left out: CelebA has"),
        (["nowhere", "out"], "nowhere: no such folder"),
        (["one", "two", "--size", 0], "--size 0"),
        (["one", "two", "--test_share", 1], "--test_share 1"),
        (["one", "two", "--workers", 0], "--workers 0"),
        (["one", "two", "--colours", 3], "--colours"),
    ],
)
def test_wrong_options_of_pack_are_refused(options: list[object], told: str, command: Command) -> None:
    outcome = command("pack", *options)
    assert outcome.status == 2
    assert told in " ".join(outcome.err.replace("│", " ").split())
