"""A program of one's own, run in one process and in several by test_library: own images, modules, likelihood and callback."""

import os
import sys
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

import vae_dist
from vae_dist import VAE, Config, DataConfig, TrackingConfig, TrainerConfig
from vae_dist.data import glyphs


class Laplace(vae_dist.Likelihood):
    """A Laplace density around the decoder's output, its scale learned."""

    def __init__(self) -> None:
        super().__init__()
        self.log_scale = nn.Parameter(torch.zeros(()))

    def log_prob(self, decoded: Tensor, images: Tensor) -> Tensor:
        distances = (decoded - images).abs() / self.log_scale.exp()
        return -(distances + self.log_scale + 0.6931472).flatten(1).sum(1)

    def mean(self, decoded: Tensor) -> Tensor:
        return decoded.clamp(0, 1)


class Dataset(torch.utils.data.Dataset[tuple[Tensor, int]]):
    def __init__(self, first: int, last: int, white: float = 1.0) -> None:
        self.images, self.labels = glyphs.draw(first, last)
        self.white = white

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, i: int) -> tuple[Tensor, int]:
        return self.images[i] / 255 * self.white, int(self.labels[i])


def build() -> VAE:
    encoder = nn.Sequential(nn.Conv2d(1, 4, 4, stride=4), nn.GroupNorm(2, 4), nn.SiLU(), nn.Flatten(), nn.Linear(196, 6))
    decoder = nn.Sequential(nn.Linear(3, 196), nn.SiLU(), nn.Linear(196, 784), nn.Unflatten(1, (1, 28, 28)))
    return VAE(encoder, decoder, latent_dim=3, image_shape=(1, 28, 28), likelihood=Laplace())


class Listener(vae_dist.Callback):
    def __init__(self, enough: float = 0) -> None:
        self.rows: list[dict[str, Any]] = []
        self.epochs: list[int] = []
        self.enough = enough

    def on_row(self, row: dict[str, Any]) -> None:
        self.rows.append(row)

    def on_epoch(self, epoch: int, train: dict[str, Any], test: dict[str, Any], model: VAE) -> bool:
        self.epochs.append(epoch)
        assert model.encode(torch.zeros(1, 1, 28, 28)).mean.shape == (1, 3)
        return epoch == self.enough


def settings(output: Path, epochs: int = 3) -> Config:
    return Config(
        output=str(output),
        data=DataConfig(batch_size=32),
        trainer=TrainerConfig(epochs=epochs, deterministic=True),
        tracking=TrackingConfig(wandb="disabled", log_every=2),
    )


def main() -> int:
    callbacks = [Listener(enough=2)] if os.environ.get("RANK", "0") == "0" else []  # of one process alone
    white = 255.0 if os.environ.get("WRONG_ON_RANK") == os.environ.get("RANK", "0") else 1.0
    result = vae_dist.fit(settings(Path(sys.argv[1])), Dataset(0, 190, white), Dataset(190, 290), build, callbacks)
    assert result.test["epoch"] == 2
    found = vae_dist.measure(result.model, Dataset(190, 290))
    assert abs(found["loss"] / result.test["loss"] - 1) < 1e-9
    print(f"loss {found['loss']:.9g} of {found['n']}\n", end="")  # in one write: of two processes each keeps its own line
    return result.status


if __name__ == "__main__":
    vae_dist.run_entry_point(main)
