"""What several processes do together: start, sum figures, decide, fail and end."""

import ctypes
import os
import signal
import sys
from collections.abc import Callable, Iterable
from typing import NoReturn, TypeVar

import torch
import torch.distributed as dist
from accelerate import Accelerator
from accelerate.utils import DistributedDataParallelKwargs, GradScalerKwargs, broadcast_object_list, gather_object
from torch import Tensor

from vae_dist.config import InputError, TrainerConfig
from vae_dist.options import is_spokesman

T = TypeVar("T")

EXIT_DIVERGED = 1
EXIT_BAD_INPUT = 2
EXIT_INTERRUPTED = 75  # EX_TEMPFAIL of sysexits.h: start me again

_PR_SET_PDEATHSIG = 1  # of <sys/prctl.h>

_PRECISIONS = {"fp32": "no", "fp16": "fp16", "bf16": "bf16"}
# The loss is a sum over the global batch: torch's first scale of 65536 would overflow fp16 for dozens of steps.
_FP16_SCALE_PER_BATCH = 8192.0


def start(trainer: TrainerConfig | None = None, batch_size: int = 1) -> Accelerator:
    """The Accelerator of this process, on a GPU if there is one, with as many processes as the launcher meant.

    Raises InputError where the launcher started fewer processes than asked, there are too few GPUs for them, or the
    precision cannot be had.
    """
    _check_launch()
    _follow_launcher()
    if trainer and trainer.deterministic:
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # read when CUDA starts
    # Without GPUs Accelerate must be told, or torchrun's processes would each take themselves for the only one.
    on_cpu = not torch.cuda.is_available() or os.environ.get("ACCELERATE_USE_CPU", "").lower() in ("true", "1")
    precision = trainer.precision if trainer else "fp32"
    if precision == "bf16" and not on_cpu and not torch.cuda.is_bf16_supported():
        raise InputError("--trainer.precision bf16: this GPU has none; take fp16 or fp32")
    if precision == "fp16" and on_cpu:
        raise InputError("--trainer.precision fp16: needs a GPU, and none is visible; take bf16 or fp32")
    local_processes = int(os.environ.get("LOCAL_WORLD_SIZE", "1"))
    if not on_cpu and local_processes > torch.cuda.device_count():
        raise InputError(f"{local_processes} processes were started here for {torch.cuda.device_count()} visible GPUs")
    accelerator = Accelerator(
        cpu=on_cpu,
        mixed_precision=_PRECISIONS[precision],
        log_with="wandb",
        kwargs_handlers=[
            DistributedDataParallelKwargs(gradient_as_bucket_view=True),
            GradScalerKwargs(init_scale=_FP16_SCALE_PER_BATCH / batch_size),
        ],
    )
    accelerator.gradient_accumulation_steps = 1  # the environment may say otherwise; `backward` would divide by it
    launched = int(os.environ.get("WORLD_SIZE", "1"))
    if accelerator.num_processes != launched:
        raise InputError(f"the launcher started {launched} processes, but Accelerate sees {accelerator.num_processes}")
    if trainer and trainer.deterministic:
        torch.set_num_threads(1)  # how a sum is split over threads shows in its last bits
        if not on_cpu:
            torch.use_deterministic_algorithms(True)
            torch.utils.deterministic.fill_uninitialized_memory = False  # type: ignore[attr-defined]  # a debugging aid
        return accelerator
    by_launcher = "LOCAL_WORLD_SIZE" in os.environ or "ACCELERATE_MIXED_PRECISION" in os.environ
    if on_cpu and by_launcher and os.environ.get("OMP_NUM_THREADS") == "1":
        # Launchers say one thread, whatever the machine has: share out its cores.
        torch.set_num_threads(max(1, len(os.sched_getaffinity(0)) // local_processes))
    return accelerator


def _check_launch() -> None:
    """`accelerate launch --cpu --num_processes 2` starts one process: it sets an address, but no number of processes."""
    meant_several = "MASTER_ADDR" in os.environ and "ACCELERATE_MIXED_PRECISION" in os.environ
    if meant_several and "WORLD_SIZE" not in os.environ:
        raise InputError(
            "accelerate launch was asked for several processes but started one, as it does for CPUs; "
            "start them with `accelerate launch --config_file launch/multi_cpu.yaml --num_processes N`"
        )


def _follow_launcher() -> None:
    """Asks Linux for a SIGTERM when the launcher dies, which could not pass it on: no worker trains on as an orphan."""
    if "LOCAL_RANK" in os.environ or "ACCELERATE_MIXED_PRECISION" in os.environ:
        ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGTERM)


def sum_over_ranks(accelerator: Accelerator, values: Tensor) -> list[float]:
    """The sum of a float64 vector over all ranks, on the host of each. All ranks call it; it waits for the device."""
    total: list[float] = accelerator.reduce(values, "sum").tolist()
    return total


def together(accelerator: Accelerator, action: Callable[[], T]) -> T:
    """Runs `action` on every rank. Where it fails on any, with InputError or OSError, all ranks raise the same InputError."""
    result: list[T] = []
    problem = None
    try:
        result.append(action())
    except (InputError, OSError) as error:
        problem = _in_words(error)
    problems: Iterable[str | None] = gather_object([problem])
    for first in filter(None, problems):
        raise InputError(first)
    return result[0]


def _in_words(error: InputError | OSError) -> str:
    if isinstance(error, OSError) and error.filename and error.strerror:
        return f"{error.filename}: {error.strerror}"
    return str(error)


def on_first_rank(accelerator: Accelerator, action: Callable[[], T]) -> T | None:
    """`together`, but only rank zero does it; the others get None, or the same InputError."""
    return together(accelerator, lambda: action() if accelerator.is_main_process else None)


def from_first_rank(accelerator: Accelerator, action: Callable[[], T]) -> T:
    """What `action` returns on rank zero, on all ranks; or the same InputError on all."""
    found: list[T] = broadcast_object_list([on_first_rank(accelerator, action)])
    return found[0]


def run_entry_point(main: Callable[[], int]) -> NoReturn:
    """Runs `main` and exits with its status; bad input, and files that cannot be written, are one line and status 2."""
    try:
        status = main()
    except (InputError, OSError) as error:
        if is_spokesman() or isinstance(error, OSError):  # other errors are those of all ranks
            print(f"error: {_in_words(error)}", file=sys.stderr, flush=True)
        status = EXIT_BAD_INPUT
    else:
        if dist.is_initialized():
            dist.barrier()  # nobody hangs up while others still speak
    finally:
        if dist.is_initialized():
            dist.destroy_process_group()
    sys.exit(status)
