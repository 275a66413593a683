"""Images in shards that are too far away, or too many, to be at hand all at once: each is fetched before it is needed."""

import os
import threading
import time
from collections import deque
from collections.abc import Callable
from concurrent.futures import FIRST_COMPLETED, Future, wait
from functools import partial
from pathlib import Path

import numpy as np
from torch import Tensor

from vae_dist.config import DataConfig, ImagesLost, InputError
from vae_dist.data.bucket import Bucket
from vae_dist.data.order import LANES, sharded_epoch_order
from vae_dist.data.packed import INDEX, Mapped, Shard, Sharded, mapped, read_index, require_size, sha256_of

_FETCHERS = 8  # threads: one connection to a bucket brings some 50 MB/s, after a wait
_MOST_AHEAD = 64  # shards that are mapped at once, unless a step needs more
_PAUSE_SECONDS = 5.0  # after a shard could not be fetched ahead


class Streamed(Sharded):
    """Images of a packed set in a bucket, `s3://bucket/prefix`, or in a folder."""

    def __init__(self, config: DataConfig, side: str) -> None:
        """Raises InputError where the set cannot be found, is not one of this package, or `--data.cache_gb` is too little."""
        root, cache_bytes = config.root.rstrip("/"), int(config.cache_gb * 1e9)
        if "://" in root:
            if not root.startswith("s3://"):
                raise InputError(f"--data.root {root}: must be s3://bucket/prefix, or a folder")
            bucket = Bucket(f"{root}/{side}", cache_bytes)
            super().__init__(bucket.index())
            open_shard, most = partial(bucket.open, self._image_bytes), self._most_ahead(cache_bytes)
        else:
            super().__init__(read_index(Path(root) / side))
            folder = _Folder(Path(root) / side, self._index.shards)
            open_shard, most = partial(folder.open, self._image_bytes), _MOST_AHEAD
        self._shelf = _Shelf(lambda number: open_shard(self._index.shards[number]), len(self._index.shards), most)

    def _most_ahead(self, cache_bytes: int) -> int:
        """Shards that this process may have at once, so that all processes of its machine fit into the cache."""
        processes = int(os.environ.get("LOCAL_WORLD_SIZE", "1"))
        largest = max(shard.bytes for shard in self._index.shards)
        most, needed = cache_bytes // (largest * processes), min(len(self._index.shards), LANES + 2)
        if most < needed:
            room = f"at least {needed * largest * processes / 1e9:.3g}: {needed} shards of {largest:,} bytes for each process"
            raise InputError(f"--data.cache_gb {cache_bytes / 1e9:g}: must be {room}")
        return min(most, _MOST_AHEAD)

    def order(self, seed: int, epoch: int, batch_size: int) -> Tensor:
        return sharded_epoch_order(seed, epoch, [shard.images for shard in self._index.shards], batch_size).to(self.device)

    def announce(self, steps: Tensor) -> None:
        shards = self._shards_of(steps.flatten().clamp(min=0))
        first = np.full(len(self._ends), -1)
        first[shards[::-1]] = np.arange(len(shards))[::-1]  # of a shard's places the first is written last
        needed = np.flatnonzero(first >= 0)
        self._shelf.expect(needed[first[needed].argsort()].tolist(), np.bincount(shards, minlength=len(self._ends)))

    def fetch(self, indices: Tensor) -> Tensor:
        found = super().fetch(indices)
        self._shelf.take(np.bincount(self._shards_of(indices), minlength=len(self._ends)))
        return found

    def shard(self, number: int) -> Mapped:
        return self._shelf.get(number)

    def _shards_of(self, indices: Tensor) -> "np.ndarray[tuple[int], np.dtype[np.int64]]":
        return np.searchsorted(self._ends, indices.numpy(), side="right")


