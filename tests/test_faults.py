"""What goes wrong with one of several processes stops all of them, says what it was, and harms nothing that was saved."""

import hashlib
import json
import os
import signal
import subprocess
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.helpers import Outcome, begin, launch, records
from vae_dist.data.order import Partition, epoch_order

FIRST_EPOCH = "step_00000008"
ENDLESS = ["--trainer.epochs", 10_000]

# The first images that rank one of three takes in step 12, which is the fourth of the second epoch.
SHARE = ", ".join(map(str, Partition(1000, 128, 3, 43).of_rank(epoch_order(0, 2, 1000), rank=1)[3, 0, :16].tolist()))


def state(run: Path) -> str:
    return str(json.loads((run / "status.json").read_text())["state"])


@pytest.mark.parametrize(
    ("fault", "options", "told"),
    [
        ("weight", ["--trainer.check_ranks_every", 3], ["rank 1 differs", "step 12, in decoder.2.bias", "alike at step 9"]),
        ("weight", ["--checkpoint.every_steps", 4, "--checkpoint.keep", 1], ["rank 1 differs", "step 12, in decoder.2.bias"]),
        ("moment", [], ["rank 1 differs", "optimizer.decoder.2.bias.exp_avg_sq", "alike at step 8"]),
        ("nan", [], ["loss is not finite", "step 12 (epoch 2)", "learning rate 0.001", f"43 images on rank 1: {SHARE}, …"]),
    ],
)
def test_one_rank_that_goes_wrong_stops_all_and_nothing_is_saved_after(
    fault: str, options: list[object], told: list[str], quick: list[object], tmp_path: Path
) -> None:
    done = launch("tests.sabotage", fault, *quick, *options, "--output", tmp_path / "run", processes=3)
    assert done.returncode != 0
    assert done.stderr.count("error: ") == 1, done.stderr
    for words in told:
        assert words in done.stderr
    assert state(tmp_path / "run") == "failed"
    assert [folder.name for folder in (tmp_path / "run" / "checkpoints").iterdir()] == [FIRST_EPOCH]


@pytest.mark.parametrize(
    ("fault", "told"),
    [
        ("data", "the SHA-256 of the training images in --data.root is "),
        ("software", "vae_dist is 0.0.7 "),
        ("seed", "--seed is 6 on rank 1 and 0 on others"),
    ],
)
def test_ranks_that_are_not_alike_do_not_start(fault: str, told: str, quick: list[object], tmp_path: Path) -> None:
    done = launch("tests.sabotage", fault, *quick, "--output", tmp_path / "run", processes=2)
    assert done.returncode != 0
    assert done.stderr.count("error: ") == 1, done.stderr
    assert told in done.stderr
    assert not (tmp_path / "run").exists()


def begin_running(options: list[object], run: Path, restarts: int = 0) -> tuple["subprocess.Popen[str]", list[int]]:
    """A run on two processes that has a checkpoint, and the ids of its workers."""
    more = ["--output", run, "--tracking.log_every", 1]
    launcher = begin("vae_dist.train", *options, *more, processes=2, restarts=restarts)
    deadline = time.monotonic() + 60
    while not list(run.glob("checkpoints/step_*")):
        assert time.monotonic() < deadline, "it does not begin to train"
        time.sleep(0.05)
    return launcher, [int(pid) for pid in Path(f"/proc/{launcher.pid}/task/{launcher.pid}/children").read_text().split()]


def gone(processes: list[int]) -> bool:
    """Whether they end within ten seconds."""
    deadline = time.monotonic() + 10
    while any(Path(f"/proc/{pid}").exists() for pid in processes) and time.monotonic() < deadline:
        time.sleep(0.05)
    return not any(Path(f"/proc/{pid}").exists() for pid in processes)


def test_a_signal_to_one_rank_stops_all_and_the_folder_says_so(quick: list[object], tmp_path: Path) -> None:
    launcher, workers = begin_running([*quick, *ENDLESS], tmp_path / "run")
    asked = time.monotonic()
    os.kill(workers[-1], signal.SIGUSR1)
    out, _ = launcher.communicate(timeout=30)
    assert time.monotonic() - asked < 10
    assert launcher.returncode != 0
    assert out.count("stopped as asked") == 1
    assert state(tmp_path / "run") == "interrupted"


def test_a_killed_launcher_leaves_no_worker_behind(quick: list[object], tmp_path: Path) -> None:
    launcher, workers = begin_running([*quick, *ENDLESS], tmp_path / "run")
    launcher.kill()
    launcher.communicate(timeout=30)  # to the end of what the workers print
    assert gone(workers)
    assert state(tmp_path / "run") == "interrupted"


@pytest.mark.parametrize("rank", [0, 1])
def test_a_killed_rank_takes_the_others_with_it(rank: int, quick: list[object], tmp_path: Path) -> None:
    launcher, workers = begin_running([*quick, *ENDLESS], tmp_path / "run")
    os.kill(workers[rank], signal.SIGKILL)
    out, _ = launcher.communicate(timeout=30)
    assert launcher.returncode != 0
    assert gone(workers)
    assert out.count(f"error: rank {1 - rank}: another process of this run is gone") == 1
    assert "vae_dist/train.py" not in out, "no traceback of ours"
    assert state(tmp_path / "run") == ("failed" if rank else "running"), "only rank zero writes there"


@pytest.mark.slow
def test_a_silent_rank_is_given_up_after_the_time_limit(quick: list[object], tmp_path: Path) -> None:
    """The launcher waits half a minute before it kills what does not answer."""
    launcher, workers = begin_running([*quick, *ENDLESS, "--trainer.timeout_minutes", 0.1], tmp_path / "run")
    os.kill(workers[1], signal.SIGSTOP)
    out, _ = launcher.communicate(timeout=60)
    assert "error: rank 0: another process of this run is gone, or was silent" in out
    assert gone(workers)


def test_the_launcher_brings_a_killed_run_back_by_itself(
    quick: list[object], command: Callable[..., Outcome], tmp_path: Path
) -> None:
    epochs = ["--trainer.deterministic", "true", "--trainer.epochs", 50]
    launcher, workers = begin_running([*quick, *epochs], tmp_path / "run", restarts=1)
    os.kill(workers[0], signal.SIGKILL)
    out, _ = launcher.communicate(timeout=90)
    assert launcher.returncode == 0, out
    assert out.count("going on from") == 1
    assert out.count("finished: 50 epochs") == 1
    assert command("train", *quick, *epochs, "--tracking.log_every", 1, "--output", tmp_path / "whole").status == 0
    assert records(tmp_path / "run") == records(tmp_path / "whole")
    sums = {hashlib.sha256((tmp_path / run / "model.safetensors").read_bytes()).hexdigest() for run in ("run", "whole")}
    assert len(sums) == 1
