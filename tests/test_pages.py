"""The pages: what a link names is there, and what a command says is accepted. They are read on GitHub and on the site alike."""

import re
import shlex
from pathlib import Path

import pytest

from tests.helpers import ROOT
from vae_dist.__main__ import COMMANDS
from vae_dist.options import parse

PAGES = sorted(path for part in ("*.md", "docs/**/*.md", "launch/*.md", ".github/**/*.md") for path in ROOT.glob(part))
LINK = re.compile(r"\[[^\]]+\]\(([^)\s]+)\)")


def without_code(page: Path) -> str:
    """A page's text but for code, in which brackets are no links and hashes no headings."""
    return re.sub(r"^```.*?^```|`[^`\n]*`", "", page.read_text(encoding="utf-8"), flags=re.DOTALL | re.MULTILINE)


def anchors(page: Path) -> set[str]:
    """The names that GitHub, and mkdocs.yml, give to headings."""
    text = re.sub(r"^```.*?^```", "", page.read_text(encoding="utf-8"), flags=re.DOTALL | re.MULTILINE)
    titles = re.findall(r"^#+ +(.+?) *$", text, re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", title.lower()).replace(" ", "-") for title in titles}


def broken(page: Path, link: str) -> bool:
    """Whether a link inside the repository leads nowhere."""
    if re.match(r"[a-z]+:", link):
        return False  # elsewhere: not for a test without a network
    path, _, anchor = link.partition("#")
    target = (page.parent / path).resolve() if path else page
    if not target.exists() or not target.is_relative_to(ROOT.resolve()):
        return True
    return bool(anchor) and anchor not in anchors(target)


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_every_link_leads_somewhere(page: Path) -> None:
    assert [link for link in LINK.findall(without_code(page)) if broken(page, link)] == []


@pytest.mark.parametrize(
    "link", ["docs/nowhere.md", "docs/theory.md#no-such-heading", "#no-such-heading", "../outside.md", "docs/x.png"]
)
def test_a_link_to_nowhere_is_found_out(link: str) -> None:
    assert broken(ROOT / "README.md", link)


def test_links_are_looked_for_where_they_are() -> None:
    assert len(PAGES) > 15
    links = {(page.name, link) for page in PAGES for link in LINK.findall(without_code(page))}
    assert {("README.md", "docs/speed.png"), ("distributed.md", "../launch/README.md")} <= links
    assert not broken(ROOT / "docs" / "tutorial.md", "../README.md#a-runs-folder")


def test_every_command_is_in_the_reference() -> None:
    shown = re.findall(
        r"^## (.+)\n\n<!-- vae-dist \1 --help -->$", (ROOT / "docs/reference/commands.md").read_text(), re.MULTILINE
    )
    assert set(shown) == {name for group in COMMANDS.values() for name in group}


def trainings(page: Path) -> list[list[str]]:
    """The options of every whole command on a page that starts a training."""
    text = page.read_text(encoding="utf-8").replace("\\\n", " ")
    lines = re.findall(r"(?:vae-dist train|-m vae_dist\.train) (--[^`\n#]*)", text)
    whole = [line for line in lines if not re.search(r"…|\.\.\.|\[|--help|\bFILE\b", line)]
    return [shlex.split(line.replace("$seed", "0")) for line in whole]


@pytest.mark.parametrize("page", [page for page in PAGES if trainings(page)], ids=lambda page: str(page.relative_to(ROOT)))
def test_every_training_on_a_page_has_options_that_exist(page: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(ROOT)
    for options in trainings(page):
        parse(options)


def test_trainings_are_found() -> None:
    assert sum(len(trainings(page)) for page in PAGES) > 20
    assert ["--config", "glyphs", "--seed", "0", "--output", "runs/seed0"] in trainings(ROOT / "docs" / "howto-compare.md")
