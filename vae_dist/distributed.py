"""What several processes do together: sum figures, decide, fail and end."""

import contextlib
import io
import os
import sys
import time
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import NamedTuple, NoReturn, TypeVar

import torch.distributed as dist
from accelerate import Accelerator
from accelerate.utils import (
    broadcast_object_list,
    gather_object,
)
from torch import Tensor

from vae_dist.config import ImagesLost, InputError
from vae_dist.options import is_spokesman

T = TypeVar("T")

_SECONDS_TO_SPEAK = 1.0  # for the process that does: the launcher ends all as soon as one has left

EXIT_FAILED = 1
EXIT_BAD_INPUT = 2
EXIT_AT_ONCE = 130  # as shells tell of Ctrl-C
EXIT_INTERRUPTED = 75  # EX_TEMPFAIL of sysexits.h: start me again


class TrainingFailed(RuntimeError):
    """The loss is no number any more, or the ranks have drifted apart. All ranks raise it at the same step."""


class LostPeer(RuntimeError):
    """Another process of this run is gone, or silent for too long."""


def is_one_machine() -> bool:
    """Whether all processes of this run are on this machine."""
    return os.environ.get("LOCAL_WORLD_SIZE", "1") == os.environ.get("WORLD_SIZE", "1")


def say(accelerator: Accelerator, words: str) -> None:
    """Prints on rank zero. Accelerate's own `print` does on the first process of every machine."""
    if accelerator.is_main_process:
        print(words, flush=True)


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


def run_entry_point(main: Callable[[], int | None]) -> NoReturn:
    """Runs `main` and exits with the status it returns, None being 0; an error that the user can do something about is one
    line, and status 2 or 1. One of several processes leaves when all have done their work.
    """
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(errors="replace")  # where the locale has no ± or …
    try:
        status = main() or 0
    except (InputError, OSError, RuntimeError) as error:
        is_input = isinstance(error, (InputError, OSError))
        is_own = isinstance(error, (OSError, ImagesLost)) or _is_lost_peer(error)  # others may not know, or not be any more
        if not is_input and not isinstance(error, TrainingFailed) and not is_own:
            raise
        if is_spokesman() or is_own:  # what all ranks know is said once
            print(f"error: {in_words(error)}", file=sys.stderr, flush=True)
        else:
            time.sleep(_SECONDS_TO_SPEAK)
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
