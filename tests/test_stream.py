"""Images in a bucket: the same training as from any other place, whatever happens on the way, or an end that says why."""

import errno
import hashlib
import itertools
import json
import os
import re
import shutil
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from tests.helpers import Outcome, launch, records, refused
from tests.object_storage import BUCKET, Server, Way
from vae_dist.config import DataConfig, ImagesLost, InputError
from vae_dist.data import bucket, glyphs, packed, stream
from vae_dist.data.order import LANES, Partition, even_rows, sharded_epoch_order
from vae_dist.data.stream import Streamed

Command = Callable[..., Outcome]

TRAIN, TEST, PER_SHARD = 1000, 300, 40
SHARDS, TEST_SHARDS = 25, 8


def write_set(folder: Path, pixels: Tensor) -> None:
    """A packed set of small shards."""
    folder.mkdir(parents=True)
    shards = []
    for number, part in enumerate(torch.split(pixels, PER_SHARD)):
        content = packed.shard_content([image.numpy().tobytes() for image in part])
        name = f"shard-{number:05d}.bin"
        (folder / name).write_bytes(content)
        shards.append(packed.Shard(name, len(part), len(content), hashlib.sha256(content).hexdigest()))
    packed.write_index(folder, packed.Index((1, 28, 28), shards, {}))


@pytest.fixture(scope="module")
def pixels() -> Tensor:
    return glyphs.draw(0, TRAIN + TEST)[0]


