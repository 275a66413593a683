"""One optimizer step on the device: forward, backward, sum over ranks, clip, update. It waits for nothing."""

import contextlib

import torch
from accelerate import Accelerator
from torch import Tensor, nn

from vae_dist.averaging import Averages
from vae_dist.config import Config
from vae_dist.data import as_images, augmented, binary
from vae_dist.data.order import Partition
from vae_dist.distributed import say, sum_over_ranks, tf32
from vae_dist.gradients import FlatGradients, Gradients, OrderedGradients, SummedGradients
from vae_dist.likelihoods import Likelihood
from vae_dist.model import VAE
from vae_dist.noise import Stream, derive_key, signed
from vae_dist.objective import Objective, minimised
from vae_dist.optimizer import build_optimizer, set_learning_rate
from vae_dist.pace import Laps
from vae_dist.replay import Replay


class Step:
    """Steps of a model that lies on its device. All ranks take each step together."""

    def __init__(self, config: Config, accelerator: Accelerator, model: VAE, partition: Partition) -> None:
        self._config, self._accelerator, self._model = config, accelerator, model
        self.laps = Laps(accelerator.device)
        is_recorded = may_be_recorded(config, accelerator)
        self.averages = Averages(model, config.optimizer.ema) if config.optimizer.ema else None
        self.gradients = build_gradients(config, accelerator, model, partition, self.laps, is_recorded)
        self.optimizer = build_optimizer(config.optimizer, model, is_recorded)
        self.objective = Objective(config.objective, accelerator.device)
        # Of what is drawn anew in each epoch; on the device, like all that a step reads.
        self._keys = {
            stream: torch.zeros((), dtype=torch.int64, device=accelerator.device)
            for stream, is_drawn in {
                Stream.BINARY_EPOCH: config.data.binarize == "dynamic",
                Stream.AUGMENTATION: config.data.flip or config.data.shift > 0,
            }.items()
            if is_drawn
        }
        self._sums_of = torch.compile(weighted_sums) if config.trainer.compile else weighted_sums
        self._norm: Tensor | None = None
        self._replay = Replay(self._compute, self._all_have) if is_recorded else None

    def begin_epoch(self, epoch: int) -> None:
        for stream, key in self._keys.items():
            key.fill_(signed(derive_key(self._config.seed, stream, epoch)))

    def __call__(self, pixels: Tensor, indices: Tensor, noise: Tensor, number: int, rate: float) -> Tensor:
        """Step `number` (from 0) on this rank's images, at a learning rate.

        They are uint8 (rounds, rows, *image_shape), with their numbers, int64 (rounds, rows), and noise (rounds, rows, …).
        Returns sums over the images of `Terms.columns`, float64, in memory that the next step may overwrite.
        """
        set_learning_rate(self.optimizer, rate)
        self.objective.begin_step(number)
        self.laps.mark("data")
        with tf32() if self._config.trainer.precision == "tf32" else contextlib.nullcontext():
            sums = (self._replay or self._compute)(pixels, indices, noise)
        if self.averages is not None:
            self.averages.update(number)
        self.laps.mark("compute")
        return sums

    def close(self) -> None:
        """Forgets the recording. NCCL waits for that, for ever, before it ends."""
        if self._replay is not None:
            self._replay.close()

    def _all_have(self, recorded: bool) -> bool:
        """Whether all ranks have recorded the step; none may replay alone."""
        mine = torch.tensor([float(not recorded)], dtype=torch.float64, device=self._accelerator.device)
        all_have = sum_over_ranks(self._accelerator, mine) == [0.0]
        if not all_have:
            say(self._accelerator, "the step cannot be recorded as a CUDA graph; going on without")
        return all_have

    def gradient_norm(self) -> Tensor:
        """L2 norm of the gradient of the step just done, before clipping."""
        if self._norm is not None:
            return self._norm
        return nn.utils.get_total_norm([p.grad for p in self._model.parameters() if p.grad is not None])

    def _compute(self, pixels: Tensor, indices: Tensor, noise: Tensor) -> Tensor:
        """The same kernels in every step, whatever the images: that is what a CUDA graph can hold."""
        self.optimizer.zero_grad(set_to_none=True)
        total = torch.zeros(self.objective.columns, dtype=torch.float64, device=indices.device)
        rounds = len(indices)
        for i in range(rounds):
            with self.gradients.round(is_last=i == rounds - 1):
                total += self._forward_backward(pixels[i], indices[i], noise[i])
        self._clip()
        if self._accelerator.scaler is None:
            self.optimizer.step()
        else:
            self._accelerator.scaler.step(self.optimizer)
            self._accelerator.scaler.update()
        return total

    def _forward_backward(self, pixels: Tensor, indices: Tensor, noise: Tensor) -> Tensor:
        """Adds the gradient of the summed objective of some images to .grad; returns their sums."""
        images = self._prepared(pixels, indices)
        self.laps.mark("data")
        sums = self._sums_of(self.objective, self.gradients.module, self._model.likelihood, images, noise, indices >= 0)
        self._accelerator.backward(minimised(sums))
        self.laps.mark("compute")
        return sums.detach()

    def _prepared(self, pixels: Tensor, indices: Tensor) -> Tensor:
        """Images as the network takes them, augmented and drawn black and white where that is asked for."""
        if (key := self._keys.get(Stream.AUGMENTATION)) is not None:
            pixels = augmented(pixels, indices, key, self._config.data.flip, self._config.data.shift)
        if (key := self._keys.get(Stream.BINARY_EPOCH)) is not None:
            return binary(pixels.flatten(1), indices, key).to(torch.float32).view_as(pixels)
        return as_images(pixels)

    def _clip(self) -> None:
        """Undoes fp16's loss scale, and clips where it is asked for."""
        if self._accelerator.scaler is not None:
            self._accelerator.scaler.unscale_(self.optimizer)
        limit = self._config.optimizer.clip_norm
        if limit is not None:
            self._norm = nn.utils.clip_grad_norm_(self._model.parameters(), limit)


def weighted_sums(
    objective: Objective, module: nn.Module, likelihood: Likelihood, images: Tensor, noise: Tensor, is_image: Tensor
) -> Tensor:
    """Sums over a batch of `Terms.columns`, (3 or 4,); fillers weigh nothing."""
    terms = objective(module(images, noise), images, likelihood)
    return terms.columns().where(is_image, 0).sum(1)


def may_be_recorded(config: Config, accelerator: Accelerator) -> bool:
    """Whether steps are to be recorded as a CUDA graph. In deterministic mode and with fp16 the host has a say in them."""
    plain = not config.trainer.deterministic and accelerator.scaler is None
    return config.trainer.cuda_graph and accelerator.device.type == "cuda" and plain


def build_gradients(
    config: Config, accelerator: Accelerator, model: VAE, partition: Partition, laps: Laps, is_recorded: bool
) -> Gradients:
    """What adds up the gradients of rounds and ranks, as the mode wants it."""
    if is_recorded:
        return FlatGradients(accelerator, model, laps)
    if config.trainer.deterministic:
        shards = -(-partition.batch_size // partition.rows)
        return OrderedGradients(accelerator, model, laps, shards, partition.rounds)
    return SummedGradients(accelerator, model, laps, timeout=60 * config.trainer.timeout_minutes)
