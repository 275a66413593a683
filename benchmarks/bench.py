"""vae_dist beside the plain notebook loop and the tightest loop of the same mathematics, interleaved in one run.

python -m benchmarks.bench --data DIR        (make bench)
Prints a table, and writes bench.json to --out.
"""

import argparse
import json
import os
import platform
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any, NamedTuple

import torch
from tqdm import tqdm

from vae_dist.config import DataConfig
from vae_dist.data.sources import fetch_missing
from vae_dist.distributed import run_entry_point
from vae_dist.tracking import read_rows

HERE = Path(__file__).parent
EPOCHS = 2
ROW = "{:<46}{:>18}{:>12}{:>10}{:>10}{:>9}{:>9}"


class Case(NamedTuple):
    program: str  # notebook, tight or vae_dist
    hidden: int
    precision: str = "fp32"
    processes: int = 1

    @property
    def name(self) -> str:
        processes = f", {self.processes} processes" if self.processes > 1 else ""
        return f"784-{self.hidden}-20 {self.precision}: {self.program}{processes}"


CASES = [
    Case(program, hidden, precision, processes)
    for hidden in (400, 4000)
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


def finished(command: list[str]) -> tuple[str, float, float]:
    """Runs a program to its end: what it printed, the seconds it took, and its peak memory in MiB (of its largest process)."""
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
    return printed, time.perf_counter() - start, usage.ru_maxrss / 1024


def command(case: Case, data: str, output: str, epochs: int, module: str = "vae_dist.train") -> list[str]:
    """How a user would start the case."""
    if case.program != "vae_dist":
        options = ["--data", data, "--epochs", str(epochs), "--hidden", str(case.hidden)]
        precision = ["--precision", case.precision] if case.program == "tight" else []
        return [sys.executable, str(HERE / f"{case.program}_loop.py"), *options, *precision]
    launcher = ["torch.distributed.run", "--standalone", f"--nproc_per_node={case.processes}", "-m"]
    options = [f"--data.root={data}", f"--output={output}", f"--trainer.epochs={epochs}", f"--model.hidden={case.hidden}"]
    start = [sys.executable, "-m", *(launcher if case.processes > 1 else []), module]
    return [*start, *options, f"--trainer.precision={case.precision}", "--tracking.wandb=offline"]


def measure(case: Case, data: str) -> dict[str, Any]:
    """One run: the fastest epoch, the seconds outside training, and the peak memory."""
    with tempfile.TemporaryDirectory() as folder:
        printed, seconds, peak = finished(command(case, data, f"{folder}/run", EPOCHS))
        if case.program == "vae_dist":
            rows = read_rows(Path(folder) / "run" / "metrics.jsonl")
            epochs = [row["train_seconds"] for row in rows if "train_seconds" in row]
        else:
            epochs = json.loads(printed.splitlines()[-1])["train_seconds"]
    return {"epoch_seconds": min(epochs), "other_seconds": seconds - sum(epochs), "peak_mib": peak}


def profile(case: Case, data: str) -> dict[str, Any]:
    """Where the step of a vae_dist case goes."""
    with tempfile.TemporaryDirectory() as folder:
        printed, *_ = finished(command(case, data, f"{folder}/run", 1, module="benchmarks.step_profile"))
    found: dict[str, Any] = json.loads(next(line for line in printed.splitlines() if line.startswith("{")))
    return found


def summary(case: Case, runs: list[dict[str, Any]]) -> dict[str, Any]:
    epochs = [run["epoch_seconds"] for run in runs]
    return {
        "case": case._asdict(),
        "epoch_seconds": statistics.median(epochs),
        "epoch_seconds_spread": [min(epochs), max(epochs)],
        "images_per_second": 60_000 / statistics.median(epochs),
        "other_seconds": statistics.median(run["other_seconds"] for run in runs),
        "peak_mib": max(run["peak_mib"] for run in runs),
    }


def told(case: Case, found: dict[str, Any]) -> str:
    """A line of the table."""
    low, high = found["epoch_seconds_spread"]
    epoch = f"{found['epoch_seconds']:.2f} ({low:.2f}-{high:.2f})"
    gemm = f"{found['profile']['shares']['gemm']:.0%}" if "profile" in found else ""
    floor = f"{469 * found['profile']['gemm_floor_seconds']:.2f}" if "profile" in found else ""
    figures = [f"{found['images_per_second']:,.0f}", f"{found['other_seconds']:.1f}", f"{found['peak_mib']:,.0f}"]
    return ROW.format(case.name, epoch, *figures, gemm, floor)


def main() -> int:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.bench", description="Time vae_dist beside the plain notebook loop and the tightest loop."
    )
    parser.add_argument("--data", required=True, help="folder with MNIST/raw in it")
    parser.add_argument("--rounds", type=int, default=3, help="how often each case is run; medians are told")
    parser.add_argument("--hidden", type=int, nargs="*", default=[400, 4000], help="widths of the hidden layer")
    parser.add_argument("--out", type=Path, default=HERE, help="folder of bench.json")
    args = parser.parse_args()
    fetch_missing(DataConfig(root=args.data))
    cases = [case for case in CASES if case.hidden in args.hidden]
    runs: dict[Case, list[dict[str, Any]]] = {case: [] for case in cases}
    for case in tqdm([case for _ in range(args.rounds) for case in cases], unit="run", leave=False, disable=None):
        runs[case].append(measure(case, args.data))
    found = {case: summary(case, runs[case]) for case in cases}
    for case in cases:
        if case.program == "vae_dist":
            found[case]["profile"] = profile(case, args.data)
    machine = f"{platform.machine()}, {len(os.sched_getaffinity(0))} cores, torch {torch.__version__}"
    print(f"{machine}; batch 128, {EPOCHS} epochs, medians of {args.rounds} rounds (lowest-highest)")
    print(ROW.format("", "s/epoch", "images/s", "other s", "MiB", "GEMM", "floor s"))
    print("\n".join(told(case, found[case]) for case in cases))
    print("other: the whole process but its epochs; GEMM: share of the step; floor: an epoch's products alone, in warm caches")
    result = {"machine": machine, "date": time.strftime("%Y-%m-%d"), "cases": list(found.values())}
    (args.out / "bench.json").write_text(json.dumps(result, indent=1) + "\n")
    return 0


if __name__ == "__main__":
    run_entry_point(main)
