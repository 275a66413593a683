"""A training from its config to its last file: what `python -m vae_dist.train` runs, and what programs of one's own call."""

import contextlib
import shlex
import statistics
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import NamedTuple

from accelerate import Accelerator

from vae_dist import checkpoint
from vae_dist.callbacks import Callback
from vae_dist.config import Config, InputError, ModelConfig
from vae_dist.data.images import Images, Resident
from vae_dist.data.own import OwnImages, is_black_and_white, own_images
from vae_dist.distributed import (
    EXIT_FAILED,
    EXIT_INTERRUPTED,
    TrainingFailed,
    from_first_rank,
    in_words,
    on_first_rank,
    require_same,
    say,
    together,
)
from vae_dist.loading import load_images, on_device
from vae_dist.model import VAE, build_model, from_program, seeded
from vae_dist.options import flat, program, python, require_same_run
from vae_dist.own_modules import require_sound
from vae_dist.provenance import record_start
from vae_dist.run import RunFolder, State, described_config
from vae_dist.starting import start, surroundings_kept
from vae_dist.tracking import Row, RunTracker, Tracker, read_rows
from vae_dist.trainer import Trainer
from vae_dist.wandb_server import wandb_mode


class Result(NamedTuple):
    """What a training left, besides its folder."""

    run: Path
    model: VAE  # the final weights, or those so far; in eval mode, on the training's device
    test: Row  # the newest row of metrics.jsonl about the test images; empty before the first epoch's end
    status: int  # 0: finished; 75: told to stop, after writing a checkpoint: call again to go on


def fit(
    config: Config,
    train: OwnImages | None = None,
    test: OwnImages | None = None,
    model: Callable[[], VAE] | None = None,
    callbacks: Sequence[Callback] = (),
) -> Result:
    """Trains as `python -m vae_dist.train` does, on images and modules of one's own if there are any.

    Called in one process, or in each of those that `accelerate launch` or torchrun started, which then share the work: the
    batch is global, and the figures are the same at any number of them. A run that lies in `config.output` goes on; a finished
    one returns at once. `train` and `test` are what `vae_dist.data.own.own_images` takes; without them, the set that
    `config.data` names. Where all pixels of tensors or items are black or white, `data.binarize` is static, which leaves them
    so. `model` is a function that builds the model; torch's generator is seeded when it is called.
    Raises InputError, a ValueError, where config, images, model or folder cannot be used; TrainingFailed, a RuntimeError, where
    the loss is no number any more; the same one on all processes.
    """
    with surroundings_kept():
        accelerator = start(config.trainer, config.data.batch_size)
        own = together(accelerator, lambda: _own_sides(train, test))
        built = together(accelerator, lambda: _built(config, model))
        together(accelerator, lambda: _require_callbacks(callbacks))
        return train_to_end(_described(config, own, built), accelerator, own, built, callbacks)


def train_to_end(
    config: Config,
    accelerator: Accelerator,
    own: tuple[Images, Images] | None = None,
    built: VAE | None = None,
    callbacks: Sequence[Callback] = (),
) -> Result:
    """`fit` for a process that ends with it, on `own` training and test images and a `built` model, if there are any."""
    require_same(accelerator, lambda: {f"--{name}": str(value) for name, value in flat(config).items() if name != "data.root"})
    mode = from_first_rank(accelerator, lambda: wandb_mode(config))
    run = RunFolder(config.output)
    on_first_rank(accelerator, lambda: run.require_fit(config))  # before pictures are decoded, which may take long
    sides = _sides(config, accelerator, own)
    baseline = from_first_rank(accelerator, lambda: baseline_speed(config))
    try:
        on_first_rank(accelerator, lambda: run.claim(config))
        source = from_first_rank(accelerator, lambda: find_checkpoint(config, run))
        if built is None:
            built = build_model(config.model, sides[0].shape, config.seed, images=sides[0] if source is None else None)
        else:
            together(accelerator, lambda: require_sound(built, sides[0].shape))
        trainer = Trainer(config, accelerator, built, *sides, run, callbacks)
        if source is not None:
            together(accelerator, lambda: trainer.resume(source))
        status = 0 if _is_finished(trainer, run) else _train(trainer, source, mode, baseline)
        rows = from_first_rank(accelerator, lambda: [row for row in read_rows(run.metrics) if row["split"] == "test"])
        plain = accelerator.unwrap_model(trainer.result, keep_fp32_wrapper=False)  # without autocast
        return Result(run.path, plain.eval(), rows[-1] if rows else {}, status)
    finally:
        run.release()


