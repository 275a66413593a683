"""Exact evaluation of a run on its test images, at any number of processes.

python -m vae_dist.evaluate runs/mnist --iw_samples 5000
"""

import copy
import json
import math
import sys
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Annotated, Any, NamedTuple

import torch
import tyro
from accelerate import Accelerator
from torch import Tensor
from tqdm import tqdm

from vae_dist.checkpoint import write_atomically
from vae_dist.config import DataConfig, InputError
from vae_dist.data import as_images, rows_at_once
from vae_dist.data.images import Images, Resident, first_images
from vae_dist.data.order import FILLER, Partition
from vae_dist.data.own import OwnImages, is_black_and_white, own_images
from vae_dist.distributed import from_first_rank, on_first_rank, run_entry_point, say, sum_over_ranks, together
from vae_dist.importance import PartialFile, log_marginals
from vae_dist.likelihoods import bits_per_dimension, remark
from vae_dist.loading import load_images, on_device
from vae_dist.model import VAE, Output, reparameterize
from vae_dist.noise import Stream, derive_key, normal
from vae_dist.objective import Sums, kl_by_dimension, negative_elbo
from vae_dist.options import command_line
from vae_dist.posterior import (
    ACTIVE_VARIANCE,
    COLLAPSED,
    MEAN_BINS,
    active_units,
    bins_of_means,
    mutual_information,
)
from vae_dist.progress import no_bar
from vae_dist.run import RunFolder, is_checkpoint, load_model, weights_digest
from vae_dist.starting import start, surroundings_kept
from vae_dist.wandb_run import summarise

# Rows of every forward pass, whatever the number of ranks: an image's figure then never depends on who else evaluates.
_MOST_ROWS = 500
_WORST = 8


class ImageLoss(NamedTuple):
    """The loss of one image."""

    number: int  # of the image, in its set
    loss: float  # nats


class Evaluation(NamedTuple):
    """Figures of all images, in nats."""

    sums: Sums
    stderr: float  # of the mean loss over images
    kld_per_dim: list[float]  # means over images
    active_units: int
    mean_counts: list[int]  # posterior means of all images and dimensions, counted by `posterior.bins_of_means`
    worst: list[ImageLoss]  # the eight highest; of equal ones the lower number first


@torch.no_grad()
def evaluate(model: VAE, images: Images, seed: int, accelerator: Accelerator, progress: bool = False) -> Evaluation:
    """The negative ELBO of all images, which come to the device of the model, each counted once.

    One latent per image, from noise keyed by the image alone: figures of different epochs differ by their weights only. In
    float32 under every training precision, since `encode` and `decoder` run outside autocast. All ranks call it.
    """
    ranks, rows = accelerator.num_processes, rows_at_once(images.shape, _MOST_ROWS)
    partition = Partition(len(images), rows * ranks, ranks, rows)
    order = torch.arange(len(images), device=images.device)
    key = derive_key(seed, Stream.EVALUATION)
    totals = torch.zeros(4 + 3 * model.latent_dim, dtype=torch.float64, device=images.device)
    counts = totals.new_zeros(MEAN_BINS)
    losses = []
    mine = partition.of_rank(order, accelerator.process_index).flatten(1)
    quiet = no_bar(progress and accelerator.is_main_process)
    for indices, pixels in zip(tqdm(mine, desc="evaluating", disable=quiet), images.stream(mine), strict=True):
        batch = as_images(pixels)
        posterior = model.encode(batch)
        latents = reparameterize(posterior, normal(key, indices, model.latent_dim))
        terms = negative_elbo(Output(model.decoder(latents), *posterior, latents), batch, model.likelihood)
        weights = indices >= 0
        sums = torch.stack([terms.bce, terms.kld, terms.loss, torch.ones_like(terms.bce)]).double()
        sums[2] = sums[2].square()
        means = posterior.mean.T.double()
        columns = torch.cat([sums, kl_by_dimension(*posterior).T.double(), means, means.square()])
        totals += (columns * weights).sum(1)
        bins = bins_of_means(posterior.mean)
        counts.index_add_(0, bins.flatten(), weights.double().repeat_interleave(model.latent_dim))
        losses.append(terms.loss)
    gathered = totals.new_zeros(ranks, 2, _WORST)  # every rank adds to zeros what is its own: a sum that is exact
    gathered[accelerator.process_index] = _highest(torch.cat(losses), mine.flatten())
    added = torch.tensor(sum_over_ranks(accelerator, torch.cat([totals, counts, gathered.flatten()])), dtype=torch.float64)
    return _evaluation(*torch.split(added, [len(totals), MEAN_BINS, gathered.numel()]))


