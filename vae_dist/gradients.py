"""The gradient of a global batch: summed by DDP, or, in deterministic mode, added in one order at any number of processes."""

import contextlib
from collections.abc import Iterator
from itertools import pairwise
from typing import NamedTuple, cast

import torch
import torch.distributed as dist
from accelerate import Accelerator
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from vae_dist.config import InputError
from vae_dist.distributed import is_one_machine
from vae_dist.optimizer import trained_parameters
from vae_dist.pace import Laps
from vae_dist.shared_memory import SharedMemory, share_memory


class Gradients:
    """What adds up the gradients of a step's rounds and ranks. All ranks do all of it together."""

    def __init__(self, accelerator: Accelerator, module: nn.Module, laps: Laps) -> None:
        """`module` is what training must call: the model, through all that Accelerate puts around it."""
        self.module = module
        self.is_watched = False  # whether the next step notes `own_square`
        # |gradient of this rank's part|^2; zero where that is not known.
        self.own_square = torch.zeros((), dtype=torch.float64, device=accelerator.device)
        self._accelerator, self._laps = accelerator, laps

    def round(self, is_last: bool) -> contextlib.AbstractContextManager[None]:
        """Around the forward and backward of one chunk of this rank's part. After the last, .grad is the global batch's."""
        raise NotImplementedError


class SummedGradients(Gradients):
    """In the default mode: rounds add up in .grad, and DDP sums the ranks' in the last one."""

    def __init__(self, accelerator: Accelerator, model: nn.Module, laps: Laps, timeout: float) -> None:
        """`timeout` is the longest silence of a peer on this machine, in seconds."""
        super().__init__(accelerator, accelerator.prepare_model(model), laps)
        self._memory: SharedMemory | None = None
        if isinstance(self.module, DistributedDataParallel):
            self.module.register_comm_hook(self, SummedGradients._sum_bucket)
            if accelerator.device.type == "cpu" and is_one_machine():
                self._memory = share_memory(accelerator, timeout)
        elif accelerator.num_processes > 1:
            kind = type(self.module).__name__
            raise InputError(f"Accelerate is configured for {kind}, but gradients are summed over DDP only")

    @contextlib.contextmanager
    def round(self, is_last: bool) -> Iterator[None]:
        with contextlib.nullcontext() if is_last else self._accelerator.no_sync(self.module):
            yield
        if is_last and self._accelerator.num_processes > 1:
            self._laps.mark("communication")  # what of it was not hidden behind the backward pass

    def _sum_bucket(
        self,
        bucket: dist.GradBucket,  # type: ignore[name-defined]  # torch's stubs lack it
    ) -> torch.futures.Future[Tensor]:
        """DDP's communication hook. The objective is a sum over the global batch, so its gradient is the sum of the ranks'."""
        self._laps.mark("compute")
        gradient: Tensor = bucket.buffer()
        if self.is_watched:
            square = gradient.square().sum(dtype=torch.float64)
            self.own_square = square if bucket.index() == 0 else self.own_square + square
        if self._memory is None:
            work = dist.all_reduce(gradient, async_op=True)
            return work.get_future().then(lambda done: done.value()[0])
        self._memory.sum_(gradient)
        self._laps.mark("communication")
        done: torch.futures.Future[Tensor] = torch.futures.Future()
        done.set_result(gradient)
        return done


class FlatGradients(Gradients):
    """For a step recorded as a CUDA graph: one sum over ranks after the last backward, of kernels alone, without DDP."""

    def __init__(self, accelerator: Accelerator, model: nn.Module, laps: Laps) -> None:
        super().__init__(accelerator, _without_ddp(accelerator, model), laps)
        self._parameters = trained_parameters(model)

    @contextlib.contextmanager
    def round(self, is_last: bool) -> Iterator[None]:
        yield
        if is_last and self._accelerator.num_processes > 1:
            self._laps.mark("compute")
            gradient = torch.cat([cast(Tensor, p.grad).flatten() for p in self._parameters])
            self.own_square.copy_(gradient.square().sum(dtype=torch.float64))
            dist.all_reduce(gradient)
            parts = torch.split(gradient, [p.numel() for p in self._parameters])
            for p, part in zip(self._parameters, parts, strict=True):
                p.grad = part.view_as(p)
            self._laps.mark("communication")


def _without_ddp(accelerator: Accelerator, model: nn.Module) -> nn.Module:
    """The model through autocast, where the precision wants it, and nothing else."""
    module: nn.Module = accelerator.prepare_model(model, evaluation_mode=True)
    return module


class OrderedGradients(Gradients):
    """In deterministic mode: the shards' gradients, added in one order at any number of processes.

    The order is a binary tree over the shards. A rank adds up the whole subtrees that lie in its part, all ranks gather those
    of all, and each adds the rest of the tree for itself.
    """

    def __init__(self, accelerator: Accelerator, model: nn.Module, laps: Laps, shards: int, rounds: int) -> None:
        """A batch has `shards`; each rank takes `rounds` of them in a step, the last ranks fewer."""
        super().__init__(accelerator, _without_ddp(accelerator, model), laps)
        self._parameters = trained_parameters(model)
        ends = [min(rank * rounds, shards) for rank in range(accelerator.num_processes + 1)]
        self._shards = [range(first, last) for first, last in pairwise(ends)]  # of each rank
        self._round = 0
        self._tree = _Tree()

    @contextlib.contextmanager
    def round(self, is_last: bool) -> Iterator[None]:
        yield
        mine = self._shards[self._accelerator.process_index]
        if self._round < len(mine):
            self._tree.add(_Node(0, mine[self._round], [cast(Tensor, p.grad) for p in self._parameters]))
        self._round += 1
        for parameter in self._parameters:
            parameter.grad = None
        if is_last:
            self._laps.mark("compute")
            self._store_total()
            self._laps.mark("communication")

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
