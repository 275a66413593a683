"""Black and white pixels from grey ones: with their probabilities, the same whoever draws them, another each epoch."""

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from scipy import stats

from tests.helpers import Outcome, records
from vae_dist.data import binarized, binary, white
from vae_dist.data.images import Resident
from vae_dist.noise import Stream, derive_key, signed, uniform16

KEY = derive_key(3, Stream.BINARY_EPOCH, 1)
Command = Callable[..., Outcome]


def test_uniform16_is_uniform_in_each_of_its_columns() -> None:
    drawn = uniform16(KEY, torch.arange(20_000), 7)
    assert (drawn.shape, drawn.dtype) == ((20_000, 7), torch.int32)
    assert 0 <= drawn.min() < 100
    assert 65_435 < drawn.max() <= 65_535
    for column in drawn.T:
        for digits in (column >> 8, column & 255):
            assert stats.chisquare(torch.bincount(digits, minlength=256).tolist()).pvalue > 1e-4
    correlation = torch.corrcoef(torch.cat([drawn, drawn.roll(1, dims=0)], dim=1).double().T)
    assert (correlation - torch.eye(14)).abs().max() < 5 / 20_000**0.5


@given(st.lists(st.integers(-1, 2**40), min_size=1, max_size=20), st.integers(1, 33))
@settings(max_examples=30, deadline=None)
def test_bits_of_an_image_depend_on_key_and_image_alone(indices: list[int], pixels: int) -> None:
    """So they are the same at any number of processes, in any batch; and whether the key lies on the host or a device."""
    grey = torch.full((len(indices), pixels), 120, dtype=torch.uint8)
    together = binary(grey, torch.tensor(indices), KEY)
    alone = torch.cat([binary(grey[:1], torch.tensor([index]), KEY) for index in indices])
    assert torch.equal(together, alone)
    assert torch.equal(together, binary(grey, torch.tensor(indices), torch.tensor(signed(KEY))))


def test_black_never_is_white_and_white_always() -> None:
    indices = torch.arange(200_000)
    assert not binary(torch.zeros(200_000, 4, dtype=torch.uint8), indices, KEY).any()
    assert binary(torch.full((200_000, 4), 255, dtype=torch.uint8), indices, KEY).all()


def test_each_grey_value_is_white_as_often_as_it_should() -> None:
    grey = torch.arange(256, dtype=torch.uint8).expand(20_000, 256)
    found = binary(grey, torch.arange(20_000), KEY).double().sum(0)
    p = torch.arange(256).double() / 255
    inner = slice(1, 255)
    scores = ((found - 20_000 * p) / (20_000 * p * (1 - p)).sqrt())[inner]
    assert scores.square().sum().item() < stats.chi2.ppf(1 - 1e-4, 254)
    assert scores.abs().max() < 5


def test_a_data_set_is_made_black_and_white_once_and_a_step_draws_anew() -> None:
    pixels = torch.randint(0, 256, (700, 1, 4, 5), generator=torch.Generator().manual_seed(0)).to(torch.uint8)
    once = binarized(pixels, KEY)
    assert (once.shape, once.dtype) == (pixels.shape, torch.uint8)
    assert once.unique().tolist() == [0, 255]
    indices = torch.tensor([5, 699, -1, 5])
    rows = Resident(pixels).rows(indices)
    drawn = white(rows, indices, torch.tensor(signed(KEY)))
    assert torch.equal(drawn[:2], once[indices[:2]])
    assert torch.equal(drawn[0], drawn[3])
    other = white(rows, indices, torch.tensor(signed(derive_key(3, Stream.BINARY_EPOCH, 2))))
    assert not torch.equal(drawn, other)


@pytest.mark.parametrize("binarize", ["static", "dynamic"])
def test_a_binarised_run_says_so_and_its_test_images_are_the_same_whatever_the_seed(
    binarize: str, quick: list[object], command: Command, tmp_path: Path
) -> None:
    options = [*quick, "--data.binarize", binarize, "--trainer.epochs", 1, "--model.output_bias", "data"]
    outcome = command("train", *options, "--output", tmp_path / "a")
    assert outcome.status == 0, outcome.err
    assert "bits per dimension (bce" in outcome.out
    assert "not a log-likelihood" not in outcome.out
    outcome = command("evaluate", tmp_path / "a")
    found = json.loads((tmp_path / "a" / "evaluation.json").read_text())
    assert found["loss"] == records(tmp_path / "a")[-1]["loss"]
    assert found["is_log_likelihood"]
    assert f"{found['bits_per_dim']:.4f} bits per dimension" in outcome.out
    assert command("train", *options, "--seed", 1, "--output", tmp_path / "b").status == 0
    pictures = [(tmp_path / run / "images" / "reconstruction_1.png") for run in ("a", "b")]
    rows = [picture_rows(file) for file in pictures]
    assert rows[0][0] == rows[1][0], "the images"
    assert rows[0][1] != rows[1][1], "their reconstructions"


def picture_rows(file: Path) -> list[bytes]:
    with Image.open(file) as picture:
        grey = picture.convert("L")
        return [grey.crop((0, top, grey.width, top + 28)).tobytes() for top in (0, 30)]
