"""A recipe is trained, evaluated and held to its band, as a user would: in real processes."""

import json
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.helpers import ROOT, Outcome, begin, environment, refused

Command = Callable[..., Outcome]

RECIPE = """
data:
  root: {root}
model:
  hidden: [40]
trainer:
  epochs: 2
expect:
  figure: {figure}
  iw_samples: 30
  low: {low}
  high: {high}
"""


def verify(*args: object) -> "subprocess.CompletedProcess[str]":
    command = [sys.executable, "-m", "vae_dist.verify", *map(str, args)]
    return subprocess.run(command, cwd=ROOT, env=environment(), capture_output=True, text=True, timeout=180, check=False)


def recipe(folder: Path, root: Path, low: float = 0.0, high: float = 1000.0, figure: str = "loss") -> Path:
    file = folder / "recipe.yaml"
    file.write_text(RECIPE.format(root=root, low=low, high=high, figure=figure))
    return file


@pytest.mark.slow
def test_a_result_inside_its_band_is_status_0_and_one_outside_is_1(small_root: Path, tmp_path: Path) -> None:
    options = ["--output", tmp_path / "run", "--tracking.wandb", "disabled"]
    inside = verify(recipe(tmp_path, small_root, figure="nll"), *options)
    assert inside.returncode == 0, inside.stderr
    found = json.loads((tmp_path / "run" / "evaluation.json").read_text())
    assert found["iw_samples"] == 30
    assert f"test nll {found['nll']:.4f} nats, inside 0 to 1000" in inside.stdout
    outside = verify(recipe(tmp_path, small_root, high=100.0), *options)  # the run is there already
    assert outside.returncode == 1, outside.stderr
    assert f"test loss {found['loss']:.4f} nats, OUTSIDE 0 to 100" in outside.stdout


@pytest.mark.parametrize(
    ("options", "told"),
    [
        (["--trainer.epochs", 1], "trainer.epochs: 2 there, 1 here"),
        (["--expect.high", 99999], "as it stands (expect)"),
        (["--optimizer.lr", 1], "optimizer.lr: 0.001 there, 1.0 here"),
    ],
)
def test_another_job_is_no_test_of_a_recipe(
    options: list[object], told: str, small_root: Path, tmp_path: Path, command: Command
) -> None:
    refused(command("verify", recipe(tmp_path, small_root), "--output", tmp_path / "run", *options), told)
    assert not (tmp_path / "run").exists()


def test_a_recipe_without_a_band_and_no_recipe_are_refused(small_root: Path, tmp_path: Path, command: Command) -> None:
    file = recipe(tmp_path, small_root)
    file.write_text(file.read_text().split("expect:")[0])
    refused(command("verify", file), "has no band")
    refused(command("verify", "--seed", 3), "name the recipe first")
    assert command("verify", "--help").out.startswith("usage: ")


def test_a_run_of_other_epochs_is_no_test_of_a_recipe(
    finished: Path, small_root: Path, tmp_path: Path, command: Command
) -> None:
    file = recipe(tmp_path, small_root)
    file.write_text(file.read_text().replace("epochs: 2", "epochs: 1"))
    refused(command("verify", file, "--output", finished), "a run of 2 epochs; the recipe's are 1")


def test_a_word_to_stop_reaches_the_training(small_root: Path, tmp_path: Path) -> None:
    file = recipe(tmp_path, small_root)
    file.write_text(file.read_text().replace("epochs: 2", "epochs: 500"))
    run = tmp_path / "run"
    job = begin("vae_dist.verify", file, "--output", run, "--tracking.wandb", "disabled")
    with job:
        while job.poll() is None and not (run / "status.json").is_file():
            time.sleep(0.05)
        time.sleep(0.5)
        job.terminate()
        assert job.wait(60) == 75
    assert json.loads((run / "status.json").read_text())["state"] == "interrupted"


def test_status_of_what_fails_is_passed_on(small_root: Path, tmp_path: Path, command: Command) -> None:
    outcome = command("verify", recipe(tmp_path, small_root), "--data.root", tmp_path / "nowhere", "--output", tmp_path / "run")
    assert outcome.status == 2
