"""Shards of a bucket: kept in the room that they are given, whole, and given up in time where they cannot be had."""

import contextlib
import errno
import os
import re
import threading
import time
from pathlib import Path

import filelock
import numpy as np
import pytest
import torch
from torch import Tensor

from tests.object_storage import BUCKET, PER_SHARD, SHARDS, TEST_SHARDS, TRAIN, Way, config
from vae_dist.config import ImagesLost, InputError
from vae_dist.data import bucket, packed, stream
from vae_dist.data.stream import Streamed


def disk_bytes(cache: Path) -> int:
    """What the shards of a cache occupy, with those that have no name any more but are mapped by this process."""
    kept = 0
    for file in (cache / "vae_dist").iterdir():
        with contextlib.suppress(FileNotFoundError):
            kept += file.stat().st_size
    spans = re.findall(rf"^(\w+)-(\w+) .* {cache}/.* \(deleted\)$", Path("/proc/self/maps").read_text(), re.MULTILINE)
    return kept + sum(int(end, 16) - int(begin, 16) for begin, end in spans)


def test_threads_get_the_same_images_from_a_small_cache(way: Way, tmp_path: Path, pixels: Tensor) -> None:
    """Room for some shards only: they are fetched again when their turn comes, and never take more than that room."""
    largest = packed.shard_bytes(PER_SHARD, 784)
    with pytest.raises(InputError, match=r"--data.cache_gb 0.0002: must be at least 0.00057: 18 shards of 31,\d+ bytes"):
        Streamed(config(cache_gb=0.0002), "train")
    images = Streamed(config(cache_gb=18.5 * largest / 1e9), "train")
    wrong, taken = [], []

    def look(seed: int) -> None:
        for step in images.order(seed, 1, 100).split(100):
            wrong.extend([seed] * (not torch.equal(images.fetch(step), pixels[step])))
            taken.append(disk_bytes(tmp_path / "cache"))

    threads = [threading.Thread(target=look, args=(seed,)) for seed in range(2)]
    for thread in threads:
        thread.start()
    test = Streamed(config(cache_gb=18.5 * largest / 1e9), "test")
    assert torch.equal(torch.cat(list(test.blocks())), pixels[TRAIN:])
    for thread in threads:
        thread.join()
    assert not wrong
    assert len(way.shards) > SHARDS + TEST_SHARDS
    assert 17 * largest < max(taken) <= 18.5 * largest


def test_a_step_that_needs_more_shards_than_there_is_room_for_has_them_in_memory(
    way: Way, tmp_path: Path, pixels: Tensor
) -> None:
    images = Streamed(config(cache_gb=18.5 * packed.shard_bytes(PER_SHARD, 784) / 1e9), "train")
    for _ in range(2):
        images.announce(torch.arange(TRAIN))  # all of them stay open until they are taken
        opened = [images.shard(number) for number in range(SHARDS)]
        assert len(list((tmp_path / "cache" / "vae_dist").glob("*.bin"))) == 18
        assert disk_bytes(tmp_path / "cache") <= 18.5 * packed.shard_bytes(PER_SHARD, 784)
        assert torch.equal(images.fetch(torch.arange(TRAIN)), pixels[:TRAIN])
        del opened
    assert len(way.shards) == 2 * SHARDS - 18, "what is kept is not fetched again"


def test_a_shard_that_was_damaged_in_the_cache_is_fetched_again(way: Way, tmp_path: Path, pixels: Tensor) -> None:
    numbers = torch.arange(PER_SHARD)
    for _ in range(2):
        assert torch.equal(Streamed(config(), "train").rows(numbers), pixels[numbers])
    assert len(way.shards) == 1
    (kept,) = (tmp_path / "cache" / "vae_dist").glob("*.bin")
    content = bytearray(kept.read_bytes())
    content[-100] ^= 1
    kept.write_bytes(content)
    assert torch.equal(Streamed(config(), "train").rows(numbers), pixels[numbers])
    assert len(way.shards) == 2


