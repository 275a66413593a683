"""Pages in a real browser: Debian's Chromium, headless, with no way to any other host."""

import contextlib
import os
import shutil
from collections.abc import Iterator
from typing import Literal
from urllib.parse import urlparse

import pytest
from playwright.sync_api import Browser, Page, Route, sync_playwright

WIDE, NARROW = 1280, 390  # pixels


@contextlib.contextmanager
def chromium() -> Iterator[Browser]:
    """A browser; the test is skipped where none is installed."""
    program = shutil.which("chromium") or shutil.which("google-chrome")
    if program is None:
        pytest.skip("needs a browser: Debian's package chromium")
    arguments = ["--no-sandbox"] if os.geteuid() == 0 else []
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=program, args=arguments)
        yield browser
        browser.close()


@contextlib.contextmanager
def opened(browser: Browser, address: str, width: int = WIDE, scheme: Literal["light", "dark"] = "light") -> Iterator[Page]:
    """A page that is fully loaded. What went wrong in it by the end of the block fails the test: errors of scripts, messages
    of the console, and requests, of which none may go to another host than the page's.
    """
    wrong: list[str] = []
    page = browser.new_page(viewport={"width": width, "height": 900}, color_scheme=scheme)

    def route(request: Route) -> None:
        host = urlparse(request.request.url).hostname
        if host in (None, "127.0.0.1", "localhost", urlparse(address).hostname):
            request.continue_()
        else:
            wrong.append(f"asks {host}")
            request.abort()

    page.route("**/*", route)
    page.on("pageerror", lambda error: wrong.append(str(error)))
    page.on("console", lambda message: wrong.append(message.text) if message.type in ("error", "warning") else None)
    page.on("requestfailed", lambda request: wrong.append(f"failed: {request.url[:200]}"))
    page.goto(address, wait_until="load")
    try:
        yield page
    finally:
        page.close()
    assert wrong == [], wrong
