"""What a training from Python leaves of the process that called it: all as it was."""

import dataclasses
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from accelerate import Accelerator

import vae_dist
from tests.helpers import ROOT, environment
from tests.own_program import build, settings
from tests.wandb_file import offline_runs
from vae_dist import TrackingConfig, TrainerConfig
from vae_dist.data import glyphs

IMAGES = glyphs.draw(0, 120)[0]
TRAIN, TEST = IMAGES[:90], IMAGES[90:]
PROGRAM = """
import torch, vae_dist
from tests.own_program import build
{change}
before = ({asked})
vae_dist.measure(build(), torch.rand(9, 28, 28))
assert ({asked}) == before
"""


def test_the_process_is_afterwards_as_it_was(tmp_path: Path) -> None:
    mine = Accelerator(cpu=True, gradient_accumulation_steps=4)
    threads = torch.get_num_threads()
    for trainer in (TrainerConfig(epochs=1, precision="bf16"), TrainerConfig(epochs=1, deterministic=True)):
        vae_dist.fit(dataclasses.replace(settings(tmp_path / trainer.precision), trainer=trainer), TRAIN, TEST)
        assert torch.get_num_threads() == threads
        assert not torch.are_deterministic_algorithms_enabled()
        assert (mine.mixed_precision, mine.gradient_accumulation_steps) == ("no", 4)
        assert mine.reduce(torch.ones(1)).item() == 1


@pytest.mark.parametrize("flushes", [True, False])
def test_whether_tiny_numbers_are_flushed_is_afterwards_as_it_was(flushes: bool) -> None:
    torch.set_flush_denormal(flushes)
    try:
        vae_dist.measure(build(), TEST)
        assert (torch.full((64,), 1e-40).mul(1.0).max() == 0) == flushes
    finally:
        torch.set_flush_denormal(False)


@pytest.mark.parametrize(
    ("change", "asked"),
    [
        ("torch.set_float32_matmul_precision('medium')", "torch.get_float32_matmul_precision()"),
        ("torch.backends.cuda.matmul.allow_tf32 = True", "torch.backends.cuda.matmul.allow_tf32"),
        (
            "torch.backends.fp32_precision = 'tf32'; torch.backends.mkldnn.matmul.fp32_precision = 'bf16'",
            "torch.backends.cuda.matmul.fp32_precision, torch.backends.mkldnn.matmul.fp32_precision",
        ),
    ],
)
def test_how_exact_products_are_is_afterwards_as_it_was_in_torchs_old_way_or_its_new_one(change: str, asked: str) -> None:
    """In a process of its own: the two ways do not mix."""
    command = [sys.executable, "-c", PROGRAM.format(change=change, asked=asked)]
    done = subprocess.run(command, cwd=ROOT, env=environment(), capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


def test_a_wandb_run_of_the_programs_own_goes_on_beside_the_trainings(tmp_path: Path) -> None:
    import wandb

    mine = wandb.init(mode="offline", dir=tmp_path, settings=wandb.Settings(silent=True))
    folder = os.environ.get("WANDB_DATA_DIR")
    config = dataclasses.replace(settings(tmp_path / "run", epochs=1), tracking=TrackingConfig(wandb="offline"))
    result = vae_dist.fit(config, TRAIN, TEST)
    assert wandb.run is mine
    mine.log({"after": 1})
    mine.finish()
    assert os.environ.get("WANDB_DATA_DIR") == folder
    [part] = offline_runs(tmp_path / "run")
    assert part.id != mine.id
    assert part.summary["best_test_loss"] == result.test["loss"]
    assert "batch_size" in part.config["data"]
    assert "data" not in dict(mine.config)
