"""What the model makes of the test images: a map of its latents, and its worst reconstructions."""

import importlib
import importlib.util
import math
import warnings
from collections.abc import Sequence
from typing import NamedTuple

import torch
import torch.nn.functional as F
from accelerate import Accelerator
from torch import Tensor

from vae_dist.config import InputError
from vae_dist.data import as_images, rows_at_once
from vae_dist.data.images import Images
from vae_dist.evaluate import ImageLoss, evaluate
from vae_dist.model import VAE
from vae_dist.pictures import grid, reconstructed

_MOST_IMAGES = 10_000  # looked at: a map of more is no clearer, and slow to draw
_MOST_ROWS = 500  # of a forward pass
_THUMBNAIL = 28  # pixels a side, at most
SHEET_COLUMNS = 50  # of thumbnails


class Worst(NamedTuple):
    """An image that the model tells badly."""

    number: int
    loss: float  # nats
    picture: Tensor  # uint8 (height, width, channels): the image, its reconstruction beside it


class Insight(NamedTuple):
    """Of the test set."""

    n: int  # of its first images, which are on the map
    of: int  # images in the test set
    maps: dict[str, Tensor]  # float64 (n, 2): places of the images' posterior means, by how they were made
    explained: list[float]  # shares of the variance that PCA's two axes have
    labels: list[int] | None  # of all images
    thumbnails: Tensor  # uint8 (height, width, channels): the images as a grid, `SHEET_COLUMNS` in a row
    side: tuple[int, int]  # height and width of a thumbnail
    worst: list[Worst]


@torch.no_grad()
def look(model: VAE, images: Images, seed: int, accelerator: Accelerator) -> Insight:
    """Looks at the images, which come to the device of the model; the map has the first 10,000.

    Raises InputError where the model's figures of them are not finite.
    """
    n = min(_MOST_IMAGES, len(images))
    means, thumbnails = [], []
    for numbers in torch.split(torch.arange(n, device=images.device), rows_at_once(images.shape, _MOST_ROWS)):
        batch = as_images(images.rows(numbers))
        means.append(model.encode(batch).mean.cpu().double())
        thumbnails.append(_shrunk(batch).cpu())
    worst = evaluate(model, images, seed, accelerator).worst
    if not (torch.cat(means).isfinite().all() and all(math.isfinite(found.loss) for found in worst)):
        raise InputError("the model's figures of the test images are not finite")
    places, explained = principal_axes(torch.cat(means))
    small = torch.cat(thumbnails)
    return Insight(
        n=n,
        of=len(images),
        maps={"PCA": places} | _umap(torch.cat(means)),
        explained=explained,
        labels=None if images.labels is None else images.labels.tolist(),
        thumbnails=grid(small, SHEET_COLUMNS),
        side=(small.shape[2], small.shape[3]),
        worst=_worst(model, images, worst),
    )


def principal_axes(points: Tensor) -> tuple[Tensor, list[float]]:
    """Float64 points (n, dimensions) on their two axes of largest variance, (n, 2), and the shares of it that these have.

    Each axis points to where its largest component is positive, so that the same points always give the same map.
    """
    centred = points - points.mean(0)
    variances, axes = torch.linalg.eigh(centred.T @ centred / len(points))  # in ascending order
    axes = axes.flip(1)[:, :2]
    axes = axes * axes.gather(0, axes.abs().argmax(0, keepdim=True)).sign()
    shares = variances.flip(0)[:2].clamp(min=0) / variances.clamp(min=0).sum().clamp(min=1e-300)
    missing = 2 - axes.shape[1]  # of a latent of one dimension
    return F.pad(centred @ axes, (0, missing)), [*shares.tolist(), *[0.0] * missing]


def _umap(points: Tensor) -> dict[str, Tensor]:
    """A map of the points (n, dimensions) by UMAP (McInnes et al. 2018), where umap-learn is installed."""
    if importlib.util.find_spec("umap") is None or len(points) < 3:
        return {}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # it warns of its own use of its dependencies
        umap = importlib.import_module("umap")
        places = umap.UMAP(random_state=0, n_jobs=1).fit_transform(points.numpy())
    return {"UMAP": torch.from_numpy(places).double()}


def _shrunk(images: Tensor) -> Tensor:
    """Images no larger than a thumbnail."""
    scale = min(1.0, _THUMBNAIL / max(images.shape[2:]))
    height, width = (max(1, round(side * scale)) for side in images.shape[2:])
    return F.adaptive_avg_pool2d(images, (height, width))


def _worst(model: VAE, images: Images, found: Sequence[ImageLoss]) -> list[Worst]:
    """The images of largest loss, and what the model makes of their posterior means."""
    originals = as_images(images.rows(torch.tensor([number for number, _ in found], device=images.device)))
    pairs = torch.stack([originals, reconstructed(model, originals)], dim=1)
    return [Worst(number, loss, grid(pair, columns=2)) for (number, loss), pair in zip(found, pairs, strict=True)]
