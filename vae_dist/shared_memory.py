"""Sums over the processes of one machine through memory that they share: for CPUs, several times faster than gloo over TCP."""

import mmap
import os
import secrets
import socket

import torch
from accelerate import Accelerator
from accelerate.utils import broadcast_object_list
from torch import Tensor

from vae_dist.config import InputError
from vae_dist.distributed import LostPeer, say, together

_SIGNAL = b"."
_PART = 1 << 20  # numbers at a time: what all ranks have of them stays in the processor's cache
_SECONDS_TO_CONNECT = 60.0


class SharedMemory:
    """A part of memory for each rank, and one for their sum.

    Ranks wait for each other at sockets: the kernel orders what they wrote before, wakes who sleeps, and tells of the dead.
    """

    def __init__(self, rank: int, peers: list[socket.socket], memory: mmap.mmap, timeout: float) -> None:
        """`peers` are connections to all other ranks, `timeout` the longest silence of one, in seconds."""
        self._rank, self._ranks, self._peers = rank, len(peers) + 1, peers
        for peer in peers:
            peer.settimeout(timeout)
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


def share_memory(accelerator: Accelerator, timeout: float) -> SharedMemory | None:
    """Memory that all ranks share, who are on one machine; None, and a word why, where they cannot. All ranks call it."""
    rank, ranks = accelerator.process_index, accelerator.num_processes
    # Of Linux's abstract namespace: no file is left behind, whatever happens.
    [name] = broadcast_object_list([f"\0vae_dist {secrets.token_hex(16)} "])
    try:
        with socket.socket(socket.AF_UNIX) as listener:
            together(accelerator, lambda: _listen(listener, f"{name}{rank}", ranks))
            peers = together(accelerator, lambda: _connected(listener, name, rank, ranks))
        memory = together(accelerator, lambda: _mapped(rank, peers, (ranks + 1) * _PART * torch.float32.itemsize))
    except InputError as error:
        say(accelerator, f"the processes cannot share memory ({error}); gradients are summed over gloo")
        return None
    return SharedMemory(rank, peers, memory, timeout)


def _listen(listener: socket.socket, address: str, ranks: int) -> None:
    listener.settimeout(_SECONDS_TO_CONNECT)
    listener.bind(address)
    listener.listen(ranks)


def _connected(listener: socket.socket, name: str, rank: int, ranks: int) -> list[socket.socket]:
    """A socket to each other rank, the lower ones first, in their order."""
    lower = [socket.socket(socket.AF_UNIX) for _ in range(rank)]
    for other, peer in enumerate(lower):
        peer.settimeout(_SECONDS_TO_CONNECT)
        peer.connect(f"{name}{other}")
    return lower + [listener.accept()[0] for _ in range(ranks - rank - 1)]


def _mapped(rank: int, peers: list[socket.socket], size: int) -> mmap.mmap:
    """The memory, made by rank zero and known to no other program; it goes with the last process."""
    if rank == 0:
        descriptor = os.memfd_create("vae_dist")
        os.posix_fallocate(descriptor, 0, size)  # too little room shows here, not as a SIGBUS later
        for peer in peers:
            socket.send_fds(peer, [_SIGNAL], [descriptor])
    else:
        peers[0].settimeout(_SECONDS_TO_CONNECT)
        descriptors = socket.recv_fds(peers[0], 1, 1)[1]
        if not descriptors:
            raise OSError("rank zero could not share memory")
        descriptor = descriptors[0]
    with os.fdopen(descriptor, "r+b") as file:
        return mmap.mmap(file.fileno(), size)
