"""Starting: the Accelerator of this process, with as many others as the launcher meant."""

import contextlib
import ctypes
import hashlib
import os
import platform
import shutil
import signal
import threading
from collections.abc import Iterator
from datetime import timedelta
from pathlib import Path
from typing import Any

import accelerate
import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState, GradientState
from accelerate.utils import (
    DistributedDataParallelKwargs,
    GradScalerKwargs,
    InitProcessGroupKwargs,
)
from torch.distributed import PrefixStore, Store  # type: ignore[attr-defined]  # made at import
from torch.distributed.rendezvous import register_rendezvous_handler, rendezvous

from vae_dist import __version__
from vae_dist.config import InputError, TrainerConfig
from vae_dist.distributed import require_same, say

_MEETING = "after-restart"  # a scheme of addresses, for torch
_PR_SET_PDEATHSIG = 1  # of <sys/prctl.h>
_CUDNN: Any = torch.backends.cudnn
_MKLDNN: Any = torch.backends.mkldnn
_FP32_MODES: tuple[Any, ...] = (
    *(torch.backends, _CUDNN, _MKLDNN),  # the widest first
    *(torch.backends.cuda.matmul, _CUDNN.conv, _CUDNN.rnn, _MKLDNN.matmul, _MKLDNN.conv, _MKLDNN.rnn),
)
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
    if _restarts_in_vain():
        say(
            accelerator,
            "warning: if the machine of rank zero is lost, the launchers of the others will try to restart the job at its "
            "address; set TORCH_DISABLE_SHARE_RDZV_TCP_STORE=1 for the launcher on each machine",
        )
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


@contextlib.contextmanager
def surroundings_kept() -> Iterator[None]:
    """Afterwards the process is as it was: signal handlers, threads, torch's modes, and any Accelerator of the caller."""
    handlers = {number: signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGUSR1, signal.SIGINT)}
    threads = torch.get_num_threads()
    deterministic = torch.are_deterministic_algorithms_enabled(), torch.is_deterministic_algorithms_warn_only_enabled()
    filled = torch.utils.deterministic.fill_uninitialized_memory  # type: ignore[attr-defined]
    flushes_denormal = bool(torch.full((64,), 1e-40).mul(1.0).max() == 0)
    wandb_folder = os.environ.get("WANDB_DATA_DIR")
    states = AcceleratorState._shared_state, GradientState._shared_state
    before = [dict(state) for state in states]
    AcceleratorState._shared_state.clear()  # the precision of a second training may be another
    GradientState._shared_state.clear()
    try:
        with _fp32_modes_kept():
            yield
    finally:
        for state, content in zip(states, before, strict=True):
            state.clear()
            state.update(content)
        os.environ.pop("WANDB_DATA_DIR", None)
        if wandb_folder is not None:
            os.environ["WANDB_DATA_DIR"] = wandb_folder
        torch.use_deterministic_algorithms(deterministic[0], warn_only=deterministic[1])
        torch.utils.deterministic.fill_uninitialized_memory = filled  # type: ignore[attr-defined]
        torch.set_num_threads(threads)
        torch.set_flush_denormal(flushes_denormal)
        if threading.current_thread() is threading.main_thread():
            for number, handler in handlers.items():
                if handler is not None:  # one that Python did not install, and cannot
                    signal.signal(number, handler)


@contextlib.contextmanager
def _fp32_modes_kept() -> Iterator[None]:
    """Afterwards float32 products are as exact as before, told in torch's old way or in the new one, which do not mix."""
    modes = [products.fp32_precision for products in _FP32_MODES]
    try:
        old_way = torch.get_float32_matmul_precision(), torch.backends.cudnn.allow_tf32
    except RuntimeError:
        old_way = None  # the caller takes the new one
    for products in _FP32_MODES:
        products.fp32_precision = "none"
    torch.set_float32_matmul_precision("highest")
    try:
        yield
    finally:
        if old_way is not None:
            torch.set_float32_matmul_precision(old_way[0])
            torch.backends.cudnn.allow_tf32 = old_way[1]
        for products, mode in zip(_FP32_MODES, modes, strict=True):
            products.fp32_precision = mode


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


def _restarts_in_vain() -> bool:
    """Whether launchers of several machines are to restart the job, but keep rank zero's first address (torch 2.15)."""
    several = os.environ.get("GROUP_WORLD_SIZE", "1") != "1"
    restarts = os.environ.get("TORCHELASTIC_MAX_RESTARTS", "0") != "0"
    return several and restarts and os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True"


def _follow_launcher() -> None:
    """Asks Linux for a SIGTERM when the launcher dies, which could not pass it on: no worker trains on as an orphan."""
    if "LOCAL_RANK" in os.environ or "ACCELERATE_MIXED_PRECISION" in os.environ:
        ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGTERM)


def versions() -> dict[str, str]:
    source = hashlib.sha256(b"".join(path.read_bytes() for path in sorted(Path(__file__).parent.rglob("*.py"))))
    return {
        "vae_dist": f"{__version__} (source {source.hexdigest()[:8]})",
        "python": platform.python_version(),
        "torch": torch.__version__,
        "accelerate": accelerate.__version__,
    }


def cpu_name() -> str:
    """The processor as it calls itself, or its architecture."""
    lines = Path("/proc/cpuinfo").read_text().splitlines()
    return next((line.split(":")[1].strip() for line in lines if line.startswith("model name")), platform.machine())