def _highest(losses: Tensor, indices: Tensor) -> Tensor:
    """The images of the highest losses, (2, 8) in float64: their indices, FILLER where there are fewer, and the losses."""
    order = losses.masked_fill(indices < 0, -torch.inf).sort(descending=True, stable=True).indices[:_WORST]
    found = torch.full((2, _WORST), FILLER, dtype=torch.float64, device=losses.device)
    found[:, : len(order)] = torch.stack([indices[order].double(), losses[order].double()])
    return found


def _evaluation(totals: Tensor, counts: Tensor, highest: Tensor) -> Evaluation:
    """From float64 sums over all images on the host, and what `_highest` found on each rank, (ranks * 2 * 8)."""
    bce, kld, squares, n = totals[:4].tolist()
    kld_per_dim, of_means, of_squares = totals[4:].view(3, -1)
    stderr = math.sqrt(max(0.0, squares / n - ((bce + kld) / n) ** 2) / n)
    candidates = [
        ImageLoss(int(index), loss) for index, loss in highest.view(-1, 2, _WORST).mT.flatten(0, 1).tolist() if index >= 0
    ]
    worst = sorted(candidates, key=lambda image: (-image.loss, image.number))[:_WORST]
    active = active_units(of_means, of_squares, n)
    return Evaluation(Sums(bce, kld, n), stderr, (kld_per_dim / n).tolist(), active, counts.long().tolist(), worst)


@dataclass(frozen=True)
class Options:
    """Evaluate a run, or one checkpoint, on the test images: print the figures, and write those of a run to evaluation.json."""

    run: tyro.conf.Positional[Path]
    """Folder of the run, or of one of its checkpoints."""
    iw_samples: int = 0
    """Latents of each image for log p(x) by importance sampling, such as 5000; 0 leaves it out."""
    images: int | None = None
    """Only the first so many test images; their figures are printed, not written."""
    root: Annotated[str | None, tyro.conf.arg(name="data.root")] = None
    """Where the data set lies, if elsewhere than in training."""

    def __post_init__(self) -> None:
        if self.iw_samples < 0:
            raise InputError(f"--iw_samples {self.iw_samples}: must be 0 or more")
        if self.images is not None and self.images < 1:
            raise InputError(f"--images {self.images}: must be at least 1")


def main(args: list[str] | None = None) -> int:
    options = command_line(Options, "vae_dist.evaluate", sys.argv[1:] if args is None else args)
    accelerator = start()
    model, config = together(accelerator, lambda: load_model(options.run))
    data = replace(config.data, root=options.root or config.data.root)
    images = load_images(data, accelerator, train=False, shape=model.image_shape)
    run, is_kept = RunFolder(options.run), _is_kept(options, images, accelerator)
    if options.images is not None:
        images = Resident(first_images(images, options.images))
    is_binary = config.data.binarize != "none"
    kept = run.evaluation_so_far if is_kept else None
    partial = PartialFile(kept, (config.seed, config.model), model, images, options.iw_samples)
    record = figures(model.to(accelerator.device), images, accelerator, config.seed, is_binary, options.iw_samples, partial)
    record["weights_sha256"] = weights_digest(model)
    if is_kept:
        content = json.dumps(record, indent=2, allow_nan=False) + "\n"
        on_first_rank(accelerator, lambda: write_atomically(run.evaluation, content))
    say(accelerator, table(record, model, is_binary))
    if is_kept:
        on_first_rank(accelerator, lambda: summarise(accelerator, run, config, record))
    return 0


def _is_kept(options: Options, images: Images, accelerator: Accelerator) -> bool:
    """Whether the figures go to the run's evaluation.json: checkpoints are sealed, and some images are not the test set, nor
    are others than the run was tested on, which is said.
    """
    if options.images is not None or is_checkpoint(options.run):
        return False
    starts = from_first_rank(accelerator, RunFolder(options.run).read_starts)
    if starts and starts[-1]["data"]["test"]["sha256"] != images.digest():
        say(accelerator, f"not the test images of {options.run}: the figures are printed, not written")
        return False
    return True


