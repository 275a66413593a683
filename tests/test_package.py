"""What `make package` left in dist/: the wheel is whole, and works from an empty folder in an environment of its own; the sdist
is enough to run the tests. `--no-deps` and this environment's packages would hide what the metadata forgets.
"""

import email
import os
import subprocess
import sys
import tarfile
import zipfile
from pathlib import Path

import pytest

from tests.helpers import ROOT, environment
from vae_dist import __version__

pytestmark = pytest.mark.slow
WHEEL = ROOT / "dist" / f"vae_dist-{__version__}-py3-none-any.whl"
SDIST = ROOT / "dist" / f"vae_dist-{__version__}.tar.gz"


def run(*command: object, cwd: Path, **changes: str) -> str:
    """What a command prints to stdout; it must end well."""
    done = subprocess.run(
        list(map(str, command)), cwd=cwd, env=environment(**changes), capture_output=True, text=True, timeout=600, check=False
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def test_the_wheel_holds_every_file_of_the_package() -> None:
    tracked = run("git", "ls-files", "--cached", "vae_dist", "configs", cwd=ROOT).splitlines()
    files = {f"vae_dist/{file}" if file.startswith("configs/") else file for file in tracked} - {"vae_dist/configs"}
    with zipfile.ZipFile(WHEEL) as wheel:
        names = set(wheel.namelist())
    assert {name for name in names if ".dist-info/" not in name} == files


def test_the_metadata_says_what_this_is() -> None:
    with zipfile.ZipFile(WHEEL) as wheel:
        (name,) = [name for name in wheel.namelist() if name.endswith(".dist-info/METADATA")]
        metadata = email.message_from_bytes(wheel.read(name))
    assert metadata["Version"] == __version__
    assert metadata["License-Expression"] == "Apache-2.0"
    assert metadata["Requires-Python"] == ">=3.10"
    assert metadata["Summary"]
    assert metadata["Keywords"]
    assert metadata["Author"]
    assert "Typing :: Typed" in metadata.get_all("Classifier", [])
    assert "# vae_dist" in str(metadata.get_payload())


@pytest.fixture(scope="module")
def installed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The programs of a new environment with the wheel and nothing but what it asks for, in the locked versions."""
    home = tmp_path_factory.mktemp("environment")
    uv = Path(sys.executable).parent / "uv"
    run(uv, "venv", "--python", sys.executable, home / "venv", cwd=home)
    python = home / "venv" / "bin" / "python"
    run(uv, "pip", "install", "--python", python, "--constraint", ROOT / "requirements.lock", WHEEL, cwd=home)
    return python.parent


def test_the_wheel_is_used_from_an_empty_folder(installed: Path, tmp_path: Path) -> None:
    """As a stranger would who has only `vae-dist`'s own words to go by: what each step prints names the next."""
    environ = {"PATH": f"{installed}:{os.environ['PATH']}", "PYTHONDONTWRITEBYTECODE": ""}

    def typed(line: str) -> str:
        return run("bash", "-c", line, cwd=tmp_path, **environ)

    first = "vae-dist train --config glyphs"
    assert f"  {first}\n" in typed("vae-dist")
    words = typed(f"{first} --trainer.epochs 1 --data.batch_size 1000 --tracking.wandb offline")
    lines = [line.split(maxsplit=1)[1] for line in words.splitlines() if line.startswith(("  evaluate", "  generate"))]
    assert lines == ["vae-dist evaluate runs/glyphs", "vae-dist generate runs/glyphs"]
    assert "n=10000" in typed(lines[0])
    typed(lines[1])
    assert (tmp_path / "runs/glyphs/generated/samples.png").is_file()
    typed("vae-dist report runs/glyphs")
    assert "<style>" in (tmp_path / "runs/glyphs/report.html").read_text()
    assert "3 epochs" in typed(f"torchrun --nproc-per-node 2 --no-python {first} --data.batch_size 1000 --trainer.epochs 3")
    where = "import vae_dist; print(vae_dist.__file__, vae_dist.load('runs/glyphs').sample(2, seed=0).shape)"
    told = typed(f'python -c "{where}"')
    assert told.startswith(str(installed.parent)), "the wheel, not this checkout"
    assert "torch.Size([2, 1, 28, 28])" in told


def test_the_sdist_runs_its_own_tests(tmp_path: Path) -> None:
    with tarfile.open(SDIST) as archive:
        archive.extractall(tmp_path, filter="data")
    folder = tmp_path / SDIST.name.removesuffix(".tar.gz")
    checked = "import vae_dist, sys; sys.exit(not vae_dist.__file__.startswith(sys.argv[1]))"
    run(sys.executable, "-c", checked, folder, cwd=folder)
    words = run(
        sys.executable,
        "-m",
        "pytest",
        "-q",
        *[f"tests/test_{name}.py" for name in ("house", "config", "docs", "pages")],
        cwd=folder,
    )
    assert " passed" in words
