"""Images that a program of one's own hands over: what they may be, and what is refused."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor

import vae_dist
from tests.own_program import settings
from vae_dist import InputError
from vae_dist.data.images import HostImages
from vae_dist.data.own import own_images


class Items:
    """A Dataset of whatever items."""

    def __init__(self, *items: Any) -> None:
        self.items = items

    def __len__(self) -> int:
        return len(self.items)

    def __getitem__(self, i: int) -> Any:
        return self.items[i]


class Stream(torch.utils.data.IterableDataset[Tensor]):
    def __len__(self) -> int:
        return len(COLOURS)

    def __iter__(self) -> Iterator[Tensor]:
        return iter(COLOURS)


COLOURS = torch.arange(2 * 3 * 4 * 5, dtype=torch.uint8).view(2, 3, 4, 5)


@pytest.mark.parametrize(
    "given",
    [
        COLOURS,
        COLOURS / 255,
        COLOURS.double() / 255,
        (COLOURS / 255).where(COLOURS > 0, -1e-7),  # as interpolation leaves them
        Items(*COLOURS),
        Items(*[(image / 255, 7) for image in COLOURS]),
        Items(*[(image, torch.zeros(40)) for image in COLOURS]),
        Items(*[Image.fromarray(image.permute(1, 2, 0).numpy()) for image in COLOURS]),
        Items(*[(image.permute(1, 2, 0).numpy(), np.int64(7)) for image in COLOURS]),
    ],
)
def test_tensors_and_items_become_the_same_images(given: Any) -> None:
    assert torch.equal(own_images(given, "train").rows(torch.arange(2)), COLOURS)


@pytest.mark.parametrize("label", [7, np.int64(7), torch.tensor(7), torch.tensor([7])])
def test_whole_numbers_beside_images_are_their_classes(label: Any) -> None:
    labels = own_images(Items(*[(image, label) for image in COLOURS]), "train").labels
    assert labels is not None
    assert labels.tolist() == [7, 7]


@pytest.mark.parametrize("label", ["seven", 7.5, 2**64, torch.zeros(40)])
def test_what_else_lies_beside_images_is_no_class(label: Any) -> None:
    assert own_images(Items(*[(image, label) for image in COLOURS]), "train").labels is None


class Counting(HostImages):
    """Images that are computed when they are asked for."""

    shape = (1, 4, 4)

    def __len__(self) -> int:
        return 64

    def digest(self) -> str:
        return "of 64 images that count"

    def fetch(self, indices: Tensor) -> Tensor:
        return (indices.view(-1, 1, 1, 1) * 3).expand(-1, *self.shape).to(torch.uint8)


def test_a_set_of_ones_own_is_fetched_as_it_is_needed(tmp_path: Path) -> None:
    held = torch.arange(64, dtype=torch.uint8).view(-1, 1, 1, 1).mul(3).expand(-1, 1, 4, 4)
    assert torch.equal(torch.cat(list(Counting().blocks())), held)
    fetched = vae_dist.fit(settings(tmp_path / "fetched"), Counting(), Counting())
    assert fetched.test["loss"] == vae_dist.fit(settings(tmp_path / "held"), held, held).test["loss"]


def test_grey_images_may_lack_the_channel() -> None:
    assert own_images(COLOURS[:, 0], "train").shape == (1, 4, 5)
    assert own_images(Items(*COLOURS[:, 0]), "train").shape == (1, 4, 5)


@pytest.mark.parametrize(
    ("given", "told"),
    [
        (COLOURS.numpy(), "torch.from_numpy"),
        (torch.zeros(3, 1, 2, 2, dtype=torch.complex64), "not torch.complex64"),
        ((COLOURS > 60).to(torch.uint8), "times 255"),
        (COLOURS[:, :, :, :1].transpose(1, 2).repeat(1, 2, 1, 1), "channels come first"),
        (Items(Image.new("P", (5, 4))), r"train\[0\]: is a picture of mode P"),
        (Items(()), r"train\[0\]: must be an image"),
        (COLOURS.float(), "train: floats must be in .* from 0 to 119"),
        (COLOURS / 255 - 0.5, "Leave out what normalises them"),
        (COLOURS.long(), "must be uint8"),
        (torch.full((1, 2, 2), torch.nan), "from nan to nan"),
        (torch.zeros(0, 1, 2, 2), r"\(0, 1, 2, 2\)"),
        (torch.zeros(2, 2), r"\(2, 2\)"),
        (Items(), "with a length"),
        (iter([COLOURS]), "with a length"),
        (Stream(), "with a length"),
        (Items(COLOURS[0], COLOURS[0, :, :2]), "of one shape"),
        (Items("a.png"), r"train\[0\]: must be an image"),
    ],
)
def test_what_is_no_set_of_images_is_refused(given: Any, told: str) -> None:
    with pytest.raises(InputError, match=told):
        own_images(given, "train")
