"""Each image once an epoch, for any number of images, batch and ranks; the same global batches whatever the ranks."""

import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from vae_dist.data.order import FILLER, Partition, epoch_order, even_rows

sizes = {"images": st.integers(1, 300), "batch": st.integers(1, 70), "ranks": st.integers(1, 9)}


def parts(partition: Partition, order: Tensor) -> Tensor:
    """(steps, ranks, rounds, rows)"""
    return torch.stack([partition.of_rank(order, rank) for rank in range(partition.world_size)], dim=1)


@given(**sizes, micro=st.none() | st.integers(1, 40), seed=st.integers(0, 100))
@settings(deadline=None)
def test_every_image_is_met_exactly_once(images: int, batch: int, ranks: int, micro: int | None, seed: int) -> None:
    partition = Partition(images, batch, ranks, even_rows(batch, ranks, micro))
    met = parts(partition, epoch_order(seed, 3, images)).flatten()
    assert torch.equal(met[met != FILLER].sort().values, torch.arange(images))


@given(**sizes, micro=st.none() | st.integers(1, 40))
@settings(deadline=None)
def test_global_batches_are_the_same_at_any_number_of_ranks(images: int, batch: int, ranks: int, micro: int | None) -> None:
    order = epoch_order(0, 1, images)
    partition = Partition(images, batch, ranks, even_rows(batch, ranks, micro))
    steps = parts(partition, order).flatten(1)
    assert len(steps) == partition.steps
    for step, met in enumerate(steps):
        assert torch.equal(met[met != FILLER], order[step * batch : (step + 1) * batch])


@given(**sizes, micro=st.integers(1, 40))
@settings(deadline=None)
def test_no_rank_takes_more_at_once_than_the_micro_batch(images: int, batch: int, ranks: int, micro: int) -> None:
    partition = Partition(images, batch, ranks, even_rows(batch, ranks, micro))
    assert partition.rows <= micro
    part = -(-batch // ranks)
    assert partition.rounds <= -(-part // micro), "no more rounds than that needs"
    assert partition.rounds * partition.rows < part + partition.rounds + partition.rows, "few fillers"


@given(**sizes, shards=st.integers(1, 12))
@settings(deadline=None)
def test_chunks_of_fixed_rows_hold_the_same_images_at_any_number_of_ranks(
    images: int, batch: int, ranks: int, shards: int
) -> None:
    rows, order = -(-batch // shards), epoch_order(0, 1, images)

    def chunks(world_size: int) -> set[tuple[int, tuple[int, ...]]]:
        table = parts(Partition(images, batch, world_size, rows), order).flatten(1, 2).tolist()
        return {(step, tuple(chunk)) for step, row in enumerate(table) for chunk in row if set(chunk) != {FILLER}}

    assert chunks(ranks) == chunks(1)


def test_order_changes_with_seed_and_epoch_only() -> None:
    assert torch.equal(epoch_order(1, 2, 100), epoch_order(1, 2, 100))
    assert not torch.equal(epoch_order(1, 2, 100), epoch_order(1, 3, 100))
    assert not torch.equal(epoch_order(1, 2, 100), epoch_order(2, 2, 100))
