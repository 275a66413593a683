"""Pictures decoded once on a machine: again only where they changed, mended in a damaged cache, and not kept for ever."""

import os
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from PIL import Image

from vae_dist import loading
from vae_dist.config import DataConfig, InputError
from vae_dist.data import cache, folder, packed, packing, sources
from vae_dist.data.images import Images
from vae_dist.data.photos import decode

PICTURES, SIZE, IN_SHARD = 30, 4, 7
DAY = 24 * 3600


@pytest.fixture(autouse=True)
def small(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Shards of seven images, and a cache of one's own."""
    monkeypatch.setattr(packed, "SHARD_BYTES", IN_SHARD * (3 * SIZE**2 + 8))
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))


@pytest.fixture
def pictures(tmp_path: Path) -> Path:
    root = tmp_path / "pictures"
    root.mkdir()
    for number in range(PICTURES):
        paint(root / f"{number}.png", number)
    return root


def paint(file: Path, red: int) -> None:
    Image.new("RGB", (6, 6), (red, 0, 0)).save(file)


def config(root: Path, **options: Any) -> DataConfig:
    return DataConfig(name="folder", root=str(root), image_size=SIZE, **options)


def prepared(root: Path, **options: Any) -> Path:
    """As another process would find it."""
    cache.prepare.cache_clear()
    home = sources.fetch_missing(config(root, **options))
    assert home is not None
    return home


def all_of(images: Images) -> torch.Tensor:
    return images.rows(torch.arange(len(images)))


def train_images(root: Path, home: Path) -> Images:
    return sources.load(config(root), train=True, home=home)


def test_a_folder_is_decoded_once(pictures: Path, capsys: Any) -> None:
    home = prepared(pictures)
    assert f"into {home}" in capsys.readouterr().out, "the line that says where it goes"
    assert prepared(pictures) == home
    assert capsys.readouterr().out == ""


def test_two_jobs_at_once_decode_once(pictures: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any) -> None:
    calls = []

    def slow(*args: Any) -> bytes:
        calls.append(args)
        time.sleep(0.002)
        return decode(*args)

    monkeypatch.setattr(packing, "decode", slow)
    cache.prepare.cache_clear()
    with ThreadPoolExecutor(2) as jobs:
        home, _ = jobs.map(cache.prepare, [config(pictures)] * 2)
    assert len(calls) == PICTURES
    assert "waiting for another process" in capsys.readouterr().out
    reds = [int(Path(picture.path).stem) for picture in folder.plan(config(pictures)).train]
    assert all_of(train_images(pictures, home))[:, 0, 0, 0].tolist() == reds


def test_of_a_changed_folder_only_the_shard_of_the_changed_picture_is_decoded(pictures: Path, capsys: Any) -> None:
    old = prepared(pictures)
    before = all_of(train_images(pictures, old))
    changed = folder.plan(config(pictures)).train[IN_SHARD]
    paint(pictures / changed.path, 255)
    capsys.readouterr()
    new = prepared(pictures)
    assert f"decoding the last {IN_SHARD} of {PICTURES} pictures" in capsys.readouterr().out
    after = all_of(train_images(pictures, new))
    assert (before != after).flatten(1).any(1).nonzero().flatten().tolist() == [IN_SHARD]
    assert torch.equal(all_of(train_images(pictures, old)), before), "a training that began before reads on"
    assert (new / "train" / "shard-00000.bin").samefile(old / "train" / "shard-00000.bin"), "and takes no room twice"


@pytest.mark.parametrize("links", [True, False])
def test_a_disk_without_links_only_costs_time(links: bool, pictures: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: object) -> None:
        raise OSError

    old = prepared(pictures)
    (pictures / folder.plan(config(pictures)).test[0].path).touch()
    if not links:
        monkeypatch.setattr(os, "link", refuse)
    new = prepared(pictures)
    assert new != old
    assert torch.equal(all_of(train_images(pictures, new)), all_of(train_images(pictures, old)))


def cut(file: Path) -> None:
    file.write_bytes(file.read_bytes()[:-1])


@pytest.mark.parametrize(
    ("name", "damage", "decoded"),
    [
        ("shard-00001.bin", Path.unlink, IN_SHARD),
        ("shard-00001.bin", cut, IN_SHARD),
        ("index.json", cut, 0),
        ("index.json", Path.unlink, 0),
    ],
)
def test_a_damaged_cache_is_mended(
    name: str, damage: Callable[[Path], object], decoded: int, pictures: Path, capsys: Any
) -> None:
    home = prepared(pictures)
    before = all_of(train_images(pictures, home))
    damage(home / "train" / name)
    capsys.readouterr()
    assert prepared(pictures) == home
    assert capsys.readouterr().out.count(f"decoding the last {decoded} of") == (decoded > 0)
    assert torch.equal(all_of(train_images(pictures, home)), before)


def test_what_no_start_has_used_for_a_month_is_removed(pictures: Path, tmp_path: Path) -> None:
    old, used, recent = (prepared(pictures, test_share=share) for share in (0.2, 0.3, 0.4))
    other = tmp_path / "cache" / "vae_dist" / "other"
    other.mkdir()
    for home, days in ((old, 31), (used, 31), (recent, 29), (other, 31)):
        os.utime(home, (0, time.time() - days * DAY))
    mapped = train_images(pictures, old)
    before = all_of(mapped)
    prepared(pictures, test_share=0.3)
    assert [home.exists() for home in (old, used, recent, other)] == [False, True, True, True]
    assert torch.equal(all_of(mapped), before), "who has it mapped reads on"


def test_a_rank_that_comes_late_needs_no_look_at_the_pictures(pictures: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    home = prepared(pictures)
    paint(pictures / "0.png", 255)
    monkeypatch.setattr(folder, "plan", lambda _: pytest.fail("millions of files may be there"))
    assert len(train_images(pictures, home)) == len(all_of(train_images(pictures, home)))


def test_training_and_test_images_are_of_one_moment(pictures: Path) -> None:
    home = prepared(pictures)
    paint(pictures / "0.png", 255)
    assert sources.fetch_missing(config(pictures)) == home


@pytest.mark.parametrize(("rank", "local_rank", "fetches"), [(0, 0, 1), (1, 1, 0), (2, 0, 1), (3, 1, 0)])
def test_one_rank_of_each_machine_looks_for_all(
    rank: int, local_rank: int, fetches: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Two machines of two processes each, with homes of their own."""
    found: list[Path | None] = [Path("/first"), None, Path("/second"), None]
    asked = []

    def fetch_missing(_: DataConfig) -> Path | None:
        asked.append(rank)
        return found[rank]

    def gather(mine: list[Path | None]) -> list[Path | None]:
        assert mine == [found[rank]]
        return found

    monkeypatch.setattr(loading, "together", lambda _, action: action())
    monkeypatch.setattr(loading, "on_first_rank", lambda _, action: action() if rank == 0 else None)
    monkeypatch.setattr(loading, "gather_object", gather)
    monkeypatch.setattr(sources, "fetch_missing", fetch_missing)
    places = {"process_index": rank, "local_process_index": local_rank}
    accelerator: Any = SimpleNamespace(is_main_process=rank == 0, is_local_main_process=local_rank == 0, **places)
    assert loading._fetched(config(Path("pictures")), accelerator) == found[rank - local_rank]
    assert len(asked) == fetches


def test_an_unwritable_cache_is_one_error(pictures: Path, tmp_path: Path) -> None:
    (tmp_path / "cache").touch()
    with pytest.raises(InputError, match="set XDG_CACHE_HOME"):
        prepared(pictures)
