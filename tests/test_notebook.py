"""examples/lesson.ipynb runs to its end, as it lies in the repository, on embedded digits and on MNIST."""

import os
from pathlib import Path
from typing import Any

import nbformat
import pytest
from nbclient import NotebookClient

from tests.helpers import ROOT
from vae_dist.run import RunFolder

LESSON = ROOT / "examples" / "lesson.ipynb"


def outputs(notebook: Any) -> list[Any]:
    return [output for cell in notebook.cells if cell.cell_type == "code" for output in cell.outputs]


def test_it_is_kept_without_what_it_printed() -> None:
    notebook = nbformat.read(LESSON, as_version=4)
    nbformat.validate(notebook)
    assert outputs(notebook) == []
    assert all(cell.execution_count is None for cell in notebook.cells if cell.cell_type == "code")


@pytest.mark.slow
@pytest.mark.parametrize("data", ["glyphs", "mnist"])
def test_it_runs_to_its_end(data: str, tmp_path: Path, request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    if data == "mnist":
        monkeypatch.setenv("VAE_DIST_DATA", str(request.getfixturevalue("mnist_root")))
    else:
        monkeypatch.delenv("VAE_DIST_DATA", raising=False)
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")]))
    notebook = nbformat.read(LESSON, as_version=4)
    NotebookClient(notebook, timeout=600, kernel_name="python3", resources={"metadata": {"path": str(tmp_path)}}).execute()
    run = RunFolder(tmp_path / "runs" / "lesson")
    assert run.state() == "finished"
    pictures = [output for output in outputs(notebook) if "image/png" in output.get("data", {})]
    assert len(pictures) == 4
    texts = [output.text for output in outputs(notebook) if output.output_type == "stream"]
    warnings = [
        text for text in texts if "Warning" in text and "ipywidgets" not in text
    ]  # tqdm asks for that, through huggingface_hub
    assert warnings == []
    assert "ok: the same weights in bitwise mode, to the bit" in "".join(texts)
