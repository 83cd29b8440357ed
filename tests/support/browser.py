"""Debian's Chromium, driven by Playwright, for tests of the page."""

import asyncio
import socket
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

import pytest
import uvicorn
from playwright.sync_api import Browser, Page, sync_playwright
from starlette.types import ASGIApp

_PROGRAMS = [Path("/usr/bin/chromium-headless-shell"), Path("/usr/bin/chromium")]
"""The first has the same engine, and takes less processor time because it can't open windows."""
CHROMIUM = next((program for program in _PROGRAMS if program.exists()), None)
_ARGUMENTS = [
    "--no-sandbox",  # tests run as root in containers
    "--disable-gpu",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
    "--no-first-run",
    "--enable-precise-memory-info",
]
WAIT_MS = 120_000  # for a busy machine: only what fails waits so long

needs_chromium = pytest.mark.skipif(
    CHROMIUM is None, reason=f"no {_PROGRAMS[0]}: apt-get install {_PROGRAMS[0].name} (Debian)"
)


@dataclass
class Visit:
    """An open page, and the errors that it reported."""

    page: Page
    complaints: list[str] = field(default_factory=list)

    def text(self, selector: str) -> str:
        return self.page.locator(selector).inner_text()

    def until(self, condition: str | Callable[[], bool], limit_s: float = WAIT_MS / 1000) -> None:
        """Waits until an expression in JavaScript, or a Python function, is true.

        Playwright's own wait needs eval, which the page forbids.
        """
        deadline = time.monotonic() + limit_s
        while not (condition() if callable(condition) else self.page.evaluate(condition)):
            assert time.monotonic() < deadline, f"waited in vain for {condition}"
            self.page.wait_for_timeout(50)

    def overflow(self) -> int:
        """By how many pixels the page is wider than its window."""
        root = "document.documentElement"
        width = self.page.evaluate(f"{root}.scrollWidth - {root}.clientWidth")
        assert isinstance(width, int)
        return width


@contextmanager
def chromium() -> Iterator[Browser]:
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=CHROMIUM, args=_ARGUMENTS)
        try:
            yield browser
        finally:
            browser.close()


@contextmanager
def visit(
    browser: Browser,
    address: str,
    *,
    width: int = 1440,
    height: int = 4000,
    scheme: Literal["light", "dark"] = "light",
    ready: str = "document.querySelector('#age').textContent.startsWith('read ')"
    " && !document.body.classList.contains('unread')",
) -> Iterator[Visit]:
    """Opens the page with a new browser profile. `ready`: is true once the page shows its contents; by default the
    dashboard's.

    Afterwards, checks that the page has not written an error to its console.
    """
    context = browser.new_context(
        viewport={"width": width, "height": height}, color_scheme=scheme, reduced_motion="reduce"
    )
    context.set_default_timeout(WAIT_MS)
    visit = Visit(context.new_page())
    visit.page.on("pageerror", lambda error: visit.complaints.append(str(error)))
    visit.page.on(
        "console", lambda said: visit.complaints.append(said.text) if said.type == "error" else None
    )
    try:
        visit.page.goto(address)
        visit.until(ready)
        yield visit
    finally:
        context.close()
    assert not visit.complaints, visit.complaints


@contextmanager
def served(app: ASGIApp) -> Iterator[str]:
    """Runs the application on a thread of its own, and yields its address."""
    with socket.create_server(("127.0.0.1", 0)) as listener:
        config = uvicorn.Config(app, log_config=None, lifespan="off", ws="none", timeout_graceful_shutdown=1)
        server = uvicorn.Server(config)
        thread = threading.Thread(target=lambda: asyncio.run(server.serve([listener])))
        thread.start()
        try:
            yield f"http://127.0.0.1:{listener.getsockname()[1]}"
        finally:
            server.should_exit = server.force_exit = True
            thread.join()
