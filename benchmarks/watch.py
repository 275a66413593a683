"""Watches a training program, which knows nothing of it: when its first step was done, or where its steps go and their bound.

python -m benchmarks.watch [--profile FIRST LAST --precision bf16] MODULE [options of the module]
Rank zero prints one JSON object. With --profile the program ends after the watched steps.
"""

import argparse
import json
import os
import runpy
import sys
import time
from collections.abc import Callable

import torch
from torch import Tensor
from torch.optim import Optimizer
from torch.optim.optimizer import register_optimizer_step_post_hook
from torch.profiler import ProfilerActivity, profile, record_function

BATCH = 128  # images of a step of every program
ADAM_BYTES = 28  # a parameter's share of a step of Adam: its weight, gradient and two moments are read, all but one written

# What an operator's time is counted as; one that is not named goes with its caller, as most operators in a loader do.
# The noise of the latents is data, too: vae_dist makes it for many steps at once.
KINDS = {
    "gemm": ("aten::mm", "aten::addmm", "aten::bmm"),
    "optimizer": ("Optimizer.", "aten::_fused_adam_"),
    "data": ("data", "enumerate(DataLoader)", "aten::index_select", "aten::div_", "aten::randperm", "aten::randn_like"),
}


def told(found: dict[str, object]) -> None:
    """Rank zero prints; the program's own lines do not begin with a brace."""
    if os.environ.get("RANK", "0") == "0":
        print(json.dumps(found), flush=True)


def watch_start() -> None:
    """Tells the time, in seconds since 1970, at which the first optimizer step was done."""

    def first_step(*_: object) -> None:
        handle.remove()
        told({"first_step_at": time.time()})

    handle = register_optimizer_step_post_hook(first_step)


def watch_steps(first: int, last: int, dtype: torch.dtype) -> None:
    """Tells where the steps after `first` up to `last` go, and the floor that the machine sets; then ends the program.

    The first half of them is timed without the profiler, which makes steps of many small operators a fifth slower.
    """
    middle = (first + last) // 2
    watched, done, start, plain = profile(activities=[ProfilerActivity.CPU]), 0, 0.0, 0.0

    def step_done(optimizer: Optimizer, *_: object) -> None:
        nonlocal done, start, plain
        done += 1
        if done == first:
            start = time.perf_counter()
        elif done == middle:
            plain = (time.perf_counter() - start) / (middle - first)
            watched.start()
            start = time.perf_counter()
        elif done == last:
            profiled = (time.perf_counter() - start) / (last - middle)
            watched.stop()
            shares = step_shares(watched, plain, profiled, last - middle)
            told({"step_seconds": plain, "shares": shares} | floor(optimizer, dtype))
            raise SystemExit(0)  # the rest of the epoch would tell nothing new

    register_optimizer_step_post_hook(step_done)


def label_data() -> None:
    """Marks what vae_dist does to have a step's images and noise."""
    from vae_dist import data, noise, step, trainer
    from vae_dist.data import images

    images.Resident.rows = labelled(images.Resident.rows)  # type: ignore[method-assign]
    step.__dict__["as_images"] = labelled(data.as_images)
    trainer.__dict__["normal"] = labelled(noise.normal)


def labelled(function: Callable[..., Tensor]) -> Callable[..., Tensor]:
    def under_label(*args: object) -> Tensor:
        with record_function("data"):
            return function(*args)

    return under_label


def step_shares(watched: profile, plain: float, profiled: float, steps: int) -> dict[str, float]:
    """Each kind's part of a step, by the operators' own times, less what the profiler adds to each operator.

    An operator without a kind is of its caller's. `plain` and `profiled` are the seconds of a step without and with it.
    """
    seconds, whole, events = dict.fromkeys(KINDS, 0.0), profiled * steps, watched.events() or []
    added = max(0.0, profiled - plain) * steps / len(events)  # seconds an operator
    for event in events:
        own = event.self_cpu_time_total * 1e-6
        # No operator loses more than it took: on a busy machine the two times differ by more than the profiler's doing,
        # and the parts must still be parts of the whole.
        less = min(added, own)
        whole -= less
        caller = event
        while caller is not None and (kind := kind_of(caller.name)) is None:
            caller = caller.cpu_parent
        if caller is not None and kind is not None:
            seconds[kind] += own - less
    return {kind: time / whole for kind, time in seconds.items()}


