"""Whether training in two processes takes the time that one process and the ring of its network add up to.

python -m benchmarks.scaling_check --data DIR        (after python -m benchmarks.communication)
Prints a line for each network: the step on paper, and as it was measured.
"""

import argparse
import contextlib
import os
import socket
import statistics
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path

from benchmarks.communication import LINKS, tidy_on_sigterm, together
from benchmarks.namespaces import DEVICE, address, inside, linked, why_not
from benchmarks.ring import MEASURED, read_measured
from vae_dist.config import DataConfig
from vae_dist.data.sources import fetch_missing
from vae_dist.distributed import run_entry_point
from vae_dist.tracking import read_rows

IMAGES, EPOCHS = 64, 3  # images of a process in a step; the first epoch is not counted
ROW = "{:<10}{:<24}{:>12}{:>15}{:>13}{:>13}{:>8}"


def cores() -> list[int]:
    return sorted(os.sched_getaffinity(0))


def step_seconds(starts: Sequence[Sequence[str]], device: str, address: str, hidden: int, data: str) -> float:
    """The median epoch's seconds for a step, with IMAGES images and one thread for each process."""
    with tempfile.TemporaryDirectory() as folder, socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
        free.close()
        options = {"data.root": data, "data.batch_size": IMAGES * len(starts), "trainer.epochs": EPOCHS}
        options |= {"model.hidden": hidden, "tracking.wandb": "disabled", "output": f"{folder}/run"}
        command = [sys.executable, "-m", "vae_dist.train", *(f"--{name}={value}" for name, value in options.items())]
        # Each by itself on a machine of one core: one thread, and sums over gloo rather than in shared memory.
        pinned = [[*start, "taskset", "--cpu-list", str(core)] for start, core in zip(starts, cores(), strict=False)]
        environment = {
            "LOCAL_WORLD_SIZE": "1",
            "MASTER_ADDR": address,
            "MASTER_PORT": str(port),
            "LOCAL_RANK": "0",
            "CUDA_VISIBLE_DEVICES": "",
        }
        together([[*start, *command] for start in pinned], device, **environment)
        rows = read_rows(Path(folder) / "run" / "metrics.jsonl")
    epochs = [row for row in rows if "train_seconds" in row][1:]
    images = IMAGES * len(starts)
    return float(statistics.median(row["train_seconds"] / -(-row["n"] // images) for row in epochs))


def main(args: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.scaling_check", description="Compare the model of scaling.py with training over gloo."
    )
    parser.add_argument("--data", required=True, help="folder with MNIST/raw in it")
    parser.add_argument("--measured", type=Path, default=MEASURED, help="what benchmarks.communication wrote")
    parser.add_argument("--hidden", type=int, nargs="+", default=[400, 4000], help="widths of the hidden layer")
    options = parser.parse_args(args)
    tidy_on_sigterm()
    fetch_missing(DataConfig(root=options.data))
    rings = read_measured(options.measured)
    problem = why_not() if set(rings) & set(LINKS) else None
    print(f"two processes with {IMAGES} images and a thread each; ms a step, medians of {EPOCHS - 1} epochs")
    print(ROW.format("hidden", "network", "one alone", "+ all-reduce", "= on paper", "measured", "error"))
    for hidden in options.hidden:
        alone = step_seconds([[]], "lo", "127.0.0.1", hidden, options.data)
        gradient = 4 * (2 * 784 * hidden + 60 * hidden + hidden + 40 + hidden + 784)  # bytes: 784-hidden-20
        for name, ring in rings.items():
            if name != "loopback" and (name not in LINKS or problem is not None):
                continue
            with contextlib.ExitStack() as stack:
                starts: list[list[str]] = [[], []]
                if name != "loopback":
                    hosts = stack.enter_context(linked(LINKS[name]))
                    starts = [inside(namespace) for namespace in hosts.names]
                where = ("lo", "127.0.0.1") if name == "loopback" else (DEVICE, address(0))
                measured = step_seconds(starts, *where, hidden, options.data)
            sums = ring.seconds(2, gradient)
            figures = [f"{seconds * 1e3:.2f}" for seconds in (alone, sums, alone + sums, measured)]
            print(ROW.format(hidden, name, *figures, f"{(alone + sums) / measured - 1:+.0%}"), flush=True)
    if problem is not None:
        print(f"left out all but loopback: {problem}")
    return 0


if __name__ == "__main__":
    run_entry_point(main)
