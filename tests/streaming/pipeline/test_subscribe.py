"""Several topics, topic patterns and start positions: the options, and streams with a real broker."""

import os
import signal
import threading
from collections.abc import Callable, Iterator
from contextlib import closing
from datetime import UTC, datetime, timedelta
from time import monotonic
from uuid import uuid4

import pytest
from kafka import KafkaProducer
from kafka.admin import KafkaAdminClient

from streaming.errors import ServiceError
from streaming.jobs.audit import audit
from streaming.pipeline.commit import BatchResult
from streaming.pipeline.positions import read_identity
from streaming.pipeline.status import read_status
from streaming.pipeline.stream import StreamEvents, StreamOptions, run_stream
from streaming.pipeline.subscribe import chosen_begin, chosen_topics
from streaming.platform.topic import Subscription
from streaming.settings import Settings
from tests.conftest import SPARK, imagestream
from tests.faults.harness import rows
from tests.producer.topics import add_partitions, create_topic

PHOTOS = Settings(topic="photos")


@pytest.mark.parametrize(
    ("options", "name", "subscription"),
    [
        ((None, None, None), "photos", Subscription(("photos",))),
        (("a", None, None), "a", Subscription(("a",))),
        (("a, b,a", None, "both"), "both", Subscription(("a", "b"))),
        (("a", None, "other"), "other", Subscription(("a",))),
        ((None, "cam[0-9]+", "cams"), "cams", Subscription(pattern="cam[0-9]+")),
    ],
)
def test_options_select_the_topics(
    options: tuple[str | None, str | None, str | None], name: str, subscription: Subscription
) -> None:
    assert chosen_topics(PHOTOS, *options) == (name, subscription)


@pytest.mark.parametrize(
    ("options", "problem"),
    [
        (("a,b", None, None), "several topics need a stream name"),
        (("a", "b", "c"), "expected --topic or --topic-pattern, got both"),
        ((None, "cam", None), "--topic-pattern: expected a name for the stream"),
        ((None, "cam(", "x"), "--topic-pattern: expected a regular expression, got 'cam\\('"),
        (("a,,b", None, "x"), "--topic: expected a name of letters"),
        (("a/b", None, None), "--topic: expected a name of letters"),
        (("a", None, "../x"), "--stream: expected a name of letters"),
    ],
)
def test_conflicting_options_are_refused(options: tuple[str | None, str | None, str | None], problem: str) -> None:
    with pytest.raises(ServiceError, match=problem):
        chosen_topics(PHOTOS, *options)


def test_start_position_is_a_keyword_or_a_time_with_zone() -> None:
    assert (chosen_begin("earliest"), chosen_begin("latest")) == ("earliest", "latest")
    assert chosen_begin("2026-11-16T08:00Z") == datetime(2026, 11, 16, 8, tzinfo=UTC)
    for wrong in ("", "newest", "2026-11-16T08:00", "5 minutes ago"):
        with pytest.raises(ServiceError, match="--from: expected earliest, latest or a time such as"):
            chosen_begin(wrong)


@pytest.fixture
def prefix(service: Settings) -> str:
    return f"cam-{uuid4().hex[:6]}"


@pytest.fixture
def admin(service: Settings) -> Iterator[KafkaAdminClient]:
    with closing(KafkaAdminClient(bootstrap_servers=service.bootstrap_servers)) as admin:
        yield admin


@pytest.fixture
def send(service: Settings) -> Callable[..., None]:
    """A function that sends messages that are not images."""

    def send(topic: str, partition: int, count: int, at: datetime | None = None) -> None:
        when = None if at is None else int(at.timestamp() * 1000)
        deadline = monotonic() + 300
        while True:  # a producer caches the partitions of a topic: a new partition needs a new producer
            with closing(KafkaProducer(bootstrap_servers=service.bootstrap_servers)) as producer:
                if partition in (producer.partitions_for(topic) or ()):
                    for number in range(count):
                        producer.send(topic, b"message %d" % number, partition=partition, timestamp_ms=when).get(300)
                    return
            assert monotonic() < deadline, f"{topic} has no partition {partition}"

    return send


