"""log p(x|z) per image, in nats, from the decoder's output."""

import torch
from torch import Tensor
from torch.nn import functional as F


def at_least_float32(x: Tensor) -> Tensor:
    """`x`, upcast if it is of half precision: sums of exponentials want more."""
    return x.to(torch.promote_types(x.dtype, torch.float32))


class Bernoulli:
    """Each pixel a Bernoulli variable, its logit the decoder's output.

    On grey pixels this is the usual cross-entropy, a fine objective but not a log-likelihood: never set it beside figures
    of binarised images.
    """

    def log_prob(self, decoded: Tensor, images: Tensor) -> Tensor:
        """log p(x|z) in nats, (batch,), of images in [0, 1]; `decoded` are logits of the same shape.

        In float32 at least, whatever the precision of the network, and from logits: a sigmoid before the cross-entropy has no
        gradient from logit 17 on.
        """
        terms = F.binary_cross_entropy_with_logits(at_least_float32(decoded), images, reduction="none")
        return -terms.flatten(1).sum(1)

    def mean(self, decoded: Tensor) -> Tensor:
        """E[x|z], in [0, 1]."""
        return torch.sigmoid(decoded)
