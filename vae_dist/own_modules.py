"""Whether modules of a program's own keep what training promises: the same figures at any number of processes."""

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn.parameter import is_lazy

from vae_dist.config import InputError
from vae_dist.model import VAE, Output, seeded
from vae_dist.objective import negative_elbo

_IMAGES = 3
_TOLERANCE = 1e-4  # relative: kernels for two images and for three may round otherwise


def require_sound(model: VAE, image_shape: Sequence[int]) -> None:
    """Tries a model, which lies on the CPU, on some random images. Raises InputError, saying what would be wrong with it.

    Shapes; weights float32, of a known size, changed by the optimizer alone; what becomes of an image depends on that image and
    its noise alone, without a statistic of the batch, as BatchNorm takes, or randomness of its own, as Dropout has: those would
    make the result depend on the number of processes.
    """
    if model.image_shape != tuple(image_shape):
        raise InputError(f"the model is one of images of {model.image_shape}, but the training images are {tuple(image_shape)}")
    for name, tensor in model.state_dict().items():
        if is_lazy(tensor):  # it would take its weights from the first forward pass, not from the seed
            raise InputError(f"the model's {name} has no size yet; give it one, or call lazy modules once in the function")
        if tensor.dtype != torch.float32:
            way_out = "BatchNorm cannot be used; register masks and the like with persistent=False"
            raise InputError(f"the model's {name} is {tensor.dtype}, and must be torch.float32; {way_out}")
    for name, weights in model.named_parameters():
        if not weights.is_contiguous():  # fused optimizers walk weights, gradients and moments side by side
            raise InputError(f"the model's {name} is not contiguous, as transposed or channels_last: give it .contiguous()")
    if not any(weights.requires_grad for weights in model.parameters()):
        raise InputError("the model has no weights to train: all are frozen, by requires_grad_(False), or there are none")
    images, noise = _ramp(_IMAGES, *image_shape), 2 * _ramp(_IMAGES, model.latent_dim) - 1
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    seeded(0, lambda: _try(model, images, noise))
    moved = [name for name, tensor in model.state_dict().items() if not torch.equal(tensor, before[name])]
    if moved:
        raise InputError(
            f"the model's {', '.join(moved)} change with every forward pass, of which there are more or fewer by the number of "
            "processes; leave out what keeps such a memory, or put it into eval mode"
        )


def _try(model: VAE, images: Tensor, noise: Tensor) -> None:
    found = _answers(model, images, noise)
    if not bool(found.loss.isfinite().all()):
        raise InputError("the model's loss of some images between black and white is not finite")
    if not _alike(found, _answers(model, images, noise)):
        raise InputError(
            "the model gives the same images another answer each time: randomness of its own, as Dropout has, is not derived "
            "from the seed, and would make the result depend on the number of processes; leave it out"
        )
    fewer = _answers(model, images[:-1], noise[:-1])
    if not _alike(_Answers(*(of_images[:-1] for of_images in found)), fewer):
        raise InputError(
            "what the model makes of an image depends on the other images of its batch, as with BatchNorm, and would depend on "
            "the number of processes; take GroupNorm or LayerNorm"
        )
    found.loss.sum().backward()  # type: ignore[no-untyped-call]
    idle = [name for name, weights in model.named_parameters() if weights.requires_grad and weights.grad is None]
    model.zero_grad(set_to_none=True)
    if idle:
        raise InputError(f"the loss does not depend on the model's {', '.join(idle)}; leave it out, or requires_grad_(False)")


class _Answers(NamedTuple):
    """Of each image."""

    encoded: Tensor
    decoded: Tensor
    loss: Tensor


def _answers(model: VAE, images: Tensor, noise: Tensor) -> _Answers:
    """Raises InputError where their shapes cannot be."""
    n = len(images)
    encoded = model.encoder(images)
    _require_shape("encoder", encoded, (n, 2 * model.latent_dim), "the mean and the log-variance of each latent dimension")
    output: Output = model(images, noise)
    mean = model.likelihood.mean(output.decoded)
    _require_shape("decoder and likelihood", mean, tuple(images.shape), "the mean image, from Likelihood.mean")
    log_prob = model.likelihood.log_prob(output.decoded, images)
    _require_shape("likelihood", log_prob, (n,), "a figure for each image, from Likelihood.log_prob")
    return _Answers(encoded, output.decoded, negative_elbo(output, images, model.likelihood).loss)


def _require_shape(part: str, found: Tensor, wanted: tuple[int, ...], what: str) -> None:
    shape = tuple(found.shape)
    if shape != wanted:
        raise InputError(f"the model's {part} must give {wanted} for {wanted[0]} images, {what}, but gives {shape}")


def _alike(a: _Answers, b: _Answers) -> bool:
    return all(bool((x - y).abs().max() <= _TOLERANCE * x.abs().max()) for x, y in zip(a, b, strict=True))


def _ramp(*shape: int) -> Tensor:
    """Values from 0 to 1, none like another."""
    n = torch.Size(shape).numel()
    return (torch.arange(n) * 0.618034 % 1).view(shape)
