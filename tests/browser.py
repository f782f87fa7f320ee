"""A headless browser for pages that kvloom writes."""

from __future__ import annotations

import contextlib
import json
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest


@contextlib.contextmanager
def opened(page: Path | str) -> Iterator[Any]:
    """Chromium with a file or an address loaded. Skips where there is none; fails if it asks for anything outside itself:
    outside the file, or the address's server.
    """
    browser = shutil.which("chromium") or shutil.which("google-chrome") or shutil.which("chromium-browser")
    driver = shutil.which("chromedriver")
    if browser is None or driver is None:
        pytest.skip("no Chromium with chromedriver here (Debian: apt-get install chromium chromium-driver)")
    from selenium import webdriver
    from selenium.webdriver.chrome.service import Service

    options = webdriver.ChromeOptions()
    options.binary_location = browser
    for argument in ("--headless=new", "--no-sandbox", "--disable-dev-shm-usage", "--window-size=1200,2400"):
        options.add_argument(argument)
    options.set_capability("goog:loggingPrefs", {"browser": "ALL", "performance": "ALL"})
    chrome = webdriver.Chrome(options=options, service=Service(driver))
    try:
        address = page.resolve().as_uri() if isinstance(page, Path) else page
        chrome.get(address)
        yield chrome
        own = "file:" if isinstance(page, Path) else page
        asked = [json.loads(entry["message"])["message"] for entry in chrome.get_log("performance")]
        urls = [m["params"]["request"]["url"] for m in asked if m["method"] == "Network.requestWillBeSent"]
        assert [url for url in urls if not url.startswith((own, "data:", "chrome:"))] == []
        assert [entry for entry in chrome.get_log("browser") if entry["level"] == "SEVERE"] == []
    finally:
        chrome.quit()
