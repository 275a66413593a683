"""Times all-reduces over gloo: run by communication.py, once for each process.

RANK=R WORLD_SIZE=N python -m benchmarks.all_reduce --store FILE --sizes BYTES ... --budget SECONDS
Rank zero prints one JSON list: [bytes, calls' median, lowest and highest seconds, calls] of each size.
"""

import argparse
import json
import os
import statistics
import time
from datetime import timedelta

import torch
import torch.distributed as dist
from torch import Tensor

PASSES = 3  # over all sizes, so that a moment's load does not fall on one of them alone
MOST = 100  # calls of a size in a pass
SILENCE = timedelta(minutes=2)  # more than the slowest single call takes; a process left alone ends then


def call(buffer: Tensor) -> float:
    """The seconds of one sum over all processes, as DDP's hook does it."""
    start = time.perf_counter()
    dist.all_reduce(buffer)
    return time.perf_counter() - start


def timings(buffer: Tensor, budget: float) -> list[float]:
    """The seconds of as many calls, one after the other, as fit into the budget. All ranks make the same number."""
    warm = torch.tensor(call(buffer))  # pages are touched, TCP's window opens
    dist.all_reduce(warm, dist.ReduceOp.MAX)
    return [call(buffer) for _ in range(min(MOST, max(1, int(budget / warm.item()))))]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--store", required=True, help="file through which the processes find each other")
    parser.add_argument("--sizes", type=int, nargs="+", required=True, help="bytes of the float32 buffers")
    parser.add_argument("--budget", type=float, required=True, help="seconds to spend on a size, roughly")
    args = parser.parse_args()
    rank, processes = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
    dist.init_process_group("gloo", f"file://{args.store}", timeout=SILENCE, world_size=processes, rank=rank)
    buffers = {size: torch.zeros(size // 4) for size in args.sizes}
    seconds: dict[int, list[float]] = {size: [] for size in args.sizes}
    for _ in range(PASSES):
        for size, buffer in buffers.items():
            seconds[size] += timings(buffer, args.budget / PASSES)
    if rank == 0:
        print(json.dumps([[size, statistics.median(s), min(s), max(s), len(s)] for size, s in seconds.items()]), flush=True)
    dist.barrier()
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
