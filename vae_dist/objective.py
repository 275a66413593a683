"""What is optimised, and beside it the evidence lower bound: term by term and image by image, in nats."""

import math
from typing import NamedTuple

import torch
from torch import Tensor

from vae_dist.config import ObjectiveConfig
from vae_dist.likelihoods import Likelihood, at_least_float32
from vae_dist.model import Output


class Terms(NamedTuple):
    """The two parts of the negative ELBO, in nats per image, and what is optimised where that is another thing."""

    bce: Tensor  # (batch,), -log p(x|z), whatever the likelihood
    kld: Tensor  # (batch,), KL(q(z|x) || p(z))
    other: Tensor | None = None  # (batch,), to be minimised in place of their sum

    @property
    def loss(self) -> Tensor:
        return self.bce + self.kld

    def columns(self) -> Tensor:
        """The parts, ones to count images, and the other objective if there is one, (3 or 4, batch): to be summed over images.

        Only what is optimised has a gradient.
        """
        if self.other is None:
            return torch.stack([self.bce, self.kld, torch.ones_like(self.kld)])
        return torch.stack([self.bce.detach(), self.kld.detach(), torch.ones_like(self.other), self.other])


def minimised(sums: Tensor) -> Tensor:
    """The sum to go down, (), of sums of `Terms.columns`."""
    return sums[0] + sums[1] if len(sums) == 3 else sums[3]


class Sums(NamedTuple):
    """Terms summed over images. Every printed figure is made from these: exact at any number of ranks."""

    bce: float = 0.0  # nats
    kld: float = 0.0  # nats
    images: float = 0.0
    surplus: float = 0.0  # nats of what was optimised, beyond bce + kld

    @classmethod
    def of_columns(cls, bce: float, kld: float, images: float, other: float | None = None) -> "Sums":
        """From sums of `Terms.columns`."""
        return cls(bce, kld, images, 0.0 if other is None else other - (bce + kld))

    def plus(self, other: "Sums") -> "Sums":
        return Sums(*(a + b for a, b in zip(self, other, strict=True)))

    def figures(self) -> dict[str, float | int]:
        """Means in nats per image, and the number of images. `loss` is the negative ELBO, whatever was optimised."""
        n = max(self.images, 1.0)
        return {"n": round(self.images), "loss": (self.bce + self.kld) / n, "bce": self.bce / n, "kld": self.kld / n}

    def objective(self) -> float:
        """What was optimised, a mean in nats per image; exactly the loss where that was."""
        return (self.bce + self.kld + self.surplus) / max(self.images, 1.0)


class Objective:
    """What a run optimises, as its config says. An image's terms depend on that image alone."""

    def __init__(self, config: ObjectiveConfig, device: torch.device | str = "cpu") -> None:
        self._config = config
        # On the device, so that neither the host nor a captured graph need know the step.
        self._kl_weight = torch.tensor(kl_weight(config, 0), device=device)

    @property
    def columns(self) -> int:
        """How many `Terms.columns` there are."""
        return 3 if is_plain(self._config) else 4

    def noise_shape(self, latent_dim: int) -> tuple[int, ...]:
        """Of the noise of one image."""
        samples = self._config.samples
        return (latent_dim,) if self._config.kind == "elbo" and samples == 1 else (samples, latent_dim)

    def begin_step(self, step: int) -> None:
        """Sets the weight of optimizer step `step` (from 0). It waits for nothing."""
        if self._config.anneal != "none":
            self._kl_weight.fill_(kl_weight(self._config, step))

    def __call__(self, output: Output, images: Tensor, likelihood: Likelihood) -> Terms:
        """The terms of images in [0, 1], (batch, *image_shape); `output` is of noise of `noise_shape`."""
        config = self._config
        log_likelihoods = log_likelihood_of_samples(output, images, likelihood)
        kl = kl_by_dimension(output.mean, output.logvar)
        terms = Terms(-log_likelihoods if log_likelihoods.ndim == 1 else -log_likelihoods.mean(1), kl.sum(1))
        if config.kind == "iwae":
            log_weights = log_likelihoods + log_prior_ratio(output, config.doubly_reparameterized)
            return terms._replace(other=-importance_bound(log_weights, output.latents, config.doubly_reparameterized))
        if is_plain(config):
            return terms
        cost = terms.kld if config.free_bits == 0 else with_free_bits(kl, config)
        return terms._replace(other=terms.bce + self._kl_weight * cost)


