"""The order of the house: each module imports only from those above it, and nothing heavy before it is needed."""

import ast
import re
import subprocess
import sys
from pathlib import Path

import pytest

import vae_dist
from tests.helpers import ROOT

ORDER = [
    "config.checks",
    "config.data",
    "config.model",
    "config.training",
    "config",
    "options_help",
    "options",
    "progress",
    "noise",
    "checkpoint",
    "data.glyphs",
    "data.colour_glyphs",
    "data.idx",
    "data.order",
    "data.images",
    "data.own",
    "data.photos",
    "data.folder",
    "data.packed",
    "data.bucket",
    "data.stream",
    "data.packing",
    "data.cache",
    "data.sources",
    "likelihoods",
    "convolutions",
    "networks",
    "model",
    "objective",
    "own_modules",
    "optimizer",
    "averaging",
    "distributed",
    "starting",
    "loading",
    "shared_memory",
    "pace",
    "noise_scale",
    "gradients",
    "run",
    "pictures",
    "posterior",
    "charts",
    "wandb_file",
    "wandb_server",
    "wandb_run",
    "tracking",
    "importance",
    "evaluate",
    "state",
    "replay",
    "step",
    "stopping",
    "guards",
    "callbacks",
    "trainer",
    "provenance",
    "fitting",
    "train",
    "check",
    "verify",
    "generate",
    "export",
    "upload",
    "dashboard",
    "pack",
    "report",
    "report.facts",
    "report.insight",
    "report.figures",
    "report.markup",
    "report.tables",
    "report.sections",
    "report.page",
    "report.__main__",
    "doctor",
    "doctor.meeting",
    "doctor.health",
    "doctor.network",
    "doctor.__main__",
    "explore",
    "explore.explorer",
    "explore.app",
    "explore.__main__",
    "__main__",
]

PACKAGE = Path(vae_dist.__file__).parent


def module_name(path: Path) -> str:
    return ".".join(path.relative_to(PACKAGE).with_suffix("").parts).removesuffix(".__init__")


def imported(path: Path) -> set[str]:
    """The modules of this package that a module imports when it is imported."""
    names = set()
    for node in ast.parse(path.read_text()).body:
        if isinstance(node, ast.ImportFrom) and node.module and node.module.split(".")[0] == "vae_dist":
            head = node.module.removeprefix("vae_dist").lstrip(".")
            names |= {f"{head}.{alias.name}".lstrip(".") for alias in node.names} | {head}
    return names & set(ORDER)


def test_every_module_has_its_place() -> None:
    found = {module_name(path) for path in PACKAGE.rglob("*.py")} - {"__init__", "data"}
    assert found == set(ORDER)


@pytest.mark.parametrize("module", ORDER)
def test_a_module_imports_only_from_those_above_it(module: str) -> None:
    path = PACKAGE / module.replace(".", "/")
    path = path / "__init__.py" if path.is_dir() else path.with_suffix(".py")
    assert imported(path) <= set(ORDER[: ORDER.index(module)])


@pytest.mark.parametrize(
    ("module", "unwanted"),
    [
        ("vae_dist", ["torch", "accelerate", "tyro"]),
        ("vae_dist.__main__", ["torch", "accelerate", "tyro"]),
        ("vae_dist.train", ["wandb", "torchvision"]),
    ],
)
def test_nothing_heavy_is_imported_before_it_is_needed(module: str, unwanted: list[str]) -> None:
    check = f"import sys, {module}; sys.exit(str([m for m in {unwanted} if m in sys.modules] or 0))"
    done = subprocess.run([sys.executable, "-c", check], capture_output=True, text=True, check=False)
    assert done.stderr.strip() == "0" or done.returncode == 0, done.stderr


def test_modules_fit_their_limit() -> None:
    lengths = {str(path.relative_to(ROOT)): len(path.read_text().splitlines()) for path in PACKAGE.rglob("*.py")}
    assert {name: length for name, length in lengths.items() if length > 320} == {}


def test_whatever_is_imported_is_asked_for_by_name() -> None:
    """What only comes along with something else goes when that does."""
    asked = set(re.findall(r'^    "([\w-]+)', (ROOT / "pyproject.toml").read_text(), re.MULTILINE))
    names = {"PIL": "pillow", "wandb_workspaces": "wandb-workspaces", "yaml": "pyyaml"}
    nodes = [node for path in PACKAGE.rglob("*.py") for node in ast.walk(ast.parse(path.read_text()))]
    modules = {alias.name for node in nodes if isinstance(node, ast.Import) for alias in node.names}
    modules |= {node.module for node in nodes if isinstance(node, ast.ImportFrom) and node.module}
    packages = {module.split(".")[0] for module in modules} - sys.stdlib_module_names - {"vae_dist"}
    assert {names.get(package, package) for package in packages} - asked == set()
