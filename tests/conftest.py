"""What the tests share: small data sets in real files, real processes, and a small trained run."""

import os
import signal
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch
from accelerate.state import AcceleratorState
from playwright.sync_api import Browser
from torch import Tensor

from tests.browser import chromium
from tests.helpers import Outcome, launch, write_idx_set
from tests.object_storage import TEST, TRAIN, Server, Way, write_set
from vae_dist import check, dashboard, evaluate, export, generate, pack, train, upload, verify
from vae_dist.data import glyphs
from vae_dist.distributed import run_entry_point
from vae_dist.doctor import __main__ as doctor
from vae_dist.explore import __main__ as explore
from vae_dist.report import __main__ as report


@pytest.fixture(scope="session")
def small_root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A data root with 1,000 + 300 images in MNIST's format."""
    root = tmp_path_factory.mktemp("data")
    write_idx_set(root / "MNIST" / "raw", *glyphs.draw(0, 1000), *glyphs.draw(1000, 1300))
    return root


@pytest.fixture(scope="session")
def mnist_root() -> Path:
    """The real MNIST, where VAE_DIST_DATA names a folder that has it."""
    root = os.environ.get("VAE_DIST_DATA")
    if root is None or not (Path(root) / "MNIST" / "raw").is_dir():
        pytest.skip("needs the real MNIST: set VAE_DIST_DATA to a folder with MNIST/raw in it")
    return Path(root)


@pytest.fixture(scope="session")
def pixels() -> Tensor:
    """Those of the packed set `folder`: the training images, then the test images."""
    return glyphs.draw(0, TRAIN + TEST)[0]


@pytest.fixture(scope="session")
def folder(pixels: Tensor, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A packed set of small shards, which nobody changes."""
    folder = tmp_path_factory.mktemp("packed")
    write_set(folder / "train", pixels[:TRAIN])
    write_set(folder / "test", pixels[TRAIN:])
    return folder


@pytest.fixture(scope="session")
def server(folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    """With that set in its bucket, under `set`."""
    server = Server(tmp_path_factory.mktemp("server") / "log")
    server.upload(folder, "set")
    yield server
    server.stop()


@pytest.fixture
def way(server: Server, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Way]:
    """To the server, for this process as well."""
    way = Way(server)
    for name, value in way.environment(tmp_path / "cache").items():
        monkeypatch.setenv(name, value)
    monkeypatch.setattr("litdata.utilities.dataset_utilities._LITDATA_CACHE_DIR", str(tmp_path / "cache"))  # read at import
    yield way
    way.vanish()


@pytest.fixture
def command(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> Callable[..., Outcome]:
    """Runs an entry point in this process, as `python -m` would: command("train", "--seed", "1")."""
    for name in ("WANDB_API_KEY", "WANDB_MODE", "WANDB_BASE_URL"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("NETRC", os.devnull)
    handlers = {number: signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGUSR1, signal.SIGINT)}
    threads = torch.get_num_threads()
    mains = {"train": train.main, "evaluate": evaluate.main, "generate": generate.main}
    mains |= {"check": check.main, "verify": verify.main, "pack": pack.main, "doctor": doctor.main}
    mains |= {"export": export.main, "upload": upload.main, "explore": explore.main, "report": report.main}
    mains |= {"dashboard": dashboard.main}

    def run(name: str, *args: object) -> Outcome:
        capsys.readouterr()
        AcceleratorState._reset_state(True)  # another test may have left one
        with pytest.raises(SystemExit) as end:
            run_entry_point(lambda: mains[name]([str(arg) for arg in args]))
        AcceleratorState._reset_state(True)
        for number, handler in handlers.items():
            signal.signal(number, handler)
        torch.set_num_threads(threads)
        torch.set_flush_denormal(False)
        code = end.value.code
        return Outcome(code if isinstance(code, int) else 0, *capsys.readouterr())

    return run


@pytest.fixture(scope="session")
def browser() -> Iterator[Browser]:
    with chromium() as browser:
        yield browser


@pytest.fixture(scope="session")
def trained(small_root: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a finished run of three epochs, with an offline W&B run."""
    folder = tmp_path_factory.mktemp("runs") / "trained"
    options = ["--data.root", small_root, "--trainer.epochs", 3, "--tracking.wandb", "offline", "--tracking.log_every", 4]
    done = launch("vae_dist.train", *options, "--output", folder)
    assert done.returncode == 0, done.stderr
    return folder


@pytest.fixture
def quick(small_root: Path) -> list[object]:
    """Options of a small run: 8 steps an epoch, 2 epochs, no W&B."""
    return ["--data.root", small_root, "--trainer.epochs", 2, "--model.hidden", 40, "--tracking.wandb", "disabled"]


@pytest.fixture
def finished(quick: list[object], command: Callable[..., Outcome], tmp_path: Path) -> Path:
    assert command("train", *quick, "--output", tmp_path / "run").status == 0
    return tmp_path / "run"
