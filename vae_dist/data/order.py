"""Which image belongs to which step, rank and round: functions of (seed, epoch) and of the sizes alone."""

from dataclasses import dataclass

import torch
from torch import Tensor

from vae_dist.noise import Stream, derive_key, permutation

FILLER = -1  # stands where no image is, so that every round of every step on every rank has one shape; its weight is zero


@dataclass(frozen=True)
class Partition:
    """How the images of a pass are cut into steps of `batch_size` images, and those into equal parts for the ranks.

    A rank takes its part in `rounds` rounds of `rows` rows, at most `micro_batch_size` (None: all at once).
    """

    images: int
    batch_size: int
    world_size: int = 1
    micro_batch_size: int | None = None

    @property
    def steps(self) -> int:
        """Steps of a pass; the last one may hold fewer images."""
        return -(-self.images // self.batch_size)

    @property
    def rounds(self) -> int:
        part = -(-self.batch_size // self.world_size)
        return -(-part // min(part, self.micro_batch_size or part))

    @property
    def rows(self) -> int:
        return -(-self.batch_size // (self.world_size * self.rounds))

    def of_rank(self, order: Tensor, rank: int) -> Tensor:
        """The images that `rank` takes, int64 (steps, rounds, rows): `order`, int64 (images,), cut up; FILLER elsewhere."""
        batches = order.new_full((self.steps * self.batch_size,), FILLER)
        batches[: self.images] = order
        filled = order.new_full((self.steps, self.world_size * self.rounds * self.rows), FILLER)
        filled[:, : self.batch_size] = batches.view(self.steps, self.batch_size)
        return filled.view(self.steps, self.world_size, self.rounds, self.rows)[:, rank].contiguous()


def epoch_order(seed: int, epoch: int, images: int, device: torch.device | str = "cpu") -> Tensor:
    """The order of the training images in an epoch, int64 (images,)."""
    return permutation(derive_key(seed, Stream.ORDER, epoch), images, device)
