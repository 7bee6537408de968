"""The page in a headless Chromium, over the stand-in server. Skipped where Gradio 6, Playwright or Chromium is missing: `make test-studio`."""

from __future__ import annotations

import os
import shutil
from pathlib import Path

import pytest

pytest.importorskip("httpx")
pytest.importorskip("fastapi")
pytest.importorskip("uvicorn")

CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
SHOTS = os.environ.get("PERFUSION_SCREENSHOTS")  # a folder to look at the pages afterwards


@pytest.fixture(scope="module")
def chromium():
    pytest.importorskip("gradio", minversion="6")
    playwright = pytest.importorskip("playwright.sync_api")
    with playwright.sync_playwright() as started:
        if CHROMIUM is None and not os.path.exists(started.chromium.executable_path):
            pytest.skip("there is no Chromium")
        browser = started.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"])
        yield browser
        browser.close()


def free_port() -> int:
    import socket

    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        return found.getsockname()[1]


class Studio:
    """One page over one server. `open` gives a tab of the browser that records what it asks for."""

    def __init__(self, browser, server, key=None):
        from perfusion.studio import Client, launch

        self.browser, self.server, self.port = browser, server, free_port()
        self.asked: list[str] = []
        self.page = launch(Client(server, key), port=self.port, block=False)

    def open(self, width=1200, height=900, shows=None):
        """shows: a concept that one of the lists is to show; before the page has heard of the server it may miss what is typed."""
        tab = self.browser.new_page(viewport={"width": width, "height": height})
        tab.set_default_timeout(30_000)
        tab.on("request", lambda request: self.asked.append(request.url))
        tab.goto(f"http://127.0.0.1:{self.port}")
        tab.get_by_label("Prompt").first.wait_for()
        if shows:
            tab.wait_for_function("shown => [...document.querySelectorAll('input')].some(input => input.value === shown)", arg=shows)
        return tab

    def close(self):
        self.page.close()


def shot(tab, name):
    if SHOTS:
        Path(SHOTS).mkdir(parents=True, exist_ok=True)
        tab.screenshot(path=f"{SHOTS}/{name}.png", full_page=True)
