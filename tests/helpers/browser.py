"""A headless Chromium, where one is to be had, and what a person would see at once: a clipped block, a side scroll, an error."""

from __future__ import annotations

import shutil
import threading
from collections.abc import Iterator
from functools import partial
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest

HERE = Path(__file__).parent
WIDTHS = {"desktop": 1920, "laptop": 1366, "phone": 390}
SCHEMES = ("light", "dark")
PROGRAMS = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable")
CLIPPED = (HERE / "clipped.js").read_text(encoding="utf-8")
"""Script that lists the cut-off elements of a page, which end neither inside the window nor inside a block that scrolls."""
OUTSIDE_OF_PICTURE = (HERE / "outside_of_picture.js").read_text(encoding="utf-8")


@pytest.fixture(scope="session")
def browser() -> Iterator[Any]:
    """Chromium by playwright; a test skips with the reason where there is none."""
    program = next((path for name in PROGRAMS if (path := shutil.which(name))), None)
    if program is None:
        pytest.skip(f"no browser: none of {', '.join(PROGRAMS)} is on the path. Type: apt-get install chromium")
    playwright = pytest.importorskip("playwright.sync_api", reason="playwright is not installed: pip install -e .[dev]")
    with playwright.sync_playwright() as driver:
        try:
            found = driver.chromium.launch(executable_path=program, args=["--no-sandbox"])
        except playwright.Error as error:
            pytest.skip(f"{program} does not start here: {str(error).splitlines()[0]}")
        yield found
        found.close()


class Quiet(SimpleHTTPRequestHandler):
    def log_message(self, format: str, *args: Any) -> None:
        """Say nothing."""


def serve(folder: Path) -> tuple[ThreadingHTTPServer, str]:
    """Serve a folder on this machine; the server must be shut down."""
    server = ThreadingHTTPServer(("127.0.0.1", 0), partial(Quiet, directory=str(folder)))
    threading.Thread(target=server.serve_forever, daemon=True).start()
    return server, f"http://127.0.0.1:{server.server_port}"


def troubles(browser: Any, address: str, pages: list[str], *, width: int, scheme: str) -> dict[str, list[str]]:
    """Return the faults of pages at a width in a colour scheme: page -> elements that are clipped, requests that failed, errors."""
    context = browser.new_context(viewport={"width": width, "height": 900}, color_scheme=scheme)
    page, found, said = context.new_page(), {}, []
    page.on("console", lambda message: said.append(message.text) if message.type == "error" else None)
    page.on("pageerror", lambda error: said.append(str(error)))
    # A request that the next page interrupts has not failed.
    page.on("requestfailed", lambda r: None if r.failure == "net::ERR_ABORTED" else said.append(f"failed: {r.url}"))
    page.on(
        "request",
        lambda request: (
            None
            if request.url.startswith((address, "data:", "blob:", "file:"))
            else said.append(f"asked {request.url}")
        ),
    )
    for name in pages:
        said.clear()
        page.goto(f"{address}/{name}" if address else name, wait_until="load")
        if wrong := [*page.evaluate(CLIPPED), *said]:
            found[name] = list(wrong)
    context.close()
    return found
