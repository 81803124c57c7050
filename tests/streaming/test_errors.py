"""Error types survive renamed classes, pickling, and Spark's conversion of workers' exceptions to text."""

import pickle
import threading
import traceback
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pyarrow as pa
import pytest
from pyspark.errors import PySparkException
from pyspark.sql import SparkSession

from streaming.errors import (
    KINDS,
    MARK,
    ConfigurationError,
    ServiceError,
    StoreAwayError,
    UnavailableError,
    decode,
    encode,
    reported,
    with_message,
)
from streaming.extras import MissingExtraError
from streaming.pipeline.answers_reader import AnswersAwayError
from streaming.pipeline.stream import StreamEvents, StreamOptions, _QueryLoop, may_return
from streaming.platform.kafka_probe import RefusedError
from streaming.platform.schema_registry import RegistryAwayError
from streaming.platform.session import cause, raised
from streaming.settings import read_settings


class RenamedError(UnavailableError):
    """A class without a separate kind: it has that of its parent."""


def all_types(base: type[ServiceError] = ServiceError) -> Iterator[type[ServiceError]]:
    yield base
    for one in base.__subclasses__():
        yield from all_types(one)


@pytest.mark.parametrize("kind", [*KINDS.values(), RenamedError, MissingExtraError])
def test_error_is_decoded_from_a_traceback_with_its_type(kind: type[ServiceError]) -> None:
    def fail(_: int) -> Iterator[int]:
        raise kind('no "answer"\nfrom bücket', hint="start it") from ValueError("x")
        yield

    with pytest.raises(kind) as failed:
        next(reported(fail)(1))
    text = "".join(traceback.format_exception(failed.value))
    copy = pickle.loads(pickle.dumps(failed.value))  # noqa: S301  written by this process
    assert (str(copy), copy.hint) == ('no "answer"\nfrom bücket: start it', "start it")
    for found in (decode(f"ValueError: y\n{text}\n\n\tat org.apache.spark.api"), with_message(copy, "x"), copy):
        assert isinstance(found, KINDS[kind.kind])
    assert text.count(MARK) == 1
    assert str(decode(text)) == str(copy)


@pytest.mark.parametrize(
    "text",
    [
        "",
        "streaming.errors.UnavailableError: no marker",
        f"{MARK}{{}}",
        f'{MARK}{{"kind": "other", "message": "", "hint": ""}}',
        f'{MARK}{{"kind": [], "message": "", "hint": ""}}',
        f"{MARK}{{{'[' * 100_000}}}",
        f"ValueError: got '{encode(UnavailableError('x'))}'",
    ],
)
def test_text_that_encode_did_not_write_is_not_decoded(text: str) -> None:
    assert decode(text) is None


def test_each_kind_belongs_to_one_type() -> None:
    assert {one for one in all_types() if "kind" in vars(one)} == {*KINDS.values()}


def test_error_of_a_spark_worker_keeps_its_type(spark: SparkSession, tmp_path: Path) -> None:
    class AnotherNameError(UnavailableError):
        pass

    def fail(_: Iterator[pa.RecordBatch]) -> Iterator[pa.RecordBatch]:
        raise AnotherNameError("the registry does not answer")
        yield

    def score(messages: Any, _batch: int) -> None:
        messages.select("value").mapInArrow(reported(fail), "value long").collect()

    with pytest.raises(PySparkException) as job:
        spark.range(1).mapInArrow(reported(fail), "id long").collect()
    query = spark.readStream.format("rate").load().writeStream.foreachBatch(score)
    started = query.option("checkpointLocation", (tmp_path / "checkpoint").as_uri()).start()
    with pytest.raises(PySparkException) as stream:
        started.awaitTermination(60)
    for failed in (job.value, stream.value):
        assert type(raised(failed)) is UnavailableError
        assert cause(failed) == "the registry does not answer"


def run_after(error: Exception, tmp_path: Path) -> list[str]:
    """The messages that the stream reports after a query failed with `error`."""
    trouble: list[str] = []
    stop = threading.Event()
    stop.set()  # do not wait
    settings = read_settings(tmp_path)
    events = StreamEvents(on_trouble=trouble.append)
    spark: Any = None  # not used after a failure
    _QueryLoop(settings, "127.0.0.1:9", StreamOptions(), events, spark, stop)._after_failure(error)
    return trouble


@pytest.mark.parametrize("kind", [UnavailableError, RenamedError, RegistryAwayError, AnswersAwayError])
def test_stream_retries_after_an_unavailable_error(kind: type[ServiceError], tmp_path: Path) -> None:
    assert run_after(kind("no answer"), tmp_path) == ["no answer; waiting for it"]


@pytest.mark.parametrize("kind", [one for one in KINDS.values() if not issubclass(one, UnavailableError)])
def test_stream_stops_with_one_line_after_a_permanent_error(kind: type[ServiceError], tmp_path: Path) -> None:
    renamed = type("AnotherName", (kind,), {})
    with pytest.raises(kind, match=r"^the stream stopped: wrong for good$"):
        run_after(renamed("wrong for good"), tmp_path)


@pytest.mark.parametrize("error", [RefusedError("no right"), StoreAwayError("disk full"), ValueError("an engine")])
def test_stream_retries_after_an_error_of_another_type(
    error: Exception, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """127.0.0.1:9 does not answer, so the stream waits for the broker."""
    monkeypatch.setattr("streaming.platform.topic.TIMEOUT_MS", 100)
    (line,) = run_after(error, tmp_path)
    assert line.endswith("waiting for it")
    assert "127.0.0.1:9" in line


def test_unavailable_store_is_retried_unless_it_is_local() -> None:
    assert may_return(StoreAwayError("x"), local=False)
    assert not may_return(StoreAwayError("x"), local=True)
    assert not may_return(ConfigurationError("x"), local=False)
