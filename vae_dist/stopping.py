"""Stopping together: one rank is told to, by a signal or the time limit, and all leave after the same step."""

import os
import signal
import threading
import time
from types import FrameType

import torch
from accelerate import Accelerator

from vae_dist.distributed import sum_over_ranks
from vae_dist.options import is_spokesman

_SECONDS_BETWEEN_MEETINGS = 1.0


class Stopping:
    """What every rank asks after each step. It costs a collective only when the ranks meet, about once a second."""

    def __init__(self, accelerator: Accelerator, max_minutes: float | None, step: int) -> None:
        """At optimizer step `step`, when the limit begins to run."""
        self._accelerator = accelerator
        self._deadline = float("inf") if max_minutes is None else time.monotonic() + 60 * max_minutes
        self._is_told = False
        # Steps at which the ranks met and will meet: they agree on the next one whenever they do.
        self._last, self._next = step, step + 1
        self._met_at = time.monotonic()

    def listen(self) -> None:
        """Takes SIGTERM, SIGUSR1 and Ctrl-C for the word to stop. A second Ctrl-C does not wait for the others.

        Signals reach a process's main thread alone: a training in another is not told.
        """
        if threading.current_thread() is not threading.main_thread():
            return
        for signum in (signal.SIGTERM, signal.SIGUSR1, signal.SIGINT):
            signal.signal(signum, self._tell)

    def _tell(self, signum: int, _: FrameType | None) -> None:
        self._is_told = True
        if signum == signal.SIGINT:
            signal.signal(signal.SIGINT, signal.default_int_handler)
            if is_spokesman():  # past Python's buffers, which the signal may have found half written
                os.write(2, b"\nstopping after this step, with a checkpoint; Ctrl-C again leaves at once\n")

    def is_agreed(self, step: int, at_once: bool = False) -> bool:
        """Whether all ranks stop after `step`. Called by all, with the same arguments; waits for the device if they meet."""
        if step < self._next and not at_once:
            return False
        now = time.monotonic()
        told = float(self._is_told or now >= self._deadline)
        mine = torch.tensor([told, now - self._met_at], dtype=torch.float64, device=self._accelerator.device)
        stop, seconds = sum_over_ranks(self._accelerator, mine)
        per_step = seconds / self._accelerator.num_processes / max(1, step - self._last)
        self._last, self._next = step, step + max(1, int(_SECONDS_BETWEEN_MEETINGS / max(per_step, 1e-6)))
        self._met_at = now
        return stop > 0
