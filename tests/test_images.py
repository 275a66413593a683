"""Sets of images give out the same images wherever these lie, and augmentation follows from an image's number alone."""

import hashlib
import threading
import time

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from vae_dist.data import augmented, rows_at_once
from vae_dist.data.images import HostImages, Images, Resident, first_images
from vae_dist.noise import Stream, derive_key, signed

PIXELS = torch.randint(0, 256, (50, 3, 6, 8), generator=torch.Generator().manual_seed(0)).to(torch.uint8)
STEPS = torch.tensor([[[4, 9], [0, 49]], [[7, 7], [3, -1]], [[-1, -1], [1, 2]]])


class Shelf(HostImages):
    """Images on the host, given out slowly by some threads, some of them damaged."""

    def __init__(self, pixels: Tensor, damaged: int | None = None) -> None:
        self.shape, self._pixels, self._damaged = tuple(pixels.shape[1:]), pixels, damaged
        self.threads: set[str] = set()
        self.fetched = 0

    def __len__(self) -> int:
        return len(self._pixels)

    def digest(self) -> str:
        return hashlib.sha256(self._pixels.numpy().data).hexdigest()

    def fetch(self, indices: Tensor) -> Tensor:
        if self._damaged in indices.tolist():
            raise OSError("an image is damaged")
        self.threads.add(threading.current_thread().name)
        time.sleep(0.001 * int(indices[0] % 3))  # later steps may be there first
        self.fetched += 1
        return self._pixels[indices]


@pytest.mark.parametrize("images", [Resident(PIXELS), Shelf(PIXELS)], ids=["resident", "on the host"])
def test_images_come_by_their_numbers_and_a_filler_is_the_first(images: Images) -> None:
    assert torch.equal(images.rows(torch.tensor([3, 49, -1])), PIXELS[[3, 49, 0]])
    assert torch.equal(torch.stack(list(images.stream(STEPS))), PIXELS[STEPS.clamp(min=0)])
    assert torch.equal(torch.cat(list(images.blocks())), PIXELS)
    assert torch.equal(first_images(images, 8), PIXELS[:8])
    assert torch.equal(first_images(images, 80), PIXELS)


def test_sets_agree_on_order_digest_and_black_and_white() -> None:
    resident, shelf, key = Resident(PIXELS), Shelf(PIXELS), derive_key(3, Stream.BINARY_TRAIN)
    assert torch.equal(resident.order(1, 2, 8), shelf.order(1, 2, 8))
    assert resident.digest() == shelf.digest()
    binary = shelf.binarized(key)
    assert torch.equal(resident.binarized(key).pixels, first_images(binary, 50))
    assert torch.equal(binary.order(1, 2, 8), shelf.order(1, 2, 8))
    assert binary.digest() != shelf.digest()


def test_the_host_fetches_ahead_in_threads_but_not_the_whole_epoch() -> None:
    shelf = Shelf(PIXELS)
    stream = shelf.stream(torch.arange(50).view(50, 1, 1))
    next(stream)
    time.sleep(0.2)
    assert 2 <= shelf.fetched <= 12
    assert all(name.startswith("fetch") for name in shelf.threads)
    stream.close()  # type: ignore[attr-defined]
    assert not [thread for thread in threading.enumerate() if thread.name.startswith("fetch")]


def test_what_goes_wrong_in_a_thread_is_told_where_the_image_is_taken() -> None:
    stream = Shelf(PIXELS, damaged=20).stream(torch.arange(50).view(50, 1, 1))
    for _ in range(20):
        next(stream)
    with pytest.raises(OSError, match="an image is damaged"):
        next(stream)


KEY = torch.tensor(signed(derive_key(0, Stream.AUGMENTATION, 1)))
MANY = torch.arange(4000)


@given(indices=st.lists(st.integers(0, 10**12), min_size=1, max_size=9), flip=st.booleans(), shift=st.integers(0, 9))
def test_an_augmented_image_depends_on_its_number_alone(indices: list[int], flip: bool, shift: int) -> None:
    pixels = PIXELS[: len(indices)]
    together = augmented(pixels, torch.tensor(indices), KEY, flip, shift)
    assert (together.dtype, together.shape) == (torch.uint8, pixels.shape)
    for i, index in enumerate(indices):
        assert torch.equal(together[i], augmented(pixels[i : i + 1], torch.tensor([index]), KEY, flip, shift)[0])


def test_half_of_the_images_are_mirrored_each_epoch_another_half() -> None:
    pixels = PIXELS[:1].expand(4000, -1, -1, -1)
    found = augmented(pixels, MANY, KEY, flip=True, shift=0)
    is_mirrored = (found == PIXELS[0].flip(2)).flatten(1).all(1)
    assert (is_mirrored ^ (found == PIXELS[0]).flatten(1).all(1)).all()
    assert 1850 < is_mirrored.sum() < 2150
    other = augmented(pixels, MANY, torch.tensor(signed(derive_key(0, Stream.AUGMENTATION, 2))), flip=True, shift=0)
    agreement = ((other == PIXELS[0].flip(2)).flatten(1).all(1) == is_mirrored).float().mean().item()
    assert 0.45 < agreement < 0.55


def test_images_move_by_every_distance_alike_and_edges_are_repeated() -> None:
    picture = torch.arange(30, dtype=torch.uint8).view(1, 1, 5, 6)
    found = augmented(picture.expand(4000, -1, -1, -1), MANY, KEY, flip=False, shift=2)
    padded = torch.nn.functional.pad(picture.float(), (2, 2, 2, 2), mode="replicate").to(torch.uint8)[0, 0]
    moved = {(y, x): padded[y : y + 5, x : x + 6] for y in range(5) for x in range(5)}
    counts = {place: (found[:, 0] == window).flatten(1).all(1).sum().item() for place, window in moved.items()}
    assert sum(counts.values()) == 4000
    assert all(100 < count < 230 for count in counts.values())


@pytest.mark.parametrize(("shape", "rows"), [((1, 28, 28), 500), ((3, 64, 64), 166), ((3, 256, 256), 10), ((3, 4096, 4096), 1)])
def test_large_images_pass_in_smaller_batches(shape: tuple[int, int, int], rows: int) -> None:
    assert rows_at_once(shape, 500) == rows
