"""Training: fit -> epoch -> step. What a run computes follows from its config alone, at any number of processes."""

import math
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from torch import Tensor
from tqdm import tqdm

from vae_dist import checkpoint, pictures
from vae_dist.checkpoint import Checkpoint
from vae_dist.config import Config, InputError, deterministic_rows
from vae_dist.data import as_images, gather
from vae_dist.data.order import Partition, epoch_order, even_rows
from vae_dist.distributed import TrainingFailed, on_first_rank, sum_over_ranks
from vae_dist.evaluate import evaluate
from vae_dist.gradients import OrderedGradients, SummedGradients, wrap
from vae_dist.guards import REMEDY, DriftGuard, divergence
from vae_dist.likelihoods import remark
from vae_dist.model import VAE
from vae_dist.noise import Stream, derive_key, normal, signed
from vae_dist.objective import Objective, Sums, minimised
from vae_dist.optimizer import build_optimizer, learning_rate
from vae_dist.run import RunFolder, State
from vae_dist.state import Progress, pack, unpack
from vae_dist.stopping import Stopping
from vae_dist.tracking import Row, Tracker

# Noise is drawn for many steps at once, about so many numbers: per step it would cost three times as much.
_NOISE_BLOCK = 1 << 18


def _is_due(step: int, every: int | None) -> bool:
    return every is not None and step % every == 0


class Stopwatch:
    """Seconds since it was made."""

    def __init__(self) -> None:
        self._start = time.perf_counter()

    def seconds(self) -> float:
        return round(time.perf_counter() - self._start, 3)

    def speed(self, images: float) -> float:
        """Images per second."""
        return round(images / max(time.perf_counter() - self._start, 1e-9), 1)


