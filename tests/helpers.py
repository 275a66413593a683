"""Small things that several tests use."""

import gzip
import os
import subprocess
import sys
from pathlib import Path

from torch import Tensor

ROOT = Path(__file__).parent.parent


def idx_bytes(array: Tensor) -> bytes:
    """A uint8 array as an IDX file."""
    header = bytes([0, 0, 8, array.ndim]) + b"".join(side.to_bytes(4, "big") for side in array.shape)
    return header + bytes(array.contiguous().flatten().tolist())


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


def arguments(module: str, *args: object, processes: int = 1) -> list[str]:
    """The command line that starts a module in one process or, through the launcher, in several."""
    if processes == 1:
        start = [sys.executable, "-m", module]
    else:
        config = str(ROOT / "launch" / "multi_cpu.yaml")
        launcher = [sys.executable, "-m", "accelerate.commands.launch", "--config_file", config]
        start = [*launcher, "--num_processes", str(processes), "-m", module]
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
