"""What is refused: one readable error, status 2, and nothing overwritten; and what fails, without harm to what was saved."""

import json
import shutil
import subprocess
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.helpers import ROOT, Outcome, arguments, environment, everything, records, refused, write_idx_set
from vae_dist.data import glyphs
from vae_dist.options import parse
from vae_dist.run import RunFolder

Command = Callable[..., Outcome]


@pytest.mark.parametrize(
    ("options", "told"),
    [
        (["--seed", 1], "seed: 0 there, 1 here"),
        (["--data.batch_size", 64], "data.batch_size: 128 there, 64 here"),
        (["--trainer.precision", "bf16"], "trainer.precision: fp32 there, bf16 here"),
        (["--resume", "never"], "--resume never"),
    ],
)
def test_a_folder_with_another_run_is_refused(
    options: list[object], told: str, finished: Path, quick: list[object], command: Command
) -> None:
    before = everything(finished)
    refused(command("train", *quick, "--output", finished, *options), told, str(finished))
    assert everything(finished) == before


def test_compilation_without_a_compiler_is_refused(
    quick: list[object], command: Command, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("CXX", "no-such-compiler")
    refused(
        command("train", *quick, "--output", tmp_path / "run", "--trainer.compile", "true"), "--trainer.compile true", "CXX"
    )
    assert not (tmp_path / "run").exists()


def test_a_baseline_must_be_a_run_of_the_same_job_on_one_process(
    finished: Path, quick: list[object], command: Command, tmp_path: Path
) -> None:
    def with_baseline(folder: Path, *more: object) -> Outcome:
        return command("train", *quick, "--output", tmp_path / "new", "--tracking.baseline", folder, *more)

    refused(with_baseline(tmp_path / "nowhere"), "nowhere")
    refused(with_baseline(finished, "--seed", 1), "--tracking.baseline", "seed: 0 there, 1 here")
    metrics = finished / "metrics.jsonl"
    metrics.write_text(metrics.read_text().replace('"processes": 1', '"processes": 2'))
    refused(with_baseline(finished), "--tracking.baseline", "on one process")
    assert not (tmp_path / "new").exists()


def test_a_damaged_newest_checkpoint_is_passed_over_and_named(finished: Path, quick: list[object], command: Command) -> None:
    final = (finished / "model.safetensors").read_bytes()
    (finished / "checkpoints" / "step_00000016" / "trainer.safetensors").write_bytes(b"broken")
    outcome = command("train", *quick, "--output", finished)
    assert outcome.status == 0
    assert "step_00000016/trainer.safetensors" in outcome.out
    assert f"going on from {finished}/checkpoints/step_00000008" in outcome.out
    assert (finished / "model.safetensors").read_bytes() == final


def test_where_no_checkpoint_is_whole_the_run_is_refused(finished: Path, quick: list[object], command: Command) -> None:
    for folder in (finished / "checkpoints").iterdir():
        (folder / "trainer.json").write_text("{}")
    before = everything(finished)
    refused(command("train", *quick, "--output", finished), "no checkpoint is whole", "step_00000008/trainer.json")
    assert everything(finished) == before


def test_a_folder_in_use_or_not_a_run_is_refused(quick: list[object], command: Command, tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    refused(command("train", *quick, "--output", tmp_path / "file"), "is a file")
    refused(command("train", *quick, "--output", tmp_path), "holds files but no run")
    refused(command("train", *quick, "--output", tmp_path / "file" / "below"), str(tmp_path / "file"))
    busy = RunFolder(tmp_path / "busy")
    options = [*map(str, quick), "--output", str(busy.path)]
    busy.claim(parse(options))
    refused(command("train", *options), "another job is running there")
    busy.release()
    assert command("train", *options).status == 0


def test_what_cannot_be_loaded_is_refused(finished: Path, command: Command, tmp_path: Path) -> None:
    refused(command("evaluate", tmp_path / "nothing"), "nothing: no weights there")
    (finished / "model.safetensors").write_bytes(b"\x80\x04\x95 a pickle")
    refused(command("evaluate", finished), "model.safetensors: not a readable safetensors file")
    refused(command("generate", finished), "model.safetensors: not a readable safetensors file")
    shutil.copy(finished / "checkpoints" / "step_00000008" / "model.safetensors", finished)
    refused(command("evaluate", finished), "model.safetensors: damaged")
    for description in ('{"config": 3}', "{}", "[]", "nothing", '{"image_shape": [0]}'):
        (finished / "config.json").write_text(description)
        refused(command("evaluate", finished), "config.json")
    weights = finished / "checkpoints" / "step_00000008" / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-1] + b"x")
    refused(command("evaluate", weights.parent), "step_00000008/model.safetensors: its SHA-256")


