"""What a report makes of a run's folder: unfinished, long, damaged, or not to be had; and what it refuses."""

import hashlib
import json
import re
import shutil
from collections.abc import Callable
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from tests.helpers import Outcome, refused, write_idx_set
from tests.html_page import reported
from vae_dist.checkpoint import to_bytes
from vae_dist.data import glyphs
from vae_dist.report.facts import Facts, read, thinned
from vae_dist.run import RunFolder
from vae_dist.tracking import read_rows

Command = Callable[..., Outcome]


@pytest.fixture
def run(trained: Path, tmp_path: Path) -> Path:
    """A copy of the trained run, for its own report."""
    return Path(shutil.copytree(trained, tmp_path / "a run", ignore=shutil.ignore_patterns("wandb")))


def edit_status(run: Path, **changes: object) -> None:
    status = RunFolder(run).status()
    (run / "status.json").write_text(json.dumps(status | changes))


def test_without_the_data_set_all_else_is_there(run: Path, command: Command, tmp_path: Path) -> None:
    page = reported(command, run, "--data.root", tmp_path / "nowhere")
    for anchor in ("latent-space", "worst-reconstructions", "evaluation"):
        assert "None: --data.name mnist: train-images-idx3-ubyte is missing" in page.section(anchor)
    assert "Latent map (PCA)" not in page.figures()
    assert {"Loss", "KL by latent dimension", "Images per second"} <= page.figures().keys()
    assert len(page.all("img")) == 9
    assert "not a log-likelihood; n = 300" in page.one("header").text


def test_other_test_images_than_the_runs_are_not_taken_for_them(run: Path, command: Command, tmp_path: Path) -> None:
    write_idx_set(tmp_path / "other", *glyphs.draw(0, 20), *glyphs.draw(5000, 5300))
    page = reported(command, run, "--data.root", tmp_path / "other")
    assert "are others than the run's" in page.section("latent-space")
    assert "Latent map (PCA)" not in page.figures()


def test_unfinished_and_failed_runs_say_their_state(run: Path, command: Command) -> None:
    edit_status(run, state="failed", reason="the loss is not finite any more: step 17")
    assert "failed the loss is not finite any more: step 17" in reported(command, run).one("header").text
    shutil.rmtree(run / "checkpoints")
    shutil.rmtree(run / "images")
    for name in ("model.safetensors", "config.json", "metrics.jsonl"):
        (run / name).unlink()
    edit_status(run, state="running", reason="training")
    page = reported(command, run)
    assert "running training" in page.one("header").text
    assert "no epoch is complete yet" in page.one("header").text
    assert page.figures() == {}
    for anchor, words in (
        ("curves", "No step has been recorded yet"),
        ("pictures", "No picture has been drawn yet"),
        ("latent-space", "no weights there"),
        ("speed", "Nothing was timed yet"),
        ("evaluation", f"None: {run}: no weights there"),
    ):
        assert words in page.section(anchor)
    (run / "status.json").unlink()
    assert "unknown" in reported(command, run).one("header").text


def test_a_run_of_an_older_version_says_that_nothing_tells_of_its_starts(run: Path, command: Command) -> None:
    RunFolder(run).starts.unlink()
    page = reported(command, run)
    assert "Nothing tells of this run's starts" in page.section("provenance")
    assert "Latent map (PCA)" in page.figures()


def test_a_run_taken_up_again_tells_of_each_job(quick: list[object], command: Command, tmp_path: Path) -> None:
    run = tmp_path / "run"
    assert command("train", *quick, "--trainer.epochs", 1, "--output", run).status == 0
    assert command("train", *quick, "--output", run).status == 0
    page = reported(command, run)
    assert re.search(r"run \S+Z 0 1 1 [\d,]+ .* run \S+Z 8 1 1 [\d,]+", page.section("speed"))
    [mark] = [trace for trace in page.figures()["Images per second"]["data"] if trace["name"] == "taken up again"]
    assert mark["x"] == [2000], "the first row of the second job"
    assert "Job 2: started" in page.section("provenance")


@pytest.mark.parametrize(
    ("damage", "told"),
    [
        (lambda run: (run / "config.yaml").unlink(), "is the folder of a run?"),
        (lambda run: (run / "metrics.jsonl").write_text("{}\n"), "metrics.jsonl: line 1 is not a row"),
        (lambda run: edit_rows(run, bce="low"), "metrics.jsonl: bce of step 4"),
        (lambda run: edit_rows(run, kld_per_dim=[1.0]), "metrics.jsonl: kld_per_dim of step 4"),
        (lambda run: edit_rows(run, images_seen=None), "metrics.jsonl: images_seen of step 4"),
        (lambda run: edit_rows(run, n=None), "metrics.jsonl: n of step 4"),
        (lambda run: edit_rows(run, epoch=0), "metrics.jsonl: epoch of step 4"),
        (lambda run: (run / "images" / "sample_2.png").write_text("no picture"), "sample_2.png: not a PNG"),
        (lambda run: (run / "evaluation.json").write_text("[]"), "evaluation.json: not what vae_dist.evaluate writes"),
        (lambda run: (run / "evaluation.json").write_text('{"nll": "low"}'), "evaluation.json"),
        (lambda run: RunFolder(run).starts.write_text("{}\n"), "starts.jsonl: line 1"),
    ],
)
def test_a_folder_that_is_no_whole_run_is_refused(
    damage: Callable[[Path], object], told: str, run: Path, command: Command
) -> None:
    damage(run)
    refused(command("report", run), told.replace("is the folder", f"is {run} the folder"))
    assert not (run / "report.html").exists()


