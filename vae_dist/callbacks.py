"""What a program of one's own may say in a training."""

from typing import Any

from vae_dist.model import VAE


class Callback:
    """What a program of one's own is told of a training, and where it may end it: a base class, whose methods do nothing.

    Every process calls those it was given, with figures that are the same on all; only times may differ.
    """

    def on_row(self, row: dict[str, Any]) -> None:
        """A point of the training curve: the row of metrics.jsonl. Every `tracking.log_every` optimizer steps, but for the
        last of an epoch, which `on_epoch` tells of.
        """

    def on_epoch(self, epoch: int, train: dict[str, Any], test: dict[str, Any], model: VAE) -> bool | None:
        """An epoch is over, and its checkpoint written: its two rows of metrics.jsonl, and the model that is tested, drawn and
        left at the end. Whoever returns True, on any process, ends the training there: it counts as finished.
        """
