"""Convolutional encoders and decoders: a plain strided stack, and a residual network. No image knows its neighbours."""

import math
from collections.abc import Callable, Sequence
from itertools import pairwise
from typing import TypeVar, cast

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

from vae_dist.config import InputError, ModelConfig
from vae_dist.likelihoods import at_least_float32

ACTIVATIONS = {"relu": nn.ReLU, "tanh": nn.Tanh, "silu": nn.SiLU}

_WIDEST = 8  # times the first convolution's width
_GROUPS, _GROUP_MAPS = 32, 4  # of GroupNorm: so many at most, of so many maps at least
_LOGVAR_BOUND = 10.0
_HALVED = math.sqrt(2)  # gain of layers before an activation, which lets through half of what comes
_FAINT = 0.3  # gain of the decoder's last layer: the first images are nearly uniform

Size = tuple[int, int]  # height and width
Layers = list[nn.Module]
L = TypeVar("L", nn.Linear, nn.Conv2d, nn.ConvTranspose2d)


def build_convolutional(config: ModelConfig, image_shape: Sequence[int], outputs: int) -> tuple[nn.Module, nn.Module]:
    """The encoder, (batch, *image_shape) -> (batch, 2 * latent_dim), and the decoder, (batch, latent_dim) ->
    (batch, outputs * channels, height, width).

    Spatial latents are maps of the lowest resolution, (latent_dim / (h * w), h, w), flattened. Raises InputError where an
    option does not fit the images' size.
    """
    channels, height, width = image_shape
    sizes = _resolutions(config, (height, width))
    build = _strided if config.kind == "conv" else _residual
    down, up, maps = build(config, sizes, channels, outputs * channels)
    to_latents, from_latents = _ends(config, sizes, maps)
    return nn.Sequential(*down, *to_latents, BoundedLogvar()), nn.Sequential(*from_latents, *up)


def _resolutions(config: ModelConfig, size: Size) -> list[Size]:
    """The images' size, and that after each halving, which rounds down."""
    height, width = size
    most = min(size).bit_length() - 1
    halvings = max(1, most - 2) if config.halvings is None else config.halvings
    if halvings > most:
        raise InputError(f"--model.halvings {halvings}: must be at most {most} for images of {height} x {width} pixels")
    return [(height >> i, width >> i) for i in range(halvings + 1)]


def _ends(config: ModelConfig, sizes: list[Size], maps: int) -> tuple[Layers, Layers]:
    """From (batch, maps, h, w) of the lowest resolution to (batch, 2 * latent_dim), and from (batch, latent_dim) back."""
    (height, width), latents = sizes[-1], config.latent_dim
    positions = height * width
    if config.latent == "vector":
        back: Layers = [_initialised(nn.Linear(latents, maps * positions), _HALVED), nn.Unflatten(1, (maps, height, width))]
        return [nn.Flatten(), nn.Linear(maps * positions, 2 * latents)], back
    if latents % positions:
        nearest = max(1, round(latents / positions)) * positions
        why = f"spatial latents of images of {sizes[0][0]} x {sizes[0][1]} pixels have {height} x {width} positions"
        raise InputError(f"--model.latent_dim {latents}: must be a multiple of {positions}, such as {nearest}: {why}")
    depth = latents // positions
    back = [nn.Unflatten(1, (depth, height, width)), _initialised(_conv(depth, maps), _HALVED)]
    return [_conv(maps, 2 * depth), nn.Flatten()], back


def _strided(config: ModelConfig, sizes: list[Size], inputs: int, outputs: int) -> tuple[Layers, Layers, int]:
    """Strided convolutions and, back, their transposes (as Radford et al. 2016, but without a norm).

    Returns the way down, the way up, and the number of maps between them.
    """
    widths, activation = _widths(config, len(sizes) - 1), ACTIVATIONS[config.activation]
    down: Layers = []
    for before, after in pairwise([inputs, *widths]):
        down += [_initialised(_halving(before, after), _HALVED), activation(), ChannelsLast()]
    up: Layers = [activation(), ChannelsLast()]
    for (before, after), size in zip(pairwise(reversed(widths)), reversed(sizes[1:-1]), strict=True):
        up += [_initialised(_doubling(before, after, size), _HALVED), activation()]
    return down, [*up, _initialised(_doubling(widths[0], outputs, sizes[0]), _FAINT)], widths[-1]


def _residual(config: ModelConfig, sizes: list[Size], inputs: int, outputs: int) -> tuple[Layers, Layers, int]:
    """Residual blocks at every resolution (He et al. 2016), and self-attention after those of low ones.

    Returns the way down, the way up, and the number of maps between them.
    """
    widths, lowest = _widths(config, len(sizes)), max(sizes[-1])
    if 0 < config.attention < lowest:
        raise InputError(f"--model.attention {config.attention}: must be 0, or at least {lowest}, the lowest resolution's side")

    def blocks(maps: int, size: Size) -> Layers:
        stage = [_block, _attention] if max(size) <= config.attention else [_block]
        return [made_of(maps, config.recompute) for _ in range(config.blocks) for made_of in stage]

    down = [_initialised(_conv(inputs, widths[0])), *blocks(widths[0], sizes[0])]
    for (before, after), size in zip(pairwise(widths), sizes[1:], strict=True):
        down += [_initialised(_halving(before, after)), *blocks(after, size)]
    up = blocks(widths[-1], sizes[-1])
    for (before, after), size in zip(pairwise(reversed(widths)), reversed(sizes[:-1]), strict=True):
        up += [nn.Upsample(size), _initialised(_conv(before, after)), *blocks(after, size)]
    down += [_norm(widths[-1]), nn.SiLU()]
    up += [_norm(widths[0]), nn.SiLU(), _initialised(_conv(widths[0], outputs), _FAINT)]
    return down, up, widths[-1]


