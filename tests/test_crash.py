"""Kill -9 at random moments, start again, and end with the same bytes and the same records as a run left in peace."""

import contextlib
import hashlib
import os
import random
import signal
import subprocess
import time
from pathlib import Path
from typing import Any

import pytest

from tests.helpers import ROOT, arguments, environment, launch, records

# Small steps and many files, so that a kill meets steps, evaluations, pictures and half-written checkpoints alike.
BUSY = ["--model.hidden", 40, "--trainer.epochs", 30, "--checkpoint.every_steps", 2, "--tracking.log_every", 3]


def outcome(run: Path) -> tuple[str, list[dict[str, Any]]]:
    """The final weights' SHA-256 and the records, whose sums may differ in the last digit where a restart cut them."""
    figures = [{key: round(x, 9) if isinstance(x, float) else x for key, x in row.items()} for row in records(run)]
    return hashlib.sha256((run / "model.safetensors").read_bytes()).hexdigest(), figures


def kill_at_random(options: list[object], run: Path, chance: random.Random, processes: int) -> bool:
    """Starts the job and kills all of its processes up to a second after it has begun. False if it ended before that."""
    job = subprocess.Popen(
        arguments("vae_dist.train", *options, "--output", run, processes=processes),
        cwd=ROOT,
        env=environment(),
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        start_new_session=True,
    )
    begun = time.time_ns()
    with job:
        try:
            while job.poll() is None and not _wrote_since(run / "status.json", begun):
                time.sleep(0.005)
            job.wait(timeout=chance.random())
        except subprocess.TimeoutExpired:
            pass
        finished = job.poll() is not None
        with contextlib.suppress(ProcessLookupError):
            os.killpg(job.pid, signal.SIGKILL)
        assert job.stderr is not None
        printed = job.stderr.read().decode()
    assert not finished or job.returncode == 0, printed
    return not finished


def _wrote_since(file: Path, moment: int) -> bool:
    return file.exists() and file.stat().st_mtime_ns > moment


def survive(options: list[object], folder: Path, kills: int, worlds: list[int]) -> None:
    """`kills` kills, with the numbers of processes in `worlds` in turn, over as many runs as that takes."""
    peaceful = folder / "peaceful"
    assert launch("vae_dist.train", *options, "--output", peaceful).returncode == 0
    expected, chance, done, attempt = outcome(peaceful), random.Random(0), 0, 0
    while done < kills:
        attempt += 1
        run = folder / f"killed_{attempt}"
        while done < kills and kill_at_random(options, run, chance, worlds[done % len(worlds)]):
            done += 1
        last = launch("vae_dist.train", *options, "--output", run, processes=worlds[done % len(worlds)])
        assert last.returncode == 0, last.stderr
        assert outcome(run) == expected


def test_five_kills_leave_no_trace(small_root: Path, tmp_path: Path) -> None:
    survive(["--data.root", small_root, "--tracking.wandb", "disabled", *BUSY], tmp_path, kills=5, worlds=[1])


@pytest.mark.slow
def test_fifty_kills_leave_no_trace(small_root: Path, tmp_path: Path) -> None:
    survive(["--data.root", small_root, "--tracking.wandb", "disabled", *BUSY], tmp_path, kills=50, worlds=[1])


@pytest.mark.slow
def test_kills_that_change_the_number_of_processes_leave_no_trace_in_deterministic_mode(
    small_root: Path, tmp_path: Path
) -> None:
    options = ["--data.root", small_root, "--tracking.wandb", "disabled", *BUSY, "--trainer.deterministic", "true"]
    survive(options, tmp_path, kills=20, worlds=[1, 3, 2, 4])
