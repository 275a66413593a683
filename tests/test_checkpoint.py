"""A checkpoint is whole or absent: whatever happens to its files is noticed, and the newest whole one is found."""

import json
import os
import shutil
import stat
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from vae_dist import checkpoint
from vae_dist.checkpoint import Checkpoint, Damaged, folder_of_step, newest_whole, prune, read, write
from vae_dist.config import InputError

FILES = ["config.json", "model.safetensors", "trainer.json", "trainer.safetensors"]


def example(step: int) -> Checkpoint:
    torch.manual_seed(step)
    model = {"encoder.weight": torch.randn(4, 3), "decoder.bias": torch.randn(2)}
    return Checkpoint(
        {"seed": step}, model, {"optimizer.encoder.weight.exp_avg": torch.randn(4, 3)}, {"step": step, "sum": 0.1 + 0.2}
    )


@pytest.fixture
def three(tmp_path: Path) -> Path:
    for step in (5, 10, 100):
        write(folder_of_step(tmp_path, step), example(step))
    return tmp_path


def contents(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def test_what_is_written_is_read(three: Path) -> None:
    saved, expected = read(three / "step_00000010"), example(10)
    assert saved.config == expected.config
    assert {key: saved.progress[key] for key in expected.progress} == expected.progress
    for name, tensor in expected.model.items() | expected.trainer.items():
        assert torch.equal((saved.model | saved.trainer)[name], tensor)


def test_save_load_save_gives_identical_bytes(three: Path, tmp_path: Path) -> None:
    saved = read(three / "step_00000010")
    write(tmp_path / "again" / "step_00000010", saved)
    assert contents(tmp_path / "again" / "step_00000010") == contents(three / "step_00000010")


def test_files_are_as_readable_as_the_umask_says(three: Path) -> None:
    mask = os.umask(0)
    os.umask(mask)
    for path in (three / "step_00000010").iterdir():
        assert stat.S_IMODE(path.stat().st_mode) == 0o666 & ~mask


def test_the_newest_whole_checkpoint_is_found(three: Path) -> None:
    assert newest_whole(three) == (three / "step_00000100", [])
    assert newest_whole(three / "nothing there") == (None, [])


def flip(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)


def replace_by_folder(path: Path) -> None:
    path.unlink()
    path.mkdir()


DAMAGES: dict[str, Callable[[Path], object]] = {
    "truncated": lambda path: path.write_bytes(path.read_bytes()[:-1]),
    "emptied": lambda path: path.write_bytes(b""),
    "removed": lambda path: path.unlink(),
    "a bit flipped": flip,
    "another step's": lambda path: shutil.copy(path.parent.parent / "step_00000005" / path.name, path),
    "a folder": replace_by_folder,
    "binary": lambda path: path.write_bytes(b"\x80\x04\x95"),
    "other JSON": lambda path: path.write_text("[1, 2]"),
}


@pytest.mark.parametrize("damage", DAMAGES)
@pytest.mark.parametrize("file", FILES)
def test_a_damaged_file_is_named_and_the_checkpoint_passed_over(file: str, damage: str, three: Path) -> None:
    DAMAGES[damage](three / "step_00000100" / file)
    found, problems = newest_whole(three)
    assert found == three / "step_00000010"
    assert len(problems) == 1
    assert "step_00000100" in problems[0]
    assert file in problems[0]


@given(file=st.sampled_from(FILES), data=st.data())
@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_any_flipped_bit_and_any_truncation_is_noticed(file: str, data: st.DataObject, three: Path) -> None:
    path = three / "step_00000100" / file
    whole = path.read_bytes()
    try:
        position = data.draw(st.integers(0, 8 * len(whole) - 1))
        flipped = bytearray(whole)
        flipped[position // 8] ^= 1 << position % 8
        for content in (bytes(flipped), whole[: position // 8]):
            path.write_bytes(content)
            with pytest.raises(Damaged):
                read(path.parent)
    finally:
        path.write_bytes(whole)
    read(path.parent)


def test_a_checkpoint_under_another_steps_name_is_damaged(three: Path) -> None:
    (three / "step_00000100").rename(three / "step_00000200")
    with pytest.raises(Damaged, match="of step 100"):
        read(three / "step_00000200")


def test_where_none_is_whole_nothing_starts_over(three: Path) -> None:
    for folder in three.iterdir():
        (folder / "model.safetensors").write_bytes(b"")
    with pytest.raises(InputError, match=r"no checkpoint is whole .*step_00000100.*step_00000010.*step_00000005"):
        newest_whole(three)


def test_an_unfinished_folder_counts_for_nothing_and_is_replaced(three: Path) -> None:
    left = three / ".step_00000200.unfinished"
    left.mkdir()
    (left / "model.safetensors").write_bytes(b"half")
    assert newest_whole(three)[0] == three / "step_00000100"
    write(three / "step_00000200", example(200))
    assert not left.exists()
    assert newest_whole(three)[0] == three / "step_00000200"


def test_a_failed_write_leaves_nothing_behind(three: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(descriptor: int) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(OSError, match="No space left"):
        write(three / "step_00000200", example(200))
    assert sorted(path.name for path in three.iterdir()) == ["step_00000005", "step_00000010", "step_00000100"]


def test_a_damaged_checkpoint_is_replaced_when_its_step_comes_again(three: Path) -> None:
    flip(three / "step_00000100" / "model.safetensors")
    write(three / "step_00000100", example(100))
    assert newest_whole(three) == (three / "step_00000100", [])


@pytest.mark.parametrize(("keep", "left"), [(1, [100]), (2, [10, 100]), (3, [5, 10, 100]), (9, [5, 10, 100])])
def test_prune_keeps_the_newest(keep: int, left: list[int], three: Path) -> None:
    prune(three / "step_00000100", keep)
    assert [json.loads((path / "trainer.json").read_text())["step"] for path in checkpoint.list_checkpoints(three)] == left


def test_prune_never_prefers_a_damaged_later_checkpoint_to_the_one_just_written(three: Path) -> None:
    flip(three / "step_00000100" / "model.safetensors")
    (three / ".step_00000007.unfinished").mkdir()
    write(three / "step_00000012", example(12))
    prune(three / "step_00000012", keep=1)
    assert [path.name for path in three.iterdir()] == ["step_00000012"]


@pytest.mark.parametrize("content", [b"", b"\x80\x04\x95", b"\xff" * 8 + b"{}", b"\x02" + b"\0" * 7 + b"{}"[:1]])
def test_what_is_no_safetensors_file_is_refused(content: bytes, tmp_path: Path) -> None:
    (tmp_path / "model.safetensors").write_bytes(content)
    with pytest.raises(InputError, match="not a readable safetensors file"):
        checkpoint.read_tensors(tmp_path / "model.safetensors")