def _own_sides(train: OwnImages | None, test: OwnImages | None) -> tuple[Images, Images] | None:
    if train is None and test is None:
        return None
    if train is None or test is None:
        raise InputError("vae_dist.fit: give both train and test images, or neither and a data set in config.data")
    return own_images(train, "train"), own_images(test, "test")


def _built(config: Config, build: Callable[[], VAE] | None) -> VAE | None:
    if build is None:
        return None
    if config.model not in (ModelConfig(), ModelConfig(kind="own", likelihood="own", latent_dim=config.model.latent_dim)):
        raise InputError("vae_dist.fit: with a model of your own leave config.model out: it describes another one")
    return seeded(config.seed, lambda: from_program(build))


def _require_callbacks(callbacks: Sequence[Callback]) -> None:
    if not isinstance(callbacks, Sequence) or not all(isinstance(each, Callback) for each in callbacks):
        raise InputError("vae_dist.fit: callbacks must be a list of vae_dist.Callback objects")


def _described(config: Config, own: tuple[Images, Images] | None, built: VAE | None) -> Config:
    """The config that tells which parts are a program's own, and where the run lies."""
    if built is not None:
        config = replace(config, model=ModelConfig(kind="own", likelihood="own", latent_dim=built.latent_dim))
    if own is not None:
        config = replace(config, data=replace(config.data, name="own"))
        takes_binary = config.model.likelihood in ("bernoulli", "own") and config.data.binarize == "none"
        if takes_binary and all(isinstance(side, Resident) and is_black_and_white(side) for side in own):
            config = replace(config, data=replace(config.data, binarize="static"))  # which leaves them as they are
    tracking = replace(config.tracking, group=config.tracking.group or config.data.name)
    return replace(config, output=config.output or f"runs/{config.data.name}", tracking=tracking)


def _sides(config: Config, accelerator: Accelerator, own: tuple[Images, Images] | None) -> tuple[Images, Images]:
    """Training and test images, on the device."""
    if own is None:
        train = load_images(config.data, accelerator, train=True)
        return train, load_images(config.data, accelerator, train=False, shape=train.shape)
    train = on_device(own[0], "train", config.data, accelerator, train=True)
    return train, on_device(own[1], "test", config.data, accelerator, train=False, shape=train.shape)


def _is_finished(trainer: Trainer, run: RunFolder) -> bool:
    """Whether there is nothing left to do, which is said then."""
    accelerator, step = trainer.accelerator, trainer.progress.step
    was_enough = from_first_rank(accelerator, lambda: run.was_enough(step, trainer.total_steps))
    if not was_enough and not (trainer.is_done() and from_first_rank(accelerator, run.state) == "finished"):
        return False
    say(accelerator, f"{run.path} is finished. For more, raise --trainer.epochs, or name another --output")
    return True


def _train(trainer: Trainer, source: Path | None, mode: str, baseline: float | None) -> int:
    """Begins, or goes on from a checkpoint, `source`. The exit status."""
    accelerator, config, run = trainer.accelerator, trainer.config, trainer.run
    if source is not None:
        say(accelerator, f"going on from {source}: {trainer.epoch} epochs, {trainer.progress.step} steps")
    on_first_rank(accelerator, lambda: run.save_config(config))
    record_start(trainer)
    tracker = on_first_rank(accelerator, lambda: RunTracker(accelerator, run, config, mode, trainer.progress.step))
    trainer.tracker = tracker or Tracker()
    return _run(trainer, accelerator, baseline)