class _Folder:
    """One side of a packed set on a disk, whose files somebody may replace while they are trained on."""

    def __init__(self, folder: Path, shards: list[Shard]) -> None:
        """Raises InputError where shards are missing, or have not the sizes that were written."""
        self._folder = folder
        self._written = {shard: self._time_of(shard) for shard in shards}

    def open(self, image_bytes: int, shard: Shard) -> Mapped:
        """The images of a shard. Raises ImagesLost where it is not the one of the index any more.

        A file of another time than when the index was read is compared with its SHA-256; the others need not be read for that.
        """
        file = self._folder / shard.filename
        try:
            written = self._time_of(shard)
        except InputError as error:
            raise ImagesLost(str(error)) from None
        if written != self._written[shard]:
            if sha256_of(file) != shard.sha256:
                raise ImagesLost(f"{file}: was replaced: its SHA-256 is not the one in {INDEX}")
            self._written[shard] = written
        return mapped(file, shard.images, image_bytes)

    def _time_of(self, shard: Shard) -> int:
        """When a file was written, in ns."""
        require_size(self._folder, shard)
        return (self._folder / shard.filename).stat().st_mtime_ns


class _Shelf:
    """The shards that are open, each from before its first use to after its last."""

    def __init__(self, open_shard: Callable[[int], Mapped], shards: int, most: int) -> None:
        """Of so many shards, those that nobody waits for yet are opened until `most` are open."""
        self._open, self._most = open_shard, most
        self._shards: dict[int, Future[Mapped]] = {}
        self._plan = deque[int]()  # to be opened ahead
        self._uses = np.zeros(shards, np.int64)  # images of each shard that will still be taken
        self._lost: Future[Mapped] = Future()  # fails with the first expected shard that somebody needs and cannot have
        self._changed = threading.Condition()

    def expect(self, numbers: list[int], uses: "np.ndarray[tuple[int], np.dtype[np.int64]]") -> None:
        """Opens shards ahead in this order, in threads, in place of those that were expected before."""
        with self._changed:
            self._uses, self._lost = uses, Future()
            self._plan = deque(numbers)
            self._close_unused()
        for _ in range(min(_FETCHERS, len(numbers))):
            threading.Thread(target=self._work, args=(self._plan,), name="shards ahead", daemon=True).start()

    def take(self, images: "np.ndarray[tuple[int], np.dtype[np.int64]]") -> None:
        """Says how many images of each shard were taken."""
        with self._changed:
            self._uses -= images
            self._close_unused()

    def get(self, number: int) -> Mapped:
        """An open shard. Raises ImagesLost where it cannot be had; then everybody else, too, until the next `expect`.

        For a server that is gone is gone for all shards: who waits for another, or would begin to, would double the patience.
        """
        with self._changed:
            lost, future = self._lost, self._shards.get(number)
            if future is None and not lost.done():
                future = self._shards[number] = Future()
                threading.Thread(target=self._fill, args=(number, future), name="shard needed", daemon=True).start()
        if future is not None and not future.done():
            wait((future, lost), return_when=FIRST_COMPLETED)
        found = future if future is not None and future.done() else lost
        if (error := found.exception()) is not None:
            with self._changed:
                if self._uses[number] > 0 and not lost.done():
                    lost.set_exception(error)
        return found.result()

    def _work(self, plan: deque[int]) -> None:
        """In a thread: opens the shards of a plan until it is done, or there is another."""
        while True:
            with self._changed:
                self._changed.wait_for(lambda: self._plan is not plan or not plan or len(self._shards) < self._most)
                if self._plan is not plan or not plan:
                    return
                number = plan.popleft()
                if number in self._shards or self._uses[number] <= 0:
                    continue
                future = self._shards[number] = Future()
            self._fill(number, future)
            if future.exception() is not None:  # whoever comes to need it asks again
                time.sleep(_PAUSE_SECONDS)
                with self._changed:
                    plan.appendleft(number)

    def _fill(self, number: int, future: Future[Mapped]) -> None:
        try:
            future.set_result(self._open(number))
        except BaseException as error:
            with self._changed:
                self._shards.pop(number, None)
            words = ImagesLost(f"{error}") if isinstance(error, OSError) else error
            future.set_exception(words)

    def _close_unused(self) -> None:
        """Forgets what is not expected; what is in use stays mapped until it is not."""
        for number in [n for n, future in self._shards.items() if future.done() and self._uses[n] <= 0]:
            del self._shards[number]
        self._changed.notify_all()
