"""starts.jsonl: what each job of a run was."""

import hashlib
import json
import os
import platform
import re
import socket
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from tests.helpers import Outcome, launch, refused, resident
from vae_dist.config import DataConfig, InputError
from vae_dist.provenance import commit_of
from vae_dist.run import RunFolder

Command = Callable[..., Outcome]


def starts(run: Path) -> list[dict[str, Any]]:
    return RunFolder(run).read_starts()


def git(folder: Path, *args: str) -> str:
    identity = ["-c", "user.name=somebody", "-c", "user.email=somebody@example.org"]
    return subprocess.run(["git", *identity, *args], cwd=folder, capture_output=True, text=True, check=True).stdout.strip()


def repository(folder: Path) -> str:
    """A commit of one file, `__init__.py`. Returns its name."""
    folder.mkdir(parents=True)
    (folder / "__init__.py").write_text("first\n")
    git(folder, "init", "--quiet")
    git(folder, "add", "__init__.py")
    git(folder, "commit", "--quiet", "--message", "first")
    return git(folder, "rev-parse", "HEAD")


def test_a_start_tells_when_by_whom_and_of_what(trained: Path, small_root: Path) -> None:
    [start] = starts(trained)
    assert re.fullmatch(r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\dZ", start["time"])
    assert start["time"] <= RunFolder(trained).status()["time"]
    assert (start["step"], start["processes"]) == (0, 1)
    assert start["command"][1:3] == ["-m", "vae_dist.train"]
    assert start["command"][-2:] == ["--output", str(trained)]
    [place] = start["places"]
    assert (place["host"], place["processes"]) == (socket.gethostname(), 1)
    assert place["device"].endswith(f"{len(os.sched_getaffinity(0))} cores")
    assert start["versions"]["python"] == platform.python_version()
    assert start["versions"].keys() == {"vae_dist", "python", "torch", "accelerate"}
    for split, n in (("train", 1000), ("test", 300)):
        pixels = resident(DataConfig(root=str(small_root)), train=split == "train").pixels
        digest = hashlib.sha256(pixels.numpy().tobytes()).hexdigest()
        assert start["data"][split] == {"n": n, "shape": [1, 28, 28], "sha256": digest}


def test_each_job_that_goes_on_adds_its_line_without_a_secret_of_the_environment(
    quick: list[object], command: Command, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("WANDB_API_KEY", "a" * 20 + "secret" + "b" * 14)
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "another-secret")
    run = tmp_path / "run"
    assert command("train", *quick, "--output", run, "--trainer.max_minutes", 1e-9).status == 75
    first = starts(run)
    assert command("train", *quick, "--output", run).status == 0
    both = starts(run)
    assert both[:1] == first
    assert [start["step"] for start in both] == [0, 1]
    assert "secret" not in RunFolder(run).starts.read_text()
    assert command("train", *quick, "--output", run).status == 0
    assert starts(run) == both, "a finished run that is asked again starts nothing"


def test_all_processes_are_counted_on_their_hosts(quick: list[object], tmp_path: Path) -> None:
    done = launch("vae_dist.train", *quick, "--output", tmp_path / "run", processes=2)
    assert done.returncode == 0, done.stderr
    [start] = starts(tmp_path / "run")
    assert start["processes"] == 2
    assert [(place["host"], place["processes"]) for place in start["places"]] == [(socket.gethostname(), 2)]


def test_a_line_that_a_kill_cut_short_is_replaced_by_the_next_start(
    finished: Path, quick: list[object], command: Command
) -> None:
    file = RunFolder(finished).starts
    whole = starts(finished)
    with file.open("a") as torn:
        torn.write('{"time": "2026-')
    assert starts(finished) == whole
    assert command("train", *quick, "--trainer.epochs", 3, "--output", finished).status == 0
    assert starts(finished)[:1] == whole
    assert [start["step"] for start in starts(finished)] == [0, 16]


@pytest.mark.parametrize("line", ["nothing", "[]", '{"time": 3}', '{"step": "0", "time": "now"}'])
def test_a_line_of_something_else_is_refused(line: str, tmp_path: Path) -> None:
    RunFolder(tmp_path).starts.write_text(line + "\n")
    with pytest.raises(InputError, match=r"starts\.jsonl: line 1"):
        starts(tmp_path)


def test_a_run_does_not_go_on_over_a_damaged_file(finished: Path, quick: list[object], command: Command) -> None:
    file = RunFolder(finished).starts
    file.write_text("[]\n" + file.read_text())
    before = file.read_bytes()
    refused(command("train", *quick, "--trainer.epochs", 3, "--output", finished), "starts.jsonl: line 1")
    assert file.read_bytes() == before


def test_a_run_of_an_older_version_has_no_starts_and_goes_on(finished: Path, quick: list[object], command: Command) -> None:
    RunFolder(finished).starts.unlink()
    assert starts(finished) == []
    assert command("train", *quick, "--trainer.epochs", 3, "--output", finished).status == 0
    assert [start["step"] for start in starts(finished)] == [16]


def test_the_commit_of_a_folder_says_whether_tracked_files_differ(tmp_path: Path) -> None:
    folder = tmp_path / "project"
    commit = repository(folder)
    (folder / "runs").mkdir()
    (folder / "runs" / "untracked").write_text("a run's folder changes no code")
    assert commit_of(folder) == commit_of(folder / "runs") == {"commit": commit, "dirty": False}
    (folder / "__init__.py").write_text("second\n")
    assert commit_of(folder) == {"commit": commit, "dirty": True}


def test_a_package_has_the_commit_only_of_a_repository_that_tracks_it(tmp_path: Path) -> None:
    commit = repository(tmp_path / "project")
    assert commit_of(tmp_path / "project" / "__init__.py") == {"commit": commit, "dirty": False}
    installed = tmp_path / "project" / ".venv" / "package"
    installed.mkdir(parents=True)
    (installed / "__init__.py").write_text("installed\n")
    assert commit_of(installed / "__init__.py") is None


def test_where_there_is_no_repository_or_no_git_there_is_no_commit(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert commit_of(tmp_path) is None
    commit = repository(tmp_path / "project")
    assert commit_of(tmp_path / "project") == {"commit": commit, "dirty": False}
    git(tmp_path / "project", "init", "--quiet", "empty")
    assert commit_of(tmp_path / "project" / "empty") is None, "no commit yet"
    monkeypatch.setenv("PATH", "")
    assert commit_of(tmp_path / "project") is None


def test_an_address_with_a_password_in_a_repository_is_not_read(tmp_path: Path) -> None:
    repository(tmp_path / "project")
    git(tmp_path / "project", "remote", "add", "origin", "https://me:secret@example.org/project")
    assert "secret" not in json.dumps(commit_of(tmp_path / "project"))
