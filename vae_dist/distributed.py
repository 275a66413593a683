"""What several processes do together: start, sum figures, decide, fail and end."""

import contextlib
import ctypes
import hashlib
import os
import platform
import shutil
import signal
import sys
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from datetime import timedelta
from pathlib import Path
from typing import NamedTuple, NoReturn, TypeVar

import accelerate
import torch
import torch.distributed as dist
from accelerate import Accelerator
from accelerate.utils import (
    DistributedDataParallelKwargs,
    GradScalerKwargs,
    InitProcessGroupKwargs,
    broadcast_object_list,
    gather_object,
)
from torch import Tensor
from torch.distributed import PrefixStore, Store  # type: ignore[attr-defined]  # made at import
from torch.distributed.rendezvous import register_rendezvous_handler, rendezvous

from vae_dist import __version__
from vae_dist.config import ImagesLost, InputError, TrainerConfig
from vae_dist.options import is_spokesman

T = TypeVar("T")

EXIT_FAILED = 1
EXIT_BAD_INPUT = 2
EXIT_AT_ONCE = 130  # as shells tell of Ctrl-C
EXIT_INTERRUPTED = 75  # EX_TEMPFAIL of sysexits.h: start me again


class TrainingFailed(RuntimeError):
    """The loss is no number any more, or the ranks have drifted apart. All ranks raise it at the same step."""


class LostPeer(RuntimeError):
    """Another process of this run is gone, or silent for too long."""


_MEETING = "after-restart"  # a scheme of addresses, for torch
_PR_SET_PDEATHSIG = 1  # of <sys/prctl.h>

_PRECISIONS = {"fp32": "no", "tf32": "no", "fp16": "fp16", "bf16": "bf16"}
# The loss is a sum over the global batch: torch's first scale of 65536 would overflow fp16 for dozens of steps.
_FP16_SCALE_PER_BATCH = 8192.0


def start(trainer: TrainerConfig | None = None, batch_size: int = 1) -> Accelerator:
    """The Accelerator of this process, on a GPU if there is one, with as many processes as the launcher meant.

    Raises InputError where the launcher started fewer processes than asked, there are too few GPUs for them, the precision
    cannot be had, or the processes run other versions of the software.
    """
    trainer = trainer or TrainerConfig()
    check_launch()
    require_hardware(trainer)
    accelerator = connect(trainer, batch_size)
    require_same(accelerator, lambda: versions() | {"device": accelerator.device.type})
    return accelerator


def require_hardware(trainer: TrainerConfig) -> None:
    """Raises InputError where this machine lacks what the options or the launcher want of it."""
    on_cpu = is_on_cpu()
    if trainer.precision == "bf16" and not on_cpu and not torch.cuda.is_bf16_supported():
        raise InputError("--trainer.precision bf16: this GPU has none; take fp16 or fp32")
    if trainer.precision in ("fp16", "tf32") and on_cpu:
        raise InputError(f"--trainer.precision {trainer.precision}: needs a GPU, and none is visible; take bf16 or fp32")
    if trainer.compile and on_cpu and shutil.which(os.environ.get("CXX", "g++")) is None:
        raise InputError("--trainer.compile true: needs a C++ compiler, g++ or what CXX names, and there is none; leave it out")
    if not on_cpu and local_processes() > torch.cuda.device_count():
        raise InputError(f"{local_processes()} processes were started here for {torch.cuda.device_count()} visible GPUs")