def negative_elbo(output: Output, images: Tensor, likelihood: Likelihood) -> Terms:
    """One-sample estimate of -ELBO for images in [0, 1], (batch, *image_shape). Kingma & Welling 2014, equation 10."""
    return Terms(-likelihood.log_prob(output.decoded, images), kl_by_dimension(output.mean, output.logvar).sum(1))


def kl_by_dimension(mean: Tensor, logvar: Tensor) -> Tensor:
    """KL(N(mean, exp(logvar)) || N(0, 1)) in nats, (batch, latent_dim). Kingma & Welling 2014, appendix B."""
    mean, logvar = at_least_float32(mean), at_least_float32(logvar)
    return -0.5 * (1 + logvar - mean.square() - logvar.exp())


def is_plain(config: ObjectiveConfig) -> bool:
    """Whether the negative ELBO itself is optimised."""
    return config.kind == "elbo" and config.beta == 1 and config.anneal == "none" and config.free_bits == 0


def kl_weight(config: ObjectiveConfig, step: int) -> float:
    """The weight of the KL in optimizer step `step` (from 0): rising from 0 to `beta`, linearly or in cycles, then `beta`.

    Linearly: Bowman et al. 2016; in cycles, of which the first half rises: Fu et al. 2019.
    """
    progress = math.inf
    if config.anneal == "linear":
        progress = step / config.anneal_steps
    elif config.anneal == "cyclical" and step < config.anneal_cycles * config.anneal_steps:
        progress = 2 * (step % config.anneal_steps) / config.anneal_steps
    return config.beta * min(1.0, progress)


def with_free_bits(kl: Tensor, config: ObjectiveConfig) -> Tensor:
    """KL by dimension, (batch, latent_dim), summed to (batch,) with `free_bits` nats of each dimension or group for nothing.

    Kingma et al. 2016, appendix C.8, but of each image's own KL: they compare a batch's mean, which would let an image's loss
    depend on its neighbours.
    """
    if config.free_bits_per == "dimension":
        return kl.clamp(min=config.free_bits).sum(1)
    return kl.sum(1).clamp(min=config.free_bits)


def log_likelihood_of_samples(output: Output, images: Tensor, likelihood: Likelihood) -> Tensor:
    """log p(x|z) in nats: (batch,), or (batch, k) where there are k latents of each image."""
    if output.latents.ndim == 2:
        return likelihood.log_prob(output.decoded, images)
    batch, samples = output.latents.shape[:2]
    repeated = images.unsqueeze(1).expand(-1, samples, *images.shape[1:]).flatten(0, 1)
    return likelihood.log_prob(output.decoded, repeated).view(batch, samples)


def log_prior_ratio(output: Output, is_posterior_fixed: bool = False) -> Tensor:
    """log p(z) - log q(z|x) in nats, (batch, k), at the k latents of each image.

    With `is_posterior_fixed` it is a function of the latents alone: no gradient goes to the parameters of q directly.
    """
    mean, logvar = output.mean.unsqueeze(1), at_least_float32(output.logvar).unsqueeze(1)
    standardised = (output.latents - mean.detach()) * torch.exp(-0.5 * logvar.detach())
    if is_posterior_fixed:
        logvar = logvar.detach()
    else:
        standardised = standardised.detach()  # it is the noise
    return 0.5 * (standardised.square() + logvar - output.latents.square()).sum(2)


def importance_bound(log_weights: Tensor, latents: Tensor, doubly_reparameterized: bool = False) -> Tensor:
    """log of the mean of k importance weights, in nats, (batch,), of their logs, (batch, k). Burda et al. 2016.

    With `doubly_reparameterized` the encoder gets the gradient of Tucker et al. 2018: the derivative of each log
    weight along its latent, times the square of the normalised weight. The latents must be those that all log weights were
    computed from, whose own gradient in the encoder is what the weights scale.
    """
    bound = torch.logsumexp(log_weights, dim=1) - math.log(log_weights.shape[1])
    if doubly_reparameterized and latents.requires_grad:
        # One factor comes from logsumexp, for encoder and decoder alike. What goes on from the latents goes to the encoder
        # alone, so the other is multiplied in there: still one backward through the model that DDP wraps.
        normalised = log_weights.detach().softmax(1).unsqueeze(2)
        latents.register_hook(lambda gradient: gradient * normalised)  # type: ignore[no-untyped-call]  # torch's own
    return bound
