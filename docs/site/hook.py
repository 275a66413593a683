"""MkDocs' hook. Pages lie in the site as they lie in the repository, so that a link between two of them is right in both.

What a browser needs for formulas, and to search without a server, are npm packages: `make docs` puts them into build/npm.
"""

import json
import re
import subprocess
import sys
from pathlib import Path

from mkdocs.config.defaults import MkDocsConfig
from mkdocs.structure.files import File, Files

ROOT = Path(__file__).parents[2]
PARTS = ["*.md", "*.cff", "LICENSE", "docs/**/*", "launch/**/*", "configs/**/*"]
NOTEBOOK = "examples/lesson.ipynb"
COMMAND = "import sys; sys.argv[0] = 'vae-dist'; from vae_dist.__main__ import main; main()"
PACKAGES = ["katex/dist/**/*.min.*", "katex/dist/fonts/*.woff2", "iframe-worker/shim/index.js"]


def on_files(files: Files, config: MkDocsConfig) -> Files:
    """The files of the repository in place of those that MkDocs found below docs/."""
    for file in [file for file in files if file.src_dir == config.docs_dir]:
        files.remove(file)
    npm = ROOT / "build" / "npm"
    found = [(ROOT, "", path) for part in PARTS for path in ROOT.glob(part)]
    found += [(npm, "npm/", path) for part in PACKAGES for path in (npm / "node_modules").glob(part)]
    for folder, prefix, path in sorted(found):
        if path.is_file():
            inside = path.relative_to(npm / "node_modules" if prefix else folder).as_posix()
            files.append(File.generated(config, prefix + inside, abs_src_path=str(path)))
    files.append(File.generated(config, NOTEBOOK.replace(".ipynb", ".md"), content=_as_page(ROOT / NOTEBOOK)))
    return files


def on_page_markdown(markdown: str, **_: object) -> str:
    """What a command prints, in the place of a comment that names it; links to the notebook lead to its page."""
    markdown = markdown.replace(f"{NOTEBOOK})", NOTEBOOK.replace(".ipynb", ".md)"))
    return re.sub(r"^<!-- vae-dist (.+) -->$", lambda found: f"```\n{_printed(*found[1].split())}\n```", markdown, flags=re.M)


def _as_page(notebook: Path) -> str:
    """A notebook with what it printed and drew."""
    parts = []
    for cell in json.loads(notebook.read_text(encoding="utf-8"))["cells"]:
        source = "".join(cell["source"])
        parts.append(source if cell["cell_type"] == "markdown" else f"```python\n{source}\n```")
        for output in cell.get("outputs", []):
            if output["output_type"] == "stream":
                parts.append(f"```text\n{''.join(output['text']).rstrip()}\n```")
            else:
                parts.append(f"![What the cell above draws](data:image/png;base64,{output['data']['image/png'].strip()})")
    return "\n\n".join(parts)


def _printed(*args: str) -> str:
    return subprocess.run(
        [sys.executable, "-c", COMMAND, *args], cwd=ROOT, text=True, check=True, stdout=subprocess.PIPE
    ).stdout
