"""Training: fit -> epoch -> step. What a run computes follows from its config alone, at any number of processes."""

import dataclasses
import math
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from torch import Tensor
from tqdm import tqdm

from vae_dist import checkpoint, pictures
from vae_dist.callbacks import Callback
from vae_dist.charts import closeup
from vae_dist.checkpoint import Checkpoint
from vae_dist.config import Config, InputError, deterministic_rows
from vae_dist.data import as_images
from vae_dist.data.images import Images, first_images
from vae_dist.data.order import Partition, even_rows
from vae_dist.distributed import TrainingFailed, on_first_rank, sum_over_ranks
from vae_dist.evaluate import Evaluation, evaluate
from vae_dist.guards import REMEDY, DriftGuard, divergence
from vae_dist.likelihoods import remark
from vae_dist.model import VAE
from vae_dist.noise import Stream, derive_key, normal
from vae_dist.noise_scale import NoiseScale
from vae_dist.objective import Sums
from vae_dist.optimizer import learning_rate
from vae_dist.pace import Pace
from vae_dist.progress import no_bar
from vae_dist.run import RunFolder, State
from vae_dist.state import Progress, pack, unpack
from vae_dist.step import Step
from vae_dist.stopping import Stopping
from vae_dist.tracking import Row, Tracker

# Noise is drawn for many steps at once, about so many numbers: per step it would cost three times as much.
_NOISE_BLOCK = 1 << 18


def _is_due(step: int, every: int | None) -> bool:
    return every is not None and step % every == 0


