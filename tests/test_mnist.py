"""The seed's job on the real MNIST: its numbers, on one process and several. Skipped where VAE_DIST_DATA names no MNIST."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.helpers import launch, records, reference_terms
from vae_dist.noise import Stream, derive_key, normal


def train(root: Path, folder: Path, processes: int, *options: object) -> list[dict[str, Any]]:
    more = ["--data.root", root, "--tracking.wandb", "disabled", "--output", folder]
    done = launch("vae_dist.train", *more, *options, processes=processes)
    assert done.returncode == 0, done.stderr
    return records(folder)


def test_the_first_epoch_is_the_same_on_one_process_and_two(mnist_root: Path, tmp_path: Path) -> None:
    """The sums of the epoch agree closely; the test loss after it is that of two runs that rounding has parted."""
    one, two = (train(mnist_root, tmp_path / str(n), n, "--trainer.epochs", 1)[-2:] for n in (1, 2))
    assert (one[0]["n"], one[1]["n"]) == (two[0]["n"], two[1]["n"]) == (60_000, 10_000)
    assert one[0]["loss"] == pytest.approx(two[0]["loss"], abs=0.05)
    assert one[1]["loss"] == pytest.approx(two[1]["loss"], abs=0.3)
    assert 162 < one[0]["loss"] < 167
    assert 126 < one[1]["loss"] < 130
    assert_independently_right(mnist_root, tmp_path / "1", one[1])


def assert_independently_right(root: Path, run: Path, row: dict[str, Any]) -> None:
    """The reported test figures, again, in float64, from the weights' file and the raw bytes of the images."""
    raw = (root / "MNIST" / "raw" / "t10k-images-idx3-ubyte").read_bytes()
    images = torch.frombuffer(bytearray(raw), dtype=torch.uint8, offset=16).view(10_000, 784).double() / 255
    same_draw = normal(derive_key(0, Stream.EVALUATION), torch.arange(10_000), 20).double()
    bce, kld = (terms.mean().item() for terms in reference_terms(run, images, same_draw))
    assert (row["bce"], row["kld"]) == pytest.approx((bce, kld), rel=1e-7)
    torch.manual_seed(0)
    other, _ = reference_terms(run, images, torch.randn(10_000, 20).double())
    assert row["bce"] == pytest.approx(other.mean().item(), abs=0.2)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("processes", "options"),
    [(1, []), (2, []), (3, []), (1, ["--trainer.precision", "bf16"]), (2, ["--trainer.deterministic", "true"])],
    ids=["one process", "two", "three", "bf16", "deterministic"],
)
def test_ten_epochs_end_in_the_seeds_band(processes: int, options: list[object], mnist_root: Path, tmp_path: Path) -> None:
    *_, train_row, test_row = train(mnist_root, tmp_path / "run", processes, *options)
    assert (train_row["n"], test_row["n"]) == (60_000, 10_000)
    assert 105.9 < train_row["loss"] < 106.5
    assert 105.2 < test_row["loss"] < 105.7
    assert json.loads((tmp_path / "run" / "status.json").read_text())["state"] == "finished"
