"""A report of a run, or of several compared: one HTML page that needs nothing but a browser.

python -m vae_dist.report runs/mnist
python -m vae_dist.report runs/mnist runs/wider --out comparison.html
"""

import os
import sys
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from tempfile import TemporaryFile
from typing import Annotated

import tyro
from accelerate import Accelerator

from vae_dist.checkpoint import write_atomically
from vae_dist.config import InputError
from vae_dist.distributed import run_entry_point
from vae_dist.loading import load_images
from vae_dist.options import command_line
from vae_dist.report.facts import Facts, read
from vae_dist.report.insight import look
from vae_dist.report.page import MARK, page
from vae_dist.report.sections import Subject
from vae_dist.run import RunFolder, evaluation_of, load_model
from vae_dist.starting import start


@dataclass(frozen=True)
class Options:
    """Write one HTML page about a run, or about several side by side: curves, pictures, latents, speed, config, provenance."""

    runs: tyro.conf.Positional[tuple[Path, ...]]
    """Folders of runs."""
    out: Path | None = None
    """The file; default: report.html in the run's folder. For several runs it must be named."""
    root: Annotated[str | None, tyro.conf.arg(name="data.root")] = None
    """Where the data set lies, if elsewhere than in training."""

    def __post_init__(self) -> None:
        if not self.runs:
            raise InputError("name the folder of a run, such as runs/glyphs")
        if len(self.runs) > 1 and self.out is None:
            raise InputError("--out: name the file of a report of several runs, such as --out comparison.html")
        resolved = [run.resolve() for run in self.runs]
        if twice := [run for number, run in enumerate(self.runs) if resolved[number] in resolved[:number]]:
            raise InputError(f"{twice[0]}: is named twice")


def main(args: list[str] | None = None) -> int:
    options = command_line(Options, "vae_dist.report", sys.argv[1:] if args is None else args)
    if "RANK" in os.environ:
        raise InputError("vae_dist.report is the work of one process: start it with plain `python -m vae_dist.report`")
    out = options.out or options.runs[0] / "report.html"
    facts = [read(path, name) for path, name in zip(options.runs, names(options.runs), strict=True)]
    require_replaceable(out)
    require_writable(out)
    accelerator = start()
    content = page([subject(run, options.root, accelerator) for run in facts])
    write_atomically(out, content)
    print(f"{out} ({len(content.encode()) / 1e6:.1f} MB): open it in a browser", flush=True)
    return 0


def names(runs: Sequence[Path]) -> list[str]:
    """What the page calls each run: its folder's name, or its whole path where names are not different."""
    short = [run.resolve().name for run in runs]
    return short if len(set(short)) == len(short) else list(map(str, runs))


def require_replaceable(out: Path) -> None:
    """Raises InputError where something lies at `out` that is no report."""
    if out.is_dir():
        raise InputError(f"--out {out}: is a folder; name a file, such as {out / 'report.html'}")
    if out.exists():
        with out.open("rb") as file:
            beginning = file.read(500)
        if MARK.encode() not in beginning:
            raise InputError(f"--out {out}: is there and no report of this program; name another file, or remove it")


def require_writable(out: Path) -> None:
    """Raises InputError where no file can be written at `out`, before the work rather than after it."""
    nearest = next(folder for folder in out.absolute().parents if folder.exists())  # others are made
    try:
        with TemporaryFile(dir=nearest):
            pass
    except OSError as error:
        raise InputError(f"--out {out}: cannot be written there ({error.strerror}); name another file") from None


def subject(run: Facts, root: str | None, accelerator: Accelerator) -> Subject:
    """A run with what its model makes of the test images, or why that cannot be had: the rest of the page does not need it."""
    shape = None
    try:
        model, _ = load_model(run.path)
        shape = model.image_shape
        run = replace(run, evaluation=evaluation_of(RunFolder(run.path), model))
        data = replace(run.config.data, root=root or run.config.data.root)
        images = load_images(data, accelerator, train=False, shape=shape)
        if run.starts and (trained := run.starts[-1]["data"]["test"]["sha256"]) != images.digest():
            raise InputError(f"the test images in --data.root {data.root} are others than the run's, of SHA-256 {trained}")
        return Subject(run, shape, look(model.to(accelerator.device), images, run.config.seed, accelerator), "")
    except InputError as error:
        print(f"{run.path}: no latent map, no worst reconstructions: {error}", flush=True)
        return Subject(run, shape, None, str(error))


if __name__ == "__main__":
    run_entry_point(main)
