"""Any number of processes, started as users start them, does what one does."""

import json
import re
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.helpers import ROOT, Outcome, environment, launch, records
from tests.settings import SETTINGS
from tests.wandb_file import offline_runs
from vae_dist.tracking import read_rows

Seen = dict[str, dict[str, Any]]


@pytest.fixture(scope="module")
def seen(tmp_path_factory: pytest.TempPathFactory) -> dict[int, Seen]:
    """What the worker saw at each number of processes."""
    observed = {}
    for processes in (1, 2, 3, 4):
        folder = tmp_path_factory.mktemp(f"world_{processes}_")
        done = launch("tests.worker", folder, processes=processes)
        assert done.returncode == 0, done.stderr[-3000:]
        observed[processes] = json.loads((folder / f"{processes}.json").read_text())
    return observed


@pytest.mark.parametrize("setting", SETTINGS)
@pytest.mark.parametrize("processes", [2, 3, 4])
def test_gradients_and_losses_agree_with_one_process(setting: str, processes: int, seen: dict[int, Seen]) -> None:
    one, many = seen[1][setting], seen[processes][setting]
    expected, gradient = torch.tensor(one["gradient"]).double(), torch.tensor(many["gradient"]).double()
    assert (gradient - expected).norm() <= 1e-6 * expected.norm()
    assert len(one["losses"]) >= (1 if setting == "one step" else 10)
    assert many["losses"][:10] == pytest.approx(one["losses"][:10], rel=1e-6)
    assert many["objectives"][:10] == pytest.approx(one["objectives"][:10], rel=1e-6)
    assert many["norms"][:10] == pytest.approx(one["norms"][:10], rel=1e-4)
    assert many["counts"] == one["counts"]


def test_sums_in_shared_memory_are_those_of_all_ranks(seen: dict[int, Any]) -> None:
    for observed in seen.values():
        assert observed["shared memory"] == [0, 0, 0, 0]
        assert observed["memory that one rank cannot have"]


def test_an_evaluation_finds_the_same_at_any_number_of_processes(seen: dict[int, Seen]) -> None:
    """To the last bit: sums, histogram, and the worst images, of which each has its twin, the lower number first."""
    one = seen[1]["evaluation"]
    assert sum(one["mean_counts"]) == 1700 * 4
    numbers, losses = zip(*one["worst"], strict=True)
    assert list(losses) == sorted(losses, reverse=True)
    assert len(set(losses)) == 4
    assert [numbers[i] + numbers[i + 1] for i in (0, 2, 4, 6)] == [1699] * 4
    assert all(numbers[i] < numbers[i + 1] for i in (0, 2, 4, 6))
    for processes in (2, 3, 4):
        assert seen[processes]["evaluation"] == one


def test_a_step_is_replayed_only_where_all_ranks_have_recorded_it(seen: dict[int, Seen]) -> None:
    for observed in seen.values():
        assert observed["adam"]["recorded"] == [False, True]


@pytest.mark.parametrize("setting", SETTINGS)
def test_every_image_is_counted_once(setting: str, seen: dict[int, Seen]) -> None:
    images, config = SETTINGS[setting].images, SETTINGS[setting].config
    for observed in seen.values():
        *steps, epoch = observed[setting]["counts"]
        assert epoch == images
        assert all(n == config.data.batch_size for n in steps)


def test_the_gradient_is_a_sum_that_clipping_sees(seen: dict[int, Seen]) -> None:
    """SGD at the same rate: an averaged gradient would be smaller by the number of images, or of processes."""
    for observed in seen.values():
        unclipped, clipped = observed["sgd"], observed["sgd, clipped"]
        norm = torch.tensor(unclipped["gradient"]).norm()
        assert norm > 100, "the sum over 20 images"
        torch.testing.assert_close(torch.tensor(clipped["gradient"]).norm(), torch.tensor(20.0))
        assert unclipped["norms"][0] == pytest.approx(norm.item(), rel=1e-5)


def test_deterministic_mode_agrees_to_the_last_bit(seen: dict[int, Seen]) -> None:
    for processes in (2, 3, 4):
        for setting in (name for name in SETTINGS if name.startswith("deterministic")):
            for key in ("gradient", "norms", "result"):
                assert seen[processes][setting][key] == seen[1][setting][key]


@pytest.fixture(scope="module")
def options(small_root: Path) -> list[object]:
    """A small run that takes half a second."""
    return ["--data.root", small_root, "--model.hidden", 40, "--trainer.epochs", 2, "--tracking.wandb", "disabled"]


def test_a_saved_model_has_the_same_test_loss_at_any_number_of_processes(trained: Path, tmp_path: Path) -> None:
    losses = []
    for processes in (1, 2, 3):
        folder = tmp_path / str(processes)
        shutil.copytree(trained, folder)
        done = launch("vae_dist.evaluate", folder, "--iw_samples", 60, processes=processes)
        assert done.returncode == 0, done.stderr
        assert done.stdout.count("test loss") == 1
        losses.append(json.loads((folder / "evaluation.json").read_text()))
    for found in losses[1:]:
        assert found["n"] == 300
        assert found["loss"] == pytest.approx(losses[0]["loss"], rel=1e-9)
        assert found["stderr"] == pytest.approx(losses[0]["stderr"], rel=1e-6)
        assert found["nll"] == pytest.approx(losses[0]["nll"], rel=1e-12)
        assert found["mutual_information"] == pytest.approx(losses[0]["mutual_information"], rel=1e-9)
        assert found["active_units"] == losses[0]["active_units"]


