"""Lists and labels over HTTP with real tables and a real registry; no request reaches Kafka."""

import re
from collections.abc import Iterator
from datetime import timedelta
from pathlib import Path
from typing import Any

import httpx
import pytest

from streaming.images.corrections import AMBIGUOUS, UNKNOWN, add_labels
from streaming.images.labels_csv import EMPTY
from streaming.query import query
from streaming.registry import open_registry
from streaming.settings import Settings
from tests.models.samples import tiny_bundle
from tests.streaming.gateway.test_connections import served
from tests.streaming.gateway.test_gateway import NOW, append, check_problem, image_id, prediction

ROWS = 23


@pytest.fixture(scope="module")
def client(tmp_path_factory: pytest.TempPathFactory) -> Iterator[httpx.Client]:
    home = tmp_path_factory.mktemp("lists")
    settings = Settings(home=home)
    rows = [
        prediction(b"%d" % number, ("cat", "dog")[number % 2], number, NOW + timedelta(seconds=number // 5))
        | {"confidence": number / 32, "model_version": 1 + number // 20, "source": f"{number}.jpg"}
        for number in range(ROWS)
    ]
    append(settings, "predictions", rows[:10])
    append(settings, "predictions", rows[10:])
    message = {"image_id": "x", "topic": "images", "partition": 0, "value": b"secret", "quarantined_at": NOW}
    bad = message | {"stage": "decode", "detail": "a detail"}
    reasons = ["truncated", "empty", "truncated"]
    append(settings, "quarantine", [bad | {"reason": reason, "offset": n} for n, reason in enumerate(reasons)])
    registry = open_registry(settings.home)
    for accuracy in (0.5, 0.75):
        registry.register(lambda folder, a=accuracy: tiny_bundle(folder, metrics={"accuracy": a}))  # type: ignore[misc]
    registry.promote(2, by="ada", why="better")
    with served(home) as port, httpx.Client(base_url=f"http://127.0.0.1:{port}/v1") as client:
        yield client


def pages(client: httpx.Client, path: str, **filters: Any) -> list[list[dict[str, Any]]]:
    found, cursor = [], None
    while True:
        response = client.get(path, params=filters | ({"cursor": cursor} if cursor else {}))
        assert response.status_code == 200, response.text
        found.append(response.json()["items"])
        cursor = response.json()["next_cursor"]
        if cursor is None:
            return found


def test_pages_contain_every_row_once_latest_first(client: httpx.Client) -> None:
    found = pages(client, "/predictions", limit=5)
    assert [len(page) for page in found] == [5, 5, 5, 5, 3]  # five rows have equal times: then offsets decide
    assert [row["offset"] for page in found for row in page] == list(reversed(range(ROWS)))
    row = found[0][0]
    assert (row["label"], row["source"], row["model_version"]) == ("cat", "22.jpg", 2)
    assert len(pages(client, "/predictions", limit=ROWS)) == 1


@pytest.mark.parametrize(
    ("filters", "offsets"),
    [
        ({"label": "dog", "max_confidence": 5 / 32}, [5, 3, 1]),
        ({"min_confidence": 20 / 32, "label": "cat"}, [22, 20]),
        ({"model_version": 2}, [22, 21, 20]),
        ({"source": "7.jpg"}, [7]),
        ({"since": (NOW + timedelta(seconds=1)).isoformat(), "until": "2026-03-01T13:00:02+01:00"}, [9, 8, 7, 6, 5]),
        ({"label": "' OR true --"}, []),
        ({"since": "9999-12-31T23:59:59-23:59"}, []),
    ],
)
def test_predictions_are_filtered(client: httpx.Client, filters: dict[str, Any], offsets: list[int]) -> None:
    assert [row["offset"] for page in pages(client, "/predictions", limit=2, **filters) for row in page] == offsets


def test_quarantined_messages_are_filtered_and_returned_without_bytes(client: httpx.Client) -> None:
    ((last,), (first,)) = pages(client, "/quarantine", reason="truncated", stage="decode", limit=1)
    assert (last["offset"], first["offset"]) == (2, 0)
    assert "value" not in last


def test_models_are_listed_with_their_aliases_and_metrics(client: httpx.Client) -> None:
    ((second,), (first,)) = pages(client, "/models", limit=1)
    assert (second["version"], second["aliases"], second["metrics"]) == (2, ["champion"], {"accuracy": 0.75})
    assert (first["version"], first["aliases"]) == (1, [])
    assert [[one["version"] for one in page] for page in pages(client, "/models", alias="champion")] == [[2]]


@pytest.mark.parametrize(
    ("path", "detail"),
    [
        ("/predictions?limit=501", "limit: "),
        ("/predictions?colour=red", "colour: Extra inputs are not permitted"),
        ("/predictions?since=2026-03-01T12:00:00", "since: .* expected a time with a time zone, such as 2026-"),
        ("/quarantine?until=1772366400", "until: .* expected a time with a time zone"),
        ("/predictions?cursor=x", "cursor: expected the next_cursor"),
        ("/quarantine?cursor=WzFd", "cursor: expected the next_cursor"),
        ("/models?alias=best", "alias: "),
        ("/predictions?label=cat&label=dog", "'label': expected one value, got 2"),
    ],
)
def test_invalid_list_request_is_refused(client: httpx.Client, path: str, detail: str) -> None:
    assert re.search(detail, check_problem(client.get(path), 422))


def test_lists_of_a_new_home_are_empty(tmp_path: Path) -> None:
    with served(tmp_path) as port, httpx.Client(base_url=f"http://127.0.0.1:{port}/v1") as client:
        for path in ("/predictions", "/quarantine", "/models"):
            assert client.get(path).json() == {"items": [], "next_cursor": None}


def test_labels_over_http_equal_those_of_the_command(tmp_path: Path) -> None:
    settings = Settings(home=tmp_path)
    names = ("a/1.jpg", "b/1.jpg", "2.jpg")
    rows = [prediction(one.encode(), "cat", n) | {"source": one} for n, one in enumerate(names)]
    append(settings, "predictions", rows)
    given = [("2.jpg", "dog"), ("1.jpg", "dog"), ("3.jpg", "dog"), ("2.jpg ", "")]
    body = {"key": "name", "by": "ada", "labels": [{"image": image, "label": label} for image, label in given]}
    with served(tmp_path) as port, httpx.Client(base_url=f"http://127.0.0.1:{port}/v1", timeout=300) as client:
        response = client.post("/labels", json=body).json()
        assert (response["added"], response["left_out"]) == (1, {EMPTY: 1, AMBIGUOUS: 1, UNKNOWN: 1})
        assert response["examples"][AMBIGUOUS] == ["1.jpg"]
        assert client.post("/labels", json=body).json()["unchanged"] == 1
        by_id = {"labels": [{"image": image_id(b"a/1.jpg"), "label": "dog"}]}
        assert client.post("/labels", json=by_id).json()["added"] == 1
    (tmp_path / "labels.csv").write_text("source,label\na/1.jpg,dog\n2.jpg,dog\n")
    assert add_labels(settings, tmp_path / "labels.csv", "b").unchanged == 2
    found = query(settings, 'SELECT image_id, label, "by" FROM labels ORDER BY labelled_at').to_pylist()
    expected = [(image_id(b"2.jpg"), "dog", "ada"), (image_id(b"a/1.jpg"), "dog", "gateway")]
    assert [tuple(row.values()) for row in found] == expected


@pytest.mark.parametrize(
    ("request_", "code", "detail"),
    [
        ({"json": {"labels": []}}, 422, "labels: List should have at least 1 item"),
        ({"json": {"key": "colour", "labels": [{"image": "a", "label": "b"}]}}, 422, "key: "),
        ({"json": {"labels": [{"image": "a", "label": "x" * 201}]}}, 422, "labels.0.label: "),
        ({"content": b"{", "headers": {"Content-Type": "application/json"}}, 422, "Invalid JSON"),
        ({"content": b"image_id,label"}, 415, "application/json"),
        ({"content": b" " * 5_000_000, "headers": {"Content-Type": "application/json"}}, 413, "at most 4,194,304"),
    ],
)
def test_invalid_labels_are_refused(client: httpx.Client, request_: dict[str, Any], code: int, detail: str) -> None:
    assert detail in check_problem(client.post("/labels", **request_), code)