class Trainer:
    """Trains a model on images that come to its device. Every method is called by all ranks unless it says otherwise."""

    def __init__(
        self,
        config: Config,
        accelerator: Accelerator,
        model: VAE,
        train: Images,
        test: Images,
        run: RunFolder,
        callbacks: Sequence[Callback] = (),
    ) -> None:
        """`train` and `test` give out their images on the accelerator's device; `model` is on any."""
        self.config = config
        self.accelerator = accelerator
        self.run = run
        self.train, self.test = train, test
        ranks, deterministic = accelerator.num_processes, config.trainer.deterministic
        batch = min(config.data.batch_size, len(train))
        rows = deterministic_rows(batch) if deterministic else even_rows(batch, ranks, config.trainer.micro_batch_size)
        self.partition = Partition(len(train), batch, ranks, rows)
        self.model = model.to(accelerator.device)
        self.step = Step(config, accelerator, self.model, self.partition)
        # What is evaluated, drawn and left at the end.
        self.result = self.model if self.step.averages is None else self.step.averages.model
        self.tracker = Tracker()
        self._callbacks = callbacks
        self._is_enough = False  # a callback said so
        self.progress = Progress(images=len(train), data=train.digest(), test=test.digest())
        self.stopping = Stopping(accelerator, config.trainer.max_minutes, step=0)
        # Sums of this rank in each step since the last reduce, on the device: of `Terms.columns`.
        steps = min(self.partition.steps, config.tracking.log_every)
        self._sums = torch.zeros(steps, self.step.objective.columns, dtype=torch.float64, device=accelerator.device)
        self._reduced_step = 0  # where the ranks last added up their sums
        self.drift_guard = DriftGuard(accelerator)
        self._pace = Pace(self.step.laps)
        self.epoch_speeds: list[float] = []  # images per second of each epoch that this process trained
        self._noise_scale = NoiseScale()

    @property
    def total_steps(self) -> int:
        return self.partition.steps * self.config.trainer.epochs

    @property
    def epoch(self) -> int:
        """Epochs that are complete."""
        return self.progress.step // self.partition.steps

    def fit(self) -> bool:
        """Trains to the last epoch, or until a callback has enough. False if a signal ended it before; a checkpoint has been
        written then.
        """
        self.drift_guard.compare(self.progress.step, self._packed)
        while not (self.is_done() or self._is_enough):
            if not self._train_epoch(self.epoch + 1):
                return False
        return True

    def is_done(self) -> bool:
        return self.epoch >= self.config.trainer.epochs

    def _train_epoch(self, epoch: int) -> bool:
        """The rest of an epoch: steps, evaluation, pictures, a checkpoint. False if the run is to stop."""
        first = self.progress.step % self.partition.steps
        self._pace.begin_epoch()
        bar = tqdm(
            desc=f"epoch {epoch}/{self.config.trainer.epochs}",
            total=self.partition.steps,
            initial=first,
            unit="step",
            leave=False,
            disable=no_bar(self.accelerator.is_main_process),
        )
        with bar:
            for number, batch in enumerate(self._batches(epoch, first), start=first + 1):
                is_last = number == self.partition.steps
                self._train_step(*batch)
                bar.update()
                if not is_last and self._log_and_save(epoch, bar):
                    return False
                self.step.laps.mark("between steps")
        self._reduce_sums()
        self.drift_guard.compare(self.progress.step, self._packed)
        stop = self.stopping.is_agreed(self.progress.step, at_once=True)
        self._end_epoch(epoch)
        return self.is_done() or self._is_enough or not stop

    def _batches(self, epoch: int, first: int) -> Iterator[tuple[Tensor, Tensor, Tensor]]:
        """For each step of an epoch from `first` on: this rank's images, uint8 (rounds, rows, *image_shape), their numbers,
        (rounds, rows), and their noise, (rounds, rows, …).
        """
        order = self.train.order(self.config.seed, epoch, self.partition.batch_size)
        steps = self.partition.of_rank(order, self.accelerator.process_index)[first:]
        self.step.begin_epoch(epoch)
        yield from zip(self.train.stream(steps), steps, self._noise(epoch, steps), strict=True)

    def _noise(self, epoch: int, steps: Tensor) -> Iterator[Tensor]:
        """The noise of the images of each of some steps, (rounds, rows, …)."""
        key = derive_key(self.config.seed, Stream.TRAINING, epoch)
        shape = self.step.objective.noise_shape(self.model.latent_dim)
        numbers_per_step = self.partition.rounds * self.partition.rows * math.prod(shape)
        for block in torch.split(steps, max(1, _NOISE_BLOCK // numbers_per_step)):
            yield from normal(key, block, math.prod(shape)).view(*block.shape, *shape)

    def _train_step(self, pixels: Tensor, indices: Tensor, noise: Tensor) -> None:
        """One optimizer step. It waits for nothing: figures stay on the device."""
        done = self.progress.step
        is_known = self.accelerator.num_processes > 1 and self.accelerator.scaler is None  # fp16 gradients are scaled
        self.step.gradients.is_watched = is_known and self._is_row_due(done + 1)
        self._sums[done - self._reduced_step] = self.step(pixels, indices, noise, done, self._rate(done))
        self.progress.step += 1

    def _rate(self, step: int) -> float:
        return learning_rate(self.config.optimizer, step, self.partition.steps, self.config.trainer.epochs)

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
            row = self._row("train", epoch, self.progress.window_sums) | self._step_figures() | self._pace.end_window()
            self.progress.window_sums = Sums()
            on_first_rank(self.accelerator, lambda: self.tracker.log(row))
            for callback in self._callbacks:
                callback.on_row(row)
            bar.set_postfix_str(f"loss {row['loss']:.2f}", refresh=False)
        if save_due or stop:
            self.save()
        return stop

    def _reduce_sums(self) -> None:
        """Adds what all ranks summed up since the last time. Waits for the device."""
        own_images = self._sums[self.progress.step - self._reduced_step - 1, 2]  # of the last step
        noise = [own_images, own_images.square(), self.step.gradients.own_square]
        *sums, images, squared_images, squares = sum_over_ranks(
            self.accelerator, torch.cat([self._sums.sum(0), torch.stack(noise)])
        )
        if not all(map(math.isfinite, sums)):
            raise divergence(self.config, self.train, self.partition, self.accelerator, self._sums, self._reduced_step)
        self._sums.zero_()
        self._reduced_step = self.progress.step
        found = Sums.of_columns(*sums)
        self.progress.epoch_sums = self.progress.epoch_sums.plus(found)
        self.progress.window_sums = self.progress.window_sums.plus(found)
        self._pace.add(found.images)
        if self.step.gradients.is_watched:
            self._noise_scale.add(images, squared_images, squares, float(self.step.gradient_norm()) ** 2)

    def _require_finite(self, is_finite: bool, what: str) -> None:
        """Raises TrainingFailed on all ranks: it is asked about figures and tensors that all have alike."""
        if not is_finite:
            step, rate = self.progress.step, self._rate(self.progress.step - 1)
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
        norm = float(self.step.gradient_norm())
        # With fp16 a step may overflow; the scaler skips it. JSON has no infinity.
        figures = {"lr": self._rate(self.progress.step - 1), "grad_norm": norm if math.isfinite(norm) else None}
        noise_scale = self._noise_scale.images()
        return figures if noise_scale is None else figures | {"noise_scale_images": noise_scale}

    def _end_epoch(self, epoch: int) -> None:
        """The epoch's rows and pictures, and then the checkpoint that says that they are there."""
        speed = self._pace.end_epoch() | {"processes": self.accelerator.num_processes}
        self.epoch_speeds.append(speed["images_per_second"])
        train = self._row("train", epoch, self.progress.epoch_sums) | self._step_figures() | speed
        start = time.perf_counter()
        found = evaluate(self.result, self.test, self.config.seed, self.accelerator)
        self._require_finite(math.isfinite(found.sums.bce + found.sums.kld), "the test loss")
        times = {"test_seconds": round(time.perf_counter() - start, 3)}
        posterior = {"kld_per_dim": found.kld_per_dim, "active_units": found.active_units}
        test = self._row("test", epoch, found.sums) | posterior | times
        on_first_rank(self.accelerator, lambda: self._record_epoch(epoch, train, test, found))
        self.progress.epoch_sums = self.progress.window_sums = Sums()
        self.save()
        enough = [bool(callback.on_epoch(epoch, train, test, self.result)) for callback in self._callbacks]
        mine = torch.tensor([float(any(enough))], dtype=torch.float64, device=self.accelerator.device)
        self._is_enough = sum_over_ranks(self.accelerator, mine) > [0.0]

    def _record_epoch(self, epoch: int, train: Row, test: Row, found: Evaluation) -> None:
        """Rank zero only."""
        images = as_images(first_images(self.test, pictures.RECONSTRUCTIONS))
        for name, picture in pictures.of_epoch(self.result, images, self.config.seed).items():
            pictures.save_png(self.run.images / f"{name}_{epoch}.png", picture)
        self.tracker.log(train, test, closeup=lambda: closeup(self.result, self.test, found.mean_counts, found.worst))
        is_binary = self.config.data.binarize != "none"
        note = remark(self.model.likelihood, is_binary, test["loss"], self.model.image_shape)
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
        step = self.step
        return pack(self.config, self.model, step.optimizer, self.accelerator.scaler, self.progress, step.averages)

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
        on_first_rank(self.accelerator, self._save_final)

    def _save_final(self) -> None:
        self.run.save_model(self.config, self.result)
        self.tracker.keep_model()

    def resume(self, folder: Path) -> None:
        """Goes on from a checkpoint. Raises InputError where it is damaged or of another model, or the data set changed."""
        try:
            saved = checkpoint.read(folder)
        except checkpoint.Damaged as error:
            raise InputError(f"{folder}: damaged: {error}") from None
        step, data = self.step, self.config.data
        here = "what vae_dist.fit was given" if data.name == "own" else f"--data.root {data.root}"
        progress = unpack(saved, folder, self.model, step.optimizer, self.accelerator.scaler, step.averages)
        if progress.images != len(self.train):
            raise InputError(f"{folder}: trained on {progress.images} images, but there are {len(self.train)} in {here}")
        of_sets = ("trained", progress.data, self.progress.data), ("tested", progress.test, self.progress.test)
        for done, there, now in of_sets:
            if there not in ("", now):
                raise InputError(
                    f"{folder}: {done} on other images than those in {here}: their digest is {there[:16]} there and "
                    f"{now[:16]} here. Bring those back, or name another --output"
                )
        self.progress = dataclasses.replace(progress, data=self.progress.data, test=self.progress.test)
        self._reduced_step = progress.step
        self.stopping = Stopping(self.accelerator, self.config.trainer.max_minutes, progress.step)
