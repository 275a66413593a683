"""The evidence lower bound, term by term and image by image, in nats."""

from typing import NamedTuple

import torch
from torch import Tensor

from vae_dist.likelihoods import Bernoulli, at_least_float32
from vae_dist.model import Output


class Terms(NamedTuple):
    """The two parts of the negative ELBO, in nats per image."""

    bce: Tensor  # (batch,), -log p(x|z)
    kld: Tensor  # (batch,), KL(q(z|x) || p(z))

    @property
    def loss(self) -> Tensor:
        return self.bce + self.kld


class Sums(NamedTuple):
    """Terms summed over images. Every printed figure is made from these: exact at any number of ranks."""

    bce: float = 0.0  # nats
    kld: float = 0.0  # nats
    images: float = 0.0

    def plus(self, other: "Sums") -> "Sums":
        return Sums(*(a + b for a, b in zip(self, other, strict=True)))

    def figures(self) -> dict[str, float | int]:
        """Means in nats per image, and the number of images."""
        n = max(self.images, 1.0)
        return {"n": round(self.images), "loss": (self.bce + self.kld) / n, "bce": self.bce / n, "kld": self.kld / n}


def negative_elbo(output: Output, images: Tensor, likelihood: Bernoulli) -> Terms:
    """One-sample estimate of -ELBO for images in [0, 1], (batch, *image_shape). Kingma & Welling 2014, equation 10."""
    return Terms(-likelihood.log_prob(output.decoded, images), kl_to_standard_normal(output.mean, output.logvar))


def kl_to_standard_normal(mean: Tensor, logvar: Tensor) -> Tensor:
    """KL(N(mean, exp(logvar)) || N(0, 1)) summed over dimensions, in nats, (batch,). Kingma & Welling 2014, appendix B."""
    mean, logvar = at_least_float32(mean), at_least_float32(logvar)
    return -0.5 * torch.sum(1 + logvar - mean.square() - logvar.exp(), dim=1)
