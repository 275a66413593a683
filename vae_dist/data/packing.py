"""Pictures decoded once, by many threads, into a folder of shards: whole or unfinished, and gone on with after a kill."""

import contextlib
import fcntl
import hashlib
import json
import os
import re
import time
from collections import deque
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from functools import cache
from pathlib import Path
from typing import Any, Literal, NamedTuple

from tqdm import tqdm

from vae_dist.checkpoint import write_atomically
from vae_dist.config import DataConfig, InputError
from vae_dist.data import folder, packed
from vae_dist.data.folder import Picture, Plan
from vae_dist.data.packed import Index, Shard
from vae_dist.data.photos import Unreadable, decode, many

SIDES = ("train", "test")
_OURS = re.compile(r"index\.json|shard-\d{5,}\.bin|\..*")  # what a side's folder may hold
_LISTED = 5  # unreadable files that an error names
_LIST, _LOCK = "unreadable.txt", ".lock"


class Packing(NamedTuple):
    """What came of it."""

    sides: dict[str, Index]
    unreadable: list[str]  # that were left out
    decoded: int  # images this time
    seconds: float


class _Job(NamedTuple):
    """One shard, and the pictures that go into it."""

    folder: Path
    number: int
    pictures: list[Picture]
    plan: Plan

    @property
    def file(self) -> Path:
        return self.folder / f"shard-{self.number:05d}.bin"

    @property
    def _record(self) -> Path:
        """Says that the shard is done, until an index says so of all."""
        return self.folder / f".shard-{self.number:05d}.json"

    def finished(self) -> "_Done | None":
        """The shard, where it was written from these very pictures, and is whole."""
        try:
            record = json.loads(self._record.read_bytes())
            if record["of"] != self._key():
                return None
            shard = Shard(**record["shard"]) if record["shard"] else None
            if shard is not None and packed.sha256_of(self.file) != shard.sha256:
                return None
            return _Done(shard, list(map(str, record["unreadable"])))
        except (OSError, ValueError, KeyError, TypeError, RecursionError):
            return None

    def write(self, results: "list[bytes | Unreadable]") -> "_Done":
        images = [result for result in results if isinstance(result, bytes)]
        reasons = zip(self.pictures, results, strict=True)
        unreadable = [f"{picture.path}: {reason}" for picture, reason in reasons if isinstance(reason, Unreadable)]
        shard = None
        if images:
            content = packed.shard_content(images)
            write_atomically(self.file, content)
            shard = Shard(self.file.name, len(images), len(content), hashlib.sha256(content).hexdigest())
        record = {"of": self._key(), "shard": shard and shard._asdict(), "unreadable": unreadable}
        write_atomically(self._record, json.dumps(record) + "\n")
        return _Done(shard, unreadable)

    def _key(self) -> str:
        return folder.fingerprint(self.plan.decoding, self.pictures)


class _Done(NamedTuple):
    shard: Shard | None  # None where no picture of it could be read
    unreadable: list[str]


def write(
    plan: Plan, out: Path, unreadable: Literal["refuse", "skip"], workers: int | None = None, way_out: str = ""
) -> Packing:
    """Decodes pictures into out/train and out/test, or goes on with it, or finds it done. Prints one line where it works.

    `workers` are threads, by default one for each core; `way_out` is said where the disk is full. Of several processes one
    works, the others wait. Raises InputError where `out` holds something else or has no room, and, once all pictures were
    tried, where some cannot be read, unless those are to be skipped.
    """
    start, decoded = time.monotonic(), 0
    _refuse_others(out)
    try:
        whole = _whole(plan, out)
        if whole is None:
            out.mkdir(parents=True, exist_ok=True)
            with _alone(out):
                whole = _whole(plan, out)  # somebody else may have done it by now
                if whole is None:
                    whole, decoded = _write(plan, out, unreadable, workers, way_out)
                _tidy(out, whole)
    except OSError as error:
        raise InputError(f"{error.filename or out}: {error.strerror}{way_out}") from None
    skipped = [told for index in whole.values() for told in index.source["unreadable"]]
    if unreadable == "refuse":
        _refuse_unreadable(plan, out, skipped)
    return Packing(whole, skipped, decoded, time.monotonic() - start)