def measure(model: VAE, images: OwnImages, iw_samples: int = 0, seed: int = 0) -> dict[str, Any]:
    """What `python -m vae_dist.evaluate` finds, for any images: those that `vae_dist.data.own.own_images` takes.

    In nats per image: `loss`, the negative ELBO, its parts `bce` and `kld`, and its standard error `stderr`; with `iw_samples`
    `nll`, -log p(x) by importance sampling; `n`, `active_units`, `kld_per_dim`, `mutual_information`. A seed names the noise.
    Called in one process, or in all of several, which share the work. The model is measured in eval mode on the device, and
    stays as and where it is. Raises InputError where the images are not the model's, or a figure is not finite.
    """
    if iw_samples < 0:
        raise InputError(f"iw_samples {iw_samples}: must be 0 or more")
    with surroundings_kept():
        accelerator = start()
        found = together(accelerator, lambda: own_images(images, "images"))
        is_binary = together(accelerator, lambda: is_black_and_white(found))
        found = on_device(found, "images", DataConfig(), accelerator, train=False, shape=model.image_shape)
        mine = copy.deepcopy(model).eval().to(accelerator.device)
        return figures(mine, found, accelerator, seed, is_binary, iw_samples)


def figures(
    model: VAE,
    images: Images,
    accelerator: Accelerator,
    seed: int,
    is_binary: bool,
    iw_samples: int = 0,
    partial: PartialFile | None = None,
) -> dict[str, Any]:
    """All that evaluation.json holds. All ranks call it. `is_binary` says that pixels are black or white.

    Raises InputError where one of them is not finite.
    """
    found = evaluate(model, images, seed, accelerator, progress=True)
    means = found.sums.figures()
    if not math.isfinite(means["loss"]):
        raise InputError("the loss of this model on these images is not finite")
    information, most = mutual_information(model, images, seed, accelerator)
    figures: dict[str, Any] = {"split": "test", "elbo": -means["loss"], **means, "stderr": found.stderr}
    figures["is_log_likelihood"] = model.likelihood.is_log_likelihood(is_binary)
    figures["bits_per_dim"] = bits_per_dimension(model.likelihood, is_binary, means["loss"], model.image_shape)
    if iw_samples:
        partial = partial or PartialFile(None, None, model, images, iw_samples)
        figures |= importance_figures(model, images, accelerator, seed, is_binary, iw_samples, partial)
    figures |= {"active_units": found.active_units, "latent_dim": model.latent_dim, "kld_per_dim": found.kld_per_dim}
    figures |= {"mutual_information": information, "mutual_information_at_most": most}
    if wrong := [name for name, value in figures.items() if isinstance(value, float) and not math.isfinite(value)]:
        raise InputError(f"{wrong[0]} of this model on these images is not finite")
    return figures


def importance_figures(
    model: VAE, images: Images, accelerator: Accelerator, seed: int, is_binary: bool, samples: int, partial: PartialFile
) -> dict[str, float | None]:
    """-log p(x) by importance sampling, in nats per image. All ranks call it."""
    n, quiet = len(images), no_bar(accelerator.is_main_process)
    with tqdm(total=n, desc=f"log p(x), {samples} samples", unit="image", smoothing=0, disable=quiet) as bar:
        log_p = log_marginals(model, images, seed, samples, accelerator, partial, bar.update)
    on_first_rank(accelerator, partial.remove)
    nll, spread = -log_p.mean().item(), log_p.std(correction=0).item()
    bits = bits_per_dimension(model.likelihood, is_binary, nll, model.image_shape)
    return {"nll": nll, "nll_stderr": spread / math.sqrt(n), "iw_samples": samples, "nll_bits_per_dim": bits}


def table(record: dict[str, Any], model: VAE, is_binary: bool) -> str:
    """The figures for a reader."""
    parts = f"bce {record['bce']:.4f} + kld {record['kld']:.4f}"
    note = remark(model.likelihood, is_binary, record["loss"], model.image_shape)
    lines = [f"test loss {record['loss']:.4f} ± {record['stderr']:.4f} nats{note} ({parts}), n={record['n']}"]
    if "nll" in record:
        note = remark(model.likelihood, is_binary, record["nll"], model.image_shape)
        name = "-log p(x)" if record["is_log_likelihood"] else "importance-weighted loss"
        of = f"k={record['iw_samples']}, n={record['n']}"
        lines.append(f"{name} {record['nll']:.4f} ± {record['nll_stderr']:.4f} nats{note}, {of}")
    information, most = record["mutual_information"], record["mutual_information_at_most"]
    ceiling = " (at its ceiling, the log of the number of images)" if information > 0.99 * most else ""
    active, dimensions = record["active_units"], record["latent_dim"]
    lines += [
        f"active units {active} of {dimensions} (variance of the posterior mean above {ACTIVE_VARIANCE})",
        f"mutual information of image and latent {information:.2f} nats{ceiling}",
        f"kld by dimension {' '.join(f'{kld:.2f}' for kld in sorted(record['kld_per_dim'], reverse=True))}",
    ]
    if active == 0:
        lines.append(f"ALARM: {COLLAPSED}")
    return "\n".join(lines)


if __name__ == "__main__":
    run_entry_point(main)
