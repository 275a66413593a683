"""Which image belongs to which step, rank and round: functions of (seed, epoch) and of the sizes alone."""

import itertools
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from vae_dist.noise import Stream, derive_key, permutation

FILLER = -1  # stands where no image is, so that every round of every step on every rank has one shape; its weight is zero
LANES = 16  # files that are mixed in a batch, where images lie in files and some of these are far away


@dataclass(frozen=True)
class Partition:
    """How the images of a pass are cut: into steps of `batch_size` images, and each of those into chunks of `rows` images.

    Every rank takes the same number of chunks of a step, one after the other; at the end they may be fillers.
    """

    images: int
    batch_size: int
    world_size: int
    rows: int

    @property
    def steps(self) -> int:
        """Steps of a pass; the last one may hold fewer images."""
        return -(-self.images // self.batch_size)

    @property
    def rounds(self) -> int:
        """Chunks that a rank takes in a step."""
        return -(-self.batch_size // (self.rows * self.world_size))

    def of_rank(self, order: Tensor, rank: int) -> Tensor:
        """The images that `rank` takes, int64 (steps, rounds, rows): `order`, int64 (images,), cut up; FILLER elsewhere."""
        batches = order.new_full((self.steps * self.batch_size,), FILLER)
        batches[: self.images] = order
        filled = order.new_full((self.steps, self.world_size * self.rounds * self.rows), FILLER)
        filled[:, : self.batch_size] = batches.view(self.steps, self.batch_size)
        return filled.view(self.steps, self.world_size, self.rounds, self.rows)[:, rank].contiguous()


def even_rows(batch_size: int, world_size: int, micro_batch_size: int | None) -> int:
    """Rows of a chunk, so that a rank's part is in as few and as equal chunks of `micro_batch_size` at most as can be."""
    part = -(-batch_size // world_size)
    rounds = -(-part // (micro_batch_size or part))
    return -(-part // rounds)


def epoch_order(seed: int, epoch: int, images: int, device: torch.device | str = "cpu") -> Tensor:
    """The order of the training images in an epoch, int64 (images,)."""
    return permutation(derive_key(seed, Stream.ORDER, epoch), images, device)


def sharded_epoch_order(seed: int, epoch: int, shards: Sequence[int], batch_size: int) -> Tensor:
    """The order of the training images in an epoch where few shards can be at hand at once, int64 (images,) on the host.

    The shards, of so many images each, are shuffled, and so are the images of each. This sequence is cut into lanes, and every
    whole batch takes the next few of each lane; what is left is the last batch. Since a rank takes neighbouring rows of each
    batch, it reads a part of the sequence that is its own, and one shard of each of its lanes at a time, or two where one ends.
    """
    starts = list(itertools.accumulate(shards, initial=0))
    key = derive_key(seed, Stream.ORDER, epoch)
    shuffled = permutation(key, len(shards)).tolist()
    of_shards = [starts[i] + permutation(derive_key(seed, Stream.ORDER, epoch, i), shards[i]) for i in shuffled]
    sequence = torch.cat(of_shards)
    steps = len(sequence) // batch_size
    rows = torch.arange(batch_size)
    lanes = rows * min(LANES, batch_size) // batch_size
    widths = lanes.bincount()
    first_rows = widths.cumsum(0) - widths
    width, first_row = widths[lanes], first_rows[lanes]  # of each row's lane
    places = first_row * steps + torch.arange(steps).unsqueeze(1) * width + rows - first_row
    return torch.cat([sequence[places.flatten()], sequence[steps * batch_size :]])
