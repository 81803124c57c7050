"""A headless browser, and the requests of its pages."""

import json
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
from selenium.webdriver import Chrome, ChromeOptions
from selenium.webdriver.chrome.service import Service

NEEDED = "this test requires Chromium: install it, e.g. by `apt-get install chromium chromium-driver`"


@contextmanager
def chromium(*, dark: bool = False, width: int = 1200) -> Iterator[Chrome]:
    """Headless Chromium, `width` pixels wide, that logs its requests."""
    browser = shutil.which("chromium") or shutil.which("google-chrome")
    driver = shutil.which("chromedriver")
    if not browser or not driver:
        pytest.fail(NEEDED)
    options = ChromeOptions()
    options.binary_location = browser
    arguments = ("--headless=new", "--no-sandbox", "--disable-gpu", "--disable-dev-shm-usage")
    for argument in (*arguments, "--force-prefers-reduced-motion"):  # animations would be drawn without a GPU
        options.add_argument(argument)
    options.set_capability("goog:loggingPrefs", {"performance": "ALL"})
    chrome = Chrome(options, Service(driver))
    try:
        prefer(chrome, dark=dark)
        metrics = {"width": width, "height": 900, "deviceScaleFactor": 1, "mobile": False}
        chrome.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", metrics)
        yield chrome
    finally:
        chrome.quit()


def prefer(chrome: Chrome, *, dark: bool) -> None:
    """Set the colour scheme that the browser prefers, for pages opened from now on."""
    scheme = [{"name": "prefers-color-scheme", "value": "dark" if dark else "light"}]
    chrome.execute_cdp_cmd("Emulation.setEmulatedMedia", {"features": scheme})


def requested(chrome: Chrome) -> set[str]:
    """The URLs requested by all pages so far, except `data:` URLs."""
    events = (json.loads(entry["message"])["message"] for entry in chrome.get_log("performance"))
    urls = {event["params"]["request"]["url"] for event in events if event["method"] == "Network.requestWillBeSent"}
    return {url for url in urls if not url.startswith("data:")}


def open_page(chrome: Chrome, path: Path) -> str:
    """Open a file and return its URL."""
    chrome.get(path.as_uri())
    return path.as_uri()
