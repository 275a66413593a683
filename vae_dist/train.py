"""Train a variational autoencoder, on one process or many.

python -m vae_dist.train --config configs/glyphs.yaml
accelerate launch --config_file launch/multi_gpu.yaml -m vae_dist.train --config configs/mnist.yaml
"""

import contextlib
import signal
import sys
from pathlib import Path

from accelerate import Accelerator

from vae_dist import checkpoint
from vae_dist.config import Config, DataConfig, InputError, differences, from_mapping, parse
from vae_dist.data import sources
from vae_dist.data.sources import Images
from vae_dist.distributed import (
    EXIT_DIVERGED,
    EXIT_INTERRUPTED,
    from_first_rank,
    on_first_rank,
    run_entry_point,
    start,
    together,
)
from vae_dist.model import build_model
from vae_dist.run import RunFolder, State
from vae_dist.tracking import RunTracker, Tracker
from vae_dist.trainer import Diverged, Trainer


def main(args: list[str] | None = None) -> int:
    config = parse(sys.argv[1:] if args is None else args)
    accelerator = start(config.trainer, config.data.batch_size)
    train, test = load_data(config.data, accelerator)
    run = RunFolder(config.output)
    on_first_rank(accelerator, lambda: run.claim(config))

    model = build_model(config.model, train.pixels.shape[1:], config.seed)
    trainer = Trainer(config, accelerator, model, train.pixels, test.pixels, run)
    source = from_first_rank(accelerator, lambda: find_checkpoint(config, run))
    if source is not None:
        together(accelerator, lambda: trainer.resume(source))
    if trainer.is_done() and run.state() == "finished":
        accelerator.print(f"{run.path} is finished. For more, raise --trainer.epochs, or name another --output")
        return 0
    if source is not None:
        accelerator.print(f"going on from {source}, after {trainer.progress.step} of {trainer.total_steps} steps")

    step = trainer.progress.step
    tracker = on_first_rank(accelerator, lambda: RunTracker(accelerator, run, config, step))
    trainer.tracker = tracker or Tracker()
    return run_to_end(trainer, accelerator)


def load_data(config: DataConfig, accelerator: Accelerator) -> tuple[Images, Images]:
    """The training and test images, on the device of every rank. One process of each machine downloads what is missing."""
    together(accelerator, lambda: sources.fetch_missing(config) if accelerator.is_local_main_process else None)
    train = together(accelerator, lambda: sources.load(config, train=True))
    test = together(accelerator, lambda: sources.load(config, train=False))
    if train.pixels.shape[1:] != test.pixels.shape[1:]:
        shapes = " and ".join("x".join(map(str, images.pixels.shape[1:])) for images in (train, test))
        raise InputError(f"--data.root {config.root}: training and test images differ in shape: {shapes}")
    return train.to(accelerator.device), test.to(accelerator.device)


def find_checkpoint(config: Config, run: RunFolder) -> Path | None:
    """The checkpoint to go on from, None for a fresh start. Rank zero only, since it says what is damaged."""
    if config.resume in ("auto", "never"):
        newest, problems = checkpoint.newest_whole(run.checkpoints)
        for problem in problems:
            print(f"passing over a damaged checkpoint: {problem}", flush=True)
        return newest
    source = Path(config.resume)
    try:
        saved = checkpoint.read(source)
    except checkpoint.Damaged as error:
        raise InputError(f"--resume {source}: not a whole checkpoint: {error}") from None
    if changes := differences(from_mapping(saved.config["config"], source), config):
        raise InputError(f"--resume {source}: of a run of another config ({'; '.join(changes)}); give the same options")
    newer = [path for path in checkpoint.list_checkpoints(run.checkpoints) if path.resolve() != source.resolve()]
    if newer:
        raise InputError(f"--resume {source}: --output {run.path} has checkpoints of its own; name another --output")
    return source


def run_to_end(trainer: Trainer, accelerator: Accelerator) -> int:
    """Trains, saves the final weights, and leaves word in status.json whatever happens. The exit status."""
    for signum in (signal.SIGTERM, signal.SIGUSR1, signal.SIGINT):
        signal.signal(signum, trainer.request_stop)

    def leave(state: State, reason: str) -> None:
        if accelerator.is_main_process:
            trainer.set_status(state, reason)

    leave("running", "training")
    try:
        completed = trainer.fit()
        if completed:
            trainer.save_final()
    except Diverged as error:
        leave("failed", str(error))
        accelerator.print(f"error: {error}")
        return EXIT_DIVERGED
    except BaseException as error:
        with contextlib.suppress(OSError):  # a full disk may be why
            leave("failed", f"{type(error).__name__}: {error}")
        raise
    finally:
        where = trainer.tracker.close()
    if not completed:
        leave("interrupted", "asked to stop by a signal; a checkpoint is written, start the same command again to go on")
        accelerator.print("stopped as asked, after writing a checkpoint; start the same command again to go on")
        return EXIT_INTERRUPTED
    leave("finished", f"{trainer.epoch} epochs")
    accelerator.print(closing_words(trainer, where))
    return 0


def closing_words(trainer: Trainer, wandb: str) -> str:
    """Where everything lies, and how to look at it."""
    path = trainer.run.path
    lines = [
        f"finished: {trainer.epoch} epochs, {trainer.progress.step} steps; everything lies in {path}",
        f"  pictures     {path}/images",
        f"  figures      {path}/metrics.jsonl",
        f"  weights      {path}/model.safetensors, checkpoints in {path}/checkpoints",
        f"  W&B          {wandb or 'no run'}",
        f"  evaluate     python -m vae_dist.evaluate {path}",
        f"  generate     python -m vae_dist.generate {path}",
    ]
    return "\n".join(lines)


if __name__ == "__main__":
    run_entry_point(main)
