"""launch/slurm.sbatch in a real SLURM: submitted, pre-empted, requeued, finished; cancelled; and failed. `make test-slurm`."""

import hashlib
import os
import shutil
import signal
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from tests.helpers import ROOT, Outcome, records
from tests.slurm import PROGRAMS, Slurm, cluster
from tests.test_faults import state

pytestmark = pytest.mark.slow

SCRIPT = ROOT / "launch" / "slurm.sbatch"


@pytest.fixture(scope="module")
def slurm(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Slurm]:
    missing = [name for name in PROGRAMS if shutil.which(name, path=f"{os.environ['PATH']}:/usr/sbin") is None]
    if missing:
        pytest.skip(f"needs SLURM: no {', '.join(missing)}; on Debian, apt-get install slurmctld slurmd slurm-client munge")
    if os.geteuid() != 0:
        pytest.skip("needs root: slurmd runs jobs for their users")
    with cluster(tmp_path_factory.mktemp("slurm")) as started:
        yield started


def submit(slurm: Slurm, run: Path, options: list[object], *more: object) -> int:
    small = ["--nodes=2", "--cpus-per-task=1", f"--output={run.parent / 'out'}"]
    return slurm.submit(*small, *more, SCRIPT, run, *options)


def begins(run: Path) -> bool:
    """Whether it has a checkpoint."""
    return any(run.glob("checkpoints/step_*"))


def wait_for(condition: Callable[[], bool], seconds: float, told: Path) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, told.read_text() if told.exists() else "nothing was written"
        time.sleep(0.1)


def is_over(slurm: Slurm, job: int) -> bool:
    return slurm.job(job)["JobState"] not in ("PENDING", "CONFIGURING", "RUNNING", "COMPLETING", "REQUEUED")


def test_a_preempted_job_goes_on_and_ends_as_one_left_in_peace(
    slurm: Slurm, quick: list[object], command: Callable[..., Outcome], tmp_path: Path
) -> None:
    """Two nodes of one process each. An urgent job takes the nodes after the first checkpoint, for a second."""
    run, out = tmp_path / "run", tmp_path / "out"
    options = [*quick, "--trainer.deterministic", "true", "--trainer.epochs", 60]
    job = submit(slurm, run, options)
    wait_for(lambda: begins(run), 90, out)
    assert slurm.job(job)["NodeList"] == "n[1-2]"
    urgent = slurm.submit("--partition=urgent", "--nodes=2", "--gpus-per-node=1", "--output=/dev/null", "--wrap", "sleep 1")
    wait_for(lambda: is_over(slurm, urgent), 60, out)
    assert state(run) == "interrupted"
    stopped_at = max(int(path.name.removeprefix("step_")) for path in run.glob("checkpoints/step_*"))
    wait_for(lambda: is_over(slurm, job), 300, out)
    told = out.read_text()
    assert slurm.job(job)["JobState"] == "COMPLETED", told
    assert slurm.job(job)["Restarts"] == "1"
    assert "got signal: 10" in told, "SIGUSR1, passed on to torchrun"
    assert told.count("the run is interrupted, and was told to stop") == 1
    assert told.count(f"going on from {run}/checkpoints/step_{stopped_at:08}") == 1
    assert [told.count(f"epoch {epoch}/60:") for epoch in range(1, 61)] == [1] * 60
    assert told.count("the step ended with status 0, the run is finished") == 1
    assert state(run) == "finished"
    assert command("train", *options, "--output", tmp_path / "whole").status == 0
    assert records(run) == records(tmp_path / "whole")
    sums = {hashlib.sha256((folder / "model.safetensors").read_bytes()).hexdigest() for folder in (run, tmp_path / "whole")}
    assert len(sums) == 1


def test_a_job_that_is_told_before_it_trains_is_requeued_as_well(slurm: Slurm, quick: list[object], tmp_path: Path) -> None:
    run, out = tmp_path / "run", tmp_path / "out"
    job = submit(slurm, run, quick)
    wait_for(lambda: slurm.job(job)["JobState"] == "RUNNING", 60, out)
    time.sleep(1)  # to the middle of torch's import
    slurm.run("scancel", "--signal=USR1", "--batch", job)
    wait_for(lambda: is_over(slurm, job), 120, out)
    assert slurm.job(job)["JobState"] == "COMPLETED", out.read_text()
    assert slurm.job(job)["Restarts"] == "1"
    assert "the run is as it was, and was told to stop" in out.read_text()
    assert state(run) == "finished"


def test_a_cancelled_job_saves_and_does_not_come_back(slurm: Slurm, quick: list[object], tmp_path: Path) -> None:
    run, out = tmp_path / "run", tmp_path / "out"
    job = submit(slurm, run, [*quick, "--trainer.epochs", 10_000])
    wait_for(lambda: begins(run), 90, out)
    slurm.run("scancel", job)
    wait_for(lambda: is_over(slurm, job), 60, out)
    time.sleep(3)
    assert slurm.job(job)["JobState"] == "CANCELLED"
    assert state(run) == "interrupted"


@pytest.mark.parametrize("wrong", ["a typo in a run that was interrupted", "a killed process"])
def test_a_failed_job_does_not_come_back(wrong: str, slurm: Slurm, quick: list[object], tmp_path: Path) -> None:
    run, out = tmp_path / "run", tmp_path / "out"
    if wrong == "a killed process":
        job = submit(slurm, run, [*quick, "--trainer.epochs", 10_000])
        wait_for(lambda: begins(run), 90, out)
        training = [path.parent for path in Path("/proc").glob("[0-9]*/cmdline") if is_of(path, str(run))]
        os.kill(int(training[-1].name), signal.SIGKILL)
    else:
        run.mkdir()
        (run / "status.json").write_text('{"state": "interrupted"}\n')
        job = submit(slurm, run, [*quick, "--optimizer.lrr", 3])
    wait_for(lambda: is_over(slurm, job), 90, out)
    assert slurm.job(job)["JobState"] == "FAILED", out.read_text()
    assert slurm.job(job)["Restarts"] == "0"


def is_of(cmdline: Path, run: str) -> bool:
    """Whether a process trains in that folder."""
    try:
        words = cmdline.read_text().split("\0")
    except OSError:
        return False
    return (
        "vae_dist.train" in words and run in words and not any("torchrun" in word for word in words) and "srun" not in words[0]
    )
