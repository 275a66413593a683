"""The checks before the start: silent where all is well, and real faults are found, named, and over in time."""

import os
import shlex
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any
from unittest.mock import ANY

import pytest

from tests.helpers import ROOT, Outcome, environment, everything, launch, refused
from vae_dist.config import Config
from vae_dist.doctor.__main__ import CHECKS
from vae_dist.doctor.health import Check, Finding, Job, cores, devices, limits
from vae_dist.doctor.meeting import Meeting
from vae_dist.doctor.network import all_reduce

Command = Callable[..., Outcome]
NAMES = [check.__name__ for check in CHECKS]
KEY = "0123456789" * 4


def levels(out: str) -> dict[str, str]:
    """What was said of each check, by its name: "ok", "warn" or "FAULT"."""
    lines = [line.split() for line in out.splitlines()]
    return {words[1]: words[0] for words in lines if len(words) > 1 and words[0] in ("ok", "warn", "FAULT")}


def line(out: str, name: str) -> str:
    return next(line for line in out.splitlines() if line.split()[1:2] == [name])


@pytest.mark.parametrize("processes", [1, 2, 3])
def test_a_job_in_order_is_found_well_and_its_folder_left_alone(processes: int, quick: list[object], tmp_path: Path) -> None:
    done = launch("vae_dist.doctor", *quick, "--output", tmp_path / "runs" / "new", processes=processes)
    assert done.returncode == 0, done.stdout + done.stderr
    found = levels(done.stdout)
    assert list(found) == NAMES
    assert {name: level for name, level in found.items() if level != "ok"}.keys() <= {"cores", "speed"}, "of a busy machine"
    assert f"{processes} of {processes} came" in line(done.stdout, "processes")
    assert "1,000 (" in line(done.stdout, "data")
    if processes > 1:
        assert "right; " in line(done.stdout, "all_reduce")
        assert "the gradients' 0.3 MB in shared memory" in line(done.stdout, "all_reduce")
    assert list(tmp_path.iterdir()) == []


