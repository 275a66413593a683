"""Sets of images, each known by its number: in the device's memory, or on the host and fetched ahead of the step."""

import hashlib
from abc import ABC, abstractmethod
from collections import deque
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor

import torch
from torch import Tensor

from vae_dist.data import binarized, rows_at_once, white
from vae_dist.data.order import epoch_order

_FETCHERS = 2  # threads
_STEPS_AHEAD = 8  # enough for a slow fetch now and then; memory stays that of some more batches
_MOST_AT_ONCE = 2048


class Images(ABC):
    """uint8 images in 0 … 255, all of one shape."""

    shape: tuple[int, ...]  # channels, height, width
    device: torch.device = torch.device("cpu")
    labels: Tensor | None = None  # int64 (n,) on the host, of a set that has them

    @abstractmethod
    def __len__(self) -> int: ...

    @abstractmethod
    def digest(self) -> str:
        """A SHA-256, in hex, of all that the set holds."""

    @abstractmethod
    def to(self, device: torch.device) -> "Images":
        """The same images, given out on another device."""

    @abstractmethod
    def binarized(self, key: int) -> "Images":
        """The same images made black and white once, by `vae_dist.data.binary`."""

    @abstractmethod
    def rows(self, indices: Tensor) -> Tensor:
        """The images with some numbers, int64 of any shape: uint8 (*indices.shape, *shape) on the device.

        A filler gets the first image.
        """

    def stream(self, steps: Tensor) -> Iterator[Tensor]:
        """`rows` of each of some steps, int64 (steps, …), one after the other."""
        return map(self.rows, steps)

    def order(self, seed: int, epoch: int, batch_size: int) -> Tensor:
        """The order in which an epoch of training takes them in batches, int64 (n,), on the device."""
        return epoch_order(seed, epoch, len(self), self.device)

    def blocks(self) -> Iterator[Tensor]:
        """All images by their numbers, some at a time."""
        numbers = torch.arange(len(self), device=self.device)
        return map(self.rows, torch.split(numbers, rows_at_once(self.shape, _MOST_AT_ONCE)))


class Resident(Images):
    """Images in the memory of the device."""

    def __init__(self, pixels: Tensor, labels: Tensor | None = None) -> None:
        """`pixels` are uint8 (n, *shape), `labels` int64 (n,)."""
        self.pixels, self.labels = pixels, labels
        self.shape, self.device = tuple(pixels.shape[1:]), pixels.device
        # Rows of two dimensions: index_select copies those twice as fast as advanced indexing does images.
        self._rows = pixels.flatten(1)

    def __len__(self) -> int:
        return len(self.pixels)

    def digest(self) -> str:
        return hashlib.sha256(self.pixels.cpu().numpy().data).hexdigest()

    def to(self, device: torch.device) -> "Resident":
        return Resident(self.pixels.to(device), self.labels)

    def binarized(self, key: int) -> "Resident":
        return Resident(binarized(self.pixels, key), self.labels)

    def rows(self, indices: Tensor) -> Tensor:
        return self._rows.index_select(0, indices.flatten().clamp(min=0)).view(*indices.shape, *self.shape)


def first_images(images: Images, n: int) -> Tensor:
    """The first `n` images, or all where there are fewer: uint8 (n, *shape)."""
    return images.rows(torch.arange(min(n, len(images)), device=images.device))


class HostImages(Images):
    """Images that stay on the host or on its disk; threads fetch those of the next steps."""

    @abstractmethod
    def fetch(self, indices: Tensor) -> Tensor:
        """The images with some numbers, int64 (n,): uint8 (n, *shape), both on the host. Called by several threads."""

    def announce(self, steps: Tensor) -> None:
        """Says which images will be fetched next, int64 (steps, …) on the host with fillers, and that no others will."""

    def to(self, device: torch.device) -> "HostImages":
        self.device = device
        return self

    def binarized(self, key: int) -> "HostImages":
        return _Binarized(self, key)

    def rows(self, indices: Tensor) -> Tensor:
        return self._on_device(self._fetched(indices.cpu()))

    def stream(self, steps: Tensor) -> Iterator[Tensor]:
        copied = deque[torch.cuda.Event]()
        for found in self._fetched_ahead(steps.cpu()):
            yield self._on_device(found)
            if self.device.type == "cuda":
                # A copy waits behind the steps before it, and its pinned memory is in use till then: no more than so many.
                copied.append(torch.cuda.current_stream().record_event())
                if len(copied) > _STEPS_AHEAD:
                    copied.popleft().synchronize()

    def _fetched_ahead(self, steps: Tensor) -> Iterator[Tensor]:
        """The images of each step, on the host; threads fetch those of the next ones."""
        pool, ahead = ThreadPoolExecutor(_FETCHERS, "fetch", self._begin_fetching), deque[Future[Tensor]]()
        self.announce(steps)
        try:
            for indices in steps:
                ahead.append(pool.submit(self._fetched, indices))
                if len(ahead) > _STEPS_AHEAD:
                    yield ahead.popleft().result()
            while ahead:
                yield ahead.popleft().result()
        finally:
            pool.shutdown(cancel_futures=True)
            self.announce(steps[:0])

    def _begin_fetching(self) -> None:
        """In each thread: as in torch's own loaders, it works alone, and for the GPU of this rank."""
        torch.set_num_threads(1)
        if self.device.type == "cuda":
            torch.cuda.set_device(self.device)

    def _fetched(self, indices: Tensor) -> Tensor:
        found = self.fetch(indices.flatten().clamp(min=0)).view(*indices.shape, *self.shape)
        return found.pin_memory() if self.device.type == "cuda" else found

    def _on_device(self, found: Tensor) -> Tensor:
        return found.to(self.device, non_blocking=True)


class _Binarized(HostImages):
    """Made black and white when they are fetched."""

    def __init__(self, grey: HostImages, key: int) -> None:
        self._grey, self._key = grey, key
        self.shape, self.device = grey.shape, grey.device

    def __len__(self) -> int:
        return len(self._grey)

    def digest(self) -> str:
        return hashlib.sha256(f"{self._grey.digest()} {self._key}".encode()).hexdigest()

    def fetch(self, indices: Tensor) -> Tensor:
        return white(self._grey.fetch(indices), indices, self._key)

    def announce(self, steps: Tensor) -> None:
        self._grey.announce(steps)

    def order(self, seed: int, epoch: int, batch_size: int) -> Tensor:
        return self._grey.order(seed, epoch, batch_size).to(self.device)
