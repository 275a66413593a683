"""Train a variational autoencoder, on one process or many.

python -m vae_dist.train --config configs/glyphs.yaml
accelerate launch --config_file launch/multi_gpu.yaml -m vae_dist.train --config configs/mnist.yaml
"""

import contextlib
import os
import shutil
import statistics
import sys
from pathlib import Path

from accelerate import Accelerator

from vae_dist import checkpoint
from vae_dist.config import Config, InputError
from vae_dist.distributed import (
    EXIT_FAILED,
    EXIT_INTERRUPTED,
    TrainingFailed,
    from_first_rank,
    in_words,
    on_first_rank,
    require_same,
    run_entry_point,
    say,
    together,
)
from vae_dist.loading import load_images
from vae_dist.model import build_model
from vae_dist.options import flat, parse, require_same_run
from vae_dist.run import RunFolder, State, described_config
from vae_dist.starting import start
from vae_dist.tracking import RunTracker, Tracker, read_rows
from vae_dist.trainer import Trainer
from vae_dist.wandb_server import wandb_mode


def main(args: list[str] | None = None) -> int:
    config = parse(sys.argv[1:] if args is None else args)
    accelerator = start(config.trainer, config.data.batch_size)
    require_same(accelerator, lambda: {f"--{name}": str(value) for name, value in flat(config).items() if name != "data.root"})
    mode = from_first_rank(accelerator, lambda: wandb_mode(config))
    run = RunFolder(config.output)
    on_first_rank(accelerator, lambda: run.require_fit(config))  # before pictures are decoded, which may take long
    train = load_images(config.data, accelerator, train=True)
    test = load_images(config.data, accelerator, train=False, shape=train.shape)
    baseline = from_first_rank(accelerator, lambda: baseline_speed(config))
    try:
        on_first_rank(accelerator, lambda: run.claim(config))
        source = from_first_rank(accelerator, lambda: find_checkpoint(config, run))
        model = build_model(config.model, train.shape, config.seed, images=train if source is None else None)
        trainer = Trainer(config, accelerator, model, train, test, run)
        if source is not None:
            together(accelerator, lambda: trainer.resume(source))
        if trainer.is_done() and from_first_rank(accelerator, run.state) == "finished":
            say(accelerator, f"{run.path} is finished. For more, raise --trainer.epochs, or name another --output")
            return 0
        if source is not None:
            say(accelerator, f"going on from {source}: {trainer.epoch} epochs, {trainer.progress.step} steps")
        on_first_rank(accelerator, lambda: run.save_config(config))
        tracker = on_first_rank(accelerator, lambda: RunTracker(accelerator, run, config, mode, trainer.progress.step))
        trainer.tracker = tracker or Tracker()
        return run_to_end(trainer, accelerator, baseline)
    finally:
        run.release()


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


def run_to_end(trainer: Trainer, accelerator: Accelerator, baseline: float | None) -> int:
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
    processes = trainer.accelerator.num_processes
    if baseline is not None and trainer.epoch_speeds and processes > 1:
        speed = statistics.median(trainer.epoch_speeds)
        times = speed / baseline
        against = f"{times:.2f} times the one process of {trainer.config.tracking.baseline}, efficiency {times / processes:.0%}"
        lines.append(f"  speed        {speed:,.0f} images/s on {processes} processes, {against}")
    return "\n".join(lines)


if __name__ == "__main__":
    run_entry_point(main)
