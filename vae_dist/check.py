"""A receipt: the same small job at several numbers of processes, and how far apart the results are.

python -m vae_dist.check --world 1,2,3
"""

import os
import platform
import signal
import subprocess
import sys
import tempfile
from dataclasses import dataclass
from itertools import product
from pathlib import Path
from typing import NamedTuple

import torch
from tqdm import tqdm

from vae_dist import __version__
from vae_dist.checkpoint import read_tensors
from vae_dist.config import InputError
from vae_dist.data import glyphs
from vae_dist.data.idx import idx_bytes
from vae_dist.distributed import EXIT_FAILED, TrainingFailed, run_entry_point
from vae_dist.options import command_line, program
from vae_dist.progress import no_bar
from vae_dist.tracking import read_rows

_TRAIN_IMAGES, _TEST_IMAGES = 2000, 500
_PROGRAM = ("vae_dist.train",)
_JOB = "16 steps of the default job on 2,000 embedded digits"
_STEPS_ALIKE = 10  # before rounding may send two runs apart
_LOSS_LIMIT, _GRADIENT_LIMIT = 1e-6, 1e-5  # relative, in the default mode; Adam would hide a wrong gradient from the losses
_SUM_LIMIT = 1e-9  # relative, of float64 sums of the same terms in another order


@dataclass(frozen=True)
class Options:
    """Run a small job at several numbers of processes, in the default and in the bitwise mode, and print how far apart the
    weights, the losses and the evaluation are. Status 1 if further than they may be."""

    world: str = ""
    """Numbers of processes, such as 1,2,3; the first is what the others are compared with. Default: what the machine has."""

    def worlds(self) -> list[int]:
        """Raises InputError unless they are at least two different positive numbers."""
        gpus, cores = torch.cuda.device_count(), len(os.sched_getaffinity(0))
        if not self.world:
            return sorted({1, 2, gpus} if gpus > 1 else {1, 2, min(4, cores)})
        numbers = [number.strip() for number in self.world.split(",")]
        if not all(number.isdecimal() and int(number) > 0 for number in numbers) or len(set(map(int, numbers))) < 2:
            raise InputError(f"--world {self.world}: must be two or more different numbers of processes, such as 1,2,3")
        return list(dict.fromkeys(map(int, numbers)))


class Result(NamedTuple):
    """What a job left."""

    weights: torch.Tensor  # all of them, in a row
    losses: torch.Tensor  # float64, of each step
    norms: torch.Tensor  # float64, of the gradient of each step
    test_loss: float


class Apart(NamedTuple):
    """Relative differences of one result from another."""

    weights: float
    losses: float  # the largest of any step
    first_losses: float  # the largest of the first ten
    first_norms: float
    test_loss: float


def main(args: list[str] | None = None) -> int:
    options = command_line(Options, "vae_dist.check", sys.argv[1:] if args is None else args)
    worlds = options.worlds()
    if "RANK" in os.environ:
        raise InputError(f"vae_dist.check starts the processes by itself: start it with plain `{program('vae_dist.check')}`")
    signal.signal(signal.SIGTERM, signal.default_int_handler)  # to end what was started, as after Ctrl-C
    on_gpus = torch.cuda.device_count() >= max(worlds)
    where = torch.cuda.get_device_name() if on_gpus else f"CPU ({len(os.sched_getaffinity(0))} cores of {platform.machine()})"
    print(f"vae_dist {__version__}, torch {torch.__version__}, on {where}: {_JOB}", flush=True)
    results = {}
    with tempfile.TemporaryDirectory() as folder:
        _write_images(Path(folder))
        for mode, processes in (bar := tqdm(list(product((False, True), worlds)), unit="job", leave=False, disable=no_bar())):
            bar.set_description(f"{processes} processes, {'bitwise' if mode else 'default'} mode")
            results[mode, processes] = _run(Path(folder), processes, mode, on_gpus)
    default, bitwise = (
        {processes: _apart(results[mode, processes], results[mode, worlds[0]]) for processes in worlds[1:]}
        for mode in (False, True)
    )
    print(_table(worlds[0], default, bitwise))
    return verdict(default, bitwise)


def _write_images(folder: Path) -> None:
    raw = folder / "MNIST" / "raw"
    raw.mkdir(parents=True)
    for name, first, last in (("train", 0, _TRAIN_IMAGES), ("t10k", _TRAIN_IMAGES, _TRAIN_IMAGES + _TEST_IMAGES)):
        images, labels = glyphs.draw(first, last)
        (raw / f"{name}-images-idx3-ubyte").write_bytes(idx_bytes(images[:, 0]))
        (raw / f"{name}-labels-idx1-ubyte").write_bytes(idx_bytes(labels.to(torch.uint8)))


