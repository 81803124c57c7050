"""A dashboard process, and a browser that visits it."""

import os
import re
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, TypeVar

from selenium.common.exceptions import StaleElementReferenceException
from selenium.webdriver import Chrome
from selenium.webdriver.common.by import By
from selenium.webdriver.common.keys import Keys
from selenium.webdriver.remote.webelement import WebElement

from streaming.settings import Settings
from tests.conftest import CHECKOUT

T = TypeVar("T")
SCREENSHOTS = CHECKOUT / "docs" / "images" if os.environ.get("IMAGESTREAM_SCREENSHOTS") else None
PATIENCE_S = 300.0
POLL_S = 0.4  # reading the text of a page takes a tenth of that


def environment_of(settings: Settings, **more: str) -> dict[str, str]:
    """The environment of a process of this service."""
    environment = {"IMAGESTREAM_JARS": str(settings.jars), "IMAGESTREAM_TOPIC": settings.topic}
    if settings.bootstrap_servers:
        environment["IMAGESTREAM_BOOTSTRAP_SERVERS"] = settings.bootstrap_servers
    return os.environ | environment | more


@contextmanager
def running_dashboard(settings: Settings, *arguments: str, **environment: str) -> Iterator[str]:
    """Run a dashboard for the block; yields its address, and checks that it exits with 0 on SIGTERM."""
    command = [sys.executable, "-m", "streaming", "--home", str(settings.home), "dashboard", "--port", "0", *arguments]
    log = settings.work_dir.parent / "dashboard.log"
    with log.open("w", encoding="utf-8") as errors:
        process = subprocess.Popen(
            command, env=environment_of(settings, **environment), stdout=subprocess.PIPE, stderr=errors, text=True
        )
    assert process.stdout is not None
    try:
        line = process.stdout.readline()
        found = re.search(r"http://\S+", line)
        assert found, line + log.read_text()
        yield found[0]
        process.terminate()
        assert process.wait(300) == 0, log.read_text()
        assert "Traceback" not in log.read_text()
    finally:
        process.kill()
        process.wait()
        process.stdout.close()


def wait_for(condition: Callable[[], T], patience_s: float = PATIENCE_S) -> T:
    """Wait for a true result and return it."""
    give_up = time.monotonic() + patience_s
    while True:
        try:
            if found := condition():
                return found
        except StaleElementReferenceException:
            pass  # it was rendered again
        assert time.monotonic() < give_up, f"the condition was not met within {patience_s:.0f} s"
        time.sleep(POLL_S)


@dataclass(frozen=True)
class Visitor:
    """A browser on the dashboard."""

    chrome: Chrome
    address: str

    def open(self, page: str) -> None:
        """Open a page, from another one by its link, and wait until it is rendered."""
        url = f"{self.address}/{page}"
        links = [] if self.chrome.current_url == url else self.all("[data-testid=stTopNavLink]")
        link = next((one for one in links if one.get_property("href") == url), None)
        if link is None:
            self.load(page)
            return
        self.chrome.execute_script("arguments[0].click()", link)
        self._wait_until_rendered(page)

    def load(self, page: str) -> None:
        """Open a page by its URL, which loads Streamlit's scripts again and takes ten times the time of a link."""
        self.chrome.get(f"{self.address}/{page}")
        self._wait_until_rendered(page)

    def _wait_until_rendered(self, page: str) -> None:
        heading = (page or "live").title()
        wait_for(lambda: any(one.text == heading for one in self.all("[data-testid=stHeading]")))
        self.settle()

    def settle(self) -> None:
        """Wait until the script of the page has finished."""
        wait_for(lambda: not self.all("[data-testid=stStatusWidget]"))

    def all(self, css: str) -> list[WebElement]:
        found: list[WebElement] = self.chrome.find_elements(By.CSS_SELECTOR, css)
        return found

    def text(self) -> str:
        return str(self.chrome.execute_script("return document.body.innerText"))

    def waits_for_text(self, pattern: str, patience_s: float = PATIENCE_S) -> re.Match[str]:
        """Wait for a match of a pattern in the text of the page, and return it."""
        give_up = time.monotonic() + patience_s
        while not (found := re.search(pattern, self.text())):
            assert time.monotonic() < give_up, f"{pattern!r} is not in: {self.text()}"
            time.sleep(POLL_S)
        return found

    def click(self, label: str) -> None:
        """Click the first enabled button whose text starts with a match of `label`."""

        def find() -> WebElement | None:
            buttons = (one for one in self.all("button") if one.is_enabled() and one.is_displayed())
            return next((one for one in buttons if re.match(label, _text(one))), None)

        button = wait_for(find)
        self.chrome.execute_script("arguments[0].scrollIntoView({block: 'center'})", button)
        self.chrome.execute_script("arguments[0].click()", button)

    def choose(self, label: str, option: str) -> None:
        """Type an option into the select box with this label, and select it."""
        box = wait_for(lambda: self.all(f"input[aria-label*='{label}']"))[-1]
        self.chrome.execute_script("arguments[0].scrollIntoView({block: 'center'})", box)
        box.click()
        box.send_keys(option)
        wait_for(lambda: any(option in one.text for one in self.all("[role=option]")[:1]))
        box.send_keys(Keys.ENTER)
        self.settle()

    def show(self, name: str) -> None:
        """Save a screenshot for the documentation, if screenshots are enabled."""
        if SCREENSHOTS is None:
            return
        time.sleep(1.5)  # until the plots are rendered
        height = self.chrome.execute_script(
            "const main = document.querySelector('[data-testid=stMainBlockContainer]');"
            "return main ? main.scrollHeight : 900"
        )
        self._resize(max(560, min(height + 20, 1700)))
        time.sleep(1.0)
        SCREENSHOTS.mkdir(parents=True, exist_ok=True)
        self.chrome.save_screenshot(str(SCREENSHOTS / f"dashboard-{name}.png"))
        self._resize(900)

    def _resize(self, height: int) -> None:
        size = {"width": 1400, "height": height, "deviceScaleFactor": 1, "mobile": False}
        self.chrome.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", size)


def _text(element: Any) -> str:
    """The text of a button without the names of its icons."""
    return str(element.text).split("\n")[-1].strip()
