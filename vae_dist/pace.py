"""How fast a run is, and where the time of its steps goes: marks that cost next to nothing and wait for nothing."""

import resource
import time
from collections import defaultdict

import torch

PARTS = ("data", "compute", "communication")


def peak_memory_mib(device: torch.device) -> float:
    """The most memory that torch has taken of a GPU, or this process of its machine."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 2**20
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024


class Laps:
    """Adds up the seconds between marks by the name of the part that a mark ends.

    By the host's clock on a CPU; by events on a GPU, which are read when they have long passed.
    """

    def __init__(self, device: torch.device) -> None:
        self._on_gpu = device.type == "cuda"
        self._seconds: defaultdict[str, float] = defaultdict(float)
        self._last = time.perf_counter()
        self._events: list[tuple[str, torch.cuda.Event]] = []

    def mark(self, part: str) -> None:
        """Ends a part. Inside a CUDA graph it does nothing: a graph is one part."""
        if not self._on_gpu:
            now = time.perf_counter()
            self._seconds[part] += now - self._last
            self._last = now
        elif not torch.cuda.is_current_stream_capturing():
            event = torch.cuda.Event(enable_timing=True)  # type: ignore[no-untyped-call]
            event.record()
            self._events.append((part, event))

    def read(self) -> dict[str, float]:
        """Seconds by part since the last time. On a GPU it waits for the device."""
        if self._events:
            self._events[-1][1].synchronize()
        for (_, before), (part, after) in zip(self._events, self._events[1:], strict=False):
            self._seconds[part] += before.elapsed_time(after) / 1000
        self._events = self._events[-1:]  # the next part begins where this one ended
        seconds, self._seconds = self._seconds, defaultdict(float)
        return seconds


class Pace:
    """Images per second and shares of the parts of a step, of a window of steps and of an epoch, in this process's life."""

    def __init__(self, laps: Laps) -> None:
        self._laps = laps
        self.begin_epoch()

    def begin_epoch(self) -> None:
        self._laps.mark("between epochs")
        self._laps.read()
        self._epoch, self._window = _Span(), _Span()

    def add(self, images: float) -> None:
        """So many images have gone through, over all ranks."""
        parts = self._laps.read()
        for span in (self._epoch, self._window):
            span.add(images, parts)

    def end_window(self) -> dict[str, float]:
        """Figures of the window that ends here."""
        window, self._window = self._window, _Span()
        return window.figures()

    def end_epoch(self) -> dict[str, float]:
        """Figures of the epoch, as far as this process trained it."""
        return {"train_seconds": round(self._epoch.seconds(), 3)} | self._epoch.figures()


class _Span:
    def __init__(self) -> None:
        self._start = time.perf_counter()
        self._images = 0.0
        self._parts = dict.fromkeys(PARTS, 0.0)

    def add(self, images: float, parts: dict[str, float]) -> None:
        self._images += images
        for part in PARTS:
            self._parts[part] += parts.get(part, 0.0)

    def seconds(self) -> float:
        return time.perf_counter() - self._start

    def figures(self) -> dict[str, float]:
        """Images per second, and each part as a share of all parts of the steps: `data_share`, …"""
        total = sum(self._parts.values())
        shares = {f"{part}_share": round(seconds / total, 4) for part, seconds in self._parts.items() if total > 0}
        return {"images_per_second": round(self._images / max(self.seconds(), 1e-9), 1)} | shares
