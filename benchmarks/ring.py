"""The time of an all-reduce, on paper: a ring of N processes, each step of which costs a latency and some bytes.

seconds(N, bytes) = 2 (N - 1) latency + 2 (N - 1) / N * bytes / bandwidth

In a ring each process sends N - 1 parts of 1/N of the buffer to be added, and N - 1 to be spread.
"""

import json
import math
from collections.abc import Iterable
from pathlib import Path
from typing import Any, NamedTuple

from vae_dist.config import InputError

MEASURED = Path(__file__).parent / "communication.json"  # where communication.py leaves what it found


class Ring(NamedTuple):
    latency: float  # seconds of a step, whatever it carries
    bandwidth: float  # bytes a second that one process sends

    def seconds(self, processes: int, size: float) -> float:
        """What a sum of `size` bytes over all processes takes; one process has nothing to sum."""
        steps = 2 * (processes - 1)
        return steps * self.latency + steps / processes * size / self.bandwidth


class Timing(NamedTuple):
    """A measured all-reduce."""

    processes: int
    size: int  # bytes of the buffer
    seconds: float  # median of the calls
    lowest: float
    highest: float
    calls: int


def fit(timings: Iterable[Timing]) -> Ring:
    """The ring whose relative errors have the least squares; neither of its terms is negative.

    Relative, because the times span four orders of magnitude, and the small ones tell the latency.
    """
    # seconds = a latency + b / bandwidth, divided by the measured seconds: u latency + v / bandwidth = 1
    rows = []
    for timing in timings:
        steps = 2 * (timing.processes - 1)
        rows.append((steps / timing.seconds, steps / timing.processes * timing.size / timing.seconds))
    uu, uv, vv = (sum(row[i] * row[j] for row in rows) for i, j in ((0, 0), (0, 1), (1, 1)))
    u, v = sum(row[0] for row in rows), sum(row[1] for row in rows)
    determinant = uu * vv - uv * uv
    if determinant <= 1e-9 * uu * vv:
        raise InputError("a latency and a bandwidth cannot be told from buffers of a single size")
    latency, per_byte = (u * vv - v * uv) / determinant, (v * uu - u * uv) / determinant
    if latency <= 0:
        latency, per_byte = 0.0, v / vv
    elif per_byte <= 0:
        latency, per_byte = u / uu, 0.0
    return Ring(latency, 1 / per_byte if per_byte else math.inf)


def error(ring: Ring, timing: Timing) -> float:
    """How far the paper is from the measurement, relative to it: -0.5 says half the time that it took."""
    return ring.seconds(timing.processes, timing.size) / timing.seconds - 1


def read_measured(path: Path) -> dict[str, Ring]:
    """The fitted networks of a communication.json by name. Raises InputError where it is no such file."""
    try:
        networks: dict[str, Any] = json.loads(path.read_text())["networks"]
        rings = {name: Ring(found["latency_us"] / 1e6, found["gbytes_per_s"] * 1e9) for name, found in networks.items()}
    except (ValueError, KeyError, TypeError, AttributeError):
        raise InputError(f"{path}: not what `python -m benchmarks.communication` writes") from None
    for name, ring in rings.items():
        if not (0 <= ring.latency < math.inf and ring.bandwidth > 0):
            raise InputError(f"{path}: {name} has a latency or bandwidth that no network has")
    return rings
