"""examples/lesson.ipynb runs to its end, as it lies in the repository, on embedded digits and on MNIST."""

import os
import re
from pathlib import Path
from typing import Any

import nbformat
import pytest

from tests.helpers import ROOT
from tests.lesson import LESSON, executed
from vae_dist.run import RunFolder


def outputs(notebook: Any) -> list[Any]:
    return [output for cell in notebook.cells if cell.cell_type == "code" for output in cell.outputs]


def printed(notebook: Any) -> str:
    return "".join(output.text for output in outputs(notebook) if output.output_type == "stream")


def pictures(notebook: Any) -> list[str]:
    return [output.data["image/png"] for output in outputs(notebook) if "image/png" in output.get("data", {})]


def words(notebook: Any) -> list[str]:
    """What it printed, but for what differs between machines: figures, bars of them, places, and the machine's own name."""
    return re.findall(r"[a-zA-Z_]{3,}", re.sub(r"^vae_dist .*$|\S*/\S*|\bpython\b", "", printed(notebook), flags=re.MULTILINE))


def test_it_is_kept_with_what_it_shows_and_nothing_of_the_machine_it_ran_on() -> None:
    notebook = nbformat.read(LESSON, as_version=4)
    nbformat.validate(notebook)
    assert len(pictures(notebook)) == 4
    assert all(output.get("name") != "stderr" for output in outputs(notebook))
    assert re.findall(r"(?<![\w/])/\w+|Warning", printed(notebook)) == []


@pytest.mark.slow
@pytest.mark.parametrize("data", ["glyphs", "mnist"])
def test_it_runs_to_its_end(data: str, tmp_path: Path, request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    if data == "mnist":
        monkeypatch.setenv("VAE_DIST_DATA", str(request.getfixturevalue("mnist_root")))
    else:
        monkeypatch.delenv("VAE_DIST_DATA", raising=False)
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")]))
    notebook = executed(tmp_path)
    run = RunFolder(tmp_path / "runs" / "lesson")
    assert run.state() == "finished"
    assert len(pictures(notebook)) == 4
    assert "ok: the same weights in bitwise mode, to the bit" in printed(notebook)
    if data == "glyphs":
        kept = nbformat.read(LESSON, as_version=4)
        assert set(words(notebook)) == set(words(kept)), "what is kept is old: make lesson"
