"""What a sum of gradients over processes costs: measured over gloo, and fitted with the model of a ring.

python -m benchmarks.communication           (make communication)
Prints a table for each network, and writes communication.json, which scaling.py reads.
"""

import argparse
import contextlib
import json
import math
import os
import platform
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch

from benchmarks.namespaces import DEVICE, Link, inside, linked, why_not
from benchmarks.ring import MEASURED, Ring, Timing, error, fit
from vae_dist.config import InputError
from vae_dist.distributed import run_entry_point

ROOT = Path(__file__).parent.parent
SEED_MODEL = 4 * 652_824  # bytes of its gradient
SIZES = [4 * 2**10, 32 * 2**10, 256 * 2**10, 2**20, SEED_MODEL, 8 * 2**20, 32 * 2**20]
PATIENCE = 600.0  # seconds for all sizes of a network, at most
MISFIT = 0.3  # a relative error that is worth a line
ROW = "{:<10}{:>12}{:>12}{:>20}{:>7}{:>12}{:>8}"

LINKS = {  # two processes, each in a network namespace; a slow link has a rate that our own switch can keep up with
    "namespaces": Link(),
    "rate-1gbit": Link(mbit_per_s=1000),
    "rate-100mbit": Link(mbit_per_s=100),
    "delay-1ms-rate-1gbit": Link(1, 1000),
    "delay-10ms-rate-1gbit": Link(10, 1000),
}


class Network(NamedTuple):
    """What was found of one."""

    slowed_by: str
    ring: Ring
    timings: list[Timing]


def cores() -> int:
    return len(os.sched_getaffinity(0))


def tidy_on_sigterm() -> None:
    """SIGTERM then leaves as Ctrl-C does: processes are ended and namespaces removed on the way out."""
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(128 + signal.SIGTERM))


def together(commands: Sequence[Sequence[str]], device: str, **environment: str) -> str:
    """What the first of several processes printed that end well, each with its RANK. None outlives the call."""
    processes: list[subprocess.Popen[str]] = []
    with tempfile.TemporaryDirectory() as folder, contextlib.ExitStack() as stack:
        for rank, command in enumerate(commands):
            errors = stack.enter_context((Path(folder) / str(rank)).open("w"))
            own = {"GLOO_SOCKET_IFNAME": device, "OMP_NUM_THREADS": "1", "RANK": str(rank), "WORLD_SIZE": str(len(commands))}
            printed = subprocess.PIPE if rank == 0 else subprocess.DEVNULL  # little: a pipe holds it
            process = subprocess.Popen(
                command, cwd=ROOT, env=os.environ | own | environment, stdout=printed, stderr=errors, text=True
            )
            stack.callback(_end, process)
            processes.append(process)
        deadline = time.monotonic() + PATIENCE
        while any(process.poll() is None for process in processes):
            if any(process.poll() for process in processes) or time.monotonic() > deadline:
                break
            time.sleep(0.1)
        for rank, process in enumerate(processes):
            if process.poll():
                told = (Path(folder) / str(rank)).read_text().strip().splitlines()
                raise SystemExit(f"error: process {rank} ended with {process.returncode}: {told[-1] if told else 'in silence'}")
        if any(process.poll() is None for process in processes):
            raise SystemExit(f"error: {len(commands)} processes took longer than {PATIENCE:.0f} seconds")
        assert processes[0].stdout is not None
        return processes[0].stdout.read()


def _end(process: "subprocess.Popen[str]") -> None:
    process.kill()
    process.wait()
    if process.stdout is not None:
        process.stdout.close()


def measure(starts: Sequence[Sequence[str]], device: str, sizes: Sequence[int], budget: float) -> list[Timing]:
    """All-reduces by one process for each of `starts`, the words that go before its command."""
    with tempfile.TemporaryDirectory() as folder:
        command = [sys.executable, "-m", "benchmarks.all_reduce", "--store", f"{folder}/store", "--budget", str(budget)]
        sizes_told = ["--sizes", *map(str, sizes)]
        found = json.loads(together([[*start, *command, *sizes_told] for start in starts], device))
    return [Timing(len(starts), size, *figures) for size, *figures in found]


def on_loopback(sizes: Sequence[int], budget: float, counts: Sequence[int] = (2, 4)) -> Network:
    """The machine's own loopback. Processes that share a core are measured, but not fitted: they wait for the core."""
    timings = [timing for count in counts for timing in measure([[]] * count, "lo", sizes, budget)]
    return Network("nothing", fit([timing for timing in timings if timing.processes <= max(2, cores())]), timings)


