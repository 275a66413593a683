"""log p(x|z) per image, in nats, from the decoder's output."""

import math
from collections.abc import Sequence
from typing import Literal

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from vae_dist.config import ModelConfig

_LEVELS = 256  # of a pixel value
_LEVELS_AT_ONCE = 17  # in a mean
_SMALLEST_SIGMA = 1 / (255 * math.sqrt(12))  # what rounding to grey levels alone would leave
_SMALLEST_LOG_SCALE = -7.0  # a tenth of a grey level

# log(t / tanh t) = t^2 / 3 - 7 t^4 / 90 + …, and (1 / tanh t - 1 / t) / 2 = t / 6 - t^3 / 90 + …, for the logit 2 t near 0.
_NEAR_ZERO = 0.3
_LOG_SERIES = (1 / 3, -7 / 90, 62 / 2835, -127 / 18900, 146 / 66825, -1414477 / 1915538625)
_MEAN_SERIES = (1 / 6, -1 / 90, 1 / 945, -1 / 9450, 1 / 93555)


def at_least_float32(x: Tensor) -> Tensor:
    """`x`, upcast if it is of half precision: sums of exponentials want more."""
    return x.to(torch.promote_types(x.dtype, torch.float32))


class Likelihood(nn.Module):
    """p(x|z) of independent pixel values. An image's figure depends on that image alone: no statistic of a batch is used."""

    outputs = 1  # numbers that the decoder gives for each pixel value
    levels: int | None = None  # values that a pixel may have; None where they are a continuum and p(x|z) is a density

    def is_log_likelihood(self, is_binary: bool) -> bool:
        """Whether `log_prob` is log p(x|z) of images whose pixels are all black or white, or are not."""
        return True

    def log_prob(self, decoded: Tensor, images: Tensor) -> Tensor:
        """log p(x|z) in nats, (batch,), of images in [0, 1], (batch, channels, …); `decoded` is (batch, outputs * channels, …).

        In float32 at least, whatever the precision of the network.
        """
        raise NotImplementedError

    def mean(self, decoded: Tensor) -> Tensor:
        """E[x|z], in [0, 1], (batch, channels, …)."""
        raise NotImplementedError


class Bernoulli(Likelihood):
    """Each pixel a Bernoulli variable, its logit the decoder's output.

    On grey pixels this is the usual cross-entropy, a fine objective but not a log-likelihood: never set it beside figures
    of binarised images.
    """

    levels = 2

    def is_log_likelihood(self, is_binary: bool) -> bool:
        return is_binary

    def log_prob(self, decoded: Tensor, images: Tensor) -> Tensor:
        """From logits: a sigmoid before the cross-entropy has no gradient from logit 17 on."""
        terms = F.binary_cross_entropy_with_logits(at_least_float32(decoded), images, reduction="none")
        return -terms.flatten(1).sum(1)

    def mean(self, decoded: Tensor) -> Tensor:
        return torch.sigmoid(decoded)


class ContinuousBernoulli(Likelihood):
    """The density on [0, 1] that is proportional to a Bernoulli's (Loaiza-Ganem & Cunningham 2019).

    Its normaliser is log C = log(logit / tanh(logit / 2)), which wants care near logit 0 alone (their lambda near 1/2).
    """

    def log_prob(self, decoded: Tensor, images: Tensor) -> Tensor:
        logits = at_least_float32(decoded)
        terms = F.binary_cross_entropy_with_logits(logits, images, reduction="none")
        half, is_small, away = _near_zero(logits)
        log_ratio = torch.where(is_small, _power_series(half, _LOG_SERIES) * half, away.log() - away.tanh().log())
        return (log_ratio + math.log(2) - terms).flatten(1).sum(1)

    def mean(self, decoded: Tensor) -> Tensor:
        logits = at_least_float32(decoded)
        half, is_small, away = _near_zero(logits)
        offset = torch.where(is_small, _power_series(half, _MEAN_SERIES), (1 / away.tanh() - 1 / away) / 2)
        return 0.5 + offset.copysign(logits)


