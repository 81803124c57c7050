"""A home in an unusable bucket: one line with the cause and the setting to change, before anything starts."""

import json
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from uuid import uuid4

import pyarrow as pa
import pytest
from deltalake import DeltaTable

from streaming.jobs.maintain import maintain
from streaming.jobs.rewrite import compact
from streaming.pipeline.positions import read_identity, read_positions
from streaming.query import query
from streaming.settings import Settings
from streaming.storage import store_base as store_module
from streaming.storage.bucket_store import shared_variables
from streaming.storage.store import open_store
from streaming.storage.store_errors import StoreAwayError, store_error
from streaming.storage.table_log import open_delta, storage_options
from streaming.storage.tables import BATCHES, Table
from tests.conftest import command_here, environment, environment_of
from tests.object_store import BUCKET, READER_KEY, SECRET, ObjectStoreServer
from tests.store_proxy import ANYTHING, Fault, StoreProxy
from tests.streaming.history import begin_stream, commit_batch, new_topic

COMMANDS = {
    "doctor": ["doctor"],
    "query": ["query", "SELECT 1"],
    "stream": ["stream", "--until-drained"],
    "train": ["train", "--dataset", "digits", "--limit", "100"],
}
WRONG = uuid4().hex
S3_CREDENTIALS = "AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY"


@dataclass(frozen=True)
class Case:
    """A faulty configuration and the expected message of each command."""

    message: str
    variables: Mapping[str, str] = field(default_factory=dict)
    fault: Fault | None = None
    commands: tuple[str, ...] = tuple(COMMANDS)


CASES = {
    "secret": Case(f"(SignatureDoesNotMatch): check {S3_CREDENTIALS}", {"AWS_SECRET_ACCESS_KEY": WRONG}),
    "key": Case(f"(InvalidAccessKeyId): check {S3_CREDENTIALS}", {"AWS_ACCESS_KEY_ID": "unknown"}),
    "rights": Case("(AccessDenied): check", {"AWS_ACCESS_KEY_ID": READER_KEY}, commands=("doctor", "stream", "train")),
    "no server": Case("does not answer (no connection to http://127.0.0.1:9)", {"AWS_ENDPOINT_URL": "http://127.0.0.1:9"}),
    "no URL": Case("AWS_ENDPOINT_URL: expected http://HOST:PORT", {"AWS_ENDPOINT_URL": "127.0.0.1:9"}),
    "region": Case("another region (AuthorizationHeaderMalformed): set AWS_REGION", fault=Fault.OTHER_REGION),
    "bucket": Case("does not exist (NoSuchBucket): create it, or correct IMAGESTREAM_HOME", fault=Fault.NO_BUCKET),
}  # fmt: skip


@pytest.fixture
def proxy(object_store: ObjectStoreServer) -> Iterator[StoreProxy]:
    with StoreProxy(object_store.port) as proxy:
        yield proxy


@pytest.mark.parametrize("name", CASES)
def test_commands_report_the_cause_in_one_line(
    object_store: ObjectStoreServer, proxy: StoreProxy, tmp_path: Path, name: str
) -> None:
    case = CASES[name]
    proxy.faults = lambda _: case.fault
    variables = {
        **object_store.environment(proxy.port),
        "IMAGESTREAM_WORK": str(tmp_path / "work"),
        "IMAGESTREAM_BOOTSTRAP_SERVERS": "127.0.0.1:9",
        **case.variables,
    }
    with environment(**variables):
        for command in case.commands:
            error = refusal(f"s3://{BUCKET}/{uuid4().hex}", command, tmp_path)
            assert case.message in error, (command, error)
            assert SECRET not in error
            assert WRONG not in error
    assert not (tmp_path / "work" / "spark.log").exists()


def refusal(home: str, command: str, folder: Path) -> str:
    """The error of a command for a home, in one line."""
    summary = folder / "summary.json"
    code, out, err = command_here("--home", home, *COMMANDS[command], "--json", summary)
    assert code == 1, (command, out, err)
    if command == "doctor":
        (check,) = [one for one in json.loads(summary.read_text())["checks"] if one["name"] == "home"]
        return f"{check['found']}: {check['fix']}"
    assert err.startswith("error: ")
    assert len(err.strip().splitlines()) == 1, err
    return err


@pytest.mark.parametrize("command", COMMANDS)
def test_unsupported_scheme_is_refused_in_one_line(command: str) -> None:
    with environment(IMAGESTREAM_HOME="hdfs://node/home"):
        code, _, err = command_here(*COMMANDS[command])
    assert (code, err.count("\n")) == (2, 1)
    assert "IMAGESTREAM_HOME: expected a path or a URI that begins with s3://, gs://, az://, got hdfs://node" in err


def test_store_without_conditional_puts_is_refused(
    bucket_service: Settings, object_store: ObjectStoreServer, proxy: StoreProxy, tmp_path: Path
) -> None:
    proxy.faults = lambda _: Fault.UNCONDITIONAL
    variables = object_store.environment(proxy.port)
    with environment(**environment_of(bucket_service), **variables):
        for command in ("doctor", "stream"):
            assert "does not support conditional puts" in refusal(bucket_service.home, command, tmp_path)
    assert bucket_service.place.store.folders("streams") == []


