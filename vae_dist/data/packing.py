"""Pictures decoded once, by many threads, into a folder of shards: whole or unfinished, and gone on with after a kill."""

import contextlib
import fcntl
import hashlib
import json
import os
import re
import time
from collections import deque
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any, Literal, NamedTuple

from tqdm import tqdm

from vae_dist.checkpoint import write_atomically
from vae_dist.config import InputError
from vae_dist.data import folder, packed
from vae_dist.data.folder import Picture, Plan
from vae_dist.data.packed import Index, Shard
from vae_dist.data.photos import Unreadable, decode, many
from vae_dist.progress import no_bar

SIDES = ("train", "test")
_LISTED = 5  # unreadable files that an error names
_LIST, _LOCK = "unreadable.txt", ".lock"
_KEPT = r"index\.json|shard-\d{5,}\.bin|\.shard-\d{5,}\.json"
_OF_SIDE = re.compile(rf"{_KEPT}|\.({_KEPT})\.unfinished")  # files that a side's folder may hold
_OF_PACK = re.compile(r"\.lock|unreadable\.txt|\.unreadable\.txt\.unfinished")


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
    def record(self) -> Path:
        """Says that the shard is done, and of which pictures."""
        return self.folder / f".shard-{self.number:05d}.json"

    def finished(self) -> "_Done | None":
        """The shard, where it was written from these very pictures, and is whole."""
        try:
            record = json.loads(self.record.read_bytes())
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
        return self._recorded(_Done(shard, unreadable))

    def link(self, packs: Iterable[Path]) -> "_Done | None":
        """The shard of another pack as this one's, where it is of the same pictures: one file under two names."""
        for pack in packs:
            twin = self._replace(folder=pack / self.folder.name)
            if done := twin.finished():
                with contextlib.suppress(OSError):  # the disk has no links, or that pack is gone: it is decoded again
                    self.folder.mkdir(parents=True, exist_ok=True)
                    if done.shard:
                        self.file.unlink(missing_ok=True)
                        self.file.hardlink_to(twin.file)
                    return self._recorded(done)
        return None

    def _recorded(self, done: "_Done") -> "_Done":
        record = {"of": self._key(), "shard": done.shard and done.shard._asdict(), "unreadable": done.unreadable}
        write_atomically(self.record, json.dumps(record) + "\n")
        return done

    def _key(self) -> str:
        return folder.fingerprint(self.plan.decoding, self.pictures)


class _Done(NamedTuple):
    shard: Shard | None  # None where no picture of it could be read
    unreadable: list[str]


def write(
    plan: Plan,
    out: Path,
    unreadable: Literal["refuse", "skip"],
    workers: int | None = None,
    way_out: str = "",
    others: Sequence[Path] = (),
) -> Packing:
    """Decodes pictures into out/train and out/test, or goes on with it, or finds it done. Prints one line where it works.

    `workers` are threads, by default one for each core; `way_out` is said where the disk is full; `others` are packs whose
    shards serve where they are of the same pictures. Of several processes one works, the others wait. A shard that is gone or
    cut short is written again. Raises InputError where `out` holds something else or has no room, and, once all pictures were
    tried, where some cannot be read, unless those are to be skipped.
    """
    start, decoded = time.monotonic(), 0
    try:
        _refuse_others(out)
        whole = _whole(plan, out)
        if whole is None:
            out.mkdir(parents=True, exist_ok=True)
            with _alone(out):
                whole = _whole(plan, out)  # somebody else may have done it by now
                if whole is None:
                    whole, decoded = _write(plan, out, unreadable, workers, way_out, others)
                _tidy(plan, out, whole)
    except OSError as error:
        raise InputError(f"{error.filename or out}: {error.strerror}{way_out}") from None
    skipped = [told for index in whole.values() for told in index.source["unreadable"]]
    if unreadable == "refuse":
        _refuse_unreadable(plan, out, skipped)
    return Packing(whole, skipped, decoded, time.monotonic() - start)


def _write(
    plan: Plan, out: Path, unreadable: Literal["refuse", "skip"], workers: int | None, way_out: str, others: Sequence[Path]
) -> tuple[dict[str, Index], int]:
    """The finished pack, and how many images were decoded for it this time."""
    jobs = {side: _jobs(plan, out, side) for side in SIDES}
    every = [job for side in SIDES for job in jobs[side]]
    done = {job.file: found for job in every if (found := job.finished() or job.link(others))}
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
    found = {side: _sound(plan, out / side) for side in SIDES}
    whole = {side: index for side, index in found.items() if index}
    return whole if len(whole) == len(SIDES) else None


def _sound(plan: Plan, folder: Path) -> Index | None:
    """The index of a side, where all of its shards are there. Raises InputError where it is of other pictures."""
    try:
        index = packed.read_index(folder)
    except InputError:
        if any(folder.glob(".shard-*.json")):
            return None
        raise InputError(f"{folder / packed.INDEX}: damaged, or of no pack; name a new folder, or remove it") from None
    if index.source.get("fingerprint") != plan.fingerprint():
        raise InputError(f"{folder.parent}: holds a pack of other pictures or options; name a new folder, or remove it")
    try:
        for shard in index.shards:
            packed.require_size(folder, shard)
    except InputError:
        return None
    return index


def _refuse_others(out: Path) -> None:
    """Raises InputError where a folder holds what no pack does: nothing of anybody else's is ever overwritten."""
    if not out.exists():
        return
    if not out.is_dir():
        raise InputError(f"{out}: is a file; name a new or empty folder")
    sides = [out / side for side in SIDES if (out / side).is_dir()]
    foreign = [path for path in out.iterdir() if path not in sides and not _is_ours(path, _OF_PACK)]
    foreign += [path for side in sides for path in side.iterdir() if not _is_ours(path, _OF_SIDE)]
    if foreign:
        name = foreign[0].relative_to(out)
        raise InputError(f"{out}: holds {name}, which is no part of a pack; remove that, or name a new or empty folder")


def _is_ours(path: Path, names: re.Pattern[str]) -> bool:
    return names.fullmatch(path.name) is not None and not path.is_dir()


def _refuse_unreadable(plan: Plan, out: Path, unreadable: list[str]) -> None:
    """Raises InputError where there are such files, and leaves the list of them."""
    if not unreadable:
        return
    write_atomically(out / _LIST, os.fsencode("\n".join(unreadable) + "\n"))
    named = "; ".join(unreadable[:_LISTED])
    more = f"; … (all are listed in {out / _LIST})" if len(unreadable) > _LISTED else ""
    raise InputError(
        f"{plan.root}: {len(unreadable)} of {len(plan.train) + len(plan.test)} files cannot be read: {named}{more}. "
        "Mend or remove them; a training leaves them out with --data.unreadable skip, vae-dist pack with --unreadable skip"
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
    with many(), tqdm(total=total, desc="decoding", unit="image", smoothing=0.1, disable=no_bar()) as bar:

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


def _tidy(plan: Plan, out: Path, whole: dict[str, Index]) -> None:
    """Removes what only an unfinished pack needs, and shards of pictures that are there no more.

    The records stay, by which a lost shard is written again, and serves another pack.
    """
    for path in out.iterdir():
        if _is_ours(path, _OF_PACK):
            path.unlink(missing_ok=True)
    for side, index in whole.items():
        kept = {packed.INDEX, *(shard.filename for shard in index.shards)}
        kept |= {job.record.name for job in _jobs(plan, out, side)}
        for path in (out / side).iterdir():
            if path.name not in kept and _is_ours(path, _OF_SIDE):
                path.unlink()
