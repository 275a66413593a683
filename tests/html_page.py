"""A page of HTML as a reader without a browser takes it: its elements and their text."""

import json
from html.parser import HTMLParser
from typing import Any

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

    def figures(self) -> dict[str, Any]:
        """What the page's script draws, by the words that a screen reader says of it."""
        drawn: dict[str, Any] = json.loads("".join(self.one("script", id="figures").parts))
        return {
            each.attributes["aria-label"] or "": drawn[each.attributes["id"] or ""] for each in self.all("div", class_="plot")
        }
