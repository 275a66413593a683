"""Folders of pictures: which files, on which side, in which order; CelebA as it is published; what is refused."""

import os
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from vae_dist.config import DataConfig, InputError
from vae_dist.data import folder
from vae_dist.data.folder import Plan


def draw(root: Path, *names: str) -> None:
    """Pictures of a few pixels."""
    for number, name in enumerate(names):
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        Image.new("RGB", (4, 4), (number % 256, 0, 0)).save(root / name, format="png")


def plan(root: Path, **options: Any) -> Plan:
    return folder.plan(DataConfig(name="folder", root=str(root), **options))


def names(plan: Plan) -> tuple[list[str], list[str]]:
    return [picture.path for picture in plan.train], [picture.path for picture in plan.test]


def many_names(n: int) -> list[str]:
    return [f"{number % 3}/{number}.png" for number in range(n)]


def test_pictures_are_found_at_any_depth_and_nothing_else_is(tmp_path: Path) -> None:
    draw(tmp_path, "a.png", "b/c.JPG", "b/d/e.jpeg", "b/d/f.WebP", "b/.hidden.png", ".hidden/g.png", "h.txt")
    (tmp_path / "folder.png").mkdir()
    (tmp_path / "b" / "circle").symlink_to(tmp_path)
    (tmp_path / "elsewhere").mkdir()
    found = plan(tmp_path, test_share=0.5)
    train, test = names(found)
    assert sorted(train + test) == ["a.png", "b/c.JPG", "b/d/e.jpeg", "b/d/f.WebP"]


def test_order_and_split_follow_from_the_names_alone(tmp_path: Path) -> None:
    draw(tmp_path / "one", *many_names(300))
    draw(tmp_path / "two", *reversed(many_names(300)))
    one, two = plan(tmp_path / "one"), plan(tmp_path / "two")
    assert names(one) == names(two)
    assert names(one)[0] != sorted(names(one)[0]), "neighbours on the disk are not neighbours in the set"
    assert 15 <= len(one.test) <= 45


def test_a_new_picture_moves_no_other_to_the_other_side(tmp_path: Path) -> None:
    draw(tmp_path, *many_names(100))
    before = names(plan(tmp_path))
    draw(tmp_path, *many_names(150))
    after = names(plan(tmp_path))
    for side in (0, 1):
        assert [name for name in after[side] if int(name[2:-4]) < 100] == before[side]


def test_a_larger_share_only_adds_to_the_test_images(tmp_path: Path) -> None:
    draw(tmp_path, *many_names(100))
    few, more = (set(names(plan(tmp_path, test_share=share))[1]) for share in (0.1, 0.5))
    assert few < more


@pytest.mark.parametrize(
    ("folders", "test"), [(("test",), "test"), (("val",), "val"), (("valid",), "valid"), (("val", "test"), "test")]
)
def test_folders_train_and_test_are_the_two_sides(folders: tuple[str, ...], test: str, tmp_path: Path) -> None:
    draw(tmp_path, "train/a.png", "train/b/c.png", *(f"{folder}/d.png" for folder in folders))
    found = plan(tmp_path)
    assert sorted(names(found)[0]) == ["train/a.png", "train/b/c.png"]
    assert names(found)[1] == [f"{test}/d.png"]
    assert test in found.split


@pytest.mark.parametrize("change", ["content", "time", "name", "another", "image_size", "channels", "test_share"])
def test_whatever_changes_the_images_changes_the_fingerprint(change: str, tmp_path: Path) -> None:
    draw(tmp_path / "old", *many_names(20))
    before = plan(tmp_path / "old").fingerprint()
    root = (tmp_path / "old").rename(tmp_path / "new")
    assert plan(root).fingerprint() == before, "where it lies does not matter"
    picture = root / "0" / "0.png"
    stat = picture.stat()
    if change == "content":
        picture.write_bytes(picture.read_bytes() + b"\0")
        os.utime(picture, ns=(stat.st_atime_ns, stat.st_mtime_ns))
    elif change == "time":
        os.utime(picture, ns=(stat.st_atime_ns, stat.st_mtime_ns + 1))
    elif change == "name":
        picture.rename(root / "0" / "x.png")
    elif change == "another":
        draw(root, "y.png")
    options: dict[str, Any] = {"image_size": 32, "channels": 1, "test_share": 0.5}
    assert plan(root, **({change: options[change]} if change in options else {})).fingerprint() != before