class Trainer:
    """Trains a model on images that lie on its device. Every method is called by all ranks unless it says otherwise."""

    def __init__(
        self, config: Config, accelerator: Accelerator, model: VAE, train: Tensor, test: Tensor, run: RunFolder
    ) -> None:
        """`train` and `test` are uint8 (n, *image_shape) on the accelerator's device; `model` is on any."""
        self.config = config
        self.accelerator = accelerator
        self.run = run
        self.train_pixels, self.test_pixels = train, test
        ranks, deterministic = accelerator.num_processes, config.trainer.deterministic
        batch = min(config.data.batch_size, len(train))
        rows = deterministic_rows(batch) if deterministic else even_rows(batch, ranks, config.trainer.micro_batch_size)
        self.partition = Partition(len(train), batch, ranks, rows)
        self.model = model.to(accelerator.device)
        self.wrapped = wrap(accelerator, self.model)
        self.gradients = SummedGradients(accelerator, self.wrapped)
        if deterministic:
            self.gradients = OrderedGradients(accelerator, self.wrapped, -(-batch // rows), self.partition.rounds)
        self.optimizer = build_optimizer(config.optimizer, self.model)
        self.objective = Objective(config.objective, accelerator.device)
        # Of the pixels drawn anew in an epoch; on the device, like all that a step reads.
        is_dynamic = config.data.binarize == "dynamic"
        self._binary_key = torch.zeros((), dtype=torch.int64, device=accelerator.device) if is_dynamic else None
        self.tracker = Tracker()
        self.progress = Progress(images=len(train))
        self.stopping = Stopping(accelerator, config.trainer.max_minutes, step=0)
        # Sums of this rank in each step since the last reduce, on the device: of `Terms.columns`.
        steps = min(self.partition.steps, config.tracking.log_every)
        self._sums = torch.zeros(steps, self.objective.columns, dtype=torch.float64, device=accelerator.device)
        self._reduced_step = 0  # where the ranks last added up their sums
        self.drift_guard = DriftGuard(accelerator)
        self._gradient_norm = torch.zeros(())
        self._stopwatch, self._images_since_row = Stopwatch(), 0.0  # of this process's life: a resumed window is longer

    @property
    def total_steps(self) -> int:
        return self.partition.steps * self.config.trainer.epochs

    @property
    def epoch(self) -> int:
        """Epochs that are complete."""
        return self.progress.step // self.partition.steps

    def fit(self) -> bool:
        """Trains to the last epoch. False if a signal ended it before; a checkpoint has been written then."""
        self.drift_guard.compare(self.progress.step, self._packed)
        while not self.is_done():
            if not self._train_epoch(self.epoch + 1):
                return False
        return True

    def is_done(self) -> bool:
        return self.epoch >= self.config.trainer.epochs

    def _train_epoch(self, epoch: int) -> bool:
        """The rest of an epoch: steps, evaluation, pictures, a checkpoint. False if the run is to stop."""
        first = self.progress.step % self.partition.steps
        whole = Stopwatch()
        self._stopwatch, self._images_since_row = Stopwatch(), 0.0
        bar = tqdm(
            desc=f"epoch {epoch}/{self.config.trainer.epochs}",
            total=self.partition.steps,
            initial=first,
            unit="step",
            leave=False,
            disable=None if self.accelerator.is_main_process else True,
        )
        with bar:
            for number, (indices, noise) in enumerate(self._batches(epoch, first), start=first + 1):
                is_last = number == self.partition.steps
                self._train_step(indices, noise)
                bar.update()
                if not is_last and self._log_and_save(epoch, bar):
                    return False
        self._reduce_sums()
        self.drift_guard.compare(self.progress.step, self._packed)
        stop = self.stopping.is_agreed(self.progress.step, at_once=True)
        images = self.progress.images - first * self.partition.batch_size
        self._end_epoch(epoch, {"images_per_second": whole.speed(images), "train_seconds": whole.seconds()})
        return self.is_done() or not stop

    def _batches(self, epoch: int, first: int) -> Iterator[tuple[Tensor, Tensor]]:
        """For each step of an epoch from `first` on: this rank's images, (rounds, rows), and their noise, (rounds, rows, …)."""
        key = derive_key(self.config.seed, Stream.TRAINING, epoch)
        order = epoch_order(self.config.seed, epoch, len(self.train_pixels), self.accelerator.device)
        steps = self.partition.of_rank(order, self.accelerator.process_index)[first:]
        if self._binary_key is not None:
            self._binary_key.fill_(signed(derive_key(self.config.seed, Stream.BINARY_EPOCH, epoch)))
        shape = self.objective.noise_shape(self.model.latent_dim)
        numbers_per_step = self.partition.rounds * self.partition.rows * math.prod(shape)
        for block in torch.split(steps, max(1, _NOISE_BLOCK // numbers_per_step)):
            yield from zip(block, normal(key, block, math.prod(shape)).view(*block.shape, *shape), strict=True)

    def _train_step(self, indices: Tensor, noise: Tensor) -> None:
        """One optimizer step on images (rounds, rows). It waits for nothing: figures stay on the device."""
        config, optimizer = self.config, self.optimizer
        rate = learning_rate(config.optimizer, self.progress.step, self.partition.steps, config.trainer.epochs)
        for group in optimizer.param_groups:
            group["lr"] = rate
        self.objective.begin_step(self.progress.step)
        for i in range(self.partition.rounds):
            with self.gradients.round(is_last=i == self.partition.rounds - 1):
                self._forward_backward(indices[i], noise[i])
        self._scale_and_clip()
        if self.accelerator.scaler is None:
            optimizer.step()
        else:
            self.accelerator.scaler.step(optimizer)
            self.accelerator.scaler.update()
        optimizer.zero_grad(set_to_none=True)
        self.progress.step += 1

    def _forward_backward(self, indices: Tensor, noise: Tensor) -> None:
        """Adds the gradient of the summed objective of some images, and their sums; fillers weigh nothing."""
        images = gather(self.train_pixels, indices, self._binary_key)
        terms = self.objective(self.wrapped(images, noise), images, self.model.likelihood)
        sums = terms.columns().where(indices >= 0, 0).sum(1)
        self.accelerator.backward(minimised(sums))
        self._sums[self.progress.step - self._reduced_step] += sums.detach()

    def _scale_and_clip(self) -> None:
        """Undoes fp16's loss scale, clips, and measures the gradient where a row will tell its norm."""
        limit = self.config.optimizer.clip_norm
        if self.accelerator.scaler is not None:
            self.accelerator.scaler.unscale_(self.optimizer)
        if limit is not None:
            self._gradient_norm = torch.nn.utils.clip_grad_norm_(self.model.parameters(), limit)
        elif self._is_row_due(self.progress.step + 1):
            gradients = [p.grad for p in self.model.parameters() if p.grad is not None]
            self._gradient_norm = torch.nn.utils.get_total_norm(gradients)

    def _is_row_due(self, step: int) -> bool:
        return step % self.config.tracking.log_every == 0 or step % self.partition.steps == 0

    def _log_and_save(self, epoch: int, bar: "tqdm[Any]") -> bool:
        """Inside an epoch: a row of the training curve and a checkpoint where they are due. True if the run is to stop."""
        step = self.progress.step
        row_due = self._is_row_due(step)
        save_due = _is_due(step, self.config.checkpoint.every_steps)
        compare_due = _is_due(step, self.config.trainer.check_ranks_every)
        stop = self.stopping.is_agreed(step)
        if row_due or save_due or compare_due or stop:
            self._reduce_sums()
        if compare_due:
            self.drift_guard.compare(step, self._packed)
        if row_due:
            speed = self._stopwatch.speed(self._images_since_row)
            row = self._row("train", epoch, self.progress.window_sums) | self._step_figures() | {"images_per_second": speed}
            self.progress.window_sums = Sums()
            self._images_since_row, self._stopwatch = 0.0, Stopwatch()
            on_first_rank(self.accelerator, lambda: self.tracker.log(row))
            bar.set_postfix_str(f"loss {row['loss']:.2f}", refresh=False)
        if save_due or stop:
            self.save()
        return stop

    def _reduce_sums(self) -> None:
        """Adds what all ranks summed up since the last time. Waits for the device."""
        sums = sum_over_ranks(self.accelerator, self._sums.sum(0))
        if not all(map(math.isfinite, sums)):
            raise divergence(self.config, self.partition, self.accelerator, self._sums, self._reduced_step)
        self._sums.zero_()
        self._reduced_step = self.progress.step
        found = Sums.of_columns(*sums)
        self.progress.epoch_sums = self.progress.epoch_sums.plus(found)
        self.progress.window_sums = self.progress.window_sums.plus(found)
        self._images_since_row += found.images

    def _require_finite(self, is_finite: bool, what: str) -> None:
        """Raises TrainingFailed on all ranks: it is asked about figures and tensors that all have alike."""
        if not is_finite:
            step, rate = self.progress.step, self.optimizer.param_groups[0]["lr"]
            epoch = -(-step // self.partition.steps)
            raise TrainingFailed(
                f"{what} is not finite any more: step {step} (epoch {epoch}), learning rate {rate:g}. {REMEDY}"
            )

    def _row(self, split: str, epoch: int, sums: Sums) -> Row:
        done, rest = divmod(self.progress.step, self.partition.steps)
        seen = done * self.progress.images + rest * self.partition.batch_size
        row = {"split": split, "epoch": epoch, "step": self.progress.step, "images_seen": seen} | sums.figures()
        return row | {"objective": sums.objective()} if split == "train" else row

    def _step_figures(self) -> Row:
        """Of the step just done."""
        norm, rate = float(self._gradient_norm), self.optimizer.param_groups[0]["lr"]
        # With fp16 a step may overflow; the scaler skips it. JSON has no infinity.
        return {"lr": rate, "grad_norm": norm if math.isfinite(norm) else None}

    def _end_epoch(self, epoch: int, times: Row) -> None:
        """The epoch's rows and pictures, and then the checkpoint that says that they are there."""
        train = self._row("train", epoch, self.progress.epoch_sums) | self._step_figures() | times
        testing = Stopwatch()
        found = evaluate(self.model, self.test_pixels, self.config.seed, self.accelerator)
        self._require_finite(math.isfinite(found.sums.bce + found.sums.kld), "the test loss")
        test = self._row("test", epoch, found.sums) | {"kld_per_dim": found.kld_per_dim, "test_seconds": testing.seconds()}
        on_first_rank(self.accelerator, lambda: self._record_epoch(epoch, train, test))
        self.progress.epoch_sums = self.progress.window_sums = Sums()
        self.save()

    def _record_epoch(self, epoch: int, train: Row, test: Row) -> None:
        """Rank zero only."""
        images = as_images(self.test_pixels[: pictures.RECONSTRUCTIONS])
        reconstructions = pictures.reconstructions(self.model, images)
        samples = pictures.samples(self.model, pictures.SAMPLES, self.config.seed)
        pictures.save_png(self.run.images / f"reconstruction_{epoch}.png", reconstructions)
        pictures.save_png(self.run.images / f"sample_{epoch}.png", samples)
        self.tracker.log(train, test)
        note = remark(self.config, test["loss"], self.model.image_shape)
        print(
            f"epoch {epoch}/{self.config.trainer.epochs}: "
            f"train {train['loss']:.4f}, test {test['loss']:.4f} nats per image{note} "
            f"(bce {test['bce']:.2f} + kld {test['kld']:.2f}, n={test['n']}), {train['images_per_second']:,.0f} images/s",
            flush=True,
        )

    def save(self) -> None:
        """Writes a checkpoint of this moment, then drops the oldest. Rank zero writes; all ranks hear of a failure."""
        self.drift_guard.compare(self.progress.step, self._packed)
        state = self._packed()
        finite = torch.stack([tensor.isfinite().all().cpu() for tensor in (state.model | state.trainer).values()])
        self._require_finite(bool(finite.all()), "the state of the model or the optimizer")
        on_first_rank(self.accelerator, lambda: self._save(state))

    def _packed(self) -> Checkpoint:
        return pack(self.config, self.model, self.optimizer, self.accelerator.scaler, self.progress)

    def _save(self, state: Checkpoint) -> None:
        folder = checkpoint.folder_of_step(self.run.checkpoints, self.progress.step)
        self.tracker.sync()  # a checkpoint says that the rows before it are on the disk
        checkpoint.write(folder, state)
        checkpoint.prune(folder, self.config.checkpoint.keep)
        self.set_status("running", "training")

    def set_status(self, state: State, reason: str) -> None:
        """Rank zero only."""
        self.run.set_status(state, reason, epoch=self.epoch, step=self.progress.step, steps=self.total_steps)

    def save_final(self) -> None:
        """Writes the weights and their description where anybody looks for them first."""
        on_first_rank(self.accelerator, lambda: self.run.save_model(self.config, self.model))

    def resume(self, folder: Path) -> None:
        """Goes on from a checkpoint. Raises InputError where it is damaged or of another model, or the data set changed."""
        try:
            saved = checkpoint.read(folder)
        except checkpoint.Damaged as error:
            raise InputError(f"{folder}: damaged: {error}") from None
        progress = unpack(saved, folder, self.model, self.optimizer, self.accelerator.scaler)
        if progress.images != len(self.train_pixels):
            raise InputError(
                f"{folder}: trained on {progress.images} images, but there are {len(self.train_pixels)} in "
                f"--data.root {self.config.data.root}"
            )
        self.progress = progress
        self._reduced_step = progress.step
        self.stopping = Stopping(self.accelerator, self.config.trainer.max_minutes, progress.step)
