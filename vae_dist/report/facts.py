"""What a run's folder says of the run, read and checked once."""

import io
import math
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

from PIL import Image, UnidentifiedImageError

from vae_dist.config import Config, InputError
from vae_dist.pace import PARTS
from vae_dist.run import RunFolder
from vae_dist.tracking import Row, read_rows

_NAME = re.compile(r"(\w+)_(\d{1,9})\.png")
# A long run has more than anybody looks at, and a page must stay one that can be sent.
_MOST_PICTURES, _MOST_BYTES = 40, 6_000_000  # of one kind
_MOST_POINTS = 2000  # of a curve
_NUMBERS = ("images_seen", "n", "loss", "bce", "kld", "objective", "lr", "grad_norm", "noise_scale_images", "active_units")
_TIMES = ("images_per_second", "train_seconds", "test_seconds", "processes", *(f"{part}_share" for part in PARTS))


class Picture(NamedTuple):
    """A grid of images that the run drew."""

    epoch: int
    png: bytes
    width: int  # pixels
    height: int


@dataclass(frozen=True)
class Facts:
    """One run, as far as its files tell."""

    name: str  # by which the page calls it
    path: Path
    config: Config
    status: dict[str, Any]
    rows: list[Row]
    pictures: dict[str, list[Picture]]  # by kind, in the order of epochs
    evaluation: dict[str, Any]
    starts: list[dict[str, Any]]

    @property
    def state(self) -> str:
        return str(self.status.get("state", "unknown"))

    @property
    def tests(self) -> list[Row]:
        """A row an epoch, of the test images."""
        return [row for row in self.rows if row["split"] == "test"]

    @property
    def epochs(self) -> list[Row]:
        """A row an epoch, of all training images."""
        return [row for row in self.rows if row["split"] == "train" and "train_seconds" in row]

    @property
    def curve(self) -> list[Row]:
        """The points of the training curve."""
        return [row for row in self.rows if row["split"] == "train" and "train_seconds" not in row]

    @property
    def epoch_images(self) -> int:
        """How many images an epoch has; 0 where nothing says so yet."""
        if self.epochs:
            return int(self.epochs[-1]["images_seen"] // self.epochs[-1]["epoch"])
        return int(self.starts[-1]["data"]["train"]["n"]) if self.starts else 0

    def test_of_epoch(self, epoch: int) -> Row | None:
        return next((row for row in self.tests if row["epoch"] == epoch), None)

    def job_of(self, row: Row) -> int:
        """Which start of the run a row is of; 0, the first, where nothing tells of starts."""
        return max((number for number, start in enumerate(self.starts) if start["step"] < row["step"]), default=0)


def read(path: Path, name: str) -> Facts:
    """The facts of a run's folder. Raises InputError where it is none, or a file in it is not what a run writes."""
    run = RunFolder(path)
    config = run.config()
    return Facts(
        name=name,
        path=path,
        config=config,
        status=run.status(),
        rows=_with_minutes([_checked(row, run.metrics, config.model.latent_dim) for row in read_rows(run.metrics)]),
        pictures=_pictures(run.images),
        evaluation=_evaluation(run),
        starts=run.read_starts(),
    )


def thinned(values: list[Any], most: int = _MOST_POINTS) -> list[Any]:
    """At most so many of some values, evenly spread, the first and the last among them."""
    if len(values) <= most:
        return values
    step = (len(values) - 1) / (most - 1)
    return [values[round(number * step)] for number in range(most)]


def _checked(row: Row, metrics: Path, latent_dim: int) -> Row:
    """A row whose figures are numbers. Raises InputError, naming the first that is none."""
    wrong = [name for name in (*_NUMBERS, *_TIMES) if row.get(name) is not None and not _is_number(row[name])]
    wrong += [name for name in ("images_seen", "n") if not _is_number(row.get(name))]
    wrong += [] if row["epoch"] > 0 else ["epoch"]
    by_dimension = row.get("kld_per_dim")
    if by_dimension is not None:
        is_list = isinstance(by_dimension, list) and len(by_dimension) == latent_dim
        wrong += [] if is_list and all(map(_is_number, by_dimension)) else ["kld_per_dim"]
    if wrong:
        raise InputError(f"{metrics}: {wrong[0]} of step {row['step']} is not what a run writes; mend or remove that line")
    return row


def _is_number(value: object) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value)


def _with_minutes(rows: list[Row]) -> list[Row]:
    """With `minutes` in each row: how long the run had trained and evaluated, without starts, pictures and checkpoints."""
    seconds, seen, timed = 0.0, 0, []
    for row in rows:
        if row["split"] == "train" and row.get("images_per_second"):
            seconds += max(0, row["images_seen"] - seen) / row["images_per_second"]
            seen = row["images_seen"]
        seconds += row.get("test_seconds") or 0.0
        timed.append(row | {"minutes": seconds / 60})
    return timed


def _pictures(folder: Path) -> dict[str, list[Picture]]:
    """Those of each kind, fewer where there are very many. Raises InputError where a file is no picture."""
    files: dict[str, dict[int, Path]] = {}
    for path in sorted(folder.glob("*.png")):
        if name := _NAME.fullmatch(path.name):
            files.setdefault(name[1], {})[int(name[2])] = path
    pictures = {}
    for kind, by_epoch in files.items():
        largest = max(path.stat().st_size for path in by_epoch.values())
        shown = thinned(sorted(by_epoch), max(2, min(_MOST_PICTURES, _MOST_BYTES // max(1, largest))))
        pictures[kind] = [_picture(by_epoch[epoch], epoch) for epoch in shown]
    return pictures


def _picture(file: Path, epoch: int) -> Picture:
    png = file.read_bytes()
    try:
        with Image.open(io.BytesIO(png), formats=["PNG"]) as image:
            image.verify()
            return Picture(epoch, png, *image.size)
    except (UnidentifiedImageError, OSError, SyntaxError, ValueError, Image.DecompressionBombError) as error:
        raise InputError(f"{file}: not a PNG picture ({error}); remove it") from None


def _evaluation(run: RunFolder) -> dict[str, Any]:
    """Empty where the run was not evaluated."""
    found = run.read_evaluation()
    for name in ("nll", "nll_stderr", "active_units"):
        if found.get(name) is not None and not _is_number(found[name]):
            raise InputError(f"{run.evaluation}: {name} is no number; remove it and evaluate again")
    return found