def prepare(config: DataConfig) -> None:
    """Decodes `folder` or `celeba` into the cache, where it is not there yet. Raises InputError."""
    way_out = "; set XDG_CACHE_HOME to a folder with room, or use python -m vae_dist.pack and --data.name packed"
    write(plan_of(config), cache_folder(config), config.unreadable, way_out=way_out)


def cache_folder(config: DataConfig) -> Path:
    """Where the packed images of `folder` or `celeba` are, or will be: another place when any file has changed."""
    root = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
    return root / "vae_dist" / plan_of(config).fingerprint()[:32]


@cache
def plan_of(config: DataConfig) -> Plan:
    """Once in a process, which asks several times."""
    return folder.plan(config)


def _write(
    plan: Plan, out: Path, unreadable: Literal["refuse", "skip"], workers: int | None, way_out: str
) -> tuple[dict[str, Index], int]:
    """The finished pack, and how many images were decoded for it this time."""
    jobs = {side: _jobs(plan, out, side) for side in SIDES}
    every = [job for side in SIDES for job in jobs[side]]
    done = {job.file: found for job in every if (found := job.finished())}
    left = [job for job in every if job.file not in done]
    if left:
        _announce(plan, out, left, way_out)
    for job, results in _decoded(left, workers):
        done[job.file] = job.write(results)
    if unreadable == "refuse":
        _refuse_unreadable(plan, out, [told for job in every for told in done[job.file].unreadable])
    whole = {side: _index(plan, side, [done[job.file] for job in jobs[side]]) for side in SIDES}
    for side, index in whole.items():
        packed.write_index(out / side, index)
    return whole, sum(len(job.pictures) for job in left)


def _jobs(plan: Plan, out: Path, side: str) -> list[_Job]:
    pictures = plan.train if side == "train" else plan.test
    n = packed.images_per_shard(_image_bytes(plan))
    starts = range(0, len(pictures), n)
    return [_Job(out / side, number, pictures[start : start + n], plan) for number, start in enumerate(starts)]


def _image_bytes(plan: Plan) -> int:
    return plan.decoding.channels * plan.decoding.size**2


def _index(plan: Plan, side: str, done: list[_Done]) -> Index:
    size, channels = plan.decoding.size, plan.decoding.channels
    shards, unreadable = [job.shard for job in done if job.shard], [told for job in done for told in job.unreadable]
    if not shards:
        raise InputError(f"{plan.root}: none of the {len(unreadable)} {side} pictures can be read, such as {unreadable[0]}")
    source: dict[str, Any] = {"image_size": size, "channels": channels, "crop": plan.decoding.crop, "split": plan.split}
    source |= {"fingerprint": plan.fingerprint(), "unreadable": unreadable}
    return Index((channels, size, size), shards, source)


def _whole(plan: Plan, out: Path) -> dict[str, Index] | None:
    """The finished pack of a folder, if it is one. Raises InputError where it is of other pictures."""
    if not all((out / side / packed.INDEX).is_file() for side in SIDES):
        return None
    whole = {side: packed.read_index(out / side) for side in SIDES}
    if any(index.source.get("fingerprint") != plan.fingerprint() for index in whole.values()):
        raise InputError(f"{out}: holds a pack of other pictures or options; name a new folder, or remove it")
    return whole


def _refuse_others(out: Path) -> None:
    """Raises InputError where a folder holds what no pack does: nothing of anybody else's is ever overwritten."""
    if not out.exists():
        return
    if not out.is_dir():
        raise InputError(f"{out}: is a file; name a new or empty folder")
    foreign = [path for path in out.iterdir() if path.name not in (*SIDES, _LOCK, _LIST)]
    foreign += [path for side in SIDES for path in (out / side).glob("*") if not _OURS.fullmatch(path.name)]
    if foreign:
        raise InputError(f"{out}: holds {foreign[0].relative_to(out)}, which is no part of a pack; name a new or empty folder")