def _block(maps: int, recompute: bool) -> nn.Module:
    """Norm, activation, convolution, twice, in the order of He et al. 2016b; begins as the identity (Goyal et al. 2017)."""
    layers = [_norm(maps), nn.SiLU(), _conv(maps, maps), _norm(maps), nn.SiLU(), _initialised(_conv(maps, maps), 0)]
    return Residual(layers, recompute)


def _attention(maps: int, recompute: bool) -> nn.Module:
    return Residual([_norm(maps), SelfAttention(maps)], recompute)


def _widths(config: ModelConfig, resolutions: int) -> list[int]:
    return [config.channels * min(2**i, _WIDEST) for i in range(resolutions)]


def _conv(inputs: int, outputs: int) -> nn.Conv2d:
    return nn.Conv2d(inputs, outputs, 3, padding=1)


def _halving(inputs: int, outputs: int) -> nn.Conv2d:
    """Of an even kernel, which lies in the middle of the four pixels that become one."""
    return nn.Conv2d(inputs, outputs, 4, stride=2, padding=1)


def _doubling(inputs: int, outputs: int, size: Size) -> nn.ConvTranspose2d:
    """Back to exactly `size` from half of it, rounded down."""
    return nn.ConvTranspose2d(inputs, outputs, 4, stride=2, padding=1, output_padding=(size[0] % 2, size[1] % 2))


def _norm(maps: int) -> nn.GroupNorm:
    """GroupNorm (Wu & He 2018), which looks at one image alone."""
    groups = [n for n in range(1, _GROUPS + 1) if maps % n == 0 and (n == 1 or maps // n >= _GROUP_MAPS)]
    return nn.GroupNorm(max(groups), maps)


def _initialised(layer: L, gain: float = 1.0) -> L:
    """Gives normal weights under which a signal's size is multiplied by `gain`, at any width and depth (He et al. 2015)."""
    terms = layer.weight[0].numel()  # that are summed to one output
    if isinstance(layer, nn.ConvTranspose2d):
        terms = layer.weight[:, 0].numel() // math.prod(layer.stride)
    nn.init.normal_(layer.weight, std=gain / math.sqrt(terms))
    nn.init.zeros_(cast(Tensor, layer.bias))
    return layer


class Residual(nn.Sequential):
    """x + f(x). With `recompute` the backward pass computes f again rather than keep what lies within (Chen et al. 2016)."""

    def __init__(self, layers: Layers, recompute: bool) -> None:
        super().__init__(*layers)
        self.recompute = recompute

    def forward(self, x: Tensor) -> Tensor:
        inner: Callable[[Tensor], Tensor] = super().forward
        if not self.recompute:
            return x + inner(x)
        # Nothing in it is random: no generator's state, which would have to be read from a GPU, needs to be restored.
        change: Tensor = checkpoint(inner, x, use_reentrant=False, preserve_rng_state=False)
        return x + change


class SelfAttention(nn.Module):
    """Of one head, over the positions of a map (Vaswani et al. 2017); gives zero at first. (batch, maps, h, w) to the same."""

    def __init__(self, maps: int) -> None:
        super().__init__()
        self.inward = nn.Linear(maps, 3 * maps)
        self.outward = _initialised(nn.Linear(maps, maps), 0)

    def forward(self, x: Tensor) -> Tensor:
        positions = x.flatten(2).transpose(1, 2).unsqueeze(1)  # (batch, 1, h * w, maps)
        query, key, value = self.inward(positions).chunk(3, dim=-1)
        attended: Tensor = self.outward(F.scaled_dot_product_attention(query, key, value))
        return attended.squeeze(1).transpose(1, 2).reshape(x.shape)


class ChannelsLast(nn.Module):
    """The same numbers, channels innermost, where convolutions are faster so: in half precision on a GPU.

    Weights stay as they are, and so do checkpoints. CPUs gain nothing by it; GroupNorm on a GPU would undo it.
    """

    def forward(self, x: Tensor) -> Tensor:
        return x.contiguous(memory_format=torch.channels_last) if x.is_cuda and x.element_size() == 2 else x


class BoundedLogvar(nn.Module):
    """Keeps the log-variance, the second half of (batch, 2 * latent_dim), within ±10; the slope is 1 at 0. In float32."""

    def forward(self, parameters: Tensor) -> Tensor:
        mean, logvar = at_least_float32(parameters).chunk(2, dim=1)
        return torch.cat([mean, _LOGVAR_BOUND * torch.tanh(logvar / _LOGVAR_BOUND)], dim=1)
