"""Images in a bucket: the same training as from any other place, whatever happens on the way, or an end that says why."""

import itertools
import json
import os
import re
import shutil
import time
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from tests.helpers import Outcome, launch, records, refused
from tests.object_storage import BUCKET, PER_SHARD, SHARDS, TEST, TEST_SHARDS, TRAIN, Server, Way, config
from vae_dist.config import ImagesLost, InputError
from vae_dist.data import packed
from vae_dist.data.order import LANES, Partition, even_rows, sharded_epoch_order
from vae_dist.data.stream import Streamed

Command = Callable[..., Outcome]


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


@pytest.mark.slow
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
    assert any("start the same command again; a training goes on from its newest checkpoint" in line for line in told)
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
    with pytest.raises(InputError, match=r"needs LitData .*pip install '\.\[stream\]'"):
        Streamed(config(), "train")