def ranks(count: int, *args: object, start: Sequence[Sequence[str]] = ((), ())) -> list["subprocess.Popen[str]"]:
    """The first `count` of two ranks, each as if on a machine of its own and started by hand, with words before its command."""
    port = str(20_000 + os.getpid() % 10_000)
    of_all = {"WORLD_SIZE": "2", "LOCAL_RANK": "0", "LOCAL_WORLD_SIZE": "1", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
    command = [sys.executable, "-m", "vae_dist.doctor", *map(str, args)]
    return [
        subprocess.Popen(
            [*start[rank], *command],
            cwd=ROOT,
            env=environment(RANK=str(rank), **of_all),
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        for rank in range(count)
    ]


def apart(script: str) -> list[str]:
    """The words that start a command with mounts and a host name of its own, after a shell script."""
    words = ["unshare", "--mount", "--uts", "sh", "-c", f'{script} && exec "$@"', "-"]
    if subprocess.run([*words, "true"], capture_output=True, check=False).returncode != 0:
        pytest.skip("needs root, to mount and to name a host")
    return words


def test_a_folder_that_only_one_host_sees_and_a_network_within_one_are_faults(quick: list[object], tmp_path: Path) -> None:
    other = apart(f"hostname elsewhere && mount -t tmpfs none {shlex.quote(str(tmp_path))}")
    first, second = ranks(2, *quick, "--output", tmp_path / "run", start=[[], other])
    out, _ = first.communicate(timeout=120)
    assert (first.wait(), second.wait(timeout=30)) == (1, 1)
    assert [name for name, level in levels(out).items() if level == "FAULT"] == ["network", "output"]
    assert "rank 1 on elsewhere: what rank zero writes into" in line(out, "output")
    assert "--output on storage that all hosts share" in line(out, "output")
    assert "GLOO_SOCKET_IFNAME" in line(out, "network")
    assert second.communicate()[0] == "", "rank zero speaks for all"


def test_a_rank_that_never_comes_is_named_in_time(quick: list[object], tmp_path: Path) -> None:
    started = time.monotonic()
    (alone,) = ranks(1, *quick, "--output", tmp_path / "run", "--trainer.timeout_minutes", 0.05)
    out, _ = alone.communicate(timeout=60)
    assert alone.returncode == 1
    assert time.monotonic() - started < 45
    assert levels(out) == {"processes": "FAULT"}
    assert "1 of 2 processes came within 8 s; rank 1 did not" in out
    assert "MASTER_ADDR" in out


def test_rank_zero_that_never_comes_is_missed_by_the_others(quick: list[object], command: Command, monkeypatch: Any) -> None:
    of_launcher = {"WORLD_SIZE": "2", "RANK": "1", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "9"}
    for name, value in of_launcher.items():
        monkeypatch.setenv(name, value)
    outcome = command("doctor", *quick, "--trainer.timeout_minutes", 0.02)
    assert outcome.status == 1
    assert "cannot reach rank zero at 127.0.0.1:9" in outcome.out
    monkeypatch.setenv("RANK", "2")
    assert "use a launcher" in command("doctor", *quick).out


def test_a_launcher_that_misses_a_machine_gives_up_by_itself_as_the_readme_says(quick: list[object]) -> None:
    """It starts no process before all machines are there."""
    launcher = ["torch.distributed.run", "--nnodes", "2", "--rdzv_backend", "c10d", "--rdzv_endpoint", "127.0.0.1:0"]
    command = [sys.executable, "-m", *launcher, "--rdzv_conf", "join_timeout=3", "-m", "vae_dist.doctor", *map(str, quick)]
    done = subprocess.run(command, cwd=ROOT, env=environment(), capture_output=True, text=True, timeout=60, check=False)
    assert done.returncode == 1
    assert "RendezvousTimeoutError" in done.stderr


def test_a_rank_that_hangs_in_a_check_is_named_and_the_other_checks_are_made(quick: list[object], tmp_path: Path) -> None:
    options = [*quick, "--output", tmp_path / "run", "--trainer.timeout_minutes", 0.15]
    done = launch("tests.sabotage", "hang", "doctor", *options, processes=2)
    assert done.returncode == 1
    assert list(levels(done.stdout)) == NAMES
    assert [name for name, level in levels(done.stdout).items() if level == "FAULT"] == ["data"]
    assert "rank 1 on " in line(done.stdout, "data")
    assert ": no answer within 9 s" in line(done.stdout, "data")


def test_a_rank_that_is_not_like_the_others_is_named(quick: list[object], tmp_path: Path) -> None:
    done = launch("tests.sabotage", "odd", "doctor", *quick, "--output", tmp_path / "run", processes=2)
    assert done.returncode == 1
    assert list(levels(done.stdout)) == NAMES
    for name, level, told in (
        ("software", "FAULT", ["vae_dist is 0.0.7 ", "install the same"]),
        ("options", "FAULT", ["--seed is 6 on ", "and 0 on others"]),
        ("clocks", "warn", ["its clock is 7.0 s ahead of rank zero's", "chronyd"]),
        ("speed", "warn", ["times slower than usual"]),
    ):
        assert levels(done.stdout)[name] == level
        for words in ("rank 1 on ", *told):
            assert words in line(done.stdout, name)
    assert [name for name, level in levels(done.stdout).items() if level == "FAULT"] == ["software", "options"]


@contextmanager
def mounted(folder: Path, options: str) -> Iterator[None]:
    folder.mkdir()
    mount = subprocess.run(["mount", "-t", "tmpfs", "-o", options, "none", str(folder)], capture_output=True, check=False)
    if mount.returncode != 0:
        pytest.skip("needs root, to mount a file system")
    try:
        yield
    finally:
        subprocess.run(["umount", str(folder)], check=True)


def test_a_disk_too_small_for_the_checkpoints_is_a_fault(quick: list[object], command: Command, tmp_path: Path) -> None:
    options = [*quick, "--model.hidden", 400, "--output", tmp_path / "disk" / "run"]
    with mounted(tmp_path / "disk", "size=30m"):
        outcome = command("doctor", *options)
        assert outcome.status == 1
        assert levels(outcome.out)["room"] == "FAULT"
        assert "33.9 MB are needed in" in line(outcome.out, "room")
        assert "--checkpoint.keep" in line(outcome.out, "room")
        assert command("doctor", *options, "--checkpoint.keep", 2).status == 0
        assert list((tmp_path / "disk").iterdir()) == []


def test_a_disk_that_takes_nothing_is_a_fault(quick: list[object], tmp_path: Path) -> None:
    """As over a quota, which the free room does not show; a limit on the size of files stands in for it."""
    words = [sys.executable, "-m", "vae_dist.doctor", *map(str, quick), "--output", str(tmp_path / "run")]
    limited = ["bash", "-c", 'ulimit -f 500; exec "$@"', "-", *words]
    done = subprocess.run(limited, cwd=ROOT, env=environment(), capture_output=True, text=True, timeout=100, check=False)
    assert done.returncode == 1
    assert levels(done.stdout)["room"] == "FAULT"
    assert "File too large" in line(done.stdout, "room")
    assert list(tmp_path.iterdir()) == []


def test_a_folder_that_cannot_be_written_or_is_another_runs_is_a_fault(
    quick: list[object], finished: Path, command: Command, tmp_path: Path
) -> None:
    with mounted(tmp_path / "disk", "ro"):
        outcome = command("doctor", *quick, "--output", tmp_path / "disk" / "run")
    assert outcome.status == 1
    assert [name for name, level in levels(outcome.out).items() if level == "FAULT"] == ["output"]
    assert "Read-only file system" in line(outcome.out, "output")
    before = everything(finished)
    outcome = command("doctor", *quick, "--seed", 5, "--output", finished)
    assert outcome.status == 1
    assert "of another config (seed: 0 there, 5 here)" in line(outcome.out, "output")
    assert command("doctor", *quick, "--output", finished).status == 0
    assert everything(finished) == before


def test_data_that_are_not_there_and_cannot_be_had_are_a_fault(
    quick: list[object], command: Command, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("https_proxy", "http://127.0.0.1:9")
    outcome = command("doctor", *quick, "--output", tmp_path / "run", "--data.root", tmp_path / "none")
    assert outcome.status == 1
    assert [name for name, level in levels(outcome.out).items() if level == "FAULT"] == ["data"]
    assert "--data.root DIR" in line(outcome.out, "data")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("status", "body", "mode", "level", "told"),
    [
        (200, b'{"data": {"viewer": {"id": "x"}}}', "online", "ok", "knows the key"),
        (200, b'{"data": {"viewer": null}}', "online", "FAULT", "does not know the key"),
        (401, b"", "auto", "warn", "refuses the key: the run would go on offline"),
        (None, b"", "auto", "warn", "does not answer"),
        (None, b"", "online", "FAULT", "does not answer"),
    ],
)
def test_wandb_is_asked_for_the_key_that_is_set(
    status: int | None,
    body: bytes,
    mode: str,
    level: str,
    told: str,
    quick: list[object],
    command: Command,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    class Server(BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            self.rfile.read(int(self.headers["Content-Length"]))
            assert status is not None
            self.send_response(status)
            self.end_headers()
            self.wfile.write(body)

        def log_message(self, format: str, *args: object) -> None:
            pass

    monkeypatch.delenv("http_proxy", raising=False)
    with ThreadingHTTPServer(("127.0.0.1", 0), Server) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        monkeypatch.setenv("WANDB_API_KEY", KEY)
        monkeypatch.setenv("WANDB_BASE_URL", f"http://127.0.0.1:{server.server_port if status else 9}")
        outcome = command("doctor", *quick, "--output", tmp_path / "run", "--tracking.wandb", mode)
        server.shutdown()
    assert outcome.status == (1 if level == "FAULT" else 0)
    assert levels(outcome.out)["wandb"] == level
    assert told in line(outcome.out, "wandb")


def test_wrong_options_are_refused_as_the_training_refuses_them(command: Command) -> None:
    refused(command("doctor", "--config", "nothing.yaml"), "--config nothing.yaml")
    assert command("doctor", "--optimizer.rate", 1).status == 2


def test_copies_that_do_not_know_of_each_other_are_a_fault(
    quick: list[object], command: Command, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("SLURM_STEP_NUM_TASKS", "4")
    outcome = command("doctor", *quick, "--output", tmp_path / "run")
    assert outcome.status == 1
    assert "SLURM_STEP_NUM_TASKS is 4, but WORLD_SIZE is not set" in line(outcome.out, "processes")


class Told(Meeting):
    """A meeting whose ranks have said already what they say."""

    def __init__(self, *answers: list[Any], hosts: str = "aabb") -> None:
        self.rank, self.size, self.hosts = 0, len(hosts), list(hosts)
        self._answers = iter(answers)

    def ask(self, action: Callable[[], Any], remedy: str = "") -> list[Any]:
        return next(self._answers)


def gpu(number: int, name: str = "H100", problem: str = "") -> dict[str, str]:
    return {"type": "cuda", "name": name, "id": f"GPU-{number}", "problem": problem}


CPU = {"type": "cpu", "name": "CPU", "id": "", "problem": ""}
SUMS = {"right": True, "small": 1e-3, "large": 1.0, "gradient": 0.0, "shared": False}
ROOM = {"memory": 1 << 40, "files": 65536, "shm": 1 << 40, "processes": 2}


@pytest.mark.parametrize(
    ("check", "answers", "faults", "warnings"),
    [
        (devices, [[gpu(0), gpu(1), gpu(0), gpu(1)]], [], []),
        (devices, [[gpu(0), gpu(0), gpu(0), gpu(1)]], ["2 processes share GPU GPU-0 of a"], []),
        (devices, [[gpu(0), gpu(1), gpu(0), CPU]], ["some ranks have a GPU and some none"], ["not all devices are alike"]),
        (devices, [[gpu(0), gpu(1), gpu(0), gpu(1, problem="taken")]], [], ["rank 3 on b: taken"]),
        (devices, [[CPU] * 4], [], []),
        (cores, [[[0], [1], [0], [1]], [[1, 9.0]] * 4], [], []),
        (cores, [[[0, 1]] * 4, [[2, 9.0], [2, 9.0], [1, 9.0], [1, 9.0]]], [], ["4 threads share 2 cores of a: set OMP_NUM_"]),
        (cores, [[[0, 1]] * 4, [[1, 1.5]] * 2 + [[1, 1.0]] * 2], [], ["share 1 cores of b: start fewer"]),
        (limits, [[ROOM, ROOM, ROOM | {"files": 256}, ROOM]], [], ["rank 2 on b: only 256 open files"]),
        (all_reduce, [[SUMS] * 3 + [SUMS | {"right": False}]], ["the sum is wrong on rank 3 on b"], []),
    ],
)
def test_what_ranks_say_is_judged(check: Check, answers: list[Any], faults: list[str], warnings: list[str]) -> None:
    job = Job(Config(), Told(*answers), accelerator=ANY)  # only asked whether it is there
    found: Finding = check(job)
    for expected, told in ((faults, found.faults), (warnings, found.warnings)):
        assert len(expected) == len(told)
        assert all(words in said for words, said in zip(expected, told, strict=True))


def test_the_bandwidth_is_that_of_the_bus() -> None:
    """Of a ring of four, each link carries 1.5 times the data."""
    job = Job(Config(), Told([SUMS] * 4), accelerator=ANY)
    assert "8 bytes in 1.0 ms, 16 MiB at 25 MB/s" in all_reduce(job).seen


def test_ranks_are_named_in_short() -> None:
    meeting = Told(hosts="aabbbc")
    assert meeting.named(range(6)) == "ranks 0-1 on a, ranks 2-4 on b, rank 5 on c"
    assert meeting.named([1, 3, 4]) == "rank 1 on a, ranks 3-4 on b"
    assert meeting.told(dict.fromkeys(range(6), "full")) == "full"
    assert meeting.told({0: "full", 1: "full", 5: "slow"}) == "ranks 0-1 on a: full; rank 5 on c: slow"
