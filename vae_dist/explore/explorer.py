"""What the page asks of a model: pictures of latents, latents of pictures, and test images with theirs."""

import base64
import hashlib
import tempfile
import threading
from typing import Any

import torch
from PIL import Image
from torch import Tensor

from vae_dist.config import Config, InputError
from vae_dist.data import as_images, rows_at_once
from vae_dist.data.images import Images, first_images
from vae_dist.data.photos import Decoding, Unreadable, decode, many
from vae_dist.likelihoods import remark
from vae_dist.model import VAE, Output, reparameterize
from vae_dist.noise import Stream, derive_key, normal
from vae_dist.objective import kl_by_dimension, negative_elbo

_ORDERING_IMAGES = 1000  # test images that say how much a dimension tells
_MOST_LATENT = 1000.0  # on either side of 0
_MOST_ROWS = 500  # of a forward pass


class Explorer:
    """A model on the CPU and its test images. Threads may ask at once; the model serves one at a time, with all cores.

    Pixels go in and out as a browser has them: uint8, row by row, the channels of a pixel side by side; out in base64, which
    takes a tenth of a PNG's time.
    """

    def __init__(self, name: str, model: VAE, config: Config, images: Images | None, problem: str = "") -> None:
        """`name` is the run's; `problem` says why there are no test images, where there are none.

        Raises InputError where its images are neither grey nor of three colours.
        """
        if model.image_shape[0] not in (1, 3):
            raise InputError(
                f"{name}: its images have {model.image_shape[0]} channels; only 1 (grey) and 3 (colour) can be shown"
            )
        self.model, self._name, self._config, self._images, self._problem = model, name, config, images, problem
        self.mark = _digest(name, model)
        self._is_binary = config.data.binarize != "none"
        self._model_turn, self._reader_turn = threading.Lock(), threading.Lock()
        self._noise = normal(derive_key(config.seed, Stream.EVALUATION), torch.zeros(1, dtype=torch.int64), model.latent_dim)
        self._kl = None if images is None else _mean_kl(model, as_images(first_images(images, _ORDERING_IMAGES)).cpu())

    def facts(self) -> dict[str, Any]:
        """Of the model. `order` has the dimensions that tell most of test images first, `kl` each one's mean KL in nats."""
        order = range(self.model.latent_dim) if self._kl is None else self._kl.argsort(descending=True, stable=True).tolist()
        return {
            "name": self._name,
            "shape": self.model.image_shape,
            "latent_dim": self.model.latent_dim,
            "kind": self._config.model.kind,
            "data": self._config.data.name,
            "order": list(order),
            "kl": None if self._kl is None else self._kl.tolist(),
            "images": 0 if self._images is None else len(self._images),
            "problem": self._problem,
        }

    def decode(self, latents: list[float]) -> dict[str, Any]:
        """The picture of a latent. Raises InputError where that has no numbers, or such as no latent has."""
        if not all(abs(value) <= _MOST_LATENT for value in latents):
            raise InputError(f"latents: they must be numbers in {-_MOST_LATENT:g} … {_MOST_LATENT:g}")
        with self._model_turn, torch.no_grad():
            return {"pixels": _written(self.model.decode(torch.tensor([latents])))}

    def sample(self, seed: int) -> dict[str, Any]:
        """A latent drawn from the prior, the first of `VAE.sample`, and its picture."""
        [latents] = normal(derive_key(seed, Stream.SAMPLES), torch.zeros(1, dtype=torch.int64), self.model.latent_dim).tolist()
        return {"latents": latents} | self.decode(latents)

    def encode(self, pixels: bytes) -> dict[str, Any]:
        """A picture's posterior mean and the picture of that, its KL by dimension, and the terms of its negative ELBO in nats.

        The terms are of one latent, as in an evaluation. A model of black and white pixels gets such.
        """
        channels, height, width = self.model.image_shape
        images = as_images(torch.frombuffer(bytearray(pixels), dtype=torch.uint8).view(1, height, width, channels))
        images = images.permute(0, 3, 1, 2).contiguous()
        if self._is_binary:
            images = images.round()
        with self._model_turn, torch.no_grad():
            posterior = self.model.encode(images)
            drawn = reparameterize(posterior, self._noise)
            decoded = self.model.decoder(torch.cat([posterior.mean, drawn]))
            terms = negative_elbo(Output(decoded[1:], *posterior, drawn), images, self.model.likelihood)
            kl = kl_by_dimension(*posterior)
            picture = self.model.likelihood.mean(decoded[:1])
        _require_finite(posterior.mean, kl, terms.loss)
        figures = {"loss": terms.loss.item(), "bce": terms.bce.item(), "kld": terms.kld.item()}
        note = remark(self.model.likelihood, self._is_binary, figures["loss"], self.model.image_shape)
        return {"latents": posterior.mean[0].tolist(), "kl": kl[0].tolist(), **figures, "note": note} | {
            "pixels": _written(picture)
        }

    def image(self, number: int) -> dict[str, Any]:
        """A test image, its posterior mean, and its class where the set has such. Raises InputError where there is none of this
        number.
        """
        if self._images is None:
            raise InputError(self._problem)
        if not 0 <= number < len(self._images):
            raise InputError(f"there is no test image {number}: they have the numbers 0 to {len(self._images) - 1}")
        with self._model_turn, torch.no_grad():
            image = as_images(self._images.rows(torch.tensor([number], device=self._images.device))).cpu()
            mean = self.model.encode(image).mean
        _require_finite(mean)
        label = None if self._images.labels is None else int(self._images.labels[number])
        return {"latents": mean[0].tolist(), "label": label, "pixels": _written(image)}

    def upload(self, content: bytes) -> dict[str, Any]:
        """The middle of a picture file, at the size and in the colours of the model. Raises InputError where it is none."""
        channels, height, width = self.model.image_shape
        side = max(height, width)
        with self._reader_turn, tempfile.NamedTemporaryFile() as file, many():
            file.write(content)
            file.flush()
            try:
                square = decode(file.name, Decoding(side, channels))
            except Unreadable as error:
                raise InputError(f"no picture that can be read ({error}): save it anew, as JPEG, PNG or WebP") from None
            with Image.open(file.name) as picture:
                if picture.format != "MPO" and getattr(picture, "is_animated", False):  # MPO: a photograph with a preview
                    raise InputError("the picture is animated; choose one that stands still")
        top, left = (side - height) // 2, (side - width) // 2
        pixels = torch.frombuffer(bytearray(square), dtype=torch.uint8).view(1, channels, side, side)
        return {"pixels": _written(as_images(pixels[..., top : top + height, left : left + width]))}


def _digest(name: str, model: VAE) -> str:
    """A SHA-256, in hex, of a run's name and its weights: another model has another."""
    digest = hashlib.sha256(name.encode())
    for weights in model.state_dict().values():
        digest.update(weights.contiguous().numpy().data)
    return digest.hexdigest()


@torch.no_grad()
def _mean_kl(model: VAE, images: Tensor) -> Tensor:
    """The KL of each latent dimension in nats, its mean over images: float64 (latent_dim,)."""
    blocks = torch.split(images, rows_at_once(model.image_shape, _MOST_ROWS))
    return sum((kl_by_dimension(*model.encode(block)).double().sum(0) for block in blocks), torch.zeros(())) / len(images)


def _written(image: Tensor) -> str:
    """An image in [0, 1], (1, channels, height, width), as uint8 pixels in base64."""
    _require_finite(image)
    pixels = image[0].mul(255).round().clamp(0, 255).to(torch.uint8).permute(1, 2, 0)
    return base64.b64encode(pixels.numpy().tobytes()).decode()


def _require_finite(*tensors: Tensor) -> None:
    if not all(tensor.isfinite().all() for tensor in tensors):
        raise InputError("the model makes no finite numbers of this")
