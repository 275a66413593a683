"""Shards of a bucket on S3 or a server like it: LitData's downloader brings them to this machine's disk, where they are kept.

What LitData waits for by itself is too much for a training: 1000 attempts at a server that refuses, minutes at one that hangs.
So each of its requests gets short time limits and one attempt, and the attempts are counted here, whatever it was that failed:
no connection, an error of the server, a body cut short, a shard that is not the one of the index.
"""

import contextlib
import fcntl
import hashlib
import mmap
import os
import random
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, TypeVar

import numpy as np

from vae_dist.checkpoint import write_atomically
from vae_dist.config import ImagesLost, InputError, missing_extra
from vae_dist.data.packed import INDEX, Index, Mapped, Shard, read_index

T = TypeVar("T")

_CONNECT_SECONDS = 10.0
_STALL_SECONDS = 30.0  # without a byte; a slow server may take as long as it likes otherwise
_ATTEMPTS = 6  # unless AWS_MAX_ATTEMPTS says otherwise
_FIRST_PAUSE_SECONDS = 0.5  # it doubles, some times: a server may be away for a quarter of a minute
_DOUBLINGS = 6


class Bucket:
    """One side of a packed set, `s3://bucket/prefix/train` or `…/test`, and the shards of any set that this machine keeps."""

    def __init__(self, address: str, cache_bytes: int) -> None:
        """Shards are kept in at most so many bytes. Raises InputError where LitData is missing, or AWS_MAX_ATTEMPTS wrong."""
        try:
            from botocore.config import Config
            from litdata.streaming.downloader import get_downloader
            from litdata.utilities.dataset_utilities import get_default_cache_dir
        except ModuleNotFoundError as error:
            raise missing_extra(f"--data.root {address}: object storage needs LitData ({error})", "stream") from None
        self._address, self._cache_bytes, self._attempts = address, cache_bytes, _attempts()
        self._verified = set[str]()  # SHA-256 of shards that this process read in the cache
        self._cache = Path(get_default_cache_dir()) / "vae_dist"  # where LITDATA_CACHE_DIR says, if it is set
        limits = Config(
            connect_timeout=_CONNECT_SECONDS, read_timeout=_STALL_SECONDS, retries={"total_max_attempts": 1, "mode": "standard"}
        )
        self._cache.mkdir(parents=True, exist_ok=True)
        self._litdata = get_downloader(address, str(self._cache), [], {"config": limits})

    def index(self) -> Index:
        """The index. Raises InputError where it cannot be had or is not one of this package."""
        with tempfile.TemporaryDirectory() as folder:
            file, name = Path(folder) / INDEX, f"{self._address}/{INDEX}"
            try:
                self._patiently(INDEX, lambda: self._litdata.download_file(name, str(file)))
                return read_index(Path(folder))
            except ImagesLost as error:
                remedy = "check the address, AWS_ENDPOINT_URL and the credentials (AWS_ACCESS_KEY_ID, AWS_PROFILE, …)"
                raise InputError(f"{error}; {remedy}") from None
            except InputError as error:
                raise InputError(str(error).replace(str(file), name)) from None

    def open(self, image_bytes: int, shard: Shard) -> Mapped:
        """The images of a shard, which is fetched unless it is here. Whole and verified, or ImagesLost is raised."""
        file = self._cache / f"{shard.sha256}.bin"
        content: mmap.mmap | bytes | None = self._kept(file, shard)
        if content is None:
            with _alone(file):  # of several processes that need it one fetches it
                content = self._kept(file, shard)
                if content is None:
                    fetched = self._patiently(shard.filename, lambda: self._whole(shard))
                    self._keep(fetched, file)
                    content = self._kept(file, shard) or fetched  # where there is no room, it stays in memory
        stride = 4 + image_bytes  # each image after its length
        first = shard.bytes - shard.images * stride + 4
        return np.ndarray((shard.images,), f"V{image_bytes}", content, offset=first, strides=(stride,))

    def _kept(self, file: Path, shard: Shard) -> mmap.mmap | None:
        """A shard of the cache, whole, or None. It will not make room as long as it is mapped.

        This process reads all of it when it comes upon it first: 30 ms for 32 MB, a twentieth of the time to fetch it.
        """
        with contextlib.suppress(FileNotFoundError), file.open("rb") as stream:
            fcntl.flock(stream, fcntl.LOCK_SH)  # the mapping keeps the file open, and so the lock
            status = os.fstat(stream.fileno())
            if status.st_nlink == 0 or status.st_size != shard.bytes:  # it made room a moment ago, or is damaged
                return None
            content = mmap.mmap(stream.fileno(), 0, access=mmap.ACCESS_READ)
            if shard.sha256 not in self._verified:
                if hashlib.sha256(content).hexdigest() != shard.sha256:
                    return None
                self._verified.add(shard.sha256)
            os.utime(file)
            return content
        return None

    def _whole(self, shard: Shard) -> bytes:
        """A shard as it was written. Raises OSError where it is another."""
        content: bytes = self._litdata.download_bytes(f"{self._address}/{shard.filename}", 0, shard.bytes, "")
        if hashlib.sha256(content).hexdigest() != shard.sha256:
            raise OSError(f"damaged, or of another pack: its SHA-256 is not the one in {INDEX}")
        return content

    def _patiently(self, name: str, action: Callable[[], T]) -> T:
        """What `action` returns, tried again and again. Raises ImagesLost where it always fails, or the server says no."""
        from boto3.exceptions import Boto3Error
        from botocore.exceptions import BotoCoreError, ClientError

        for attempt in range(1, self._attempts + 1):
            try:
                return action()
            except (Boto3Error, BotoCoreError, ClientError, OSError, ValueError) as error:
                if attempt == self._attempts or _is_final(error):
                    raise ImagesLost(f"{self._address}/{name}{_endpoint()}: {' '.join(str(error).split())}") from None
            time.sleep(_FIRST_PAUSE_SECONDS * 2 ** min(attempt - 1, _DOUBLINGS) * random.uniform(0.5, 1.5))
        raise AssertionError("unreachable")

    def _keep(self, content: bytes, file: Path) -> None:
        """Writes a shard to the cache, unless all that is there is in use."""
        try:
            with _alone(self._cache / "room"):
                if self._make_room(len(content)):
                    write_atomically(file, content)
        except OSError as error:
            remedy = "make room there, lower --data.cache_gb, or name another folder with LITDATA_CACHE_DIR"
            raise ImagesLost(f"{self._cache}: {error.strerror}: a shard cannot be kept; {remedy}") from None

    def _make_room(self, needed: int) -> bool:
        """Removes shards that no process has open, the ones opened longest ago first. Whether that was enough."""
        found = []
        for file in (file for file in self._cache.iterdir() if file.suffix != ".lock"):
            with contextlib.suppress(FileNotFoundError):
                status = file.stat()
                found.append((status.st_mtime, status.st_size, file))
        excess = sum(size for _, size, _ in found) + needed - self._cache_bytes
        for _, size, file in sorted(found):
            if excess > 0 and _removed(file):
                excess -= size
        return excess <= 0


