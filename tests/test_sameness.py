"""Convolutional networks on folders of pictures and on packed images: the same weights whatever happens to a run."""

import hashlib
from pathlib import Path

import pytest
import torch
from PIL import Image

from tests.helpers import launch, records
from tests.test_crash import survive

NETWORKS: dict[str, list[object]] = {
    "conv": ["--model.kind", "conv"],
    "resnet": ["--model.kind", "resnet", "--model.attention", 7, "--model.recompute", "true"],
}
JOB: list[object] = [
    *("--data.batch_size", 16, "--data.flip", "true", "--data.shift", 2, "--model.channels", 4, "--model.latent_dim", 4),
    *("--optimizer.kind", "adamw", "--optimizer.ema", 0.9, "--trainer.epochs", 2, "--trainer.deterministic", "true"),
    *("--tracking.wandb", "disabled", "--tracking.log_every", 3),
]


@pytest.fixture
def pictures(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder of 120 colour pictures of 36 x 30 pixels, and a cache folder of its own."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    generator = torch.Generator().manual_seed(0)
    for number in range(120):
        coarse = torch.rand(1, 3, 4, 4, generator=generator)
        pixels = torch.nn.functional.interpolate(coarse, (30, 36), mode="bilinear").mul(255).to(torch.uint8)
        folder = tmp_path / "pictures" / f"album {number % 3}"
        folder.mkdir(parents=True, exist_ok=True)
        Image.fromarray(pixels[0].permute(1, 2, 0).numpy()).save(folder / f"{number}.png")
    return tmp_path / "pictures"


@pytest.fixture
def pack(pictures: Path, tmp_path: Path) -> Path:
    done = launch("vae_dist.pack", pictures, tmp_path / "packed", "--size", 28)
    assert done.returncode == 0, done.stderr
    return tmp_path / "packed"


@pytest.mark.parametrize("network", NETWORKS)
def test_folder_and_packed_images_give_the_same_weights_at_any_number_of_processes(
    network: str, pictures: Path, pack: Path, tmp_path: Path
) -> None:
    folder = ["--data.name", "folder", "--data.root", pictures, "--data.image_size", 28]
    packed = ["--data.name", "packed", "--data.root", pack]
    found = []
    for name, processes, data in (("one", 1, folder), ("other", 3 if network == "conv" else 2, packed)):
        options = [*JOB, *NETWORKS[network], *data, "--output", tmp_path / name]
        done = launch("vae_dist.train", *options, processes=processes)
        assert done.returncode == 0, done.stderr
        weights = hashlib.sha256((tmp_path / name / "model.safetensors").read_bytes()).hexdigest()
        rows = [{key: round(x, 6) if isinstance(x, float) else x for key, x in row.items()} for row in records(tmp_path / name)]
        found.append((weights, [row | {"kld_per_dim": None} for row in rows]))
    assert found[1] == found[0]


def test_kills_that_change_the_number_of_processes_leave_no_trace_with_packed_images(pack: Path, tmp_path: Path) -> None:
    often = ["--checkpoint.every_steps", 2, "--trainer.epochs", 6]
    options = [*JOB, *often, *NETWORKS["conv"], "--data.name", "packed", "--data.root", pack]
    survive(options, tmp_path, kills=1, worlds=[2, 1])


@pytest.mark.slow
def test_twenty_kills_leave_no_trace_with_packed_images(pack: Path, tmp_path: Path) -> None:
    often = ["--checkpoint.every_steps", 2, "--trainer.epochs", 40]
    options = [*JOB, *often, *NETWORKS["resnet"], "--data.name", "packed", "--data.root", pack]
    survive(options, tmp_path, kills=20, worlds=[1, 3, 2, 4])
