"""Whether a recipe still gives what it promises: train it, evaluate it, and hold the result to its band.

python -m vae_dist.verify configs/glyphs.yaml --data.root DIR
"""

import json
import signal
import subprocess
import sys
from collections.abc import Mapping, Sequence
from dataclasses import replace

from vae_dist.config import Config, InputError
from vae_dist.distributed import EXIT_FAILED, run_entry_point
from vae_dist.options import differences, parse, program
from vae_dist.run import RunFolder

_USAGE = """ CONFIG [options of vae_dist.train that leave the result alone, such as
--output DIR, --data.root DIR, --seed N, --tracking.wandb disabled]

Trains the recipe CONFIG, evaluates it on the test images, and says whether the result lies in the band of its `expect` section.
Exit status 0 inside, 1 outside. A run that was interrupted goes on."""


def main(args: Sequence[str] | None = None) -> int:
    recipe, *options = (sys.argv[1:] if args is None else args) or [""]
    if recipe in ("-h", "--help"):
        print(f"usage: {program('vae_dist.verify')}{_USAGE}")
        return 0
    if not recipe or recipe.startswith("-"):
        raise InputError(f"vae_dist.verify {recipe}: name the recipe first, such as glyphs")
    config = parse(["--config", recipe, *options])
    check_options(parse(["--config", recipe]), config, recipe)
    _run("vae_dist.train", "--config", recipe, *options)
    trained = RunFolder(config.output).config().trainer.epochs
    if trained != config.trainer.epochs:
        raise InputError(f"--output {config.output}: a run of {trained} epochs; the recipe's are {config.trainer.epochs}")
    samples = ["--iw_samples", str(config.expect.iw_samples)] if config.expect.figure == "nll" else []
    _run("vae_dist.evaluate", config.output, *samples, "--data.root", config.data.root)
    return verdict(config, recipe, json.loads(RunFolder(config.output).evaluation.read_text()))


def check_options(promised: Config, config: Config, recipe: str) -> None:
    """Raises InputError where there is no band, or the options make another job of the recipe, or move the band."""
    if promised.expect.low is None or promised.expect.high is None:
        raise InputError(f"{recipe}: has no band; give it a section expect, with low and high")
    changes = differences(replace(promised, seed=config.seed), config)
    if config.trainer.epochs != promised.trainer.epochs:
        changes.append(f"trainer.epochs: {promised.trainer.epochs} there, {config.trainer.epochs} here")
    if config.expect != promised.expect:
        changes.append("expect")
    if changes:
        raise InputError(f"{recipe}: the band is of the recipe as it stands ({'; '.join(changes)}). Leave these options out")


def verdict(config: Config, recipe: str, evaluation: Mapping[str, float]) -> int:
    """Says where the figure lies. The exit status."""
    found, low, high = evaluation[config.expect.figure], config.expect.low, config.expect.high
    is_inside = low is not None and high is not None and low <= found <= high
    where = "inside" if is_inside else "OUTSIDE"
    print(f"{recipe}: test {config.expect.figure} {found:.4f} nats, {where} {low:g} to {high:g}", flush=True)
    return 0 if is_inside else EXIT_FAILED


def _run(module: str, *args: str) -> None:
    """Runs an entry point as a user would, and passes on what this program is told. A status other than 0 is this one's too."""
    signals = (signal.SIGTERM, signal.SIGUSR1)
    with subprocess.Popen([sys.executable, "-m", module, *args]) as job:
        before = [signal.signal(each, lambda number, _: job.send_signal(number)) for each in signals]
        before.append(signal.signal(signal.SIGINT, lambda *_: None))  # the terminal tells the job by itself
        status = job.wait()
    for each, handler in zip((*signals, signal.SIGINT), before, strict=True):
        signal.signal(each, handler)
    if status != 0:
        sys.exit(status if status > 0 else EXIT_FAILED)


if __name__ == "__main__":
    run_entry_point(main)