def test_nobody_writes_the_cache_while_another_does(way: Way, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """However long that takes: a patience with an end is over at once here."""

    class Impatient(filelock.FileLock):
        def __init__(self, file: str, timeout: float = -1) -> None:
            super().__init__(file, timeout=min(timeout, 0.01))

    images = Streamed(config(), "train")
    monkeypatch.setattr(filelock, "FileLock", Impatient)
    with filelock.UnixFileLock(tmp_path / "cache" / "vae_dist" / "room.lock"):
        reader = threading.Thread(target=images.rows, args=(torch.tensor([5]),))
        reader.start()
        reader.join(1)
        assert reader.is_alive()
        assert len(way.whole) == 1
        assert not list((tmp_path / "cache" / "vae_dist").glob("*.bin"))
    reader.join(10)
    assert not reader.is_alive()


def test_attempts_are_a_number_and_pauses_between_them_do_not_grow_forever(way: Way, monkeypatch: pytest.MonkeyPatch) -> None:
    for wrong in ("many", "0", "-1", ""):
        monkeypatch.setenv("AWS_MAX_ATTEMPTS", wrong)
        with pytest.raises(InputError, match=rf"^AWS_MAX_ATTEMPTS {wrong}: must be a whole number of at least 1$"):
            Streamed(config(), "train")
    monkeypatch.setenv("AWS_MAX_ATTEMPTS", "2000")
    pauses: list[float] = []
    monkeypatch.setattr(time, "sleep", pauses.append)

    def fail() -> None:
        raise OSError("in vain")

    with pytest.raises(ImagesLost, match="in vain"):
        bucket.Bucket(f"s3://{BUCKET}/set/train", 0)._patiently("shard", fail)
    assert len(pauses) == 1999
    assert max(pauses) <= 48


def test_a_full_disk_is_named(way: Way, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def write(*_: object) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(bucket, "write_atomically", write)
    with pytest.raises(ImagesLost, match=r"cache/vae_dist: No space left on device: .* lower --data.cache_gb, or"):
        Streamed(config(), "train").rows(torch.tensor([5]))


def quick_limits(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(bucket, "_STALL_SECONDS", 0.3)
    monkeypatch.setattr(bucket, "_FIRST_PAUSE_SECONDS", 0.01)
    monkeypatch.setattr(stream, "_PAUSE_SECONDS", 0.05)
    monkeypatch.setenv("AWS_MAX_ATTEMPTS", "3")


@pytest.mark.parametrize(
    ("fault", "told"),
    [
        ("hang", "Read timeout on endpoint URL"),
        ("vanish", "Could not connect to the endpoint URL|Connection (was closed|reset|aborted|broken)"),
        ("503", r"503"),
        ("cut", "Connection broken|bytes"),
        ("other", r"SHA-256 is not the one in index.json"),
    ],
)
def test_a_server_that_stays_broken_is_given_up_in_time(
    fault: str, told: str, way: Way, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    quick_limits(monkeypatch)
    images = Streamed(config(), "train")
    way.fault = lambda number: fault if number >= 2 else 0.0
    began = time.monotonic()
    with pytest.raises(ImagesLost, match=rf"^s3://bucket/set/train/shard-\d+.bin at http://127.0.0.1:\d+: .*({told})") as lost:
        for _ in images.stream(images.order(0, 1, 100).view(-1, 100)):
            pass
    assert "\n" not in str(lost.value)
    assert time.monotonic() - began < 30
    cache = tmp_path / "cache" / "vae_dist"
    while (torn := {file.suffix for file in cache.iterdir()} - {".bin", ".lock"}) and time.monotonic() - began < 30:
        time.sleep(0.05)  # another thread is about to give up
    assert not torn
    if fault == "vanish":
        way.open()


def test_a_lost_shard_ends_all_waiting_until_others_are_expected() -> None:
    """Patience is spent once: not again by those who wait for other shards, nor by those who come later."""
    asked, is_gone, ended = [], threading.Event(), threading.Event()

    def open_shard(number: int) -> packed.Mapped:
        asked.append(number)
        (is_gone if number == 0 else ended).wait(60)
        raise OSError(f"no shard {number}")

    shelf, told = stream._Shelf(open_shard, 4, most=0), []  # none ahead: each is asked for by who needs it

    def need(number: int) -> None:
        with pytest.raises(ImagesLost) as lost:
            shelf.get(number)
        told.append(str(lost.value))

    shelf.expect([0, 1, 2, 3], np.ones(4, np.int64))
    needing = [threading.Thread(target=need, args=(number,)) for number in (0, 1)]
    for thread in needing:
        thread.start()
    while len(asked) < 2:
        time.sleep(0.001)
    is_gone.set()
    for thread in needing:
        thread.join(10)
    assert told == ["no shard 0"] * 2, "who waits for shard 1 waits no longer"
    need(2)
    assert told[2:] == ["no shard 0"]
    assert sorted(asked) == [0, 1], "shard 2 was not even asked for"
    ended.set()
    shelf.expect([2], np.ones(4, np.int64))
    need(2)
    assert told[3:] == ["no shard 2"], "a new pass asks again"
    shelf.expect([], np.zeros(4, np.int64))  # its threads end


def test_without_credentials_or_with_a_bad_endpoint_it_is_refused_at_once(way: Way, monkeypatch: pytest.MonkeyPatch) -> None:
    began = time.monotonic()
    monkeypatch.setenv("AWS_EC2_METADATA_DISABLED", "true")
    for name, value, told in (("AWS_ACCESS_KEY_ID", "", "credentials"), ("AWS_ENDPOINT_URL", "nowhere", "Invalid endpoint")):
        monkeypatch.setenv(name, value)
        with pytest.raises(
            InputError, match=rf"^s3://bucket/set/train/index.json.*{told}.*; check the address, AWS_ENDPOINT_URL"
        ):
            Streamed(config(), "train")
    assert time.monotonic() - began < 5