def connect(trainer: TrainerConfig, batch_size: int = 1) -> Accelerator:
    """`start` without its questions: the processes come together, whatever they are."""
    _follow_launcher()
    if trainer.deterministic:
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # read when CUDA starts
    torch.set_flush_denormal(True)  # Adam's moments for pixels that are rarely lit decay into them: a fifth of an epoch
    on_cpu = is_on_cpu()
    accelerator = Accelerator(
        cpu=on_cpu,
        mixed_precision=_PRECISIONS[trainer.precision],
        log_with="wandb",
        kwargs_handlers=[
            DistributedDataParallelKwargs(gradient_as_bucket_view=True),
            GradScalerKwargs(init_scale=_FP16_SCALE_PER_BATCH / batch_size),
            # A time that equals the default of Accelerate's class would not be passed on: hence the millisecond.
            InitProcessGroupKwargs(
                init_method=f"{_MEETING}://", timeout=timedelta(minutes=trainer.timeout_minutes, milliseconds=1)
            ),
        ],
    )
    set_tf32(False)
    accelerator.gradient_accumulation_steps = 1  # the environment may say otherwise; `backward` would divide by it
    launched = int(os.environ.get("WORLD_SIZE", "1"))
    if accelerator.num_processes != launched:
        raise InputError(f"the launcher started {launched} processes, but Accelerate sees {accelerator.num_processes}")
    if trainer.deterministic:
        torch.set_num_threads(1)  # how a sum is split over threads shows in its last bits
        if not on_cpu:
            torch.use_deterministic_algorithms(True)
            torch.utils.deterministic.fill_uninitialized_memory = False  # type: ignore[attr-defined]  # a debugging aid
        return accelerator
    by_launcher = "LOCAL_WORLD_SIZE" in os.environ or "ACCELERATE_MIXED_PRECISION" in os.environ
    if on_cpu and by_launcher and os.environ.get("OMP_NUM_THREADS") == "1":
        # Launchers say one thread, whatever the machine has: share out its cores.
        torch.set_num_threads(max(1, len(os.sched_getaffinity(0)) // local_processes()))
    return accelerator


def is_on_cpu() -> bool:
    """Without GPUs Accelerate must be told, or torchrun's processes would each take themselves for the only one."""
    return not torch.cuda.is_available() or os.environ.get("ACCELERATE_USE_CPU", "").lower() in ("true", "1")


def local_processes() -> int:
    """How many processes of this run the launcher started on this machine."""
    return int(os.environ.get("LOCAL_WORLD_SIZE", "1"))


def set_tf32(allowed: bool) -> None:
    """Whether a GPU may round the factors of float32 products to ten bits, which its tensor cores take eight times as fast."""
    torch.backends.cuda.matmul.allow_tf32 = allowed
    torch.backends.cudnn.allow_tf32 = allowed


@contextlib.contextmanager
def tf32() -> Iterator[None]:
    """Around training steps that may use TF32. Everything else is exact, also what torch would have in TF32 by itself."""
    set_tf32(True)
    try:
        yield
    finally:
        set_tf32(False)


def _meet(_: str, timeout: timedelta, **options: object) -> Iterator[tuple[Store, int, int]]:
    """The launcher's store, under a name of this restart: torch's agent keeps the addresses of the dead in it.

    Not on several machines, whose agents each count the restarts in their own way.
    """
    store, rank, world_size = next(rendezvous("env://", timeout=timeout))
    restart = os.environ.get("TORCHELASTIC_RESTART_COUNT", "0") if os.environ.get("GROUP_WORLD_SIZE", "1") == "1" else "any"
    yield PrefixStore(f"restart {restart}", store), rank, world_size


register_rendezvous_handler(_MEETING, _meet)  # type: ignore[no-untyped-call]


def check_launch() -> None:
    """Raises InputError after `accelerate launch --cpu --num_processes 2`, which starts one process.

    It sets an address, but no number of processes.
    """
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


def is_one_machine() -> bool:
    """Whether all processes of this run are on this machine."""
    return os.environ.get("LOCAL_WORLD_SIZE", "1") == os.environ.get("WORLD_SIZE", "1")


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
        problem = in_words(error)
    problems: Iterable[str | None] = gather_object([problem])
    for first in filter(None, problems):
        raise InputError(first)
    return result[0]


def on_first_rank(accelerator: Accelerator, action: Callable[[], T]) -> T | None:
    """`together`, but only rank zero does it; the others get None, or the same InputError."""
    return together(accelerator, lambda: action() if accelerator.is_main_process else None)


def from_first_rank(accelerator: Accelerator, action: Callable[[], T]) -> T:
    """What `action` returns on rank zero, on all ranks; or the same InputError on all."""
    found: list[T] = broadcast_object_list([on_first_rank(accelerator, action)])
    return found[0]


def say(accelerator: Accelerator, text: str) -> None:
    """Prints on rank zero alone; Accelerate's own `print` does so once on each machine."""
    if accelerator.is_main_process:
        print(text, flush=True)


class Difference(NamedTuple):
    """Something that one rank has otherwise than the others."""

    rank: int
    name: str
    value: str
    usual: str  # what most ranks have; of a tie, the lowest rank's


def differences_of_ranks(accelerator: Accelerator, facts: Mapping[str, str]) -> list[Difference]:
    """Where `facts`, words by name, are not the same on all ranks. All ranks call it and get the same answer."""
    return differences_in(gather_object([dict(facts)]))


def differences_in(of_ranks: Sequence[Mapping[str, str]]) -> list[Difference]:
    """Where the facts of each rank are not the same."""
    found = []
    for name in dict.fromkeys(name for mine in of_ranks for name in mine):
        values = [mine.get(name, "missing") for mine in of_ranks]
        usual = Counter(values).most_common(1)[0][0]
        found += [Difference(rank, name, value, usual) for rank, value in enumerate(values) if value != usual]
    return found


def require_same(accelerator: Accelerator, facts: Callable[[], Mapping[str, str]]) -> None:
    """Raises the same InputError on all ranks where the facts differ between them. One process alone does not look."""
    if accelerator.num_processes == 1:
        return
    if found := differences_of_ranks(accelerator, facts()):
        listed = "; ".join(f"{name} is {value} on rank {rank} and {usual} on others" for rank, name, value, usual in found)
        raise InputError(f"the processes of one run must be alike, but {listed}")


def versions() -> dict[str, str]:
    source = hashlib.sha256(b"".join(path.read_bytes() for path in sorted(Path(__file__).parent.rglob("*.py"))))
    return {
        "vae_dist": f"{__version__} (source {source.hexdigest()[:8]})",
        "python": platform.python_version(),
        "torch": torch.__version__,
        "accelerate": accelerate.__version__,
    }


def in_words(error: BaseException) -> str:
    """What happened, in one line."""
    if isinstance(error, OSError) and error.filename and error.strerror:
        return f"{error.filename}: {error.strerror}"
    if _is_lost_peer(error):
        return (
            f"rank {os.environ.get('RANK', '0')}: another process of this run is gone, or was silent for longer than "
            "--trainer.timeout_minutes; start the same command again to go on from the newest checkpoint "
            f"({' '.join(str(error).split())[:300]})"
        )
    if isinstance(error, ImagesLost):
        return (
            f"rank {os.environ.get('RANK', '0')}: {error}. When it can be had again, start the same command again; a training "
            "goes on from its newest checkpoint"
        )
    return str(error) if isinstance(error, (InputError, OSError, TrainingFailed)) else repr(error)


def _is_lost_peer(error: BaseException) -> bool:
    """Whether a collective failed because of another process; gloo says so in a plain RuntimeError."""
    by_gloo = isinstance(error, RuntimeError) and "gloo/transport" in str(error)
    return by_gloo or isinstance(error, (dist.DistError, LostPeer))


def run_entry_point(main: Callable[[], int]) -> NoReturn:
    """Runs `main` and exits with its status; an error that the user can do something about is one line, and status 2 or 1."""
    try:
        status = main()
    except (InputError, OSError, RuntimeError) as error:
        is_input = isinstance(error, (InputError, OSError))
        is_own = isinstance(error, (OSError, ImagesLost)) or _is_lost_peer(error)  # others may not know, or not be any more
        if not is_input and not isinstance(error, TrainingFailed) and not is_own:
            raise
        if is_spokesman() or is_own:  # what all ranks know is said once
            print(f"error: {in_words(error)}", file=sys.stderr, flush=True)
        status = EXIT_BAD_INPUT if is_input else EXIT_FAILED
    except KeyboardInterrupt:
        status = EXIT_AT_ONCE
    else:
        if dist.is_initialized():
            with contextlib.suppress(RuntimeError):  # whoever is gone by now has done its work
                dist.barrier()  # nobody hangs up while others still speak
    finally:
        was_one_of_several = dist.is_initialized()
        if was_one_of_several:
            dist.destroy_process_group()
    if was_one_of_several:
        # Everything is closed. Leave before C++ tears down torch's threads, which now and then aborts: one of 25 finished runs
        # of three processes was called failed by its launcher.
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(status)
    sys.exit(status)
