"""Metrics, access log and rate limits of the gateway; no request reaches Kafka."""

import json
import logging
import re
import shutil
import subprocess
from datetime import datetime
from io import StringIO
from pathlib import Path

import httpx
import pytest
from fastapi import FastAPI

from streaming.gateway.access import read_keys
from streaming.gateway.rate_limit import MAX_BUCKETS, RateLimit
from streaming.gateway.serve import make_server
from tests.streaming.gateway.test_connections import KEY, served
from tests.streaming.gateway.test_gateway import check_problem


def test_rate_limit_allows_a_burst_of_one_minute() -> None:
    now = 0.0
    limit = RateLimit(30, clock=lambda: now)
    assert [limit.take("a") for _ in range(30)] == [0.0] * 30
    assert limit.take("a") == pytest.approx(2.0)
    assert limit.take("b") == 0.0  # another address
    now = 2.0
    assert (limit.take("a"), limit.take("a")) == (0.0, pytest.approx(2.0))
    now = 1000.0
    assert [limit.take("a") for _ in range(30)] == [0.0] * 30  # at most the requests of one minute
    assert limit.take("a") > 0
    for number in range(MAX_BUCKETS):
        limit.take(f"other {number}")
    assert len(limit._buckets) == MAX_BUCKETS
    assert {RateLimit(0).take("a") for _ in range(100)} == {0.0}


def test_excess_requests_get_429_with_retry_after(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("IMAGESTREAM_GATEWAY_REQUESTS_PER_MINUTE", "3")
    with served(tmp_path, KEY) as port, httpx.Client(base_url=f"http://127.0.0.1:{port}") as client:
        assert [client.get("/v1/models").status_code for _ in range(3)] == [401] * 3  # wrong keys count, too
        refused = client.get("/v1/models", headers={"Authorization": f"Bearer {KEY}"})
        assert "at most 3 per minute" in check_problem(refused, 429)
        assert 1 <= int(refused.headers["Retry-After"]) <= 20
        assert client.get("/livez").status_code == 200  # probes are not counted


def test_limits_apply_per_key_and_in_total(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("IMAGESTREAM_GATEWAY_KEY_REQUESTS_PER_MINUTE", "2")
    monkeypatch.setenv("IMAGESTREAM_GATEWAY_TOTAL_REQUESTS_PER_MINUTE", "3")
    file = tmp_path / "keys"
    file.write_text(f"{KEY}\n\n {KEY[::-1]}\r\n{KEY}\n")
    file.chmod(0o600)
    keys = read_keys(file)
    assert keys == (KEY, KEY[::-1])
    with served(tmp_path, *keys) as port, httpx.Client(base_url=f"http://127.0.0.1:{port}") as client:

        def ask(key: str) -> httpx.Response:
            return client.get("/v1/models", headers={"X-API-Key": key})

        assert [ask("guess" * 4).status_code for _ in range(5)] == [401] * 5  # wrong keys do not count
        assert [ask(keys[0]).status_code for _ in range(2)] == [200] * 2
        assert "with one API key: at most 2 per minute" in check_problem(ask(keys[0]), 429)
        assert ask(keys[1]).status_code == 200
        refused = ask(keys[1])
        assert "in total: at most 3 per minute" in check_problem(refused, 429)
        assert 1 <= int(refused.headers["Retry-After"]) <= 20


def test_server_closes_no_handler_of_other_loggers() -> None:
    """As of absl, whose handler closes its stream; it exists in every process with TensorFlow."""
    stream = StringIO()

    class Handler(logging.StreamHandler[StringIO]):
        def close(self) -> None:
            self.stream.close()

    handler = Handler(stream)
    make_server(FastAPI())
    assert not stream.closed
    handler.close()
    assert stream.closed


def test_requests_are_counted_by_route_and_logged_as_json(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    with served(tmp_path, KEY, log_format="json") as port, httpx.Client(base_url=f"http://127.0.0.1:{port}") as client:
        key = {"Authorization": f"Bearer {KEY}"}
        assert client.get("/metrics").status_code == 401
        for one in ("a", "b"):
            client.get(f"/v1/predictions/{one}", headers=key)
        client.request("BREW", "/nowhere")
        page = client.get("/metrics", headers=key)
    assert page.headers["Content-Type"].startswith("text/plain; version=")
    counted = dict(re.findall(r"imagestream_http_requests_total\{(.*)\} (.*)", page.text))
    assert counted == {
        'code="401",method="GET",route="/metrics"': "1.0",
        'code="404",method="GET",route="/v1/predictions/{image_id}"': "2.0",
        'code="404",method="other",route="other"': "1.0",
    }
    lines = [json.loads(line) for line in capfd.readouterr().err.splitlines()]
    assert any(re.fullmatch(r'127.0.0.1:\d+ - "GET /metrics HTTP/1.1" 401', line["event"]) for line in lines)
    assert datetime.fromisoformat(lines[0]["timestamp"]).tzinfo is not None
    if shutil.which("promtool"):
        command = ["promtool", "check", "metrics"]
        done = subprocess.run(command, input=page.text, capture_output=True, text=True, check=False)
        assert (done.returncode, done.stdout + done.stderr) == (0, "")