def edit_rows(run: Path, **changes: object) -> None:
    rows = read_rows(run / "metrics.jsonl")
    (run / "metrics.jsonl").write_text("".join(json.dumps(row | changes) + "\n" for row in rows))


def test_nothing_but_a_report_is_overwritten(run: Path, command: Command, tmp_path: Path) -> None:
    foreign = tmp_path / "thesis.html"
    foreign.write_text("<!doctype html><title>years of work</title>")
    refused(command("report", run, "--out", foreign), "--out", "thesis.html", "name another file")
    assert foreign.read_text() == "<!doctype html><title>years of work</title>"
    refused(command("report", run, "--out", tmp_path), "is a folder; name a file")
    for _ in range(2):
        assert reported(command, run).one("h1").text == "a run"


def test_a_place_that_cannot_be_written_is_refused_before_the_work(run: Path, command: Command) -> None:
    (run.parent / "file").write_text("")
    (run / "model.safetensors").write_text("")  # of which the work would tell
    out = run.parent / "file" / "new" / "x.html"
    refused(command("report", run, "--out", out), f"--out {out}: cannot be written there", "name another file")
    assert "no latent map" in command("report", run, "--out", run.parent / "new" / "x.html").out


def test_weights_that_are_no_numbers_are_said_to_be_so(run: Path, command: Command) -> None:
    weights = load_file(run / "model.safetensors")
    (run / "model.safetensors").write_bytes(to_bytes({name: tensor * torch.nan for name, tensor in weights.items()}))
    description = json.loads((run / "config.json").read_text())
    description["sha256"] = hashlib.sha256((run / "model.safetensors").read_bytes()).hexdigest()
    (run / "config.json").write_text(json.dumps(description))
    page = reported(command, run)
    for anchor in ("latent-space", "worst-reconstructions"):
        assert "None: the model's figures of the test images are not finite" in page.section(anchor)


def test_runs_must_be_named_once_and_the_file_of_several_too(run: Path, command: Command, tmp_path: Path) -> None:
    out = ["--out", tmp_path / "x.html"]
    for args, told in (
        ([], "name the folder of a run"),
        ([run, run.parent / "." / "a run", *out], "is named twice"),
        ([run, tmp_path / "nowhere"], "--out: name the file"),
    ):
        outcome = command("report", *args)
        assert outcome.status == 2
        assert told in " ".join(outcome.err.replace("│", " ").split())
    refused(command("report", run, tmp_path / "nowhere", *out), "nowhere")
    refused(command("report", run / "checkpoints" / "step_00000024"), "the folder of a run?")
    assert not (tmp_path / "x.html").exists()


def test_it_is_the_work_of_one_process(run: Path, command: Command, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RANK", "0")
    refused(command("report", run), "one process")


def test_runs_of_one_name_are_called_by_their_paths(run: Path, command: Command, tmp_path: Path) -> None:
    other = Path(shutil.copytree(run, tmp_path / "elsewhere" / "a run"))
    page = reported(command, run, other, "--out", tmp_path / "both.html")
    assert {trace["name"] for trace in page.figures()["Loss"]["data"]} == {str(run), str(other)}


def test_long_runs_are_thinned_evenly_with_both_ends(run: Path) -> None:
    assert thinned([1, 2, 3], 3) == [1, 2, 3]
    assert thinned(list(range(10)), 4) == [0, 3, 6, 9]
    assert thinned(list(range(100_000)))[:: 2000 - 1] == [0, 99_999]
    picture = (run / "images" / "sample_1.png").read_bytes()
    for epoch in range(4, 90):
        (run / "images" / f"sample_{epoch}.png").write_bytes(picture)
    epochs = [found.epoch for found in facts(run).pictures["sample"]]
    assert (epochs[0], epochs[-1], len(epochs)) == (1, 89, 40)
    steps = {after - before for before, after in pairwise(epochs)}
    assert steps <= {2, 3}


def facts(run: Path) -> Facts:
    return read(run, "it")


def test_minutes_are_those_of_training_and_evaluation(tmp_path: Path, run: Path) -> None:
    def row(split: str, images: int, **times: float) -> dict[str, Any]:
        return {"split": split, "epoch": 1, "step": images, "images_seen": images, "loss": 1.0, "n": 1} | times

    rows = [
        row("train", 600, images_per_second=10),
        row("train", 1200, images_per_second=20),
        row("train", 1800, images_per_second=10, train_seconds=150),
        row("test", 1800, test_seconds=30),
        row("train", 1860, images_per_second=1),
    ]
    (run / "metrics.jsonl").write_text("".join(json.dumps(each) + "\n" for each in rows))
    assert [each["minutes"] for each in facts(run).rows] == pytest.approx([1, 1.5, 2.5, 3, 4])
