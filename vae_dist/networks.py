"""Encoders and decoders: plain modules from images to the posterior's parameters, and from latents to the likelihood's."""

from collections.abc import Sequence
from itertools import pairwise

from torch import nn

from vae_dist.config import ModelConfig


def build_networks(config: ModelConfig, image_shape: Sequence[int]) -> tuple[nn.Module, nn.Module]:
    """The encoder, (batch, *image_shape) -> (batch, 2 * latent_dim), and the decoder, (batch, latent_dim) -> logits."""
    return _mlp(config.hidden, config.latent_dim, tuple(image_shape))


def _mlp(hidden: Sequence[int], latent_dim: int, image_shape: tuple[int, ...]) -> tuple[nn.Module, nn.Module]:
    """Fully connected layers with ReLU; the decoder mirrors the encoder. Initialised as torch initialises Linear."""
    channels, height, width = image_shape
    pixels = channels * height * width
    encoder = nn.Sequential(nn.Flatten(), *_layers([pixels, *hidden, 2 * latent_dim]))
    decoder = nn.Sequential(*_layers([latent_dim, *reversed(hidden), pixels]), nn.Unflatten(1, image_shape))
    return encoder, decoder


def _layers(widths: Sequence[int]) -> list[nn.Module]:
    modules: list[nn.Module] = []
    for inputs, outputs in pairwise(widths):
        modules += [nn.Linear(inputs, outputs), nn.ReLU()]
    return modules[:-1]