def kind_of(name: str) -> str | None:
    return next((kind for kind, names in KINDS.items() if name.startswith(names)), None)


def floor(optimizer: Optimizer, dtype: torch.dtype) -> dict[str, float]:
    """The shortest a step of this process may take: its matrix products and Adam's memory traffic, alone in warm caches."""
    parameters = [parameter for group in optimizer.param_groups for parameter in group["params"]]
    rows = -(-BATCH // int(os.environ.get("WORLD_SIZE", "1")))
    gemm, flops = gemm_seconds([parameter.shape for parameter in parameters if parameter.ndim == 2], rows, dtype)
    count = sum(parameter.numel() for parameter in parameters)
    moved = moved_bytes_per_second(4 * count)  # as much memory as Adam's step has to do with
    return {
        "gemm_seconds": gemm,
        "gemm_flops_per_second": flops / gemm,
        "optimizer_seconds": ADAM_BYTES * count / moved,
        "moved_bytes_per_second": moved,
    }


def gemm_seconds(layers: list[torch.Size], rows: int, dtype: torch.dtype) -> tuple[float, int]:
    """A step's matrix products, each alone and as fast as it will go: seconds and operations.

    `layers` are (outputs, inputs).
    """
    seconds, flops = 0.0, 0
    for number, (outputs, inputs) in enumerate(layers):
        x, w, g = (torch.randn(shape, dtype=dtype) for shape in ((rows, inputs), (outputs, inputs), (rows, outputs)))
        products: list[Callable[[], Tensor]] = [lambda x=x, w=w: x.mm(w.t()), lambda x=x, g=g: g.t().mm(x)]  # type: ignore[misc]
        if number > 0:  # the images need no gradient
            products.append(lambda g=g, w=w: g.mm(w))  # type: ignore[misc]
        seconds += sum(map(best_seconds, products))
        flops += len(products) * 2 * rows * inputs * outputs
    return seconds, flops


def moved_bytes_per_second(numbers: int) -> float:
    """Bytes read and written per second where so many float32 numbers are changed in place.

    As Adam changes its own: a copy counts too little, for processors also fetch what it overwrites.
    """
    memory = torch.ones(numbers)
    return 2 * 4 * numbers / best_seconds(lambda: memory.mul_(1.0))


def best_seconds(action: Callable[[], object], at_least: float = 0.03) -> float:
    """Seconds of an action, in the best of five series of at least that many seconds each."""

    def series(repetitions: int) -> float:
        start = time.perf_counter()
        for _ in range(repetitions):
            action()
        return (time.perf_counter() - start) / repetitions

    repetitions = 1 + int(at_least / series(3))
    return min(series(repetitions) for _ in range(5))


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.watch", description=__doc__)
    parser.add_argument("--profile", type=int, nargs=2, metavar=("FIRST", "LAST"), help="watch the steps between these two")
    parser.add_argument("--precision", choices=["fp32", "bf16"], default="fp32", help="of the matrix products")
    parser.add_argument("module")
    parser.add_argument("options", nargs=argparse.REMAINDER)
    args = parser.parse_args()
    if args.profile is None:
        watch_start()
    else:
        first, last = args.profile
        watch_steps(first, last, torch.bfloat16 if args.precision == "bf16" else torch.float32)
        if args.module.startswith("vae_dist"):
            label_data()
    sys.argv = [args.module, *args.options]
    runpy.run_module(args.module, run_name="__main__", alter_sys=True)


if __name__ == "__main__":
    main()
