"""A headless Chromium, where one is to be had, and what a person would see at once: a clipped block, a scroll to the side, an error."""

from __future__ import annotations

import shutil
import threading
from collections.abc import Iterator
from functools import partial
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest

WIDTHS = {"desktop": 1920, "laptop": 1366, "phone": 390}
SCHEMES = ("light", "dark")
PROGRAMS = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable")
CLIPPED = """() => {
  const width = document.documentElement.clientWidth, found = [];
  if (document.documentElement.scrollWidth > width + 1) found.push(`the page scrolls sideways: ${document.documentElement.scrollWidth} > ${width}`);
  const scrolls = (e) => { for (; e && e !== document.body; e = e.parentElement) {
    const x = getComputedStyle(e).overflowX; if (x === "auto" || x === "scroll" || (x === "hidden" && e.matches(".headerlink, .md-clipboard"))) return true; } return false; };
  for (const e of document.querySelectorAll("article *, main *")) {
    const box = e.getBoundingClientRect(), style = getComputedStyle(e);
    if (!box.width || !box.height || style.visibility === "hidden" || style.display === "none" || style.position === "fixed") continue;
    if (box.right > width + 1 && !scrolls(e)) found.push(`${e.tagName}.${e.className} ends at ${Math.round(box.right)} of ${width}: ${(e.textContent || "").trim().slice(0, 60)}`);
    if (e.tagName === "IMG" && e.complete && !e.naturalWidth) found.push(`no picture: ${e.getAttribute("src")}`);
  }
  return found.slice(0, 5);
}"""
"""What in a page is cut off: every element ends inside the window, or inside a block that scrolls."""
OUTSIDE_OF_PICTURE = """() => {
  const svg = document.querySelector("svg"), box = svg.viewBox.baseVal, found = [];
  for (const text of svg.querySelectorAll("text")) {
    const own = text.getBBox(), matrix = text.getCTM().inverse ? svg.getCTM().inverse().multiply(text.getCTM()) : null;
    const at = (x, y) => { const p = svg.createSVGPoint(); p.x = x; p.y = y; return matrix ? p.matrixTransform(matrix) : p; };
    const a = at(own.x, own.y), b = at(own.x + own.width, own.y + own.height);
    if (a.x < box.x - 1 || b.x > box.x + box.width + 1 || b.y > box.y + box.height + 1) found.push(`${text.textContent} reaches ${Math.round(b.x)} of ${box.width}`);
  }
  return found;
}"""  # fmt: skip


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
    """What is wrong with pages at a width in a colour scheme: page -> what was clipped, failed or printed as an error."""
    context = browser.new_context(viewport={"width": width, "height": 900}, color_scheme=scheme)
    page, found, said = context.new_page(), {}, []
    page.on("console", lambda message: said.append(message.text) if message.type == "error" else None)
    page.on("pageerror", lambda error: said.append(str(error)))
    page.on("requestfailed", lambda request: said.append(f"failed: {request.url}"))
    page.on("request", lambda request: None if request.url.startswith((address, "data:", "blob:", "file:")) else said.append(f"asked {request.url}"))  # fmt: skip
    for name in pages:
        said.clear()
        page.goto(f"{address}/{name}" if address else name, wait_until="load")
        if wrong := [*page.evaluate(CLIPPED), *said]:
            found[name] = list(wrong)
    context.close()
    return found
