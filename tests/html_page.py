"""A page of HTML as a reader without a browser takes it: its elements and their text."""

import json
import re
from collections.abc import Callable
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest

from tests.helpers import Outcome

_VOID = {"img", "input", "link", "meta", "br"}
_IN_LINE = {"a", "code", "output", "script", "span", "strong"}


class Element:
    def __init__(self, tag: str, attributes: dict[str, str | None]) -> None:
        self.tag, self.attributes = tag, attributes
        self.parts: list[str] = []  # texts inside, also those of elements in it

    @property
    def text(self) -> str:
        return " ".join("".join(self.parts).split())


class HtmlPage(HTMLParser):
    """Raises AssertionError where elements are not closed in the order in which they were opened."""

    def __init__(self, content: str) -> None:
        super().__init__()
        self.elements: list[Element] = []
        self._open: list[Element] = []
        self.feed(content)
        self.close()
        assert self._open == []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        if tag not in _IN_LINE:
            self.handle_data(" ")
        element = Element(tag, dict(attrs))
        self.elements.append(element)
        if tag not in _VOID:
            self._open.append(element)

    def handle_endtag(self, tag: str) -> None:
        assert self._open.pop().tag == tag

    def handle_data(self, data: str) -> None:
        for element in self._open:
            element.parts.append(data)

    def all(self, tag: str, **attributes: str) -> list[Element]:
        """The elements of a tag with some attributes."""
        wanted = {name.rstrip("_").replace("_", "-"): value for name, value in attributes.items()}
        return [each for each in self.elements if each.tag == tag and wanted.items() <= each.attributes.items()]

    def one(self, tag: str, **attributes: str) -> Element:
        [element] = self.all(tag, **attributes)
        return element

    def section(self, anchor: str) -> str:
        """The text of a section."""
        return self.one("section", id=anchor).text

    def figures(self) -> dict[str, Any]:
        """What the page's script draws, by the words that a screen reader says of it."""
        drawn: dict[str, Any] = json.loads("".join(self.one("script", id="figures").parts))
        return {
            each.attributes["aria-label"] or "": drawn[each.attributes["id"] or ""] for each in self.all("div", class_="plot")
        }


def reported(command: Callable[..., Outcome], *args: object) -> HtmlPage:
    """The page that a report is; the last line that the command prints names it."""
    outcome = command("report", *args)
    assert outcome.status == 0, outcome.err
    [(file, size)] = re.findall(r"^(.+) \((.+) MB\): open it in a browser$", outcome.out, re.MULTILINE)
    content = Path(file).read_text(encoding="utf-8")
    assert float(size) == pytest.approx(len(content.encode()) / 1e6, abs=0.06)
    return HtmlPage(content)