def _near_zero(logits: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Half the logits' size; where it is small; and it again, but far from 0 there, so that no gradient is NaN."""
    half = logits.abs() / 2
    is_small = half < _NEAR_ZERO
    return half, is_small, half.masked_fill(is_small, 1.0)


def _power_series(t: Tensor, coefficients: tuple[float, ...]) -> Tensor:
    """c[0] t + c[1] t^3 + c[2] t^5 + …"""
    squared, total = t.square(), torch.zeros_like(t)
    for coefficient in reversed(coefficients):
        total = total * squared + coefficient
    return total * t


class Gaussian(Likelihood):
    """A normal density, its mean the sigmoid of the decoder's output, with one standard deviation for all pixels.

    That is a number, a parameter, or with `optimal` each image's own best (Rybkin et al. 2021, without their batch): the root
    of its mean squared error. The last is chosen by looking at the image, so it makes no density, and no log-likelihood.
    """

    def __init__(self, sigma: float | Literal["learned", "optimal"]) -> None:
        super().__init__()
        self.sigma = sigma
        if sigma == "learned":
            self.log_sigma = nn.Parameter(torch.zeros(()))  # DDP sums its gradient too, though its forward never meets it

    def is_log_likelihood(self, is_binary: bool) -> bool:
        return self.sigma != "optimal"

    def log_prob(self, decoded: Tensor, images: Tensor) -> Tensor:
        squares = (images - self.mean(at_least_float32(decoded))).square().flatten(1)
        n, squares = squares.shape[1], squares.sum(1)
        variance = self._variance(squares / n)
        return -0.5 * (n * (2 * math.pi * variance).log() + squares / variance)

    def _variance(self, mean_squares: Tensor) -> Tensor:
        """Of a pixel value, for images whose mean squared errors these are; both (batch,)."""
        if self.sigma == "optimal":
            return mean_squares.clamp(min=_SMALLEST_SIGMA**2)
        if self.sigma == "learned":
            return (2 * self.log_sigma).exp().expand_as(mean_squares)
        return torch.full_like(mean_squares, float(self.sigma) ** 2)

    def mean(self, decoded: Tensor) -> Tensor:
        return torch.sigmoid(decoded)


class DiscretizedLogistic(Likelihood):
    """The probability of a grey level under a mixture of logistic densities (Kingma et al. 2016, Salimans et al. 2017).

    A level has what lies within half a level of it, the darkest and the brightest the tails too. The decoder gives each
    component's location and log scale, where black is -1 and white 1, and of several their logits. Channels are independent.
    """

    levels = _LEVELS

    def __init__(self, mixtures: int) -> None:
        super().__init__()
        self.mixtures = mixtures
        self.outputs = 2 if mixtures == 1 else 3 * mixtures

    def log_prob(self, decoded: Tensor, images: Tensor) -> Tensor:
        log_weights, location, log_scale = self._components(decoded)
        x = images.unsqueeze(1)
        centred, half_level = 2 * x - 1 - location, 1 / (_LEVELS - 1)
        upper, lower = (centred + half_level) * (-log_scale).exp(), (centred - half_level) * (-log_scale).exp()
        # sigmoid(a) - sigmoid(b) is sigmoid(a) * sigmoid(-b) * (1 - exp(b - a)), of which no factor cancels.
        width = torch.log(-torch.expm1(-2 * half_level * (-log_scale).exp()))
        is_black, is_white = x < 0.5 / (_LEVELS - 1), x > 1 - 0.5 / (_LEVELS - 1)
        below_upper, above_lower = F.logsigmoid(upper), F.logsigmoid(-lower)
        terms = torch.where(is_black, below_upper, torch.where(is_white, above_lower, below_upper + above_lower + width))
        return torch.logsumexp(log_weights + terms, dim=1).flatten(1).sum(1)

    def mean(self, decoded: Tensor) -> Tensor:
        """The probabilities to be brighter than each level, added up, some at a time: memory is that of so many pictures."""
        log_weights, location, log_scale = self._components(decoded)
        edges = (torch.arange(_LEVELS - 1, device=decoded.device) + 0.5) * (2 / (_LEVELS - 1)) - 1
        total = torch.zeros_like(location)
        for block in torch.split(edges, _LEVELS_AT_ONCE):
            total += torch.sigmoid((location.unsqueeze(-1) - block) * (-log_scale).exp().unsqueeze(-1)).sum(-1)
        return (log_weights.exp() * total).sum(1) / (_LEVELS - 1)

    def _components(self, decoded: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Log weights, locations and log scales, each (batch, mixtures, channels, …)."""
        batch, channels, *size = decoded.shape
        parts = at_least_float32(decoded).view(batch, -1, self.mixtures, channels // self.outputs, *size)
        logits = parts[:, 2] if self.mixtures > 1 else torch.zeros_like(parts[:, 0])
        return logits.log_softmax(1), parts[:, 0], parts[:, 1].clamp(min=_SMALLEST_LOG_SCALE)


def build_likelihood(config: ModelConfig) -> Likelihood:
    if config.likelihood == "continuous_bernoulli":
        return ContinuousBernoulli()
    if config.likelihood == "gaussian":
        return Gaussian(config.sigma)
    if config.likelihood == "discretized_logistic":
        return DiscretizedLogistic(config.mixtures)
    return Bernoulli()


def bits_per_dimension(likelihood: Likelihood, is_binary: bool, nats: float, image_shape: Sequence[int]) -> float | None:
    """A loss in nats per image as bits per pixel value; None where the values are a continuum, or it is no log-likelihood."""
    is_discrete = likelihood.levels is not None and likelihood.is_log_likelihood(is_binary)
    return nats / (math.log(2) * math.prod(image_shape)) if is_discrete else None


def remark(likelihood: Likelihood, is_binary: bool, nats: float, image_shape: Sequence[int]) -> str:
    """What must be said right after a loss that is shown in nats per image."""
    bits = bits_per_dimension(likelihood, is_binary, nats, image_shape)
    if bits is not None:
        return f", {bits:.4f} bits per dimension"
    return "" if likelihood.is_log_likelihood(is_binary) else ", not a log-likelihood"