def between_namespaces(link: Link, sizes: Sequence[int], budget: float) -> Network:
    with linked(link) as hosts:
        timings = measure([inside(name) for name in hosts.names], DEVICE, sizes, budget)
    return Network(hosts.slowed_by, fit(timings), timings)


def told_size(size: int) -> str:
    return f"{size / 1e6:.2f} MB" if size >= 1e6 else f"{size / 1e3:.1f} kB"


def table(name: str, network: Network) -> list[str]:
    """What was measured, beside what the fitted ring says of it."""
    slowed = "" if network.slowed_by == "nothing" else f" (slowed by {network.slowed_by})"
    lines = ["", name + slowed, ROW.format("processes", "buffer", "median ms", "lowest-highest", "calls", "fitted ms", "error")]
    for timing in network.timings:
        fitted, spread = network.ring.seconds(*timing[:2]), f"{timing.lowest * 1e3:.2f}-{timing.highest * 1e3:.2f}"
        figures = [f"{timing.seconds * 1e3:.2f}", spread, timing.calls, f"{fitted * 1e3:.2f}"]
        lines.append(ROW.format(timing.processes, told_size(timing.size), *figures, f"{error(network.ring, timing):+.0%}"))
    ring = network.ring
    lines.append(f"fit: {ring.latency * 1e6:,.0f} µs a step, {ring.bandwidth / 1e9:.3f} GB/s")
    return lines + [f"misfit: {line}" for line in misfits(network)]


def misfits(network: Network) -> list[str]:
    """Where the ring is far from what was measured."""
    lines = []
    for count in sorted({timing.processes for timing in network.timings}):
        bad = [t for t in network.timings if t.processes == count and abs(error(network.ring, t)) > MISFIT]
        if bad:
            worst = max(bad, key=lambda timing: abs(math.log(1 + error(network.ring, timing))))
            why = f" (they share {cores()} cores, and were not fitted)" if count > max(2, cores()) else ""
            times = 1 / (1 + error(network.ring, worst))
            sizes = ", ".join(told_size(timing.size) for timing in bad)
            lines.append(f"{count} processes{why} at {sizes}; {told_size(worst.size)} took {times:.1f} times what is fitted")
    return lines


def as_json(network: Network) -> dict[str, Any]:
    errors = [error(network.ring, timing) for timing in network.timings]
    return {
        "latency_us": network.ring.latency * 1e6,
        "gbytes_per_s": network.ring.bandwidth / 1e9,
        "slowed_by": network.slowed_by,
        "timings": [timing._asdict() | {"error": off} for timing, off in zip(network.timings, errors, strict=True)],
    }


def main(args: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.communication", description="Time all-reduces over gloo, and fit the model of a ring."
    )
    parser.add_argument("--budget", type=float, default=1.0, help="seconds to spend on a size, roughly; medians are told")
    parser.add_argument("--networks", nargs="+", default=["loopback", *LINKS], help=f"of loopback, {', '.join(LINKS)}")
    parser.add_argument("--out", type=Path, default=MEASURED, help="the JSON file to write")
    options = parser.parse_args(args)
    if not 0 < options.budget <= 60:
        raise InputError(f"--budget {options.budget}: must be positive, and at most 60 seconds")
    for name in options.networks:
        if name != "loopback" and name not in LINKS:
            raise InputError(f"--networks {name}: must be of loopback, {', '.join(LINKS)}")
    tidy_on_sigterm()
    machine = f"{platform.machine()}, {cores()} cores, torch {torch.__version__}"
    print(f"{machine}; sums of float32 buffers over gloo; one process alone has nothing to sum", flush=True)
    networks: dict[str, Network] = {}
    problem = why_not() if set(options.networks) - {"loopback"} else None
    for name in options.networks:
        if name == "loopback":
            networks[name] = on_loopback(SIZES, options.budget)
        elif problem is None:
            networks[name] = between_namespaces(LINKS[name], SIZES, options.budget)
        else:
            continue
        print("\n".join(table(name, networks[name])), flush=True)
    if problem is not None:
        print(f"\nleft out: {', '.join(name for name in options.networks if name not in networks)}: {problem}")
    found = {name: as_json(network) for name, network in networks.items()}
    result = {"machine": machine, "date": time.strftime("%Y-%m-%d"), "networks": found}
    options.out.write_text(json.dumps(result, indent=1) + "\n")
    return 0


if __name__ == "__main__":
    run_entry_point(main)
