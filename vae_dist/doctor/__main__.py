"""Checks before the start: is all there that a run needs, on every rank? Started as the training would be, with its options.

python -m vae_dist.doctor --config configs/mnist.yaml
accelerate launch --config_file launch/multi_gpu.yaml -m vae_dist.doctor --config configs/mnist.yaml
"""

import contextlib
import fcntl
import os
import secrets
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from vae_dist import checkpoint
from vae_dist.config import Config
from vae_dist.data import sources
from vae_dist.distributed import EXIT_FAILED, run_entry_point
from vae_dist.doctor.health import Check, Finding, Job, cores, devices, duration, limits, options, processes, software, unlike
from vae_dist.doctor.meeting import Abandoned, Fault, Meeting, MeetingOver
from vae_dist.doctor.network import all_reduce, clocks, group, network, speed
from vae_dist.options import parse
from vae_dist.run import RunFolder
from vae_dist.wandb_server import ask_wandb, wandb_mode

_DESCRIPTION = """Look whether all is there that a training with these options needs, on every rank, and say what to do about
each fault. Start it as the training would be started. Status 0: no fault, 1: a fault, 2: wrong options."""
_MOST_PATIENCE = 120.0  # seconds for an answer
_APPEARS_SECONDS = 5.0  # until a new file must be seen everywhere: network file systems may take a while
_AT_ONCE_SECONDS = 0.1
_MOST_WRITTEN, _PIECE = 256 << 20, 1 << 20  # bytes to try the disk with
_SLOW_SAVE_SECONDS = 10.0
_WANDB_SECONDS = 8.0


def main(args: list[str] | None = None) -> int:
    config = parse(sys.argv[1:] if args is None else args, "vae_dist.doctor", _DESCRIPTION)
    try:
        meeting = Meeting(min(_MOST_PATIENCE, 60 * config.trainer.timeout_minutes))
    except Abandoned as fault:
        print(_line(processes, Finding("", [str(fault)])), flush=True)
        return EXIT_FAILED
    status = examine(Job(config, meeting))
    meeting.leave(status)
    return status


def examine(job: Job) -> int:
    """Makes all checks; rank zero prints a line of each. The exit status."""
    faults = warnings = 0
    is_spokesman, is_over = job.meeting.rank == 0, False
    for check in CHECKS:
        try:
            finding = check(job)
        except Fault as fault:
            finding = Finding("", [str(fault)])
            is_over = isinstance(fault, MeetingOver)
            is_spokesman = is_spokesman or isinstance(fault, Abandoned)
        if is_spokesman:
            print(_line(check, finding), flush=True)
        faults += bool(finding.faults)
        warnings += bool(finding.warnings) and not finding.faults
        if is_over:
            break
    if job.meeting.rank == 0:
        counts = [(faults, "fault"), (warnings, "warning")]
        print(" and ".join(f"{n} {name}{'s' * (n > 1)}" for n, name in counts if n) or "all well", flush=True)
    return EXIT_FAILED if faults else 0


def _line(check: Check, finding: Finding) -> str:
    level = "FAULT" if finding.faults else "warn" if finding.warnings else "ok"
    words = [*finding.faults, *finding.warnings, finding.seen]
    return f"{level:5}  {check.__name__:10}  {'; '.join(filter(None, words))}"


def output(job: Job) -> Finding:
    """The run's folder: rank zero's by right, and one folder for all ranks. Nothing is left behind in it."""
    meeting, run = job.meeting, RunFolder(job.config.output)
    held = contextlib.ExitStack()
    try:
        name, content = meeting.ask_first(lambda: _leave_token(held, run, job.config))
        seen = meeting.ask(lambda: _find_token(run.path, name, content, meeting.rank == 0))
    finally:
        meeting.attempt(held.close)
    faults, warnings = [], []
    if blind := [rank for rank, found in enumerate(seen) if found["seconds"] is None]:
        faults.append(
            f"{meeting.named(blind)}: what rank zero writes into {run.path.absolute()} is not there; name an --output on "
            "storage that all hosts share, at the same path"
        )
    if unlocked := [rank for rank, found in enumerate(seen) if not found["locked"]]:
        warnings.append(
            f"{meeting.named(unlocked)}: a lock of rank zero's does not hold there, so that nothing keeps two jobs apart: "
            "mount the storage with locks for all hosts (NFS without nolock, Lustre with flock)"
        )
    slowest = max(found["seconds"] or 0.0 for found in seen)
    job.is_output_sound = not faults
    after = f" after {duration(slowest)}" if slowest > _AT_ONCE_SECONDS else ""
    return Finding("" if faults else f"{run.path}: locked, written, and seen by all ranks{after}", faults, warnings)


def _leave_token(held: contextlib.ExitStack, run: RunFolder, config: Config) -> tuple[str, str]:
    """A file of random content in the run's folder, and the lock, until `held` is closed. Rank zero only."""
    held.enter_context(visiting(run, config))
    token = run.path / f".doctor-{secrets.token_hex(8)}"
    held.callback(token.unlink, missing_ok=True)
    content = secrets.token_hex(32)
    checkpoint.write_atomically(token, content)
    return token.name, content