def _run(folder: Path, processes: int, deterministic: bool, on_gpus: bool) -> Result:
    """Trains as a user would. Raises TrainingFailed, with what the job said, where it fails."""
    output = folder / f"{processes}{'bitwise' if deterministic else 'default'}"
    options = {
        "data.root": folder,
        "output": output,
        "trainer.epochs": 1,
        "trainer.deterministic": str(deterministic).lower(),
        "trainer.timeout_minutes": 2,
        "tracking.log_every": 1,
        "tracking.wandb": "disabled",
    }
    launcher = ["torch.distributed.run", "--standalone", f"--nproc_per_node={processes}", "-m"] if processes > 1 else []
    command = [sys.executable, "-m", *launcher, *_PROGRAM, *(f"--{name}={value}" for name, value in options.items())]
    environment = os.environ if on_gpus else os.environ | {"CUDA_VISIBLE_DEVICES": ""}
    with subprocess.Popen(command, env=environment, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True) as job:
        try:
            _, errors = job.communicate()
        except KeyboardInterrupt:
            job.terminate()  # a launcher tells its processes, and waits for them
            raise
    if job.returncode != 0:
        lines = errors.strip().splitlines()
        said = [line for line in lines if line.startswith("error: ")] or lines[-5:]
        raise TrainingFailed(f"{processes} processes ended with status {job.returncode}: {' / '.join(said)}")
    tensors = read_tensors(output / "model.safetensors")
    *steps, _, test = read_rows(output / "metrics.jsonl")
    losses, norms = (torch.tensor([row[name] for row in steps], dtype=torch.float64) for name in ("loss", "grad_norm"))
    return Result(torch.cat([tensors[name].flatten() for name in sorted(tensors)]), losses, norms, test["loss"])


def _apart(result: Result, reference: Result) -> Apart:
    difference = (result.weights.double() - reference.weights.double()).norm() / reference.weights.double().norm()
    losses, norms = (result.losses / reference.losses - 1).abs(), (result.norms / reference.norms - 1).abs()
    return Apart(
        weights=difference.item(),
        losses=losses.max().item(),
        first_losses=losses[:_STEPS_ALIKE].max().item(),
        first_norms=norms[:_STEPS_ALIKE].max().item(),
        test_loss=abs(result.test_loss / reference.test_loss - 1),
    )


def _table(reference: int, default: dict[int, Apart], bitwise: dict[int, Apart]) -> str:
    columns = f"{'weights':>11}{'losses':>11}{'evaluation':>12}"
    lines = [f"{'':10} {'default mode':^34}   {'bitwise mode':^34}", f"{'processes':10} {columns}   {columns}"]
    for processes in default:
        cells = [[apart.weights, apart.losses, apart.test_loss] for apart in (default[processes], bitwise[processes])]
        shown = ["".join(f"{_shown(x):>{width}}" for x, width in zip(row, (11, 11, 12), strict=True)) for row in cells]
        lines.append(f"{processes:<10} {'   '.join(shown)}")
    return "\n".join([f"Relative differences from {reference} process{'es' if reference > 1 else ''}:", *lines])


def _shown(difference: float) -> str:
    return "identical" if difference == 0 else f"{difference:.1e}"


def verdict(default: dict[int, Apart], bitwise: dict[int, Apart]) -> int:
    """Says whether the differences are those that must be there. The exit status."""
    limits = [
        (f"the first {_STEPS_ALIKE} losses", default, "first_losses", _LOSS_LIMIT),
        (f"the norms of the first {_STEPS_ALIKE} gradients", default, "first_norms", _GRADIENT_LIMIT),
        ("weights in bitwise mode", bitwise, "weights", 0.0),
        ("losses in bitwise mode", bitwise, "losses", _SUM_LIMIT),
        ("evaluation in bitwise mode", bitwise, "test_loss", _SUM_LIMIT),
    ]
    problems = [
        f"{name} differ by {getattr(apart, field):.1e} with {processes} processes; at most {limit:g} is right"
        for name, of_worlds, field, limit in limits
        for processes, apart in of_worlds.items()
        if not getattr(apart, field) <= limit
    ]
    if problems:
        print("\n".join(f"FAILED: {problem}" for problem in problems))
        return EXIT_FAILED
    first = max(apart.first_losses for apart in default.values())
    alike = f"the first {_STEPS_ALIKE} losses of the default mode agree to {first:.0e}"
    print(f"ok: the same weights in bitwise mode, to the bit; {alike}")
    return 0


if __name__ == "__main__":
    run_entry_point(main)