def test_table_operations_report_an_unavailable_store(
    bucket_home: str,
    object_store: ObjectStoreServer,
    proxy: StoreProxy,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Retries depend on the type of the error, also where deltalake raises another one."""
    monkeypatch.setattr(store_module, "CREATE_TIMEOUT_S", 0.0)
    settings = Settings(home=bucket_home, work=tmp_path / "work", topic=new_topic())
    with environment(**object_store.environment(proxy.port)):
        commit_batch(settings, 1, {0: (0, 2)})
        begin_stream(settings)
        table, place = Table(settings.place.tables, "batches"), settings.place.table("batches")
        identity = read_identity(settings, settings.topic)
        assert identity is not None
        rows = pa.Table.from_pylist([{"batch_id": 2}], schema=BATCHES)
        calls: list[Callable[[], object]] = [
            lambda: table.append(rows, "another", 1),
            lambda: table.transaction("another"),
            table.files,
            table.bytes,
            lambda: table.delete_beyond(settings.topic, {0: 1}),
            lambda: Table(settings.place.tables, "batches"),
            lambda: Table(settings.place.tables, "labels"),
            lambda: open_delta(place, 0),
            lambda: compact(place, 1),
            lambda: query(settings, "SELECT count(*) FROM batches"),
            lambda: read_positions(settings, identity),
            lambda: maintain(settings),
        ]
        with proxy.away():
            for call in calls:
                with pytest.raises(StoreAwayError, match=r"does not answer|did not store") as error:
                    call()
                assert "\n" not in str(error.value)
        assert read_positions(settings, identity).number == 1


def test_store_responses_are_not_repeated() -> None:
    """A URL may contain a signature, and a response may contain parts of the request."""
    error = OSError(
        f"Generic MicrosoftAzure error: Error performing GET https://user:{SECRET}@host/c/key?sig={SECRET} in 1s - "
        f"Server returned non-2xx status code: 500 Internal Server Error: <Code>InternalError</Code>{SECRET}"
    )
    assert str(store_error("az://c/home", error)) == (
        "az://c/home does not answer (InternalError): check AZURE_STORAGE_ENDPOINT"
    )
    message = str(store_error("az://c/home", OSError(str(error).partition(" - ")[0])))
    assert message == "az://c/home does not answer (no connection to https://host): check AZURE_STORAGE_ENDPOINT"


@pytest.mark.parametrize(("place", "setting"), [("s3://b/x", "AWS_ACCESS_KEY_ID"), ("gs://b/x", "GOOGLE_APPLICATION")])
def test_missing_credentials_are_a_temporary_error(place: str, setting: str) -> None:
    """Instance credentials come from a metadata server, which may be temporarily unavailable."""
    error = store_error(place, OSError("Error performing PUT http://169.254.169.254/latest/api/token in 1ms"))
    assert isinstance(error, StoreAwayError)
    assert setting in str(error)


def test_client_is_reused_until_its_variables_change(object_store: ObjectStoreServer) -> None:
    with environment(**object_store.environment()):
        one, other = (open_store(f"s3://{BUCKET}/{name}") for name in ("one", "other"))
        assert vars(one)["_client"] is vars(other)["_client"]
        with environment(AWS_REGION="elsewhere"):
            assert vars(open_store(f"s3://{BUCKET}/one"))["_client"] is not vars(one)["_client"]


def test_executors_get_no_credentials() -> None:
    public = {"AWS_REGION": "here", "AZURE_STORAGE_ACCOUNT_NAME": "ours", "AWS_ENDPOINT_URL_S3": "https://host"}
    secrets = ("AWS_SECRET_ACCESS_KEY", "AWS_SESSION_TOKEN", "AZURE_STORAGE_ACCOUNT_KEY", "GOOGLE_SERVICE_ACCOUNT_KEY")
    with environment(**public, **dict.fromkeys(secrets, SECRET)):
        shared = shared_variables()
    assert shared.items() >= public.items()
    assert SECRET not in shared.values()


@pytest.mark.parametrize("times", [1, 9], ids=["once", "always"])
@pytest.mark.parametrize("fault", [*ANYTHING, Fault.CONFLICT], ids=lambda fault: fault.name)
def test_table_creation_survives_store_faults(
    bucket_home: str, object_store: ObjectStoreServer, proxy: StoreProxy, fault: Fault, times: int
) -> None:
    left = [fault] * times
    proxy.faults = lambda request: (
        left.pop() if request.method == "PUT" and "_delta_log/0" in request.path and left else None
    )
    with environment(**object_store.environment(proxy.port)):
        try:
            created = Table(bucket_home, "labels")
        except StoreAwayError:
            left.clear()
            created = Table(bucket_home, "labels")
    stored = DeltaTable(created.place, storage_options=storage_options(created.place))
    assert stored.schema().to_arrow() == created.schema
