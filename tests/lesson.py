"""Runs examples/lesson.ipynb in an empty folder, on the embedded digits, and keeps in it what it shows: `make lesson`."""

import os
import tempfile
from pathlib import Path
from typing import Any

import nbformat
from nbclient import NotebookClient

from tests.helpers import ROOT

LESSON = ROOT / "examples" / "lesson.ipynb"
_SECONDS = 600  # for a cell


def executed(folder: Path) -> Any:
    """The notebook, run in a folder: with what its cells print and draw, without their bars and what goes to stderr."""
    notebook = nbformat.read(LESSON, as_version=4)
    resources = {"metadata": {"path": str(folder)}}
    NotebookClient(notebook, timeout=_SECONDS, kernel_name="python3", record_timing=False, resources=resources).execute()
    for cell in notebook.cells:
        if cell.cell_type == "code":
            cell.execution_count = None
            cell.outputs = _kept(cell.outputs)
    return notebook


def _kept(outputs: list[Any]) -> list[Any]:
    """One text of all that was printed, and one picture of each in the formats that it came in."""
    text = "".join(output.text for output in outputs if output.output_type == "stream" and output.name == "stdout")
    kept = [nbformat.v4.new_output("stream", name="stdout", text=text)] if text else []
    pictures = [output.data["image/png"] for output in outputs if "image/png" in output.get("data", {})]
    return kept + [nbformat.v4.new_output("display_data", {"image/png": picture}) for picture in pictures]


if __name__ == "__main__":
    os.environ.pop("VAE_DIST_DATA", None)
    with tempfile.TemporaryDirectory() as folder:
        notebook = executed(Path(folder))
    nbformat.write(notebook, LESSON)
