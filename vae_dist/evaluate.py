"""Exact evaluation of a run on its test images, at any number of processes.

python -m vae_dist.evaluate runs/mnist
"""

import hashlib
import json
import math
import sys
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Annotated, NamedTuple

import torch
import tyro
from accelerate import Accelerator
from torch import Tensor
from tqdm import tqdm

from vae_dist.checkpoint import write_atomically
from vae_dist.config import DataConfig, InputError
from vae_dist.data import binarized, gather, sources
from vae_dist.data.order import Partition
from vae_dist.distributed import on_first_rank, require_same, run_entry_point, start, sum_over_ranks, together
from vae_dist.likelihoods import bits_per_dimension, is_log_likelihood, remark
from vae_dist.model import VAE, Output, reparameterize
from vae_dist.noise import Stream, derive_key, normal
from vae_dist.objective import Sums, kl_by_dimension, negative_elbo
from vae_dist.options import command_line
from vae_dist.run import RunFolder, is_checkpoint, load_model

# Rows of every forward pass, whatever the number of ranks: an image's figure then never depends on who else evaluates.
_ROWS = 500


class Evaluation(NamedTuple):
    """Sums over all images, the standard error of their mean loss, and their mean KL by latent dimension, in nats."""

    sums: Sums
    stderr: float
    kld_per_dim: list[float]


@torch.no_grad()
def evaluate(model: VAE, pixels: Tensor, seed: int, accelerator: Accelerator, progress: bool = False) -> Evaluation:
    """The negative ELBO of all images, uint8 (n, *image_shape) on the device of the model, each counted once.

    One latent per image, from noise keyed by the image alone: figures of different epochs differ by their weights only. In
    float32 under every training precision, since `encode` and `decoder` run outside autocast. All ranks call it.
    """
    ranks = accelerator.num_processes
    partition = Partition(len(pixels), _ROWS * ranks, ranks, _ROWS)
    order = torch.arange(len(pixels), device=pixels.device)
    key = derive_key(seed, Stream.EVALUATION)
    totals = torch.zeros(4 + model.latent_dim, dtype=torch.float64, device=pixels.device)
    mine = partition.of_rank(order, accelerator.process_index).flatten(1)
    for indices in tqdm(mine, desc="evaluating", disable=None if progress and accelerator.is_main_process else True):
        images = gather(pixels, indices)
        posterior = model.encode(images)
        latents = reparameterize(posterior, normal(key, indices, model.latent_dim))
        terms = negative_elbo(Output(model.decoder(latents), *posterior, latents), images, model.likelihood)
        weights = indices >= 0
        columns = torch.stack([terms.bce, terms.kld, terms.loss.square(), torch.ones_like(terms.bce)])
        columns = torch.cat([columns, kl_by_dimension(*posterior).T])
        totals += (columns.double() * weights).sum(1)
    bce, kld, squares, n, *kld_by_dimension = sum_over_ranks(accelerator, totals)
    variance = max(0.0, squares / n - ((bce + kld) / n) ** 2)
    return Evaluation(Sums(bce, kld, n), math.sqrt(variance / n), [total / n for total in kld_by_dimension])


@dataclass(frozen=True)
class Options:
    """Evaluate a run, or one checkpoint, on the test images; print the figures and write a run's to evaluation.json."""

    run: tyro.conf.Positional[Path]
    """Folder of the run, or of one of its checkpoints."""
    root: Annotated[str | None, tyro.conf.arg(name="data.root")] = None
    """Where the data set lies, if elsewhere than in training."""


def load_pixels(config: DataConfig, accelerator: Accelerator, train: bool, shape: Sequence[int] | None = None) -> Tensor:
    """The training or the test images, uint8 on each rank's device; downloaded, where missing, by one process at a time.

    Binarised they are one data set, whatever the seed: training images by `static`, test images always, so that figures of
    different epochs and runs compare. `dynamic` training images stay grey until a step draws them.
    Raises the same InputError on all ranks where a rank cannot have them or has others than the rest, or they are not of the
    shape that is asked for.
    """
    on_first_rank(accelerator, lambda: sources.fetch_missing(config))
    together(accelerator, lambda: sources.fetch_missing(config) if accelerator.is_local_main_process else None)
    pixels = together(accelerator, lambda: sources.load(config, train)).pixels
    if shape is not None and pixels.shape[1:] != torch.Size(shape):
        sides = ("x".join(map(str, size)) for size in (pixels.shape[1:], shape))
        raise InputError(f"--data.root {config.root}: images of {' pixels, where '.join(sides)} are expected")
    name = f"the SHA-256 of the {'training' if train else 'test'} images in --data.root"
    require_same(accelerator, lambda: {name: hashlib.sha256(pixels.numpy().data).hexdigest()[:16]})
    if config.binarize == "static" or (config.binarize == "dynamic" and not train):
        pixels = binarized(pixels, derive_key(0, Stream.BINARY_TRAIN if train else Stream.BINARY_TEST))
    return pixels.to(accelerator.device)


def main(args: list[str] | None = None) -> int:
    options = command_line(Options, "vae_dist.evaluate", sys.argv[1:] if args is None else args)
    accelerator = start()
    model, config = together(accelerator, lambda: load_model(options.run))
    data = replace(config.data, root=options.root or config.data.root)
    pixels = load_pixels(data, accelerator, train=False, shape=model.image_shape)
    result = evaluate(model.to(accelerator.device), pixels, config.seed, accelerator, progress=True)
    figures = result.sums.figures()
    if not math.isfinite(figures["loss"]):
        raise InputError(f"{options.run}: the loss of this model is not finite")
    parts = f"bce {figures['bce']:.4f} + kld {figures['kld']:.4f}"
    note = remark(config, figures["loss"], model.image_shape)
    accelerator.print(f"test loss {figures['loss']:.4f} ± {result.stderr:.4f} nats{note} ({parts}), n={figures['n']}")
    if not is_checkpoint(options.run):  # those are sealed
        record: dict[str, object] = {"split": "test", "elbo": -figures["loss"], **figures, "stderr": result.stderr}
        record |= {"is_log_likelihood": is_log_likelihood(config), "kld_per_dim": result.kld_per_dim}
        record |= {"bits_per_dim": bits_per_dimension(config, figures["loss"], model.image_shape)}
        content = json.dumps(record, indent=2, allow_nan=False) + "\n"
        on_first_rank(accelerator, lambda: write_atomically(RunFolder(options.run).evaluation, content))
    return 0


if __name__ == "__main__":
    run_entry_point(main)
