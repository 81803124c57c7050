"""The dashboard without data, with damaged tables, read-only, and with a token."""

import urllib.error
import urllib.request
from collections.abc import Iterator
from pathlib import Path

import pytest
from selenium.webdriver import Chrome

from streaming.cli.app import EXIT_USAGE
from streaming.settings import Settings
from tests.conftest import command_here
from tests.streaming.browser import chromium
from tests.streaming.dashboard.visitor import Visitor, running_dashboard
from tests.streaming.history import commit_batch

TOKEN = "a-token-for-the-tests"  # noqa: S105


@pytest.fixture(scope="module")
def chrome() -> Iterator[Chrome]:
    with chromium(width=1400) as browser:
        yield browser


@pytest.fixture
def settings(tmp_path: Path, jars_dir: Path) -> Settings:
    home = tmp_path / "home"
    home.mkdir()
    return Settings(home=home, jars=jars_dir)


def test_empty_home_other_origins_missing_broker_and_damaged_table(settings: Settings, chrome: Chrome) -> None:
    first_steps = {
        "": "No predictions yet: publish images",
        "predictions": "No predictions yet: publish images",
        "upload": "The prediction appears here",
        "quarantine": "The quarantine is empty",
        "models": "No models yet: create one with",
        "drift": "No data yet",
    }
    with running_dashboard(settings) as address:
        visitor = Visitor(chrome, address)
        for page, text in first_steps.items():
            visitor.open(page)
            visitor.waits_for_text(text)
        assert not Path(settings.place.tables).exists()
        _check_that_another_origin_cannot_open_the_websocket(chrome, address)

        commit_batch(settings, 0, {0: (0, 30)}, bad={3})
        visitor.open("predictions")
        visitor.waits_for_text("29 predictions")
        visitor.open("quarantine")
        visitor.click("Replay 1 message")
        visitor.click("Confirm replay")
        visitor.waits_for_text("no Kafka broker: the one of .* is not running")

        log = Path(settings.place.tables) / "predictions" / "_delta_log"
        (log / f"{len(list(log.glob('*.json'))):020}.json").write_text("{")
        visitor.open("predictions")
        visitor.waits_for_text("table predictions in .* cannot be read")
        assert "Traceback" not in visitor.text()


def test_token_is_required_and_read_only_dashboard_offers_no_changes(settings: Settings, chrome: Chrome) -> None:
    commit_batch(settings, 0, {0: (0, 30)}, bad={3})
    file = settings.work_dir / "token"
    file.write_text(TOKEN)
    with running_dashboard(settings, "--read-only", IMAGESTREAM_DASHBOARD_TOKEN_FILE=str(file)) as address:
        for path in ("", "_stcore/health", "_stcore/host-config", "media/x.png"):
            with pytest.raises(urllib.error.HTTPError, match="401"):
                urllib.request.urlopen(f"{address}/{path}")  # noqa: S310
        visitor = Visitor(chrome, address)
        chrome.get(address)
        visitor.waits_for_text("Enter the token")
        (box,) = visitor.all("input[name=token]")
        box.send_keys("wrong")
        box.submit()
        visitor.waits_for_text("Wrong token")
        (box,) = visitor.all("input[name=token]")
        box.send_keys(TOKEN)
        box.submit()
        visitor.waits_for_text("Throughput")

        chrome.delete_all_cookies()
        chrome.get(f"{address}/quarantine?token={TOKEN}")
        visitor.waits_for_text("not_an_image|truncated")
        assert chrome.current_url == f"{address}/quarantine"
        assert "Replay 1" not in visitor.text()
        visitor.open("upload")
        visitor.waits_for_text("read-only")
        assert not visitor.all("input[type=file]")
        visitor.open("predictions")
        visitor.click("Open")
        visitor.waits_for_text("True label")
        assert "Save label" not in visitor.text()


@pytest.mark.parametrize("host", ["0.0.0.0", "::"])  # noqa: S104
def test_listening_on_all_interfaces_requires_a_token(settings: Settings, host: str) -> None:
    code, _, error = command_here("--home", settings.home, "dashboard", "--host", host)
    assert code == EXIT_USAGE
    (line,) = error.splitlines()
    assert "requires a token" in line
    assert "IMAGESTREAM_DASHBOARD_TOKEN_FILE" in line


def _check_that_another_origin_cannot_open_the_websocket(chrome: Chrome, address: str) -> None:
    script = """
        const done = arguments[arguments.length - 1];
        const socket = new WebSocket(arguments[0]);
        socket.onopen = () => done("open"); socket.onerror = () => done("refused");
    """
    socket = address.replace("http", "ws") + "/_stcore/stream"
    chrome.get("data:text/html,another site")
    assert chrome.execute_async_script(script, socket) == "refused"
    chrome.get(f"{address}/_stcore/health")
    assert chrome.execute_async_script(script, socket) == "open"
