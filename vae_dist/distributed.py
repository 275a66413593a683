"""What several processes do together: start, sum gradients and figures exactly, and decide."""

import contextlib
import ctypes
import os
import signal
import sys
from collections.abc import Callable, Iterable, Iterator
from itertools import pairwise
from typing import NamedTuple, NoReturn, TypeVar, cast

import torch
import torch.distributed as dist
from accelerate import Accelerator
from accelerate.utils import DistributedDataParallelKwargs, GradScalerKwargs, broadcast_object_list, gather_object
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

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


def wrap(accelerator: Accelerator, model: nn.Module) -> nn.Module:
    """The model on this rank's device, through DDP and autocast; its gradients are summed over ranks, not averaged."""
    wrapped: nn.Module = accelerator.prepare_model(model)
    if isinstance(wrapped, DistributedDataParallel):
        wrapped.register_comm_hook(None, _sum_gradients)
    elif accelerator.num_processes > 1:
        raise InputError(f"Accelerate is configured for {type(wrapped).__name__}, but gradients are summed over DDP only")
    return wrapped


def _sum_gradients(_: None, bucket: dist.GradBucket) -> torch.futures.Future[Tensor]:  # type: ignore[name-defined]  # torch's stubs lack it
    """DDP's communication hook. The objective is a sum over the global batch, so its gradient is the sum of the ranks'."""
    work = dist.all_reduce(bucket.buffer(), async_op=True)
    return work.get_future().then(lambda done: done.value()[0])


class SummedGradients:
    """The gradient of a batch in the default mode: rounds add up in .grad, and DDP sums the ranks' in the last one."""

    def __init__(self, accelerator: Accelerator, wrapped: nn.Module) -> None:
        self._accelerator, self._wrapped = accelerator, wrapped

    @contextlib.contextmanager
    def round(self, is_last: bool) -> Iterator[None]:
        """Around the forward and backward of one chunk of this rank's part."""
        with contextlib.nullcontext() if is_last else self._accelerator.no_sync(self._wrapped):
            yield


class OrderedGradients(SummedGradients):
    """The gradient of a batch in deterministic mode: the shards' gradients, added in one order at any number of processes.

    The order is a binary tree over the shards. A rank adds up the whole subtrees that lie in its part, all ranks gather those
    of all, and each adds the rest of the tree for itself.
    """

    def __init__(self, accelerator: Accelerator, wrapped: nn.Module, shards: int, rounds: int) -> None:
        """A batch has `shards`; each rank takes `rounds` of them in a step, the last ranks fewer."""
        super().__init__(accelerator, wrapped)
        self._parameters = list(wrapped.parameters())
        ends = [min(rank * rounds, shards) for rank in range(accelerator.num_processes + 1)]
        self._shards = [range(first, last) for first, last in pairwise(ends)]  # of each rank
        self._round = 0
        self._tree = _Tree()

    @contextlib.contextmanager
    def round(self, is_last: bool) -> Iterator[None]:
        with self._accelerator.no_sync(self._wrapped):
            yield
        mine = self._shards[self._accelerator.process_index]
        if self._round < len(mine):
            self._tree.add(_Node(0, mine[self._round], [cast(Tensor, p.grad) for p in self._parameters]))
        self._round += 1
        for parameter in self._parameters:
            parameter.grad = None
        if is_last:
            self._store_total()

    def _store_total(self) -> None:
        tree = self._tree if self._accelerator.num_processes == 1 else self._gathered()
        for parameter, gradient in zip(self._parameters, tree.total(), strict=True):
            parameter.grad = gradient
        self._round, self._tree = 0, _Tree()

    def _gathered(self) -> "_Tree":
        """The whole tree, from the subtrees of all ranks. Every rank sends as many tensors as the one that has most."""
        places = [[(node.level, node.place) for node in _subtrees(shards)] for shards in self._shards]
        sizes = [p.numel() for p in self._parameters]
        sent = torch.zeros(max(map(len, places)), sum(sizes), device=self._accelerator.device)
        for row, node in zip(sent, self._tree.nodes, strict=False):
            torch.cat([gradient.flatten() for gradient in node.gradients], out=row)
        received: Tensor = self._accelerator.gather(sent).view(len(places), *sent.shape)
        tree = _Tree()
        for rows, of_rank in zip(received, places, strict=True):
            for row, (level, place) in zip(rows, of_rank, strict=False):
                parts = zip(torch.split(row, sizes), self._parameters, strict=True)
                tree.add(_Node(level, place, [part.view_as(parameter) for part, parameter in parts]))
        return tree


class _Node(NamedTuple):
    """The sum over shards place * 2^level … (place + 1) * 2^level - 1."""

    level: int
    place: int
    gradients: list[Tensor]  # of each parameter


class _Tree:
    """The largest subtrees that can be made of the nodes added so far, which come from left to right."""

    def __init__(self) -> None:
        self.nodes: list[_Node] = []

    def add(self, node: _Node) -> None:
        """Adds a node, and joins neighbours as long as they are the two halves of a subtree. Changes the tensors."""
        while node.place % 2 == 1 and self.nodes and self.nodes[-1][:2] == (node.level, node.place - 1):
            node = _Node(node.level + 1, node.place // 2, _added(self.nodes.pop(), node))
        self.nodes.append(node)

    def total(self) -> list[Tensor]:
        """The sum over all shards, once they are all there: more than one node is left unless they are a power of two."""
        while len(self.nodes) > 1:
            right = self.nodes.pop()
            self.nodes[-1] = self.nodes[-1]._replace(gradients=_added(self.nodes[-1], right))
        return self.nodes[0].gradients


def _added(left: _Node, right: _Node) -> list[Tensor]:
    for total, gradient in zip(left.gradients, right.gradients, strict=True):
        total.add_(gradient)
    return left.gradients


def _subtrees(shards: range) -> list[_Node]:
    """Where the subtrees lie that a rank with these shards ends up with."""
    tree = _Tree()
    for index in shards:
        tree.add(_Node(0, index, []))
    return tree.nodes


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
