"""The site that `make docs` built, in a browser, without a network or a server.

Formulas are typeset, search finds, nothing is asked of another host, and no page is wider than the screen.
"""

import os
import re
from pathlib import Path

import pytest
from playwright.sync_api import Browser

from tests.browser import opened
from tests.helpers import ROOT

pytestmark = pytest.mark.slow
SITE = ROOT / "build" / "site"
PAGES = sorted(SITE.rglob("*.html"))


def address(page: str) -> str:
    return (SITE / page).as_uri()


@pytest.mark.parametrize("width", [1280, 390])
def test_every_page_is_as_wide_as_the_screen_and_in_order(browser: Browser, width: int) -> None:
    assert len(PAGES) > 20
    for path in PAGES:
        if path.name == "404.html":  # for a server: its links begin with a slash
            continue
        with opened(browser, path.as_uri(), width=width) as page:
            assert page.evaluate("document.documentElement.scrollWidth") == width, path
            assert page.locator(".katex-error").count() == 0, path
            assert page.locator("h1").count() == 1, path


def test_every_formula_is_typeset(browser: Browser) -> None:
    text = (ROOT / "docs" / "theory.md").read_text(encoding="utf-8")
    displayed = re.findall(r"\$\$.+?\$\$", text)
    inline = re.findall(r"\$.+?\$", re.sub(r"\$\$.+?\$\$", "", text))
    with opened(browser, address("docs/theory.html")) as page:
        assert page.locator(".katex-display").count() == len(displayed) > 20
        assert page.locator(".katex").count() == len(displayed) + len(inline)
        assert page.evaluate("document.fonts.check('1em KaTeX_Main')"), "the fonts are there"
        assert "$" not in page.locator("article").inner_text()


def test_search_finds_without_a_server(browser: Browser) -> None:
    with opened(browser, address("index.html")) as page:
        page.get_by_placeholder("Search").fill("free bits")
        found = page.locator(".md-search-result__link", has_text="free")
        found.first.wait_for()
        assert any("theory" in (link.get_attribute("href") or "") for link in found.all())


def test_the_reference_is_what_the_docstrings_say(browser: Browser) -> None:
    with opened(browser, address("docs/reference/options.html")) as page:
        assert "Images of one optimizer step, over all processes" in page.locator("article").inner_text()
    with opened(browser, address("docs/reference/commands.html")) as page:
        assert "usage: vae-dist evaluate" in page.locator("article").inner_text()
    with opened(browser, address("docs/reference/python.html")) as page:
        assert "Trains as python -m vae_dist.train does" in page.locator("article").inner_text()


def test_nothing_in_the_site_tells_of_this_machine() -> None:
    home = re.compile(re.escape(str(ROOT)) + "|" + re.escape(os.path.expanduser("~")) + "/")
    texts = {
        path: path.read_text(encoding="utf-8") for path in SITE.rglob("*") if path.suffix in (".html", ".json", ".js", ".xml")
    }
    assert [str(path) for path, text in texts.items() if home.search(text)] == []


def test_pages_come_from_where_links_expect_them() -> None:
    names = {str(path.relative_to(SITE)) for path in PAGES}
    assert {"index.html", "docs/tutorial.html", "launch/index.html", "CONTRIBUTING.html"} <= names
    assert (SITE / "configs" / "mnist.yaml").is_file()
    assert not (Path(SITE) / "docs" / "index.html").exists()
