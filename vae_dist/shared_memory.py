"""Sums over the processes of one machine through memory that they share: for CPUs, several times faster than gloo over TCP."""

import mmap
import os
import socket
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch
from accelerate import Accelerator
from accelerate.utils import broadcast_object_list, gather_object
from torch import Tensor

_SIGNAL = b"."
_PART = 1 << 20  # numbers at a time: what all ranks have of them stays in the processor's cache


class LostPeer(RuntimeError):
    """Another process of this machine is gone, or silent for too long."""


class SharedMemory:
    """A part of memory for each rank, and one for their sum.

    Ranks wait for each other at sockets: the kernel orders what they wrote before, wakes who sleeps, and tells of the dead.
    """

    def __init__(self, accelerator: Accelerator, timeout: float) -> None:
        """All ranks call it, and all are on this machine. `timeout` is the longest silence of a peer, in seconds.

        Raises OSError where there is no room.
        """
        self._rank, self._ranks = accelerator.process_index, accelerator.num_processes
        with _meeting_place(accelerator) as folder:
            self._peers = _connected(folder, self._rank, self._ranks)
            for peer in self._peers:
                peer.settimeout(timeout)
            memory = self._mapped((self._ranks + 1) * _PART * torch.float32.itemsize)
        parts = torch.frombuffer(memory, dtype=torch.float32).view(self._ranks + 1, _PART)
        self._parts, self._total = parts[:-1], parts[-1]

    def sum_(self, vector: Tensor) -> None:
        """Replaces a float32 vector by its sum over ranks, which is the same to the bit on each. All ranks call it.

        Raises LostPeer.
        """
        for part in torch.split(vector, _PART):
            self._sum_part(part)

    def _sum_part(self, part: Tensor) -> None:
        numel = len(part)
        self._parts[self._rank, :numel] = part
        self._meet()
        first, last = (numel * rank // self._ranks for rank in (self._rank, self._rank + 1))
        torch.sum(self._parts[:, first:last], 0, out=self._total[first:last])
        self._meet()
        part.copy_(self._total[:numel])

    def _meet(self) -> None:
        """Returns once all ranks are here."""
        try:
            for peer in self._peers:
                peer.sendall(_SIGNAL)
            for peer in self._peers:
                if not peer.recv(1):
                    raise LostPeer("shared memory: connection closed by a peer")
        except OSError as error:
            raise LostPeer(f"shared memory: {error}") from None

    def _mapped(self, size: int) -> mmap.mmap:
        """The memory, made by rank zero and known to no other program; it goes with the last process."""
        if self._rank == 0:
            descriptor = os.memfd_create("vae_dist")
            os.posix_fallocate(descriptor, 0, size)  # too little room shows here, not as a SIGBUS later
            for peer in self._peers:
                socket.send_fds(peer, [_SIGNAL], [descriptor])
        else:
            descriptors = socket.recv_fds(self._peers[0], 1, 1)[1]
            if not descriptors:
                raise OSError("rank zero could not share memory")
            descriptor = descriptors[0]
        with os.fdopen(descriptor, "r+b") as file:
            return mmap.mmap(file.fileno(), size)


@contextmanager
def _meeting_place(accelerator: Accelerator) -> Iterator[Path]:
    """A private folder for sockets, which rank zero makes and removes."""
    with tempfile.TemporaryDirectory(prefix="vae_dist_") as mine:
        yield Path(broadcast_object_list([mine])[0])
        gather_object([None])  # nobody is on the way any more


def _connected(folder: Path, rank: int, ranks: int) -> list[socket.socket]:
    """A socket to each other rank, the lower ones first, in their order."""
    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind(str(folder / str(rank)))
        listener.listen(ranks)
        gather_object([None])  # all listen
        lower = [socket.socket(socket.AF_UNIX) for _ in range(rank)]
        for other, peer in enumerate(lower):
            peer.connect(str(folder / str(other)))
        return lower + [listener.accept()[0] for _ in range(ranks - rank - 1)]
