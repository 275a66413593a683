"""vae_dist beside the plain notebook loop and the tightest loop of the same mathematics, interleaved in one run.

python -m benchmarks.bench --data DIR        (make bench)
Prints a table and what bounds each case, and writes bench.json and speed.png to --out.
"""

import argparse
import json
import os
import platform
import re
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import torch
from tqdm import tqdm

from benchmarks.plot import plot
from benchmarks.report import HEAD, LEGEND, ROW, Case, Found, bound, epoch_floor, line, summary, with_shares
from benchmarks.watch import BATCH
from vae_dist.config import DataConfig
from vae_dist.data.idx import read_idx
from vae_dist.data.sources import fetch_missing
from vae_dist.distributed import run_entry_point
from vae_dist.tracking import read_rows

HERE = Path(__file__).parent


def cases(hidden: list[int]) -> list[Case]:
    return [
        Case(program, width, precision, processes)
        for width in hidden
        for program, precision, processes in [
            ("notebook", "fp32", 1),
            ("tight", "fp32", 1),
            ("vae_dist", "fp32", 1),
            ("vae_dist", "fp32", 2),
            ("tight", "bf16", 1),
            ("vae_dist", "bf16", 1),
            ("vae_dist", "bf16", 2),
        ]
    ]


def epochs(case: Case) -> int:
    """The fastest counts. One of a wide network is long enough for its first steps not to show, and two take too long."""
    return 2 if case.hidden < 1000 else 1


def finished(command: list[str]) -> tuple[list[dict[str, Any]], float, float]:
    """Runs a program to its end: the JSON objects it printed, the seconds it took, and its largest process's peak MiB."""
    start = time.perf_counter()
    with tempfile.TemporaryFile("w+") as errors:
        job = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=errors, text=True, cwd=HERE.parent)
        assert job.stdout is not None
        with job.stdout:
            printed = job.stdout.read()
        _, status, usage = os.wait4(job.pid, 0)
        job.returncode = os.waitstatus_to_exitcode(status)
        if job.returncode != 0:
            errors.seek(0)
            raise SystemExit(f"error: {' '.join(command)} ended with {job.returncode}:\n{errors.read()[-2000:]}")
    objects = [json.loads(line) for line in printed.splitlines() if line.startswith("{")]
    return objects, time.perf_counter() - start, usage.ru_maxrss / 1024


def command(case: Case, data: str, output: str, watch: list[str]) -> list[str]:
    """How a user would start the case, but watched."""
    launcher = ["torch.distributed.run", "--standalone", f"--nproc_per_node={case.processes}", "-m"]
    start = [sys.executable, "-m", *(launcher if case.processes > 1 else []), "benchmarks.watch", *watch]
    if case.program != "vae_dist":
        options = [f"--data={data}", f"--epochs={epochs(case)}", f"--hidden={case.hidden}"]
        precision = [f"--precision={case.precision}"] if case.program == "tight" else []
        return [*start, f"benchmarks.{case.program}_loop", *options, *precision]
    options = [f"--data.root={data}", f"--output={output}", f"--trainer.epochs={epochs(case)}", f"--model.hidden={case.hidden}"]
    return [*start, "vae_dist.train", *options, f"--trainer.precision={case.precision}", "--tracking.wandb=offline"]


def measure(case: Case, data: str) -> dict[str, Any]:
    """One run: seconds of the fastest epoch, to the end of the first step, and outside of epochs; peak MiB.

    `communication_share` is the part of an epoch that several processes spent on the sum of their gradients; None if unknown.
    """
    with tempfile.TemporaryDirectory() as folder:
        started = time.time()
        printed, seconds, peak = finished(command(case, data, f"{folder}/run", []))
        rows = read_rows(Path(folder) / "run" / "metrics.jsonl")
    seconds_of = [row["train_seconds"] for row in rows if "train_seconds" in row] or printed[-1]["train_seconds"]
    shares = [row["communication_share"] for row in rows if "train_seconds" in row and "communication_share" in row]
    return {
        "epoch_seconds": min(seconds_of),
        "start_seconds": printed[0]["first_step_at"] - started,
        "outside_epochs_seconds": seconds - sum(seconds_of),
        "peak_mib": peak,
        "communication_share": 0.0 if case.processes == 1 else statistics.median(shares) if shares else None,
    }


def profile(case: Case, data: str, steps: int) -> dict[str, Any]:
    """Where a step goes, and what it would take at least. `steps` make an epoch; up to 100 of its first half are watched."""
    window = [str(min(100, steps // 4)), str(min(200, steps // 2))]
    with tempfile.TemporaryDirectory() as folder:
        watch = ["--profile", *window, f"--precision={case.precision}"]
        printed, *_ = finished(command(case, data, f"{folder}/run", watch))
    return printed[0]


def main(options: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.bench", description="Time vae_dist beside the plain notebook loop and the tightest loop."
    )
    parser.add_argument("--data", required=True, help="folder with MNIST/raw in it")
    parser.add_argument("--rounds", type=int, default=3, help="how often each case is run; medians are told")
    parser.add_argument("--hidden", type=int, nargs="*", default=[400, 4000], help="widths of the hidden layer")
    parser.add_argument("--only", default="", help="regular expression: only the cases in whose names it is found")
    parser.add_argument("--out", type=Path, default=HERE, help="folder of bench.json and speed.png")
    args = parser.parse_args(options)
    fetch_missing(DataConfig(root=args.data))
    images = len(read_idx(Path(args.data) / "MNIST" / "raw" / "train-images-idx3-ubyte", 3))
    steps = -(-images // BATCH)
    runs: dict[Case, list[dict[str, Any]]] = {case: [] for case in cases(args.hidden) if re.search(args.only, case.name)}
    # Round by round, so that whatever else the machine does meets all cases alike.
    for case in tqdm([case for _ in range(args.rounds) for case in runs], unit="run", leave=False, disable=None):
        runs[case].append(measure(case, args.data))
    profiled = tqdm(runs, desc="where the steps go", unit="case", leave=False, disable=None)
    profiles = {case: profile(case, args.data, steps) for case in profiled}
    found: list[Found] = []
    for case in runs:
        alike = [profile for other, profile in profiles.items() if other[1:] == case[1:]]
        of_case = with_shares(summary(case, images, runs[case]), profiles[case]) | {"floor": epoch_floor(alike, steps)}
        found.append(of_case | {"bound": bound(of_case)})
    machine = f"{platform.machine()}, {len(os.sched_getaffinity(0))} cores, torch {torch.__version__}"
    print(f"{machine}; batch {BATCH}; medians of {args.rounds} rounds (lowest-highest)")
    print("\n".join([ROW.format(*HEAD), *map(line, found), LEGEND, ""]))
    print("\n".join(f"{case.name}: {of_case['bound']}" for case, of_case in zip(runs, found, strict=True)))
    result = {"machine": machine, "date": time.strftime("%Y-%m-%d"), "cases": found}
    args.out.mkdir(parents=True, exist_ok=True)
    (args.out / "bench.json").write_text(json.dumps(result, indent=1) + "\n")
    plot(result, args.out / "speed.png")
    return 0


if __name__ == "__main__":
    run_entry_point(main)
