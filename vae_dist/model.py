"""The variational autoencoder (Kingma & Welling 2014, Rezende et al. 2014): encode, reparameterize, decode."""

import operator
from collections.abc import Callable, Sequence
from types import NoneType
from typing import NamedTuple, TypeVar

import torch
from torch import Tensor, nn

from vae_dist.config import InputError, ModelConfig
from vae_dist.data import rows_at_once
from vae_dist.data.images import Images
from vae_dist.likelihoods import Bernoulli, Likelihood, at_least_float32, build_likelihood
from vae_dist.networks import build_networks, set_output_bias
from vae_dist.noise import Stream, derive_key, normal

T = TypeVar("T")

_MOST_ROWS = 500  # of a forward pass


class Posterior(NamedTuple):
    """q(z|x): a normal distribution with diagonal covariance."""

    mean: Tensor  # (batch, latent_dim)
    logvar: Tensor  # (batch, latent_dim), log of the variance


class Output(NamedTuple):
    """What the objective needs. A NamedTuple: Accelerate casts its fields back to float32 under mixed precision."""

    decoded: Tensor  # (batch, outputs * channels, height, width), the parameters of p(x|z); of k latents (batch * k, …)
    mean: Tensor  # (batch, latent_dim), of q(z|x)
    logvar: Tensor  # (batch, latent_dim)
    latents: Tensor  # (batch, latent_dim) or (batch, k, latent_dim), drawn from q(z|x)


class VAE(nn.Module):
    """An encoder, a decoder and a likelihood, with a standard normal prior.

    Training calls the module itself, through the DDP wrapper and autocast; `encode`, `decode` and `sample` are for everything
    else and compute in the parameters' own precision.
    """

    def __init__(
        self,
        encoder: nn.Module,
        decoder: nn.Module,
        latent_dim: int,
        image_shape: Sequence[int],
        likelihood: Likelihood | None = None,
    ) -> None:
        """`encoder` maps images in [0, 1], (batch, *image_shape), to the posterior's mean and log-variance, side by side:
        (batch, 2 * latent_dim). `decoder` maps latents, (batch, latent_dim), to the parameters of the likelihood (bernoulli
        unless another is given): (batch, outputs * channels, height, width). Raises InputError where it is no Likelihood.
        """
        super().__init__()
        self.latent_dim = latent_dim
        self.image_shape = tuple(map(operator.index, image_shape))
        if not isinstance(likelihood, (Likelihood, NoneType)):
            raise InputError(f"the likelihood must be a vae_dist.Likelihood, not {likelihood!r}")
        self.likelihood = Bernoulli() if likelihood is None else likelihood
        self.encoder, self.decoder = encoder, decoder

    @classmethod
    def from_config(cls, config: ModelConfig, image_shape: Sequence[int]) -> "VAE":
        """The network that a config describes. Raises InputError where its modules are not of this package."""
        if config.kind == "own":
            raise InputError(
                "--model.kind own: the modules are a program's own, and only that can build them: vae_dist.fit(…, model=build) "
                "trains them, vae_dist.load(run, build) loads them"
            )
        likelihood = build_likelihood(config)
        return cls(*build_networks(config, image_shape, likelihood.outputs), config.latent_dim, image_shape, likelihood)

    def forward(self, images: Tensor, noise: Tensor) -> Output:
        """Images in [0, 1], (batch, *image_shape), and standard normal noise, (batch, latent_dim) or (batch, k, latent_dim)."""
        posterior = self.encode(images)
        latents = reparameterize(posterior, noise)
        return Output(self.decoder(latents.flatten(0, -2)), *posterior, latents)

    def encode(self, images: Tensor) -> Posterior:
        """q(z|x) of images in [0, 1], (batch, *image_shape)."""
        return Posterior(*self.encoder(images).chunk(2, dim=1))

    def decode(self, latents: Tensor) -> Tensor:
        """E[x|z] in [0, 1], (batch, *image_shape), of latents (batch, latent_dim)."""
        return self.likelihood.mean(self.decoder(latents))

    def decode_all(self, latents: Tensor) -> Tensor:
        """`decode` without gradients, some latents at a time: memory is that of the images alone."""
        with torch.no_grad():
            return torch.cat([self.decode(block) for block in torch.split(latents, rows_at_once(self.image_shape, _MOST_ROWS))])

    def sample(self, n: int, seed: int = 0) -> Tensor:
        """E[x|z] for n latents drawn from the prior; the same for the same seed, and the first of more."""
        device = next(self.parameters()).device
        noise = normal(derive_key(seed, Stream.SAMPLES), torch.arange(n, device=device), self.latent_dim)
        return self.decode_all(noise)


def reparameterize(posterior: Posterior, noise: Tensor) -> Tensor:
    """Latents drawn from q(z|x), of the noise's shape, differentiable in its parameters; float32 at least."""
    mean, scale = posterior.mean, torch.exp(0.5 * at_least_float32(posterior.logvar))
    if noise.ndim == 3:
        mean, scale = mean.unsqueeze(1), scale.unsqueeze(1)
    return mean + scale * noise


def build_model(config: ModelConfig, image_shape: Sequence[int], seed: int, images: Images | None = None) -> VAE:
    """A new model on the CPU, its weights a function of the seed.

    With `model.output_bias: data` they also follow from the training images; without these, who restores weights anyway has
    no need to read them all.
    """
    model = seeded(seed, lambda: VAE.from_config(config, image_shape))
    if config.output_bias == "data" and images is not None:
        set_output_bias(model.decoder, images)
    return model


def from_program(build: Callable[[], VAE]) -> VAE:
    """What a function of a program's own builds. Raises InputError where it is none, or builds no VAE."""
    if isinstance(build, nn.Module) or not callable(build):
        raise InputError("the model must be a function that builds the VAE, so that all processes build the same one")
    model = build()
    if not isinstance(model, VAE):
        raise InputError(f"the function must build a vae_dist.VAE, not {type(model).__name__}")
    return model


def seeded(seed: int, build: Callable[[], T]) -> T:
    """What `build` gives when torch's generator begins at the seed; the generator is left as it was."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return build()
