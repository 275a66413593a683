"""How fast the convolutional networks train on packed images, and which share of the device's matrix rate that is.

python -m benchmarks.networks            (make bench-networks)
Each case is a real training of its own, in bf16, eager and compiled. On a GPU the networks are of a useful size; without one
they are small, which tries the script out and tells of this CPU alone.
"""

import argparse
import contextlib
import json
import os
import platform
import re
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch.optim.optimizer import register_optimizer_step_post_hook
from torch.profiler import ProfilerActivity, profile
from torch.utils.flop_counter import FlopCounterMode
from tqdm import tqdm

from benchmarks.watch import best_seconds
from vae_dist import train
from vae_dist.data import glyphs
from vae_dist.data.packed import Index, Shard, images_per_shard, sha256_of, shard_content, write_index
from vae_dist.distributed import run_entry_point
from vae_dist.model import VAE, build_model
from vae_dist.options import parse
from vae_dist.tracking import read_rows

HERE = Path(__file__).parent
ON_GPU = torch.cuda.is_available()
EPOCHS = 3  # of which the first warms up
PROFILED = range(6, 10)  # optimizer steps

# Kinds of a kernel by its name, the first that fits.
KERNELS = {
    "fused by the compiler": r"^triton",  # their names tell of all that they fuse
    "convolutions and matrix products": r"conv|gemm|cutlass|xmma|wgmma|nvjet|[fdw]grad|fprop|::(add|b)?mm$|addmm|matmul|linear",
    "optimizer": r"adam|multi_tensor|foreach|vector_norm",
    "attention": r"attention|fmha|flash|softmax",
    "norms": r"norm",
    "copies, casts and layout": r"copy|cat|memcpy|memset|nchw|nhwc|transpose|_to_|gather|fill|zero",
}
REST = "elementwise and sums"


class Case(NamedTuple):
    """A network and its images."""

    kind: str
    side: int  # pixels
    compiled: bool

    @property
    def name(self) -> str:
        return f"{self.kind} {self.side} {'compiled' if self.compiled else 'eager'}"

    @property
    def batch(self) -> int:
        return (256 if self.side == 64 else 64) if ON_GPU else 16

    def options(self, data: Path) -> list[str]:
        """Of the training."""
        channels = {"conv": 128, "resnet": 128} if ON_GPU else {"conv": 8, "resnet": 8}
        given = {"data.name": "packed", "data.root": data / str(self.side), "data.batch_size": self.batch}
        given |= {"model.kind": self.kind, "model.channels": channels[self.kind], "model.latent_dim": 128}
        given |= {"model.likelihood": "discretized_logistic", "optimizer.clip_norm": 1000, "optimizer.lr": 2e-4}
        given |= {"model.blocks": 2, "model.attention": 16} if self.kind == "resnet" else {}
        given |= {"trainer.epochs": EPOCHS, "trainer.precision": "bf16", "trainer.compile": str(self.compiled).lower()}
        return [f"--{name}={value}" for name, value in given.items()] + ["--tracking.wandb=disabled"]


CASES = [Case(kind, side, compiled) for side in (64, 128) for kind in ("conv", "resnet") for compiled in (False, True)]


def write_images(folder: Path) -> None:
    """Packed sets of colour images of each size: enlarged digits of the embedded set, in three colours."""
    images, _ = glyphs.draw(0, 60 * 256 if ON_GPU else 320)
    for side in (64, 128):
        large = torch.nn.functional.interpolate(images.float(), (side, side), mode="bilinear").to(torch.uint8)
        coloured = torch.cat([large, 255 - large, large.roll(1, 0)], dim=1)
        for name, part in (("train", coloured[64:]), ("test", coloured[:64])):
            home = folder / str(side) / name
            home.mkdir(parents=True)
            shards = []
            for number, block in enumerate(torch.split(part, images_per_shard(3 * side * side))):
                file = home / f"shard-{number:05d}.bin"
                file.write_bytes(shard_content([image.numpy().tobytes() for image in block]))
                shards.append(Shard(file.name, len(block), file.stat().st_size, sha256_of(file)))
            write_index(home, Index((3, side, side), shards, {}))


def measure(case: Case, data: Path) -> dict[str, Any]:
    """Trains: images/s and shares of the step in the epochs after the first, and the peak of the memory."""
    with tempfile.TemporaryDirectory() as run:
        if train.main([*case.options(data), f"--output={run}/run"]) != 0:
            raise SystemExit(f"error: {case.name} did not finish")
        epochs = [row for row in read_rows(Path(run) / "run" / "metrics.jsonl") if "train_seconds" in row][1:]
    on_device = torch.cuda.max_memory_allocated() if ON_GPU else resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    return {
        "images_per_second": statistics.median(row["images_per_second"] for row in epochs),
        "data_share": statistics.median(row["data_share"] for row in epochs),
        "peak_gib": on_device / 2**30,
    }


