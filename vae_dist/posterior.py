"""What the latents know of the images: active units, mutual information, and whether the posterior has collapsed."""

import math

import torch
from accelerate import Accelerator
from torch import Tensor

from vae_dist.data import as_images, rows_at_once
from vae_dist.data.images import Images
from vae_dist.data.order import Partition
from vae_dist.distributed import sum_over_ranks
from vae_dist.model import VAE
from vae_dist.noise import Stream, derive_key, normal

ACTIVE_VARIANCE = 0.01  # of a unit's posterior mean over the data, above which it is active: Burda et al. 2016, section 5.2
COLLAPSED = "the posterior has collapsed: no latent dimension tells anything of the image"
MEAN_BINS, MEAN_REACH = 64, 4.0
_ROWS = 500
_MOST_IMAGES = 10_000  # the mutual information is of every image with every other


def active_units(sums: Tensor, squares: Tensor, n: float) -> int:
    """How many latent dimensions respond to the image, from float64 sums over n images of posterior means and their squares."""
    variance = squares / n - (sums / n).square()
    return int((variance > ACTIVE_VARIANCE).sum())


def bins_of_means(means: Tensor) -> Tensor:
    """The bin of each posterior mean, int64 of the same shape: 64 alike from -4 to 4, the outermost open to their side."""
    bins = (means + MEAN_REACH) * (MEAN_BINS / (2 * MEAN_REACH))
    return bins.clamp(0, MEAN_BINS - 1).long().clamp_(min=0)  # what is no number is no bin either: it goes to the first


@torch.no_grad()
def mutual_information(model: VAE, images: Images, seed: int, accelerator: Accelerator) -> tuple[float, float]:
    """I(x; z) under q in nats, and the most that it can come out as: the log of the number of images.

    E[log q(z|x) - log q(z)] with one latent for each image, where q(z) is the mean of all their posteriors (Hoffman & Johnson
    2016). Of the first 10,000 images at most. All ranks call it.
    """
    device, n, ranks = images.device, min(_MOST_IMAGES, len(images)), accelerator.num_processes
    numbers = torch.arange(n, device=device)
    blocks = torch.split(numbers, rows_at_once(images.shape, _ROWS))
    posteriors = [model.encode(as_images(images.rows(block))) for block in blocks]
    mean = torch.cat([posterior.mean for posterior in posteriors]).double()
    logvar = torch.cat([posterior.logvar for posterior in posteriors]).double()
    total = torch.zeros((), dtype=torch.float64, device=device)
    key = derive_key(seed, Stream.EVALUATION)
    for indices in Partition(n, _ROWS * ranks, ranks, _ROWS).of_rank(numbers, accelerator.process_index).flatten(1):
        mine = indices.clamp(min=0)
        noise = normal(key, indices, model.latent_dim).double()
        latents = mean[mine] + torch.exp(0.5 * logvar[mine]) * noise
        log_q = _log_normal(latents, mean, logvar)
        own = log_q.gather(1, mine.unsqueeze(1)).squeeze(1)
        aggregated = log_q.logsumexp(1) - math.log(n)
        total += ((own - aggregated) * (indices >= 0)).sum()
    [found] = sum_over_ranks(accelerator, total.unsqueeze(0))
    return found / n, math.log(n)


def _log_normal(latents: Tensor, mean: Tensor, logvar: Tensor) -> Tensor:
    """log N(z_i; mean_j, exp(logvar_j)) in nats, (i, j), by matrix products: no (i, j, dim) lies in memory."""
    precision = (-logvar).exp()
    squares = latents.square() @ precision.T - 2 * latents @ (mean * precision).T + (mean.square() * precision).sum(1)
    return -0.5 * (squares + logvar.sum(1) + latents.shape[1] * math.log(2 * math.pi))
