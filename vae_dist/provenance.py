"""Where the figures of a run come from: a line of starts.jsonl for each job that worked on it, the resumed ones too.

Environment variables are never written, nor addresses of git's remotes: both may hold secrets.
"""

import json
import os
import socket
import subprocess
import sys
import time
from collections import Counter
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.utils import gather_object

import vae_dist
from vae_dist.checkpoint import write_atomically
from vae_dist.data.images import Images
from vae_dist.distributed import on_first_rank
from vae_dist.run import TIME_FORMAT, RunFolder
from vae_dist.starting import cpu_name, versions
from vae_dist.trainer import Trainer

_GIT_SECONDS = 10.0  # for an answer; a repository may lie on a slow disk


def record_start(trainer: Trainer) -> None:
    """Adds this job's line to the run's starts.jsonl: when and from which step, by what command, with which code, software and
    images, on which machines. All ranks call it; rank zero writes.
    """
    places = _places(trainer.accelerator)
    on_first_rank(trainer.accelerator, lambda: _add(trainer.run, _line(trainer, places)))


def _add(run: RunFolder, line: dict[str, Any]) -> None:
    lines = [*run.read_starts(), line]
    write_atomically(run.starts, "".join(json.dumps(each) + "\n" for each in lines))


def _line(trainer: Trainer, places: list[dict[str, Any]]) -> dict[str, Any]:
    return {
        "time": time.strftime(TIME_FORMAT, time.gmtime()),
        "step": trainer.progress.step,
        "command": sys.orig_argv,
        "folder": os.getcwd(),
        "processes": trainer.accelerator.num_processes,
        "places": places,
        "versions": versions(),
        "code": commit_of(Path(vae_dist.__file__)),
        "project": commit_of(Path.cwd()),
        "data": {"train": _images(trainer.train, trainer.progress.data), "test": _images(trainer.test, trainer.progress.test)},
    }


def _places(accelerator: Accelerator) -> list[dict[str, Any]]:
    """How many processes run on which device of which host. All ranks call it."""
    cores = len(os.sched_getaffinity(0))
    on_gpu = accelerator.device.type == "cuda"
    device = torch.cuda.get_device_name(accelerator.device) if on_gpu else f"{cpu_name()}, {cores} cores"
    counts = Counter(gather_object([(socket.gethostname(), device)]))
    return [{"host": host, "device": name, "processes": count} for (host, name), count in counts.items()]


def _images(images: Images, digest: str) -> dict[str, Any]:
    return {"n": len(images), "shape": list(images.shape), "sha256": digest}


def commit_of(path: Path) -> dict[str, Any] | None:
    """The commit of the repository that a folder lies in, or that tracks a file, and whether tracked files differ from it."""
    folder = path if path.is_dir() else path.parent
    if path != folder and _git(folder, "ls-files", "--error-unmatch", path.name) is None:
        return None  # installed into a folder that lies in somebody's repository
    commit = _git(folder, "rev-parse", "--verify", "HEAD")
    if not commit:
        return None
    changes = _git(folder, "status", "--porcelain", "--untracked-files=no")
    return {"commit": commit, "dirty": None if changes is None else bool(changes)}


def _git(folder: Path, *args: str) -> str | None:
    """What git prints; None where there is no git, no repository, or no answer in time. It changes nothing there."""
    command = ["git", "--no-optional-locks", "-C", str(folder), *args]
    environment = {name: value for name, value in os.environ.items() if not name.startswith("GIT_")}  # a hook's repository
    try:
        done = subprocess.run(
            command,
            env=environment,
            capture_output=True,
            text=True,
            timeout=_GIT_SECONDS,
            check=False,
            stdin=subprocess.DEVNULL,
        )
    except (OSError, subprocess.TimeoutExpired, UnicodeDecodeError):
        return None
    return done.stdout.strip() if done.returncode == 0 else None