def kernels(case: Case, data: Path) -> dict[str, float]:
    """The share of each kind of kernel in the time of some steps, launched one by one, by torch.profiler."""
    activities = [ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if ON_GPU else [])]
    watched, done, found = profile(activities=activities), 0, dict.fromkeys([*KERNELS, REST], 0.0)

    def step_done(*_: object) -> None:
        nonlocal done
        done += 1
        if done == PROFILED.start:
            watched.start()
        elif done == PROFILED.stop:
            watched.stop()
            raise SystemExit(0)

    register_optimizer_step_post_hook(step_done)
    with tempfile.TemporaryDirectory() as run, contextlib.suppress(SystemExit):
        train.main([*case.options(data), "--trainer.cuda_graph=false", f"--output={run}/run"])
    for event in watched.key_averages():
        is_kernel = event.device_type.name == "CUDA" if ON_GPU else event.key.startswith("aten::")
        if is_kernel:
            kind = next((kind for kind, names in KERNELS.items() if re.search(names, event.key.lower())), REST)
            found[kind] += event.self_device_time_total if ON_GPU else event.self_cpu_time_total
    total = sum(found.values())
    return {kind: seconds / total for kind, seconds in found.items()}


def size(case: Case, data: Path) -> dict[str, float]:
    """Parameters, and operations of matrix products and convolutions for one image's forward and backward pass."""
    config = parse(case.options(data))
    model: VAE = build_model(config.model, (3, case.side, case.side), seed=0)
    with FlopCounterMode(display=False) as counter:
        output = model(torch.rand(1, 3, case.side, case.side), torch.zeros(1, model.latent_dim))
        (output.decoded.sum() + output.logvar.sum()).backward()
    return {"parameters": sum(p.numel() for p in model.parameters()), "flops_per_image": counter.get_total_flops()}


def matrix_rate() -> float:
    """Operations per second of the fastest bf16 matrix product that was found."""
    device = "cuda" if ON_GPU else "cpu"

    def rate(n: int) -> float:
        a, b = (torch.randn(n, n, device=device, dtype=torch.bfloat16) for _ in range(2))

        def product() -> None:
            a.mm(b)
            if ON_GPU:
                torch.cuda.synchronize()

        return 2 * n**3 / best_seconds(product, at_least=0.3)

    return max(map(rate, (4096, 8192, 16384) if ON_GPU else (512, 1024, 2048)))


def in_process_of_its_own(options: list[str]) -> dict[str, Any]:
    """What this module prints last with some options."""
    done = subprocess.run(
        [sys.executable, "-m", "benchmarks.networks", *options], cwd=HERE.parent, stdout=subprocess.PIPE, text=True, check=False
    )
    if done.returncode != 0:
        raise SystemExit(f"error: {' '.join(options)} ended with {done.returncode}")
    found: dict[str, Any] = json.loads(done.stdout.strip().splitlines()[-1])
    return found


def line(found: dict[str, Any], rate: float) -> str:
    share = found["images_per_second"] * found["flops_per_image"] / rate
    return (
        f"| {found['name']} | {found['parameters'] / 1e6:.1f} | {found['flops_per_image'] / 1e9:.2f} | {found['batch']} | "
        f"{found['images_per_second']:,.0f} | {share:.0%} | {found['data_share']:.1%} | {found['peak_gib']:.1f} |"
    )


HEAD = """| network, pixels | million parameters | GFLOP an image | batch | images/s | share of matrix rate | data | peak GiB |
|---|---|---|---|---|---|---|---|"""


def profile_lines(found: list[dict[str, Any]]) -> list[str]:
    """A table of the kernels' shares. On a CPU the compiler's own are not seen: of eager cases only."""
    kinds, found = [*KERNELS, REST], [of_case for of_case in found if ON_GPU or "eager" in of_case["name"]]
    rows = [f"| {of_case['name']} | " + " | ".join(f"{of_case['kernels'][k]:.0%}" for k in kinds) + " |" for of_case in found]
    return ["| | " + " | ".join(kinds) + " |", "|---" * (len(kinds) + 1) + "|", *rows]


ACTIONS: dict[str, Callable[[Case, Path], dict[str, Any]]] = {"measure": measure, "kernels": kernels, "size": size}


def main(options: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.networks", description="Time the convolutional networks.")
    parser.add_argument("--only", default="", help="regular expression: only the cases in whose names it is found")
    parser.add_argument("--out", type=Path, default=HERE / "networks.json", help="JSON file of the figures")
    parser.add_argument("--child", nargs=3, metavar=("ACTION", "CASE", "DATA"), help=argparse.SUPPRESS)
    args = parser.parse_args(options)
    if args.child:
        action, name, data = args.child
        found = ACTIONS[action](next(case for case in CASES if case.name == name), Path(data))
        print(json.dumps(found), flush=True)
        return 0
    results, rate = [], matrix_rate()
    with tempfile.TemporaryDirectory() as data:
        write_images(Path(data))
        for case in tqdm([case for case in CASES if re.search(args.only, case.name)], unit="case", disable=None):
            of_case: dict[str, Any] = {"name": case.name, "batch": case.batch}
            for action in ("measure", "size"):
                of_case |= in_process_of_its_own(["--child", action, case.name, data])
            of_case["kernels"] = in_process_of_its_own(["--child", "kernels", case.name, data])
            results.append(of_case)
    device = torch.cuda.get_device_name() if ON_GPU else f"{len(os.sched_getaffinity(0))} cores of {platform.machine()}"
    where = f"{device}, torch {torch.__version__}, {time.strftime('%Y-%m-%d')}; bf16 matrix products {rate / 1e12:.2f} TFLOP/s"
    print("\n".join([where, "", HEAD, *(line(found, rate) for found in results), "", *profile_lines(results)]))
    args.out.write_text(json.dumps({"where": where, "matrix_rate": rate, "cases": results}, indent=1) + "\n")
    return 0


if __name__ == "__main__":
    run_entry_point(main)