def test_deterministic_weights_are_the_same_bytes_through_a_change_of_processes(options: list[object], tmp_path: Path) -> None:
    """One process, with another micro-batch; three; and one that was stopped, then went on with two."""
    options = [*options, "--trainer.deterministic", "true", "--checkpoint.every_steps", 3, "--checkpoint.keep", 9]
    weights = {}
    runs: dict[str, tuple[int, list[object]]] = {"one": (1, ["--trainer.micro_batch_size", 16]), "three": (3, [])}
    for name, (processes, more) in runs.items():
        done = launch("vae_dist.train", *options, *more, "--output", tmp_path / name, processes=processes)
        assert done.returncode == 0, done.stderr
        weights[name] = (tmp_path / name / "model.safetensors").read_bytes()
    shutil.copytree(tmp_path / "one", tmp_path / "stopped")
    for folder in (tmp_path / "stopped" / "checkpoints").iterdir():
        if int(folder.name.removeprefix("step_")) > 6:
            shutil.rmtree(folder)
    (tmp_path / "stopped" / "status.json").unlink()
    done = launch("vae_dist.train", *options, "--output", tmp_path / "stopped", processes=2)
    assert done.returncode == 0, done.stderr
    assert "step_00000006" in done.stdout
    assert weights["three"] == weights["one"] == (tmp_path / "stopped" / "model.safetensors").read_bytes()


def test_two_processes_make_one_run(options: list[object], tmp_path: Path) -> None:
    """One line an epoch, one set of rows and files, one W&B run; and one process goes on from it."""
    more = ["--tracking.wandb", "offline", "--tracking.log_every", 4, "--output", tmp_path / "run"]
    done = launch("vae_dist.train", *options, *more, processes=2)
    assert done.returncode == 0, done.stderr
    assert [done.stdout.count(f"epoch {epoch}/2:") for epoch in (1, 2)] == [1, 1]
    assert done.stdout.count("finished") == 1
    (wandb,) = offline_runs(tmp_path / "run")
    assert wandb.tags == ["cpu", "2 processes", "fp32"]
    assert [row["step"] for row in records(tmp_path / "run")] == [4, 8, 8, 12, 16, 16]
    train = [row for row in read_rows(tmp_path / "run" / "metrics.jsonl") if row["split"] == "train"]
    assert all(row["communication_share"] > 0 for row in train)
    assert train[-1]["processes"] == 2
    assert 1 < train[-1]["noise_scale_images"] < 10_000
    one = launch("vae_dist.train", *options, *more, "--trainer.epochs", 3)
    assert one.returncode == 0, one.stderr
    assert [row["step"] for row in records(tmp_path / "run")] == [4, 8, 8, 12, 16, 16, 20, 24, 24]
    assert "epoch 3/3" in one.stdout
    assert offline_runs(tmp_path / "run")[1].tags == ["cpu", "2 processes", "fp32", "1 process"]


def test_torchrun_works_as_well_and_tells_its_efficiency(options: list[object], tmp_path: Path) -> None:
    one = launch("vae_dist.train", *options, "--output", tmp_path / "one", "--trainer.epochs", 1)
    assert one.returncode == 0, one.stderr
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc_per_node", "2", "-m", "vae_dist.train"]
    command += map(str, [*options, "--output", tmp_path / "run", "--trainer.epochs", 1])
    command += ["--tracking.baseline", str(tmp_path / "one")]
    done = subprocess.run(command, cwd=ROOT, env=environment(), capture_output=True, text=True, timeout=120, check=False)
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("epoch 1/1:") == 1
    assert re.search(
        r"speed +[\d,]+ images/s on 2 processes, [\d.]+ times the one process of .*one, efficiency \d+%", done.stdout
    )


def test_launchers_that_could_not_restart_a_job_on_other_machines_are_warned_about(
    quick: list[object], command: Callable[..., Outcome], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name, value in (("GROUP_WORLD_SIZE", "2"), ("MAX_RESTARTS", "3"), ("USE_AGENT_STORE", "True")):
        monkeypatch.setenv(name if name.startswith("GROUP") else f"TORCHELASTIC_{name}", value)
    done = command("train", *quick, "--output", tmp_path / "run")
    assert done.status == 0
    assert done.out.count("set TORCH_DISABLE_SHARE_RDZV_TCP_STORE=1") == 1
    monkeypatch.setenv("TORCHELASTIC_USE_AGENT_STORE", "False")
    assert "warning" not in command("train", *quick, "--output", tmp_path / "other").out


def test_a_launcher_that_starts_too_few_processes_is_found_out(options: list[object], tmp_path: Path) -> None:
    command = [sys.executable, "-m", "accelerate.commands.launch", "--cpu", "--num_processes", "2", "-m", "vae_dist.train"]
    command += map(str, [*options, "--output", tmp_path / "run"])
    done = subprocess.run(command, cwd=ROOT, env=environment(), capture_output=True, text=True, timeout=120, check=False)
    assert done.returncode != 0
    assert done.stderr.count("asked for several processes but started one") == 1
    assert "launch/multi_cpu.yaml" in done.stderr
    assert not (tmp_path / "run").exists()


def test_an_error_on_several_ranks_is_printed_once(options: list[object], tmp_path: Path) -> None:
    (tmp_path / "somebody's").touch()
    refused: dict[str, list[object]] = {
        "holds files but no run": ["--output", tmp_path],
        "Perhaps you meant": ["--optimizer.lrr", 3, "--output", tmp_path / "run"],
    }
    for told, more in refused.items():
        done = launch("vae_dist.train", *options, *more, processes=2)
        assert done.returncode != 0
        assert done.stderr.count(told) == 1
        assert "vae_dist/train.py" not in done.stderr, "no traceback of ours"
    assert sorted(path.name for path in tmp_path.iterdir()) == ["somebody's"]
