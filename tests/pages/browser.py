"""A headless Chromium that looks at a page of one file."""

from __future__ import annotations

import shutil
import time
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import pytest

PHONE, DESK = {"width": 390, "height": 844}, {"width": 1280, "height": 900}
NAMES = ("chromium", "chromium-browser", "google-chrome")
CHROMIUM = next(filter(None, map(shutil.which, NAMES)), None)
needs_chromium = pytest.mark.skipif(CHROMIUM is None, reason="needs Chromium: apt-get install chromium")


class Seen(NamedTuple):
    """What a page did while it was open: console messages, requests outside it, seconds to load."""

    messages: list[str]
    requests: list[str]
    seconds: float


class Browser:
    """Opens pages; `page` is the open one."""

    def __init__(self, chromium) -> None:
        self._chromium, self._context, self.page = chromium, None, None

    def open(self, file: Path, viewport: dict = DESK, scheme: str = "light") -> Seen:
        self.close()
        self._context = self._chromium.new_context(viewport=viewport, color_scheme=scheme)
        self.page = self._context.new_page()
        messages, requests = [], []
        self.page.on("console", lambda message: messages.append(message.text))
        self.page.on("pageerror", lambda error: messages.append(str(error)))
        self.page.on("request", lambda request: requests.append(request.url))
        start = time.perf_counter()
        self.page.goto(file.resolve().as_uri(), wait_until="load")
        seconds = time.perf_counter() - start
        outside = [url[:80] for url in requests if not url.startswith("data:") and url != file.resolve().as_uri()]
        return Seen(messages, outside, seconds)

    def evaluate(self, script: str):
        return self.page.evaluate(script)

    def close(self) -> None:
        if self._context is not None:
            self._context.close()


@pytest.fixture(scope="module")
def browser() -> Iterator[Browser]:
    playwright = pytest.importorskip("playwright.sync_api")
    with playwright.sync_playwright() as driver:
        chromium = driver.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"])
        opened = Browser(chromium)
        yield opened
        opened.close()
        chromium.close()


# Images that are not shown or have no text for those who cannot see them.
BROKEN_IMAGES = "[...document.images].filter(image => !image.naturalWidth || !image.alt.trim()).length"
BACKGROUND = "getComputedStyle(document.body).backgroundColor"
OVERFLOW = "document.documentElement.scrollWidth - window.innerWidth"
