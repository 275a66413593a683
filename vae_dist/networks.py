"""Encoders and decoders: plain modules from images to the posterior's parameters, and from latents to the likelihood's."""

from collections.abc import Sequence
from itertools import pairwise
from typing import cast

import torch
from torch import Tensor, nn

from vae_dist.config import ModelConfig
from vae_dist.convolutions import ACTIVATIONS, build_convolutional
from vae_dist.data.images import Images

_DARKEST, _BRIGHTEST = 0.001, 0.999  # of a mean image: a pixel that is always black still has finite log-odds


def build_networks(config: ModelConfig, image_shape: Sequence[int], outputs: int) -> tuple[nn.Module, nn.Module]:
    """The encoder, (batch, *image_shape) -> (batch, 2 * latent_dim), and the decoder, (batch, latent_dim) -> the likelihood's
    parameters, (batch, outputs * channels, height, width).

    Raises InputError where an option does not fit the images' size.
    """
    build = _mlp if config.kind == "mlp" else build_convolutional
    return build(config, image_shape, outputs)


def _mlp(config: ModelConfig, image_shape: Sequence[int], outputs: int) -> tuple[nn.Module, nn.Module]:
    """Fully connected layers; the decoder mirrors the encoder. Initialised as torch initialises Linear."""
    channels, height, width = image_shape
    pixels = channels * height * width
    encoder = nn.Sequential(nn.Flatten(), *_layers([pixels, *config.hidden, 2 * config.latent_dim], config.activation))
    decoder = nn.Sequential(
        *_layers([config.latent_dim, *reversed(config.hidden), outputs * pixels], config.activation),
        nn.Unflatten(1, (outputs * channels, height, width)),
    )
    return encoder, decoder


def _layers(widths: Sequence[int], activation: str) -> list[nn.Module]:
    modules: list[nn.Module] = []
    for inputs, outputs in pairwise(widths):
        modules += [nn.Linear(inputs, outputs), ACTIVATIONS[activation]()]
    return modules[:-1]


@torch.no_grad()
def set_output_bias(decoder: nn.Module, images: Images) -> None:
    """Lets a decoder of logits begin at the mean of some images, as Burda et al. 2016 do.

    By pixel, or by channel where the last layer is a convolution. The mean is exact, and so the same on all ranks: a quotient
    of integers.
    """
    total = torch.as_tensor(sum(block.sum(0, dtype=torch.int64) for block in images.blocks())).cpu()  # of each pixel
    last = [m for m in decoder.modules() if isinstance(m, (nn.Linear, nn.Conv2d, nn.ConvTranspose2d))][-1]
    sums = total.flatten() if isinstance(last, nn.Linear) else total.sum((1, 2))
    mean = sums.double() / (255 * len(images) * (total.numel() // sums.numel()))
    cast(Tensor, last.bias).copy_(mean.clamp(_DARKEST, _BRIGHTEST).logit())
