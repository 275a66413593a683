"""Every file in launch/ is named on its page, is right by its own tools, and starts a run where a machine without GPUs can."""

import contextlib
import os
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest
import yaml

from tests.helpers import ROOT, Outcome, environment, records
from tests.test_faults import state

LAUNCH = ROOT / "launch"
FILES = sorted(path.relative_to(LAUNCH) for path in LAUNCH.rglob("*") if path.is_file())
CONFIGS = sorted(LAUNCH.glob("*.yaml"))
SCRIPTS = [LAUNCH / "node.sh", LAUNCH / "slurm.sbatch"]


@pytest.mark.parametrize("file", FILES, ids=str)
def test_every_file_is_on_the_page(file: Path) -> None:
    if file.name not in ("README.md", "Dockerfile.dockerignore"):
        assert f"`{file}`" in (LAUNCH / "README.md").read_text(encoding="utf-8")


@pytest.mark.parametrize("file", CONFIGS, ids=lambda path: path.name)
def test_a_config_is_what_accelerate_reads(file: Path) -> None:
    from accelerate.commands.config.config_args import load_config_from_file

    known, written = load_config_from_file(str(file)), yaml.safe_load(file.read_text())
    assert {name: str(getattr(known, name)).removeprefix(f"{type(getattr(known, name)).__name__}.") for name in written} == {
        name: str(value) for name, value in written.items()
    }
    assert written["mixed_precision"] == "no", "the program's own option decides"


def begin(command: list[object], **changes: str) -> "subprocess.Popen[str]":
    """Starts a command in the project's folder, which finds torchrun and accelerate where this Python is."""
    path = f"{Path(sys.executable).parent}:{os.environ['PATH']}"
    return subprocess.Popen(
        [str(word) for word in command],
        cwd=ROOT,
        env=environment(PATH=path, **changes),
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )


def ends(started: "list[subprocess.Popen[str]]", status: int) -> str:
    """What they print, once all have ended with that status."""
    try:
        told = [process.communicate(timeout=120)[0] for process in started]
    finally:
        for process in started:
            process.kill()
    assert [process.returncode for process in started] == [status] * len(started), "\n".join(told)
    return "".join(told)


def free_port() -> str:
    with contextlib.closing(socket.create_server(("127.0.0.1", 0))) as server:
        return str(server.getsockname()[1])


@pytest.mark.parametrize(
    ("config", "machines", "processes"),
    [
        ("one_cpu", 1, 1),
        pytest.param("one_gpu", 1, 1, marks=pytest.mark.slow),
        pytest.param("multi_gpu", 1, 2, marks=pytest.mark.slow),
        pytest.param("multi_node", 2, 2, marks=pytest.mark.slow),
    ],
)
def test_accelerate_starts_a_run(config: str, machines: int, processes: int, quick: list[object], tmp_path: Path) -> None:
    """Without GPUs on the CPU; the machines of multi_node.yaml are both this one. All other tests start multi_cpu.yaml."""
    start: list[object] = ["accelerate", "launch", "--config_file", LAUNCH / f"{config}.yaml"]
    train = ["-m", "vae_dist.train", *quick, "--output", tmp_path / "run"]
    if machines > 1:
        start += ["--num_processes", processes, "--main_process_ip", "127.0.0.1", "--main_process_port", free_port()]
    told = ends([begin([*start, "--machine_rank", rank, *train]) for rank in range(machines)], 0)
    assert told.count("finished: 2 epochs") == 1, "once a run, not once a machine"
    assert state(tmp_path / "run") == "finished"
    assert records(tmp_path / "run")[-1]["epoch"] == 2


def begin_pods(run: Path, options: list[object]) -> "list[subprocess.Popen[str]]":
    """launch/node.sh on two machines, as the manifests have it: both are this one."""
    meeting = {"PET_NNODES": "2", "PET_NPROC_PER_NODE": "1", "PET_MASTER_ADDR": "127.0.0.1", "PET_MASTER_PORT": free_port()}
    command = [LAUNCH / "node.sh", run, *options]
    return [begin(command, PET_NODE_RANK=rank, **meeting) for rank in ("0", "1")]


@pytest.mark.slow
def test_a_pod_that_is_told_to_go_ends_all_as_interrupted_and_they_go_on(
    quick: list[object], command: Callable[..., Outcome], tmp_path: Path
) -> None:
    run, options = tmp_path / "run", [*quick, "--trainer.deterministic", "true", "--trainer.epochs", 30]
    pods = begin_pods(run, options)
    deadline = time.monotonic() + 60
    while not any(run.glob("checkpoints/step_*")) and time.monotonic() < deadline:
        time.sleep(0.05)
    pods[1].send_signal(signal.SIGTERM)
    assert "stopped as asked" in ends(pods, 75)
    assert state(run) == "interrupted"
    assert "going on from" in ends(begin_pods(run, options), 0)
    assert command("train", *options, "--output", tmp_path / "whole").status == 0
    assert records(run) == records(tmp_path / "whole")
    assert (run / "model.safetensors").read_bytes() == (tmp_path / "whole" / "model.safetensors").read_bytes()


def test_a_pod_that_does_not_get_to_train_is_no_interruption(quick: list[object], tmp_path: Path) -> None:
    """Although an earlier one was."""
    (tmp_path / "status.json").write_text('{"state": "interrupted"}\n')
    done = begin([LAUNCH / "node.sh", tmp_path, *quick, "--optimizer.lrr", 3], PET_NPROC_PER_NODE="1")
    assert "Perhaps you meant" in ends([done], 1)


@pytest.mark.parametrize("script", SCRIPTS, ids=lambda path: path.name)
def test_scripts_are_sound(script: Path) -> None:
    subprocess.run(["bash", "-n", script], check=True)
    linter = shutil.which("shellcheck", path=f"{Path(sys.executable).parent}:{os.environ['PATH']}")
    assert linter is not None, "make setup installs it"
    done = subprocess.run([linter, script], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout


def test_all_that_the_image_takes_is_there_and_may_be_sent_to_the_builder() -> None:
    sent = (LAUNCH / "Dockerfile.dockerignore").read_text().splitlines()
    assert sent[0] == "*"
    copies = [line.split()[1:-1] for line in (LAUNCH / "Dockerfile").read_text().splitlines() if line.startswith("COPY")]
    sources = {name for words in copies for name in words if not name.startswith("--")}
    assert {name for name in sources if (ROOT / name).exists()} == sources
    assert sources == {line[1:] for line in sent if line.startswith("!")}
