"""Which learning rate is best at which batch size: the classic network on MNIST, Adam, the same number of epochs for all.

python -m benchmarks.batch_size --data DIR        (make batch-size)
Prints a table of test losses, in nats per image, as Markdown; the best of each row is marked.
"""

import argparse
import sys
import tempfile
from pathlib import Path

from tqdm import tqdm

from vae_dist.config import Config, DataConfig, InputError, OptimizerConfig, TrackingConfig, TrainerConfig
from vae_dist.distributed import TrainingFailed, run_entry_point
from vae_dist.evaluate import evaluate
from vae_dist.loading import load_images
from vae_dist.model import build_model
from vae_dist.run import RunFolder
from vae_dist.starting import start
from vae_dist.trainer import Trainer

BATCHES = (64, 256, 1024, 4096)
RATES = (1e-3, 2e-3, 4e-3, 8e-3, 1.6e-2, 3.2e-2)


def test_loss(data: str, batch: int, rate: float, epochs: int) -> float:
    """After so many epochs, with a learning rate that falls linearly to 0; infinite where it is no number any more."""
    config = Config(
        data=DataConfig(root=data, batch_size=batch),
        optimizer=OptimizerConfig(lr=rate, schedule="linear"),
        trainer=TrainerConfig(epochs=epochs),
        tracking=TrackingConfig(wandb="disabled", log_every=1000),
    )
    accelerator = start(config.trainer, batch)
    train, test = (load_images(config.data, accelerator, train=is_train) for is_train in (True, False))
    model = build_model(config.model, train.shape, config.seed)
    with tempfile.TemporaryDirectory() as folder:
        trainer = Trainer(config, accelerator, model, train, test, RunFolder(folder))
        try:
            trainer.fit()
        except TrainingFailed:
            return float("inf")
        finally:
            trainer.step.close()
    return evaluate(model, test, config.seed, accelerator).sums.figures()["loss"]


def table(found: dict[tuple[int, float], float]) -> str:
    """A row for each batch size."""
    batches, rates = (sorted(set(keys)) for keys in zip(*found, strict=True))
    rows = []
    for batch in batches:
        losses = [found[batch, rate] for rate in rates]
        cells = (f"**{loss:.2f}**" if loss == min(losses) else f"{loss:.2f}" for loss in losses)
        rows.append(f"| {batch:,} | {' | '.join(cells)} |")
    return "\n".join([f"| batch | {' | '.join(f'{rate:g}' for rate in rates)} |", "|---" * (len(rates) + 1) + "|", *rows])


def main(options: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.batch_size", description=__doc__)
    parser.add_argument("--data", required=True, help="folder with MNIST/raw in it")
    parser.add_argument("--epochs", type=int, default=3, help="of each run")
    args = parser.parse_args(options)
    if not Path(args.data).is_dir():
        raise InputError(f"--data {args.data}: no such folder; name the one that has MNIST/raw in it")
    cases = [(batch, rate) for batch in BATCHES for rate in RATES]
    bar = tqdm(cases, unit="run", disable=None, file=sys.stderr)
    print(table({case: test_loss(args.data, *case, args.epochs) for case in bar}))
    return 0


if __name__ == "__main__":
    run_entry_point(main)
