"""Which image belongs to which step, rank and round: functions of (seed, epoch) and of the sizes alone."""

from dataclasses import dataclass

import torch
from torch import Tensor

from vae_dist.noise import Stream, derive_key, permutation

FILLER = -1  # stands where no image is, so that every round of every step on every rank has one shape; its weight is zero


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
