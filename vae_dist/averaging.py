"""The average of the weights over the steps: what a run is judged by, and leaves, where `optimizer.ema` asks for one."""

import copy

import torch
from torch import Tensor

from vae_dist.model import VAE

_PREFIX = "ema."


class Averages:
    """Another model of the same shape, whose weights follow those in training (Polyak & Juditsky 1992), ever more slowly.

    torch's own AveragedModel asks the device in each step whether it is the first; this one is told.
    """

    def __init__(self, model: VAE, decay: float) -> None:
        """Starts as a copy of `model`, on its device."""
        self.model = copy.deepcopy(model).requires_grad_(False)
        self._decay = decay
        self._averages, self._weights = tuple(self.model.parameters()), tuple(model.parameters())

    @torch.no_grad()
    def update(self, step: int) -> None:
        """Takes in the weights that optimizer step `step` (from 0) left. The device is not waited for.

        To be called beside a recorded step, not in it: a recording would go on with the decay of one step.
        """
        torch._foreach_lerp_(self._averages, self._weights, 1 - decay_of_step(self._decay, step))

    def tensors(self) -> dict[str, Tensor]:
        """As a checkpoint has them beside the optimizer's state: `ema.<name>`."""
        return {_PREFIX + name: tensor for name, tensor in self.model.state_dict().items()}


def decay_of_step(decay: float, step: int) -> float:
    """The share that the average so far keeps in optimizer step `step` (from 0).

    It warms up, as in TensorFlow's ExponentialMovingAverage: else the random weights of the start would weigh
    decay^t after t steps.
    """
    return min(decay, (1 + step) / (10 + step))


def averages_in(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """What `Averages.tensors` put among other tensors of a checkpoint, by the names of the weights."""
    return {name.removeprefix(_PREFIX): tensor for name, tensor in tensors.items() if name.startswith(_PREFIX)}
