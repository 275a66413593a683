"""Train a variational autoencoder, on one process or many.

python -m vae_dist.train --config configs/glyphs.yaml
accelerate launch --config_file launch/multi_gpu.yaml -m vae_dist.train --config configs/mnist.yaml
"""

import contextlib
import os
import shutil
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
from vae_dist.tracking import RunTracker, Tracker, wandb_mode
from vae_dist.trainer import Diverged, Trainer


def main(args: list[str] | None = None) -> int:
    config = parse(sys.argv[1:] if args is None else args)
    accelerator = start(config.trainer, config.data.batch_size)
    mode = from_first_rank(accelerator, lambda: wandb_mode(config))
    train, test = load_data(config.data, accelerator)
    run = RunFolder(config.output)
    try:
        on_first_rank(accelerator, lambda: run.claim(config))
        model = build_model(config.model, train.pixels.shape[1:], config.seed)
        trainer = Trainer(config, accelerator, model, train.pixels, test.pixels, run)
        resume(trainer, accelerator)
        if trainer.is_done() and run.state() == "finished":
            accelerator.print(f"{run.path} is finished. For more, raise --trainer.epochs, or name another --output")
            return 0
        on_first_rank(accelerator, lambda: run.save_config(config))
        tracker = on_first_rank(accelerator, lambda: RunTracker(accelerator, run, config, mode, trainer.progress.step))
        trainer.tracker = tracker or Tracker()
        return run_to_end(trainer, accelerator)
    finally:
        run.release()


def load_data(config: DataConfig, accelerator: Accelerator) -> tuple[Images, Images]:
    """The training and test images, on the device of every rank. One process of each machine downloads what is missing."""
    together(accelerator, lambda: sources.fetch_missing(config) if accelerator.is_local_main_process else None)
    train = together(accelerator, lambda: sources.load(config, train=True))
    test = together(accelerator, lambda: sources.load(config, train=False))
    if train.pixels.shape[1:] != test.pixels.shape[1:]:
        shapes = " and ".join("x".join(map(str, images.pixels.shape[1:])) for images in (train, test))
        raise InputError(f"--data.root {config.root}: training and test images differ in shape: {shapes}")
    return train.to(accelerator.device), test.to(accelerator.device)


def resume(trainer: Trainer, accelerator: Accelerator) -> None:
    """Goes on from the checkpoint that `--resume` means, if there is one."""
    source = from_first_rank(accelerator, lambda: find_checkpoint(trainer.config, trainer.run))
    if source is not None:
        together(accelerator, lambda: trainer.resume(source))
        accelerator.print(f"going on from {source}, after {trainer.progress.step} of {trainer.total_steps} steps")


def find_checkpoint(config: Config, run: RunFolder) -> Path | None:
    """The run's newest whole checkpoint, else the one `--resume` names, else None. Rank zero only: it says what is damaged."""
    newest, problems = checkpoint.newest_whole(run.checkpoints)
    for problem in problems:
        print(f"passing over a damaged checkpoint: {problem}", flush=True)
    if newest is not None or config.resume in ("auto", "never"):
        return newest
    source = Path(config.resume)
    try:
        saved = checkpoint.read(source)
    except checkpoint.Damaged as error:
        raise InputError(f"--resume {source}: not a whole checkpoint: {error}") from None
    if changes := differences(from_mapping(saved.config["config"], source), config):
        raise InputError(f"--resume {source}: of a run of another config ({'; '.join(changes)}); give the same options")
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
    python = "python" if shutil.which("python") == sys.executable else os.path.relpath(sys.executable)
    upload = f", offline; upload it with: {python} -m wandb sync {wandb}" if wandb.endswith("*") else ""
    lines = [
        f"finished: {trainer.epoch} epochs, {trainer.progress.step} steps; everything lies in {path}",
        f"  pictures     {path}/images",
        f"  figures      {path}/metrics.jsonl",
        f"  weights      {path}/model.safetensors, checkpoints in {path}/checkpoints",
        f"  W&B          {wandb or 'no run'}{upload}",
        f"  evaluate     {python} -m vae_dist.evaluate {path}",
        f"  generate     {python} -m vae_dist.generate {path}",
    ]
    return "\n".join(lines)


if __name__ == "__main__":
    run_entry_point(main)