def test_a_folder_without_pictures_for_both_sides_is_refused(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="nowhere: no such folder"):
        plan(tmp_path / "nowhere")
    with pytest.raises(InputError, match=r"no picture in it or below: no file ends in \.jpg, \.jpeg, \.png, \.webp"):
        plan(tmp_path)
    draw(tmp_path, "one.png")
    with pytest.raises(InputError, match=r"a test_share of 0\.\d+ leaves no (training|test) image of the 1"):
        plan(tmp_path, test_share=0.3)


def write_celeba(home: Path, partition: str) -> None:
    draw(home / "img_align_celeba", *(f"{number:06d}.jpg" for number in range(1, 7)))
    (home / "list_eval_partition.txt").write_text(partition)


PARTITION = "000001.jpg 0\n000002.jpg 1\n000003.jpg 2\n000004.jpg 0\n000005.jpg 2\n000006.jpg 0\n"


@pytest.mark.parametrize("where", [".", "celeba"])
def test_celeba_has_the_published_sides(where: str, tmp_path: Path) -> None:
    write_celeba(tmp_path / where, PARTITION)
    found = folder.plan(DataConfig(name="celeba", root=str(tmp_path)))
    train, test = ([path.removeprefix("img_align_celeba/") for path in side] for side in names(found))
    assert train == ["000001.jpg", "000004.jpg", "000006.jpg"]
    assert test == ["000003.jpg", "000005.jpg"]
    assert found.root == tmp_path / where
    assert found.decoding.crop == 140


def test_a_missing_celeba_names_the_ways_out(tmp_path: Path) -> None:
    with pytest.raises(InputError) as error:
        folder.plan(DataConfig(name="celeba", root=str(tmp_path)))
    told = ("--data.name celeba", "list_eval_partition.txt is missing", str(tmp_path / "celeba"), "--data.root DIR", "glyphs")
    assert all(words in str(error.value) for words in told)
    write_celeba(tmp_path, PARTITION)
    (tmp_path / "img_align_celeba").rename(tmp_path / "other")
    with pytest.raises(InputError, match="img_align_celeba is missing"):
        folder.plan(DataConfig(name="celeba", root=str(tmp_path)))


@pytest.mark.parametrize(
    ("partition", "told"),
    [
        ("000001.jpg 0\n000002.jpg\n", "line 2: not a file name and 0, 1 or 2"),
        ("000001.jpg 0\n000002.jpg 3\n", "line 2"),
        ("../secret.jpg 0\n", "line 1"),
        ("000001.jpg 0\n", "no training or no test images"),
        ("", "no training or no test images"),
    ],
)
def test_a_damaged_partition_is_refused_by_line(partition: str, told: str, tmp_path: Path) -> None:
    write_celeba(tmp_path, partition)
    with pytest.raises(InputError, match=told) as error:
        folder.plan(DataConfig(name="celeba", root=str(tmp_path)))
    assert "list_eval_partition.txt" in str(error.value)


@pytest.mark.parametrize(
    ("options", "told"),
    [
        ({"name": "mnist", "image_size": 32}, r"--data\.image_size 32: must be left out: only --data\.name folder or celeba"),
        ({"name": "packed", "channels": 1}, r"--data\.channels 1: must be left out"),
        ({"name": "glyphs", "unreadable": "skip"}, r"--data\.unreadable skip: must be left out"),
        ({"name": "celeba", "test_share": 0.2}, r"--data\.test_share 0\.2: must be left out: only --data\.name folder has it"),
        ({"name": "packed", "root": "s3://a/b"}, r"--data\.root s3://a/b: must be a folder; .* --data\.name stream"),
        ({"name": "folder", "image_size": 0}, r"--data\.image_size 0: must be at least 1"),
        ({"name": "folder", "test_share": 0.0}, r"--data\.test_share 0\.0: must be between 0 and 1"),
        ({"name": "folder", "test_share": 1.0}, r"--data\.test_share 1\.0: must be between 0 and 1"),
    ],
)
def test_options_that_do_not_fit_are_refused(options: dict[str, Any], told: str) -> None:
    with pytest.raises(InputError, match=told):
        DataConfig(**options)
