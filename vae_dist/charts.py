"""What W&B is shown of a run: its figures by charts, and an epoch's pictures, bars, histogram and table."""

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from vae_dist.data import as_images
from vae_dist.data.images import Images
from vae_dist.model import VAE
from vae_dist.pace import PARTS, peak_memory_mib
from vae_dist.pictures import as_pil, grid, reconstructed
from vae_dist.posterior import MEAN_BINS, MEAN_REACH

# A chart is named group/figure; a group is a section of the dashboard. The group `system` is W&B's own.
GROUPS = ("train", "test", "images", "posterior", "speed")
_SPEED = {"images_per_second", *(f"{part}_share" for part in PARTS), "train_seconds", "test_seconds", "processes"}
_OF_EPOCHS_ONLY = {"train_seconds", "processes"}
_NOT_CHARTS = {"split", "step", "epoch", "images_seen", "kld_per_dim"}
CAPTIONS = {  # of the pictures that a run draws in each epoch
    "reconstruction": "test images, and below each its reconstruction",
    "sample": "images of latents drawn from the prior, in each epoch the same latents",
    "traversal": "the first test image; each row moves one latent dimension from -3 to 3, on top the one of the largest KL",
}


class BadImage(NamedTuple):
    """A test image with a high loss."""

    number: int  # in its set
    loss: float  # nats
    label: int | None
    image: Tensor  # uint8 (rows, columns, channels)
    reconstruction: Tensor  # the same


class Closeup(NamedTuple):
    """What no file keeps of an epoch."""

    mean_counts: list[int]  # posterior means, counted by `posterior.bins_of_means`
    worst: list[BadImage]
    peak_memory_mib: float


def closeup(model: VAE, test: Images, mean_counts: list[int], worst: Sequence[tuple[int, float]]) -> Closeup:
    """Of what `evaluate` found in the test images: `worst` are numbers of images and their losses."""
    numbers = torch.tensor([number for number, _ in worst], device=test.device)
    images = as_images(test.rows(numbers))
    pairs = zip(images, reconstructed(model, images), strict=True)
    labels = [None if test.labels is None else int(test.labels[number]) for number, _ in worst]
    bad = [
        BadImage(number, loss, label, *(grid(side.unsqueeze(0), 1) for side in pair))
        for (number, loss), label, pair in zip(worst, labels, pairs, strict=True)
    ]
    return Closeup(mean_counts, bad, peak_memory_mib(test.device))


def figures(row: Mapping[str, Any]) -> dict[str, Any]:
    """The figures of a row of metrics.jsonl by the names of their charts."""
    return {_chart(row, key): value for key, value in row.items() if key not in _NOT_CHARTS}


def _chart(row: Mapping[str, Any], key: str) -> str:
    """An epoch's training figure is not a point of the training curve."""
    name = f"epoch_{key}" if "train_seconds" in row and key not in _OF_EPOCHS_ONLY else key
    group = "posterior" if key == "active_units" else "speed" if key in _SPEED else row["split"]
    return f"{group}/{name}"


def pictures(test: Mapping[str, Any], images: Path) -> Iterator[tuple[str, Any]]:
    """The charts of a test row that are no figures, as far as they can be had again after a crash."""
    import wandb

    of_epoch = f"epoch {test['epoch']}, test loss {test['loss']:.2f} nats"
    for name, caption in CAPTIONS.items():
        file = images / f"{name}_{test['epoch']}.png"
        if file.is_file():
            yield f"images/{name}", wandb.Image(str(file), caption=f"{of_epoch}: {caption}")
    dimensions = [[f"{dimension:02}", kld] for dimension, kld in enumerate(test["kld_per_dim"])]
    bars = wandb.Table(columns=["dimension", "nats"], data=dimensions)
    yield "posterior/kld_per_dim", wandb.plot.bar(bars, "dimension", "nats", title="KL of each latent dimension")


def closeup_charts(shown: Closeup) -> dict[str, Any]:
    """The charts of what no file keeps."""
    import wandb

    columns: list[str | int] = ["image", "reconstruction", "index", "loss"]
    rows = [[*map(_image, (bad.image, bad.reconstruction)), bad.number, bad.loss] for bad in shown.worst]
    if all(bad.label is not None for bad in shown.worst):
        columns.append("label")
        rows = [[*row, bad.label] for row, bad in zip(rows, shown.worst, strict=True)]
    histogram = np.array(shown.mean_counts), np.linspace(-MEAN_REACH, MEAN_REACH, MEAN_BINS + 1)
    return {
        "posterior/means": wandb.Histogram(np_histogram=histogram),
        "images/worst": wandb.Table(columns=columns, data=rows),
        "speed/peak_memory_mib": shown.peak_memory_mib,
    }


def _image(picture: Tensor) -> Any:
    import wandb

    return wandb.Image(as_pil(picture))
