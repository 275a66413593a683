"""docs/theory.md: what it names exists, every formula has a function and a test, and Markdown leaves the mathematics alone."""

import ast
import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
TEXT = (ROOT / "docs" / "theory.md").read_text(encoding="utf-8")
NAMES = re.findall(r"`([^`]*)`", TEXT)
FORMULAS = re.findall(r"\$\$([^$]+)\$\$|\$([^$]+)\$", TEXT)
REFUSED = ("operatorname", "newcommand", "require", "def", "label", "ref")  # GitHub does not render them, or not everywhere


def defines(path: Path, names: list[str]) -> bool:
    """Whether a module defines a name, or the class of that name the next one."""
    if not path.is_file():
        return False
    body: list[ast.stmt] = ast.parse(path.read_text(encoding="utf-8")).body
    for name in names:
        found = [node for node in body if name in bound_by(node)]
        if not found:
            return False
        body = found[0].body if isinstance(found[0], ast.ClassDef) else []
    return True


def bound_by(node: ast.stmt) -> set[str]:
    if isinstance(node, (ast.FunctionDef, ast.ClassDef)):
        return {node.name}
    targets = node.targets if isinstance(node, ast.Assign) else [node.target] if isinstance(node, ast.AnnAssign) else []
    return {target.id for target in targets if isinstance(target, ast.Name)}


def exists(name: str) -> bool:
    """Whether there is such a `test_file.py::test_name`, `--section.option`, or `module.function`."""
    if "::" in name:
        file, test = name.split("::")
        return test.startswith("test_") and defines(ROOT / "tests" / file, [test])
    if name.startswith("--"):
        section, _, option = name.removeprefix("--").partition(".")
        path = [f"{section.capitalize()}Config", option]
        return any(defines(file, path) for file in (ROOT / "vae_dist" / "config").glob("*.py"))
    parts = name.split(".")
    places = [(ROOT.joinpath("vae_dist", *parts[:i]), parts[i:]) for i in range(1, len(parts))]
    return any(defines(place.with_suffix(".py"), rest) or defines(place / "__init__.py", rest) for place, rest in places)


@pytest.mark.parametrize("name", sorted(set(NAMES)))
def test_every_name_exists(name: str) -> None:
    assert exists(name)


@pytest.mark.parametrize(
    "name",
    [
        "objective.kl_by_dimensions",
        "objective",
        "objectives.kl_by_dimension",
        "objective.Terms.losses",
        "data.order.partition",
        "data.binaries",
        "test_objective.py::test_kl",
        "test_objectives.py::test_kl_agrees_with_torch_distributions",
        "--objective.betas",
        "--objectives.beta",
    ],
)
def test_a_name_that_is_not_there_is_found_out(name: str) -> None:
    assert not exists(name)


def test_every_displayed_formula_has_a_function_and_a_test() -> None:
    displayed = re.findall(r"\$\$(.+)\$\$\n\n((?:.+\n)+)", TEXT)
    assert len(displayed) == TEXT.count("$$") / 2 > 20
    for formula, source in displayed:
        kinds = {"::" in name for name in re.findall(r"`(.+?)`", source)}
        assert kinds == {True, False}, formula


def test_the_mathematics_survives_markdown() -> None:
    """GitHub reads it as Markdown first: escapes lose their backslash, and an underscore after punctuation starts emphasis."""
    assert TEXT.count("$") % 2 == 0
    for displayed, inline in FORMULAS:
        formula = displayed or inline
        assert formula.count("{") == formula.count("}"), formula
        assert re.findall(r"\\[^a-zA-Z]|[*<>`\n]|(?<!\w)_|\]\(", formula) == [], formula
        assert not set(re.findall(r"\\([a-z]+)", formula)) & set(REFUSED), formula
        assert inline == inline.strip(), formula
    around = re.sub(r"\$\$.+\$\$", "", TEXT).split("$")[::2]
    assert all(re.search(r"[\s(]$", before) for before in around[:-1]), "what stands before a formula"
    assert all(re.match(r"[\s.,;:)]", after) for after in around[1:]), "what stands after a formula"
