"""HTML in which every text is escaped, and pictures as part of the page."""

import base64
import html
import io
import json
from collections.abc import Iterable, Sequence
from typing import Any

from PIL import Image
from torch import Tensor

_VOID = {"img", "input", "link", "meta", "br"}


class Html(str):
    """Markup. Any other text is escaped on its way into it."""


def element(tag: str, *content: object, **attributes: object) -> Html:
    """`<tag …>content</tag>`. Attributes that are True stand alone, None and False are left out; `class_` is class, `data_x`
    is data-x.
    """
    named = {name.rstrip("_").replace("_", "-"): value for name, value in attributes.items()}
    kept = {name: value for name, value in named.items() if value is not None and value is not False}
    words = "".join(f" {name}" if value is True else f' {name}="{html.escape(str(value))}"' for name, value in kept.items())
    return Html(f"<{tag}{words}>" if tag in _VOID else f"<{tag}{words}>{joined(content)}</{tag}>")


def joined(parts: Iterable[object]) -> Html:
    """Markup and texts, one after the other; None is nothing."""
    texts = (part if isinstance(part, Html) else html.escape(str(part), quote=False) for part in parts if part is not None)
    return Html("".join(texts))


def table(head: Sequence[object], rows: Iterable[Sequence[object]], caption: str = "", **attributes: object) -> Html:
    """A table that may be scrolled sideways; the first cell of a row is its heading."""
    titles = element("tr", *(element("th", title, scope="col") for title in head))
    body = (
        element("tr", element("th", first, scope="row"), *(element("td", cell) for cell in cells)) for first, *cells in rows
    )
    name = element("caption", caption) if caption else None
    inner = element("table", name, element("thead", titles), element("tbody", *body), **attributes)
    return element("div", inner, class_="scroll", tabindex=0, role="region", aria_label=caption or "table")


def embedded_json(name: str, values: Any) -> Html:
    """Data for the page's script; nothing in it can end the element."""
    content = json.dumps(values, separators=(",", ":"), allow_nan=False).replace("<", "\\u003c")
    return element("script", Html(content), type="application/json", id=name)


def data_address(content: bytes, kind: str) -> str:
    """An address that holds the content itself."""
    return f"data:{kind};base64,{base64.b64encode(content).decode()}"


def picture(pixels: Tensor, is_exact: bool = True, **attributes: object) -> Html:
    """A uint8 picture (height, width, 1 or 3 channels), to the last bit or in less room."""
    content = io.BytesIO()
    Image.fromarray(pixels.squeeze(-1).contiguous().numpy()).save(content, format="webp", lossless=is_exact)
    height, width = pixels.shape[:2]
    return element("img", src=data_address(content.getvalue(), "image/webp"), width=width, height=height, **attributes)


def number(value: object, digits: int = 2) -> str:
    """A figure for a reader; a dash where there is none."""
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        return "—" if value is None else str(value)
    return f"{value:,}" if isinstance(value, int) else f"{value:,.{digits}f}"
