"""The store in a bucket: its client and endpoint, and errors in one line, without a request to any server."""

import os
import sys
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from obstore.exceptions import NotSupportedError

from streaming.errors import ServiceError
from streaming.storage import bucket_store as bucket_module
from streaming.storage.bucket_store import BucketStore
from streaming.storage.store import Store, open_store


def failing_bucket(code: str) -> Store:
    class Missing:
        def __getattr__(self, _: str) -> Callable[..., Any]:
            def fail(*_: Any, **__: Any) -> Any:
                raise FileNotFoundError(f"<Code>{code}</Code>")

            return fail

    return BucketStore("s3://bucket/home", Missing())


def test_missing_bucket_is_distinguished_from_a_missing_object(tmp_path: Path) -> None:
    def calls(store: Store) -> list[Callable[[], Any]]:
        return [lambda: store.get("a"), lambda: store.head("a", 1), lambda: store.size("a")]

    assert [call() for call in calls(failing_bucket("NoSuchKey"))] == [None, None, None]
    store = failing_bucket("NoSuchBucket")
    for call in (*calls(store), lambda: store.fetch("a", tmp_path / "to")):
        with pytest.raises(ServiceError, match=r"^the bucket of s3://bucket/home does not exist"):
            call()


def without_cloud_variables(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in list(os.environ):
        if name.startswith(bucket_module.CLOUD_VARIABLES):
            monkeypatch.delenv(name)


def test_client_of_a_bucket_is_shared_until_the_variables_change(monkeypatch: pytest.MonkeyPatch) -> None:
    without_cloud_variables(monkeypatch)
    one, same = (bucket_module.open_bucket(f"s3://bucket/{prefix}", {"region": "x"}) for prefix in ("a", "b"))
    assert one._client is same._client
    monkeypatch.setenv("AWS_REGION", "y")
    assert bucket_module.open_bucket("s3://bucket/a", {"region": "x"})._client is not one._client


WITH_CREDENTIALS = "http://user:word@host"  # pragma: allowlist secret


@pytest.mark.parametrize("endpoint", ["host:9000", WITH_CREDENTIALS, "ftp://host", "http://"])
def test_invalid_endpoint_is_refused_without_showing_it(monkeypatch: pytest.MonkeyPatch, endpoint: str) -> None:
    without_cloud_variables(monkeypatch)
    monkeypatch.setenv("AWS_ENDPOINT_URL", endpoint)
    with pytest.raises(ServiceError, match="^AWS_ENDPOINT_URL: expected http://HOST:PORT or https://HOST, without"):
        open_store("s3://bucket/home")
    monkeypatch.setenv("AWS_ENDPOINT_URL", "https://host/path")
    open_store("s3://bucket/home")


def test_unencrypted_requests_are_allowed_only_to_an_endpoint_with_http(monkeypatch: pytest.MonkeyPatch) -> None:
    without_cloud_variables(monkeypatch)
    assert not bucket_module.allows_http("s3")
    monkeypatch.setenv("AWS_ENDPOINT", "https://host")
    assert not bucket_module.allows_http("s3")
    monkeypatch.setenv("AWS_ENDPOINT_URL", "HTTP://host:9000")
    assert [bucket_module.allows_http(scheme) for scheme in ("s3", "gs", "az")] == [True, False, False]


@pytest.mark.parametrize(
    ("endpoint", "option", "allowed"),
    [("https://host", "false", False), ("http://host", "false", True), ("https://host", "true", True)],
)
def test_client_of_a_bucket_allows_http_by_its_endpoint_or_option(
    monkeypatch: pytest.MonkeyPatch, endpoint: str, option: str, allowed: bool
) -> None:
    without_cloud_variables(monkeypatch)
    monkeypatch.setenv("AWS_ENDPOINT_URL", endpoint)
    client = bucket_module.open_bucket("s3://bucket", {"aws_allow_http": option})._client
    assert str(client.client_options["allow_http"]).lower() == str(allowed).lower()


def test_account_of_azure_is_required_and_its_key_not_shown(monkeypatch: pytest.MonkeyPatch) -> None:
    without_cloud_variables(monkeypatch)
    with pytest.raises(ServiceError, match=r"^az://bucket cannot be opened: set AZURE_STORAGE_ACCOUNT_NAME$"):
        open_store("az://bucket")
    monkeypatch.setenv("AZURE_STORAGE_ACCOUNT_NAME", "account")
    monkeypatch.setenv("AZURE_STORAGE_ACCOUNT_KEY", "no base64!")
    with pytest.raises(ServiceError, match=r"^az://bucket cannot be opened: AZURE_STORAGE_ACCOUNT_KEY is not a valid"):
        open_store("az://bucket")


def test_bucket_without_its_package_is_reported(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "obstore.store", None)
    with pytest.raises(ServiceError, match="^s3:// needs the package obstore: pip install obstore$"):
        open_store("s3://never-opened-before")


def test_error_of_a_bucket_is_shortened_to_its_first_line() -> None:
    assert bucket_module._first_line(ValueError("first\nsecond\nthird")) == "first"
    assert bucket_module._first_line(ValueError("x" * 400)) == "x" * 300


def test_bucket_without_an_operation_is_refused_in_one_line() -> None:
    def put(*_: Any, **__: Any) -> None:
        raise NotSupportedError("conditional puts\nare not supported")

    store = BucketStore("s3://bucket/home", SimpleNamespace(put=put))  # type: ignore[arg-type]
    with pytest.raises(ServiceError, match=r"^s3://bucket/home cannot be used as a store: conditional puts$"):
        store.put("a", b"one")
