"""log p(x) by importance sampling from the posterior (Burda et al. 2016): streamed, shared over ranks, and resumable."""

import functools
import hashlib
import math
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import safetensors.torch
import torch
from accelerate import Accelerator
from safetensors import SafetensorError, safe_open
from torch import Tensor

from vae_dist.checkpoint import write_atomically
from vae_dist.data import as_images, rows_at_once
from vae_dist.data.images import Images
from vae_dist.data.order import FILLER
from vae_dist.distributed import from_first_rank, on_first_rank
from vae_dist.model import VAE, Output, Posterior, reparameterize
from vae_dist.noise import Stream, derive_key, normal
from vae_dist.objective import log_likelihood_of_samples, log_prior_ratio

# Of every forward pass, whatever the numbers of ranks and samples: an image's figure depends on neither. Of large images
# fewer samples at once.
_IMAGES, _MOST_SAMPLES = 25, 50
_SECONDS_BETWEEN_SAVES = 10.0
_FORMAT = 1  # of the file of an evaluation that is not done, and of the draws behind it


@torch.no_grad()
def log_marginals(
    model: VAE,
    images: Images,
    seed: int,
    samples: int,
    accelerator: Accelerator,
    partial: "PartialFile",
    progress: Callable[[int], object] = lambda images: None,
) -> Tensor:
    """Estimates log p(x) of all images, which lie on the model's device: float64 (n,) in nats, on the host.

    Each is the importance-weighted bound with `samples` latents: never above log p(x) on average, and nearer with more. All
    ranks call it. It goes on from what the file holds. `progress` hears of each number of images that are done.
    """
    done = from_first_rank(accelerator, partial.read)
    progress(len(done))
    ranks, rank = accelerator.num_processes, accelerator.process_index
    for first in range(len(done), len(images), ranks * _IMAGES):
        numbers = torch.arange(first, first + ranks * _IMAGES, device=images.device)
        mine = torch.where(numbers < len(images), numbers, FILLER).view(ranks, _IMAGES)[rank]
        of_ranks: Tensor = accelerator.gather(_log_marginals_of(model, images.rows(mine), mine, seed, samples))
        new = of_ranks[: len(images) - first].cpu()
        done = torch.cat([done, new])
        progress(len(new))
        on_first_rank(accelerator, lambda: partial.save_at_times(done))  # noqa: B023  # called at once
    return done


def _log_marginals_of(model: VAE, pixels: Tensor, indices: Tensor, seed: int, samples: int) -> Tensor:
    """Of some images, float64 (n,): a running logsumexp, so that memory does not grow with the samples."""
    images = as_images(pixels)
    posterior = model.encode(images)
    total = torch.full((len(indices),), -math.inf, dtype=torch.float64, device=pixels.device)
    for noise in _noise(seed, indices, samples, model):
        log_weights = _log_weights(model, images, posterior, noise)
        total = torch.logaddexp(total, log_weights.double().logsumexp(1))
    return total - math.log(samples)


def _noise(seed: int, indices: Tensor, samples: int, model: VAE) -> Iterator[Tensor]:
    """Standard normal noise in blocks (n, k, latent_dim), k in all `samples`: the first of more."""
    at_once, dim = rows_at_once(model.image_shape, _MOST_SAMPLES), model.latent_dim
    for block in range(-(-samples // at_once)):
        key = derive_key(seed, Stream.IMPORTANCE, block)
        yield normal(key, indices, at_once * dim).view(len(indices), at_once, dim)[:, : samples - block * at_once]


def _log_weights(model: VAE, images: Tensor, posterior: Posterior, noise: Tensor) -> Tensor:
    """log p(x|z) + log p(z) - log q(z|x) at the latents that the noise (n, k, latent_dim) gives, in nats, (n, k)."""
    latents = reparameterize(posterior, noise)
    output = Output(model.decoder(latents.flatten(0, 1)), *posterior, latents)
    return log_likelihood_of_samples(output, images, model.likelihood) + log_prior_ratio(output)


class PartialFile:
    """What is done of an evaluation, kept in a file so that an end in the middle loses seconds. Rank zero's methods."""

    def __init__(self, path: Path | None, settings: object, model: VAE, images: Images, samples: int) -> None:
        """`settings` are what the figures depend on besides weights and images. Without a path nothing is kept."""
        self._path, self._settings, self._model, self._images, self._samples = path, settings, model, images, samples
        self._saved = time.monotonic()

    @functools.cached_property
    def _job(self) -> str:
        """A digest of all that the figures depend on."""
        facts = (_FORMAT, _IMAGES, _MOST_SAMPLES, self._samples, self._settings, self._images.digest())
        digest = hashlib.sha256(repr(facts).encode())
        for tensor in self._model.state_dict().values():
            digest.update(tensor.cpu().contiguous().numpy().data)
        return digest.hexdigest()

    def read(self) -> Tensor:
        """The log p(x) of the first images, float64; none where there is no file, or one of another job."""
        nothing = torch.zeros(0, dtype=torch.float64)
        if self._path is None:
            return nothing
        try:
            with safe_open(self._path, "pt") as file:
                if (file.metadata() or {}).get("job") != self._job:
                    return nothing
                found: Tensor = file.get_tensor("log_p")
        except (OSError, SafetensorError):
            return nothing
        is_right = found.dtype == torch.float64 and found.ndim == 1 and len(found) <= len(self._images)
        return found if is_right and bool(found.isfinite().all()) else nothing

    def remove(self) -> None:
        if self._path is not None:
            self._path.unlink(missing_ok=True)

    def save_at_times(self, log_p: Tensor) -> None:
        if self._path is not None and time.monotonic() >= self._saved + _SECONDS_BETWEEN_SAVES:
            write_atomically(self._path, safetensors.torch.save({"log_p": log_p}, {"job": self._job}))
            self._saved = time.monotonic()