@contextlib.contextmanager
def visiting(run: RunFolder, config: Config) -> Iterator[None]:
    """The folder, claimed as a training would claim it, and then as it was before. Raises InputError where that is refused."""
    new = [folder for folder in (run.path, *run.path.parents) if not folder.exists()]
    lock = run.path / ".lock"
    is_new_lock = not lock.exists()
    try:
        run.claim(config)
        yield
    finally:
        run.release()
        with contextlib.suppress(OSError):
            if is_new_lock:
                lock.unlink(missing_ok=True)
            for folder in new:
                folder.rmdir()


def _find_token(folder: Path, name: str, content: str, holds_lock: bool) -> dict[str, Any]:
    """How many seconds it took to appear, None if it did not; and whether rank zero's lock holds here."""
    begin = time.monotonic()
    while (seconds := time.monotonic() - begin) < _APPEARS_SECONDS:
        if (folder / name).is_file() and (folder / name).read_text() == content:
            return {"seconds": seconds, "locked": holds_lock or _is_locked(folder / ".lock")}
        time.sleep(0.05)
    return {"seconds": None, "locked": True}


def _is_locked(lock: Path) -> bool:
    with lock.open("a") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            return True
    return False


def room(job: Job) -> Finding:
    """Free room for all checkpoints that will lie there at once, and how fast one is written."""
    if not job.is_output_sound:
        return Finding("", warnings=["not tried, because of the folder"])
    config = job.config
    moments = 0 if config.optimizer.kind == "sgd" else 2
    size = 4 * job.parameters * (1 + moments + bool(config.optimizer.ema))
    found = job.meeting.ask_first(lambda: _try_disk(config, size))
    # The newest is written before the oldest goes; those of a run that is continued lie there already. Then the final weights.
    more = max(1, config.checkpoint.keep + 1 - found["checkpoints"])
    needed = more * size + 4 * job.parameters
    seen = f"{_bytes(found['free'])} are free"
    if not size:
        return Finding(f"{seen}; the size of a checkpoint is not known yet")
    seen += f" for {more} more checkpoints of {_bytes(size)}"
    if found["free"] < needed:
        remedy = "make room, name another --output, or lower --checkpoint.keep"
        return Finding(seen, [f"{_bytes(needed)} are needed in {config.output}: {remedy}"])
    save = size / found["bytes_per_second"]
    seen += f"; one is written in {duration(save)}, at {found['bytes_per_second'] / 1e6:,.0f} MB/s"
    slow = "all ranks wait while rank zero saves: save less often, or name an --output on a faster disk"
    return Finding(seen, warnings=[slow] if save > _SLOW_SAVE_SECONDS else [])


def _try_disk(config: Config, size: int) -> dict[str, float]:
    """Writes a file of a checkpoint's size, or a part of it, unless there is no room for it. Rank zero only."""
    run = RunFolder(config.output)
    with visiting(run, config):
        free = os.statvfs(run.path).f_bavail * os.statvfs(run.path).f_frsize
        pieces = max(1, min(size, _MOST_WRITTEN, free // 2) // _PIECE)
        content = os.urandom(_PIECE)  # which no file system can make smaller
        trial = run.path / f".doctor-{secrets.token_hex(8)}"
        begin = time.monotonic()
        try:
            with checkpoint.naming(trial), trial.open("wb") as stream:
                for _ in range(pieces):
                    stream.write(content)
                os.fsync(stream.fileno())
        finally:
            trial.unlink(missing_ok=True)
        seconds = time.monotonic() - begin
        kept = len(checkpoint.list_checkpoints(run.checkpoints))
    return {"free": free, "checkpoints": kept, "bytes_per_second": pieces * _PIECE / seconds}


def _bytes(count: float) -> str:
    return f"{count / 1e9:,.1f} GB" if count >= 1e9 else f"{count / 1e6:,.1f} MB"


def data(job: Job) -> Finding:
    """The images: there, whole and the same on all ranks, or to be had."""
    config = job.config.data
    if sources.is_embedded(config):
        return Finding(f"{config.name} needs no file")
    waits = job.meeting.ask(lambda: sources.to_be_fetched(config))
    if told := {rank: words for rank, words in enumerate(waits) if words}:
        return Finding("", warnings=[job.meeting.told(told)])

    def load() -> dict[str, str]:
        home = sources.fetch_missing(config)  # nothing is: it only tells where decoded pictures are
        sides = {side: sources.load(config, side == "training", home) for side in ("training", "test")}
        return {f"{side} images": f"{len(images):,} ({images.digest()[:8]})" for side, images in sides.items()}

    facts = job.meeting.ask(load)
    seen = f"{config.name}: " + ", ".join(f"{count} {side}" for side, count in facts[0].items())
    return Finding(seen, unlike(job, facts, "copy the same files into --data.root there"))


def wandb(job: Job) -> Finding:
    mode = job.meeting.ask_first(lambda: wandb_mode(job.config))
    if mode != "online":
        return Finding(mode)
    problem = job.meeting.ask_first(lambda: ask_wandb(_WANDB_SECONDS))
    if not problem:
        return Finding("online: the server answers, and knows the key")
    remedy = f"{problem}: the run would go on offline; look at WANDB_BASE_URL, HTTPS_PROXY and `wandb login`"
    return Finding("", [remedy]) if job.config.tracking.wandb == "online" else Finding("", warnings=[remedy])


CHECKS: list[Check] = [
    processes,
    software,
    options,
    devices,
    limits,
    network,
    group,
    cores,
    speed,
    all_reduce,
    clocks,
    output,
    room,
    data,
    wandb,
]


if __name__ == "__main__":
    run_entry_point(main)