def find_checkpoint(config: Config, run: RunFolder) -> Path | None:
    """The run's newest whole checkpoint, else the one `--resume` names, else None. Rank zero only: it says what is damaged."""
    source = None
    if config.resume not in ("auto", "never"):
        source = Path(config.resume)
        try:
            saved = checkpoint.read(source)
        except checkpoint.Damaged as error:
            raise InputError(f"--resume {source}: not a whole checkpoint, such as {run.checkpoints}/step_…: {error}") from None
        require_same_run(described_config(saved.config, source), config, f"--resume {source}")
    newest, problems = checkpoint.newest_whole(run.checkpoints)
    for problem in problems:
        print(f"passing over a damaged checkpoint: {problem}", flush=True)
    if newest and source:
        print(f"passing over --resume {source}: {run.path} has checkpoints of its own", flush=True)
    return newest or source


def baseline_speed(config: Config) -> float | None:
    """Images per second of `--tracking.baseline`, if there is one: the median over its epochs. Rank zero only.

    Raises InputError where it is no run of one process, or of another job.
    """
    if config.tracking.baseline is None:
        return None
    flag, run = f"--tracking.baseline {config.tracking.baseline}", RunFolder(config.tracking.baseline)
    require_same_run(run.config(), config, flag)
    epochs = [row for row in read_rows(run.metrics) if "train_seconds" in row]
    if not epochs or any(row.get("processes") != 1 for row in epochs):
        raise InputError(f"{flag}: must be a run of at least one epoch, all on one process")
    return float(statistics.median(row["images_per_second"] for row in epochs))


def _run(trainer: Trainer, accelerator: Accelerator, baseline: float | None) -> int:
    """Trains, saves the final weights, and leaves word in status.json whatever happens. The exit status."""
    trainer.stopping.listen()
    status = EXIT_FAILED
    try:
        on_first_rank(accelerator, lambda: trainer.set_status("running", "training"))
        completed = trainer.fit()
        if completed:
            trainer.save_final()
        state: State = "finished" if completed else "interrupted"
        on_first_rank(accelerator, lambda: trainer.set_status(state, f"{trainer.epoch} epochs are done"))
        status = 0 if completed else EXIT_INTERRUPTED
    except BaseException as error:
        if isinstance(error, TrainingFailed):
            trainer.tracker.alert("training failed", in_words(error))
        if accelerator.is_main_process:
            with contextlib.suppress(OSError):  # a full disk may be why
                trainer.set_status("interrupted" if isinstance(error, KeyboardInterrupt) else "failed", in_words(error))
        raise
    finally:
        trainer.step.close()
        where = trainer.tracker.close(status)
    if completed:
        say(accelerator, closing_words(trainer, where, baseline))
    else:
        say(accelerator, "stopped as asked, after writing a checkpoint; start the same command again to go on")
    return status


def closing_words(trainer: Trainer, wandb: str, baseline: float | None) -> str:
    """Where everything lies, how to look at it, and how fast it was."""
    path, typed = trainer.run.path, shlex.quote(str(trainer.run.path))
    folder, offline, _ = wandb.partition("/offline-run-*")
    upload = f", offline; upload it with: {python()} -m wandb sync {shlex.quote(folder)}{offline}" if offline else ""
    lines = [
        f"finished: {trainer.epoch} epochs, {trainer.progress.step} steps; everything lies in {path}",
        f"  pictures     {path}/images",
        f"  figures      {path}/metrics.jsonl",
        f"  weights      {path}/model.safetensors, checkpoints in {path}/checkpoints",
        f"  W&B          {wandb or 'no run'}{upload}",
    ]
    if "own" not in (trainer.config.data.name, trainer.config.model.kind):  # else no command has the images, or the modules
        lines += [f"  {name:13}{program(f'vae_dist.{name}')} {typed}" for name in ("evaluate", "generate", "explore")]
    lines.append(f"  report       {program('vae_dist.report')} {typed}")
    processes = trainer.accelerator.num_processes
    if baseline is not None and trainer.epoch_speeds and processes > 1:
        speed = statistics.median(trainer.epoch_speeds)
        times = speed / baseline
        against = f"{times:.2f} times the one process of {trainer.config.tracking.baseline}, efficiency {times / processes:.0%}"
        lines.append(f"  speed        {speed:,.0f} images/s on {processes} processes, {against}")
    return "\n".join(lines)