def _removed(file: Path) -> bool:
    """Removes a shard unless a process has it open."""
    with contextlib.suppress(BlockingIOError), file.open("rb") as stream:
        fcntl.flock(stream, fcntl.LOCK_EX | fcntl.LOCK_NB)
        for gone in (file, Path(f"{file}.lock")):
            gone.unlink(missing_ok=True)
        return True
    return False


@contextlib.contextmanager
def _alone(file: Path) -> Iterator[None]:
    """While nobody else on this machine is alone with the same file. A process that ends lets go of it, however it ends."""
    from filelock import FileLock

    with FileLock(f"{file}.lock"):
        yield


def _attempts() -> int:
    told = os.environ.get("AWS_MAX_ATTEMPTS", f"{_ATTEMPTS}")
    if not told.isdecimal() or int(told) < 1:
        raise InputError(f"AWS_MAX_ATTEMPTS {told}: must be a whole number of at least 1")
    return int(told)


def _is_final(error: Exception) -> bool:
    """Whether asking again is in vain: no right, no such thing, no credentials, no address."""
    response: dict[str, Any] = getattr(error, "response", None) or {}
    status = response.get("ResponseMetadata", {}).get("HTTPStatusCode", 0)
    is_refusal = 400 <= status < 500 and status not in (408, 429)
    return is_refusal or isinstance(error, ValueError) or type(error).__name__ == "NoCredentialsError"


def _endpoint() -> str:
    endpoint = os.environ.get("AWS_ENDPOINT_URL_S3") or os.environ.get("AWS_ENDPOINT_URL")
    return f" at {endpoint}" if endpoint else ""
