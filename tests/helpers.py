"""Small things that several tests use."""

import contextlib
import gzip
import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

from safetensors.torch import load_file
from torch import Tensor, sigmoid

from vae_dist.config import DataConfig
from vae_dist.data import sources
from vae_dist.data.idx import idx_bytes
from vae_dist.data.images import Resident
from vae_dist.tracking import read_rows

ROOT = Path(__file__).parent.parent

# All that may differ between two runs of a config: times, and what is estimated from how the ranks' gradients differ.
TIMES = {"images_per_second", "train_seconds", "test_seconds", "data_share", "compute_share", "communication_share"}
OF_PROCESSES = {"processes", "noise_scale_images"}


class Outcome(NamedTuple):
    """How a command ended and what it printed."""

    status: int
    out: str
    err: str


def refused(outcome: Outcome, *told: str) -> None:
    """Bad input: one readable error, status 2."""
    assert outcome.status == 2
    assert outcome.err.count("error: ") == 1
    assert "Traceback" not in outcome.err
    for words in told:
        assert words in outcome.err


def records(run: Path) -> list[dict[str, Any]]:
    return [
        {key: value for key, value in row.items() if key not in TIMES | OF_PROCESSES}
        for row in read_rows(run / "metrics.jsonl")
    ]


def everything(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file()}


def reference_terms(run: Path, images: Tensor, noise: Tensor) -> tuple[Tensor, Tensor]:
    """BCE and KL of each image in float64, from the saved weights and nothing of this package."""
    w = {name: tensor.double() for name, tensor in load_file(run / "model.safetensors").items()}
    hidden = (images @ w["encoder.1.weight"].T + w["encoder.1.bias"]).clamp(min=0)
    mean, logvar = (hidden @ w["encoder.3.weight"].T + w["encoder.3.bias"]).split(20, dim=1)
    latents = mean + (logvar / 2).exp() * noise
    hidden = (latents @ w["decoder.0.weight"].T + w["decoder.0.bias"]).clamp(min=0)
    p = sigmoid(hidden @ w["decoder.2.weight"].T + w["decoder.2.bias"])
    bce = -(images * p.log() + (1 - images) * (1 - p).log()).sum(1)
    return bce, -0.5 * (1 + logvar - mean**2 - logvar.exp()).sum(1)


def resident(data: DataConfig, train: bool) -> Resident:
    """A data set that is loaded into memory."""
    images = sources.load(data, train)
    assert isinstance(images, Resident)
    return images


def write_idx_set(
    folder: Path,
    train: Tensor,
    train_labels: Tensor,
    test: Tensor,
    test_labels: Tensor,
    names: tuple[str, str] = ("train", "t10k"),
    compressed: bool = False,
) -> None:
    """Writes four IDX files; images are uint8 (n, 1, height, width)."""
    folder.mkdir(parents=True, exist_ok=True)
    for name, images, labels in ((names[0], train, train_labels), (names[1], test, test_labels)):
        for file, array in ((f"{name}-images-idx3-ubyte", images[:, 0]), (f"{name}-labels-idx1-ubyte", labels.byte())):
            content = idx_bytes(array)
            path = folder / (f"{file}.gz" if compressed else file)
            path.write_bytes(gzip.compress(content) if compressed else content)


def arguments(module: str, *args: object, processes: int = 1, restarts: int = 0) -> list[str]:
    """The command line that starts a module in one process or, through the launcher, in several, and again if one fails."""
    if processes == 1:
        start = [sys.executable, "-m", module]
    else:
        config = str(ROOT / "launch" / "multi_cpu.yaml")
        launcher = [sys.executable, "-m", "accelerate.commands.launch", "--config_file", config]
        start = [*launcher, "--num_processes", str(processes), "--max_restarts", str(restarts), "-m", module]
    return [*start, *map(str, args)]


def environment(**changes: str) -> dict[str, str]:
    """This environment without anything that W&B or a launcher left in it."""
    kept = {name: value for name, value in os.environ.items() if not name.startswith(("WANDB_", "ACCELERATE_"))}
    return kept | {"NETRC": os.devnull, "CUDA_VISIBLE_DEVICES": ""} | changes


def launch(module: str, *args: object, processes: int = 1, **changes: str) -> "subprocess.CompletedProcess[str]":
    """Runs a module to its end in real processes, from the project's folder."""
    return subprocess.run(
        arguments(module, *args, processes=processes),
        cwd=ROOT,
        env=environment(**changes),
        capture_output=True,
        text=True,
        timeout=180,
        check=False,
    )


def begin(module: str, *args: object, processes: int = 1, restarts: int = 0) -> "subprocess.Popen[str]":
    """Starts a module in real processes and returns at once; what they print comes as one text."""
    return subprocess.Popen(
        arguments(module, *args, processes=processes, restarts=restarts),
        cwd=ROOT,
        env=environment(),
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )


@contextlib.contextmanager
def explored(run: Path, *options: object) -> Iterator[list[str]]:
    """The page of a run, served by a real process at a free port: what it printed, the address last. It ends by Ctrl-C."""
    server = begin("vae_dist.explore", run, "--port", 0, *options)
    assert server.stdout is not None
    lines: list[str] = []
    with server:
        try:
            while "http://" not in "".join(lines[-1:]):
                lines.append(server.stdout.readline())
                assert lines[-1], lines
            yield lines
        finally:
            server.send_signal(signal.SIGINT)
            rest, _ = server.communicate(timeout=20)
    assert (server.returncode, rest) == (0, "")