def drain(settings: Settings, options: StreamOptions, on_batch: Callable[[BatchResult], None] = lambda _: None) -> None:
    SPARK.start(settings.work_dir.parent, settings.jars_dir)
    run_stream(settings, str(settings.bootstrap_servers), options, StreamEvents(on_batch=on_batch))


def counts(settings: Settings) -> dict[tuple[str, int], int]:
    found = rows(settings, 'SELECT topic, "partition", count(*) AS n FROM quarantine GROUP BY topic, "partition"')
    return {(row["topic"], row["partition"]): row["n"] for row in found}


def test_pattern_picks_up_new_topics_and_partitions(
    service: Settings, prefix: str, admin: KafkaAdminClient, send: Callable[..., None]
) -> None:
    stream = service.model_copy(update={"topic": "cams"})
    one, two, other = (f"{prefix}-{name}" for name in ("1", "2", "x"))
    for topic in (one, other):
        create_topic(service.bootstrap_servers, topic)
    send(one, 0, 3)
    send(other, 0, 1)
    seen: list[int] = []

    def grow(_: BatchResult) -> None:
        """Add a topic after the first batch and a partition after the second one."""
        seen.append(len(seen))
        if len(seen) == 1:
            create_topic(service.bootstrap_servers, two)
            send(two, 0, 2)
        elif counts(stream).get((two, 0)) == 2 and len(admin.describe_topics([one])[0]["partitions"]) == 1:
            add_partitions(admin, one, 2)
            send(one, 1, 4)
        elif sum(counts(stream).values()) == 9:
            timeout.cancel()
            signal.raise_signal(signal.SIGTERM)

    timeout = threading.Timer(240, os.kill, (os.getpid(), signal.SIGTERM))  # the counts are wrong then
    timeout.start()
    options = StreamOptions(subscription=Subscription(pattern=rf"{prefix}-\d"))
    drain(stream, options, grow)
    timeout.cancel()
    assert counts(stream) == {(one, 0): 3, (one, 1): 4, (two, 0): 2}
    assert audit(stream).clean
    status = read_status(stream)
    assert (status.lag, {(part.topic, part.partition) for part in status.partitions}) == (
        0,
        {(one, 0), (one, 1), (two, 0)},
    )
    identity = read_identity(stream, "cams")
    assert identity is not None
    assert identity.topics.keys() == {one}

    # Another stream of the same home can read other topics, but not these.
    refused = imagestream(stream, "stream", "--topic", one, "--until-drained", code=1)
    assert f"topic '{one}' is read by stream 'cams'" in refused["stderr"]
    imagestream(stream, "stream", "--topic", f"{other},{prefix}-y", "--stream", "second", "--until-drained")
    assert counts(stream) == {(one, 0): 3, (one, 1): 4, (two, 0): 2, (other, 0): 1}
    report = imagestream(stream, "audit", "--broker")
    assert {(span["topic"], span["messages"]) for span in report["spans"]} == {(one, 3), (one, 4), (two, 2), (other, 1)}


@pytest.mark.parametrize("begin", ["latest", "time"])
def test_from_option_applies_to_the_first_start_only(
    service: Settings, admin: KafkaAdminClient, send: Callable[..., None], begin: str
) -> None:
    create_topic(service.bootstrap_servers, service.topic, partitions=2, message_timestamp_type="CreateTime")
    now = datetime.now(UTC)
    send(service.topic, 0, 3, now - timedelta(hours=2))
    send(service.topic, 0, 2, now - timedelta(hours=1))
    when = "latest" if begin == "latest" else (now - timedelta(minutes=90)).isoformat()
    expected = 0 if begin == "latest" else 2
    imagestream(service, "stream", "--from", when, "--until-drained")
    identity = read_identity(service, service.topic)
    assert identity is not None
    assert {(one.partition, one.offset) for one in identity.first} == {(0, 5 - expected), (1, 0)}
    send(service.topic, 0, 1)
    send(service.topic, 1, 1)
    imagestream(service, "stream", "--from", "earliest", "--until-drained")
    assert counts(service) == {(service.topic, 0): expected + 1, (service.topic, 1): 1}
    assert audit(service).clean
