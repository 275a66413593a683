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
from tests.wandb_file import offline_runs

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
        # W&B's own process, in a group of its own, at times outlives the job for a moment and writes to its end.
        of_wandb = [pid for pid in descendants(job.pid) if os.getpgid(pid) != job.pid] if chance.random() < 0.7 else []
        for group in [job.pid, *{os.getpgid(pid) for pid in of_wandb}]:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(group, signal.SIGKILL)
        assert job.stderr is not None
        printed = job.stderr.read().decode()
    assert not finished or job.returncode == 0, printed
    return not finished


def descendants(pid: int) -> list[int]:
    """The processes that a process started, and theirs."""
    try:
        children = [int(child) for child in Path(f"/proc/{pid}/task/{pid}/children").read_text().split()]
    except FileNotFoundError:
        return []
    return [*children, *(grandchild for child in children for grandchild in descendants(child))]


def _wrote_since(file: Path, moment: int) -> bool:
    return file.exists() and file.stat().st_mtime_ns > moment


def check_wandb(run: Path) -> None:
    """One W&B run over all of its files: steps never go back, and each figure of metrics.jsonl is there, once."""
    parts = offline_runs(run)
    assert len({part.id for part in parts if part.id}) == 1  # a file that a kill left empty names none
    steps = [row["_step"] for part in parts for row in part.history]
    assert steps == sorted(set(steps))
    shown = {row["_step"]: row for part in parts for row in part.history}
    rows = records(run)
    assert set(shown) == {row["step"] for row in rows}
    for row in rows:
        is_epoch = row["split"] == "train" and any(other["step"] == row["step"] for other in rows if other["split"] == "test")
        chart = "train/epoch_" if is_epoch else f"{row['split']}/"
        for figure in ("loss", "bce", "kld", "n"):
            assert shown[row["step"]][f"{chart}{figure}"] == pytest.approx(row[figure], rel=1e-9)
        assert row["split"] == "train" or {"images/sample", "images/sample.path"} & shown[row["step"]].keys()


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
        if "offline" in options:
            check_wandb(run)


def test_three_kills_leave_no_trace(small_root: Path, tmp_path: Path) -> None:
    options = ["--data.root", small_root, "--tracking.wandb", "offline", *BUSY, "--trainer.epochs", 20]
    survive(options, tmp_path, kills=3, worlds=[1])


@pytest.mark.slow
def test_fifty_kills_leave_no_trace(small_root: Path, tmp_path: Path) -> None:
    survive(["--data.root", small_root, "--tracking.wandb", "offline", *BUSY], tmp_path, kills=50, worlds=[1])


@pytest.mark.slow
def test_kills_that_change_the_number_of_processes_leave_no_trace_in_deterministic_mode(
    small_root: Path, tmp_path: Path
) -> None:
    options = ["--data.root", small_root, "--tracking.wandb", "disabled", *BUSY, "--trainer.deterministic", "true"]
    survive(options, tmp_path, kills=20, worlds=[1, 3, 2, 4])