def test_images_of_another_shape_or_nowhere_are_refused(finished: Path, command: Command, tmp_path: Path) -> None:
    images, labels = glyphs.draw(0, 20)
    write_idx_set(tmp_path / "narrow", images[..., :20], labels, images[..., :20], labels)
    for name in ("evaluate", "generate"):
        refused(command(name, finished, "--data.root", tmp_path / "narrow"), "1x28x20 pixels, where 1x28x28")
        refused(command(name, finished, "--data.root", tmp_path / "nowhere"), "--data.name glyphs")


def test_data_that_changed_under_a_run_is_refused(quick: list[object], command: Command, tmp_path: Path) -> None:
    root = tmp_path / "data"
    write_idx_set(root, *glyphs.draw(0, 200), *glyphs.draw(200, 250))
    options = [*quick, "--data.root", root, "--output", tmp_path / "run"]
    assert command("train", *options).status == 0
    write_idx_set(root, *glyphs.draw(0, 150), *glyphs.draw(200, 250))
    refused(command("train", *options, "--trainer.epochs", 3), "trained on 200 images, but there are 150")
    write_idx_set(root, *glyphs.draw(1000, 1200), *glyphs.draw(200, 250))
    refused(command("train", *options, "--trainer.epochs", 3), "trained on other images than those in --data.root")
    images, labels = glyphs.draw(200, 250)
    write_idx_set(root, *glyphs.draw(0, 200), images[..., :20], labels)
    refused(command("train", *options, "--trainer.epochs", 3), "images of 1x28x20 pixels, where 1x28x28 are expected")


def test_a_folder_of_something_else_is_refused_before_any_picture_is_decoded(command: Command, tmp_path: Path) -> None:
    (tmp_path / "pictures").mkdir()
    (tmp_path / "pictures" / "no picture.png").write_text("at all")
    options = ["--data.name", "folder", "--data.root", tmp_path / "pictures", "--output", tmp_path]
    refused(command("train", *options), "holds files but no run")


def test_what_this_machine_lacks_is_refused(quick: list[object], command: Command, tmp_path: Path) -> None:
    refused(command("train", *quick, "--output", tmp_path / "a", "--trainer.precision", "fp16"), "--trainer.precision fp16")
    refused(command("train", *quick, "--output", tmp_path / "a", "--tracking.wandb", "online"), "--tracking.wandb online")


def test_a_diverging_run_fails_and_keeps_its_last_good_checkpoint(
    quick: list[object], command: Command, tmp_path: Path
) -> None:
    assert command("train", *quick, "--output", tmp_path).status == 0
    before = everything(tmp_path / "checkpoints")
    root = tmp_path / "checkpoints" / "step_00000016"
    other = tmp_path / "other"
    outcome = command("train", *quick, "--output", other, "--optimizer.kind", "sgd", "--optimizer.lr", 1e6)
    assert outcome.status == 1
    assert "not finite" in outcome.err
    assert json.loads((other / "status.json").read_text())["state"] == "failed"
    assert not (other / "checkpoints").exists()
    assert everything(tmp_path / "checkpoints") == before
    assert root.exists()


def test_a_run_that_breaks_in_an_epochs_last_step_saves_nothing(quick: list[object], command: Command, tmp_path: Path) -> None:
    outcome = command("train", *quick, "--output", tmp_path, "--data.batch_size", 1000, "--optimizer.lr", 1e30)
    assert outcome.status == 1
    assert "the test loss is not finite" in outcome.err
    assert not (tmp_path / "checkpoints").exists()


def test_a_batch_larger_than_the_data_set_is_the_whole_set(quick: list[object], command: Command, tmp_path: Path) -> None:
    for batch in (1000, 10**12):
        assert command("train", *quick, "--data.batch_size", batch, "--output", tmp_path / str(batch)).status == 0
    assert records(tmp_path / "1000") == records(tmp_path / str(10**12))


def test_a_full_disk_ends_the_run_with_one_error_and_nothing_half_written(small_root: Path, tmp_path: Path) -> None:
    """A limit on the size of files stands in for the disk: the weights do not fit."""
    options = ["--data.root", small_root, "--tracking.wandb", "disabled", "--output", tmp_path / "run"]
    limited = ["bash", "-c", 'ulimit -f 500; exec "$@"', "-", *arguments("vae_dist.train", *options)]
    done = subprocess.run(limited, cwd=ROOT, env=environment(), capture_output=True, text=True, timeout=100, check=False)
    refused(Outcome(done.returncode, done.stdout, done.stderr), "File too large", "step_00000008")
    assert list((tmp_path / "run" / "checkpoints").iterdir()) == []
    assert json.loads((tmp_path / "run" / "status.json").read_text())["state"] == "failed"