def _refuse_unreadable(plan: Plan, out: Path, unreadable: list[str]) -> None:
    """Raises InputError where there are such files, and leaves the list of them."""
    if not unreadable:
        return
    write_atomically(out / _LIST, os.fsencode("\n".join(unreadable) + "\n"))
    named = "; ".join(unreadable[:_LISTED])
    more = f"; … (all are listed in {out / _LIST})" if len(unreadable) > _LISTED else ""
    raise InputError(
        f"{plan.root}: {len(unreadable)} of {len(plan.train) + len(plan.test)} files cannot be read: {named}{more}. "
        "Mend or remove them, or leave them out with --data.unreadable skip (of vae_dist.pack: --unreadable skip)"
    )


def _announce(plan: Plan, out: Path, left: list[_Job], way_out: str) -> None:
    """Says what is about to be done. Raises InputError where the disk has no room for it."""
    images = sum(len(job.pictures) for job in left)
    needed = sum(packed.shard_bytes(len(job.pictures), _image_bytes(plan)) for job in left)
    free = os.statvfs(out).f_bavail * os.statvfs(out).f_frsize
    if needed > free:
        raise InputError(f"{out}: no room: {images:,} images take {_mib(needed)}, and {_mib(free)} are free{way_out}")
    total = len(plan.train) + len(plan.test)
    of = f"{images:,}" if images == total else f"the last {images:,} of {total:,}"
    split = f"{len(plan.train):,} for training, {len(plan.test):,} for testing: {plan.split}"
    print(f"decoding {of} pictures of {plan.root} ({split}) into {out}, {_mib(needed)}", flush=True)


def _mib(amount: int) -> str:
    return f"{amount / 2**20:,.1f} MiB"


def _decoded(jobs: list[_Job], workers: int | None) -> "Iterator[tuple[_Job, list[bytes | Unreadable]]]":
    """The images of each job, in turn; while one is being written, threads decode the next."""
    pool = ThreadPoolExecutor(workers or len(os.sched_getaffinity(0)), thread_name_prefix="decode")
    started: deque[tuple[_Job, list[Future[bytes | Unreadable]]]] = deque()
    total = sum(len(job.pictures) for job in jobs)
    with many(), tqdm(total=total, desc="decoding", unit="image", smoothing=0.1, disable=None) as bar:

        def results() -> "tuple[_Job, list[bytes | Unreadable]]":
            job, futures = started.popleft()
            found = []
            for future in futures:
                found.append(future.result())
                bar.update()
            return job, found

        try:
            for job in jobs:
                started.append((job, [pool.submit(_tried, job, picture) for picture in job.pictures]))
                if len(started) > 1:
                    yield results()
            while started:
                yield results()
        finally:
            pool.shutdown(cancel_futures=True)


def _tried(job: _Job, picture: Picture) -> bytes | Unreadable:
    try:
        return decode(job.plan.root / picture.path, job.plan.decoding)
    except Unreadable as error:
        return error


@contextlib.contextmanager
def _alone(out: Path) -> Iterator[None]:
    """One process at a time. The lock goes with the process, however it ends."""
    with (out / _LOCK).open("w") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            print(f"waiting for another process, which is writing {out}", flush=True)
            fcntl.flock(lock, fcntl.LOCK_EX)
        yield


def _tidy(out: Path, whole: dict[str, Index]) -> None:
    """Removes what only an unfinished pack needs, and shards of pictures that are there no more."""
    for name in (_LIST, _LOCK):
        (out / name).unlink(missing_ok=True)
    for side, index in whole.items():
        kept = {packed.INDEX, *(shard.filename for shard in index.shards)}
        for path in (out / side).iterdir():
            if path.name not in kept:
                path.unlink()
