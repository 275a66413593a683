"""Progress bars are seen in a terminal and in a notebook, once, and never in a log file."""

import fcntl
import os
import pty
import struct
import subprocess
import sys
import termios
from pathlib import Path

import pytest

from tests.helpers import ROOT, arguments, environment, launch
from vae_dist.progress import no_bar

BAR = "epoch 1/1:   0%|"


def in_terminal(*args: object, processes: int) -> str:
    """What a terminal gets from a training."""
    ours, theirs = pty.openpty()
    fcntl.ioctl(theirs, termios.TIOCSWINSZ, struct.pack("HHHH", 40, 120, 0, 0))  # a terminal of no width has no bars
    command = arguments("vae_dist.train", *args, processes=processes)
    with subprocess.Popen(command, cwd=ROOT, env=environment(TERM="xterm"), stdout=theirs, stderr=theirs) as job:
        os.close(theirs)
        shown = b""
        try:
            while part := os.read(ours, 1 << 16):
                shown += part
        except OSError:  # how Linux says that nobody writes any more
            pass
        assert job.wait() == 0, shown
    os.close(ours)
    return shown.decode()


@pytest.mark.parametrize("processes", [1, pytest.param(2, marks=pytest.mark.slow)])
def test_a_terminal_gets_one_bar_however_many_processes(quick: list[object], processes: int, tmp_path: Path) -> None:
    shown = in_terminal(*quick, "--trainer.epochs", 1, "--output", tmp_path / "run", processes=processes)
    assert shown.count(BAR) == 1
    assert "epoch 1/1: train " in shown


def test_a_log_file_gets_lines_and_no_bar(quick: list[object], tmp_path: Path) -> None:
    done = launch("vae_dist.train", *quick, "--trainer.epochs", 1, "--output", tmp_path / "run")
    assert "%|" not in done.stdout + done.stderr
    assert "\r" not in done.stdout + done.stderr
    assert "epoch 1/1: train " in done.stdout


def test_a_notebook_gets_bars(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delitem(sys.modules, "ipykernel", raising=False)
    assert no_bar(), "pytest's own stderr is no terminal"
    monkeypatch.setitem(sys.modules, "ipykernel", sys)
    assert not no_bar()
    assert no_bar(is_spokesman=False)