@pytest.fixture(scope="module")
def folder(pixels: Tensor, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("packed")
    write_set(folder / "train", pixels[:TRAIN])
    write_set(folder / "test", pixels[TRAIN:])
    return folder


@pytest.fixture(scope="module")
def server(folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    server = Server(tmp_path_factory.mktemp("server") / "log")
    server.upload(folder, "set")
    yield server
    server.stop()


@pytest.fixture
def way(server: Server, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Way]:
    """To the server, for this process as well."""
    way = Way(server)
    for name, value in way.environment(tmp_path / "cache").items():
        monkeypatch.setenv(name, value)
    monkeypatch.setattr("litdata.utilities.dataset_utilities._LITDATA_CACHE_DIR", str(tmp_path / "cache"))  # read at import
    yield way
    way.vanish()


def config(root: object = f"s3://{BUCKET}/set", **more: float) -> DataConfig:
    return DataConfig(name="stream", root=str(root), **more)  # type: ignore[arg-type]


@given(
    shards=st.lists(st.integers(1, 40), min_size=1, max_size=30),
    batch_size=st.integers(1, 70),
    epoch=st.integers(1, 3),
)
@settings(max_examples=60, deadline=None)
def test_each_image_comes_once_an_epoch_in_an_order_of_its_own(shards: list[int], batch_size: int, epoch: int) -> None:
    order = sharded_epoch_order(0, epoch, shards, batch_size)
    assert torch.equal(order.sort().values, torch.arange(sum(shards)))
    assert torch.equal(order, sharded_epoch_order(0, epoch, shards, batch_size))
    assert sum(shards) < 20 or not torch.equal(order, sharded_epoch_order(0, epoch + 1, shards, batch_size))


@pytest.mark.parametrize("ranks", [1, 2, 3, 8, 16])
def test_a_rank_reads_a_part_of_the_shards_and_few_at_a_time(ranks: int) -> None:
    shards, per_shard, batch = 320, 50, 128
    order = sharded_epoch_order(7, 1, [per_shard] * shards, batch)
    partition = Partition(len(order), batch, ranks, even_rows(batch, ranks, None))
    for rank in range(ranks):
        steps = partition.of_rank(order, rank).flatten(1)
        of_steps = [set((step[step >= 0] // per_shard).tolist()) for step in steps]
        lanes = -(-LANES // ranks) + (LANES % ranks > 0)
        assert max(map(len, of_steps)) <= 2 * lanes
        assert len(set().union(*of_steps)) <= shards * lanes / LANES + lanes + 2
        places = [[t for t, seen in enumerate(of_steps) if shard in seen] for shard in range(shards)]
        lasting = [seen[-1] - seen[0] for seen in places if seen]
        assert sum(lasting) / len(lasting) <= 2 * per_shard * LANES / batch, "a shard is done with soon"
    assert min(len(set((step // per_shard).tolist())) for step in torch.split(order, batch)[:-1]) >= LANES - 1


@pytest.mark.parametrize("kind", ["folder", "bucket"])
def test_images_come_by_their_numbers(kind: str, folder: Path, way: Way, pixels: Tensor) -> None:
    root = folder if kind == "folder" else f"s3://{BUCKET}/set/"
    train, test = (Streamed(config(root), side) for side in ("train", "test"))
    assert (len(train), len(test), train.shape) == (TRAIN, TEST, (1, 28, 28))
    assert train.digest() == packed.Packed(folder / "train").digest()
    numbers = torch.tensor([[0, 299], [-1, 61]])
    assert torch.equal(test.rows(numbers), pixels[TRAIN + numbers.clamp(min=0)])
    steps = Partition(TRAIN, 32, 1, 32).of_rank(train.order(3, 1, 32), 0)
    for _ in range(2):
        assert torch.equal(torch.stack(list(train.stream(steps))), pixels[steps.clamp(min=0)])
    assert len(way.shards) == len(set(way.shards)) == (0 if kind == "folder" else SHARDS + 3), "each once"
    train.announce(steps[:0])
    assert not train._shelf._shards


def test_threads_get_the_same_images_from_a_small_cache(way: Way, tmp_path: Path, pixels: Tensor) -> None:
    """Room for some shards only: they are fetched again when their turn comes."""
    largest = packed.shard_bytes(PER_SHARD, 784)
    with pytest.raises(InputError, match=r"--data.cache_gb 0.0002: must be at least 0.00057: 18 shards of 31,\d+ bytes"):
        Streamed(config(cache_gb=0.0002), "train")
    images = Streamed(config(cache_gb=18.5 * largest / 1e9), "train")
    wrong = []

    def look(seed: int) -> None:
        for step in images.order(seed, 1, 100).split(100):
            wrong.extend([seed] * (not torch.equal(images.fetch(step), pixels[step])))

    threads = [threading.Thread(target=look, args=(seed,)) for seed in range(2)]
    for thread in threads:
        thread.start()
    test = Streamed(config(cache_gb=18.5 * largest / 1e9), "test")
    assert torch.equal(torch.cat(list(test.blocks())), pixels[TRAIN:])
    for thread in threads:
        thread.join()
    assert not wrong
    assert len(way.shards) > SHARDS + TEST_SHARDS
    kept = [file.stat().st_size for file in (tmp_path / "cache" / "vae_dist").iterdir()]
    assert sum(kept) <= 18.5 * largest


def test_a_full_disk_is_named(way: Way, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def write(*_: object) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(bucket, "write_atomically", write)
    with pytest.raises(ImagesLost, match=r"cache/vae_dist: No space left on device: .* lower --data.cache_gb, or"):
        Streamed(config(), "train").rows(torch.tensor([5]))


def test_a_folder_that_is_replaced_during_a_run_is_not_read_in_silence(folder: Path, tmp_path: Path, pixels: Tensor) -> None:
    shutil.copytree(folder, tmp_path / "copy")
    images = Streamed(config(tmp_path / "copy"), "train")
    shards = sorted((tmp_path / "copy" / "train").glob("shard-*.bin"))
    first = torch.arange(PER_SHARD)

    shutil.copy(shards[0], shards[1])  # of the same size
    with pytest.raises(ImagesLost, match=r"copy/train/shard-00001.bin: was replaced: its SHA-256 is not the one in index.json"):
        images.rows(first + PER_SHARD)
    os.truncate(shards[2], 5000)
    with pytest.raises(ImagesLost, match=r"copy/train/shard-00002.bin: truncated: it has 5000 bytes, index.json promises 31"):
        images.rows(first + 2 * PER_SHARD)
    shards[3].unlink()
    with pytest.raises(ImagesLost, match=r"copy/train/shard-00003.bin: No such file or directory"):
        images.rows(first + 3 * PER_SHARD)
    os.utime(shards[0])  # copied again, and the same
    assert torch.equal(images.rows(first), pixels[first])


def test_litdata_reads_the_same_files(folder: Path, pixels: Tensor) -> None:
    """What we stream with LitData's downloader is a data set for anybody's LitData."""
    from litdata import StreamingDataset

    dataset = StreamingDataset(str(folder / "train"))
    assert len(dataset) == TRAIN
    assert dataset[777] == pixels[777].numpy().tobytes()
    assert [len(item) for item in itertools.islice(dataset, 3)] == [784] * 3


def quick_limits(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(bucket, "_STALL_SECONDS", 0.3)
    monkeypatch.setattr(bucket, "_FIRST_PAUSE_SECONDS", 0.01)
    monkeypatch.setattr(stream, "_PAUSE_SECONDS", 0.05)
    monkeypatch.setenv("AWS_MAX_ATTEMPTS", "3")


@pytest.mark.parametrize(
    ("fault", "told"),
    [
        ("hang", "Read timeout on endpoint URL"),
        ("vanish", "Could not connect to the endpoint URL"),
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
    assert time.monotonic() - began < 10
    assert all(file.suffix in (".bin", ".lock") for file in (tmp_path / "cache" / "vae_dist").iterdir()), "nothing torn is kept"
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


@pytest.fixture(scope="module")
def options() -> list[object]:
    small = ["--data.name", "stream", "--model.hidden", 40, "--trainer.epochs", 2, "--tracking.wandb", "disabled"]
    return [*small, "--trainer.deterministic", "true", "--checkpoint.every_steps", 3]


@pytest.fixture
def undisturbed(options: list[object], folder: Path, command: Command, tmp_path: Path) -> Path:
    """A run on one process, from a folder."""
    assert command("train", *options, "--data.root", folder, "--output", tmp_path / "undisturbed").status == 0
    return tmp_path / "undisturbed"


def same(run: Path, other: Path) -> bool:
    return (run / "model.safetensors").read_bytes() == (other / "model.safetensors").read_bytes()


def test_a_slow_and_failing_server_changes_nothing_on_two_processes(
    options: list[object], undisturbed: Path, way: Way, tmp_path: Path
) -> None:
    faults: list[str | float] = [0.0, 0.3, "503", 0.0, "cut", 0.1, 0.0, "other"]
    way.fault = lambda number: faults[number % len(faults)]
    run = tmp_path / "run"
    done = launch("vae_dist.train", *options, "--data.root", f"s3://{BUCKET}/set", "--output", run, processes=2)
    assert done.returncode == 0, done.stderr
    assert same(run, undisturbed)
    assert len(way.shards) > len(way.whole) == len(set(way.whole)) == SHARDS + TEST_SHARDS, "both share what either fetched"
    assert [row["n"] for row in records(run)] == [row["n"] for row in records(undisturbed)]


def test_a_run_whose_server_vanishes_says_so_and_goes_on_when_it_is_back(
    options: list[object], undisturbed: Path, way: Way, command: Command, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Two processes in the middle of the first epoch; then one."""
    monkeypatch.setenv("AWS_MAX_ATTEMPTS", "3")
    shards = (sharded_epoch_order(0, 1, [PER_SHARD] * SHARDS, 128) // PER_SHARD).tolist()
    last = max(range(SHARDS), key=shards.index)  # the one that is needed first in a later step than any other
    assert shards.index(last) // 128 > 3

    def fault(number: int) -> str | float:
        if not way.shards[number].endswith(f"train/shard-{last:05d}.bin"):
            return 0.0
        deadline = time.monotonic() + 60
        while not (tmp_path / "run" / "checkpoints" / "step_00000003").exists() and time.monotonic() < deadline:
            time.sleep(0.05)
        return "vanish"

    way.fault = fault
    command_line = [*options, "--data.root", f"s3://{BUCKET}/set", "--output", tmp_path / "run"]
    done = launch("vae_dist.train", *command_line, processes=2)
    assert done.returncode != 0
    told = [line for line in done.stderr.splitlines() if line.startswith("error: ")]
    assert any("shard-" in line and f"at http://127.0.0.1:{way.port}" in line for line in told), done.stderr
    assert any("start the same command again" in line for line in told)
    assert "vae_dist/train.py" not in done.stderr, "no traceback of ours"
    assert json.loads((tmp_path / "run" / "status.json").read_text())["state"] == "failed"
    refused(command("train", *command_line), f"at http://127.0.0.1:{way.port}", "AWS_ENDPOINT_URL")
    way.fault = lambda number: 0.0
    way.open()
    again = command("train", *command_line)
    assert again.status == 0, again.err
    assert re.search(r"going on from .*: 0 epochs, [36] steps", again.out)
    assert same(tmp_path / "run", undisturbed)


@pytest.mark.parametrize(
    ("root", "told"),
    [
        (f"s3://{BUCKET}/nothing", "s3://bucket/nothing/train/index.json"),
        ("s3://no-such-bucket/set", "s3://no-such-bucket/set/train/index.json"),
        ("gs://bucket/set", "must be s3://bucket/prefix, or a folder"),
        ("nowhere", "nowhere/train/index.json"),
    ],
)
def test_a_root_without_images_is_refused(root: str, told: str, way: Way, command: Command, tmp_path: Path) -> None:
    began = time.monotonic()
    refused(command("train", "--data.name", "stream", "--data.root", root, "--output", tmp_path / "run"), told)
    assert time.monotonic() - began < 5


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


def test_an_index_of_others_and_shards_that_are_missing_are_refused(
    folder: Path, server: Server, way: Way, tmp_path: Path
) -> None:
    server.request("PUT", f"/{BUCKET}/other/train/index.json", b'{"chunks": []}')
    with pytest.raises(InputError, match=r"^s3://bucket/other/train/index.json: not an index that"):
        Streamed(config(f"s3://{BUCKET}/other"), "train")
    shutil.copytree(folder, tmp_path / "copy")
    (tmp_path / "copy" / "train" / "shard-00003.bin").unlink()
    with pytest.raises(InputError, match=r"shard-00003.bin: No such file"):
        Streamed(config(tmp_path / "copy"), "train")
    server.upload(tmp_path / "copy", "copy")
    images = Streamed(config(f"s3://{BUCKET}/copy"), "train")
    with pytest.raises(ImagesLost, match=r"train/shard-00003.bin at .*NoSuchKey"):
        images.rows(torch.tensor([3 * PER_SHARD]))


def test_without_the_extra_it_is_named(way: Way, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(__import__("sys").modules, "litdata.streaming.downloader", None)
    with pytest.raises(InputError, match=r"needs LitData .*pip install 'vae_dist\[stream\]'"):
        Streamed(config(), "train")
