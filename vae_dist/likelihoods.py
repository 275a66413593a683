"""log p(x|z) per image, in nats, from the decoder's output."""

import torch
from torch import Tensor
from torch.nn import functional as F


class Bernoulli:
    """Each pixel a Bernoulli variable, its logit the decoder's output.

    On grey pixels this is the usual cross-entropy, a fine objective but not a log-likelihood: never set it beside figures
    of binarised images.
    """

    def log_prob(self, decoded: Tensor, images: Tensor) -> Tensor:
        """log p(x|z) in nats, float32 (batch,), of images in [0, 1]; `decoded` are logits of the same shape.

        In float32 whatever the precision of the network: from logits, since a sigmoid before the cross-entropy has no
        gradient from logit 17 on.
        """
        terms = F.binary_cross_entropy_with_logits(decoded.float(), images, reduction="none")
        return -terms.flatten(1).sum(1)

    def mean(self, decoded: Tensor) -> Tensor:
        """E[x|z], in [0, 1]."""
        return torch.sigmoid(decoded)
