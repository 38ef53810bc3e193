"""A real Chromium for tests and screenshots, and what it must never do."""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest
from playwright.sync_api import Browser, BrowserContext, ConsoleMessage, Page, expect, sync_playwright

# As root, and without a word to Google.
ARGUMENTS = [
    "--no-sandbox",
    "--disable-gpu",
    "--disable-quic",
    "--no-first-run",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
]
# A busy machine is no fault of the page.
PATIENCE_MILLISECONDS = 20_000
expect.set_options(timeout=PATIENCE_MILLISECONDS)


def chromium() -> str:
    """Its path. Without one the test is skipped, but in CI it fails."""
    path = shutil.which("chromium")
    if path:
        return path
    reason = "Chromium is not on PATH (apt-get install chromium)"
    if os.environ.get("CI") == "true":
        pytest.fail(reason)
    pytest.skip(reason)


@contextmanager
def launched(path: str) -> Iterator[Browser]:
    """A browser; gone afterwards."""
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=path, args=ARGUMENTS)
        yield browser
        browser.close()


class Visit:
    """One visitor: a context of its own, with everything that it asked for and that went wrong."""

    def __init__(self, browser: Browser, url: str, **options: Any) -> None:
        self.url = url
        self.context: BrowserContext = browser.new_context(base_url=url, **options)
        self.context.set_default_timeout(PATIENCE_MILLISECONDS)
        self.requests: list[str] = []
        self.errors: list[str] = []
        self.context.on("request", lambda request: self.requests.append(request.url))
        self.context.on("console", self._note)
        self.context.on("weberror", lambda error: self.errors.append(str(error.error)))
        self.page: Page = self.context.new_page()

    def _note(self, message: ConsoleMessage) -> None:
        if message.type in ("error", "warning"):
            self.errors.append(message.text)

    def open(self, path: str = "/") -> Page:
        """Load a path anew."""
        self.page.goto("about:blank")
        self.page.goto(path)
        return self.page

    def end(self, *, expected_errors: bool = False) -> None:
        """Close; fail on any error, and on any request to elsewhere."""
        self.context.close()
        elsewhere = [url for url in self.requests if not url.startswith((self.url, "blob:", "data:", "about:"))]
        assert not elsewhere, elsewhere
        assert expected_errors or not self.errors, self.errors
