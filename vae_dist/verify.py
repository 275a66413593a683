"""Whether a recipe still gives what it promises: train it, evaluate it, and hold the result to its band.

python -m vae_dist.verify configs/glyphs.yaml --data.root DIR
"""

import json
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import replace

from vae_dist.config import Config, InputError
from vae_dist.distributed import EXIT_FAILED, run_entry_point
from vae_dist.options import parse, require_same_run
from vae_dist.run import RunFolder

_USAGE = """usage: python -m vae_dist.verify CONFIG [options of vae_dist.train that leave the result alone, such as
--output DIR, --data.root DIR, --seed N, --tracking.wandb disabled]

Trains the recipe CONFIG, evaluates it on the test images, and says whether the result lies in the band of its `expect` section.
Exit status 0 inside, 1 outside. A run that was interrupted goes on."""


def main(args: Sequence[str] | None = None) -> int:
    recipe, *options = (sys.argv[1:] if args is None else args) or [""]
    if recipe in ("-h", "--help"):
        print(_USAGE)
        return 0
    if not recipe or recipe.startswith("-"):
        raise InputError(f"vae_dist.verify {recipe}: name the recipe first, such as configs/glyphs.yaml")
    config = parse(["--config", recipe, *options])
    check_options(parse(["--config", recipe]), config, recipe)
    _run("vae_dist.train", "--config", recipe, *options)
    samples = ["--iw_samples", str(config.expect.iw_samples)] if config.expect.figure == "nll" else []
    _run("vae_dist.evaluate", config.output, *samples, "--data.root", config.data.root)
    found = json.loads(RunFolder(config.output).evaluation.read_text())[config.expect.figure]
    return verdict(config, recipe, found)


def check_options(promised: Config, config: Config, recipe: str) -> None:
    """Raises InputError where there is no band, or the options make another job of the recipe."""
    if config.expect.low is None or config.expect.high is None:
        raise InputError(f"{recipe}: has no band; give it a section expect, with low and high")
    as_promised = replace(promised, seed=config.seed)
    require_same_run(as_promised, config, recipe)
    if config.trainer.epochs != promised.trainer.epochs:
        raise InputError(f"--trainer.epochs {config.trainer.epochs}: the band is of {promised.trainer.epochs} epochs")


def verdict(config: Config, recipe: str, found: float) -> int:
    """Says where the figure lies. The exit status."""
    expect = config.expect
    assert expect.low is not None
    assert expect.high is not None
    is_inside = expect.low <= found <= expect.high
    where = "inside" if is_inside else "OUTSIDE"
    print(f"{recipe}: test {expect.figure} {found:.4f} nats, {where} {expect.low:g} to {expect.high:g}", flush=True)
    return 0 if is_inside else EXIT_FAILED


def _run(module: str, *args: str) -> None:
    """Runs an entry point as a user would. A status other than 0 ends this program with it: what is wrong has been said."""
    done = subprocess.run([sys.executable, "-m", module, *args], check=False)
    if done.returncode != 0:
        sys.exit(done.returncode)


if __name__ == "__main__":
    run_entry_point(main)
